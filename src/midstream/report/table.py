"""From the ledger to one flat row a line, and the lines of one place as a group."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.report.parts import KINDS, Snapshot, parts_of
from midstream.report.spread import Spread
from midstream.storage import write_bytes
from midstream.study.ledger import Ledger
from midstream.study.studies import Study

STABLE = ("stable.vision", "stable.vision_blind", "stable.text")


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


def line_rows(study: Study, ledger: Ledger) -> list[dict[str, Any]]:
    """One flat row a line and a baseline; every row has all columns, None where nothing is known.

    Columns: name, role (line | baseline), state, stage; `axis.<name>`; `stable.vision`,
    `stable.vision_blind`, `stable.text` and `<task>.score`, `.blind`, `.chance`, `.stderr`,
    `.num_examples` (scores from 0 to 1); what else the table shows, `<task>:<metric>` and
    `suite:<name>`; `tokens.<kind>`, `seconds.<kind>` and `seconds`, the sum.
    """
    named = [(line.name, "line", line.axes, line.result) for line in study.lines]
    named += [(name, "baseline", {}, result) for name, result in study.baselines.items()]
    axes = list(dict.fromkeys(axis for line in study.lines for axis in line.axes))
    tasks = [task for task, _ in tasks_of(study)]
    further = [score for score in study.table.scores if ":" in score] if study.table else []
    rows, ledger = [], Snapshot.of(ledger)
    for name, role, at, result in named:
        row: dict[str, Any] = {"name": name, "role": role, "state": ledger.state(result)}
        row |= {"stage": result.name} | {f"axis.{axis}": at.get(axis) for axis in axes}
        found = ledger.results(result) if ledger.is_done(result) else {"stable": {}, "tasks": {}}
        row |= {column: found["stable"].get(column.split(".")[1]) for column in STABLE}
        row |= {score: _further(score, found) for score in further}
        for task in tasks:
            score = found["tasks"].get(task, {})
            for key in ("score", "blind", "chance", "stderr", "num_examples"):
                row[f"{task}.{key}"] = score.get(key)
        uses = {kind: ledger.spent(part) for kind, part in parts_of(result).items()}
        for kind in ("pretrain", "continue", "finetune"):
            row[f"tokens.{kind}"] = uses[kind][0] if kind in uses else None
        for kind in KINDS:
            row[f"seconds.{kind}"] = uses[kind][1] if kind in uses else None
        seconds = [use[1] for use in uses.values()]
        row["seconds"] = None if None in seconds else sum(s for s in seconds if s is not None)
        rows.append(row)
    return rows


def _further(score: str, found: Mapping[str, Any]) -> float | None:
    """A metric of a task, or the stable score of a published set of tasks."""
    name, _, part = score.partition(":")
    if name == "suite":
        value = found.get("suites", {}).get(part, {}).get("score")
    else:
        value = found["tasks"].get(name, {}).get("details", {}).get(part)
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


def stable_of(study: Study) -> tuple[str, ...]:
    """The stable scores that the study can have."""
    kinds = kinds_of(study)
    return tuple(name for name in STABLE if name.split(".")[1].split("_")[0] in kinds)


def summary(study: Study, ledger: Ledger) -> list[Group]:
    """The lines grouped by the figure's x and by, in rising order of x, with every score's spread.

    Baselines are no part of any group.
    """
    return group_rows(study, line_rows(study, ledger))


def group_rows(study: Study, rows: Sequence[dict[str, Any]]) -> list[Group]:
    """As `summary`, from the rows that `line_rows` gave."""
    for line in study.lines:
        for axis in {study.figure.x, study.figure.by or study.figure.x} - line.axes.keys():
            raise ValueError(
                f"the figure of {study.name!r} is drawn over {axis!r}, and line {line.name!r} "
                f"has only {', '.join(line.axes) or 'no axes'}; give the line this axis"
            )
    lines = [row for row in rows if row["role"] == "line"]
    x, by = f"axis.{study.figure.x}", f"axis.{study.figure.by}"
    places = list(dict.fromkeys((row[x], row.get(by)) for row in lines))
    if all(isinstance(place[0], int | float) for place in places):
        places.sort(key=lambda place: place[0])
    columns = [
        *STABLE,
        *(f"{task}.{key}" for task, _ in tasks_of(study) for key in ("score", "blind")),
    ]
    groups = []
    for place in places:
        members = [row for row in lines if (row[x], row.get(by)) == place]
        rest = [key for key in members[0] if key.startswith("axis.") and key not in (x, by)]
        differing = [key for key in rest if len({row[key] for row in members}) > 1]
        spreads = {}
        for column in columns:
            named = [(_repetition(row, rest), row[column]) for row in members]
            spreads[column] = Spread(tuple(pair for pair in named if pair[1] is not None))
        mixed = tuple(key[5:] for key in differing if key != "axis.seed")
        groups.append(Group(place[0], place[1], len(members), spreads, mixed))
    return groups


def _repetition(row: dict[str, Any], axes: Sequence[str]) -> str:
    return ", ".join(f"{axis[5:]}={row[axis]}" for axis in axes) or str(row["name"])


def best_group(groups: Sequence[Group], column: str) -> Group | None:
    """The group with the highest mean of `column`; None where none has a value."""
    means = [(group.spreads[column].mean, group) for group in groups]
    known = [(mean, group) for mean, group in means if mean is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write flat rows as CSV with a header; None becomes an empty field."""
    if not rows:
        raise ValueError(f"no rows for {path}: the study has no lines and no baselines")
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, stream.getvalue().encode())
