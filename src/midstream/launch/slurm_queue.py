"""What is asked of Slurm, which job has which stage, and what its end means.

What the end of a job means for its stage: done, failed, to be submitted again, or wait.

What is asked of Slurm: its partitions, our jobs, how one ended; and to end or requeue one.

Slurm's own commands are asked, without accounting where there is none: `squeue` knows a job for
`MinJobAge` seconds after its end, `sacct` for ever.

`slurm.json`: which job was given which stage, so that a launcher finds again what runs.

An entry is written before its job is submitted and gets the job's id after: a launcher that is
killed in between leaves an entry whose job is found by its name.
"""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from midstream.config import SlurmResources
from midstream.core.storage import read_json, write_json
from midstream.study.stages import Stage
from midstream.study.store import Ledger

COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
# A command that says nothing for so long has not reached the controller.
ANSWER_SECONDS = 120.0
# States of a job that has ended and will not begin again by itself.
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
REMEDIES = {
    "CANCELLED": "somebody, or the cluster, cancelled it",
    "NODE_FAIL": "its machine failed",
    "OUT_OF_MEMORY": "ask for more memory",
    "TIMEOUT": "ask for more time_minutes, or for a longer warning with warn_seconds",
}


class Unreachable(Exception):  # noqa: N818 - it says what is wrong
    """Slurm's controller does not answer; it may come back."""


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
        code = f"exit code {self.exit_code}" if self.exit_code else ""
        reason = "" if self.reason in ("", "None") else self.reason
        parts = ", ".join(part for part in (code, reason) if part)
        remedy = REMEDIES.get(self.state, "")
        text = f"Slurm ended job {self.id} as {self.state}" + (f" ({parts})" if parts else "")
        return f"{text}: {remedy}" if remedy else text


def require_slurm(asked: Iterable[SlurmResources]) -> None:
    """Raises ValueError where Slurm's commands or submitit are missing, or a partition that is
    asked for does not exist or gives less time: a job would wait there for ever.

    Raises Unreachable if the controller does not answer.
    """
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)} on the PATH: run this where jobs are submitted to Slurm, "
            "or leave --slurm out"
        )
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ValueError(
            "jobs are submitted with submitit, which is not installed: "
            "pip install 'midstream[cluster]'"
        ) from None
    minutes = _partitions()
    # Those that somebody named first, in an order of their own: `asked` may be a set.
    for resources in sorted(asked, key=lambda one: (one.partition is None, one.partition or "")):
        # None is the one that the cluster marks as its default.
        names = [None] if resources.partition is None else resources.partition.split(",")
        for name in names:
            _require_partition(name, resources.time_minutes or 0, minutes)


def _require_partition(name: str | None, asked: int, minutes: dict[str | None, float]) -> None:
    if name is None and name not in minutes:
        return
    if name not in minutes:
        known = sorted(one for one in minutes if one is not None)
        near = get_close_matches(name or "", known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"Slurm has no partition {name!r}; {hint}it has {', '.join(known)}: choose one with "
            "--slurm-set partition=NAME"
        )
    if asked > minutes[name]:
        place = "the default partition" if name is None else f"partition {name}"
        raise ValueError(
            f"time_minutes is {asked}, but {place} gives {minutes[name]:.0f}: ask for less with "
            "--slurm-set time_minutes=N; a stage that needs longer goes on in the next piece"
        )


def _partitions() -> dict[str | None, float]:
    """The minutes that each partition gives at the most; the default one also under None."""
    found: dict[str | None, float] = {}
    for line in _ask("sinfo", "--noheader", "--all", "--format=%P|%l").splitlines():
        name, limit = line.strip().rsplit("|", 1)
        most = limit_minutes(limit)
        if name.endswith("*"):
            name = name.removesuffix("*")
            found[None] = most
        found[name] = most
    return found


def limit_minutes(limit: str) -> float:
    """Minutes of a time as sinfo prints it: 2-12:00:00, 1:00:00, 30:00, infinite."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts):  # infinite, n/a
        return math.inf
    values = [0.0, 0.0, *(float(part) for part in parts)][-3:]
    hours, minutes, seconds = values
    return (int(days) if dash else 0) * 1440 + hours * 60 + minutes + seconds / 60


def queue() -> dict[str, Job]:
    """This user's jobs by id, each of an array apart; with those that ended lately."""
    asked = ("--array", "--states=all", "--format=%i|%j|%T|%r", f"--user={os.geteuid()}")
    jobs = {}
    for line in _ask("squeue", "--noheader", *asked).splitlines():
        job = Job(*(part.strip() for part in line.split("|", 3)))
        jobs[job.id] = job
    return jobs


def ended_job(job_id: str, name: str, seen: Job | None) -> Job | None:
    """A job that has ended, with its exit code and reason from where they are known.

    `seen` is what the queue says of it. None if nobody knows a job of this id and name: a
    controller that lost its memory gives the same ids again.
    """
    columns = "JobName,State,ExitCode,Reason"
    try:
        told = _ask("sacct", "-X", "-n", "-P", "-j", job_id, "-o", columns)
    except (Unreachable, FileNotFoundError):  # no accounting
        told = ""
    for line in told.splitlines():
        named, state, code, reason = line.split("|", 3)
        # "CANCELLED by 1000" is a state; one that is live here may have ended since.
        if named == name and state.split()[0] in ENDED:
            return Job(job_id, name, state.split()[0], reason, code)
    try:
        told = _ask("scontrol", "--oneliner", "show", "job", job_id)
    except Unreachable:  # it has gone from the controller's memory
        return seen
    values = dict(re.findall(r"(\w+)=(\S*)", told))
    if values.get("JobName") != name:
        return seen
    return Job(job_id, name, values["JobState"], values["Reason"], values["ExitCode"])


