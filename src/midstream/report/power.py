"""What a study can decide with its seeds, what more seeds would cost, and which it needs.

Before a run from a spread that the store has measured, or one that is given; after its first seeds
by Stein's two-stage design, whose final interval holds without a correction for looking.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from midstream.core.stats import LEAST_OWN, detectable, quantile
from midstream.core.tokens import counted
from midstream.report.findings import claim_sides, column_of, versus
from midstream.report.line_rows import curves_of, group_rows, kinds_of, line_rows, ranked
from midstream.report.verdicts import (
    SEED,
    Comparison,
    Sides,
    compare,
    repetitions_needed,
    split_axes,
)
from midstream.study.store import Ledger
from midstream.study.studies import Claim, Line, Study

# More repetitions than this are not counted up to.
MOST = 1000


@dataclass(frozen=True)
class Power:
    """Of one claim: the spread of its difference in one repetition, and what follows from it.

    `basis`: the spread is the store's (measured) or given. `detectable` is the true difference that
    the planned `repetitions` find in eight of ten studies; `needed` so many make the interval as
    narrow as the study's smallest difference, None above MOST. Scores are from 0 to 1.
    """

    claim: Claim
    basis: str
    spread: float
    repetitions: int
    detectable: float | None
    needed: int | None


def powers(study: Study, ledger: Ledger, spread: float | None = None) -> list[Power]:
    """What each claim can tell; claims of which nobody knows a spread are left out.

    `spread` (0 to 1) is the standard deviation of a score over seeds at one place, and stands for
    all claims (an upper bound for those that are means over other axes); without it those of the
    scores that the store holds count.
    """
    rows = [] if spread is not None else line_rows(study, ledger)
    found = []
    for claim in study.claims:
        sides = claim_sides(claim)
        places, repetitions = _design(study, sides)
        if spread is not None:
            sd, pooled, basis = spread * math.sqrt(2), places > 2, "given"
        else:
            known = compare(study, rows, column_of(claim.score), sides)
            if known is None or known.contrast.sd is None:
                continue
            sd, pooled, basis = known.contrast.sd, known.contrast.pooled, "measured"
        whole = places - 1 if pooled else 1
        least = None
        if repetitions >= (2 if pooled else LEAST_OWN):
            least = detectable(sd, repetitions, whole * (repetitions - 1))
        needed = _needed(sd, whole, study.smallest_difference, 2 if pooled else LEAST_OWN)
        found.append(Power(claim, basis, sd, repetitions, least, needed))
    return found


def _design(study: Study, sides: Sides) -> tuple[int, int]:
    """Places that share a comparison's spread, and the repetitions planned on all its sides."""
    same, varied = split_axes(sides)
    lines = [line for line in study.lines if _is_at(line, same.items())]
    places = {tuple(line.axes.get(axis) for axis in varied) for line in lines}
    seeds = [{line.axes.get(SEED) for line in lines if _is_at(line, at.items())} for _, at in sides]
    return len(places), len(set.intersection(*seeds))


def _needed(sd: float, whole: int, half_width: float, fewest: int) -> int | None:
    """The fewest repetitions whose interval is that narrow, were the spread just so."""
    for number in range(fewest, MOST + 1):
        reach = quantile(0.975, whole * (number - 1))
        if reach * sd / math.sqrt(number) <= half_width:
            return number
    return None


def hours_each(
    hours: Mapping[str, float], users: Mapping[str, Iterable[str]], study: Study
) -> float | None:
    """Hours of one more repetition of the study: of the stages that one seed's lines alone use.

    `hours` and `users` (names of lines) are by stage. None for a study without seeds.
    """
    seed_of = {line.name: line.axes.get(SEED) for line in study.lines}
    seeds = {seed for seed in seed_of.values() if seed is not None}
    if not seeds:
        return None
    of = {stage: {seed_of.get(name) for name in lines} for stage, lines in users.items()}
    own = [hours.get(stage, 0.0) for stage, by in of.items() if len(by) == 1 and None not in by]
    return sum(own, 0.0) / len(seeds)


