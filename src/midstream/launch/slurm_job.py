"""What is asked of Slurm by its own commands, which job has which stage, and what a job does."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, NoReturn

from midstream.config import Machine
from midstream.core.storage import append_line, read_json, write_json
from midstream.launch.workers import STOPPED_EXIT_CODE, Event, Worker, event_of, write_work
from midstream.study.label import label
from midstream.study.lease import STALE_SECONDS, is_held
from midstream.study.stages import Stage, stage_from_json
from midstream.study.store import Ledger

# A command that says nothing for so long has not reached the controller.
ANSWER_SECONDS = 120.0
# States of a job that has ended and will not begin again by itself.
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
# Why Slurm cancels a job: the one that it waited for will not end well, though its stage may yet.
NEVER = "DependencyNeverSatisfied"
REMEDIES = {
    "CANCELLED": "somebody, or the cluster, cancelled it",
    "NODE_FAIL": "its machine failed",
    "OUT_OF_MEMORY": "ask for more memory",
    "TIMEOUT": "ask for more time_minutes, or for a longer warning with warn_seconds",
}


class Unreachable(Exception):  # noqa: N818 - it says what is wrong
    """Slurm's controller does not answer; it may come back."""


class Patience:
    """Says once that Slurm does not answer (`is_away`), and once that it does again."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.tell, self.is_away = tell, False

    @contextmanager
    def asking(self) -> Iterator[None]:
        """A block that asks Slurm; it ends where that does not answer."""
        try:
            yield
        except Unreachable as reason:
            if not self.is_away:
                self.tell(f"{reason}; waiting until Slurm answers, its jobs go on")
            self.is_away = True
        else:
            if self.is_away:
                self.tell("Slurm answers again")
            self.is_away = False


@dataclass(frozen=True)
class Job:
    """A job, or one of an array (`id` 12_3); `reason` says why it waits or how it ended."""

    id: str
    name: str
    state: str
    reason: str
    exit_code: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it waits, runs, or is about to."""
        return self.state not in ENDED

    def sentence(self) -> str:
        """How it ended, and what may help."""
        parts = [f"exit code {self.exit_code}"] if self.exit_code else []
        parts += [self.reason] if self.reason not in ("", "None") else []
        text = f"Slurm ended job {self.id} as {self.state}"
        text += f" ({', '.join(parts)})" if parts else ""
        return f"{text}: {REMEDIES[self.state]}" if self.state in REMEDIES else text


def queue() -> dict[str, Job]:
    """This user's jobs by id, each of an array apart; with those that ended lately."""
    asked = ("--array", "--states=all", "--format=%i|%j|%T|%r", f"--user={os.geteuid()}")
    return {parts[0]: Job(*parts) for parts in columns(ask("squeue", "--noheader", *asked), 4)}


def ended_job(job_id: str, name: str, seen: Job | None) -> Job | None:
    """A job that has ended, with its exit code and reason from where they are known.

    `seen` is what the queue says of it. None if nobody knows a job of this id and name: a
    controller that lost its memory gives the same ids again.
    """
    asked = "JobName,State,ExitCode,Reason"
    try:
        told = ask("sacct", "-X", "-n", "-P", "-j", job_id, "-o", asked)
    except (Unreachable, FileNotFoundError):  # no accounting
        told = ""
    for named, state, code, reason in columns(told, 4):
        # "CANCELLED by 1000" is a state; one that is live here may have ended since.
        if named == name and (word := state.partition(" ")[0]) in ENDED:
            return Job(job_id, name, word, reason, code)
    try:
        values = shown_job(job_id)
    except Unreachable:  # it has gone from the controller's memory
        return seen
    if values.get("JobName") != name:
        return seen
    return Job(job_id, name, values["JobState"], values["Reason"], values["ExitCode"])


