"""Hand-worked cases, one rule of the official scorers each."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.eval.records import VisualExample
from midstream.eval.scoring import (
    CONTRACTIONS,
    box_accuracy,
    box_iou,
    choice_letter,
    gqa_accuracy,
    gqa_accuracy_prismatic,
    parse_box,
    pope_answer,
    textvqa_accuracy,
    to_square,
    vizwiz_accuracy,
    vizwiz_numbers,
    vqa_accuracy,
    vqa_accuracy_prismatic,
    yes_no_scores,
)


def ten(*answers: str) -> list[str]:
    """The given answers, filled up to ten with one that nobody predicts."""
    return [*answers, *["zzz"] * (10 - len(answers))]


# Two of ten agree: those two see one other, the eight see two: (2 * 1/3 + 8 * 2/3) / 10.
@pytest.mark.parametrize(
    ("agreeing", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)],
)
def test_vqa_accuracy_leaves_each_person_out_in_turn(agreeing: int, expected: float) -> None:
    assert vqa_accuracy("cat", ten(*["cat"] * agreeing)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("red\nball", "red ball"),  # line breaks and tabs are spaces
        ("\tred ball ", "red ball"),
        ("t-shirt", "t shirt"),  # a mark inside a word becomes a space
        ("hat, scarf", "hat scarf"),  # a mark beside a space vanishes
        ("hat,scarf - red", "hat scarf red"),  # ... and that is judged mark by mark
        ("1,000", "1000"),  # a comma between digits: every mark vanishes
        ("1,000 a/b", "1000 ab"),
        ("mr. x", "mr x"),  # periods go
        ("3.5", "3.5"),  # ... unless a digit follows
        ("No.5", "no.5"),
        ("Two Dogs", "2 dogs"),  # number words
        ("none", "0"),
        ("the cat on a mat", "cat on mat"),  # articles
        ("dont know", "don't know"),  # contractions
        ("couldnt've", "couldn'tve"),
        ("somebody'd", "somebodyd"),  # the official table's own slip
    ],
)
def test_vqa_normalisation_makes_these_equal(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, ten(*[answer] * 9)) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("3.5", "35"), ("its", "it's"), ("eleven", "11"), ("t-shirt", "tshirt"), ("'tis", "tis")],
)
def test_vqa_normalisation_keeps_these_apart(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, ten(*[answer] * 9)) == 0.0


def test_vqa_strips_only_the_first_32_periods() -> None:
    assert vqa_accuracy("x" + "." * 32, ten(*["x"] * 9)) == 1.0
    assert vqa_accuracy("x" + "." * 33, ten(*["x"] * 9)) == 0.0


def test_vqa_normalises_nothing_but_white_space_where_all_answers_agree() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_textvqa_normalises_even_where_all_answers_agree() -> None:
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1.0
    assert textvqa_accuracy("nobody", ["yes"] * 10) == 0.0


def test_textvqa_drops_commas_and_question_marks_first_and_parts_the_genitive() -> None:
    # A comma inside a word becomes a space in VQA, and nothing in TextVQA.
    assert textvqa_accuracy("red,blue", ten(*["redblue"] * 4)) == 1.0
    assert vqa_accuracy("red,blue", ten(*["redblue"] * 4)) == 0.0
    assert textvqa_accuracy("joe's", ten(*["joe 's"] * 4)) == 1.0
    assert vqa_accuracy("joe's", ten(*["joe 's"] * 4)) == 0.0
    assert textvqa_accuracy("what's", ten(*["whats"] * 4)) == 0.0  # "what 's" is no contraction


def test_contractions_map_lowered_words_to_a_form_with_an_apostrophe() -> None:
    assert CONTRACTIONS["arent"] == "aren't"
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert not {"its", "were", "shed", "wed", "hell", "ill", "im"} & set(CONTRACTIONS)
    assert all(key == key.lower() for key in CONTRACTIONS)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Chair.", "chair", 1.0),
        ("T-shirt", "t-shirt", 1.0),
        ("tshirt", "t-shirt", 0.0),
        ("chairs", "chair", 0.0),
        ("the chair", "chair", 0.0),
    ],
)
def test_gqa_forgives_a_capital_and_a_last_period_only(
    prediction: str, answer: str, score: float
) -> None:
    assert gqa_accuracy(prediction, answer) == score


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes, there is.", "yes"),
        ("No, there is none.", "no"),
        ("There is not a dog.", "no"),
        ("no", "no"),
        ("It is. No.", "yes"),  # only the words up to the first period count
        ("NO", "yes"),  # the rule knows No, no and not
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_answers_by_the_official_rule(text: str, answer: str) -> None:
    assert pope_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "(0.1, 0.2, 0.3, 0.4)",
        "[0.1, 0.2, 0.3, 1.4]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[0.3, 0.2, 0.3, 0.4]",
        "[0.1, 0.5, 0.3, 0.4]",
        "['0.1', 0.2, 0.3, 0.4]",
        "[True, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 0.4] it is",
        "[0.1, 0.2, 0.3, __import__('os')]",
        "[nan, 0.2, 0.3, 0.4]",
        "[" * 5000,
    ],
)
def test_parse_box_refuses_everything_but_a_list_of_four_ordered_shares(text: str) -> None:
    assert parse_box(text) is None
    assert box_accuracy(text, [0.1, 0.2, 0.3, 0.4], threshold=0.0) == 0.0


def test_parse_box_reads_a_list_with_outer_white_space() -> None:
    assert parse_box(" [0, 0.25, 1, 0.5]\n") == (0.0, 0.25, 1.0, 0.5)


def test_box_iou_is_shared_area_over_joint_area() -> None:
    assert box_iou([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]) == 1.0
    assert box_iou([0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]) == 0.0
    assert box_iou([0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0]) == pytest.approx(1 / 3)
    assert box_iou([0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]) == 0.0


def test_box_accuracy_counts_an_overlap_equal_to_the_threshold() -> None:
    assert box_accuracy("[0.0, 0.0, 0.5, 1.0]", [0.0, 0.0, 1.0, 1.0], threshold=0.5) == 1.0
    assert box_accuracy("[0.0, 0.0, 0.49, 1.0]", [0.0, 0.0, 1.0, 1.0], threshold=0.5) == 0.0
    assert box_accuracy("[0.0, 0.0, 0.49, 1.0]", [0.0, 0.0, 1.0, 1.0], threshold=0.25) == 1.0


SAME, MIXED = ["blue"] * 10, ["Blue."] * 4 + ["the blue"] * 3 + ["navy"] * 3


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "prismatic", "vizwiz"),
    [
        # Nothing but white space is normalised where all agree; the Prismatic authors always do.
        ("Blue", SAME, 0.0, 1.0, 1.0),
        ("blue\n", SAME, 1.0, 1.0, 1.0),
        # Their answers keep capitals and articles, of which a prediction is rid: nothing is equal.
        ("the Blue", MIXED, 1.0, 0.0, 0.0),
        ("navy", MIXED, 0.9, 0.9, 0.9),
        ("arent", ["aren't"] * 5 + ["arent"] * 5, 1.0, 1.0, 1.0),
        # VizWiz writes back-ticks for most contractions, so that these never match.
        ("whats", ["what's"] * 5 + ["whats"] * 5, 1.0, 1.0, 0.0),
    ],
)
def test_three_variants_of_vqa_accuracy(
    prediction: str, answers: list[str], official: float, prismatic: float, vizwiz: float
) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(official)
    assert vqa_accuracy_prismatic(prediction, answers) == pytest.approx(prismatic)
    assert vizwiz_accuracy(prediction, {"answers": answers}) == pytest.approx(vizwiz)


def answerable(*each: bool) -> list[VisualExample]:
    return [VisualExample("1", "Is it?", Path("a.jpg"), {"answerable": one}) for one in each]


def test_unanswerable_questions_have_a_precision_and_an_f1() -> None:
    said = ["unanswerable", "Unanswerable.", "red", "no"]
    found = vizwiz_numbers(said, answerable(False, True, False, True))
    # One of two said is one; one of two that are was said: .5 * .5 + .5 * 2/4.
    assert found["unanswerable_average_precision"] == pytest.approx(0.5)
    assert found["unanswerable_f1"] == pytest.approx(0.5)
    assert vizwiz_numbers(["a"], answerable(True))["unanswerable_f1"] is None
    none_said = vizwiz_numbers(["a", "b"], answerable(True, False))
    assert none_said == {"unanswerable_average_precision": 0.5, "unanswerable_f1": 0.0}


def test_popes_numbers() -> None:
    found = yes_no_scores(["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"])
    assert found == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_rate": 0.5}
    never = yes_no_scores(["no", "no"], ["yes", "no"])
    assert (never["accuracy"], never["precision"], never["f1"]) == (0.5, None, None)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        (" B. two dogs", 1),
        ("B: two", 1),
        ("B)", 1),
        ("Two dogs", None),
        ("The", None),
        ("A man", None),
        ("E", None),
        ("", None),
        ("AB", None),
    ],
)
def test_a_letter_is_an_answer_and_a_word_is_none(text: str, index: int | None) -> None:
    assert choice_letter(text, 4) == index


@given(
    st.lists(st.floats(0.01, 0.98), min_size=4, max_size=4),
    st.integers(1, 4000),
    st.integers(1, 4000),
)
def test_a_box_keeps_its_pixels_in_the_square_that_its_picture_is_padded_to(
    sides: list[float], width: int, height: int
) -> None:
    box = to_square(sides, width, height)
    longest = max(width, height)
    for at, side in enumerate((width, height, width, height)):
        pixel = sides[at] * side + (longest - side) / 2
        assert box[at] * longest == pytest.approx(pixel, abs=1e-6)


def test_a_box_of_a_wide_picture_moves_down_in_the_square() -> None:
    assert to_square((0.1, 0.0, 0.5, 1.0), 640, 480) == pytest.approx((0.1, 0.125, 0.5, 0.875))


@pytest.mark.parametrize(
    ("prediction", "answer", "official", "prismatic"),
    [("T-shirt.", "t-shirt", 1.0, 0.0), ("tshirt", "t-shirt", 0.0, 0.0), ("Red!", "red", 0.0, 1.0)],
)
def test_two_variants_of_gqa(
    prediction: str, answer: str, official: float, prismatic: float
) -> None:
    assert gqa_accuracy(prediction, answer) == official
    assert gqa_accuracy_prismatic(prediction, answer) == prismatic
