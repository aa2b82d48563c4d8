"""What the end of a job means for its stage: done, failed, to be submitted again, or wait."""

from dataclasses import dataclass
from typing import Literal

from midstream.study.cluster.scheduler import Job
from midstream.study.ledger import Ledger
from midstream.study.stage import Stage

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
