"""What a Slurm job does: the ordinary worker on one stage, its events kept in the store.

It ends well if the stage is done, badly if it failed, so that jobs that wait for it know. Told to
stop (the warning before its time ends, pre-emption, a node that is drained), it has the stage keep
a checkpoint and asks Slurm to queue it again.
"""

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

import submitit

from midstream.config import Machine
from midstream.storage import append_line, read_json
from midstream.study.cluster import scheduler
from midstream.study.cluster.job_events import JobFiles, events_since
from midstream.study.label import label
from midstream.study.ledger import Ledger, is_held
from midstream.study.outcome import STOPPED_EXIT_CODE
from midstream.study.stage import Stage, stage_from_json
from midstream.study.workers import Event, Worker, write_work

# SIGUSR2 is what submitit has Slurm send before the end of a job's time.
TOLD_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# How long a job waits for what an earlier one left running on the stage.
LOCK_SECONDS = 120.0
# How long it tries to be queued again while the controller is away.
REQUEUE_SECONDS = 300.0
# Progress is kept this often.
PROGRESS_SECONDS = 1.0


class StageFailed(Exception):  # noqa: N818 - the stage's own error is told before
    """Ends a job whose stage failed."""


@dataclass(frozen=True)
class StageJob:
    """Runs one stage that the file `work` describes; called in the job, once a node.

    `restarts`: how often the stage may be begun again after its processes were killed. `command`
    stands in for that of a worker, which its work file is added to.
    """

    store: Path
    work: Path
    restarts: int
    port: int
    command: tuple[str, ...] | None = None

    def __call__(self) -> None:
        given = read_json(self.work)
        stage = stage_from_json(json.dumps(given["stage"]))
        ledger = Ledger(self.store)
        # A controller that has lost its memory may start a job again.
        if ledger.is_done(stage):
            return
        _Run(self, stage, ledger, Machine.model_validate(given["machine"]), given).run()


class _Run:
    def __init__(
        self,
        job: StageJob,
        stage: Stage,
        ledger: Ledger,
        machine: Machine,
        given: dict[str, Any],
    ) -> None:
        self.job, self.stage, self.ledger, self.given = job, stage, ledger, given
        self.place = submitit.JobEnvironment()
        self.files = JobFiles(job.store, stage.name)
        self.machine = self._here(machine)
        self.queue: SimpleQueue[tuple[Worker | None, Event]] = SimpleQueue()
        self.stopping = False
        self.finished: Event | None = None
        self.keep: Callable[[Event], None] = append_line(self.files.events)

    def run(self) -> None:
        """Run the stage, or this node's share of its ranks."""
        for number in TOLD_TO_STOP:
            signal.signal(number, self._note)
        if self.place.node == 0:
            self._wait_for_the_lock()
        node = self.place.node
        line = json.dumps({name: self.given[name] for name in ("stage", "features")})
        work = write_work(self.files.work(node), self.job.store, self.machine, line)
        log = self.files.log(node)
        is_group = self.machine.world_size > 1
        command = (*self.job.command, str(work)) if self.job.command else None
        worker = Worker(node, work, log, self.machine, self.queue.put, is_group, command)
        code = self._follow(worker)
        # The ranks of node 0 say how it went; torchrun ends with 1 after a good stop as well.
        if self.place.node == 0:
            self._end(worker, code)

    def _here(self, machine: Machine) -> Machine:
        """The machine with this node's number, and where the first node is reached."""
        if machine.nodes == 1:
            return machine
        number = int(self.place.raw_job_id if self.place.raw_job_id.isdigit() else 0)
        # Jobs that share a node must not share a port.
        master = f"{self.place.hostnames[0]}:{self.job.port + number % 1000}"
        return machine.model_copy(update={"node": self.place.node, "master": master})

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.queue.put((None, {"event": "signal", "signal": number}))

    def _wait_for_the_lock(self) -> None:
        """Processes of an earlier job may take a moment to leave the stage."""
        end = time.monotonic() + LOCK_SECONDS
        while is_held(self.ledger.folder(self.stage) / "lock") and time.monotonic() < end:
            time.sleep(0.5)

    def _follow(self, worker: Worker) -> int:
        """Keep the worker's events until it has ended; its exit code."""
        kept_at = 0.0
        while True:
            _, event = self.queue.get()
            if event["event"] == "exit":
                return int(event["code"])
            if event["event"] == "signal":
                # On several nodes the first rank tells the others.
                if not self.stopping and self.place.node == 0:
                    worker.signal(signal.SIGTERM)
                self.stopping = True
            elif self.place.node == 0:
                if event["event"] == "finished":
                    self.finished = event
                elif event["event"] == "ready" and self.stopping:
                    worker.signal(signal.SIGTERM)
                now = time.monotonic()
                if event["event"] != "progress" or now - kept_at >= PROGRESS_SECONDS:
                    kept_at = now
                    self.keep({**event, "job": self.place.job_id, "host": self.place.hostname})

    def _end(self, worker: Worker, code: int) -> None:
        state = self.finished["state"] if self.finished else None
        if self.ledger.is_done(self.stage):
            return
        if state == "failed":
            assert self.finished is not None
            raise StageFailed(f"{label(self.stage)}: {self.finished['error']}")
        if state == "stopped" or self.stopping:
            self._queue_again("told to stop")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = worker.fault or f"its worker process {worker.process.pid} ended with {how}"
        if code == -signal.SIGKILL:
            error += "; the system kills processes when memory runs out: ask for more memory"
        if self._num_restarts() < self.job.restarts:
            self.keep({"event": "restarted", "error": error, "job": self.place.job_id})
            self._queue_again(error)
        with suppress(ValueError):  # a process that it left behind still holds the stage
            self.ledger.mark_failed(self.stage, error)
        raise StageFailed(f"{label(self.stage)}: {error}")

    def _num_restarts(self) -> int:
        """How often this job has begun the stage again."""
        events, _ = events_since(self.files.events, 0)
        mine = [one for one in events if one.get("job") == self.place.job_id]
        return sum(one["event"] == "restarted" for one in mine)

    def _queue_again(self, why: str) -> None:
        """Leave, to go on in another piece of time; a job that was cancelled stays so.

        If Slurm cannot be asked for a while the job ends as failed with the stage stopped, which
        the launcher submits again.
        """
        end = time.monotonic() + REQUEUE_SECONDS
        while time.monotonic() < end:
            try:
                # COMPLETING: it was cancelled, or is being queued again already.
                if scheduler.job_state(self.place.job_id) == "RUNNING":
                    print(f"{label(self.stage)} is queued again: {why}", flush=True)
                    self.keep({"event": "requeued", "why": why, "job": self.place.job_id})
                    scheduler.requeue(self.place.job_id)
                break
            except scheduler.Unreachable as reason:
                print(f"waiting to be queued again: {reason}", flush=True)
                time.sleep(2.0)
        # What is still written of this process is nobody's concern.
        os._exit(STOPPED_EXIT_CODE)