def columns(told: str, number: int) -> list[list[str]]:
    """The lines of so many parts; a site's wrapper of a command may print others beside them."""
    lines = (line.split("|", number - 1) for line in told.splitlines())
    return [[part.strip() for part in parts] for parts in lines if len(parts) == number]


def shown_job(job_id: str) -> dict[str, str]:
    """What the controller knows of a job, as it names it."""
    return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "--oneliner", "show", "job", job_id)))


def ask(*command: str) -> str:
    """What a command of Slurm prints; Unreachable if it fails or says nothing."""
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} has said nothing for {ANSWER_SECONDS:.0f} s") from None
    if asked.returncode:
        raise Unreachable(f"{command[0]}: {asked.stderr.strip() or asked.returncode}")
    return asked.stdout


@dataclass(frozen=True)
class Entry:
    """A stage's job: the name it was submitted under, and its id (12, or 12_3).

    `restarts` counts how often the stage was begun again because its processes were killed; `tasks`
    is the array that goes before the job of a source.
    """

    name: str
    job: str | None
    restarts: int = 0
    tasks: str | None = None

    def among(self, jobs: Mapping[str, Job]) -> Job | None:
        """Its job in the queue; one of its id and another name is not."""
        job = jobs.get(self.job or "")
        return job if job is not None and job.name == self.name else None


@dataclass
class JobBook:
    """`slurm.json`: the entries by stage name; every change is on the disk when it returns.

    An entry is written before its job is submitted and gets the job's id after: a launcher that is
    killed in between leaves an entry whose job is found by its name.
    """

    path: Path
    entries: dict[str, Entry]

    @classmethod
    def of(cls, store: Path) -> "JobBook":
        """The book of a store; empty where no job was ever submitted."""
        path = store / "slurm.json"
        kept = read_json(path)["jobs"] if path.is_file() else {}
        return cls(path, {name: Entry(**one) for name, one in kept.items()})

    def note(self, entries: dict[str, Entry]) -> None:
        """Add entries, or change them."""
        self.entries |= entries
        write_json(self.path, {"jobs": {name: asdict(one) for name, one in self.entries.items()}})

    def forget(self, *names: str) -> None:
        """These stages have no job any more."""
        for name in names:
            self.entries.pop(name, None)
        self.note({})

    def drop_unsure(self) -> None:
        """End jobs whose submission was cut off: they may miss what they are to do."""
        for name, entry in list(self.entries.items()):
            if entry.job is None:
                ask("scancel", "--quiet", f"--user={os.geteuid()}", f"--name={entry.name}")
                self.forget(name)


def require_no_jobs(store: Path) -> None:
    """Raises ValueError if jobs of this store, or source, are in Slurm's queue, or may be."""
    book = JobBook.of(store)
    if not book.entries:
        return
    try:
        jobs = queue()
    except (Unreachable, FileNotFoundError) as reason:
        raise ValueError(
            f"{book.path} names {len(book.entries)} jobs of an earlier run with --slurm, and Slurm "
            f"does not say whether they are in its queue ({reason}); run where it answers, or "
            f"delete {book.path} if they are gone"
        ) from None
    names = {entry.name for entry in book.entries.values()}
    live = [job.id for job in jobs.values() if job.is_live and job.name in names]
    if live:
        raise ValueError(
            f"{len(live)} jobs of {store} are in Slurm's queue; follow them with --slurm, or "
            f"end them: scancel {' '.join(live)}"
        )


def job_folder(store: Path, stage: str) -> Path:
    """Where a stage's jobs write: `given.json`, what they are given to do; `events.jsonl`, the
    worker's events over all of them; and `worker-N.log`, what the worker of node N prints."""
    return store.absolute() / "slurm" / stage


def events_since(path: Path, offset: int) -> tuple[list[Event], int]:
    """The whole lines behind `offset`, and where they end; a line that is no event is left out."""
    if not path.is_file():
        return [], offset
    with path.open("rb") as stream:
        stream.seek(offset)
        whole, newline, _ = stream.read().rpartition(b"\n")
    events = [event for line in whole.splitlines() if (event := event_of(line)) is not None]
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


