"""What written answers say: options by letter and by text, True or False, yes or no."""

import re
from pathlib import Path
from typing import Any

import pytest

from midstream.eval.read_answers import (
    box_note,
    choice_letter,
    letter_accuracy,
    named_option,
    pope_note,
    read_choice,
    read_statement,
)
from midstream.eval.scoring import to_square
from midstream.eval.tasks import VISUAL_FORMATS, VisualExample

NAMING_B = """B|b|(B)|[b]| B. two dogs|B: two|B)|(B|(B) two|'B'|"B"|**B**|**B** because|B - two
Answer: B|The answer is B.|Option B|The correct answer is (B) two|Answer: **B**|**Answer:** B
**Final answer: B**|the correct answer is option b|B, a dog|B, because"""
NAMING_NONE = """Two dogs|The|A man|A dog.|E||AB|(AB)|A's leaf|a-shaped|A or B|A, B|A, B and C
a, c, and d|The answer is a dog.|Answer|answering A|Both A and B|I'm sure"""


def test_a_letter_is_an_answer_and_a_word_is_none() -> None:
    for text in [*re.split(r"[|\n]", NAMING_B), "B\nBecause it is."]:
        assert choice_letter(text, 4) == 1, text
    for text in re.split(r"[|\n]", NAMING_NONE):
        assert choice_letter(text, 4) is None, text


def test_an_options_whole_text_names_it_where_no_letter_does() -> None:
    options = ("mouth", "eye", "2")
    said = {"The Mouth.": 0, "b": 1, "2": 2, "two": 2, "eye socket": None, "C": 2}
    for text, index in said.items():
        assert named_option(text, options) == index
        assert letter_accuracy(text, {"index": 0, "choices": options}) == float(index == 0)


def test_equal_options_are_named_by_their_letters_alone() -> None:
    assert named_option("dog", ("dog", "Dog", "cat")) is None
    assert named_option("B", ("dog", "Dog", "cat")) == 1


def example(gold: Any, *choices: str) -> VisualExample:
    return VisualExample("1", "Is it?", Path("a.jpg"), gold, choices=choices)


def test_a_statement_is_true_or_false_and_nothing_else() -> None:
    about = example("True", "True", "False")
    said = [read_statement(text, about) for text in ("true.", "FALSE", "yes", "1", "True, it is")]
    assert said == ["True", "False", None, None, None]


def test_an_answer_among_choices_is_one_of_them_once_normalised() -> None:
    about = example(["yes"], "yes", "no")
    assert [read_choice(text, about) for text in ("Yes.", "the no", "A")] == ["yes", "no", None]
    assert read_choice("A", example(["a"])) == "a"


def test_answers_that_pope_takes_for_yes_though_they_say_nothing_are_told() -> None:
    examples = [example("yes", "Yes", "No")] * 3
    assert pope_note(["Yes", "no.", "There is not."], examples) is None
    assert "2 answers say neither yes nor no, such as 'B'" in str(
        pope_note(["B", "nothing", "no"], examples)
    )
    assert "2 answers say first what POPE's rule does not read, such as '**No**'" in str(
        pope_note(["**No**", "Yes, there is no doubt", "no"], examples)
    )


def test_what_can_be_read_is_said_wherever_answers_may_be_unreadable() -> None:
    reads = {name: row.reads for name, row in VISUAL_FORMATS.items() if row.reads}
    assert {"refcoco", "vsr", "nlvr2", "tallyqa", "ai2d", "blink", "muirbench", "qa"} <= set(reads)
    assert all("is" in text.split() and "\n" not in text for text in reads.values())


@pytest.mark.parametrize("way", ["width, height", "y1, x1", "--box-frame square", ""])
def test_boxes_that_are_meant_otherwise_are_told(way: str) -> None:
    golds = [(0.1, 0.5, 0.3, 0.9), (0.6, 0.1, 0.9, 0.3)]
    examples = [
        VisualExample(str(number), "?", Path("a.png"), list(gold), size=(640, 160))
        for number, gold in enumerate(golds)
    ]
    said = {
        "width, height": lambda a, b, c, d: [a, b, c - a, d - b],
        "y1, x1": lambda a, b, c, d: [b, a, d, c],
        "--box-frame square": lambda *box: list(to_square(box, 640, 160)),
        "": lambda *box: list(box),
    }[way]
    # Answers without a box say nothing about how the others are meant.
    answers = [*(str(said(*gold)) for gold in golds), *["no box"] * 5]
    note = box_note(answers, [*examples, *examples[:1] * 5])
    assert note is None if not way else note is not None and way in note


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("<ref>2 men</ref><box>({0},{1}),({2},{3})</box>", "[x1, y1, x2, y2] in thousandths"),
        ("a man<loc_{0}><loc_{1}><loc_{2}><loc_{3}>", "[x1, y1, x2, y2] in thousandths"),
        ("<loc{1:04}><loc{0:04}><loc{3:04}><loc{2:04}> man", "[y1, x1, y2, x2] in 1,024ths"),
        ('```json\n[{{"bbox_2d": [{0}, {1}, {2}, {3}]}}]\n```', "[x1, y1, x2, y2] in pixels"),
        ("It is at [0.{0:02}, 0.{1:02}, 0.{2:02}, 0.{3:02}].", "the four numbers as they stand"),
    ],
)
def test_the_way_of_boxes_that_cannot_be_read_is_told(written: str, told: str) -> None:
    golds = [(0.1, 0.5, 0.3, 0.9), (0.6, 0.1, 0.9, 0.3)]
    size = (320, 160)
    sides = {"thousandths": (1000,) * 4, "1,024ths": (1024,) * 4, "pixels": size * 2}
    side = next((own for end, own in sides.items() if told.endswith(end)), (100,) * 4)
    examples = [VisualExample(str(gold), "?", Path("a.png"), gold, size=size) for gold in golds]
    texts = [
        written.format(*(round(share * own) for share, own in zip(gold, side, strict=True)))
        for gold in golds
    ]
    note = box_note(texts, examples)
    assert note is not None
    assert f"the mean IoU is 0.00; read as {told}, the boxes would have" in note
