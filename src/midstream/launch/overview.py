"""Where a study stands, from its store alone, and how `midstream status` prints it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from midstream.core.tokens import counted, duration
from midstream.cost.cost import StageCost, cost
from midstream.cost.graph import order
from midstream.cost.taken import seconds_of
from midstream.launch.slurm_job import JobBook
from midstream.study.label import DIGITS, kind_words, labels, shortened
from midstream.study.lease import Sign, is_held, read_sign
from midstream.study.results import StageResult
from midstream.study.stages import PrepareSource, Stage, TrainEncoder
from midstream.study.store import Ledger, State
from midstream.study.studies import AnyStudy

# How the stages are listed: what moves or needs help first.
STATES: tuple[State, ...] = ("running", "failed", "stopped", "new", "done")


@dataclass(frozen=True)
class StageView:
    """One stage: how it stands, how far it is (`sign`), and where it runs or ran.

    `name` is its folder's, `label` what it is called.
    """

    name: str
    label: str
    kind: str
    state: State
    sign: Sign = field(default_factory=Sign)
    flops: float | None = None
    host: str | None = None
    pid: int | None = None
    ranks: int = 1
    job: str | None = None
    since: str | None = None
    error: str | None = None

    @property
    def has_job(self) -> bool:
        """Whether Slurm still has something to do for it: a job that has ended is not kept."""
        return self.state != "done" and self.job is not None

    @property
    def where(self) -> str:
        """Host, process, ranks and job, as far as they are known."""
        parts = [] if self.host is None else [f"{self.host}:{self.pid}"]
        parts += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        return ", ".join(parts + ([] if self.job is None else [f"job {self.job}"]))


@dataclass(frozen=True)
class Overview:
    """A study at one moment.

    `seconds_left` is an estimate, None where nothing is left or nothing is known; it leaves out
    `num_unestimated` stages. `blocked` counts the new stages that wait for a failed one. `active`:
    a stage or a launcher runs, or Slurm holds a job.
    """

    study: str
    stages: tuple[StageView, ...]
    seconds_left: float | None
    num_unestimated: int
    num_blocked: int
    active: bool

    @property
    def counts(self) -> dict[State, int]:
        """Stages by state."""
        found = Counter(view.state for view in self.stages)
        return {state: found[state] for state in STATES}

    @property
    def settled(self) -> bool:
        """Whether nothing is left that could still be started: all are done, failed or blocked."""
        counts = self.counts
        return counts["new"] == self.num_blocked and not counts["running"] + counts["stopped"]


class Board:
    """Looks at a study again and again; what cannot change is read once."""

    def __init__(self, study: AnyStudy, ledger: Ledger) -> None:
        self.study, self.ledger = study, ledger
        self.stages = {stage.name: stage for stage in order(study)}
        self.labels = labels(list(self.stages.values()))
        self.parents = {name: stage.parents for name, stage in self.stages.items()}
        self._costs: dict[str, StageCost] = {}
        self._seconds: dict[str, float] = {}
        self._prepared: frozenset[str] = frozenset()

    def look(self) -> Overview:
        """The study as it stands; changes nothing."""
        jobs = JobBook.of(self.ledger.store).entries
        states = {name: self.ledger.state(stage) for name, stage in self.stages.items()}
        self._read_costs(states)
        views = [
            self._view(stage, states[name], jobs[name].job if name in jobs else None)
            for name, stage in self.stages.items()
        ]
        blocked = self._blocked(states)
        seconds = self._estimate([view for view in views if view.name not in blocked])
        open_ones = [v.name for v in views if v.state != "done" and v.name not in blocked]
        known = {n: left for n in open_ones if (left := seconds[n]) is not None}
        running = sum(view.state == "running" for view in views)
        launcher = is_held(self.ledger.store / "launch.lock")
        return Overview(
            study=self.study.name,
            stages=tuple(views),
            seconds_left=self._left(known, max(running, 1)) if known else None,
            num_unestimated=len(open_ones) - len(known),
            num_blocked=sum(states[name] == "new" for name in blocked),
            active=running > 0 or launcher or any(view.has_job for view in views),
        )

    def _read_costs(self, states: Mapping[str, State]) -> None:
        """What a stage costs is known better once its data is prepared."""
        prepared = frozenset(
            name
            for name, stage in self.stages.items()
            if isinstance(stage, PrepareSource) and states[name] == "done"
        )
        if prepared != self._prepared or not self._costs:
            self._prepared = prepared
            self._costs = {name: cost(stage, self.ledger) for name, stage in self.stages.items()}
        for name, stage in self.stages.items():
            if states[name] == "done" and name not in self._seconds:
                self._seconds[name] = self.ledger.result(stage, StageResult).seconds

    def _view(self, stage: Stage, state: State, job: str | None) -> StageView:
        costs = self._costs[stage.name]
        view = StageView(
            stage.name, self.labels[stage.name], stage.kind, state, flops=costs.flops, job=job
        )
        if state in ("new", "done"):
            return view
        status = self.ledger.status(stage)
        # An encoder's steps count patches, its cost captions too: only its own notes know.
        total = None if isinstance(stage, TrainEncoder) else costs.tokens
        sign = read_sign(self.ledger.folder(stage), total)
        if state != "running":
            sign = replace(sign, tokens_per_second=0.0, seconds_left=None)
        return replace(
            view,
            sign=sign,
            host=status.get("host"),
            pid=status.get("pid"),
            ranks=int(status.get("ranks") or 1),
            since=status.get("ended") or status.get("started"),
            error=status.get("error"),
        )

    def _blocked(self, states: Mapping[str, State]) -> set[str]:
        """Those that are not done and stand behind a failed one."""
        found: set[str] = set()
        for name, parents in self.parents.items():  # parents stand before their children
            lost = any(states[p.name] == "failed" or p.name in found for p in parents)
            if lost and states[name] != "done":
                found.add(name)
        return found

    def _estimate(self, views: Sequence[StageView]) -> dict[str, float | None]:
        """Seconds that are left of each stage: its own word, else as `cost/taken.py` has it."""
        timed: dict[str, list[tuple[float, float]]] = {}
        for view in views:
            seconds = self._seconds.get(view.name)
            left, done = view.sign.seconds_left, view.sign.done
            if seconds is None and left is not None and done is not None and done < 1:
                seconds = left / (1 - done)
            if seconds is not None:
                timed.setdefault(view.kind, []).append((view.flops or 0.0, seconds))
        found: dict[str, float | None] = {}
        for view in views:
            if view.state == "done" or view.sign.seconds_left is not None:
                found[view.name] = 0.0 if view.state == "done" else view.sign.seconds_left
                continue
            whole = seconds_of(view.kind, view.flops, timed)
            found[view.name] = None if whole is None else whole * (1 - (view.sign.done or 0.0))
        return found

    def _left(self, seconds: Mapping[str, float], side_by_side: int) -> float:
        """The longest chain, or all of it over as many stages as run now, whichever is more."""
        chains: dict[str, float] = {}
        for name, parents in self.parents.items():
            before = max((chains.get(parent.name, 0.0) for parent in parents), default=0.0)
            chains[name] = before + seconds.get(name, 0.0)
        return max(max(chains.values()), sum(seconds.values()) / side_by_side)


def overview_json(seen: Overview) -> dict[str, Any]:
    """An overview as plain values."""
    values = asdict(seen)
    stages = [stage.pop("sign") | stage for stage in values.pop("stages")]
    return values | {"counts": seen.counts, "stages": stages}


# Columns beside stage, state and done, and the width of a terminal below which each is left out.
_NEEDS = {"loss": 60, "tokens/s": 72, "left": 44, "where": 100, "since": 124}
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
        states = Counter(view.state for view in shown[room:])
        left = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
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


def _stages(views: Sequence[StageView], width: int) -> Table:
    columns = [name for name in _NEEDS if width >= _NEEDS[name]]
    heads = ("state", "done", *columns)
    rows = [[_cell(view, column) for column in heads] for view in views]
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("stage", no_wrap=True, overflow="ellipsis")
    taken = 0
    for k, head in enumerate(heads):
        words = head in ("state", "where", "since")
        longest = _WHERE_LENGTH if head == "where" else None
        table.add_column(
            head,
            justify="left" if words else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=longest,
        )
        taken += min(max(len(head), *(len(row[k]) for row in rows)), _WHERE_LENGTH) + _GAP
    for view, cells in zip(views, rows, strict=True):
        state = Text(view.state, style=_STYLES.get(view.state, ""))
        label = Text(shortened(view.label, max(width - taken, _SHORTEST)))
        table.add_row(label, state, *(Text(cell) for cell in cells[1:]))
    return table


def _cell(view: StageView, column: str) -> str:
    sign = view.sign
    match column:
        case "state":
            return view.state
        case "done":
            return "" if sign.done is None else f"{sign.done:.0%}"
        case "loss":
            return "" if sign.loss is None else f"{sign.loss:.3f}"
        case "tokens/s":
            return f"{sign.tokens_per_second:,.0f}" if sign.tokens_per_second else ""
        case "left":
            return "" if sign.seconds_left is None else duration(sign.seconds_left)
        case "where":
            note = sign.note
            if view.state == "running" and sign.seen is not None:
                silent = (datetime.now(UTC) - datetime.fromisoformat(sign.seen)).total_seconds()
                note = f"silent for {duration(silent)}" if silent >= SILENT_SECONDS else note
            return ", ".join(part for part in (note, view.where) if part)
    if view.since is None:
        return ""
    # The time here; with the day where that is not today.
    local = datetime.fromisoformat(view.since).astimezone()
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
