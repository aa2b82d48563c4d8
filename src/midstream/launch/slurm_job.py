"""What a Slurm job does: the ordinary worker on one stage, its events kept in the store."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from midstream.config import Machine
from midstream.core.storage import append_line, read_json
from midstream.launch.slurm_queue import Unreachable, ask, job_state
from midstream.launch.workers import STOPPED_EXIT_CODE, Event, Worker, write_work
from midstream.study.label import label
from midstream.study.lease import STALE_SECONDS, is_held
from midstream.study.stages import Stage, stage_from_json
from midstream.study.store import Ledger


@dataclass(frozen=True)
class JobFiles:
    """Where a stage's jobs write: `slurm/STAGE/` in the store."""

    store: Path
    stage: str

    @property
    def folder(self) -> Path:
        """All of them."""
        return self.store.absolute() / "slurm" / self.stage

    @property
    def events(self) -> Path:
        """The worker's events, one a line, over all jobs of the stage."""
        return self.folder / "events.jsonl"

    @property
    def given(self) -> Path:
        """What the stage's job is given to do."""
        return self.folder / "given.json"

    def log(self, node: int) -> Path:
        """What the worker of a node prints."""
        return self.folder / f"worker-{node}.log"


def events_since(path: Path, offset: int) -> tuple[list[Event], int]:
    """The whole lines behind `offset`, and where they end; a line that is no event is left out."""
    if not path.is_file():
        return [], offset
    with path.open("rb") as stream:
        stream.seek(offset)
        whole, newline, _ = stream.read().rpartition(b"\n")
    events = []
    for line in whole.splitlines():
        try:
            event: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events, offset + len(whole) + len(newline)


# SIGUSR2 is what submitit has Slurm send before the end of a job's time.
TOLD_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# How long a job waits for what an earlier one left running on the stage, or for its last sign of
# life to be too old.
LOCK_SECONDS = STALE_SECONDS + 60.0
# How long it tries to be queued again while the controller is away.
REQUEUE_SECONDS = 300.0
# Progress is kept this often.
PROGRESS_SECONDS = 1.0


class StageFailed(Exception):  # noqa: N818 - the stage's own error is told before
    """Ends a job whose stage failed: what waits for it must know."""


@dataclass(frozen=True)
class StageJob:
    """Runs one stage that the file `given` describes; called in the job, once a node.

    It ends well if the stage is done, badly if it failed. Told to stop (the warning before its time
    ends, pre-emption, a node that is drained), it has the stage keep a checkpoint and asks Slurm to
    queue it again. `restarts`: how often the stage may be begun again after its processes were
    killed. `command` stands in for that of a worker, which its work file is added to.
    """

    store: Path
    given: Path
    restarts: int
    port: int
    command: tuple[str, ...] | None = None

    def __call__(self) -> None:
        given = read_json(self.given)
        stage = stage_from_json(json.dumps(given["stage"]))
        ledger = Ledger(self.store)
        # A controller that has lost its memory may start a job again.
        if not ledger.is_done(stage):
            _Run(self, stage, ledger).run(Machine.model_validate(given["machine"]), given)


