"""What the commands print while a study runs, and how a run ends.

What the commands print: progress while a study runs, tables of plans, states and results. How a run
ends, whoever ran it: what became of the stages, the exit code, what is said.
"""

import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from midstream.core.tokens import counted
from midstream.cost.graph import Plan, PlanRow, missing_inputs, older_stages
from midstream.launch.check_data import Level, Problem
from midstream.study.imported import what_can_run
from midstream.study.label import label
from midstream.study.lease import STALE_SECONDS
from midstream.study.results import StageResult
from midstream.study.store import Ledger, State
from midstream.study.studies import AnyStudy

Event = dict[str, Any]
# Where standard output is no terminal, a stage prints its progress this often.
QUIET_SECONDS = 10.0
STATES: tuple[State, ...] = ("done", "running", "stopped", "failed", "new")
LEVEL_WORDS: Mapping[Level, str] = {
    "wrong": "wrong with the study or its data",
    "lacking": "not on this machine",
    "doubtful": "doubtful, by what the recipe expects of its data",
}


@contextmanager
def progress(console: Console, labels: Mapping[str, str]) -> Iterator[Callable[[Event], None]]:
    """Yield what shows a launcher's events: bars in a terminal, lines of text elsewhere.

    `labels` says what stages are called, by the names that the events have.
    """
    if not console.is_terminal:
        yield _named(_Lines(console).show, labels)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[details]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield _named(_Bars(bars).show, labels)


def _named(show: Callable[[Event], None], labels: Mapping[str, str]) -> Callable[[Event], None]:
    def show_named(event: Event) -> None:
        stage = event.get("stage")
        show(event if stage is None else {**event, "stage": labels.get(stage, stage)})

    return show_named


