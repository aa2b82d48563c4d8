"""The results of a store: what they rest on, one row a line, and their spread."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from midstream.config import StageKind
from midstream.core.storage import write_bytes
from midstream.study.results import EvaluationResult, StableScores, StageResult, TrainingResult
from midstream.study.stages import DataStage, Evaluate, Stage, Trained, encoders_of, lineage
from midstream.study.store import Ledger, State
from midstream.study.studies import Study

KINDS: tuple[StageKind, ...] = get_args(StageKind)
Role = Literal["line", "baseline"]


@dataclass(frozen=True)
class Part:
    """A stage that a result rests on, and the share of its tokens that the result uses.

    `before` are others of its kind, the nearest first: image-text stages that it starts from,
    towers beside it.
    """

    stage: Stage
    share: float = 1.0
    before: tuple[Stage, ...] = ()


def parts_of(result: Evaluate) -> dict[str, Part]:
    """The stages that one result rests on, by kind, in the order in which they run."""
    parts: dict[str, Part] = {}

    def add(stage: Stage, share: float = 1.0) -> None:
        last = parts.setdefault(stage.kind, Part(stage, share))
        if stage.identity not in {one.identity for one in (last.stage, *last.before)}:
            parts[stage.kind] = replace(last, before=(*last.before, stage))

    for stage, share in lineage(result):
        add(stage, share)
        for parent in stage.parents:
            if isinstance(parent, DataStage):
                add(parent)
        for one in encoders_of(stage):
            add(one)
    return {kind: parts[kind] for kind in KINDS if kind in parts}


def spent(part: Part, ledger: Ledger) -> tuple[int | None, float | None]:
    """Tokens seen and seconds of the used share of a stage; None where it is not done or has none.

    A share of a text run ends with the first step that reaches it, as its milestones do. Others of
    its kind are added.
    """
    if part.before:
        each = [spent(Part(stage), ledger) for stage in part.before]
        each.append(spent(replace(part, before=()), ledger))
        tokens, seconds = (
            None if None in numbers else sum(numbers) for numbers in zip(*each, strict=True)
        )
        return tokens, seconds
    if not ledger.is_done(part.stage):
        return None, None
    if not isinstance(part.stage, Trained):
        return None, ledger.result(part.stage, StageResult).seconds
    results = ledger.result(part.stage, TrainingResult)
    if part.share == 1.0:
        return results.tokens_seen, results.seconds
    tokens, seconds = 0, 0.0
    for line in ledger.metrics(part.stage):
        if tokens >= part.share * results.tokens_seen:
            break
        tokens, seconds = line["tokens_seen"], seconds + line["seconds"]
    return tokens, seconds


class Snapshot(Ledger):
    """A ledger as it stands when each stage is first asked for; a stage is read once.

    A report asks for the same stage by every line that uses it, and while a study runs its numbers
    must not change half-way down the page.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger.store)
        self._ledger = ledger
        self._read: dict[tuple[str, ...], Any] = {}

    @classmethod
    def of(cls, ledger: Ledger) -> "Snapshot":
        """The ledger itself where it is a snapshot already."""
        return ledger if isinstance(ledger, Snapshot) else cls(ledger)

    def is_done(self, stage: Stage) -> bool:
        """As of the first look."""
        return self.state(stage) == "done"

    def state(self, stage: Stage) -> State:
        """As of the first look."""
        state: State = self._once(lambda: self._ledger.state(stage), "state", stage.identity)
        return state

    def results(self, stage: Stage) -> dict[str, Any]:
        """As of the first look."""
        found: dict[str, Any]
        found = self._once(lambda: self._ledger.results(stage), "results", stage.identity)
        return found

    def spent(self, part: Part) -> tuple[int | None, float | None]:
        """As the function `spent`."""
        stages = (one.identity for one in (part.stage, *part.before))
        found: tuple[int | None, float | None]
        found = self._once(lambda: spent(part, self), str(part.share), *stages)
        return found

    def _once(self, read: Callable[[], Any], *of: str) -> Any:
        if of not in self._read:
            self._read[of] = read()
        return self._read[of]


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, each under the name of its repetition (such as "seed=0")."""

    values: tuple[tuple[str, float | int], ...]

    @property
    def n(self) -> int:
        """How many repetitions have the value."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """The mean; None without a value."""
        return fmean(value for _, value in self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None below two values, where no spread is known."""
        return stdev(value for _, value in self.values) if self.n > 1 else None


