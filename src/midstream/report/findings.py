"""What the data show, in sentences: the study's claims, the best place, the trend of a curve.

Differences are contrasts of one model of the figure's cells (`report/verdicts.py`), and end in one
of four verdicts: higher, lower, the same within the study's smallest difference, not decided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from midstream.core.stats import Contrast, nested_spread, trend
from midstream.report.line_rows import (
    PROBABILITY,
    STABLE,
    Group,
    LineRow,
    curves_of,
    kinds_of,
    ranked,
    tasks_of,
)
from midstream.report.samples import Examples, Gap, mean_gap
from midstream.report.verdicts import Comparison, Sides, compare
from midstream.study.stages import Evaluate
from midstream.study.studies import Claim, Study, place_name

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
    "stable.vision_prob": "Vision, by probability",
    "stable.text_prob": "Text, by probability",
}


def score_name(score: str) -> str:
    """A column or a score as a table's head names it."""
    name, _, part = score.partition(":")
    if part:
        return f"stable score, {part}" if name == "suite" else f"{name} ({part})"
    return SCORE_NAMES.get(score, score.removesuffix(".score"))


def place(value: Any) -> Any:
    """A value of an axis."""
    return place_name(value) if isinstance(value, int | float) else value


def place_words(at: Mapping[str, Any]) -> str:
    """Values of axes: "text completion 80, seed 7"."""
    return ", ".join(f"{axis.replace('_', ' ')} {place(value)}" for axis, value in at.items())


def points(value: float | int) -> str:
    """A score from 0 to 1 in points of 100; never minus nothing."""
    return f"{100 * value:z.1f}"


def signed(value: float | int) -> str:
    """A difference in points, with its sign; never minus nothing."""
    text = f"{100 * value:+.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def interval(low: float, high: float) -> str:
    """Both ends in points; one that would be 0.0 keeps a digit, since -0.04 leaves zero out."""

    def end(value: float) -> str:
        beside = abs(value) > 1e-9 and signed(value) == "0.0"
        return f"{100 * value:+.1g}".replace("-", "\N{MINUS SIGN}") if beside else signed(value)

    return f"{end(low)} to {end(high)}"


Verdict = Literal["higher", "lower", "same", "undecided", "no interval", "not measured", "measured"]


@dataclass(frozen=True)
class Finding:
    """One sentence about the data, under the claim (and its source) that it answers, if any.

    `within` is what "the same" means, as a score from 0 to 1.
    """

    claim: str | None
    source: str
    verdict: Verdict
    sentence: str
    within: float
    comparison: Comparison | None = None

    @property
    def is_decided(self) -> bool:
        """Whether the data decide."""
        return self.verdict in ("higher", "lower", "same")

    @property
    def verdict_words(self) -> str:
        """The verdict as it stands on a page; of a claim also whether it holds."""
        same = f"the same within {place(100 * self.within)} points"
        words = {"undecided": "not decided", "same": same}.get(self.verdict, self.verdict)
        if self.claim is None or not self.is_decided:
            return words
        return f"{words}: our data {'agree' if self.verdict == 'higher' else 'disagree'}"


def higher(gap: Contrast) -> str:
    """A difference as so many points higher or lower."""
    return f"{points(abs(gap.mean))} points {'lower' if gap.mean < 0 else 'higher'}"


def interval_words(gap: Contrast) -> str:
    """The interval of a difference and the spread that it rests on, or why there is none."""
    repetitions = f"{gap.n} repetition{'' if gap.n == 1 else 's'}"
    if gap.low is None or gap.high is None:
        return f"no interval: {gap.why or repetitions}"
    spread = "one spread of all places" if gap.pooled else "its own spread"
    return (
        f"95 % interval {interval(gap.low, gap.high)}, {repetitions}, {spread}, "
        f"{gap.freedom} degrees of freedom"
    )


def findings(
    study: Study, rows: Sequence[LineRow], groups: Sequence[Group], examples: Examples
) -> list[Finding]:
    """The study's claims in their order, then for each stable score and curve its best place and
    whether it rises or falls."""
    found = [_claim(claim, study, rows, examples) for claim in study.claims]
    if study.levels:  # draws within one another are no places to choose from
        return found + [_levels(study, rows, f"stable.{kind}") for kind in kinds_of(study)]
    for column in (f"stable.{kind}" for kind in kinds_of(study)):
        for own in curves_of(groups).values():
            if len(own) > 1:
                rise = trend_finding(study, rows, own, column)
                found += [best_finding(study, rows, own, column), *([] if rise is None else [rise])]
    return found