@contextmanager
def reporting(console: Console, what: str) -> Iterator[Callable[[float, str], None]]:
    """Yield what shows how far one piece of work is (a fraction and a text): a line that changes in
    a terminal, else a line of its own at the start, every QUIET_SECONDS and at the end."""
    if console.is_terminal:
        with console.status(what) as line:
            yield lambda fraction, text: line.update(_share(what, fraction, text))
        return
    last = -QUIET_SECONDS

    def show(fraction: float, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if fraction >= 1.0 or now - last >= QUIET_SECONDS:
            last = now
            told = f"{time.strftime('%H:%M:%S')} {_share(what, fraction, text)}"
            console.print(told, soft_wrap=True, markup=False, highlight=False)

    yield show


def _share(what: str, fraction: float, text: str) -> str:
    # Not rounded up: 100 % is said when all is done.
    return f"{what}: {text}, {int(100 * fraction)} % of all"


class _Bars:
    """One bar for the stages and one for each that runs."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.overall: TaskID | None = None
        self.running: dict[str, TaskID] = {}

    def show(self, event: Event) -> None:
        """Show an event of the launcher."""
        kind = event["event"]
        if kind == "plan":
            self.overall = self.bars.add_task(
                "stages",
                total=event["num_stages"],
                completed=event["num_done"],
                details=f"{event['num_done']}/{event['num_stages']}",
            )
        elif kind == "started":
            self.running[event["stage"]] = self.bars.add_task(
                escape(event["stage"]), total=1.0, details=""
            )
        elif kind == "progress" and event["stage"] in self.running:
            task = self.running[event["stage"]]
            self.bars.update(task, completed=event["done"], details=_details(event))
        elif kind == "finished":
            if event["stage"] in self.running:
                self.bars.remove_task(self.running.pop(event["stage"]))
            if event["state"] != "done":
                self.bars.console.print(_finish_line(event), markup=False)
            elif self.overall is not None:
                self.bars.advance(self.overall)
                task_state = self.bars.tasks[0]
                details = f"{task_state.completed:.0f}/{task_state.total:.0f}"
                self.bars.update(self.overall, details=details)
        elif kind == "stopping":
            self.bars.console.print("stopping: the running stages keep a checkpoint")
        elif kind == "note":
            self.bars.console.print(event["text"], markup=False)


class _Lines:
    """A line when a stage starts and ends, and one every QUIET_SECONDS between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, float] = {}
        self.num_stages = self.num_done = 0

    def show(self, event: Event) -> None:
        """Show an event of the launcher."""
        kind = event["event"]
        if kind == "plan":
            self.num_stages, self.num_done = event["num_stages"], event["num_done"]
            self._print(f"{self.num_done} of {counted(self.num_stages, 'stage')} done already")
        elif kind == "started":
            self.last[event["stage"]] = time.monotonic()
            self._print(f"{event['stage']} started")
        elif kind == "progress":
            now = time.monotonic()
            if now - self.last.get(event["stage"], 0.0) >= QUIET_SECONDS:
                self.last[event["stage"]] = now
                self._print(f"{event['stage']} {event['done']:.0%} {_details(event)}")
        elif kind == "finished":
            self.num_done += event["state"] == "done"
            self._print(f"{_finish_line(event)} ({self.num_done}/{self.num_stages})")
        elif kind == "stopping":
            self._print("stopping: the running stages keep a checkpoint")
        elif kind == "note":
            self._print(event["text"])

    def _print(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self.console.print(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)


def _details(event: Event) -> str:
    parts = []
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("note"):
        parts.append(str(event["note"]))
    return ", ".join(parts)


def _finish_line(event: Event) -> str:
    text = f"{event['stage']} {event['state']}"
    return f"{text}: {event['error']} (see {event['log']})" if event.get("error") else text


def errors() -> Console:
    """The console of standard error."""
    return Console(stderr=True, soft_wrap=True)


def error(text: str) -> None:
    """Print an error in red on standard error."""
    console = errors()
    console.print(text, style="bold red", markup=False, highlight=False)


def tell_older(ledger: Ledger) -> None:
    """Say so on standard error where an earlier version has worked in the store."""
    if (told := older_stages(ledger)) is not None:
        errors().print(told, markup=False, highlight=False)


def print_problems(problems: Sequence[Problem], console: Console) -> None:
    """Each problem as a line of its own, of several levels under what they mean."""
    for level in dict.fromkeys(problem.level for problem in problems):
        console.print(f"{LEVEL_WORDS[level]}:", style="bold", markup=False, highlight=False)
        for problem in problems:
            if problem.level == level:
                console.print(f"  - {problem}", markup=False, highlight=False, soft_wrap=True)


def out() -> Console:
    """The console of standard output."""
    return Console(file=sys.stdout)


def print_results(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The lines of a study with their axes, stable scores (in points) and seconds."""
    axes = [name for name in (rows[0] if rows else {}) if name.startswith("axis.")]
    names = [name.removeprefix("axis.") for name in axes]
    table = Table("line", *names, "vision", "vision, blind", "text", "seconds", "state")
    for row in rows:
        scores = (row[f"stable.{name}"] for name in ("vision", "vision_blind", "text"))
        table.add_row(
            escape(str(row["name"])),
            *("" if row[name] is None else escape(f"{row[name]}") for name in axes),
            *("" if score is None else f"{100 * score:+.1f}" for score in scores),
            "" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            str(row["state"]),
        )
    console.print(table)
    console.print("vision, text: stable scores in points (mean of score minus chance, times 100)")


class PeakMemory:
    """Adds up, over the workers that ran, the most memory a stage of each one took."""

    def __init__(self) -> None:
        self.stages: dict[int, list[str]] = defaultdict(list)

    def note(self, event: Event) -> None:
        """Remember which worker finished which stage."""
        if event["event"] == "finished" and event["state"] == "done":
            self.stages[event["worker"]].append(event["stage"])

    def total_bytes(self, plan: Plan, ledger: Ledger) -> int:
        """The sum over the workers, from the stages' results."""
        stages = {row.stage.name: row.stage for row in plan.rows}
        return sum(
            max(ledger.result(stages[name], StageResult).peak_memory_bytes for name in names)
            for names in self.stages.values()
        )


# What a process ends with that was asked to stop and can be continued (EX_TEMPFAIL).
STOPPED_EXIT_CODE = 75
# What a process ends with that refused to start, as for any error of who uses it.
REFUSED_EXIT_CODE = 2
# Signals that ask for it.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Of many stages that a sentence is about, so many are named.
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


def require_inputs(study: AnyStudy) -> None:
    """Raises ValueError for a study that was planned without its data or checkpoints."""
    if missing := missing_inputs(study):
        can = what_can_run(study)
        raise ValueError(
            f"{study.name} was planned without {', '.join(missing)}; name their folders in the "
            f"recipe's arguments (--set){'' if can is None else f'; {can}'}"
        )


def failed_before(work: Plan, ledger: Ledger) -> dict[str, str]:
    """By stage name, what is said of the stages that failed before and are not tried again."""
    told = {}
    for row in work.rows:
        if row.state == "failed":
            error, name = one_line(ledger.status(row.stage).get("error")), row.stage.name
            told[name] = f"{work.labels[name]} failed before: {error}; to run it again, add --retry"
    return told


def failure(who: str, error: str | None, log: object) -> str:
    """What is said of a stage that failed in this run."""
    return f"{who} failed: {one_line(error)} (see {log}); to run it again, add --retry"


def not_started(waiting: Mapping[str, PlanRow], name: str, labels: Mapping[str, str]) -> str | None:
    """What is said of the waiting stages that need `name`; None if there are none."""
    lost = [labels[other] for other, row in waiting.items() if descends(row, name, waiting)]
    if not lost:
        return None
    count, were = counted(len(lost), "stage"), "was" if len(lost) == 1 else "were"
    return f"{count} behind {labels[name]} {were} not started: {named(lost)}"


def descends(row: PlanRow, ancestor: str, waiting: Mapping[str, PlanRow]) -> bool:
    """Whether a waiting stage needs `ancestor`, itself or through other waiting stages."""
    return any(
        parent.name == ancestor
        or (parent.name in waiting and descends(waiting[parent.name], ancestor, waiting))
        for parent in row.stage.parents
    )


def named(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are; names have commas of their own."""
    more = len(names) - MAX_NAMED
    return "; ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


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

    before = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