# Shares of right answers above chance, and beside them the probabilities of right answers.
PROBABILITY = ("stable.vision_prob", "stable.text_prob")
STABLE = ("stable.vision", "stable.vision_blind", "stable.text", *PROBABILITY)
NOTHING = EvaluationResult(seconds=0.0, tasks={}, stable=StableScores())


@dataclass(frozen=True)
class Group:
    """The lines at one value of the figure's `x` (and `by`).

    `planned` counts the study's lines there, `spreads` holds each score of those that have one.
    `mixed` names axes besides x, by and seed that also differ among them.
    """

    x: float | int | str
    by: float | int | str | None
    planned: int
    spreads: dict[str, Spread]
    mixed: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """The lines here that have a score."""
        return max((spread.n for spread in self.spreads.values()), default=0)


@dataclass(frozen=True)
class LineRow:
    """A line or baseline; `stage` names its evaluation, `values` are its numbers by column."""

    name: str
    role: Role
    state: State
    stage: str
    axes: Mapping[str, float | int | str | None]
    values: Mapping[str, float | int | None]

    def at(self, axis: str | None) -> float | int | str | None:
        """Its place on an axis; None where it has none."""
        return None if axis is None else self.axes.get(axis)

    def flat(self) -> dict[str, Any]:
        """The row of results.csv."""
        about = {"name": self.name, "role": self.role, "state": self.state, "stage": self.stage}
        return about | {f"axis.{axis}": at for axis, at in self.axes.items()} | {**self.values}


def line_rows(study: Study, ledger: Ledger) -> list[LineRow]:
    """One row a line and a baseline; all have the same columns, None where nothing is known.

    Columns: `stable.vision`, `stable.vision_blind`, `stable.text` and `<task>.score`, `.blind`,
    `.chance`, `.stderr`, `.num_examples` (scores from 0 to 1); what else the table shows,
    `<task>:<metric>` and `suite:<name>`; `tokens.<kind>`, `seconds.<kind>` and `seconds`, the sum.
    """
    named: list[tuple[str, Role, Mapping[str, Any], Evaluate]]
    named = [(line.name, "line", line.axes, line.result) for line in study.lines]
    named += [(name, "baseline", {}, result) for name, result in study.baselines.items()]
    axes = list(dict.fromkeys(axis for line in study.lines for axis in line.axes))
    tasks = [task for task, _ in tasks_of(study)]
    further = [score for score in study.table.scores if ":" in score] if study.table else []
    rows, ledger = [], Snapshot.of(ledger)
    for name, role, at, result in named:
        found = ledger.result(result, EvaluationResult) if ledger.is_done(result) else NOTHING
        row = {column: getattr(found.stable, column.split(".")[1]) for column in STABLE}
        row |= {score: _further(score, found) for score in further}
        for task in tasks:
            for key in ("score", "blind", "chance", "stderr", "num_examples"):
                row[f"{task}.{key}"] = getattr(found.tasks.get(task), key, None)
        uses = {kind: ledger.spent(part) for kind, part in parts_of(result).items()}
        for kind in ("pretrain", "continue", "finetune"):
            row[f"tokens.{kind}"] = uses[kind][0] if kind in uses else None
        for kind in KINDS:
            row[f"seconds.{kind}"] = uses[kind][1] if kind in uses else None
        seconds = [use[1] for use in uses.values()]
        row["seconds"] = None if None in seconds else sum(s for s in seconds if s is not None)
        places = {axis: at.get(axis) for axis in axes}
        rows.append(LineRow(name, role, ledger.state(result), result.name, places, row))
    return rows


def _further(score: str, found: EvaluationResult) -> float | None:
    """A metric of a task, or the stable score of a published set of tasks."""
    name, _, part = score.partition(":")
    if name == "suite":
        return found.suites[part].score if part in found.suites else None
    value = found.tasks[name].details.get(part) if name in found.tasks else None
    return None if value is None else float(value)


