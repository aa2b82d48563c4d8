"""What scores answers about several pictures, equal to the official code."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from midstream.eval.benchmark_records import VisualExample
from midstream.eval.scoring import Numbers, mean, word_accuracy


def mantis_accuracy(prediction: str, gold: Mapping[str, Any]) -> float:
    """Mantis-Eval: what stands behind "Final Answer:"; of options its first letter, or the
    option's own text where that names none; free answers equal once lowered (eval.py)."""
    at = prediction.lower().find("final answer:")
    text = prediction if at < 0 else prediction[at + len("final answer:") :].strip()
    if "choices" not in gold:
        return float(text.lower() in {answer.strip("()\n ").lower() for answer in gold["answers"]})
    named = re.match(r"Answer: ([A-Z])", text) or re.search(r"([^\W\d_])", text)
    index = -1 if named is None else ord(named[1].upper()) - ord("A")
    if 0 <= index < len(gold["choices"]):
        return float(index == gold["index"])
    return float(prediction.strip() == gold["choices"][gold["index"]].strip())


def nlvr2_numbers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    """NLVR2's second number: the share of sentences that are judged right of all their pairs of
    pictures (metrics.py)."""
    right: dict[str, bool] = {}
    for text, example in zip(predictions, examples, strict=True):
        split, group, _, sentence = example.example_id.split("-")
        key = f"{split}-{group}-{sentence}"
        right[key] = right.get(key, True) and word_accuracy(text, example.gold) == 1
    return {"consistency": mean([float(value) for value in right.values()])}


def guessing_numbers(_: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    """What guessing among each example's own options scores; nothing where answers are free."""
    return {"guessing": mean([1 / len(e.choices) if e.choices else 0.0 for e in examples])}
