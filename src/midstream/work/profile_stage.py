"""The process of `midstream profile`: some steps of a stage, their meters, a trace and a page.

The stage's own job is built as its run builds it, from its initialiser; nothing is written into the
store but features that a stage would store.
"""

import json
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from torch.profiler import ProfilerActivity, profile

from midstream.config import Machine
from midstream.core.storage import write_bytes, write_json
from midstream.core.tokens import TokenCount
from midstream.data.rows import load_steps
from midstream.study.label import label
from midstream.study.stages import Trained, stage_from_json
from midstream.study.store import Ledger
from midstream.train import step
from midstream.train.guards import parameter_table
from midstream.train.parallel import peak_memory_bytes
from midstream.train.step import Clock, freeze, is_trained, make_optimizer, train_step
from midstream.work.run_stage import StageRunner

# Steps that warm up, and that the trace holds.
WARM_STEPS = 2
TRACED_STEPS = 2
# Rows of the page's table of operations.
NUM_OPERATIONS = 20
REFUSED_EXIT_CODE = 2


def profile_stage(
    stage: Trained, ledger: Ledger, machine: Machine, num_steps: int, out: Path
) -> dict[str, Any]:
    """Take the steps and write `trace.json`, `summary.json` and `summary.html`; returns the meters.

    Raises FileNotFoundError where a parent of the stage is not done, ValueError where the stage has
    fewer steps.
    """
    for parent in stage.parents:
        ledger.results(parent)
    runner = StageRunner(ledger, machine, lambda event: None, lambda: False)
    place = runner.place
    job = runner.job(stage, out)
    needed = WARM_STEPS + num_steps + TRACED_STEPS
    if job.dataset.plan.num_steps < needed:
        raise ValueError(
            f"{label(stage)} has {job.dataset.plan.num_steps} steps, {needed} are wanted; "
            "give a smaller --steps"
        )
    factor = freeze(job.model, job.training)
    optimizer = make_optimizer(job.model, job.training.optimizer, encoder_rate_factor=factor)
    job.model.train()
    steps = load_steps(
        job.dataset,
        first_row=0,
        micro_rows=runner.machine_for(stage).micro_batch_rows or job.training.rows.batch_rows,
        workers=machine.data_workers,
        device=place.device,
    )

    def take(clock: Clock) -> tuple[TokenCount, int, int]:
        with clock.part("data"):
            batches = next(steps)
        result = train_step(
            job.model,
            optimizer,
            batches,
            encode=job.encode,
            rate=0.0,  # the weights stay: every step does equal work
            settings=job.training.optimizer,
            place=place,
            clock=clock,
        )
        counts = sum((batch.counts for batch in batches), TokenCount())
        attended = sum(int((b.position_ids + 1)[b.segment_ids >= 0].sum()) for b in batches)
        return counts, result.num_images, attended

    for _ in range(WARM_STEPS):
        take(Clock(place.device))
    clock, counts, images, attended = Clock(place.device), TokenCount(), 0, 0
    before = time.perf_counter()
    for _ in range(num_steps):
        more, seen, looked_at = take(clock)
        counts, images, attended = counts + more, images + seen, attended + looked_at
    parts = clock.read()
    seconds = time.perf_counter() - before
    model = stage.model
    found = step.report(
        counts=counts,
        images=images,
        flops=step.training_flops(
            model.decoder,
            model.encoder,
            counts,
            attended,
            images if job.looks else 0,
            encoder_trained=is_trained(job.model.encoder),
            decoder_trained=is_trained(job.model.decoder),
        ),
        seconds=seconds,
        parts=parts,
        peak_flops=place.peak_flops,
        peak_memory_bytes=_memory(place.device),
    )
    out.mkdir(parents=True, exist_ok=True)
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if place.device.type == "cuda" else []
    with profile(activities=kinds) as traced:
        for _ in range(TRACED_STEPS):
            take(Clock(place.device))
    traced.export_chrome_trace(str(out / "trace.json"))
    summary = {
        "stage": label(stage),
        "device": str(place.device),
        "precision": str(place.precision).removeprefix("torch."),
        "torch": torch.__version__,
        "machine": machine.model_dump(mode="json"),
        "steps": num_steps,
        "seconds_a_step": seconds / num_steps,
        "meters": found,
        "parameters": parameter_table(job.model),
        "operations": _operations(traced),
    }
    write_json(out / "summary.json", summary)
    template = files("midstream.work").joinpath("profile_page.html.jinja").read_text()
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    write_bytes(out / "summary.html", page.render(summary).encode())
    return found


def _operations(traced: "profile") -> list[dict[str, Any]]:
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


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory_bytes()


def main() -> int:
    """Read the request from the file that is named; the exit code is 2 where it is refused."""
    request = json.loads(Path(sys.argv[1]).read_text())
    stage = stage_from_json(json.dumps(request["stage"]))
    assert isinstance(stage, Trained)
    try:
        found = profile_stage(
            stage,
            Ledger(Path(request["store"])),
            Machine.model_validate(request["machine"]),
            request["steps"],
            Path(request["out"]),
        )
    except (ValueError, OSError) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return REFUSED_EXIT_CODE
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
