"""Runs what a study lacks on this machine.

Runs what a study lacks: one launcher a store, a few workers, one stage a worker at a time. Where a
study runs: what it says itself, what was asked for, and what must be there for that.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any

from midstream.config import Machine
from midstream.cost.graph import Plan, PlanRow, plan
from midstream.cost.pictures import FeaturePlan, choice_for, feature_plan, frozen_encoder
from midstream.launch.check_data import Problem, refused
from midstream.launch.checks import problems_of_run
from midstream.launch.slurm_queue import require_no_jobs
from midstream.launch.terminal import (
    STOPPED_EXIT_CODE,
    Outcome,
    failed_before,
    failure,
    not_started,
    require_inputs,
    require_not_running,
    stop_signals,
)
from midstream.launch.workers import (
    Announcer,
    Event,
    Worker,
    announcer,
    gpu_shares,
    work_line,
    workers_with_gpus,
    write_work,
)
from midstream.study.stages import DataStage, Ranked, Stage
from midstream.study.store import Ledger, launch_lock
from midstream.study.studies import AnyStudy

__all__ = ["STOPPED_EXIT_CODE", "Outcome", "remaining_chains", "run"]


def run(
    study: AnyStudy,
    ledger: Ledger,
    machine: Machine,
    on_event: Callable[[Event], None],
    command: Sequence[str] | None = None,
    retry: bool = False,
    skip_checks: bool = False,
) -> Outcome:
    """Run every stage of `study` that is not done, parents first; stopped ones go on.

    A stage that failed before is tried again only with `retry`; without it, it and its descendants
    are left and named. `on_event` gets {"event": "plan", "num_stages", "num_done"}, then the
    workers' events with the number of the "worker" and its "log" added. A failed stage stops its
    descendants only; SIGINT or SIGTERM asks the running stages to keep a checkpoint and stop, a
    second one ends them. A study that is done starts and writes nothing. What `launch/checks.py`
    finds wrong is refused, at first and again when the data is prepared, before which nothing else
    starts; with `skip_checks` all starts at once, and what is wrong fails where it is met. Raises
    ValueError if another launcher holds the store, if jobs of it are in a cluster's queue, if a
    stage still runs elsewhere or if the workers need more GPUs than there are.
    """
    if skip_checks:
        require_inputs(study)
    before = plan(study, ledger)
    if not before.to_run:
        return Outcome(num_before=before.num_done)
    gpus = gpu_shares(machine)
    with launch_lock(ledger.store):
        require_no_jobs(ledger.store)
        work = plan(study, ledger)
        require_not_running(work.rows, ledger)
        found = () if skip_checks else problems_of_run(work, ledger, machine)
        if wrong := refused(found):
            return Outcome(work.num_done, num_skipped=len(work.to_run), refused=wrong)
        ledger.save_study(study)
        on_event({"event": "plan", "num_stages": len(work.rows), "num_done": work.num_done})
        for doubtful in found:
            on_event({"event": "note", "text": str(doubtful)})
        with announcer(ledger.store, machine) as nodes:
            features = FeatureChoices(work, ledger, machine)
            launcher = _Launcher(work, ledger, machine, on_event, command, features, gpus, nodes)
            prepares = any(isinstance(row.stage, DataStage) for row in work.to_run)
            launcher.preparing = prepares and not skip_checks
            outcome = launcher.run({} if retry else failed_before(work, ledger))
            if nodes is not None:
                nodes.end(outcome.exit_code)
        return outcome


def remaining_chains(rows: Sequence[PlanRow]) -> dict[str, tuple[float, int]]:
    """By stage name: FLOPs and number of stages of the costliest chain from it to a result."""
    chains = {row.stage.name: (0.0, 0) for row in rows}
    for row in reversed(rows):  # children stand behind their parents
        flops, length = chains[row.stage.name]
        mine = chains[row.stage.name] = (flops + (row.cost.flops or 0.0), length + 1)
        for parent in row.stage.parents:
            if parent.name in chains:
                chains[parent.name] = max(chains[parent.name], mine)
    return chains


class FeatureChoices:
    """Whether features are stored or live, as it pays over all stages that are to be done.

    Pricing hundreds of stages takes a second: it is done once, not at every dispatch. What was
    chosen for an encoder's first stage stands for its others: stages that are done since then take
    their views with them, and what they have stored.
    """

    def __init__(self, plan: Plan, ledger: Ledger, machine: Machine) -> None:
        self._stages = [row.stage for row in plan.to_run]
        self._ledger, self._machine = ledger, machine
        self._plans: list[FeaturePlan] | None = None

    def of(self, stage: Stage) -> str:
        """stored, live, or auto where the stage sees through no frozen encoder, or nobody knows."""
        if frozen_encoder(stage) is None:
            return "auto"
        if self._plans is None:
            self._plans = feature_plan(self._stages, self._ledger, self._machine)
        chosen = choice_for(stage, self._plans)
        return "auto" if chosen is None or chosen.decision == "unknown" else chosen.decision

    def ended(self, stage: Stage) -> None:
        """Where data was prepared, what was expected of it is counted from now on."""
        if isinstance(stage, DataStage):
            self._plans = None


@dataclass
class _Launcher:
    plan: Plan
    ledger: Ledger
    machine: Machine
    on_event: Callable[[Event], None]
    command: Sequence[str] | None
    features: FeatureChoices
    # By worker, its own.
    gpus: Sequence[tuple[str, ...]]
    nodes: Announcer | None = None
    waiting: dict[str, PlanRow] = field(default_factory=dict)
    chains: dict[str, tuple[float, int]] = field(default_factory=dict)
    workers: dict[int, Worker] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    num_signals: int = 0
    # Until the data is prepared and checked once more, nothing else starts.
    preparing: bool = False
    refused: tuple[Problem, ...] = ()
    # Set when a worker dies before it was ready: then the others would die as well.
    broken: bool = False
    # A SimpleQueue, since a signal handler may put into it while the main thread reads it.
    events: "SimpleQueue[tuple[Worker | None, Event]]" = field(default_factory=SimpleQueue)

    def run(self, left: dict[str, str]) -> Outcome:
        """All stages but those `left` as they are, of which the given words are said."""
        self.waiting = {row.stage.name: row for row in self.plan.to_run}
        self.chains = remaining_chains(self.plan.to_run)
        for name, told in left.items():
            self.waiting.pop(name)
            self._lose(name, told)
        with stop_signals(self._note_signal):
            try:
                self._fill()
                while any(worker.row is not None for worker in self.workers.values()):
                    worker, event = self.events.get()
                    self._handle(worker, event)
                    self._fill()
            except BaseException:
                for worker in self.workers.values():
                    worker.signal(signal.SIGTERM)
                raise
            finally:
                self._dismiss()
        states = list(self.states.values())
        return Outcome(
            num_before=self.plan.num_done,
            num_done=states.count("done"),
            num_failed=states.count("failed"),
            num_skipped=len(self.waiting),
            num_stopped=states.count("stopped"),
            interrupted=self.num_signals > 0,
            messages=tuple(self.messages),
            refused=self.refused,
        )

    def _fill(self) -> None:
        """Give ready stages, longest remaining chain first, to free or new workers."""
        if self.num_signals or self.broken or self.refused:
            return
        if self.preparing and not self._prepares():
            self.preparing = False
            now = plan(self.plan.study, self.ledger)
            self.refused = refused(problems_of_run(now, self.ledger, self.machine))
            if self.refused:
                return
        ready = [row for row in self.waiting.values() if self._is_ready(row)]
        ready.sort(key=lambda row: self.chains[row.stage.name], reverse=True)
        for row in ready:
            worker = self._free_worker(row)
            if worker is None:
                return
            worker.row = self.waiting.pop(row.stage.name)
            if worker.ready:
                worker.send(self.features.of(row.stage))

    def _prepares(self) -> bool:
        """Whether data is being prepared, or can be."""
        if any(
            w.row is not None and isinstance(w.row.stage, DataStage) for w in self.workers.values()
        ):
            return True
        return any(self._is_ready(row) for row in self.waiting.values())

    def _free_worker(self, row: PlanRow) -> Worker | None:
        """One that waits, a new one, or, where several ranks share the stage, theirs."""
        idle = next((w for w in self.workers.values() if w.row is None), None)
        in_ranks = self.machine.world_size > 1 and isinstance(row.stage, Ranked)
        if idle is not None and not (in_ranks or idle.is_group):
            return idle
        if idle is not None:
            # It gives its place, and what it holds of the device, to the other kind.
            self.workers.pop(idle.number)
            idle.close()
            idle.leave()
        if len(self.workers) == self.machine.workers:
            return None
        return self._start_worker(
            work_line(row.stage, self.features.of(row.stage)) if in_ranks else None
        )

    def _is_ready(self, row: PlanRow) -> bool:
        """Whether no parent is still to be done, nor the data that it must wait for."""
        if self.preparing and not isinstance(row.stage, DataStage):
            return False
        return all(
            parent.name not in self.chains or self.states.get(parent.name) == "done"
            for parent in row.stage.parents
        )

    def _start_worker(self, group: str | None) -> Worker:
        number = next(n for n in range(1, self.machine.workers + 1) if n not in self.workers)
        store, place = self.ledger.store, self.ledger.store / f"worker-{number}"
        work = write_work(place.with_suffix(".json"), store, self.machine, group)
        log, put = place.with_suffix(".log"), self.events.put
        gpus = self.gpus[number - 1][: None if group is not None else 1]
        worker = Worker(number, work, log, self.machine, put, group is not None, self.command, gpus)
        self.workers[number] = worker
        if group is not None and self.nodes is not None:
            self.nodes.tell(worker.work)
        return worker

    def _handle(self, worker: Worker | None, event: Event) -> None:
        if worker is None:
            self._stop(event["signal"])
        elif event["event"] == "exit":
            self._bury(worker, event["code"])
        elif event["event"] == "ready":
            worker.ready = True
            if worker.is_group and self.num_signals:
                worker.signal(signal.SIGTERM)
            elif worker.row is not None and not self.num_signals:
                worker.send(self.features.of(worker.row.stage))
            elif worker.row is not None:
                self._settle(worker, "stopped", None)
        elif event["event"] == "finished":
            self._settle(worker, event["state"], event.get("error"))
            if event["state"] == "stopped" and not self.num_signals:
                # A worker that is told to go is a machine that is about to: the run stops.
                self._stop(signal.SIGTERM)
        else:
            self.on_event({**event, "worker": worker.number, "log": str(worker.log)})

    def _settle(self, worker: Worker, state: str, error: str | None) -> None:
        """Note and tell how a worker's stage ended."""
        if worker.row is None:
            return
        row, worker.row = worker.row, None
        name = row.stage.name
        if state == "done" and not self.ledger.is_done(row.stage):
            state, error = "failed", f"reported done, but {self.ledger.folder(row.stage)} is not"
        self.states[name] = state
        self.features.ended(row.stage)
        event = {"event": "finished", "stage": name, "state": state, "error": error}
        self.on_event({**event, "worker": worker.number, "log": str(worker.log)})
        if state == "failed":
            self._lose(name, failure(self.plan.labels[name], error, worker.log))

    def _lose(self, name: str, told: str) -> None:
        """A stage has failed: say so, and what is not started for it."""
        self.states[name] = "failed"
        lost = not_started(self.waiting, name, self.plan.labels)
        self.messages += [text for text in (told, lost) if text]

    def _bury(self, worker: Worker, code: int) -> None:
        """A worker has ended: its stage failed, unless it was told to stop."""
        if self.workers.get(worker.number) is worker:
            self.workers.pop(worker.number)
        if worker.row is None:
            return
        if self.num_signals:
            self._settle(worker, "stopped", None)
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = worker.fault or f"its worker process {worker.process.pid} ended with {how}"
        if code == -signal.SIGKILL:
            error += "; the system kills processes when memory runs out: use fewer workers"
        if not worker.ready:
            self.broken = True
            error += " before it was ready; no other worker was started"
        try:
            self.ledger.mark_failed(worker.row.stage, error)
        except ValueError as reason:  # a process that it left behind still holds the stage
            error = f"{error}; {reason}"
        self._settle(worker, "failed", error)

    def _stop(self, number: int) -> None:
        """First signal: ask the workers to keep a checkpoint and stop. Second: end them."""
        self.num_signals += 1
        for worker in self.workers.values():
            worker.signal(signal.SIGTERM if self.num_signals == 1 else signal.SIGKILL)
        self.on_event({"event": "stopping", "signal": number})

    def _dismiss(self) -> None:
        for worker in self.workers.values():
            worker.close()
        for worker in self.workers.values():
            worker.leave()

    def _note_signal(self, number: int) -> None:
        self.events.put((None, {"event": "signal", "signal": number}))


def machine_for(study: AnyStudy, chosen: Mapping[str, Any]) -> Machine:
    """The machine of a run: the study's own placement, and over it what was `chosen` for this run.

    A choice that is None was not made. Over several nodes stages run one by one; where nobody says
    how many workers there are, no more than have GPUs. Raises ValueError for choices that do not
    fit together, and where a tracker is not installed.
    """
    made = {name: value for name, value in chosen.items() if value is not None}
    values: dict[str, Any] = {**study.machine, **made}
    if values.get("nodes", 1) > 1:
        values["workers"] = 1
    machine = Machine.model_validate(values)
    if "workers" not in values:
        machine = workers_with_gpus(machine)
    require_trackers(machine)
    return machine


def require_trackers(machine: Machine) -> None:
    """Raises ValueError, with the command that installs it, for a tracker that is not there."""
    missing = [name for name in machine.tracking if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"tracking asks for {', '.join(missing)}, which is not installed here; run: "
            f"pip install 'midstream[{','.join(missing)}]', or leave it out of tracking"
        )
