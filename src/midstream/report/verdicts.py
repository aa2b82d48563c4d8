"""The comparisons that a study's findings are made of, and how many repetitions would decide them.

A place is the values of all axes but the repetition's. One model is fitted to all cells of a score
(`core/stats.py`); claims, the best place and trends are contrasts of it. In a study that was run
to decide (`Study.pilot`), the first repetitions alone estimate the spread, whatever came later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from midstream.core.stats import Contrast, after_more, fit
from midstream.report.line_rows import STABLE, LineRow, kind_of, tasks_of
from midstream.study.studies import Study

SEED = "seed"
Place = tuple[tuple[str, Any], ...]
Cells = dict[Place, dict[str, float]]
# What is compared: weights of places' means, each given by the axes that it fixes.
Sides = Sequence[tuple[float, Mapping[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """A contrast of places, and what it rests on.

    `places` are those that have a weight. `learnt` is the same without the models that did not
    learn one of its tasks, and `num_failed` counts those among its own; None where all learnt.
    `lines` are the rows of each side, in the same order on all; `others` the axes that it is a mean
    over, at `num_places` places.
    """

    contrast: Contrast
    places: tuple[Place, ...]
    lines: tuple[tuple[LineRow, ...], ...]
    others: tuple[str, ...] = ()
    num_places: int = 1
    num_left_out: int = 0
    learnt: Contrast | None = None
    num_failed: int = 0


def compare(
    study: Study, rows: Sequence[LineRow], column: str, sides: Sides, places: int = 2
) -> Comparison | None:
    """The sum of the sides' means by their weights, matched by all axes that they leave free.

    Each repetition is first averaged over the free axes: lines that share stages are no
    repetitions of each other. The spread is pooled over all places of the axes that differ between
    the sides, where the others have the sides' values. An axis that the study moves along with
    those that differ is part of the place. `places`: of so many the best was picked, and the
    interval is simultaneous for all pairs. None where no repetition is on every side.
    """
    same, varied = split_axes(sides)
    lines = [r for r in rows if r.role == "line" and all(r.at(a) == v for a, v in same.items())]
    if not lines:
        return None
    free = [axis for axis in lines[0].axes if axis not in same and axis not in varied]
    free = [axis for axis in free if axis == SEED or not _is_tied(study, axis, varied, same)]
    # A comparison of the seeds themselves is repeated by everything else.
    fixes_seeds = SEED in varied or SEED in same
    repeats = [SEED] if SEED in free else free if fixes_seeds else []
    others = [axis for axis in free if axis not in repeats]
    held = _by_cell(lines, column, varied, repeats, others)
    ends = [_place_at(at, varied) for _, at in sides]
    members = [held.get(end, {}) for end in ends]
    pilot = {f"{SEED}={seed}" for seed in study.pilot} if repeats == [SEED] else set()
    early = [{n: under for n, under in one.items() if n in pilot or not pilot} for one in members]
    names, matched = _matched(early)
    if not names:
        return None
    # Later repetitions have what the first ones compared, or are left out.
    names = [
        name
        for name in members[0]
        if all(at in one.get(name, {}) for one in members for at in matched)
    ]
    weights = {end: weight for end, (weight, _) in zip(ends, sides, strict=True)}
    own = {r.name for end in ends for name in names for at in matched for r in held[end][name][at]}
    failed = failures(study, lines, column)
    every = {(n, at) for end in ends for n, under in held[end].items() for at in under}
    return Comparison(
        contrast=_judged(pilot, _cells(held, column, matched, set()), weights, places),
        places=tuple(tuple({**dict(end), **same}.items()) for end in ends),
        lines=tuple(
            tuple(row for name in names for at in matched for row in held[end][name][at])
            for end in ends
        ),
        others=tuple(axis for axis in others if len({row.at(axis) for row in lines}) > 1),
        num_places=len(matched),
        num_left_out=len(every) - len(names) * len(matched),
        learnt=_judged(pilot, _cells(held, column, matched, failed), weights, places)
        if own & failed
        else None,
        num_failed=len(own & failed),
    )


def split_axes(sides: Sides) -> tuple[dict[str, Any], list[str]]:
    """The axes that all sides fix alike, with their values, and those that differ between them."""
    same = {a: v for a, v in sides[0][1].items() if all(at.get(a) == v for _, at in sides)}
    return same, list(dict.fromkeys(axis for _, at in sides for axis in at if axis not in same))


def repetitions_needed(comparisons: Sequence[Comparison], half_width: float) -> dict[Place, int]:
    """By place, the repetitions with which every comparison that has it is that narrow.

    Raises ValueError where a spread is unknown: fewer than two repetitions, or none that differ.
    """
    needed: dict[Place, int] = {}
    for one in comparisons:
        number = one.contrast.repetitions_for(half_width)
        if number is None:
            told = [", ".join(f"{axis} {value}" for axis, value in place) for place in one.places]
            at = "; ".join(told)
            raise ValueError(
                f"the first repetitions of {at} say nothing about the spread ({one.contrast.why}); "
                "run one more seed first, with --set seeds=[...]"
            )
        for place in one.places:
            needed[place] = max(needed.get(place, 0), number)
    return needed


def failures(study: Study, rows: Sequence[LineRow], column: str) -> set[str]:
    """The lines that did not learn a task of `column`, by the study's rule (`Study.failure`)."""
    kinds = dict(tasks_of(study))
    tasks = [column.partition(".")[0].partition(":")[0]]
    if column in STABLE:
        tasks = [task for task, kind in kinds.items() if kind == kind_of(column)]
    found: set[str] = set()
    for task in tasks:
        by_place: dict[Place, dict[str, float]] = {}
        for row in rows:
            if (learnt := _learnt(row, task)) is not None:
                place = tuple(item for item in row.axes.items() if item[0] != SEED)
                by_place.setdefault(place, {})[row.name] = learnt
        for members in by_place.values():
            for name, learnt in members.items():
                siblings = [other for who, other in members.items() if who != name]
                if siblings and study.failure.is_one(learnt, median(siblings)):
                    found.add(name)
    return found


