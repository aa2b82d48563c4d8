"""The loop that decides which stage is next, wherever stages run: what waits, runs and was lost."""

import signal
import threading
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from midstream.config import Machine
from midstream.core.tokens import counted, name_some
from midstream.cost.graph import Plan, PlanRow, plan
from midstream.cost.pictures import FeaturePlan, choice_for, feature_plan, frozen_encoder
from midstream.launch.check_data import Problem, refused
from midstream.launch.checks import lacking, problems_of_run
from midstream.launch.workers import REFUSED_EXIT_CODE, STOPPED_EXIT_CODE, Event
from midstream.study.label import label
from midstream.study.lease import STALE_SECONDS
from midstream.study.stages import DataStage, Stage
from midstream.study.store import Ledger, launch_lock
from midstream.study.studies import AnyStudy

# Signals that ask for a stop: SIGHUP where a terminal is closed, unless `nohup` has it ignored.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Of many stages that a sentence is about, so many are named; their names have commas.
MAX_NAMED = 12


@dataclass(frozen=True)
class Outcome:
    """What a run did: stages done before it and in it, failed, stopped; skipped never started.

    `num_failed` counts those that failed before and were not tried again; `num_queued` those whose
    jobs were left to a cluster's queue. `refused`: what kept all stages from starting, or those
    behind the preparation of the data.
    """

    num_before: int
    num_done: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_stopped: int = 0
    num_queued: int = 0
    interrupted: bool = False
    messages: tuple[str, ...] = ()
    refused: tuple[Problem, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if all stages are done or queued, 75 if the run was stopped, 2 if it was refused, 1 if
        a stage failed."""
        if self.num_stopped or (self.interrupted and (self.num_skipped or self.num_queued)):
            return STOPPED_EXIT_CODE
        if self.refused:
            return REFUSED_EXIT_CODE
        return 1 if self.num_failed or self.num_skipped else 0


@runtime_checkable
class Backend(Protocol):
    """Where stages run; it says what becomes of them, the scheduler decides.

    `queues`: a stage may be started before its parents are done, and what was started goes on when
    the scheduler leaves. What is put into `inbox`
    ends a wait in `poll`; a signal is (None, {"event": "signal", "signal"}).
    """

    queues: bool
    inbox: "SimpleQueue[tuple[Any, Event]]"

    @property
    def is_away(self) -> bool:
        """Whether it can start nothing now, and will."""

    def adopt(self, waiting: Mapping[str, PlanRow]) -> Collection[str] | None:
        """Those that an earlier scheduler has started; None while nobody knows."""

    def start(self, ready: Sequence[PlanRow]) -> Collection[str]:
        """Start as many as there is room for, the first ones first; the names of those."""

    def poll(self) -> Iterator[Event]:
        """Wait for something to tell: a signal, or a worker's events with the number of the
        "worker" and its "log".

        One that is "finished" has the "state" done, failed, stopped, or waiting where the stage is
        to be started again; "unnoted" if it could not note in the store itself that it failed.
        """

    def cancel(self, names: Sequence[str]) -> None:
        """End what was started of these, in vain."""

    def stop(self, number: int) -> None:
        """Send all that runs this signal."""

    def close(self, code: int) -> None:
        """Let go of what is idle; the run ends with this exit code."""


def remaining_chains(rows: Sequence[PlanRow]) -> dict[str, tuple[float, int]]:
    """By stage name: FLOPs and number of stages of the costliest chain from it to a result."""
    chains = {row.stage.name: (0.0, 0) for row in rows}
    for row in reversed(rows):  # children stand behind their parents
        flops, length = chains[row.stage.name]
        mine = chains[row.stage.name] = (flops + (row.cost.flops or 0.0), length + 1)
        for parent in row.stage.parents:
            if parent.name in chains:
                chains[parent.name] = max(chains[parent.name], mine)
    return chains


class FeatureChoices:
    """Whether features are stored or live, as it pays over all stages that are to be done.

    Pricing hundreds of stages takes a second: it is done once, not at every dispatch. What was
    chosen for an encoder's first stage stands for its others: stages that are done since then take
    their views with them, and what they have stored.
    """

    def __init__(self, rows: Sequence[PlanRow], ledger: Ledger, machine: Machine) -> None:
        self._stages = [row.stage for row in rows]
        self._ledger, self._machine = ledger, machine
        self._plans: list[FeaturePlan] | None = None

    def of(self, stage: Stage) -> str:
        """stored, live, or auto where the stage sees through no frozen encoder, or nobody knows."""
        if frozen_encoder(stage) is None:
            return "auto"
        if self._plans is None:
            self._plans = feature_plan(self._stages, self._ledger, self._machine)
        chosen = choice_for(stage, self._plans)
        return "auto" if chosen is None or chosen.decision == "unknown" else chosen.decision

    def ended(self, stage: Stage) -> None:
        """Where data was prepared, what was expected of it is counted from now on."""
        if isinstance(stage, DataStage):
            self._plans = None


@dataclass
class Scheduler:
    """Runs `rows` (parents first, none of them done) on a backend; `labels` by stage name.

    `recheck` says what is wrong once the data is prepared: nothing else starts before. `detach`
    leaves a backend that queues as soon as it has all there is to do.
    """

    rows: Sequence[PlanRow]
    labels: Mapping[str, str]
    ledger: Ledger
    backend: Backend
    features: FeatureChoices
    on_event: Callable[[Event], None]
    recheck: Callable[[], tuple[Problem, ...]] | None = None
    detach: bool = False
    waiting: dict[str, PlanRow] = field(default_factory=dict)
    running: dict[str, PlanRow] = field(default_factory=dict)
    chains: dict[str, tuple[float, int]] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    num_signals: int = 0
    is_adopted: bool = False
    refused: tuple[Problem, ...] = ()

    def run(self, left: Mapping[str, str], num_before: int = 0) -> Outcome:
        """All stages but those `left` as they are, of which the given words are said."""
        self.waiting = {row.stage.name: row for row in self.rows}
        self.chains = remaining_chains(self.rows)
        for name, told in left.items():
            self.waiting.pop(name)
            self._lose(name, told)
        inbox, code = self.backend.inbox, 1
        with stop_signals(lambda number: inbox.put((None, {"event": "signal", "signal": number}))):
            try:
                self._fill()
                while self._goes_on():
                    self._listen()
                    self._fill()
                outcome = self._outcome(num_before)
                code = outcome.exit_code
                return outcome
            except BaseException:
                self.backend.stop(signal.SIGTERM)
                raise
            finally:
                self.backend.close(code)

    def _outcome(self, num_before: int) -> Outcome:
        states = list(self.states.values())
        return Outcome(
            num_before=num_before,
            num_done=states.count("done"),
            num_failed=states.count("failed"),
            num_skipped=len(self.waiting),
            num_stopped=states.count("stopped"),
            num_queued=len(self.running),
            interrupted=self.num_signals > 0,
            messages=tuple(self.messages),
            refused=self.refused,
        )

    def _goes_on(self) -> bool:
        if self.backend.queues and (self.num_signals or (self.detach and not self.backend.is_away)):
            return False
        return bool(self.running) or self.backend.is_away

    def _listen(self) -> None:
        for event in self.backend.poll():
            if event["event"] == "signal":
                self._stop(event["signal"])
            elif event["event"] == "finished":
                self._settle(event)
            else:
                self.on_event(event)

    def _fill(self) -> None:
        """Start what is ready, longest remaining chain first."""
        if not self.is_adopted:
            self._adopt()
        while self.is_adopted and not (self.num_signals or self.refused):
            ready = [row for row in self.waiting.values() if self._is_ready(row)]
            data_runs = any(isinstance(row.stage, DataStage) for row in self.running.values())
            if self.recheck is not None and not ready and not data_runs:
                recheck, self.recheck = self.recheck, None
                self.refused = recheck()
                continue
            ready.sort(key=lambda row: self.chains[row.stage.name], reverse=True)
            started = self.backend.start(ready) if ready else ()
            if not started:
                return
            for name in started:
                self.running[name] = self.waiting.pop(name)

    def _adopt(self) -> None:
        names = self.backend.adopt(self.waiting)
        self.is_adopted = names is not None
        for name in names or ():
            self.running[name] = self.waiting.pop(name)
        for name, state in list(self.states.items()):
            if state == "failed":
                self._cancel_behind(name)
        if names:  # before anything starts it is seen what has ended meanwhile
            self._listen()

    def _is_ready(self, row: PlanRow) -> bool:
        """Whether no parent, nor the data that it must wait for, is still to be done."""
        if self.recheck is not None and not isinstance(row.stage, DataStage):
            return False
        return all(
            parent.name not in self.chains
            or self.states.get(parent.name) == "done"
            or (self.backend.queues and parent.name in self.running)
            for parent in row.stage.parents
        )

    def _settle(self, event: Event) -> None:
        """Note and tell how a stage ended."""
        name, state, error = event["stage"], event["state"], event.get("error")
        row = self.running.pop(name)
        if state == "waiting":
            self.waiting[name] = row
            return
        if state == "done" and not self.ledger.is_done(row.stage):
            state, error = "failed", f"reported done, but {self.ledger.folder(row.stage)} is not"
        if state == "failed" and event.get("unnoted"):
            try:
                self.ledger.mark_failed(row.stage, error or "")
            except ValueError as reason:  # a process that was left behind still holds the stage
                error = f"{error}; {reason}"
        self.states[name] = state
        self.features.ended(row.stage)
        told = {"event": "finished", "stage": name, "state": state, "error": error}
        self.on_event({**told, "worker": event["worker"], "log": event["log"]})
        if state == "failed":
            self._lose(
                name,
                f"{self.labels[name]} failed: {one_line(error)} (see {event['log']}); "
                "to run it again, add --retry",
            )
        elif state == "stopped" and not self.num_signals:
            # A worker that is told to go is a machine that is about to: the run stops.
            self._stop(signal.SIGTERM)

    def _lose(self, name: str, told: str) -> None:
        """A stage has failed: say so, and what is not started for it."""
        self.states[name] = "failed"
        self.messages.append(told)
        rows = self.waiting | self.running
        if lost := [self.labels[other] for other in rows if descends(rows[other], name, rows)]:
            count, were = counted(len(lost), "stage"), "was" if len(lost) == 1 else "were"
            who = f"{count} behind {self.labels[name]}"
            behind = name_some(lost, MAX_NAMED, "; ")
            self.messages.append(f"{who} {were} not started: {behind}")
        self._cancel_behind(name)

    def _cancel_behind(self, name: str) -> None:
        """What needs a failed stage leaves the backend's queue."""
        rows = self.waiting | self.running
        if lost := [other for other in self.running if descends(rows[other], name, rows)]:
            self.backend.cancel(lost)
            for other in lost:
                self.waiting[other] = self.running.pop(other)
            labels, failed = (self.labels[other] for other in lost), self.labels[name]
            who = name_some(labels, MAX_NAMED, "; ")
            text = f"the jobs of {who} are cancelled, since {failed} failed"
            self.on_event({"event": "note", "text": text})

    def _stop(self, number: int) -> None:
        """First signal: ask for a checkpoint and a stop. Second: end all. A queue goes on."""
        if number == signal.SIGHUP and self.num_signals:
            return  # a terminal that is closed may send two
        self.num_signals += 1
        if not self.backend.queues:
            self.backend.stop(signal.SIGTERM if self.num_signals == 1 else signal.SIGKILL)
            self.on_event({"event": "stopping", "signal": number})


def run_study(
    study: AnyStudy,
    ledger: Ledger,
    machine: Machine,
    on_event: Callable[[Event], None],
    require: Callable[[Plan], object],
    open_backend: Callable[[Plan, FeatureChoices], Backend],
    *,
    known: Callable[[], Container[str]] = tuple,
    retry: bool = False,
    skip_checks: bool = False,
    detach: bool = False,
) -> Outcome:
    """Run every stage of `study` that is not done on a backend, parents first; stopped ones go on.

    A stage that failed before is tried again only with `retry`; without it, it and its descendants
    are left and named. `on_event` gets {"event": "plan", "num_stages", "num_done"}, then the
    workers' events and {"event": "note", "text"}. A failed stage stops its descendants only. A
    study that is done starts nothing. What `launch/checks.py` finds wrong is refused, at first and,
    unless the backend queues, again when the data is prepared, before which nothing else starts;
    with `skip_checks` all starts at once, and what is wrong fails where it is met.

    `require` raises ValueError where the plan cannot run here, before anything is written; `known`
    names, with the store held, stages that may be running already. Raises ValueError if another
    launcher holds the store, or if a stage still runs elsewhere.
    """
    for problem in lacking(study) if skip_checks else ():
        raise ValueError(str(problem))
    before = plan(study, ledger)
    if not before.to_run:
        return Outcome(num_before=before.num_done)
    require(before)
    with launch_lock(ledger.store):
        work = plan(study, ledger)
        require_not_running(work.rows, ledger, known())
        found = () if skip_checks else problems_of_run(work, ledger, machine)
        if wrong := refused(found):
            return Outcome(work.num_done, num_skipped=len(work.to_run), refused=wrong)
        features = FeatureChoices(work.to_run, ledger, machine)
        backend = open_backend(work, features)
        ledger.save_study(study)
        on_event({"event": "plan", "num_stages": len(work.rows), "num_done": work.num_done})
        for doubtful in found:
            on_event({"event": "note", "text": str(doubtful)})
        scheduler = Scheduler(
            work.to_run, work.labels, ledger, backend, features, on_event, detach=detach
        )
        prepares = any(isinstance(row.stage, DataStage) for row in work.to_run)
        if prepares and not (skip_checks or backend.queues):
            scheduler.recheck = lambda: refused(
                problems_of_run(plan(study, ledger), ledger, machine)
            )
        return scheduler.run({} if retry else failed_before(work, ledger), work.num_done)


def require_not_running(
    rows: Sequence[PlanRow], ledger: Ledger, known: Container[str] = ()
) -> None:
    """Raises ValueError if a stage, but a `known` one, still runs under an earlier launcher."""
    for row in rows:
        if row.state == "running" and row.stage.name not in known:
            status = ledger.status(row.stage)
            raise ValueError(
                f"{label(row.stage)} is still being run by process {status.get('pid')} on "
                f"{status.get('host')}, which an earlier launcher left "
                f"({ledger.folder(row.stage)}); wait until it ends, or stop it; where it died with "
                f"its machine, that is known after {STALE_SECONDS:.0f} s"
            )


def failed_before(work: Plan, ledger: Ledger) -> dict[str, str]:
    """By stage name, what is said of the stages that failed before and are not tried again."""
    told = {}
    for row in work.rows:
        if row.state == "failed":
            error, name = one_line(ledger.status(row.stage).get("error")), row.stage.name
            told[name] = f"{work.labels[name]} failed before: {error}; to run it again, add --retry"
    return told


def descends(row: PlanRow, ancestor: str, rows: Mapping[str, PlanRow]) -> bool:
    """Whether a stage needs `ancestor`, itself or through others of `rows`."""
    return any(
        parent.name == ancestor
        or (parent.name in rows and descends(rows[parent.name], ancestor, rows))
        for parent in row.stage.parents
    )


def one_line(error: str | None) -> str:
    """A text of several lines as one."""
    return "; ".join(line.strip() for line in (error or "no reason was kept").splitlines())


@contextmanager
def stop_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` for the signals that stop, while the block runs; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        note(number)

    heard = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
