"""The comparisons that a study's findings are made of, and how many repetitions would decide them.

A place is the values of all axes but the repetition's. One model is fitted to all cells of a score
(`core/decide.py`); claims, the best place and trends are contrasts of it. In a study that was run
to decide (`Study.pilot`), the first repetitions alone estimate the spread, whatever came later.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from midstream.core.decide import Contrast, Fit, after_more, detectable, fit
from midstream.report.results import STABLE, LineRow, tasks_of
from midstream.study.studies import Study

SEED = "seed"
Place = tuple[tuple[str, Any], ...]
Cells = dict[Place, dict[str, float]]
# What is compared: weights of places' means, each given by the axes that it fixes.
Sides = Sequence[tuple[float, Mapping[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """A contrast of places, and what it rests on.

    `places` are those that have a weight. `learnt` is the same without the models that did not learn one of its tasks, and `num_failed`
    counts those among its own; None where all learnt. `lines` are the rows of each side, in the
    same order on all; `others` the axes that it is a mean over, at `num_places` places.
    """

    contrast: Contrast
    fit: Fit
    places: tuple[Place, ...]
    lines: tuple[tuple[LineRow, ...], ...]
    others: tuple[str, ...] = ()
    num_places: int = 1
    num_left_out: int = 0
    learnt: Contrast | None = None
    num_failed: int = 0

    def repetitions_for(self, half_width: float) -> int | None:
        """So many make the interval reach `half_width` at the most (Stein); None where the spread
        is unknown."""
        one = self.contrast
        if one.sd is None:
            return None
        return max(one.n, math.ceil((one.reach * one.sd / half_width) ** 2))

    def detectable(self, repetitions: int) -> float | None:
        """The true difference that so many find in eight of ten studies; None where the spread is
        unknown or there are fewer than two."""
        one = self.contrast
        if one.sd is None or repetitions < 2:
            return None
        freedom = repetitions - 1
        if one.pooled:  # all places repeated so often
            freedom *= max(1, len(self.fit.scores) - 1)
        return detectable(one.sd, repetitions, freedom)


def compare(
    study: Study, rows: Sequence[LineRow], column: str, sides: Sides, places: int = 2
) -> Comparison | None:
    """The sum of the sides' means by their weights, matched by all axes that they leave free.

    `places`: of so many the best was picked, and the interval is simultaneous for all pairs. None
    where no repetition has a counterpart on every side.
    """
    lines = [row for row in rows if row.role == "line"]
    fixed = {axis for _, at in sides for axis in at}
    free = [axis for axis in lines[0].axes if axis not in fixed]
    # A comparison of the seeds themselves is repeated by everything else.
    repeats = [SEED] if SEED in free else free if SEED in fixed else []
    others = [axis for axis in free if axis not in repeats]
    held = _by_cell(lines, column, repeats)
    cells = _cells(held, column)
    by_side = [
        {
            tuple(value for axis, value in place if axis in others): place
            for place in cells
            if all(dict(place).get(axis) == value for axis, value in at.items())
        }
        for _, at in sides
    ]
    names, matched = _matched(cells, by_side)
    if not names:
        return None
    weights: dict[Place, float] = {}
    for (weight, _), each in zip(sides, by_side, strict=True):
        weights |= {each[at]: weight / len(matched) for at in matched}
    every = sum(len(cells[place]) for each in by_side for place in each.values())
    failed = failures(study, lines, column)
    own = {row.name for place in weights for name in names for row in held[place][name]} & failed
    without = _cells(_by_cell([r for r in lines if r.name not in failed], column, repeats), column)
    return Comparison(
        contrast=_judged(study, cells, weights, places),
        fit=fit(cells),
        places=tuple(weights),
        lines=tuple(
            tuple(row for name in names for at in matched for row in held[each[at]][name])
            for each in by_side
        ),
        others=tuple(axis for axis in others if len({row.at(axis) for row in lines}) > 1),
        num_places=len(matched),
        num_left_out=every - len(names) * len(matched) * len(by_side),
        learnt=_judged(study, without, weights, places) if own else None,
        num_failed=len(own),
    )


def repetitions_needed(
    comparisons: Sequence[Comparison], half_width: float
) -> dict[Place, int]:
    """By place, the repetitions with which every comparison that has it is that narrow.

    Raises ValueError where a spread is unknown: fewer than two repetitions, or none that differ.
    """
    needed: dict[Place, int] = {}
    for one in comparisons:
        number = one.repetitions_for(half_width)
        if number is None:
            at = "; ".join(
                ", ".join(f"{axis} {value}" for axis, value in place) for place in one.places
            )
            raise ValueError(
                f"the first repetitions of {at} say nothing about the spread ({one.contrast.why}); "
                "run two or more, with seeds of their own"
            )
        for place in one.places:
            needed[place] = max(needed.get(place, 0), number)
    return needed


def failures(study: Study, rows: Sequence[LineRow], column: str) -> set[str]:
    """The lines that did not learn a task of `column`, by the study's rule (`Study.failure`)."""
    kinds = dict(tasks_of(study))
    tasks = [column.partition(".")[0].partition(":")[0]]
    if column in STABLE:
        kind = column.split(".")[1].split("_")[0]
        tasks = [task for task, its_kind in kinds.items() if its_kind == kind]
    found: set[str] = set()
    for task in tasks:
        by_place: dict[Place, list[tuple[str, float]]] = {}
        for row in rows:
            learnt = _learnt(row, task)
            if learnt is not None:
                by_place.setdefault(_place(row, [SEED]), []).append((row.name, learnt))
        for members in by_place.values():
            for name, learnt in members:
                siblings = [other for who, other in members if who != name]
                if siblings and study.failure.is_one(learnt, median(siblings)):
                    found.add(name)
    return found