def _learnt(row: LineRow, task: str) -> float | None:
    """A task's score as a share of the way from chance to all right."""
    score, chance = row.values.get(f"{task}.score"), row.values.get(f"{task}.chance")
    if score is None or chance is None or chance >= 1:
        return None
    return (score - chance) / (1 - chance)


def _judged(pilot: set[str], cells: Cells, weights: Mapping[Place, float], places: int) -> Contrast:
    every = fit(cells).contrast(weights, places)
    if not pilot:
        return every
    few = {p: {n: value for n, value in own.items() if n in pilot} for p, own in cells.items()}
    first = fit(few).contrast(weights, places)
    if first.sd is None:
        return replace(every, sd=None, why=f"of the first seeds {first.why}")
    return after_more(first, every)


def _is_tied(study: Study, axis: str, varied: Sequence[str], same: Mapping[str, Any]) -> bool:
    """Whether an axis has several values, and by the study's design one at each place."""
    found: dict[Place, set[Any]] = {}
    for line in study.lines:
        if all(line.axes.get(a) == v for a, v in same.items()):
            found.setdefault(_place_at(line.axes, varied), set()).add(line.axes.get(axis))
    return len(set.union(*found.values())) > 1 and all(len(own) == 1 for own in found.values())


def _place_at(at: Mapping[str, Any], axes: Sequence[str]) -> Place:
    return tuple((axis, at.get(axis)) for axis in axes)


# By the places of the other axes, the lines there.
Under = dict[tuple[Any, ...], list[LineRow]]


def _by_cell(
    rows: Sequence[LineRow],
    column: str,
    varied: Sequence[str],
    repeats: Sequence[str],
    others: Sequence[str],
) -> dict[Place, dict[str, Under]]:
    """The lines that have a score, by place, by repetition ("seed=7") and by the other axes."""
    found: dict[Place, dict[str, Under]] = {}
    for row in rows:
        if row.values.get(column) is not None:
            name = ", ".join(f"{axis}={row.at(axis)}" for axis in repeats)
            at = tuple(row.at(axis) for axis in others)
            cell = found.setdefault(_place_at(row.axes, varied), {}).setdefault(name, {})
            cell.setdefault(at, []).append(row)
    return found


def _cells(
    held: Mapping[Place, Mapping[str, Under]],
    column: str,
    matched: Sequence[tuple[Any, ...]],
    without: set[str],
) -> Cells:
    """Means over the matched places of the other axes, of the repetitions that have all of them."""
    cells: Cells = {}
    for place, by_name in held.items():
        for name, under in by_name.items():
            kept = [[r for r in under.get(at, ()) if r.name not in without] for at in matched]
            if all(kept):
                means = (fmean(_score(row, column) for row in rows) for rows in kept)
                cells.setdefault(place, {})[name] = fmean(means)
    return cells


def _score(row: LineRow, column: str) -> float | int:
    value = row.values[column]
    assert value is not None, "lines without a score are in no cell"
    return value


def _matched(sides: Sequence[Mapping[str, Under]]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Repetitions, and places of the other axes, that all of them have on every side.

    The same places for every repetition: else a difference between places passes for one between
    seeds. Repetitions with most of them are taken first.
    """
    has = {
        name: [at for at in under if all(at in side.get(name, {}) for side in sides)]
        for name, under in sides[0].items()
    }
    kept: list[str] = []
    places: list[tuple[Any, ...]] = []
    for name in sorted(has, key=lambda name: -len(has[name])):
        left = [at for at in (places if kept else has[name]) if at in has[name]]
        if left:
            kept, places = [*kept, name], left
    return [name for name in has if name in kept], places
