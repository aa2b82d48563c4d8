"""What a whole curve shows: its best place against the next best, and whether it rises or falls."""

from collections.abc import Sequence
from statistics import fmean

from midstream.report.finding import Finding, Verdict, decides, higher, interval_words
from midstream.report.spread import Spread, difference, paired_difference
from midstream.report.table import Group
from midstream.report.words import place_words, points, score_name
from midstream.study.studies import Study


def best_finding(study: Study, groups: Sequence[Group], column: str) -> Finding:
    """The place with the highest mean, and how far the next best lies."""
    name, x = score_name(column), study.figure.x
    by = groups[0].by
    where = f", {place_words({str(study.figure.by): by})}" if by is not None else ""
    means = [(group.spreads[column].mean, group) for group in groups]
    known = sorted(((m, g) for m, g in means if m is not None), key=lambda pair: -pair[0])
    if len(known) < 2:
        text = f"{name}{where}: {len(known)} of {len(groups)} places have a score; two are needed."
        return Finding(None, "", "not measured", text)
    (top, best), (_, runner) = known[:2]
    spreads = best.spreads[column], runner.spreads[column]
    gap = paired_difference(*spreads) or difference(*spreads)
    assert gap is not None
    verdict: Verdict = "no interval"
    if (decided := decides(gap)) is not None:
        verdict = "decided" if decided else "undecided"
    rest = "" if len(known) == len(groups) else f"; {len(groups) - len(known)} places are missing"
    text = (
        f"{name} is highest at {place_words({x: best.x})}{where} with {points(top)} points, "
        f"{higher(gap)} than at {place_words({x: runner.x})}, the next best ({interval_words(gap)})"
        f"{rest}."
    )
    return Finding(None, "", verdict, text, gap)


def trend_finding(study: Study, groups: Sequence[Group], column: str) -> Finding | None:
    """Whether a score rises or falls over all places of a numeric axis; None below three of them.

    A line is fitted through each repetition's places, evenly spaced as the figure draws them, and
    its rise from the first to the last is what repetitions are compared by. Repetitions that lack a
    place are left out.
    """
    if len(groups) < 3 or not all(isinstance(group.x, int | float) for group in groups):
        return None
    values = [dict(group.spreads[column].values) for group in groups]
    whole = [name for name in values[0] if all(name in each for each in values)]
    if not whole:
        return None
    rises = Spread(tuple((name, _rise([each[name] for each in values])) for name in whole))
    gap = paired_difference(rises, Spread(tuple((name, 0.0) for name in whole)))
    assert gap is not None
    verdict: Verdict = "no interval"
    if (decided := decides(gap)) is not None:
        verdict = "decided" if decided else "undecided"
    by = groups[0].by
    where = f", {place_words({str(study.figure.by): by})}" if by is not None else ""
    first, last = (place_words({study.figure.x: groups[at].x}) for at in (0, -1))
    text = (
        f"Over all {len(groups)} places, {score_name(column)}{where} is {higher(gap)} at {last} "
        f"than at {first} on a line fitted through them, evenly spaced ({interval_words(gap)})."
    )
    return Finding(None, "", verdict, text, gap)


def _rise(values: Sequence[float | int]) -> float:
    """From the first to the last place of the line of least squares."""
    middle, mean = (len(values) - 1) / 2, fmean(values)
    products = sum((at - middle) * (value - mean) for at, value in enumerate(values))
    return products / sum((at - middle) ** 2 for at in range(len(values))) * (len(values) - 1)
