"""A study as jobs of a Slurm cluster: submitted, followed, settled (docs/cluster.md)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal
from uuid import uuid4

from midstream.config import Machine, SlurmSettings
from midstream.core.tokens import counted
from midstream.cost.graph import Plan, PlanRow
from midstream.launch import slurm_job
from midstream.launch.scheduler import Outcome, run_study
from midstream.launch.slurm_job import (
    NEVER,
    Entry,
    Job,
    JobBook,
    Patience,
    StageJob,
    Unreachable,
    events_since,
    job_folder,
)
from midstream.launch.submission import (
    MAX_ARRAY,
    refusals,
    require_slurm,
    shares_of,
    submit,
    tasks_before,
    tasks_told,
)
from midstream.launch.workers import Event, work_line, write_work
from midstream.study.label import label
from midstream.study.stages import Ranked, Stage
from midstream.study.store import Ledger
from midstream.study.studies import AnyStudy

# Reasons for waiting that need no word: the job's turn comes.
ORDINARY = {"", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit"}
# So often a job that Slurm has forgotten is submitted again.
MAX_FORGOTTEN = 3
# A job with GPUs asks for so many cores a rank to load rows, where nothing is said.
DATA_WORKERS = 4


@dataclass
class Queued:
    """A stage whose job waits or runs, and what was told of it.

    `told_before`: when the stage had last ended before this job. `is_doubted`: its job ended well
    though it is not done: a shared disk may be late. `early`: what its job said that began before
    a parent was done. `tasks` go before the job.
    """

    row: PlanRow
    tasks: int = 0
    offset: int = 0
    is_started: bool = False
    told_before: str | None = None
    is_doubted: bool = False
    early: Event | None = None
    reason: str = ""

    def news(self, path: Path) -> Iterator[Event]:
        """What its job has said in the file of events: that it has begun, the last progress, that
        it is begun again; where they are new."""
        events, self.offset = events_since(path, self.offset)
        begun = [event for event in events if event["event"] == "started"]
        if begun and not self.is_started:
            self.is_started = True
            yield begun[-1]
            if lost := tasks_told(path.parent, self.tasks):
                yield {"event": "note", "text": f"{label(self.row.stage)}: {lost}"}
        yield from [event for event in events if event["event"] == "progress"][-1:]
        for event in events:
            self.early = event if event["event"] == "early" else self.early
            if event["event"] in ("requeued", "restarted"):
                why = event.get("why") or event.get("error")
                text = f"{label(self.row.stage)} is {event['event']}: {why}"
                yield {"event": "note", "text": text}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a stage whose job has ended, and why.

    `counts`: it uses up one of the stage's restarts. `unnoted`: the store does not say it yet.
    `forgotten`: Slurm has lost this job, or what it waits for.
    """

    state: Literal["done", "failed", "waiting", "doubted"]
    text: str = ""
    counts: bool = False
    unnoted: bool = False
    forgotten: bool = False


def verdict(
    one: Queued,
    job_id: str,
    job: Job | None,
    ledger: Ledger,
    *,
    restarts_left: int = 0,
    num_forgotten: int = 0,
    parent_lost: bool = False,
    waits_for: str = "",
) -> Verdict:
    """What the end of a job means for its stage: the store's word counts before Slurm's.

    `job` is None if Slurm does not know it, `num_forgotten` so many before it; `parent_lost` says
    that a parent is neither done nor has a job; `waits_for` names one that was not done when
    the job began: a controller that forgot its job does not wait for it.
    """
    stage = one.row.stage
    if ledger.is_done(stage):
        return Verdict("done")
    status = ledger.status(stage)
    is_news = status.get("ended") not in (None, one.told_before)
    if status["state"] == "failed" and is_news:
        return Verdict("failed", status["error"] or "it did not say why")
    if parent_lost or (job is not None and job.reason == NEVER):
        return Verdict("waiting")
    if job is None or (waits_for and job.state == "FAILED"):
        early = f"job {job_id} began before {waits_for} was done"
        forgotten = f"Slurm no longer knows job {job_id}" if job is None else early
        if num_forgotten < MAX_FORGOTTEN:
            return Verdict("waiting", forgotten, forgotten=True)
        return Verdict("failed", f"{forgotten}, like {MAX_FORGOTTEN} before it", unnoted=True)
    if status["state"] == "stopped" and is_news and job.state != "CANCELLED":
        return Verdict("waiting", f"job {job.id} was told to stop ({job.state})")
    if job.state == "COMPLETED":
        told = f"job {job.id} ended well, but {ledger.folder(stage)} is not done"
        return Verdict("failed", told, unnoted=True) if one.is_doubted else Verdict("doubted")
    if restarts_left > 0 and job.state != "CANCELLED":
        return Verdict("waiting", job.sentence(), counts=True)
    return Verdict("failed", job.sentence(), unnoted=True)