class _Run:
    def __init__(self, job: StageJob, stage: Stage, ledger: Ledger) -> None:
        import submitit

        self.job, self.stage, self.ledger = job, stage, ledger
        self.place = submitit.JobEnvironment()
        self.is_first = self.place.node == 0
        self.files = JobFiles(job.store, stage.name)
        self.inbox: SimpleQueue[tuple[Worker | None, Event]] = SimpleQueue()
        self.is_stopping = False
        self.finished: Event | None = None
        self.keep: Callable[[Event], None] = append_line(self.files.events)

    def run(self, machine: Machine, given: dict[str, Any]) -> None:
        """Run the stage, or this node's share of its ranks."""
        for number in TOLD_TO_STOP:
            signal.signal(number, self._note)
        node = self.place.node
        if machine.nodes > 1:
            job = int(self.place.raw_job_id if self.place.raw_job_id.isdigit() else 0)
            # Jobs that share a node must not share a port.
            master = f"{self.place.hostnames[0]}:{self.job.port + job % 1000}"
            machine = machine.model_copy(update={"node": node, "master": master})
        # Processes of an earlier job may take a moment to leave the stage.
        end = time.monotonic() + LOCK_SECONDS
        lock = self.ledger.folder(self.stage) / "lock"
        while self.is_first and is_held(lock) and time.monotonic() < end:
            time.sleep(0.5)
        line = json.dumps({name: given[name] for name in ("stage", "features")})
        path = self.files.folder / f"worker-{node}.json"
        work = write_work(path, self.job.store, machine, line)
        command = (*self.job.command, str(work)) if self.job.command else None
        is_group = machine.world_size > 1
        log, put = self.files.log(node), self.inbox.put
        worker = Worker(node, work, log, machine, put, is_group, command)
        code = self._follow(worker)
        # The ranks of node 0 say how it went; torchrun ends with 1 after a good stop as well.
        if self.is_first and not self.ledger.is_done(self.stage):
            self._end(worker, code)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.inbox.put((None, {"event": "signal", "signal": number}))

    def _follow(self, worker: Worker) -> int:
        """Keep the worker's events until it has ended; its exit code."""
        kept_at = 0.0
        while True:
            _, event = self.inbox.get()
            if event["event"] == "exit":
                return int(event["code"])
            if event["event"] == "signal":
                # On several nodes the first rank tells the others.
                if not self.is_stopping and self.is_first:
                    worker.signal(signal.SIGTERM)
                self.is_stopping = True
            elif self.is_first:
                if event["event"] == "finished":
                    self.finished = event
                elif event["event"] == "ready" and self.is_stopping:
                    worker.signal(signal.SIGTERM)
                now = time.monotonic()
                if event["event"] != "progress" or now - kept_at >= PROGRESS_SECONDS:
                    kept_at = now
                    self.keep({**event, "job": self.place.job_id, "host": self.place.hostname})

    def _end(self, worker: Worker, code: int) -> None:
        """Raises StageFailed, or leaves to be queued again."""
        state = self.finished["state"] if self.finished else None
        if state == "failed":
            assert self.finished is not None
            raise StageFailed(f"{label(self.stage)}: {self.finished['error']}")
        if state == "stopped" or self.is_stopping:
            self._queue_again("told to stop")
        error = worker.why(code, "ask for more memory")
        events, _ = events_since(self.files.events, 0)
        mine = [one for one in events if one.get("job") == self.place.job_id]
        if sum(one["event"] == "restarted" for one in mine) < self.job.restarts:
            self.keep({"event": "restarted", "error": error, "job": self.place.job_id})
            self._queue_again(error)
        with suppress(ValueError):  # a process that it left behind still holds the stage
            self.ledger.mark_failed(self.stage, error)
        raise StageFailed(f"{label(self.stage)}: {error}")

    def _queue_again(self, why: str) -> None:
        """Leave, to go on in another piece of time; a job that was cancelled stays so.

        If Slurm cannot be asked for a while the job ends as failed with the stage stopped, which
        the launcher submits again.
        """
        end = time.monotonic() + REQUEUE_SECONDS
        while time.monotonic() < end:
            try:
                # COMPLETING: it was cancelled, or is being queued again already.
                if job_state(self.place.job_id) == "RUNNING":
                    print(f"{label(self.stage)} is queued again: {why}", flush=True)
                    self.keep({"event": "requeued", "why": why, "job": self.place.job_id})
                    ask("scontrol", "requeue", self.place.job_id)
                break
            except Unreachable as reason:
                print(f"waiting to be queued again: {reason}", flush=True)
                time.sleep(2.0)
        # What is still written of this process is nobody's concern.
        os._exit(STOPPED_EXIT_CODE)