def cancel(ids: Sequence[str]) -> None:
    """End jobs, whether they run or wait; those that have ended already are passed over."""
    if ids:
        _ask("scancel", "--quiet", *ids)


def cancel_named(name: str) -> None:
    """End all jobs of this name."""
    _ask("scancel", "--quiet", f"--user={os.geteuid()}", f"--name={name}")


def requeue(job_id: str) -> None:
    """Put a job back into the queue; where it runs, it is ended for that."""
    _ask("scontrol", "requeue", job_id)


def job_state(job_id: str) -> str:
    """The state of a job that the controller knows."""
    found = re.search(r"JobState=(\S+)", _ask("scontrol", "--oneliner", "show", "job", job_id))
    return found[1] if found else ""


def _ask(*command: str) -> str:
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} has said nothing for {ANSWER_SECONDS:.0f} s") from None
    if asked.returncode:
        raise Unreachable(f"{command[0]}: {asked.stderr.strip() or asked.returncode}")
    return asked.stdout


@dataclass(frozen=True)
class Entry:
    """A stage's job: the name it was submitted under, its id (12, or 12_3), its log.

    `restarts` counts how often the stage was begun again because its processes were killed.
    """

    name: str
    job: str | None
    log: str
    restarts: int = 0


@dataclass
class JobBook:
    """The entries by stage name; every change is on the disk when it returns."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Path) -> "JobBook":
        """The book of a store; empty where no job was ever submitted."""
        path = store / "slurm.json"
        kept = read_json(path)["jobs"] if path.is_file() else {}
        return cls(path, {name: Entry(**entry) for name, entry in kept.items()})

    def intend(self, entries: dict[str, Entry]) -> None:
        """Note what is about to be submitted."""
        self.entries |= entries
        self._write()

    def submitted(self, jobs: dict[str, tuple[str, str]]) -> None:
        """Note ids and logs by stage name."""
        for name, (job, log) in jobs.items():
            self.entries[name] = replace(self.entries[name], job=job, log=log)
        self._write()

    def forget(self, *names: str) -> None:
        """These stages have no job any more."""
        for name in names:
            self.entries.pop(name, None)
        self._write()

    def drop_unsure(self) -> None:
        """End jobs whose submission was cut off: they may miss what they are to do."""
        for name, entry in list(self.entries.items()):
            if entry.job is None:
                cancel_named(entry.name)
                self.forget(name)

    def _write(self) -> None:
        write_json(self.path, {"jobs": {name: asdict(one) for name, one in self.entries.items()}})


def require_no_jobs(store: Path) -> None:
    """Raises ValueError if jobs of this store are in Slurm's queue, or may be."""
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
            f"{len(live)} jobs of store {store} are in Slurm's queue; follow them with --slurm, or "
            f"end them: scancel {' '.join(live)}"
        )


# So often a job that Slurm has forgotten is submitted again.
MAX_FORGOTTEN = 3
# Why Slurm cancels a job: the one that it waited for will not end well, though its stage may yet.
NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why; `counts` if it uses up one of the stage's restarts.

    `is_noted`: the ledger has the failure already.
    """

    action: Literal["done", "failed", "again", "wait"]
    text: str = ""
    counts: bool = False
    is_noted: bool = False


@dataclass(frozen=True)
class Ended:
    """A stage whose job is not in the queue any more, and what is known of it.

    `job` is None if Slurm does not know it; `told_before` is when the stage had last ended before
    the job was submitted; `parent_lost` says that a parent is neither done nor has a
    job; `doubted` that the job was seen to end well once before.
    """

    stage: Stage
    id: str
    job: Job | None
    restarts_left: int
    told_before: str | None = None
    parent_lost: bool = False
    num_forgotten: int = 0
    doubted: bool = False


def verdict(ended: Ended, ledger: Ledger) -> Verdict:
    """What becomes of the stage."""
    stage, job = ended.stage, ended.job
    if ledger.is_done(stage):
        return Verdict("done")
    status = ledger.status(stage)
    is_news = status.get("ended") not in (None, ended.told_before)
    if status["state"] == "failed" and is_news:
        return Verdict("failed", status["error"] or "it did not say why", is_noted=True)
    if ended.parent_lost or (job is not None and job.reason == NEVER):
        return Verdict("again")
    if job is None:
        return _forgotten(ended)
    if status["state"] == "stopped" and is_news and job.state != "CANCELLED":
        return Verdict("again", f"job {job.id} was told to stop ({job.state})")
    if job.state == "COMPLETED":
        if not ended.doubted:
            return Verdict("wait")
        return Verdict("failed", f"job {job.id} ended well, but {ledger.folder(stage)} is not done")
    if ended.restarts_left > 0 and job.state != "CANCELLED":
        return Verdict("again", job.sentence(), counts=True)
    return Verdict("failed", job.sentence())


def _forgotten(ended: Ended) -> Verdict:
    """A controller that was killed may have lost a job, or its end."""
    if ended.num_forgotten >= MAX_FORGOTTEN:
        return Verdict(
            "failed", f"Slurm no longer knows job {ended.id}, nor {MAX_FORGOTTEN} before it"
        )
    return Verdict("again", f"Slurm no longer knows job {ended.id}")
