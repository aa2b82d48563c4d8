"""What the commands print: progress while a study runs, tables of states and results."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from midstream.core.tokens import counted
from midstream.cost.graph import older_stages
from midstream.launch.check_data import Level, Problem
from midstream.launch.workers import Event
from midstream.study.store import Ledger, State

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

    `labels` says what stages are called, by the names that the events have. A terminal that is
    gone, and a pipe that nobody reads, end the showing and not the run.
    """

    def named(show: Callable[[Event], None]) -> Callable[[Event], None]:
        def show_named(event: Event) -> None:
            stage = event.get("stage")
            with _unseen(console):
                show(event if stage is None else {**event, "stage": labels.get(stage, stage)})

        return show_named

    if not console.is_terminal:
        yield named(_Lines(console).show)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[details]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield named(_Bars(bars).show)


@contextmanager
def _unseen(console: Console) -> Iterator[None]:
    """Go on where nothing can be written, without a further word where nobody reads any more."""
    try:
        yield
    except (OSError, SystemExit) as error:  # rich ends the process where a pipe is broken
        if isinstance(error, SystemExit) or error.errno in (errno.EIO, errno.EPIPE):
            console.quiet = True
            # What is still to be flushed must not fail at the end of the process.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


@contextmanager
def reporting(console: Console, what: str) -> Iterator[Callable[[float, str], None]]:
    """Yield what shows how far one piece of work is (a fraction and a text): a line that changes in
    a terminal, else a line of its own at the start, every QUIET_SECONDS and at the end."""

    def share(fraction: float, text: str) -> str:
        # Not rounded up: 100 % is said when all is done.
        return f"{what}: {text}, {int(100 * fraction)} % of all"

    if console.is_terminal:
        with console.status(what) as line:
            yield lambda fraction, text: line.update(share(fraction, text))
        return
    last = -QUIET_SECONDS

    def show(fraction: float, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if fraction >= 1.0 or now - last >= QUIET_SECONDS:
            last = now
            _print(console, share(fraction, text))

    yield show


def _print(console: Console, text: str) -> None:
    stamp = time.strftime("%H:%M:%S")
    console.print(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)


class _Display:
    """What a run's events look like; it counts the stages that are done."""

    num_stages = num_done = 0

    def show(self, event: Event) -> None:
        """Show an event of the launcher."""
        if event["event"] == "plan":
            self.num_stages, self.num_done = event["num_stages"], event["num_done"]
        elif event["event"] == "finished":
            self.num_done += event["state"] == "done"
        self.draw(event, event.get("stage", ""))

    def draw(self, event: Event, stage: str) -> None:
        """Show an event that has been counted."""
        raise NotImplementedError


class _Bars(_Display):
    """One bar for the stages and one for each that runs."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.running: dict[str, TaskID] = {}

    def draw(self, event: Event, stage: str) -> None:
        """A bar for each stage that runs, and one for all."""
        match event["event"]:
            case "plan":
                self.overall = self.bars.add_task("stages", total=self.num_stages, details="")
            case "started":
                self.running[stage] = self.bars.add_task(escape(stage), total=1.0, details="")
            case "progress" if stage in self.running:
                task, details = self.running[stage], _details(event)
                self.bars.update(task, completed=event["done"], details=details)
            case "finished" if stage in self.running:
                self.bars.remove_task(self.running.pop(stage))
        if event["event"] in ("stopping", "note") or event.get("state", "done") != "done":
            self.bars.console.print(_told(event), markup=False)
        if event["event"] in ("plan", "finished"):
            details = f"{self.num_done}/{self.num_stages}"
            self.bars.update(self.overall, completed=self.num_done, details=details)


class _Lines(_Display):
    """A line when a stage starts and ends, and one every QUIET_SECONDS between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, float] = {}

    def draw(self, event: Event, stage: str) -> None:
        """A line with its time, of each stage one every so often."""
        kind, text, now = event["event"], _told(event), time.monotonic()
        if kind == "finished":
            text += f" ({self.num_done}/{self.num_stages})"
        elif kind == "progress" and now - self.last.get(stage, 0.0) < QUIET_SECONDS:
            return
        if kind in ("started", "progress"):
            self.last[stage] = now
        if text:
            _print(self.console, text)


def _told(event: Event) -> str:
    """A launcher's event in words; empty for one that is not told."""
    stage = event.get("stage", "")
    match event["event"]:
        case "plan":
            return f"{event['num_done']} of {counted(event['num_stages'], 'stage')} done already"
        case "started":
            return f"{stage} started"
        case "progress":
            return f"{stage} {event['done']:.0%} {_details(event)}"
        case "finished":
            error = f": {event['error']} (see {event['log']})" if event.get("error") else ""
            return f"{stage} {event['state']}{error}"
        case "stopping":
            return "stopping: the running stages keep a checkpoint"
        case "note":
            return str(event["text"])
    return ""


def _details(event: Event) -> str:
    parts = []
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("note"):
        parts.append(str(event["note"]))
    return ", ".join(parts)


def errors() -> Console:
    """The console of standard error."""
    return Console(stderr=True, soft_wrap=True)


def error(text: str) -> None:
    """Print an error in red on standard error, if there still is one."""
    with _unseen(console := errors()):
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
    names = [escape(name.removeprefix("axis.")) for name in axes]
    table = Table("line", *names, "vision", "vision, blind", "text", "seconds", "state")
    for row in rows:
        scores = (row[f"stable.{name}"] for name in ("vision", "vision_blind", "text"))
        table.add_row(
            escape(str(row["name"])),
            *("" if row[name] is None else escape(f"{row[name]}") for name in axes),
            *("" if score is None else f"{100 * score:+z.1f}" for score in scores),
            "" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            str(row["state"]),
        )
    console.print(table)
    console.print("vision, text: stable scores in points (mean of score minus chance, times 100)")