def queue_again(
    job_id: str, who: str, why: str, note: Callable[[str], None] | None = None
) -> NoReturn:
    """Leave this job, to go on in another piece of time; one that was cancelled stays so.

    `note` is told why, before. If Slurm cannot be asked for a while the job ends as failed with its
    work stopped, and the launcher submits it again.
    """
    end = time.monotonic() + REQUEUE_SECONDS
    while time.monotonic() < end:
        try:
            # COMPLETING: it was cancelled, or is being queued again already.
            if shown_job(job_id).get("JobState") == "RUNNING":
                print(f"{who} is queued again: {why}", flush=True)
                if note is not None:
                    note(why)
                ask("scontrol", "requeue", job_id)
            break
        except Unreachable as reason:
            print(f"waiting to be queued again: {reason}", flush=True)
            time.sleep(2.0)
    # What is still written of this process is nobody's concern.
    os._exit(STOPPED_EXIT_CODE)


class JobFailed(Exception):  # noqa: N818 - the stage's, or work's, own error
    """Ends a job whose stage or work did not end well: what waits for it must know."""


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
        self.is_first, self.files = self.place.node == 0, job_folder(job.store, stage.name)
        self.events = self.files / "events.jsonl"
        self.inbox: SimpleQueue[tuple[Worker | None, Event]] = SimpleQueue()
        self.is_stopping = False
        self.finished: Event | None = None
        self.keep: Callable[[Event], None] = append_line(self.events)

    def run(self, machine: Machine, given: dict[str, Any]) -> None:
        """Run the stage, or this node's share of its ranks; JobFailed where it does not end well,
        or a parent is not done."""
        self._refuse_early()
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
        path = self.files / f"worker-{node}.json"
        work = write_work(path, self.job.store, machine, line)
        command = (*self.job.command, str(work)) if self.job.command else None
        log, is_group = self.files / f"worker-{node}.log", machine.world_size > 1
        worker = Worker(node, work, log, machine, self.inbox.put, is_group, command)
        code = self._follow(worker)
        # The ranks of node 0 say how it went; torchrun ends with 1 after a good stop as well.
        if self.is_first and not self.ledger.is_done(self.stage):
            self._end(worker, code)

    def _refuse_early(self) -> None:
        """Raises JobFailed where a parent is not done: Slurm forgot the job that this one waits
        for, or a shared disk is late."""
        lacking = [label(one) for one in self.stage.parents if not self.ledger.is_done(one)]
        if lacking and self.is_first:
            self.keep({"event": "early", "waits_for": lacking[0], "job": self.place.job_id})
        if lacking:
            raise JobFailed(f"{label(self.stage)}: it began before {lacking[0]} was done")

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
        """Raises JobFailed, or leaves to be queued again."""
        finished = self.finished or {"state": None}
        if finished["state"] == "failed":
            raise JobFailed(f"{label(self.stage)}: {finished['error']}")
        if finished["state"] == "stopped" or self.is_stopping:
            queue_again(self.place.job_id, label(self.stage), "told to stop", self._note_requeue)
        error = worker.why(code, "ask for more memory")
        events, _ = events_since(self.events, 0)
        mine = [one for one in events if one.get("job") == self.place.job_id]
        if sum(one["event"] == "restarted" for one in mine) < self.job.restarts:
            self.keep({"event": "restarted", "error": error, "job": self.place.job_id})
            queue_again(self.place.job_id, label(self.stage), error, self._note_requeue)
        with suppress(ValueError):  # a process that it left behind still holds the stage
            self.ledger.mark_failed(self.stage, error)
        raise JobFailed(f"{label(self.stage)}: {error}")

    def _note_requeue(self, why: str) -> None:
        self.keep({"event": "requeued", "why": why, "job": self.place.job_id})