class SlurmBackend:
    """Every stage as a job that waits for its parents' jobs; with the store locked.

    The jobs know of each other through Slurm's dependencies, and of their stages through the store:
    this process may end at any time, and the same command finds them again in `slurm.json`.
    `features` says whether a stage's features are stored or live; `command` stands in for that of a
    worker, which its work file is added to.
    """

    queues = True

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        machine: Machine,
        settings: SlurmSettings,
        features: Callable[[Stage], str],
        on_event: Callable[[Event], None],
        command: Sequence[str] | None = None,
    ) -> None:
        self.plan, self.ledger, self.machine, self.settings = plan, ledger, machine, settings
        self.features, self.on_event = features, on_event
        self.command = tuple(command) if command else None
        self.store, self.book = ledger.store.absolute(), JobBook.of(ledger.store)
        self.numbers = {row.stage.name: k for k, row in enumerate(plan.to_run, start=1)}
        self.queued: dict[str, Queued] = {}
        self.restarts: Counter[str] = Counter()
        self.forgotten: Counter[str] = Counter()
        # A SimpleQueue, since a signal handler may put into it while the main thread waits.
        self.inbox: SimpleQueue[tuple[Any, Event]] = SimpleQueue()
        self.patience, self.wait_seconds = Patience(self._note), 0.0

    @property
    def is_away(self) -> bool:
        """Whether Slurm does not answer."""
        return self.patience.is_away

    def adopt(self, waiting: Mapping[str, PlanRow]) -> list[str] | None:
        """Find again what an earlier launcher has submitted; None while Slurm does not answer."""
        with self.patience.asking():
            self.book.drop_unsure()
            jobs = slurm_job.queue()
            known, others = {row.stage.name for row in self.plan.rows}, []
            for name, entry in list(self.book.entries.items()):
                alive = (job := entry.among(jobs)) is not None and job.is_live
                if name in waiting and (alive or waiting[name].state != "failed"):
                    self.restarts[name] = entry.restarts
                    self.queued[name] = self._of(waiting[name])
                elif alive and name not in known:
                    others.append(entry.job or "")
                else:
                    self.book.forget(name)
            if others:
                self._note(f"jobs of another study go on: {' '.join(others)}")
            if self.queued:
                count = counted(len(self.queued), "stage")
                self._note(f"the jobs of {count}, submitted before, are followed")
            return list(self.queued)
        return None

    def start(self, ready: Sequence[PlanRow]) -> list[str]:
        """Submit what max_jobs has room for; equal ones become an array."""
        room = self.settings.max_jobs - sum(1 + one.tasks for one in self.queued.values())
        sizes = accumulate(1 + tasks_before(row.stage, self.settings) for row in ready)
        rows = [row for row, size in zip(ready, sizes, strict=True) if size <= room]
        queued = {row.stage.name: self._of(row) for row in rows}
        for name, one in queued.items():  # what earlier jobs have said is not told again
            _, one.offset = events_since(job_folder(self.store, name) / "events.jsonl", 0)
            one.told_before = self.ledger.status(one.row.stage).get("ended")
        arrays: dict[tuple[str, tuple[str, ...], int], list[Stage]] = {}
        for stage in (row.stage for row in rows):
            parents = {parent.name for parent in stage.parents} & self.queued.keys()
            after = {self.book.entries[name].job or "" for name in parents}
            key = (stage.kind, tuple(sorted(after)), self.restarts[stage.name])
            arrays.setdefault(key, []).append(stage)
        try:
            with self.patience.asking():
                self.book.drop_unsure()
                for (_, ids, restarts), stages in arrays.items():
                    # A source that tasks share has an array of its own.
                    step = 1 if tasks_before(stages[0], self.settings) else MAX_ARRAY
                    for first in range(0, len(stages), step):
                        self._submit(stages[first : first + step], ids, restarts)
        finally:
            entries = self.book.entries
            started = [name for name in queued if name in entries and entries[name].job is not None]
            self.queued |= {name: queued[name] for name in started}
        return started

    def poll(self) -> Iterator[Event]:
        """A signal; else, after a while, what the jobs have said and which have ended."""
        try:
            yield self.inbox.get(timeout=self.wait_seconds)[1]
            return
        except Empty:
            self.wait_seconds = self.settings.poll_seconds
        with self.patience.asking():
            for name, one in list(self.queued.items()):
                yield from self._news(name, one)
                if self.ledger.is_done(one.row.stage):
                    yield self._finished(name, "done")
            jobs = slurm_job.queue()
            for name, one in list(self.queued.items()):
                if name not in self.queued:
                    continue  # lost with a parent just now
                entry = self.book.entries[name]
                job = entry.among(jobs)
                if job is None or not job.is_live:
                    yield from self._end(name, one, entry, job)
                elif job.state == "PENDING" and job.reason != one.reason:
                    one.reason = job.reason
                    if job.reason not in ORDINARY:
                        who = self.plan.labels[name]
                        self._note(f"job {job.id} of {who} waits: {job.reason}")

    def cancel(self, names: Sequence[str]) -> None:
        """The jobs of these stages leave the queue."""
        with suppress(Unreachable):  # Slurm cancels them by itself as well
            slurm_job.ask("scancel", "--quiet", *self._ids(names))
        for name in names:
            self.queued.pop(name)
        self.book.forget(*names)

    def _ids(self, names: Iterable[str]) -> list[str]:
        """The jobs of these stages, and the arrays that go before them."""
        entries = [self.book.entries[name] for name in names]
        return [job for one in entries for job in (one.tasks, one.job) if job]

    def stop(self, number: int) -> None:
        """Jobs go on without this process."""

    def close(self, code: int) -> None:
        """Say how what is left to Slurm is followed, and ended."""
        if self.queued:
            count = counted(len(self.queued), "job is", "jobs are")
            ends = f"scancel {' '.join(self._ids(self.queued))} ends them"
            self._note(f"{count} left to Slurm: the same command follows them, {ends}")

    def _news(self, name: str, one: Queued) -> Iterator[Event]:
        for event in one.news(job_folder(self.store, name) / "events.jsonl"):
            yield event | {"worker": self.numbers[name], "log": self._log(name)}

    def _end(self, name: str, one: Queued, entry: Entry, job: Job | None) -> Iterator[Event]:
        """A stage's job is not in the queue any more."""
        job = slurm_job.ended_job(entry.job or "", entry.name, job)
        if job is not None and job.is_live:
            return  # it was put back meanwhile
        yield from self._news(name, one)
        parents = [parent for parent in one.row.stage.parents if not self.ledger.is_done(parent)]
        early = one.early if one.early and one.early["job"] == entry.job else None
        found = verdict(
            one,
            entry.job or "",
            job,
            self.ledger,
            restarts_left=self.settings.restarts - self.restarts[name],
            num_forgotten=self.forgotten[name],
            parent_lost=any(parent.name not in self.queued for parent in parents),
            waits_for=early["waits_for"] if early else "",
        )
        one.is_doubted = found.state == "doubted"
        if found.state == "waiting":
            self.forgotten[name] += found.forgotten
            self.restarts[name] += found.counts
            if found.text:
                self._note(f"{self.plan.labels[name]} is submitted again: {found.text}")
        if not one.is_doubted:
            yield self._finished(name, found.state, found.text or None, found.unnoted)

    def _finished(
        self, name: str, state: str, error: str | None = None, unnoted: bool = False
    ) -> Event:
        told: Event = {"event": "finished", "stage": name, "state": state, "error": error}
        told |= {"unnoted": unnoted, "worker": self.numbers[name], "log": self._log(name)}
        self.queued.pop(name)
        self.book.forget(name)
        return told

    def _log(self, name: str) -> str:
        """Where the stage's worker writes; before there is one, its job."""
        log, entry = job_folder(self.store, name) / "worker-0.log", self.book.entries[name]
        job = self.store / "slurm" / "jobs" / entry.name / f"{entry.job}_0_log.out"
        return str(log if log.is_file() else job)

    def _note(self, text: str) -> None:
        self.on_event({"event": "note", "text": text})

    def _machine_for(self, stage: Stage) -> Machine:
        """Where the stage's worker runs: its ranks on its nodes, or one process."""
        asked = self.settings.resources(stage.kind)
        if not isinstance(stage, Ranked):
            alone = self.machine.alone()
            if not tasks_before(stage, self.settings):
                return alone
            # What tasks have left is made by as many processes as a task has.
            workers = asked.cpus or alone.threads + (alone.data_workers or 0)
            return alone.model_copy(update={"workers": workers})
        ranks = asked.ranks or asked.gpus or self.machine.ranks
        nodes = asked.nodes or 1
        master = "set-in-the-job:0" if nodes > 1 else None
        values = {"ranks": ranks, "nodes": nodes, "master": master, "workers": 1}
        return Machine.model_validate(self.machine.model_dump() | values)

    def _submit(self, stages: Sequence[Stage], after: Sequence[str], restarts: int) -> None:
        """Submit equal stages as one job, or as an array; they are in the book from before.

        A source's tasks go before its own job. Raises Unreachable if the controller is away,
        ValueError with sbatch's own words if it refuses.
        """
        kind = stages[0].kind
        name = f"midstream-{kind}-{uuid4().hex[:12]}"
        machine, functions = self._machine_for(stages[0]), []
        left = max(0, self.settings.restarts - restarts)
        for stage in stages:
            given = job_folder(self.store, stage.name) / "given.json"
            write_work(given, self.store, machine, work_line(stage, self.features(stage)))
            functions.append(StageJob(self.store, given, left, self.settings.port, self.command))
        names = [stage.name for stage in stages]
        self.book.note({one: Entry(name, None, restarts) for one in names})
        asked = self.settings.resources(kind)
        ahead = machine.data_workers
        if ahead is None:
            ahead = DATA_WORKERS if asked.gpus else 0
        cpus = asked.cpus or machine.ranks * (machine.threads + ahead)
        waits = [f"afterok:{':'.join(after)}"] if after else []

        folder = self.store / "slurm" / "jobs" / name
        hand_over = partial(
            submit, folder, self.settings, asked, name, nodes=machine.nodes, cpus=cpus
        )
        tasks: str | None = None
        with refusals(self.book, f"{len(stages)} {kind} jobs"):
            if count := tasks_before(stages[0], self.settings):
                shares = shares_of(stages[0], self.store, count, cpus)
                tasks = hand_over(shares, after=",".join(waits) or None)[0].partition("_")[0]
                # However they end: what they have not made is made by the stage's own job.
                waits = [*waits, f"afterany:{tasks}"]
            ids = hand_over(functions, after=",".join(waits) or None)
        self.book.note(
            {one: Entry(name, job, restarts, tasks) for one, job in zip(names, ids, strict=True)}
        )

    def _of(self, row: PlanRow) -> Queued:
        return Queued(row, tasks_before(row.stage, self.settings))


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
    """Run what `study` lacks as jobs, as `scheduler.run_study` says; jobs submitted before go on.

    A job that fails, or that Slurm ends, fails its stage and cancels the jobs of its descendants.
    SIGINT or SIGTERM ends the following, never a job; `detach` ends it once all is submitted.
    Raises ValueError, with nothing submitted, without Slurm's commands, for a partition that does
    not exist or gives less time, and if `detach` would leave stages without a job.
    """

    def require(work: Plan) -> None:
        kinds = {row.stage.kind for row in work.to_run}
        require_slurm(settings.resources(kind) for kind in kinds)
        num_jobs = sum(1 + tasks_before(row.stage, settings) for row in work.to_run)
        if detach and num_jobs > settings.max_jobs:
            raise ValueError(
                f"{num_jobs} jobs are to run, but max_jobs is {settings.max_jobs}, and "
                "with --detach none is submitted later: leave --detach out, or raise max_jobs"
            )

    return run_study(
        study,
        ledger,
        machine,
        on_event,
        require,
        lambda work, features: SlurmBackend(
            work, ledger, machine, settings, features.of, on_event, command
        ),
        known=lambda: JobBook.of(ledger.store).entries,
        retry=retry,
        skip_checks=skip_checks,
        detach=detach,
    )
