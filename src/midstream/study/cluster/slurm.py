"""Runs what a study lacks as jobs of a Slurm cluster, and follows them (docs/cluster.md).

Jobs know of each other through Slurm's dependencies, and of their stages through the store: this
process may end at any time, and the same command finds them again in `slurm.json`.
"""

from collections.abc import Callable, Sequence

from midstream.config import Machine, SlurmSettings
from midstream.study.checks import problems_of_run
from midstream.study.cluster import scheduler
from midstream.study.cluster.follow import Follower
from midstream.study.cluster.job_book import JobBook
from midstream.study.cluster.submit import Submitter
from midstream.study.graph import plan
from midstream.study.ledger import Ledger, launch_lock
from midstream.study.outcome import Outcome, failed_before, require_inputs, require_not_running
from midstream.study.problem import refused
from midstream.study.studies import AnyStudy
from midstream.study.workers import Event


def run_on_slurm(
    study: AnyStudy,
    ledger: Ledger,
    machine: Machine,
    settings: SlurmSettings,
    on_event: Callable[[Event], None],
    *,
    retry: bool = False,
    detach: bool = False,
    skip_checks: bool = False,
    command: Sequence[str] | None = None,
) -> Outcome:
    """Run every stage of `study` that is not done as a job; jobs of an earlier launcher go on.

    `on_event` gets what `launch.run` gives it, and {"event": "note", "text"} where Slurm has
    something to say. A job that fails, or that Slurm ends, fails its stage and cancels the jobs of
    its descendants. SIGINT or SIGTERM ends the following, never a job; `detach` ends it once all
    is submitted. What `study/checks.py` finds wrong is refused before the first job. Raises
    ValueError, with nothing submitted, without Slurm's commands, for a partition that does not
    exist or gives less time, and where another launcher holds the store.
    """
    if skip_checks:
        require_inputs(study)
    before = plan(study, ledger)
    if not before.to_run:
        return Outcome(num_before=before.num_done)
    kinds = {row.stage.kind for row in before.to_run}
    try:
        scheduler.require_slurm(settings.resources(kind) for kind in kinds)
    except scheduler.Unreachable as reason:
        raise ValueError(f"{reason}; run the same command again once Slurm answers") from None
    with launch_lock(ledger.store):
        book = JobBook.of(ledger.store)
        work = plan(study, ledger)
        require_not_running(work.rows, ledger, book.entries)
        found = () if skip_checks else problems_of_run(work, ledger, machine)
        if wrong := refused(found):
            return Outcome(work.num_done, num_skipped=len(work.to_run), refused=wrong)
        if detach and len(work.to_run) > settings.max_jobs:
            raise ValueError(
                f"{len(work.to_run)} stages are to run, but max_jobs is {settings.max_jobs}, and "
                "with --detach none is submitted later: leave --detach out, or raise max_jobs"
            )
        ledger.save_study(study)
        on_event({"event": "plan", "num_stages": len(work.rows), "num_done": work.num_done})
        for doubtful in found:
            on_event({"event": "note", "text": str(doubtful)})
        left = {} if retry else failed_before(work, ledger)
        submitter = Submitter(ledger.store, machine, settings, book, command)
        return Follower(work, ledger, machine, settings, on_event, submitter).run(left, detach)
