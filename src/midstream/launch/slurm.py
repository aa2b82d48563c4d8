"""A study as jobs of a Slurm cluster: submitted, followed, settled (docs/cluster.md).

A stage whose job waits or runs: what the job has said, and what was told of it. Follows the jobs of
a study: submits, tells what they say, settles what has ended.

Runs what a study lacks as jobs of a Slurm cluster, and follows them (docs/cluster.md).

Jobs know of each other through Slurm's dependencies, and of their stages through the store: this
process may end at any time, and the same command finds them again in `slurm.json`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from midstream.config import Machine, SlurmSettings
from midstream.core.tokens import counted
from midstream.cost.graph import Plan, PlanRow, plan
from midstream.launch import slurm_queue
from midstream.launch.check_data import refused
from midstream.launch.checks import problems_of_run
from midstream.launch.local import FeatureChoices
from midstream.launch.slurm_job import JobFiles, Submitter, Task, events_since
from midstream.launch.slurm_queue import Ended, Entry, Job, JobBook, verdict
from midstream.launch.terminal import (
    Outcome,
    descends,
    failed_before,
    failure,
    named,
    not_started,
    require_inputs,
    require_not_running,
    stop_signals,
)
from midstream.launch.workers import Event
from midstream.study.label import label
from midstream.study.store import Ledger, launch_lock
from midstream.study.studies import AnyStudy

# Reasons for waiting that need no word: the job's turn comes.
ORDINARY = {"", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit"}
# What a job says when it is begun again.
AGAIN = ("requeued", "restarted")


@dataclass
class Queued:
    """A stage whose job waits or runs, and what was told of it."""

    row: PlanRow
    offset: int = 0
    is_started: bool = False
    # When the stage had last ended before this job.
    told_before: str | None = None
    # Its job ended well though it is not done: a shared disk may be late.
    doubted: bool = False
    reason: str = ""

    def skip_what_is_old(self, ledger: Ledger) -> None:
        """What earlier jobs have said is not told again."""
        name = self.row.stage.name
        _, self.offset = events_since(JobFiles(ledger.store, name).events, 0)
        self.told_before = ledger.status(self.row.stage).get("ended")

    def news(self, ledger: Ledger) -> list[Event]:
        """That the stage has begun, and its last progress, where they are new."""
        path = JobFiles(ledger.store, self.row.stage.name).events
        events, self.offset = events_since(path, self.offset)
        told = []
        begun = [event for event in events if event["event"] == "started"]
        if begun and not self.is_started:
            self.is_started = True
            told.append(begun[-1])
        told += [event for event in events if event["event"] == "progress"][-1:]
        told += [
            {"event": "note", "text": f"{label(self.row.stage)} is {event['event']}: {why}"}
            for event in events
            if (why := event.get("why") or event.get("error")) and event["event"] in AGAIN
        ]
        return told

    def waits_for(self, reason: str) -> bool:
        """Whether a job waits for something out of the ordinary that was not told yet."""
        new, self.reason = reason != self.reason, reason
        return new and reason not in ORDINARY


@dataclass
class Follower:
    """Submits what has room, looks what became of it, until nothing is left or it is told to go."""

    plan: Plan
    ledger: Ledger
    machine: Machine
    settings: SlurmSettings
    on_event: Callable[[Event], None]
    submitter: Submitter
    features: FeatureChoices
    # Stages without a job that are still to be done, in the order of the plan.
    waiting: dict[str, PlanRow] = field(default_factory=dict)
    # Stages whose jobs wait or run.
    queued: dict[str, Queued] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    restarts: Counter[str] = field(default_factory=Counter)
    forgotten: Counter[str] = field(default_factory=Counter)
    is_away: bool = False
    is_adopted: bool = False
    # A SimpleQueue, since a signal handler may put into it while the main thread waits.
    signals: "SimpleQueue[int]" = field(default_factory=SimpleQueue)

    @property
    def book(self) -> JobBook:
        """Which job was given which stage."""
        return self.submitter.book

    def run(self, left: dict[str, str], detach: bool) -> Outcome:
        """All stages but those `left` as they are, of which the given words are said."""
        self.waiting = {row.stage.name: row for row in self.plan.to_run}
        self.numbers = {name: number for number, name in enumerate(self.waiting, start=1)}
        for name, told in left.items():
            self.waiting.pop(name)
            self._lose(name, told)
        interrupted = False
        with stop_signals(self.signals.put):
            while not interrupted:
                # Nothing is submitted before it is known what has been.
                self._ask(self._submit if self.is_adopted else self._adopt)
                if self.is_adopted and not self._submittable() and (detach or not self.queued):
                    break
                try:
                    self.signals.get(timeout=self.settings.poll_seconds)
                    interrupted = True
                except Empty:
                    self._ask(self._look)
        if self.queued:
            ids = " ".join(self.book.entries[name].job or "" for name in self.queued)
            count = counted(len(self.queued), "job is", "jobs are")
            self._note(
                f"{count} left to Slurm: the same command follows them, scancel {ids} ends them"
            )
        states = list(self.states.values())
        return Outcome(
            num_before=self.plan.num_done,
            num_done=states.count("done"),
            num_failed=states.count("failed"),
            num_skipped=len(self.waiting),
            num_queued=len(self.queued),
            interrupted=interrupted,
            messages=tuple(self.messages),
        )

    def _ask(self, act: Callable[[], None]) -> None:
        """Do something that needs Slurm; while it does not answer, wait, and say so once."""
        try:
            act()
        except slurm_queue.Unreachable as reason:
            if not self.is_away:
                self._note(f"{reason}; waiting until Slurm answers, its jobs go on")
            self.is_away = True
        else:
            if self.is_away:
                self._note("Slurm answers again")
            self.is_away = False

    def _adopt(self) -> None:
        """Find again what an earlier launcher has submitted."""
        self.book.drop_unsure()
        live = {job.id: job.name for job in slurm_queue.queue().values() if job.is_live}
        rows = {row.stage.name: row for row in self.plan.rows}
        others = []
        for name, entry in list(self.book.entries.items()):
            alive = entry.job is not None and live.get(entry.job) == entry.name
            if name in self.waiting and (alive or rows[name].state != "failed"):
                self.restarts[name] = entry.restarts
                self.queued[name] = Queued(self.waiting.pop(name))
            elif alive and name not in rows:
                others.append(entry.job or "")
            else:
                self.book.forget(name)
        if others:
            count = counted(len(others), "job of another study goes", "jobs of another study go")
            self._note(f"{count} on: {' '.join(others)}")
        if self.queued:
            count = counted(len(self.queued), "stage")
            self._note(f"the jobs of {count}, submitted before, are followed")
        for name, state in list(self.states.items()):
            if state == "failed":
                self._cancel_descendants(name)
        self.is_adopted = True
        self._look()
        self._submit()

    def _submittable(self) -> list[PlanRow]:
        """Waiting stages none of whose ancestors has failed."""
        failed = [name for name, state in self.states.items() if state == "failed"]
        return [
            row
            for row in self.waiting.values()
            if not any(descends(row, name, self.waiting) for name in failed)
        ]

    def _submit(self) -> None:
        """Submit all that max_jobs has room for, parents first."""
        self.book.drop_unsure()
        while (room := self.settings.max_jobs - len(self.queued)) > 0:
            ready = [
                row
                for row in self._submittable()
                if all(parent.name not in self.waiting for parent in row.stage.parents)
            ][:room]
            if not ready:
                return
            queued = {row.stage.name: Queued(row) for row in ready}
            for one in queued.values():
                one.skip_what_is_old(self.ledger)
            try:
                self.submitter.submit([self._task(row) for row in ready])
            finally:
                for name, one in queued.items():
                    if (entry := self.book.entries.get(name)) and entry.job is not None:
                        self.waiting.pop(name)
                        self.queued[name] = one

    def _task(self, row: PlanRow) -> Task:
        parents = [parent.name for parent in row.stage.parents if parent.name in self.queued]
        jobs = {self.book.entries[name].job for name in parents}
        ids = tuple(sorted(job for job in jobs if job is not None))
        return Task(row.stage, self.features.of(row.stage), ids, self.restarts[row.stage.name])

    def _look(self) -> None:
        """Tell what the jobs have said, and settle those that have ended."""
        for name, one in list(self.queued.items()):
            for event in one.news(self.ledger):
                self.on_event(event | {"worker": self.numbers[name], "log": self._log(name)})
            if self.ledger.is_done(one.row.stage):
                self._settle(name, "done", None)
        jobs = slurm_queue.queue()
        for name, one in list(self.queued.items()):
            entry = self.book.entries.get(name)
            if name not in self.queued or entry is None or entry.job is None:
                continue  # lost with a parent just now
            job = jobs.get(entry.job)
            job = job if job is not None and job.name == entry.name else None
            if job is None or not job.is_live:
                self._end(name, one, entry, slurm_queue.ended_job(entry.job, entry.name, job))
            elif job.state == "PENDING" and one.waits_for(job.reason):
                self._note(f"job {job.id} of {self.plan.labels[name]} waits: {job.reason}")

    def _end(self, name: str, one: Queued, entry: Entry, job: Job | None) -> None:
        """A stage's job is not in the queue any more."""
        if job is not None and job.is_live:
            return  # it was put back meanwhile
        parents = [parent for parent in one.row.stage.parents if not self.ledger.is_done(parent)]
        ended = Ended(
            one.row.stage,
            entry.job or "",
            job,
            self.settings.restarts - self.restarts[name],
            told_before=one.told_before,
            parent_lost=any(parent.name not in self.queued for parent in parents),
            num_forgotten=self.forgotten[name],
            doubted=one.doubted,
        )
        found = verdict(ended, self.ledger)
        one.doubted = found.action == "wait"
        if found.action == "again":
            self.forgotten[name] += job is None
            self.restarts[name] += found.counts
            self.waiting[name] = self.queued.pop(name).row
            self.book.forget(name)
            if found.text:
                self._note(f"{self.plan.labels[name]} is submitted again: {found.text}")
        elif found.action == "failed":
            noted = found.text if found.is_noted else self._mark_failed(one.row, found.text)
            self._settle(name, "failed", noted)
        elif found.action == "done":
            self._settle(name, "done", None)

    def _mark_failed(self, row: PlanRow, error: str) -> str:
        """Note in the ledger what the stage can no longer say itself."""
        try:
            self.ledger.mark_failed(row.stage, error)
        except ValueError as reason:  # a process that the job left behind still holds the stage
            return f"{error}; {reason}"
        return error

    def _settle(self, name: str, state: str, error: str | None) -> None:
        """Note and tell how a stage ended."""
        log = self._log(name)
        self.features.ended(self.queued.pop(name).row.stage)
        self.book.forget(name)
        self.states[name] = state
        event = {"event": "finished", "stage": name, "state": state, "error": error}
        self.on_event(event | {"worker": self.numbers[name], "log": log})
        if state == "failed":
            self._lose(name, failure(self.plan.labels[name], error, log))

    def _lose(self, name: str, told: str) -> None:
        """A stage has failed: say so, and what is not started for it."""
        self.states[name] = "failed"
        rows = self.waiting | {other: one.row for other, one in self.queued.items()}
        lost = not_started(rows, name, self.plan.labels)
        self.messages += [text for text in (told, lost) if text]
        self._cancel_descendants(name)

    def _cancel_descendants(self, name: str) -> None:
        """The jobs of what needs a failed stage leave the queue."""
        rows = self.waiting | {other: one.row for other, one in self.queued.items()}
        lost = [other for other in self.queued if descends(rows[other], name, rows)]
        jobs = [self.book.entries[other].job or "" for other in lost]
        with suppress(slurm_queue.Unreachable):  # Slurm cancels them by itself as well
            slurm_queue.cancel(jobs)
        for other in lost:
            self.waiting[other] = self.queued.pop(other).row
        if lost:
            self.book.forget(*lost)
            labels = self.plan.labels
            who = named([labels[other] for other in lost])
            self._note(f"the jobs of {who} are cancelled, since {labels[name]} failed")

    def _log(self, name: str) -> str:
        """Where the stage's worker writes; before there is one, its job."""
        log = JobFiles(self.ledger.store, name).log(0)
        return str(log) if log.is_file() else self.book.entries[name].log

    def _note(self, text: str) -> None:
        self.on_event({"event": "note", "text": text})


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
    is submitted. What `launch/checks.py` finds wrong is refused before the first job. Raises
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
        slurm_queue.require_slurm(settings.resources(kind) for kind in kinds)
    except slurm_queue.Unreachable as reason:
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
        features = FeatureChoices(work, ledger, machine)
        follower = Follower(work, ledger, machine, settings, on_event, submitter, features)
        return follower.run(left, detach)
