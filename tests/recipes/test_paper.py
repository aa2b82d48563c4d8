"""The paper's experiments: counted as by hand, with its settings, at every scale."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from midstream.cli.catalogue import find_study
from midstream.config.training import rate_at
from midstream.cost.graph import missing_inputs, order, plan
from midstream.recipes import paper
from midstream.recipes.paper.suites import AUTHORS_LATER_RUNS, AUTHORS_RUNS, AuthorsRun
from midstream.recipes.pocket import MILESTONES, when_images_arrive
from midstream.recipes.scales import SIZES, find_scale
from midstream.study.stages import LoadDecoder, Pretrain
from midstream.study.store import Ledger
from midstream.study.studies import AnyStudy, Suite

suite = cache(paper.suite)


def kinds(study: AnyStudy) -> Counter[str]:
    return Counter(stage.kind for stage in order(study))


def test_the_papers_sections_are_114_lines_on_24_image_text_stages() -> None:
    sections = paper.sections(scale="1b")
    counted = kinds(sections)
    assert len(sections.lines) == 114
    assert (counted["continue"], counted["finetune"]) == (24, 98)


@pytest.mark.parametrize(("text", "by_hand"), [("given", 3.98), ("trained", 49.5)])
def test_sharing_saves_what_was_computed_by_hand(text: str, by_hand: float, tmp_path: Path) -> None:
    # By hand: 665 thousand conversations, logits everywhere; here 625 thousand, logits at targets.
    work = plan(paper.sections(scale="1b", text=text), Ledger(tmp_path))
    assert work.naive_flops / work.shared_flops == pytest.approx(by_hand, rel=0.025)
    assert work.num_unknown == 0


@pytest.mark.parametrize("size", SIZES)
def test_every_experiment_is_a_study_at_every_scale(size: str) -> None:
    for study in (paper.figures(scale=size), *suite(scale=size).studies):
        assert study.name.endswith(f".{size}")
        assert len({line for line, _ in study.named_results}) == len(study.named_results) > 0


@pytest.mark.parametrize("size", ["pocket", "1b"])
def test_claims_and_printed_numbers_lie_on_axes_that_lines_have(size: str) -> None:
    for study in suite(scale=size).studies:
        places = [claim.higher for claim in study.claims] + [claim.lower for claim in study.claims]
        places += [number.at for number in (study.table.printed if study.table else ())]
        for place in places:
            assert any(place.items() <= line.axes.items() for line in study.lines), place


def test_a_whole_suite_at_1b_has_the_authors_runs_and_runs_no_text() -> None:
    whole = suite(scale="1b")
    assert {study.name.split(".")[1] for study in whole.studies} >= {
        *(f"figure_{number}" for number in (4, 5, 6, 7, 8, 14)),
        *(f"table_{number}" for number in range(3, 9)),
        "authors_runs",
    }
    assert not any(isinstance(stage, Pretrain) for stage in order(whole))
    assert {stage.planned_rate for stage in order(whole) if isinstance(stage, LoadDecoder)} >= {
        0.009080349589287376,
        0.0009788970261355868,
    }


def test_a_study_without_inputs_says_what_it_lacks() -> None:
    lacks = missing_inputs(paper.figure_4(scale="1b"))
    assert any("data" in one for one in lacks)
    assert any("siglip" in one for one in lacks)
    assert sum("language model" in one for one in lacks) == 5
    assert missing_inputs(paper.figure_4(scale="pocket")) == ()


def test_the_trained_text_run_at_1b_passes_near_the_recorded_rates() -> None:
    text = find_scale("1b", text="trained").text
    given = find_scale("1b").text
    assert not isinstance(given, Pretrain)
    total = text.training.budget.total_tokens  # type: ignore[union-attr]
    # The records' checkpoints lie at 19.7, 40.4, 60.2 and 80.1 %.
    for share in (0.2, 0.4, 0.6, 0.8):
        here = rate_at(text.training.schedule, round(share * total), total)
        assert here == pytest.approx(given[share].planned_rate, rel=0.012)


def test_a_suite_refuses_two_studies_of_one_name() -> None:
    one, other = paper.figure_8(seeds=(7,)), paper.figure_8(seeds=(8,))
    with pytest.raises(ValueError, match="and different content"):
        Suite(name="both", question="?", studies=(one, other))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["scale=2b"], "no scale '2b'; there are pocket"),
        (["scale=1b", "text=borrowed"], "'given' or 'trained'"),
        (["text=given"], "pocket scale is generated"),
    ],
)
def test_what_no_scale_has_is_refused(settings: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        find_study("paper.figure_4", settings)


def mixture(run: AuthorsRun) -> tuple[float, float, float]:
    return run.caption_share, run.instruct_share, run.text_share


def test_both_lists_together_hold_a_whole_grid_up_to_ten_per_cent_pictures():
    runs = [run for run in (*AUTHORS_RUNS, *AUTHORS_LATER_RUNS) if run.text_share != 0.8]
    runs = [run for run in runs if run.caption_set == "DataComp-DR"]
    assert len({mixture(run) for run in runs}) == 13
    at = Counter((*mixture(run), run.completion) for run in runs)
    assert len(at) == 13 * 6
    # Five epochs were tried at 40 % alone.
    assert Counter(at.values()) == {4: 73, 5: 5}
    assert {key[3] for key, number in at.items() if number == 5} == {0.4}


def test_all_lines_share_one_text_run_whatever_completions_are_asked_for() -> None:
    runs = {
        stage.identity
        for completions in ((0.0, 1.0), MILESTONES)
        for stage in order(when_images_arrive(completions=completions))
        if isinstance(stage, Pretrain)
    }
    assert len(runs) == 1
