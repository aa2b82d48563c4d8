"""What the data show, in plain sentences: the study's claims, and which place is best.

Repetitions are seeds. A difference is first averaged over whatever else two places have in common
(other axes), within each seed; its interval is Student's over the seeds. One seed has no interval,
and an interval that includes zero decides nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from midstream.report.finding import Finding, Verdict, decides, higher, interval_words
from midstream.report.overall import best_finding, trend_finding
from midstream.report.pairs import Examples, Gap, mean_gap
from midstream.report.spread import Spread, paired_difference
from midstream.report.table import STABLE, Group, kinds_of, tasks_of
from midstream.report.words import place_words, score_name, signed
from midstream.study.ledger import Ledger
from midstream.study.stage import Evaluate
from midstream.study.studies import Claim, Study

Row = Mapping[str, Any]
SEED = "seed"


@dataclass(frozen=True)
class _Matched:
    """The two sides of a claim, by repetition, and the lines that they rest on."""

    high: Spread
    low: Spread
    results: tuple[tuple[str, ...], tuple[str, ...]]
    others: tuple[str, ...]
    num_places: int
    num_left_out: int


def findings(
    study: Study,
    rows: Sequence[Row],
    groups: Sequence[Group],
    ledger: Ledger,
    examples: Examples | None = None,
) -> list[Finding]:
    """The study's claims in their order, then for each stable score and curve its best place and
    whether it rises or falls."""
    examples = examples or Examples(ledger)
    found = [_claim(claim, study, rows, examples) for claim in study.claims]
    for column in (f"stable.{kind}" for kind in kinds_of(study)):
        for by in dict.fromkeys(group.by for group in groups):
            own = [group for group in groups if group.by == by]
            if len(own) > 1:
                trend = trend_finding(study, own, column)
                found += [best_finding(study, own, column), *([] if trend is None else [trend])]
    return found


def column_of(score: str) -> str:
    """The column of a claim's or table's score: stable.vision, stable.text, or a task's name.

    A metric of a task ("hellaswag:acc_norm") and a published set of tasks ("suite:text, Table 7")
    are columns of their own.
    """
    return score if score in STABLE or ":" in score else f"{score}.score"


def rows_at(rows: Sequence[Row], at: Mapping[str, Any]) -> list[Row]:
    """The lines that have these values of axes."""
    return [
        row
        for row in rows
        if row["role"] == "line" and all(row.get(f"axis.{a}") == v for a, v in at.items())
    ]


# ------------------------------------------------------------------------------------- claims


def _claim(claim: Claim, study: Study, rows: Sequence[Row], examples: Examples) -> Finding:
    name = score_name(claim.score)
    missing = _missing(claim, study, rows)
    if missing:
        return Finding(claim.text, claim.source, "not measured", missing)
    matched = _match(claim, rows)
    if matched is None:
        text = f"No two lines that differ in nothing else have a score of {name} on both sides."
        return Finding(claim.text, claim.source, "not measured", text)
    gap = paired_difference(matched.high, matched.low)
    assert gap is not None
    on_examples = _on_examples(claim.score, study, matched, examples)
    verdict: Verdict = "no interval"
    if (decided := decides(gap)) is not None:
        verdict = "undecided"
        if decided:
            verdict = "agrees" if gap.mean > 0 else "disagrees"
    one, two = place_words(claim.higher), place_words(claim.lower)
    text = (
        f"{name} is {higher(gap)} at {one} than at {two} ({interval_words(gap)}"
        f"{_rest(matched)}){_examples_words(on_examples)}."
    )
    return Finding(claim.text, claim.source, verdict, text, gap, on_examples)


def _missing(claim: Claim, study: Study, rows: Sequence[Row]) -> str | None:
    """Why a claim has no data on one of its sides; None where it has."""
    column, name = column_of(claim.score), score_name(claim.score)
    if column not in STABLE and claim.score not in dict(tasks_of(study)):
        return f"No line of this study is asked {claim.score}."
    for side in (claim.higher, claim.lower):
        members = rows_at(rows, side)
        if not members:
            return f"The study has no line at {place_words(side)}."
        if all(row[column] is None for row in members):
            done = sum(row["state"] == "done" for row in members)
            return (
                f"No line at {place_words(side)} has a score of {name} yet "
                f"({done} of {len(members)} done)."
            )
    return None


def _match(claim: Claim, rows: Sequence[Row]) -> _Matched | None:
    column, fixed = column_of(claim.score), claim.higher.keys() | claim.lower.keys()
    axes = [key[5:] for key in rows[0] if key.startswith("axis.")]
    free = [axis for axis in axes if axis not in fixed]
    # A claim about the seeds themselves is repeated by everything else.
    repeats = [SEED] if SEED in free else free if SEED in fixed else []
    others = [axis for axis in free if axis not in repeats]
    high = _by_place(rows_at(rows, claim.higher), column, repeats, others)
    low = _by_place(rows_at(rows, claim.lower), column, repeats, others)
    shared = {name: high[name].keys() & low[name].keys() for name in high if name in low}
    shared = {name: places for name, places in shared.items() if places}
    if not shared:
        return None
    # The same places for every repetition: else a difference between places passes for one
    # between seeds.
    names = sorted(shared, key=lambda name: -len(shared[name]))
    kept, places = [names[0]], shared[names[0]]
    for name in names[1:]:
        if places & shared[name]:
            kept, places = [*kept, name], places & shared[name]
    kept = [name for name in high if name in kept]
    everything = {(name, at) for side in (high, low) for name in side for at in side[name]}

    def spread(side: dict[str, dict[Any, list[Row]]]) -> Spread:
        return Spread(
            tuple(
                (name, fmean(fmean(r[column] for r in side[name][at]) for at in places))
                for name in kept
            )
        )

    def stages(side: dict[str, dict[Any, list[Row]]]) -> tuple[str, ...]:
        return tuple(
            r["stage"] for n in kept for at in sorted(places, key=str) for r in side[n][at]
        )

    return _Matched(
        spread(high),
        spread(low),
        (stages(high), stages(low)),
        tuple(axis for axis in others if len({row[f"axis.{axis}"] for row in rows}) > 1),
        len(places),
        len(everything) - len(kept) * len(places),
    )


def _by_place(
    rows: Sequence[Row], column: str, repeats: Sequence[str], others: Sequence[str]
) -> dict[str, dict[Any, list[Row]]]:
    """Lines with a score, by repetition and then by the other axes."""
    found: dict[str, dict[Any, list[Row]]] = {}
    for row in rows:
        if row[column] is not None:
            name = ", ".join(f"{axis}={row[f'axis.{axis}']}" for axis in repeats)
            at = tuple(row[f"axis.{axis}"] for axis in others)
            found.setdefault(name, {}).setdefault(at, []).append(row)
    return found


def _on_examples(score: str, study: Study, matched: _Matched, examples: Examples) -> Gap | None:
    by_name: dict[str, Evaluate] = {result.name: result for result in study.results}
    ones, others = ([by_name[name] for name in side] for side in matched.results)
    kinds = tasks_of(study)
    tasks = [score]
    if score in STABLE:
        tasks = [name for name, kind in kinds if kind == score.split(".")[1]]
    gaps = [examples.gap(ones, others, task) for task in tasks]
    known = [gap for gap in gaps if gap is not None]
    return mean_gap(known) if known and len(known) == len(gaps) else None


# -------------------------------------------------------------------------------------- words


def _rest(matched: _Matched) -> str:
    text = ""
    if matched.others and matched.num_places > 1:
        axes = " and ".join(axis.replace("_", " ") for axis in matched.others)
        text += f", mean over {matched.num_places} places of {axes}"
    if matched.num_left_out:
        text += f"; {matched.num_left_out} without a counterpart left out"
    return text


def _examples_words(gap: Gap | None) -> str:
    if gap is None or gap.low is None or gap.high is None:
        return ""
    return (
        f"; on the same examples {signed(gap.mean)} ({signed(gap.low)} to {signed(gap.high)}), "
        f"which says nothing about other seeds"
    )
