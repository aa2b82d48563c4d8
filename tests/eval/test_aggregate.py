"""The stable score against the paper's tables, and standard errors against worked cases."""

import math
import random

import pytest

from midstream.core.stats import mean_by_split, split_means, standard_error
from midstream.eval.scoring import SUITES, averages, stable_score

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
BASE_80 = ([19.4, 74.7, 40.8, 44.6, 86, 69.2, 26.9, 76.6, 66.2], 25.73)
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


def test_table_7_prints_056_more_for_base_80_than_its_rows_give() -> None:
    """An error of about half a point in one of the printed rows; no rounding explains it."""
    row, printed = BASE_80
    assert printed - score_of(row, TEXT_CHANCE) == pytest.approx(0.056, abs=0.001)


@pytest.mark.parametrize("model", TABLE_8)
def test_stable_score_gives_table_8_from_its_rows_within_rounding(model: str) -> None:
    row, without_ocid, with_ocid = TABLE_8[model]
    assert score_of(row[:5], VISION_CHANCE[:5]) == pytest.approx(without_ocid, abs=0.0151)
    if with_ocid is not None:
        assert score_of(row, VISION_CHANCE) == pytest.approx(with_ocid, abs=0.0151)


def test_vizwiz_is_shown_and_in_no_average() -> None:
    row = {"kind": "vision", "score": 0.8, "blind": 0.5, "chance": 0.5}
    tasks = {"pope": row, "vizwiz": row | {"score": 0.1, "blind": 0.0, "chance": 0.0}}
    assert averages(tasks) == {"vision": pytest.approx(0.3), "vision_blind": 0.0, "text": None}
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


def test_standard_error_does_not_shrink_when_every_question_is_asked_four_times() -> None:
    scores = [float(random.Random(index).random() < 0.5) for index in range(40)]
    once = standard_error(scores)
    groups = [str(index) for index in range(40)] * 4
    assert once is not None
    assert standard_error(scores * 4, groups) == pytest.approx(once)
    wrong = standard_error(scores * 4)
    assert wrong is not None
    assert wrong < 0.6 * once


def test_standard_error_over_splits_agrees_with_repeated_sampling() -> None:
    sizes, rates = {"a": 60, "b": 20}, {"a": 0.9, "b": 0.4}
    splits = [split for split, size in sizes.items() for _ in range(size)]
    draws = random.Random(1)
    samples = [[float(draws.random() < rates[split]) for split in splits] for _ in range(800)]
    means = [mean_by_split(sample, splits) for sample in samples]
    centre = sum(means) / len(means)
    spread = math.sqrt(sum((mean - centre) ** 2 for mean in means) / len(means))
    errors = [standard_error(sample, splits=splits) or 0.0 for sample in samples]
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)


def test_standard_error_says_nothing_about_a_single_picture() -> None:
    assert standard_error([1.0, 0.0], ["one.jpg", "one.jpg"]) is None
