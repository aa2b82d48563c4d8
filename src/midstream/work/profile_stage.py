"""The work of `midstream profile`: some steps of a stage, their meters, a trace and a page.

The stage's own job is built as its run builds it; nothing is written into the store but features.
"""

import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from torch import profiler

from midstream.config import Machine
from midstream.core.storage import write_bytes, write_json
from midstream.core.tokens import TokenCount
from midstream.data.rows import load_steps
from midstream.study.label import label
from midstream.study.stages import Trained
from midstream.study.store import Ledger
from midstream.train.checkpoint import Progress
from midstream.train.guards import parameter_table
from midstream.train.loop import Job, stage_meters
from midstream.train.parallel import Clock, data_workers, forget_peak
from midstream.train.step import StepTotals, Taken, freeze, make_optimizer, train_step
from midstream.work.protocol import Channel, Request
from midstream.work.run_stage import StageRunner

# Steps that warm up, and that the trace holds.
WARM_STEPS = 2
TRACED_STEPS = 2
# Rows of the page's table of operations.
NUM_OPERATIONS = 20


class ProfileRequest(Request):
    """A stage of a store, the machine it runs on, how many steps are measured, and where to."""

    store: Path
    stage: Trained
    machine: Machine
    steps: int
    out: Path


def profile(request: ProfileRequest, channel: Channel) -> dict[str, Any]:
    """Take the steps and write `trace.json`, `summary.json` and `summary.html`; returns the meters.

    Raises FileNotFoundError where a parent of the stage is not done, ValueError where the stage has
    fewer steps.
    """
    stage, ledger, out = request.stage, Ledger(request.store), request.out
    for parent in stage.parents:
        ledger.results(parent)
    runner = StageRunner(ledger, request.machine, lambda event: None, lambda: False)
    job = runner.job(stage, out)
    apart, num_steps = WARM_STEPS + TRACED_STEPS, job.dataset.plan.num_steps
    if num_steps < apart + request.steps:
        most = num_steps - apart
        remedy = f"give --steps {most} or less" if most > 0 else "give a longer --stage"
        raise ValueError(
            f"{label(stage)} has {num_steps} steps, {apart + request.steps} are wanted, {apart} of "
            f"them to warm up and for the trace; {remedy}"
        )
    steps = Steps(job, runner, stage)
    for _ in range(WARM_STEPS):
        steps.take(Clock(runner.device))
    forget_peak(runner.device)
    seconds, meters = measured(steps, request.steps)
    out.mkdir(parents=True, exist_ok=True)
    kinds = [profiler.ProfilerActivity.CPU]
    kinds += [profiler.ProfilerActivity.CUDA] if runner.device.type == "cuda" else []
    with profiler.profile(activities=kinds) as traced:
        for _ in range(TRACED_STEPS):
            steps.take(Clock(runner.device))
    traced.export_chrome_trace(str(out / "trace.json"))
    summary = {
        "stage": label(stage),
        "device": str(runner.device),
        "precision": runner.place.precision_name,
        "torch": torch.__version__,
        "machine": request.machine.model_dump(mode="json"),
        "steps": request.steps,
        "seconds_a_step": seconds / request.steps,
        "meters": meters,
        "parameters": parameter_table(job.model),
        "operations": _operations(traced),
    }
    write_json(out / "summary.json", summary)
    template = files("midstream.work").joinpath("profile_page.html.jinja").read_text()
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    write_bytes(out / "summary.html", page.render(summary).encode())
    return meters


class Steps:
    """The steps of a training job, one by one; the weights stay, so that all do equal work."""

    def __init__(self, job: Job, runner: StageRunner, stage: Trained) -> None:
        self.job, self.place = job, runner.place
        factor = freeze(job.model, job.training)
        self.optimizer = make_optimizer(
            job.model, job.training.optimizer, encoder_rate_factor=factor
        )
        job.model.train()
        self.batches = load_steps(
            job.dataset,
            first_row=0,
            micro_rows=runner.machine_for(stage).micro_batch_rows or job.training.rows.batch_rows,
            workers=data_workers(runner.machine, runner.device),
            device=runner.device,
        )
        self.taken: Taken | None = None

    def take(self, clock: Clock) -> StepTotals:
        """Take a step as a stage does, which reads what the one before gave: what it held."""
        with clock.part("data", on_device=True):
            batches = next(self.batches)
        taken = train_step(
            self.job.model,
            self.optimizer,
            batches,
            encode=self.job.encode,
            rate=0.0,
            settings=self.job.training.optimizer,
            place=self.place,
            clock=clock,
        )
        self.settle()
        self.taken = taken
        return taken.totals

    def settle(self) -> None:
        """Wait until the last step has ended."""
        if self.taken is not None:
            self.taken.read()


def measured(steps: Steps, num_steps: int) -> tuple[float, dict[str, Any]]:
    """The seconds of so many steps, and their meters."""
    job, place = steps.job, steps.place
    clock, counts, images, attended = Clock(place.device), TokenCount(), 0, 0
    steps.settle()
    before = time.perf_counter()
    for _ in range(num_steps):
        held = steps.take(clock)
        counts, attended = counts + held.counts, attended + held.attended
        images += sum(held.num_images)
    steps.settle()
    parts = clock.read()
    seconds = time.perf_counter() - before
    progress = Progress(
        num_steps,
        counts.seen,
        counts.seen,
        None,
        counts,
        num_images=images,
        attended=attended,
        seconds=seconds,
    )
    return seconds, stage_meters(job, place, progress, parts)


def _operations(traced: profiler.profile) -> list[dict[str, Any]]:
    """The operations that took longest themselves, with their share of all."""
    rows = []
    for event in traced.key_averages():
        on_device = getattr(event, "self_device_time_total", 0)
        rows.append((max(on_device, event.self_cpu_time_total), event.count, event.key))
    total = sum(time_taken for time_taken, _, _ in rows) or 1.0
    rows.sort(reverse=True)
    return [
        {"name": name, "share": taken / total, "calls": calls, "ms": taken / 1000 / TRACED_STEPS}
        for taken, calls, name in rows[:NUM_OPERATIONS]
    ]