def best_finding(
    study: Study, rows: Sequence[LineRow], groups: Sequence[Group], column: str
) -> Finding:
    """The place with the highest mean and how far the next best lies, by Tukey's interval for all
    pairs of places."""
    name, where, known = score_name(column), _curve(study, groups), ranked(groups, column)
    if len(known) < 2:
        text = f"{name}{where}: {len(known)} of {len(groups)} places have a score; two are needed."
        return Finding(None, "", "not measured", text, study.smallest_difference)
    best, runner = known[:2]
    sides = versus(study, best, runner)
    comparison = compare(study, rows, column, sides, places=len(known))
    if comparison is not None and comparison.contrast.mean < 0:
        # On the repetitions that these two share it is the other way round.
        best, runner, sides = runner, best, versus(study, runner, best)
        comparison = compare(study, rows, column, sides, places=len(known))
    rest = "" if len(known) == len(groups) else f"; {len(groups) - len(known)} places are missing"
    x, top = study.figure.x, best.spreads[column].mean or 0.0
    first = f"{name} is highest at {place_words({x: best.x})}{where} with {points(top)} points"
    if comparison is None:
        text = f"{first}; no repetition has {place_words({x: runner.x})}, the next best, too{rest}."
        return Finding(None, "", "no interval", text, study.smallest_difference)
    text = (
        f"{first}, {higher(comparison.contrast)} than at {place_words({x: runner.x})}, the next "
        f"best ({_how(study, comparison)}){rest}{_beside(study, rows, column, sides, len(known))}."
    )
    return _judged(study, text, comparison)


def trend_finding(
    study: Study, rows: Sequence[LineRow], groups: Sequence[Group], column: str
) -> Finding | None:
    """Whether a score rises or falls over all places of a numeric axis; None below three of them,
    and where no repetition has all.

    The rise from the first to the last place of a line of least squares through the places, evenly
    spaced as the figure draws them.
    """
    if len(groups) < 3 or not all(isinstance(group.x, int | float) for group in groups):
        return None
    weights = trend(range(len(groups)))
    sides = [(weights[at], at_group(study, group)) for at, group in enumerate(groups)]
    comparison = compare(study, rows, column, sides)
    if comparison is None:
        return None
    first, last = (place_words({study.figure.x: groups[at].x}) for at in (0, -1))
    text = (
        f"Over all {len(groups)} places, {score_name(column)}{_curve(study, groups)} is "
        f"{higher(comparison.contrast)} at {last} than at {first} on a line fitted through them, "
        f"evenly spaced ({_how(study, comparison)}){_beside(study, rows, column, sides)}."
    )
    return _judged(study, text, comparison)


def _levels(study: Study, rows: Sequence[LineRow], column: str) -> Finding:
    """How much each level of the chain adds to a score's spread."""
    name, size = score_name(column), study.smallest_difference
    known = [
        (tuple(str(row.at(axis)) for axis in study.levels), value)
        for row in rows
        if row.role == "line" and (value := row.values[column]) is not None
    ]
    try:
        spreads = nested_spread([at for at, _ in known], [value for _, value in known])
    except (ValueError, IndexError) as reason:
        text = f"{name}: the spread of its levels is not known yet ({reason})."
        return Finding(None, "", "not measured", text, size)
    parts = [
        f"{points(spread)} points over {axis.replace('_', ' ')}"
        for axis, spread in zip(study.levels, spreads, strict=True)
    ]
    text = (
        f"{name} of {len(known)} models of one recipe varies by {', '.join(parts)} (standard "
        "deviations that each level adds within the one before)."
    )
    return Finding(None, "", "measured", text, size)


def at_group(study: Study, group: Group) -> dict[str, Any]:
    """The axes that a group of lines fixes."""
    by = {} if study.figure.by is None else {study.figure.by: group.by}
    return {study.figure.x: group.x, **by}


def versus(study: Study, one: Group, other: Group) -> Sides:
    """The first group less the other, as what `compare` takes."""
    return ((1.0, at_group(study, one)), (-1.0, at_group(study, other)))


def claim_sides(claim: Claim) -> Sides:
    """A claim as what `compare` takes."""
    return ((1.0, claim.higher), (-1.0, claim.lower))


def column_of(score: str) -> str:
    """The column of a claim's or table's score: stable.vision, stable.text, or a task's name.

    A metric of a task ("hellaswag:acc_norm") and a published set of tasks ("suite:text, Table 7")
    are columns of their own.
    """
    return score if score in STABLE or ":" in score else f"{score}.score"


