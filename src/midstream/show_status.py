"""What `midstream status` and `midstream logs` print: a table that fits its terminal, and lines."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from midstream.quantities import counted, duration
from midstream.study.label import DIGITS, kind_words, shortened
from midstream.study.overview import STATES, Overview, StageView

# Columns beside stage, state and done, in the order in which a narrow terminal goes without them:
# the width below which each is left out.
_NEEDS = {"since": 124, "where": 100, "tokens/s": 72, "loss": 60, "left": 44}
# A label is cut to no less, so that its handle can be read.
_SHORTEST = DIGITS
_WHERE_LENGTH = 40
# Spaces between two columns.
_GAP = 2
# A running stage that says nothing for so long is said to be silent.
SILENT_SECONDS = 120
_STYLES = {"running": "green", "failed": "bold red", "stopped": "yellow"}


def overview_table(seen: Overview, width: int, height: int | None = None) -> RenderableType:
    """The stages that run, failed or were stopped; the rest counted by kind; the totals.

    With `height` no more lines than that. What is left out is counted.
    """
    shown = [v for s in ("running", "failed", "stopped") for v in seen.stages if v.state == s]
    shown += [view for view in seen.stages if view.state == "new" and view.has_job]
    kinds = _kinds(seen)
    room = len(shown) if height is None else max(height - 12 - kinds.row_count, 1)
    parts: list[RenderableType] = [Text(seen.study, style="bold", overflow="ellipsis")]
    if shown:
        parts.append(_stages(shown[:room], width))
    if len(shown) > room:
        left = _count([view.state for view in shown[room:]])
        parts.append(Text(f"and {left}, for which there is no room here", overflow="fold"))
    parts += [kinds, Text(totals(seen), overflow="fold")]
    return Group(*parts)


def totals(seen: Overview) -> str:
    """How many stages are in which state, and the time that is left, in a line."""
    counts = seen.counts
    to_run = counts["new"] + counts["stopped"] - seen.num_blocked
    text = f"{counts['done']} of {counted(len(seen.stages), 'stage')} done, "
    text += f"{counts['running']} running, {counts['failed']} failed, {to_run} to run"
    if seen.num_blocked:
        text += f", {seen.num_blocked} behind a failed one"
    if seen.seconds_left is not None:
        text += f"; about {duration(seen.seconds_left)} left"
    if seen.num_unestimated:
        ahead = "" if seen.seconds_left is None else " more"
        text += f"; the time of {seen.num_unestimated}{ahead} is not known yet"
    return text


def print_reasons(seen: Overview, folders: dict[str, str], console: Console) -> None:
    """A line for each stage that failed, was stopped or runs: folder, since when, and why."""
    for view in seen.stages:
        if view.state in ("failed", "stopped", "running"):
            text = f": {view.error}" if view.error else ""
            console.print(
                f"{view.label}: {folders[view.name]} is {view.state} since {view.since}{text}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _stages(views: Sequence[StageView], width: int) -> Table:
    columns = [name for name, needed in _NEEDS.items() if width >= needed]
    columns = [name for name in ("loss", "tokens/s", "left", "where", "since") if name in columns]
    rows = [
        (
            view.state,
            "" if view.sign.done is None else f"{view.sign.done:.0%}",
            *(_cell(view, column) for column in columns),
        )
        for view in views
    ]
    heads = ("state", "done", *columns)
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("stage", no_wrap=True, overflow="ellipsis")
    for head in heads:
        left = head in ("state", "where", "since")
        justify: Literal["left", "right"] = "left" if left else "right"
        longest = _WHERE_LENGTH if head == "where" else None
        table.add_column(
            head, justify=justify, no_wrap=True, overflow="ellipsis", max_width=longest
        )
    taken = sum(
        min(max(len(head), *(len(row[k]) for row in rows)), _WHERE_LENGTH) + _GAP
        for k, head in enumerate(heads)
    )
    for view, (state, *cells) in zip(views, rows, strict=True):
        table.add_row(
            Text(shortened(view.label, max(width - taken, _SHORTEST))),
            Text(state, style=_STYLES.get(view.state, "")),
            *(Text(cell) for cell in cells),
        )
    return table


def _cell(view: StageView, column: str) -> str:
    sign = view.sign
    match column:
        case "loss":
            return "" if sign.loss is None else f"{sign.loss:.3f}"
        case "tokens/s":
            return f"{sign.tokens_per_second:,.0f}" if sign.tokens_per_second else ""
        case "left":
            return "" if sign.seconds_left is None else duration(sign.seconds_left)
        case "where":
            silent = _silence(view)
            said = [silent] if silent else [sign.note] if sign.note else []
            return ", ".join([*said, view.where] if view.where else said)
    return "" if view.since is None else _clock(view.since)


def _silence(view: StageView) -> str:
    seen = view.sign.seen
    if view.state != "running" or seen is None:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(seen)).total_seconds()
    return f"silent for {duration(seconds)}" if seconds >= SILENT_SECONDS else ""


def _clock(moment: str) -> str:
    """The time here; with the day where that is not today."""
    local = datetime.fromisoformat(moment).astimezone()
    same = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if same else "%d %b %H:%M")


def _kinds(seen: Overview) -> Table:
    """How many stages of each kind are in which state."""
    states = [state for state in STATES if seen.counts[state]]
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("stages", no_wrap=True, overflow="ellipsis")
    for state in states:
        table.add_column(state, justify="right", no_wrap=True)
    for kind in dict.fromkeys(view.kind for view in seen.stages):
        own = [view.state for view in seen.stages if view.kind == kind]
        table.add_row(kind_words(kind), *(str(own.count(state) or "") for state in states))
    return table


def _count(states: Sequence[str]) -> str:
    parts = [f"{states.count(state)} {state}" for state in STATES if state in states]
    return ", ".join(parts)
