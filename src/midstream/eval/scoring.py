"""From a prediction to its score, and from scores of tasks to the stable score.

Scorers are pure and equal to the official ones; `benchmarks.toml` names them.
"""

import ast
import math
import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from midstream.eval.benchmark_records import VisualExample

Numbers = dict[str, float | None]
# The options of a question, in their order.
LETTERS = "ABCDEFGHIJKLMNOP"

# What is known of each benchmark; the file says what its tables are.
BENCHMARKS: dict[str, Any] = tomllib.loads(
    Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8")
)
# Contracted forms that people type with an apostrophe missing. The official table holds every
# variant with one apostrophe left out, and nothing for forms that are words of their own
# without it ("its", "were", "shed"). Its keys with a capital ("Im") can never meet a lowered word.
_FORMS = BENCHMARKS["normalising"]
CONTRACTIONS: dict[str, str] = {
    form[:at] + form[at + 1 :]: form
    for form in _FORMS["contracted"].split()
    for at, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the official table takes this one's apostrophe away
# VizWiz' code writes back-ticks, but for a few.
VIZWIZ_CONTRACTIONS: dict[str, str] = {
    form if form in _FORMS["vizwiz_keys"] else form.replace("'", "`"): whole.replace("'", "`")
    for form, whole in CONTRACTIONS.items()
} | {form: CONTRACTIONS[form] for form in _FORMS["vizwiz_plain"]}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The official substitution hands a flag of value 32 to `count`: later periods stay.
_MAX_PERIODS = 32


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def cleaned(text: str) -> str:
    """An answer as every scorer gets it, whether a model gave it now or a file holds it: without
    outer white space, as the official evaluators' own runs write answers down."""
    return text.strip()


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA v2: the mean over the answers of min(1, equal ones among the others / 3).

    As the official code has it, nothing but white space is normalised where all answers are
    equal, so that "Yes" is wrong where ten people wrote "yes". Source: vqaEval.py of VQA v2.
    """
    golds = [_one_line(answer) for answer in answers]
    prediction = _one_line(prediction)
    if len(set(golds)) > 1:
        golds = [_vqa_words(_vqa_punctuation(gold)) for gold in golds]
        prediction = _vqa_words(_vqa_punctuation(prediction))
    return _leave_one_out(prediction, golds)


def single_answers_note(
    predictions: Sequence[str], examples: Sequence[VisualExample]
) -> str | None:
    """What normalising would change, where every list of ten holds one answer ten times."""
    if any(len(set(example.gold)) > 1 for example in examples):
        return None
    pairs = list(zip(predictions, examples, strict=True))
    official = mean([vqa_accuracy(text, e.gold) for text, e in pairs])
    plain = mean([qa_accuracy(text, e.gold) for text, e in pairs])
    if official is None or plain is None or official == plain:
        return None
    return (
        "each question has one answer, written ten times, which VQA v2's rule compares letter by "
        f"letter (here {100 * official:.2f}; normalised {100 * plain:.2f}); format qa is made for "
        "single answers (docs/evaluation.md)"
    )


def vqa_accuracy_prismatic(prediction: str, answers: Sequence[str]) -> float:
    """VQA v2 as the Prismatic authors score it: the prediction is always normalised whole, of the
    answers the punctuation alone, whether or not they agree (vlm-evaluation, vqav2/eval.py)."""
    golds = [_vqa_punctuation(answer) for answer in answers]
    return _leave_one_out(_normalised(prediction), golds)


def qa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, both normalised, however many there are.

    Normalised is what VQA v2's rule does where people disagree: lowered, punctuation away or a
    space, number words as digits, no articles, contractions whole. What that leaves nothing of
    ("A", "the") counts by its lowered letters.
    """
    return float(plain_answer(prediction) in {plain_answer(answer) for answer in answers})


def plain_answer(text: str) -> str:
    """A text as `qa_accuracy` compares it."""
    return _normalised(text) or " ".join(text.lower().split())


def vizwiz_accuracy(prediction: str, gold: Mapping[str, Any]) -> float:
    """VizWiz: the prediction is normalised with a table of its own, `gold["answers"]` stay as they
    are. Source: the VizWiz evaluator in vlm-evaluation."""
    return _leave_one_out(_normalised(prediction, VIZWIZ_CONTRACTIONS), gold["answers"])


def vizwiz_numbers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    """VizWiz' second part, unanswerable questions being what is looked for: average precision and
    F1 of the predictions that say so; None where no question is unanswerable."""
    said = [_normalised(text, VIZWIZ_CONTRACTIONS) == "unanswerable" for text in predictions]
    due = [not example.gold["answerable"] for example in examples]
    hits, wanted = sum(one and is_due for one, is_due in zip(said, due, strict=True)), sum(due)
    if not wanted:
        return {"unanswerable_average_precision": None, "unanswerable_f1": None}
    recall = hits / wanted
    precision = hits / sum(said) if any(said) else 0.0
    # The curve has two points: those that are said, and all of them.
    average = recall * precision + (1 - recall) * wanted / len(said)
    f1 = 2 * hits / (wanted + sum(said))
    return {"unanswerable_average_precision": average, "unanswerable_f1": f1}


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's variant: both sides lowered, "," and "?" dropped, "'s" parted, then normalised
    whether or not the answers agree. Source: the TextVQA evaluator of MMF."""
    golds = [_textvqa_normalise(answer) for answer in answers]
    return _leave_one_out(_textvqa_normalise(prediction), golds)


def gqa_accuracy(prediction: str, answer: str) -> float:
    """The official comparison, letter by letter; a last period and capitals of the prediction are
    forgiven, as in LLaVA's conversion for it (GQA eval.py; convert_gqa_for_eval.py)."""
    return float(prediction.rstrip(".").lower() == answer)


def gqa_accuracy_prismatic(prediction: str, answer: str) -> float:
    """As the Prismatic authors score it: all punctuation of the prediction goes, the answer's
    stays, so that nothing matches "t-shirt" (vlm-evaluation, harnesses/gqa.py)."""
    return float(prediction.translate(_NO_PUNCTUATION).lower() == answer)


def pope_answer(text: str) -> str:
    """What a free answer says, "yes" or "no", by POPE's rule: the words up to the first period,
    without commas; "No", "no" or "not" among them means no, everything else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_accuracy(prediction: str, answer: str) -> float:
    """1 if POPE's rule reads `answer` ("yes" or "no") out of the prediction."""
    return float(pope_answer(prediction) == answer)


def pope_numbers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    """The official numbers of each split, and their means."""
    said = [(e.split, pope_answer(t), e.gold) for t, e in zip(predictions, examples, strict=True)]
    by_split = {
        split: yes_no_scores(
            [s for at, s, _ in said if at == split], [g for at, _, g in said if at == split]
        )
        for split in dict.fromkeys(at for at, _, _ in said)
    }
    found: Numbers = {}
    for key in ("accuracy", "precision", "recall", "f1", "yes_rate"):
        values = [numbers[key] for numbers in by_split.values()]
        known = [value for value in values if value is not None]
        found[key] = mean(known) if len(known) == len(values) else None
        found |= {f"{split}.{key}": numbers[key] for split, numbers in by_split.items()}
    return found


def yes_no_scores(answers: list[str], golds: list[str]) -> Numbers:
    """POPE's numbers, "yes" being what is looked for: accuracy, precision, recall, F1, yes_rate.

    Where the official script divides by zero (nothing answered or due is yes) a number is None.
    """
    pairs = list(zip(answers, golds, strict=True))
    hits = sum(one == gold == "yes" for one, gold in pairs)
    said, due = answers.count("yes"), golds.count("yes")
    precision = hits / said if said else None
    recall = hits / due if due else None
    return {
        "accuracy": sum(one == gold for one, gold in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * hits / (said + due) if hits else None,
        "yes_rate": said / len(pairs),
    }


def word_accuracy(prediction: str, answer: str) -> float:
    """1 if both are equal once lowered and without punctuation and outer white space."""
    return float(_bare(prediction) == _bare(answer))


def to_square(
    box: Sequence[float], width: float | int, height: float | int
) -> tuple[float, float, float, float]:
    """A box as a share of a picture, as a share of the square it is padded to, centred.

    Source: letterbox preprocessing; for a 640 by 480 picture y' = .75 y + .125.
    """
    side = max(width, height)
    x, y = (side - width) / 2 / side, (side - height) / 2 / side
    across, down = width / side, height / side
    x1, y1, x2, y2 = box
    return (x + x1 * across, y + y1 * down, x + x2 * across, y + y2 * down)


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The box [x1, y1, x2, y2] a text spells as a Python list of four numbers, or None.

    Numbers lie in 0..1 with x1 < x2 and y1 < y2; nothing may stand around the list.
    """
    value = four_numbers(text)
    if value is None or not (0 <= value[0] < value[2] <= 1 and 0 <= value[1] < value[3] <= 1):
        return None
    return value


def four_numbers(text: str) -> tuple[float, float, float, float] | None:
    """The numbers that a text spells as a Python list of four, or None."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None  # not a literal: the model's answer, not a fault of the program
    if not isinstance(value, list) or len(value) != 4 or {*map(type, value)} - {int, float}:
        return None
    one, two, three, four = map(float, value)
    return (one, two, three, four)


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def overlap(prediction: str, box: Sequence[float]) -> float:
    """IoU of the box that a prediction spells with `box`; 0 where it spells none."""
    predicted = parse_box(prediction)
    return 0.0 if predicted is None else box_iou(predicted, box)


def box_accuracy(prediction: str, box: Sequence[float], threshold: float = 0.5) -> float:
    """1 if the prediction spells a box that overlaps `box` by at least `threshold`."""
    return float(parse_box(prediction) is not None and overlap(prediction, box) >= threshold)


# OCID-Ref's.
loose_box_accuracy = partial(box_accuracy, threshold=0.25)


def box_numbers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    """The mean IoU, and the accuracy at both thresholds."""
    pairs = [(text, e.gold) for text, e in zip(predictions, examples, strict=True)]
    found: Numbers = {"mean_iou": mean([overlap(*pair) for pair in pairs])}
    for threshold in (0.5, 0.25):
        found[f"iou_{threshold}"] = mean([box_accuracy(*pair, threshold) for pair in pairs])
    return found


def _normalised(text: str, contractions: Mapping[str, str] | None = None) -> str:
    return _vqa_words(_vqa_punctuation(_one_line(text)), contractions)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _vqa_punctuation(text: str, thousands: str = r"\d,\d") -> str:
    # Whether a mark vanishes or becomes a space is decided on the text as it came in.
    has_thousands = re.search(thousands, text) is not None
    out = text
    for mark in _PUNCTUATION:
        vanishes = has_thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", out, count=_MAX_PERIODS)


def _vqa_words(text: str, contractions: Mapping[str, str] | None = None) -> str:
    whole = CONTRACTIONS if contractions is None else contractions
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(whole.get(word, word) for word in words if word not in _ARTICLES)


def _textvqa_normalise(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _vqa_words(_vqa_punctuation(_one_line(text), thousands=r"(?<=\d),+(?=\d)"))


def _leave_one_out(prediction: str, golds: Sequence[str]) -> float:
    equal = sum(gold == prediction for gold in golds)
    # An answer that agrees with the prediction leaves one fewer among the others.
    each = [min(1.0, (equal - (gold == prediction)) / 3) for gold in golds]
    return sum(each) / len(each)


def _bare(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION).strip()


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


# What guessing scores, by task (0 to 1), and where the number stands.
VISUAL_CHANCE: dict[str, tuple[float, str]] = BENCHMARKS["chance"]["visual"]
TEXT_CHANCE: dict[str, tuple[float, str]] = BENCHMARKS["chance"]["text"]
# Named sets, and the metric where a task's own default is not what was averaged.
SUITES: dict[str, list[str]] = BENCHMARKS["suites"]
SUITE_METRICS: dict[str, dict[str, str]] = BENCHMARKS["suite_metrics"]
# Shown, and in no average: the paper leaves VizWiz out, whose prompt small models misunderstand.
NEVER_AVERAGED = frozenset({"vizwiz"})


def stable_score(scores: Mapping[str, float], chances: Mapping[str, float]) -> float:
    """The mean over tasks of score minus chance, without rescaling (paper, section 2.2).

    Raises ValueError unless both name the same tasks, at least one.
    """
    if not scores or set(scores) != set(chances):
        raise ValueError(
            f"the stable score needs the same tasks on both sides, at least one; scores without "
            f"chance: {sorted(set(scores) - set(chances))}, chances without score: "
            f"{sorted(set(chances) - set(scores))}"
        )
    return math.fsum(scores[task] - chances[task] for task in scores) / len(scores)


def averages(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The stable scores of all tasks that were asked: of vision, vision blind, and text.

    None where nothing was asked, or where a task has no score. A task without a chance level has no
    share of right answers (a perplexity) and is passed over. `_prob` is that of the continuous
    outcome `prob`, over the tasks that have it.
    """
    kept = {name: row for name, row in tasks.items() if name not in NEVER_AVERAGED}
    kept = {name: row for name, row in kept.items() if row["chance"] is not None}

    def mean_over_chance(kind: str, column: str) -> float | None:
        """The stable score of a kind of task from one column."""
        rows = {name: row for name, row in kept.items() if row["kind"] == kind}
        if not rows or any(row[column] is None for row in rows.values()):
            return None
        chances = {name: row["chance"] for name, row in rows.items()}
        return stable_score({name: row[column] for name, row in rows.items()}, chances)

    def mean_probability(kind: str) -> float | None:
        """The same of the probabilities of right answers, over what equal ones would give."""
        found = [
            row["continuous"]["prob"] - row["continuous"]["prob_chance"]
            for row in kept.values()
            if row["kind"] == kind and row["continuous"]["prob"] is not None
        ]
        return mean(found)

    return {
        "vision": mean_over_chance("vision", "score"),
        "vision_blind": mean_over_chance("vision", "blind"),
        "text": mean_over_chance("text", "score"),
        "vision_prob": mean_probability("vision"),
        "text_prob": mean_probability("text"),
    }


def suites(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stable score of every named set that some of the tasks belong to.

    `score` is None unless every task is there and whole: `missing` and `shortened` name those that
    keep it from being known. Chances are those of the published averages.
    """
    found = {}
    for name, members in SUITES.items():
        here = [task for task in members if task in tasks]
        if not here:
            continue
        # By the metric that the set takes; none where a task has it not.
        scores: dict[str, float] = {}
        metrics = SUITE_METRICS.get(name, {})
        for task in here:
            row = tasks[task]
            own = row.get("details", {}).get(metrics[task]) if task in metrics else row["score"]
            scores |= {} if own is None else {task: own}
        missing = [task for task in members if task not in scores]
        shortened = [task for task in here if tasks[task].get("shortened")]
        value = None
        if not missing and not shortened:
            chances = {**VISUAL_CHANCE, **TEXT_CHANCE}
            value = stable_score(scores, {task: chances[task][0] for task in members})
        found[name] = {"score": value, "missing": missing, "shortened": shortened}
    return found


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
