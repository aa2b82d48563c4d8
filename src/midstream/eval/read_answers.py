"""What a written answer says, where only some can be right: an option, True or False, a box.

The functions that `benchmarks.toml` has under `parse` take an answer and its example, and are None
of what the benchmark's scorer cannot read.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from midstream.eval.benchmark_records import VisualExample
from midstream.eval.scoring import (
    LETTERS,
    box_iou,
    mean,
    overlap,
    parse_box,
    plain_answer,
    pope_answer,
    to_square,
    word_accuracy,
)

# A mean IoU that is higher by so much tells how boxes are meant.
_TELLING = 0.2
_YES_NO = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)
_Box = tuple[float, float, float, float]
# PaliGemma's <loc0123> and Florence's <loc_123>; what a box is of; numbers that are no part of a
# name.
_LOCATION = re.compile(r"<loc_?(\d+)>")
_NAMED = re.compile(r"<ref>.*?</ref>|<\|object_ref_start\|>.*?<\|object_ref_end\|>", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")

_SAYS = r"(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\b(?:\s+is)?\s*:?"
_STARS = r"\*{0,2}\s*"
# A letter in brackets or between asterisks stands for itself; a bare one where its clause ends.
_LETTER = re.compile(
    rf"\s*{_STARS}(?:{_SAYS}\s*{_STARS})?(?:option\s+)?"
    r"(?:[(\[]([a-z])[)\]]|(?<=\*\*)([a-z])\*\*"
    r"|[(\"']?([a-z])[\"']?\*{0,2}[^\S\n]*(?:$|[.:)\n]|[-–—]\s"
    # Two letters name none.
    r"|,(?!\s*(?:(?:and|or)\s+)?\(?[a-z]\)?\s*(?:$|[.,)\n]|(?:and|or)\b))))",
    re.IGNORECASE,
)


def choice_letter(text: str, num_choices: int = len(LETTERS)) -> int | None:
    """Which option a text names by its letter: "B", "(b)", "B. two", "Answer: B" -> 1; else None.

    A capital that merely begins a sentence names nothing.
    """
    found = _LETTER.match(text)
    if found is None:
        return None
    number = ord(next(filter(None, found.groups())).upper()) - ord("A")
    return number if number < num_choices else None


def named_option(text: str, choices: Sequence[str]) -> int | None:
    """Which option a text names by its letter, else by its whole text; None where by neither."""
    index = choice_letter(text, len(choices))
    if index is not None:
        return index
    said = [at for at, choice in enumerate(choices) if plain_answer(choice) == plain_answer(text)]
    return said[0] if len(said) == 1 else None


def letter_accuracy(prediction: str, gold: Mapping[str, Any]) -> float:
    """1 if the prediction names option `gold["index"]` of `gold["choices"]`."""
    return float(named_option(prediction, gold["choices"]) == gold["index"])


def read_option(text: str, example: VisualExample) -> int | None:
    """The number of the option that is named."""
    return named_option(text, example.gold["choices"])


def read_choice(text: str, example: VisualExample) -> str | None:
    """The answer as it is compared; where there are choices it is one of them."""
    said = plain_answer(text)
    return said if not example.choices or said in map(plain_answer, example.choices) else None


def read_statement(text: str, example: VisualExample) -> str | None:
    """Which of the two choices (True, False) is said."""
    return next((one for one in example.choices if word_accuracy(text, one)), None)


def pope_note(predictions: Sequence[str], examples: Sequence[VisualExample]) -> str | None:
    """How many answers say neither yes nor no, which POPE's rule counts as yes; how many begin with
    one of them and are counted as the other ("**No**", "NO")."""
    words = [_YES_NO.search(text) for text in predictions]
    unsaid = [text for text, word in zip(predictions, words, strict=True) if word is None]
    turned = [
        text
        for text, word in zip(predictions, words, strict=True)
        if word is not None and (word[0].lower() == "yes") != (pope_answer(text) == "yes")
    ]
    told = {
        "say neither yes nor no, such as {}, which POPE's rule counts as yes": unsaid,
        "say first what POPE's rule does not read, such as {}": turned,
    }
    parts = [
        f"{len(own):,} answers {how.format(repr(own[0][:40]))}" for how, own in told.items() if own
    ]
    return "; ".join(parts) or None


def read_box(text: str, example: VisualExample) -> tuple[float, float, float, float] | None:
    """The box [x1, y1, x2, y2] as shares of the picture."""
    return parse_box(text)


def box_note(predictions: Sequence[str], examples: Sequence[VisualExample]) -> str | None:
    """How else boxes seem to be meant, where that lies much nearer to the right ones."""
    found = [(_four_within(text), text, e) for text, e in zip(predictions, examples, strict=True)]
    boxes = [(box, text, e) for box, text, e in found if box is not None]
    ways = {
        name: mean([box_iou(way(box, e), e.gold) for box, _, e in boxes]) for name, way in _WAYS
    }
    ways[_SQUARE] = mean(
        [box_iou(box, to_square(e.gold, *e.size)) for box, _, e in boxes if e.size is not None]
    )
    usual = mean([overlap(text, e.gold) for _, text, e in boxes])
    best = max(ways, key=lambda way: ways[way] or 0.0)
    other = ways[best] or 0.0
    if usual is None or other <= usual + _TELLING:
        return None
    return f"the mean IoU is {usual:.2f}; read as {best}, the boxes would have {other:.2f}"


def _four_within(text: str) -> _Box | None:
    """The four numbers of a text, in whatever marks they stand; None of more or fewer."""
    bare = _NAMED.sub(" ", _LOCATION.sub(r" \1 ", text))
    numbers = [float(number) for number in _NUMBER.findall(bare)]
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else None


def _by_size(box: _Box, example: VisualExample) -> _Box:
    width, height = example.size or (1, 1)
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _over(side: float) -> Callable[[_Box, VisualExample], _Box]:
    return lambda box, _: (box[0] / side, box[1] / side, box[2] / side, box[3] / side)


_SQUARE = "shares of the square that a picture is padded to (--box-frame square)"
_WAYS: tuple[tuple[str, Callable[[_Box, VisualExample], _Box]], ...] = (
    ("the four numbers as they stand", _over(1)),
    ("[x, y, width, height]", lambda b, _: (b[0], b[1], b[0] + b[2], b[1] + b[3])),
    ("[y1, x1, y2, x2]", lambda b, _: (b[1], b[0], b[3], b[2])),
    ("[x1, y1, x2, y2] in pixels", _by_size),
    ("[x1, y1, x2, y2] in thousandths", _over(1000)),
    ("[x1, y1, x2, y2] in hundredths", _over(100)),
    (
        "[y1, x1, y2, x2] in 1,024ths",
        lambda b, _: (b[1] / 1024, b[0] / 1024, b[3] / 1024, b[2] / 1024),
    ),
)