def tasks_of(study: Study) -> list[tuple[str, str]]:
    """Each task that the study evaluates, with its kind (vision | text), in the study's order."""
    found: dict[str, str] = {}
    for result in study.results:
        found |= dict.fromkeys(result.evaluation.visual_tasks, "vision")
    for result in study.results:
        found |= dict.fromkeys(result.evaluation.text_tasks, "text")
    return list(found.items())


def kinds_of(study: Study) -> tuple[str, ...]:
    """The kinds of task that the study asks: vision, text, or both."""
    asked = {kind for _, kind in tasks_of(study)}
    return tuple(kind for kind in ("vision", "text") if kind in asked)


def stable_of(study: Study, rows: Sequence[LineRow] | None = None) -> tuple[str, ...]:
    """The stable scores that the study can have; with `rows` those by probability only where a line
    has one: evaluations of earlier versions have none."""
    kinds = kinds_of(study)
    left_out = [
        name
        for name in PROBABILITY
        if rows is not None and all(row.values[name] is None for row in rows)
    ]
    return tuple(n for n in STABLE if kind_of(n) in kinds and n not in left_out)


def kind_of(stable: str) -> str:
    """The kind of task that a stable score is of."""
    return stable.split(".")[1].split("_")[0]


def group_rows(study: Study, rows: Sequence[LineRow]) -> list[Group]:
    """The lines that `line_rows` gave, grouped by the figure's x and by, in rising order of x.

    Baselines are no part of any group.
    """
    for line in study.lines:
        for axis in {study.figure.x, study.figure.by or study.figure.x} - line.axes.keys():
            raise ValueError(
                f"the figure of {study.name!r} is drawn over {axis!r}, and line {line.name!r} "
                f"has only {', '.join(line.axes) or 'no axes'}; give the line this axis"
            )
    lines = [row for row in rows if row.role == "line"]
    x, by = study.figure.x, study.figure.by
    places: list[Any] = list(dict.fromkeys((row.at(x), row.at(by)) for row in lines))
    if all(isinstance(place[0], int | float) for place in places):
        places.sort(key=lambda place: place[0])
    tasks = [f"{task}.{key}" for task, _ in tasks_of(study) for key in ("score", "blind")]
    groups = []
    for place in places:
        members = [row for row in lines if (row.at(x), row.at(by)) == place]
        rest = [axis for axis in members[0].axes if axis not in (x, by)]
        named = [
            (", ".join(f"{axis}={row.at(axis)}" for axis in rest) or row.name, row.values)
            for row in members
        ]
        spreads = {
            column: Spread(tuple((n, v) for n, row in named if (v := row[column]) is not None))
            for column in (*STABLE, *tasks)
        }
        mixed = (a for a in rest if a != "seed" and len({row.at(a) for row in members}) > 1)
        groups.append(Group(place[0], place[1], len(members), spreads, tuple(mixed)))
    return groups


def curves_of(groups: Sequence[Group]) -> dict[Any, list[Group]]:
    """The groups of each curve, by its value of the figure's `by`."""
    found: dict[Any, list[Group]] = {}
    for group in groups:
        found.setdefault(group.by, []).append(group)
    return found


def ranked(groups: Sequence[Group], column: str) -> list[Group]:
    """The groups that have a value of `column`, the highest mean first: over the repetitions that
    all of them have, else over each one's own."""
    known = [group for group in groups if group.spreads[column].n]
    values = {id(group): dict(group.spreads[column].values) for group in known}
    shared = set.intersection(*(set(own) for own in values.values())) if known else set()

    def mean(group: Group) -> float:
        own = values[id(group)]
        return fmean(value for name, value in own.items() if name in shared or not shared)

    return sorted(known, key=mean, reverse=True)


def best_group(groups: Sequence[Group], column: str) -> Group | None:
    """The first of `ranked`; None where none has a value."""
    return next(iter(ranked(groups, column)), None)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write flat rows as CSV with a header; None becomes an empty field."""
    if not rows:
        raise ValueError(f"no rows for {path}: the study has no lines and no baselines")
    stream = io.StringIO(newline="")
    names = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, stream.getvalue().encode())
