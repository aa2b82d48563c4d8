"""What is asked of Slurm: its partitions, our jobs, how one ended; and to end or requeue one.

Slurm's own commands are asked, without accounting where there is none: `squeue` knows a job for
`MinJobAge` seconds after its end, `sacct` for ever.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

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


def require_slurm(partitions: Iterable[str | None]) -> None:
    """Raises ValueError where Slurm's commands, submitit, or one of the partitions are missing.

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
    known = _ask("sinfo", "--noheader", "--all", "--format=%R").split()
    for name in (one for given in partitions if given for one in given.split(",")):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"Slurm has no partition {name!r}; {hint}it has {', '.join(sorted(set(known)))}: "
                "choose one with --slurm-set partition=NAME"
            )


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
