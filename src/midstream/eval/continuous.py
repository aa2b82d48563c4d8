"""Continuous outcomes: how likely the right answer is, where a score says right or wrong.

An outcome that cannot be had is None; docs/evaluation.md says which is what.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from midstream.core.stats import mean_by_split, standard_error
from midstream.eval.scoring import LETTERS, overlap
from midstream.eval.tasks import Reply, VisualExample, VisualFormat
from midstream.eval.text import TextAnswer
from midstream.study.results import OUTCOMES

Outcomes = dict[str, float | None]
_NOTHING: Outcomes = dict.fromkeys(OUTCOMES)


@dataclass(frozen=True)
class Target:
    """What is weighed of an example: a closed set of answers, as the model is asked (`options`) and
    as the scorer reads them (`answers`), and which are right; and the text of the gold answer."""

    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    right: tuple[bool, ...] = ()
    gold: str | None = None


def target(
    how: VisualFormat,
    example: VisualExample,
    letters: Literal["letter", "likelihood"],
    *,
    spelt_as_gold: bool,
) -> Target:
    """The target of an example; `letters` as in `Evaluation`.

    spelt_as_gold: the options are in small letters where the file's answer is ("yes"), as a model
    that was fine-tuned to write answers was taught them.
    """
    if not example.choices:
        return Target(gold=_gold_text(example.gold))
    answers = options = example.choices
    if how.fixed == "letters":
        answers = tuple(LETTERS[: len(options)])
        options = answers if letters == "letter" else options
    right = tuple(how.score(answer, example.gold) == 1 for answer in answers)
    if spelt_as_gold and example.gold in [option.lower() for option in options]:
        options = tuple(option.lower() for option in options)
    gold = next((option for option, is_right in zip(options, right, strict=True) if is_right), None)
    return Target(options, answers, right, gold)


def _gold_text(gold: Any) -> str | None:
    """The right answer as a model would write it; the commonest of several, of equally common ones
    the first. None where it has no letters."""
    if isinstance(gold, Mapping):
        gold = gold["answers"]
    if isinstance(gold, str):
        gold = [gold]
    if all(isinstance(side, float | int) for side in gold):
        return f"[{', '.join(f'{side:.2f}' for side in gold)}]"
    [(text, _)] = Counter(gold).most_common(1)
    return str(text).strip() or None


def visual_outcomes(
    example: VisualExample,
    prediction: str,
    weighed: tuple[Target, Reply, Reply | None] | None = None,
) -> Outcomes:
    """The outcomes of a question about a picture: its target, the reply to it, and the reply with
    another picture. Without them, as of another program's predictions, of boxes the IoU alone."""
    found = dict(_NOTHING)
    if weighed is not None:
        about, reply, other = weighed
        found |= _among(reply.choices, about.right)
        if about.gold is not None and reply.gold is not None:
            found["bits_per_byte"] = _bits(reply.gold, len(about.gold.encode()))
            if other is not None and other.gold is not None:
                found["bits_gained"] = _bits(other.gold - reply.gold, len(about.gold.encode()))
            found |= _probability(reply.gold, found)
    if example.size is not None:
        iou = overlap(prediction, example.gold)
        found |= {"iou": iou, "prob": iou, "prob_chance": 0.0}
    return found


def text_outcomes(answer: TextAnswer, num_tokens: int) -> Outcomes:
    """The outcomes of a text task's record, whose gold continuation has so many tokens."""
    found = dict(_NOTHING)
    if answer.gold is None or not answer.logprobs:
        return found
    logprob, text = answer.logprobs[answer.gold], answer.continuation[1].strip()
    sizes = {"byte": len(text.encode()), "character": len(text), "token": num_tokens}
    found |= {f"bits_per_{unit}": _bits(logprob, size) for unit, size in sizes.items() if text}
    if len(answer.logprobs) > 1:
        found |= _among(answer.logprobs, [at == answer.gold for at in range(len(answer.logprobs))])
    return found | _probability(logprob, found)


def _bits(logprob: float, size: int) -> float:
    # Adding zero, a bit of nothing is 0 and not -0.
    return -logprob / (size * math.log(2)) + 0.0


def _among(logprobs: Sequence[float], right: Sequence[bool]) -> Outcomes:
    """The probability of the right answers among all, and by how much it beats the best wrong."""
    if not logprobs:
        return {}
    highest = max(logprobs)
    if highest == -math.inf:
        return {}
    weights = [math.exp(value - highest) for value in logprobs]
    each = [weight / math.fsum(weights) for weight in weights]
    correct = math.fsum(value for value, is_right in zip(each, right, strict=True) if is_right)
    wrong = [value for value, is_right in zip(each, right, strict=True) if not is_right]
    chance = sum(right) / len(right)
    margin = correct - max(wrong, default=0.0)
    return {"correct_prob": correct, "margin": margin, "prob": correct, "prob_chance": chance}


def _probability(logprob: float, found: Outcomes) -> Outcomes:
    """Without a closed set, that of the gold answer itself."""
    free = found["prob"] is None
    return {"prob": math.exp(logprob), "prob_chance": 0.0} if free else {}


def summary(
    rows: Sequence[Outcomes], groups: Sequence[str] | None, splits: Sequence[str]
) -> dict[str, Any]:
    """The `continuous` part of a task's row: each outcome's mean over the examples that have it,
    splits weighing alike, and its standard error, None of what is not finite; `groups` as in
    `core.stats`."""
    means: dict[str, float | None] = {}
    errors: dict[str, float | None] = {}
    for name in OUTCOMES:
        pairs = [(at, value) for at, row in enumerate(rows) if (value := row[name]) is not None]
        values, own = [value for _, value in pairs], [splits[at] for at, _ in pairs]
        if not all(map(math.isfinite, values)):  # a right answer that cannot be
            values = []
        clusters = None if groups is None else [groups[at] for at, _ in pairs]
        means[name] = mean_by_split(values, own) if values else None
        errors[name] = standard_error(values, clusters, own) if values else None
    return {**means, "stderr": errors}
