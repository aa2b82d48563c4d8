"""A stage as a job of Slurm: submitted, and what it does where it runs.

The files of a stage's jobs in the store, and the events that a job keeps there. Submits stages to
Slurm: a job each, equal ones as an array, each after its parents' jobs.

What a Slurm job does: the ordinary worker on one stage, its events kept in the store.

It ends well if the stage is done, badly if it failed, so that jobs that wait for it know. Told to
stop (the warning before its time ends, pre-emption, a node that is drained), it has the stage keep
a checkpoint and asks Slurm to queue it again.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any
from uuid import uuid4

from midstream.config import Machine, SlurmSettings
from midstream.core.storage import append_line, read_json
from midstream.launch import slurm_queue
from midstream.launch.slurm_queue import Entry, JobBook
from midstream.launch.terminal import STOPPED_EXIT_CODE
from midstream.launch.workers import Event, Worker, work_line, write_work
from midstream.study.label import label
from midstream.study.lease import STALE_SECONDS, is_held
from midstream.study.stages import Ranked, Stage, stage_from_json
from midstream.study.store import Ledger


class JobFiles:
    """Where a stage's jobs write: `slurm/STAGE/` in the store."""

    def __init__(self, store: Path, stage: str) -> None:
        self.folder = store.absolute() / "slurm" / stage

    @property
    def events(self) -> Path:
        """The worker's events, one a line, over all jobs of the stage."""
        return self.folder / "events.jsonl"

    @property
    def given(self) -> Path:
        """What the stage's job is given to do."""
        return self.folder / "given.json"

    def work(self, node: int) -> Path:
        """What the worker of a node works for."""
        return self.folder / f"worker-{node}.json"

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
        import submitit

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
                if slurm_queue.job_state(self.place.job_id) == "RUNNING":
                    print(f"{label(self.stage)} is queued again: {why}", flush=True)
                    self.keep({"event": "requeued", "why": why, "job": self.place.job_id})
                    slurm_queue.requeue(self.place.job_id)
                break
            except slurm_queue.Unreachable as reason:
                print(f"waiting to be queued again: {reason}", flush=True)
                time.sleep(2.0)
        # What is still written of this process is nobody's concern.
        os._exit(STOPPED_EXIT_CODE)


# The most jobs of one array (Slurm's own MaxArraySize is 1001 where nothing else is said).
MAX_ARRAY = 1000
# What sbatch says when the controller may come back; anything else is a refusal.
AWAY = ("Unable to contact", "Socket timed out", "Connection refused", "connect failure")
# What it says of a job that is to wait for one which the controller has just forgotten.
TOO_LATE = "dependency problem"


@dataclass(frozen=True)
class Task:
    """A stage that is to be submitted, after the jobs with the ids `after`."""

    stage: Stage
    features: str
    after: tuple[str, ...]
    restarts: int


class Submitter:
    """Turns tasks into jobs with the cluster's settings, and notes them in the book.

    `command` stands in for that of a worker, which its work file is added to.
    """

    def __init__(
        self,
        store: Path,
        machine: Machine,
        settings: SlurmSettings,
        book: JobBook,
        command: Sequence[str] | None = None,
    ) -> None:
        self.store, self.machine = store.absolute(), machine
        self.settings, self.book = settings, book
        self.command = tuple(command) if command else None

    def submit(self, tasks: Sequence[Task]) -> None:
        """Submit tasks that are ready or wait for jobs; what is equal becomes an array.

        Raises Unreachable if the controller is away, ValueError with sbatch's own words if it
        refuses; what was submitted before is in the book.
        """
        groups: dict[tuple[str, tuple[str, ...], int], list[Task]] = {}
        for task in tasks:
            key = (task.stage.kind, tuple(sorted(task.after)), task.restarts)
            groups.setdefault(key, []).append(task)
        for (kind, _, _), group in groups.items():
            for start in range(0, len(group), MAX_ARRAY):
                self._submit_array(kind, group[start : start + MAX_ARRAY])

    def machine_for(self, stage: Stage) -> Machine:
        """Where the stage's worker runs: its ranks on its nodes, or one process."""
        asked = self.settings.resources(stage.kind)
        if not isinstance(stage, Ranked):
            return self.machine.alone()
        ranks = asked.ranks or asked.gpus or self.machine.ranks
        nodes = asked.nodes or 1
        master = "set-in-the-job:0" if nodes > 1 else None
        values = {"ranks": ranks, "nodes": nodes, "master": master, "workers": 1}
        return Machine.model_validate(self.machine.model_dump() | values)

    def _submit_array(self, kind: str, tasks: Sequence[Task]) -> None:
        import submitit

        name = f"midstream-{kind}-{uuid4().hex[:12]}"
        folder = self.store / "slurm" / "jobs" / name
        machine = self.machine_for(tasks[0].stage)
        functions = []
        for task in tasks:
            files = JobFiles(self.store, task.stage.name)
            work = work_line(task.stage, task.features)
            write_work(files.given, self.store, machine, work)
            left = max(0, self.settings.restarts - task.restarts)
            functions.append(
                StageJob(self.store, files.given, left, self.settings.port, self.command)
            )
        entries = {task.stage.name: Entry(name, None, str(folder), task.restarts) for task in tasks}
        self.book.intend(entries)
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**self._parameters(name, machine, tasks[0], len(tasks)))
        try:
            if len(tasks) == 1:
                jobs = [executor.submit(functions[0])]
            else:
                with executor.batch():
                    jobs = [executor.submit(function) for function in functions]
        except submitit.core.utils.FailedJobError as reason:
            text = " ".join(str(reason).split())
            # Without a word it was ended by a signal, as Ctrl-C sends one to all.
            if not text or any(sign in text for sign in (*AWAY, TOO_LATE)):
                raise slurm_queue.Unreachable(f"sbatch: {text}") from None
            self.book.forget(*entries)
            raise ValueError(
                f"sbatch refused {len(tasks)} {kind} jobs: {text}; change --slurm-set"
            ) from None
        self.book.submitted(
            {
                task.stage.name: (str(job.job_id), str(job.paths.stdout))
                for task, job in zip(tasks, jobs, strict=True)
            }
        )

    def _parameters(self, name: str, machine: Machine, task: Task, count: int) -> dict[str, object]:
        """What submitit makes its sbatch file of."""
        asked = self.settings.resources(task.stage.kind)
        cpus = asked.cpus or machine.ranks * (machine.threads + machine.data_workers)
        more: dict[str, object] = {
            "requeue": True,
            # What waits for a job that fails is cancelled, also where no launcher follows.
            "kill-on-invalid-dep": "yes",
            **({"mem": asked.memory} if asked.memory else {}),
            **asked.extra,
        }
        return {
            "job_name": name,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "time": asked.time_minutes,
            "nodes": machine.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": cpus,
            "gpus_per_node": asked.gpus or None,
            "signal_delay_s": self.settings.warn_seconds,
            "array_parallelism": self.settings.array_limit or count,
            "dependency": f"afterok:{':'.join(task.after)}" if task.after else None,
            "stderr_to_stdout": True,
            "wckey": None,
            "setup": list(self.settings.setup) or None,
            # A step does not take over its job's CPUs by itself.
            "srun_args": [f"--cpus-per-task={cpus}"],
            "additional_parameters": more,
        }