def _learnt(row: LineRow, task: str) -> float | None:
    """A task's score as a share of the way from chance to all right."""
    score, chance = row.values.get(f"{task}.score"), row.values.get(f"{task}.chance")
    return None if score is None or chance is None else (score - chance) / (1 - chance)


def _judged(study: Study, cells: Cells, weights: Mapping[Place, float], places: int) -> Contrast:
    every = fit(cells).contrast(weights, places)
    if not study.pilot:
        return every
    names = {f"{SEED}={seed}" for seed in study.pilot}
    pilot = {p: {n: value for n, value in own.items() if n in names} for p, own in cells.items()}
    first = fit(pilot).contrast(weights, places)
    return first if first.sd is None else after_more(first, every)


def _place(row: LineRow, repeats: Sequence[str]) -> Place:
    return tuple((axis, value) for axis, value in row.axes.items() if axis not in repeats)


def _by_cell(
    rows: Sequence[LineRow], column: str, repeats: Sequence[str]
) -> dict[Place, dict[str, list[LineRow]]]:
    """The lines that have a score, by place and then by repetition ("seed=7")."""
    found: dict[Place, dict[str, list[LineRow]]] = {}
    for row in rows:
        if row.values.get(column) is not None:
            name = ", ".join(f"{axis}={row.at(axis)}" for axis in repeats)
            found.setdefault(_place(row, repeats), {}).setdefault(name, []).append(row)
    return found


def _cells(held: Mapping[Place, Mapping[str, Sequence[LineRow]]], column: str) -> Cells:
    return {
        place: {
            name: fmean(value for row in rows if (value := row.values[column]) is not None)
            for name, rows in own.items()
        }
        for place, own in held.items()
    }


def _matched(
    cells: Cells, sides: Sequence[Mapping[tuple[Any, ...], Place]]
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Repetitions, and places of the free axes, that all of them have on every side.

    The same places for every repetition: else a difference between places passes for one between
    seeds. Repetitions with most of them are taken first.
    """
    common = [at for at in sides[0] if all(at in side for side in sides)]
    names = dict.fromkeys(name for at in common for name in cells[sides[0][at]])
    has = {
        name: [at for at in common if all(name in cells[side[at]] for side in sides)]
        for name in names
    }
    kept: list[str] = []
    places: list[tuple[Any, ...]] = []
    for name in sorted(has, key=lambda name: -len(has[name])):
        left = [at for at in (places if kept else has[name]) if at in has[name]]
        if left:
            kept, places = [*kept, name], left
    return [name for name in names if name in kept], places
