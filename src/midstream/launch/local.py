"""Runs what a study lacks on this machine: a few workers, one stage a worker at a time."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

from midstream.config import Machine
from midstream.core.storage import read_json, write_json
from midstream.cost.graph import PlanRow
from midstream.launch.scheduler import Outcome, run_study
from midstream.launch.slurm_job import require_no_jobs
from midstream.launch.workers import (
    NODES,
    Event,
    Worker,
    gpu_shares,
    work_line,
    workers_with_gpus,
    write_work,
)
from midstream.study.lease import heartbeat_of
from midstream.study.stages import Ranked, Stage
from midstream.study.store import Ledger
from midstream.study.studies import AnyStudy


def run(
    study: AnyStudy,
    ledger: Ledger,
    machine: Machine,
    on_event: Callable[[Event], None],
    command: Sequence[str] | None = None,
    retry: bool = False,
    skip_checks: bool = False,
) -> Outcome:
    """Run what `study` lacks in worker processes, as `scheduler.run_study` says.

    SIGINT or SIGTERM asks the running stages to keep a checkpoint and stop, a second one ends them.
    `command` stands in for that of a worker. Raises ValueError also if jobs of the store are in a
    cluster's queue, or if the workers need more GPUs than there are.
    """

    def known() -> tuple[str, ...]:
        require_no_jobs(ledger.store)
        return ()

    return run_study(
        study,
        ledger,
        machine,
        on_event,
        lambda work: gpu_shares(machine),
        lambda work, features: LocalBackend(ledger, machine, features.of, command),
        known=known,
        retry=retry,
        skip_checks=skip_checks,
    )


class LocalBackend:
    """Worker processes with GPUs of their own, warm from stage to stage; with the store locked.

    `features` says whether a stage's features are stored or live. Where several ranks share a
    stage, its worker is theirs alone; on several nodes the others are told in `nodes.json`.
    """

    queues = is_away = False

    def __init__(
        self,
        ledger: Ledger,
        machine: Machine,
        features: Callable[[Stage], str],
        command: Sequence[str] | None = None,
    ) -> None:
        self.ledger, self.machine, self.features = ledger, machine, features
        self.command, self.gpus = command, gpu_shares(machine)
        self.workers: dict[int, Worker] = {}
        # A SimpleQueue, since a signal handler may put into it while the main thread reads it.
        self.inbox: SimpleQueue[tuple[Worker | None, Event]] = SimpleQueue()
        self.is_stopping = False
        # Set when a worker dies before it was ready: then the others would die as well.
        self.is_broken = False
        self.launch: str | None = None
        self._tell_nodes()

    def adopt(self, waiting: Mapping[str, PlanRow]) -> tuple[str, ...]:
        """Workers do not outlive their launcher."""
        return ()

    def start(self, ready: Sequence[PlanRow]) -> list[str]:
        """Give stages to free or new workers."""
        started = []
        for row in () if self.is_broken else ready:
            worker = self._free_worker(row.stage)
            if worker is None:
                break
            worker.stage = row.stage
            started.append(row.stage.name)
            if worker.ready:
                worker.send(self.features(row.stage))
        return started

    def poll(self) -> Iterator[Event]:
        """The next event of a worker, or a signal."""
        worker, event = self.inbox.get()
        if worker is None:
            yield event
            return
        match event["event"]:
            case "exit":
                yield from self._bury(worker, event["code"])
            case "ready":
                worker.ready = True
                if self.is_stopping and worker.is_group:
                    worker.signal(signal.SIGTERM)
                elif self.is_stopping:
                    yield from self._settle(worker, "stopped")
                elif worker.stage is not None:
                    worker.send(self.features(worker.stage))
            case "finished":
                yield from self._settle(worker, event["state"], event.get("error"))
            case _:
                yield {**event, "worker": worker.number, "log": str(worker.log)}

    def cancel(self, names: Sequence[str]) -> None:
        """Nothing runs here whose parents are not done."""

    def stop(self, number: int) -> None:
        """Send all workers this signal."""
        self.is_stopping = True
        for worker in self.workers.values():
            worker.signal(number)

    def close(self, code: int) -> None:
        """Dismiss the workers; the other nodes leave with this exit code."""
        for worker in self.workers.values():
            worker.close()
        for worker in self.workers.values():
            worker.leave()
        self._tell_nodes(code=code)

    def _free_worker(self, stage: Stage) -> Worker | None:
        """One that waits, a new one, or, where several ranks share the stage, theirs."""
        idle = next((worker for worker in self.workers.values() if worker.stage is None), None)
        in_ranks = self.machine.world_size > 1 and isinstance(stage, Ranked)
        if idle is not None and not (in_ranks or idle.is_group):
            return idle
        if idle is not None:
            # It gives its place, and what it holds of the device, to the other kind.
            self.workers.pop(idle.number)
            idle.close()
            idle.leave()
        if len(self.workers) == self.machine.workers:
            return None
        return self._start_worker(work_line(stage, self.features(stage)) if in_ranks else None)

    def _start_worker(self, group: str | None) -> Worker:
        number = next(n for n in range(1, self.machine.workers + 1) if n not in self.workers)
        store, place = self.ledger.store, self.ledger.store / f"worker-{number}"
        work = write_work(place.with_suffix(".json"), store, self.machine, group)
        log, put, is_group = place.with_suffix(".log"), self.inbox.put, group is not None
        gpus = self.gpus[number - 1][: None if is_group else 1]
        worker = Worker(number, work, log, self.machine, put, is_group, self.command, gpus)
        self.workers[number] = worker
        if is_group:
            self._tell_nodes(work=str(work.absolute()))
        return worker

    def _settle(
        self, worker: Worker, state: str, error: str | None = None, unnoted: bool = False
    ) -> Iterator[Event]:
        """A worker's stage has ended."""
        if worker.stage is not None:
            name, worker.stage = worker.stage.name, None
            told = {"event": "finished", "stage": name, "state": state, "error": error}
            yield {**told, "unnoted": unnoted, "worker": worker.number, "log": str(worker.log)}

    def _bury(self, worker: Worker, code: int) -> Iterator[Event]:
        """A worker has ended: its stage failed, unless it was told to stop."""
        if self.workers.get(worker.number) is worker:
            self.workers.pop(worker.number)
        if self.is_stopping:
            yield from self._settle(worker, "stopped")
            return
        error = worker.why(code, "use fewer workers")
        if worker.stage is not None and not worker.ready:
            self.is_broken = True
            error += "" if worker.fault else " before it was ready"
            error += "; no other worker was started"
        yield from self._settle(worker, "failed", error, unnoted=True)

    def _tell_nodes(self, work: str | None = None, code: int | None = None) -> None:
        """Which ranks the other nodes are to start, or with which exit code they are to leave."""
        if self.machine.nodes > 1:
            if self.launch is None:
                beat = heartbeat_of(self.ledger.store / "launch.lock")
                self.launch = read_json(beat)["token"]
            said = {"launch": self.launch, "task": uuid4().hex, "work": work, "code": code}
            write_json(self.ledger.store / NODES, said)


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