def comparisons(study: Study, ledger: Ledger) -> list[Comparison]:
    """What the findings compare to decide: claims, and the best place of each curve with the next.

    Those without a score on both sides are left out.
    """
    rows = line_rows(study, ledger)
    found = [
        compare(study, rows, column_of(claim.score), claim_sides(claim)) for claim in study.claims
    ]
    groups = [] if study.levels else group_rows(study, rows)
    for column in (f"stable.{kind}" for kind in kinds_of(study)):
        for own in curves_of(groups).values():
            known = ranked(own, column)
            # Against every other: whichever is picked is then known as well as asked.
            found += [
                compare(study, rows, column, versus(study, known[0], other), places=len(known))
                for other in own
                if other in known[1:]
            ]
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class Decision:
    """More repetitions for a study whose first seeds are done.

    `by_place` are the numbers that its comparisons need there, `capped` whether a limit cut them.
    """

    by_place: Mapping[tuple[tuple[str, Any], ...], int]
    pilot: tuple[int, ...]
    capped: bool

    @property
    def seeds(self) -> tuple[int, ...]:
        """The first seeds, and new ones behind them."""
        number = max(len(self.pilot), *self.by_place.values(), 0)
        fresh = (seed for seed in range(1, number + len(self.pilot) + 1) if seed not in self.pilot)
        return (*self.pilot, *(next(fresh) for _ in range(number - len(self.pilot))))

    def sentence(self, half_width: float) -> str:
        """What the first seeds led to; `half_width` in points."""
        number, cap = len(self.seeds), ", where the limit ends" if self.capped else ""
        text = f"intervals of {half_width:g} points to either side take "
        least = min(self.by_place.values())
        between = f"{least} to {number}" if least < number else f"{number}"
        return f"{text}{between} seeds a place{cap}; {len(self.pilot)} are done"

    def study(self, whole: Study) -> Study:
        """Of a study with all seeds at every place, the lines that are needed."""
        order = {seed: at for at, seed in enumerate(self.seeds)}
        lines = [line for line in whole.lines if order[int(line.axes[SEED])] < self._number(line)]
        return whole.model_copy(update={"lines": tuple(lines), "pilot": self.pilot})

    def _number(self, line: Line) -> int:
        asked = [number for place, number in self.by_place.items() if _is_at(line, place)]
        return max(len(self.pilot), *asked, 0)


def pilot_of(study: Study, most: int) -> tuple[int, ...]:
    """The seeds that are run first; `most` at one place are allowed.

    Raises ValueError for what no seeds can decide: a study without seeds or with one, whose figure
    is over its seeds, without a claim or two places, and for a limit below one more seed.
    """
    seeds = [int(line.axes[SEED]) for line in study.lines if SEED in line.axes]
    pilot = tuple(dict.fromkeys(seeds))
    if len(seeds) < len(study.lines) or len(pilot) < 2:
        raise ValueError(
            f"{study.name} has {counted(len(pilot), 'seed')}, and two at least estimate a spread; "
            "give --set seeds=7,365,124; lines say theirs on an axis seed"
        )
    if study.figure.x == SEED or study.levels:
        raise ValueError(f"{study.name} compares its draws themselves; more seeds decide nothing")
    if most <= len(pilot):
        raise ValueError(
            f"--max-seeds is {most}, and the first {len(pilot)} seeds are run before anything is "
            f"decided; allow {len(pilot) + 1} at least"
        )
    if not study.claims and len({line.axes.get(study.figure.x) for line in study.lines}) < 2:
        raise ValueError(f"{study.name} has no claim and no two places to decide between")
    return pilot


def decide(study: Study, ledger: Ledger, half_width: float, most: int) -> Decision:
    """Stein's second stage: repetitions with which every comparison is as narrow as `half_width`.

    `most` caps them. Raises ValueError as `pilot_of`, without a score on both sides of anything,
    and where the first seeds say nothing about the spread.
    """
    pilot = pilot_of(study, most)
    compared = comparisons(study, ledger)
    if not compared:
        raise ValueError(f"{study.name} has no claim and no two places with scores to decide")
    needed = repetitions_needed(compared, half_width)
    capped = {place: min(number, most) for place, number in needed.items()}
    return Decision(capped, pilot, capped != needed)


def _is_at(line: Line, place: Iterable[tuple[str, Any]]) -> bool:
    return all(line.axes.get(axis) == value for axis, value in place)
