"""What the data show, in sentences: the study's claims, the best place, the trend of a curve.

A difference is averaged over other axes within each seed; its interval is over the seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any, Literal

from midstream.report.line_rows import (
    STABLE,
    Difference,
    Group,
    LineRow,
    Spread,
    difference,
    kinds_of,
    paired_difference,
    tasks_of,
)
from midstream.report.pairs import Examples, Gap, mean_gap
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger
from midstream.study.studies import Claim, Study

KIND_NAMES = {
    "prepare_world": "World laid out",
    "prepare_tokenizer": "Tokenizer",
    "prepare_source": "Data preparation",
    "train_encoder": "Encoder training",
    "load_encoder": "Imported encoder",
    "fuse_encoders": "Encoders side by side",
    "load_decoder": "Imported language model",
    "load_model": "Imported model that sees",
    "pretrain": "Text pre-training",
    "continue": "Image-text training",
    "finetune": "Fine-tuning",
    "evaluate": "Evaluation",
}
SCORE_NAMES = {
    "stable.vision": "Vision, stable",
    "stable.vision_blind": "Vision, blind",
    "stable.text": "Text, stable",
}


def score_name(score: str) -> str:
    """A column or a score as a table's head names it."""
    name, _, part = score.partition(":")
    if part:
        return f"stable score, {part}" if name == "suite" else f"{name} ({part})"
    return SCORE_NAMES.get(score, score.removesuffix(".score"))


def place(value: Any) -> Any:
    """A value of an axis."""
    return f"{value:g}" if isinstance(value, int | float) else value


def place_words(at: Mapping[str, Any]) -> str:
    """Values of axes: "text completion 80, seed 7"."""
    return ", ".join(f"{axis.replace('_', ' ')} {place(value)}" for axis, value in at.items())


def points(value: float | int) -> str:
    """A score from 0 to 1 in points of 100."""
    return f"{100 * value:.1f}"


def signed(value: float | int) -> str:
    """A difference in points, with its sign; never minus nothing."""
    text = f"{100 * value:+.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


Verdict = Literal["agrees", "disagrees", "undecided", "no interval", "not measured", "decided"]
VERDICTS: dict[Verdict, str] = {
    "agrees": "our data agree",
    "disagrees": "our data disagree",
    "decided": "the data decide",
    "undecided": "the data do not decide",
    "no interval": "no interval: one seed",
    "not measured": "not measured",
}


# Two repetitions can agree to the last digit by chance, and their interval is then a point.
LEAST_REPETITIONS = 3


def _verdict(gap: Difference) -> Verdict:
    """Decided where the interval leaves zero out and rests on three repetitions at least."""
    if gap.exceeds_spread is None:
        return "no interval"
    decided = gap.exceeds_spread and min(gap.n) >= LEAST_REPETITIONS
    return "decided" if decided else "undecided"


@dataclass(frozen=True)
class Finding:
    """One sentence about the data, under the claim (and its source) that it answers, if any."""

    claim: str | None
    source: str
    verdict: Verdict
    sentence: str
    difference: Difference | None = None
    examples: Gap | None = None

    @property
    def verdict_words(self) -> str:
        """The verdict as it stands on a page."""
        return VERDICTS[self.verdict]


def higher(gap: Difference) -> str:
    """A difference as so many points higher or lower."""
    return f"{points(abs(gap.mean))} points {'lower' if gap.mean < 0 else 'higher'}"