def rows_at(rows: Sequence[LineRow], at: Mapping[str, Any]) -> list[LineRow]:
    """The lines that have these values of axes."""
    return [r for r in rows if r.role == "line" and all(r.at(a) == v for a, v in at.items())]


def _claim(claim: Claim, study: Study, rows: Sequence[LineRow], examples: Examples) -> Finding:
    name, size = score_name(claim.score), study.smallest_difference
    missing = _missing(claim, study, rows)
    if missing:
        return Finding(claim.text, claim.source, "not measured", missing, size)
    column, sides = column_of(claim.score), claim_sides(claim)
    comparison = compare(study, rows, column, sides)
    if comparison is None:
        text = f"No two lines that differ in nothing else have a score of {name} on both sides."
        return Finding(claim.text, claim.source, "not measured", text, size)
    on_examples = _on_examples(claim.score, study, comparison, examples)
    one, two = place_words(claim.higher), place_words(claim.lower)
    text = (
        f"{name} is {higher(comparison.contrast)} at {one} than at {two} "
        f"({_how(study, comparison)}{_rest(comparison)})"
        f"{_beside(study, rows, column, sides)}{_examples_words(on_examples)}."
    )
    judged = _judged(study, text, comparison)
    return replace(judged, claim=claim.text, source=claim.source)


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


def _on_examples(
    score: str, study: Study, comparison: Comparison, examples: Examples
) -> Gap | None:
    by_name: dict[str, Evaluate] = {result.name: result for result in study.results}
    ones, others = ([by_name[row.stage] for row in side] for side in comparison.lines)
    tasks = [score]
    if score in STABLE:
        tasks = [name for name, kind in tasks_of(study) if kind == score.split(".")[1]]
    gaps = [examples.gap(ones, others, task) for task in tasks]
    known = [gap for gap in gaps if gap is not None]
    return mean_gap(known) if known and len(known) == len(gaps) else None


def _judged(study: Study, text: str, comparison: Comparison) -> Finding:
    size, contrast = study.smallest_difference, comparison.contrast
    verdict: Verdict = "no interval" if contrast.low is None else contrast.verdict(size)
    return Finding(None, "", verdict, text, size, comparison)


def _how(study: Study, comparison: Comparison) -> str:
    """The interval; what would decide where it does not; the same without models that failed."""
    size, contrast = study.smallest_difference, comparison.contrast
    text = interval_words(contrast)
    needed = contrast.repetitions_for(size)
    if contrast.verdict(size) == "undecided" and needed is not None and needed > contrast.n:
        text += f"; {needed:,} repetitions would make it {points(size)} points to either side"
    if comparison.learnt is not None:
        models = f"{comparison.num_failed} that did not learn a task"
        left = signed(comparison.learnt.mean) if comparison.learnt.n else "nothing is left"
        text += f"; without {models} {left}"
        low, high = comparison.learnt.low, comparison.learnt.high
        if low is not None and high is not None:
            text += f" ({interval(low, high)})"
    return text


def _beside(
    study: Study, rows: Sequence[LineRow], column: str, sides: Sides, places: int = 2
) -> str:
    """The same by the probability of right answers, where the lines have it."""
    if f"{column}_prob" not in PROBABILITY:
        return ""
    found = compare(study, rows, f"{column}_prob", sides, places)
    if found is None:
        return ""
    gap, words = found.contrast, "no interval"
    if gap.low is not None and gap.high is not None:
        verdict = gap.verdict(study.smallest_difference)
        words = f"{interval(gap.low, gap.high)}, "
        words += {"undecided": "not decided", "same": "the same"}.get(verdict, verdict)
    return f"; by the probability of right answers {signed(gap.mean)} ({words})"


def _curve(study: Study, groups: Sequence[Group]) -> str:
    by = groups[0].by
    return f", {place_words({str(study.figure.by): by})}" if by is not None else ""


def _rest(comparison: Comparison) -> str:
    text = ""
    if comparison.others and comparison.num_places > 1:
        axes = " and ".join(axis.replace("_", " ") for axis in comparison.others)
        text += f", mean over {comparison.num_places} places of {axes}"
    if comparison.num_left_out:
        text += f"; {comparison.num_left_out} without a counterpart left out"
    return text


def _examples_words(gap: Gap | None) -> str:
    """One line of detail: these models on these examples, beside the interval over seeds."""
    if gap is None or gap.low is None or gap.high is None:
        return ""
    return (
        f"; these very models on the same examples {signed(gap.mean)} "
        f"({interval(gap.low, gap.high)}), which decides nothing about others"
    )
