"""What is asked of Slurm by its own commands, and which job has which stage."""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

from midstream.config import SlurmResources
from midstream.core.storage import read_json, write_json

COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
# A command that says nothing for so long has not reached the controller.
ANSWER_SECONDS = 120.0
# The partition that jobs get where none is named.
DEFAULT = "the default partition"
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
    minutes: dict[str, float] = {}
    for line in ask("sinfo", "--noheader", "--all", "--format=%P|%l").splitlines():
        partition, limit = line.strip().rsplit("|", 1)
        minutes[partition.removesuffix("*")] = limit_minutes(limit)
        if partition.endswith("*"):
            minutes[DEFAULT] = limit_minutes(limit)
    wanted = {(one.partition or DEFAULT, one.time_minutes or 0) for one in asked}
    # Those that somebody named first.
    for names, time in sorted(wanted, key=lambda pair: (pair[0] == DEFAULT, pair)):
        for name in names.split(","):
            if name in minutes and time > minutes[name]:
                place = name if name == DEFAULT else f"partition {name}"
                raise ValueError(
                    f"time_minutes is {time}, but {place} gives {minutes[name]:.0f}: ask for less "
                    "with --slurm-set time_minutes=N; a stage that needs longer goes on in the "
                    "next piece"
                )
            if name not in minutes and name != DEFAULT:
                known = sorted(minutes.keys() - {DEFAULT})
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"Slurm has no partition {name!r}; {hint}it has {', '.join(known)}: choose one "
                    "with --slurm-set partition=NAME"
                )


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
    for line in ask("squeue", "--noheader", *asked).splitlines():
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
        told = ask("sacct", "-X", "-n", "-P", "-j", job_id, "-o", columns)
    except (Unreachable, FileNotFoundError):  # no accounting
        told = ""
    for line in told.splitlines():
        named, state, code, reason = line.split("|", 3)
        # "CANCELLED by 1000" is a state; one that is live here may have ended since.
        if named == name and state.split()[0] in ENDED:
            return Job(job_id, name, state.split()[0], reason, code)
    try:
        told = ask("scontrol", "--oneliner", "show", "job", job_id)
    except Unreachable:  # it has gone from the controller's memory
        return seen
    values = dict(re.findall(r"(\w+)=(\S*)", told))
    if values.get("JobName") != name:
        return seen
    return Job(job_id, name, values["JobState"], values["Reason"], values["ExitCode"])


def cancel(ids: Sequence[str]) -> None:
    """End jobs, whether they run or wait; those that have ended already are passed over."""
    if ids:
        ask("scancel", "--quiet", *ids)


def job_state(job_id: str) -> str:
    """The state of a job that the controller knows."""
    found = re.search(r"JobState=(\S+)", ask("scontrol", "--oneliner", "show", "job", job_id))
    return found[1] if found else ""


def ask(*command: str) -> str:
    """What a command of Slurm prints; Unreachable if it fails or says nothing."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} has said nothing for {ANSWER_SECONDS:.0f} s") from None
    if asked.returncode:
        raise Unreachable(f"{command[0]}: {asked.stderr.strip() or asked.returncode}")
    return asked.stdout


@dataclass(frozen=True)
class Entry:
    """A stage's job: the name it was submitted under, and its id (12, or 12_3).

    `restarts` counts how often the stage was begun again because its processes were killed.
    """

    name: str
    job: str | None
    restarts: int = 0


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
        return cls(
            path,
            {
                name: Entry(one["name"], one["job"], one.get("restarts", 0))
                for name, one in kept.items()
            },
        )

    def note(self, entries: dict[str, Entry]) -> None:
        """Add entries, or change them."""
        self.entries |= entries
        told = {"jobs": {name: asdict(one) for name, one in self.entries.items()}}
        write_json(self.path, told)

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