def interval_words(gap: Difference) -> str:
    """The interval of a difference, or why there is none."""
    first, second = gap.n
    n = f"{first}" if first == second else f"{first} and {second}"
    paired = "paired" if gap.paired else "not paired"
    repetitions = f"{n} repetition{'s' if n != '1' else ''}"
    if gap.low is None or gap.high is None:
        return f"no interval: {repetitions}"
    return f"95 % interval {signed(gap.low)} to {signed(gap.high)}, {paired}, {repetitions}"


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
    rest = "" if len(known) == len(groups) else f"; {len(groups) - len(known)} places are missing"
    text = (
        f"{name} is highest at {place_words({x: best.x})}{where} with {points(top)} points, "
        f"{higher(gap)} than at {place_words({x: runner.x})}, the next best ({interval_words(gap)})"
        f"{rest}."
    )
    return Finding(None, "", _verdict(gap), text, gap)


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
    # From the first to the last place of the line of least squares.
    rise = [
        linear_regression(range(len(values)), [each[name] for each in values]).slope
        * (len(values) - 1)
        for name in whole
    ]
    rises = Spread(tuple(zip(whole, rise, strict=True)))
    gap = paired_difference(rises, Spread(tuple((name, 0.0) for name in whole)))
    assert gap is not None
    by = groups[0].by
    where = f", {place_words({str(study.figure.by): by})}" if by is not None else ""
    first, last = (place_words({study.figure.x: groups[at].x}) for at in (0, -1))
    text = (
        f"Over all {len(groups)} places, {score_name(column)}{where} is {higher(gap)} at {last} "
        f"than at {first} on a line fitted through them, evenly spaced ({interval_words(gap)})."
    )
    return Finding(None, "", _verdict(gap), text, gap)


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
    rows: Sequence[LineRow],
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


def rows_at(rows: Sequence[LineRow], at: Mapping[str, Any]) -> list[LineRow]:
    """The lines that have these values of axes."""
    return [r for r in rows if r.role == "line" and all(r.at(a) == v for a, v in at.items())]


# ------------------------------------------------------------------------------------- claims


def _claim(claim: Claim, study: Study, rows: Sequence[LineRow], examples: Examples) -> Finding:
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
    verdict = _verdict(gap)
    if verdict == "decided":
        verdict = "agrees" if gap.mean > 0 else "disagrees"
    one, two = place_words(claim.higher), place_words(claim.lower)
    text = (
        f"{name} is {higher(gap)} at {one} than at {two} ({interval_words(gap)}"
        f"{_rest(matched)}){_examples_words(on_examples)}."
    )
    return Finding(claim.text, claim.source, verdict, text, gap, on_examples)


def _missing(claim: Claim, study: Study, rows: Sequence[LineRow]) -> str | None:
    """Why a claim has no data on one of its sides; None where it has."""
    column, name = column_of(claim.score), score_name(claim.score)
    if column not in STABLE and claim.score not in dict(tasks_of(study)):
        return f"No line of this study is asked {claim.score}."
    for side in (claim.higher, claim.lower):
        members = rows_at(rows, side)
        if not members:
            return f"The study has no line at {place_words(side)}."
        if all(row.values[column] is None for row in members):
            done = sum(row.state == "done" for row in members)
            return (
                f"No line at {place_words(side)} has a score of {name} yet "
                f"({done} of {len(members)} done)."
            )
    return None


def _match(claim: Claim, rows: Sequence[LineRow]) -> _Matched | None:
    column, fixed = column_of(claim.score), claim.higher.keys() | claim.lower.keys()
    free = [axis for axis in rows[0].axes if axis not in fixed]
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

    def spread(side: dict[str, dict[Any, list[LineRow]]]) -> Spread:
        return Spread(
            tuple(
                (name, fmean(fmean(_known(r, column) for r in side[name][at]) for at in places))
                for name in kept
            )
        )

    def stages(side: dict[str, dict[Any, list[LineRow]]]) -> tuple[str, ...]:
        return tuple(r.stage for n in kept for at in sorted(places, key=str) for r in side[n][at])

    return _Matched(
        spread(high),
        spread(low),
        (stages(high), stages(low)),
        tuple(axis for axis in others if len({row.at(axis) for row in rows}) > 1),
        len(places),
        len(everything) - len(kept) * len(places),
    )


def _known(row: LineRow, column: str) -> float | int:
    value = row.values[column]
    assert value is not None
    return value


def _by_place(
    rows: Sequence[LineRow], column: str, repeats: Sequence[str], others: Sequence[str]
) -> dict[str, dict[Any, list[LineRow]]]:
    """Lines with a score, by repetition and then by the other axes."""
    found: dict[str, dict[Any, list[LineRow]]] = {}
    for row in rows:
        if row.values[column] is not None:
            name = ", ".join(f"{axis}={row.at(axis)}" for axis in repeats)
            at = tuple(row.at(axis) for axis in others)
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
