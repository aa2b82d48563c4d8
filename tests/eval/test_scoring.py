"""Hand-worked cases, one rule of the official scorers each."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.core.stats import mean_by_split, split_means, standard_error
from midstream.eval.benchmark_records import VisualExample
from midstream.eval.scoring import (
    CONTRACTIONS,
    SUITES,
    averages,
    box_accuracy,
    box_iou,
    gqa_accuracy,
    gqa_accuracy_prismatic,
    parse_box,
    pope_answer,
    qa_accuracy,
    stable_score,
    suites,
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
def test_vqa_accuracy_leaves_each_person_out_in_turn() -> None:
    for agreeing, expected in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)):
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


def test_vqa_normalisation_keeps_these_apart() -> None:
    apart = {"3.5": "35", "its": "it's", "eleven": "11", "t-shirt": "tshirt", "'tis": "tis"}
    for prediction, answer in apart.items():
        assert vqa_accuracy(prediction, ten(*[answer] * 9)) == 0.0, prediction


def test_vqa_strips_only_the_first_32_periods() -> None:
    assert vqa_accuracy("x" + "." * 32, ten(*["x"] * 9)) == 1.0
    assert vqa_accuracy("x" + "." * 33, ten(*["x"] * 9)) == 0.0


def test_vqa_normalises_nothing_but_white_space_where_all_answers_agree_and_textvqa_all() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
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
    ("prediction", "answer", "official", "prismatic"),
    [
        ("Chair.", "chair", 1.0, 1.0),
        ("T-shirt", "t-shirt", 1.0, 0.0),
        ("tshirt", "t-shirt", 0.0, 0.0),
        ("chairs", "chair", 0.0, 0.0),
        ("the chair", "chair", 0.0, 0.0),
        ("Red!", "red", 0.0, 1.0),
    ],
)
def test_gqa_forgives_a_capital_and_a_last_period_only(
    prediction: str, answer: str, official: float, prismatic: float
) -> None:
    assert gqa_accuracy(prediction, answer) == official
    assert gqa_accuracy_prismatic(prediction, answer) == prismatic


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("No", ["no"], 1.0),
        (" the two dogs.\n", ["2 dogs"], 1.0),
        ("A", ["a"], 1.0),
        ("B", ["A"], 0.0),
        ("An", ["a"], 0.0),
        ("1,000", ["1000"], 1.0),
        ("dont know", ["Don't know!"], 1.0),
        ("red", ["blue", "Red"], 1.0),
        ("reddish", ["red"], 0.0),
        ("", ["no"], 0.0),
        ("?", ["!"], 0.0),
    ],
)
def test_answers_of_ones_own_are_compared_normalised_though_there_is_one(
    prediction: str, answers: list[str], score: float
) -> None:
    assert qa_accuracy(prediction, answers) == score


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


NO_BOXES = """left|[0.1, 0.2, 0.3]|[0.1, 0.2, 0.3, 0.4, 0.5]|(0.1, 0.2, 0.3, 0.4)
[0.1, 0.2, 0.3, 1.4]|[-0.1, 0.2, 0.3, 0.4]|[0.3, 0.2, 0.3, 0.4]|[0.1, 0.5, 0.3, 0.4]
['0.1', 0.2, 0.3, 0.4]|[True, 0.2, 0.3, 0.4]|[0.1, 0.2, 0.3, 0.4] it is
[0.1, 0.2, 0.3, __import__('os')]|[nan, 0.2, 0.3, 0.4]"""


def test_parse_box_refuses_everything_but_a_list_of_four_ordered_shares() -> None:
    for text in [*re.split(r"[|\n]", NO_BOXES), "", "[" * 5000]:
        assert parse_box(text) is None, text
        assert box_accuracy(text, [0.1, 0.2, 0.3, 0.4], threshold=0.0) == 0.0


def test_box_iou_is_shared_area_over_joint_area() -> None:
    assert parse_box(" [0, 0.25, 1, 0.5]\n") == (0.0, 0.25, 1.0, 0.5)
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
    wide = to_square((0.1, 0.0, 0.5, 1.0), 640, 480)
    assert wide == pytest.approx((0.1, 0.125, 0.5, 0.875))


# Paper, Table 7, in per cent: AGIEval, ARC-easy, CC, CS algorithms, COPA, HellaSwag, MathQA,
# PIQA, PubMedQA.
TEXT_CHANCE = [20, 25, 25, 25, 50, 25, 20, 50, 100 / 3]
TABLE_7 = {
    "Ours": ([32.5, 59.3, 27.2, 35.8, 71, 58.2, 22.9, 70.5, 35.0], 15.44),
    "Ours (No FT)": ([27.7, 72.3, 30.1, 46.2, 83, 66.5, 25.9, 74.4, 38.6], 21.26),
    "Base 100 %": ([28.2, 77.1, 47.6, 46.7, 92, 72.8, 27.3, 79.1, 69.6], 29.67),
    "Llama 3.2 1B": ([21.4, 69.5, 27.2, 46.5, 83, 65.1, 30.52, 76.0, 65.8], 23.52),
    "Qwen 2.5 1.5B": ([63.6, 80.6, 57.3, 56.5, 85, 67.78, 40.84, 76.22, 66.6], 35.68),
}
# Paper, Table 8, in per cent: TextVQA, RefCOCO, POPE, GQA, VQAv2, OCID-Ref.
VISION_CHANCE = [0, 0, 50, 25, 25, 0]
TABLE_8 = {
    "Ours": ([49.05, 61.29, 87.33, 61.11, 76.82, 40.80], 47.13, 46.08),
    "Prismatic 7B": ([51.78, 73.62, 88.28, 64.16, 79.05, 50.56], 51.38, 51.25),
    "PaliGemma 3B": ([73.2, 77.9, 87.0, 67.0, 85.6], 58.14, None),
}


def score_of(row: list[float], chance: list[float]) -> float:
    tasks = [str(index) for index in range(len(row))]
    by_task = dict(zip(tasks, row, strict=True))
    return stable_score(by_task, dict(zip(tasks, map(float, chance), strict=True)))


@pytest.mark.parametrize("model", TABLE_7)
def test_stable_score_gives_table_7_from_its_rows_within_rounding(model: str) -> None:
    row, printed = TABLE_7[model]
    assert score_of(row, TEXT_CHANCE) == pytest.approx(printed, abs=0.015)


@pytest.mark.parametrize("model", TABLE_8)
def test_stable_score_gives_table_8_from_its_rows_within_rounding(model: str) -> None:
    row, without_ocid, with_ocid = TABLE_8[model]
    assert score_of(row[:5], VISION_CHANCE[:5]) == pytest.approx(without_ocid, abs=0.0151)
    if with_ocid is not None:
        assert score_of(row, VISION_CHANCE) == pytest.approx(with_ocid, abs=0.0151)


def test_vizwiz_is_shown_and_in_no_average() -> None:
    likely = {"prob": 0.6, "prob_chance": 0.5}
    row = {"kind": "vision", "score": 0.8, "blind": 0.5, "chance": 0.5, "continuous": likely}
    tasks = {"pope": row, "vizwiz": row | {"score": 0.1, "blind": 0.0, "chance": 0.0}}
    assert averages(tasks) == {
        "vision": pytest.approx(0.3),
        "vision_blind": 0.0,
        "text": None,
        "vision_prob": pytest.approx(0.1),
        "text_prob": None,
    }
    assert averages({"vizwiz": row})["vision"] is None
    assert not any("vizwiz" in members for members in SUITES.values())


def test_the_authors_script_averages_nine_tasks_with_boolq_in_place_of_cs() -> None:
    nine, authors = SUITES["text, Table 7"], SUITES["text, authors' list"]
    assert len(nine) == len(authors) == 9
    assert set(authors) - set(nine) == {"boolq"}
    assert set(nine) - set(authors) == {"bigbench_cs_algorithms_multiple_choice"}


def test_stable_score_refuses_a_task_that_is_missing_on_either_side() -> None:
    with pytest.raises(ValueError, match="chances without score: \\['pope'\\]"):
        stable_score({"gqa": 0.5}, {"gqa": 0.25, "pope": 0.5})
    with pytest.raises(ValueError, match="scores without chance: \\['pope'\\]"):
        stable_score({"gqa": 0.5, "pope": 0.7}, {"gqa": 0.25})
    with pytest.raises(ValueError, match="at least one"):
        stable_score({}, {})


def test_splits_weigh_the_same_however_many_examples_they_hold() -> None:
    scores, splits = [1.0, 1.0, 1.0, 0.0], ["random", "random", "random", "popular"]
    assert mean_by_split(scores, splits) == 0.5
    assert split_means(scores, splits) == {"random": 1.0, "popular": 0.0}


def test_standard_error_of_independent_scores_is_the_plain_formula() -> None:
    scores = [0.0, 1.0, 1.0, 0.3, 0.6]
    mean = sum(scores) / 5
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 4)
    assert standard_error(scores) == pytest.approx(deviation / math.sqrt(5))


def test_standard_error_says_nothing_about_a_single_picture() -> None:
    assert standard_error([1.0, 0.0], ["one.jpg", "one.jpg"]) is None


def test_a_whole_set_has_the_papers_average_and_anything_less_none() -> None:
    base = [percent / 100 for percent in TABLE_7["Base 100 %"][0]]
    tasks: dict[str, Any] = {
        name: {"score": 0.5 if name == "hellaswag" else score, "details": {"acc_norm": score}}
        for name, score in zip(SUITES["text, Table 7"], base, strict=True)
    }
    # HellaSwag counts normalised by length.
    assert suites(tasks)["text, Table 7"]["score"] == pytest.approx(0.2967, abs=2e-4)
    lacking = {"score": None, "missing": ["boolq"], "shortened": []}
    assert suites(tasks)["text, authors' list"] == lacking
    tasks["piqa"]["shortened"] = "100 of 1,838 examples"
    cut = {"score": None, "missing": [], "shortened": ["piqa"]}
    assert suites(tasks)["text, Table 7"] == cut
    del tasks["hellaswag"]["details"]["acc_norm"]
    assert suites(tasks)["text, Table 7"]["missing"] == ["hellaswag"]
