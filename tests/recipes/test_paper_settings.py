"""The paper's own settings in the resolved recipes, value by value."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from midstream.cli.catalogue import find_study
from midstream.config import PublicFolder, TokenizerFile
from midstream.cost.cost import cost, images_seen
from midstream.cost.graph import order
from midstream.cost.questions import TEXT_SIZES, VISUAL_SIZES
from midstream.recipes import paper
from midstream.recipes.lines import IMAGE_TEXT, TEXT_RUN
from midstream.recipes.paper.suites import AUTHORS_LATER_RUNS, LISTS
from midstream.recipes.paper.table_studies import TABLE_7, TABLE_8
from midstream.recipes.published_recipes import RECIPES
from midstream.recipes.scales import find_scale
from midstream.study.stages import Continue, Finetune, Pretrain
from midstream.study.studies import Study


def continued(study: Study) -> list[Continue]:
    return [stage for stage in order(study) if isinstance(stage, Continue)]


def shares(stage: Continue | Pretrain) -> dict[str, tuple[float, str]]:
    budget = stage.training.budget
    return {share.source: (share.share, share.caption) for share in budget.shares}


@pytest.mark.parametrize("caption", ["original", "synthetic", "random"])
def test_one_argument_chooses_the_caption_of_datacomp_dr_alone(caption: Any) -> None:
    study = find_study("paper.table_4", ["scale=79m", f"caption={caption}"])
    found = [shares(stage) for stage in continued(study)]
    assert {one["datacompdr"][1] for one in found if "datacompdr" in one} == {caption}
    assert {one["cc12m"][1] for one in found if "cc12m" in one} == {"original"}


def test_text_is_three_sources_in_the_text_run_and_others_in_image_text_training() -> None:
    at = find_scale("1b", text="trained")
    run, seen = shares(at.text), shares(continued(paper.figure_8(scale="1b"))[0])
    assert set(run) == {"dclm", "starcoder", "proofpile"}
    assert set(seen) == {"datacompdr", "dclm", "starcoder", "mathpile"}
    assert run["dclm"][0] == 0.92
    assert seen["dclm"][0] == pytest.approx(0.9 * 0.92)
    for mixture in (TEXT_RUN, IMAGE_TEXT):
        assert sum(share for _, share in mixture) == pytest.approx(1.0, abs=1e-12)
    expected = {source.name: source.num_tokens for source in at.data.expected}
    whole = sum(expected[name] for name in run)
    assert whole == pytest.approx(4_172_903_282_931, abs=2)
    assert expected["dclm"] / whole == pytest.approx(0.92)


@pytest.mark.parametrize("given", ["dclm", {"dclm": 0.5, "mine": 0.5}, {"dclm": 1}])
def test_one_argument_changes_the_text_of_both_stages(given: Any) -> None:
    at = find_scale("79m", text_mixture=given)
    seen = shares(continued(paper.figure_8(scale="79m", text_mixture=given))[0])
    wanted = {given} if isinstance(given, str) else set(given)
    assert set(shares(at.text)) == wanted == set(seen) - {"datacompdr"}
    assert sum(share for share, _ in seen.values()) == pytest.approx(1.0)


def test_text_shares_that_do_not_add_up_are_refused_with_their_sum() -> None:
    with pytest.raises(ValueError, match=r"add up to 0\.8"):
        find_scale("79m", text_mixture={"dclm": 0.5, "starcoder": 0.3})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rows": "padded"}, "rows is 'filled' or 'paper'"),
        ({"caption": "both"}, "caption is 'random' or 'synthetic'"),
        ({"caption": "synthetic", "scale": "pocket"}, "own captions alone"),
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, Any], told: str) -> None:
    values: dict[str, Any] = {"scale": "79m"} | settings
    with pytest.raises(ValueError, match=told):
        paper.figure_8(**values)


def test_rows_of_the_paper_mix_by_sequences_with_one_picture_a_padded_row() -> None:
    names, scales = ("paper.figure_4", "paper.table_8", "published.table1"), ("1b", "pocket", "1b")
    for name, scale in zip(names, scales, strict=True):
        for rows, by, layout in (("filled", "tokens", "filled"), ("paper", "sequences", "padded")):
            for stage in order(find_study(name, [f"scale={scale}", f"rows={rows}"])):
                if isinstance(stage, Continue):
                    assert stage.training.budget.by == by  # type: ignore[union-attr]
                if isinstance(stage, Continue | Finetune):
                    assert stage.training.rows.layout == layout


def test_a_tenth_is_379_or_281_million_pictures_by_the_unit_of_a_share() -> None:
    (stage,) = continued(paper.table_8(scale="1b"))
    assert images_seen(stage, None, "tokens") == pytest.approx(3.79e6, rel=2e-3)
    assert images_seen(stage, None, "sequences") == pytest.approx(2.81e6, rel=2e-3)


def test_z_loss_of_the_text_run_is_that_of_its_records() -> None:
    losses = {
        size: find_scale(size, text="trained").text.training.optimizer.z_loss
        for size in ("79m", "411m", "1b")
    }
    assert losses == {"79m": 1e-4, "411m": 1e-4, "1b": 1e-6}


def test_rates_at_given_checkpoints_are_those_of_the_run_names() -> None:
    rates = {
        "154m": {0.2: 0.0027302113853274333, 0.8: 0.000388134179188036},
        "411m": {0.4: 0.002010618392029235, 0.6: 0.0011054291676185495},
        "1b": {0.2: 0.009080349589287376, 0.8: 0.0009788970261355868},
    }
    for size, known in rates.items():
        text = find_scale(size, text="given").text
        assert not isinstance(text, Pretrain)
        assert {share: text[share].planned_rate for share in known} == known


def test_conflicts_of_paper_and_records_are_told_to_the_reader() -> None:
    told = " ".join(paper.figure_4(scale="1b").notes)
    for word in ("3e-5", "1e-5", "512", "256", "does not say which of DataComp-DR's captions"):
        assert word in told


def test_every_connector_that_is_replaced_is_named() -> None:
    for recipe in RECIPES:
        connector = [note for note in recipe.notes if "projector" in note]
        # The others have their own kind.
        assert len(connector) == (recipe.connector.kind == "mlp"), recipe.name


def test_the_suite_asks_every_run_of_both_of_the_authors_lists() -> None:
    study = paper.authors_runs(scale="1b")
    asked = {
        (
            shares(line.result.of.start).get("datacompdr", (0.0,))[0]
            + shares(line.result.of.start).get("datacomp", (0.0,))[0],
            shares(line.result.of.start).get("llava", (0.0,))[0],
            float(line.axes["text_completion"]) / 100,
            line.axes["epochs"],
            line.axes["captions"],
        )
        for line in study.lines
    }
    assert len(study.lines) == len(asked) == 279 + 93
    for run in AUTHORS_LATER_RUNS:
        place = (run.caption_share, run.instruct_share, run.completion, run.epochs, run.caption_set)
        assert place in asked


@pytest.mark.parametrize(("size", "number", "starts"), [("154m", 40, 4), ("411m", 80, 4)])
def test_smaller_sizes_have_their_own_lists(size: str, number: int, starts: int) -> None:
    study = paper.authors_runs(scale=size)
    assert len(study.lines) == number
    assert len({line.axes["text_completion"] for line in study.lines}) == starts
    assert {line.axes["epochs"] for line in study.lines} == {1, 2, 3, 4, 5}
    # Captions and conversations 4:1.
    assert all(run.caption_share == pytest.approx(4 * run.instruct_share) for run in LISTS[size])


def test_a_size_without_a_list_says_so() -> None:
    assert any("no list of its own" in note for note in paper.authors_runs(scale="79m").notes)


def test_the_private_caption_set_is_a_row_where_it_is_at_hand(tmp_path: Path) -> None:
    assert "Shutterstock" not in find_scale("1b").captions
    world = tmp_path / "data"
    for folder in ("captions/shutterstock", "text/dclm"):
        (world / folder).mkdir(parents=True)
        (world / folder / "a.txt").write_text("A text.\n")
    (world / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0}, "a")).to_str())
    at = find_scale("1b", inputs=str(tmp_path))
    assert at.captions["Shutterstock"].source == "shutterstock"
    assert isinstance(at.data.world, PublicFolder)
    assert isinstance(at.data.tokenizer, TokenizerFile)


def test_table_7_shows_the_metric_and_the_set_that_the_paper_prints() -> None:
    table = paper.table_7(scale="1b").table
    assert "hellaswag:acc_norm" in table.scores
    assert "hellaswag" not in table.scores
    assert "suite:text, Table 7" in table.scores
    ours = {model.name: model.scores["suite:text, Table 7"] for model in TABLE_7}
    assert ours["paper, fine-tuned"] == 0.1544
    assert set(TABLE_7[0].scores) <= set(table.scores)


def test_table_8_has_both_aggregates_and_the_errors_that_are_printed() -> None:
    table = paper.table_8(scale="1b").table
    five, six = "suite:vision, Table 8", "suite:vision with OCID-Ref, Table 8"
    printed = [(model.scores[five], model.scores.get(six)) for model in TABLE_8]
    assert printed == [(0.4713, 0.4608), (0.5138, 0.5125), (0.5814, None)]
    assert TABLE_8[2].errors == {"textvqa": 0.002, "refcoco": 0.001, "gqa": 0.003, "vqav2": 0.002}
    assert table.scores[-3:] == (five, six, "vizwiz")


def test_an_evaluation_is_priced_at_the_size_of_the_published_benchmarks() -> None:
    six = ("vqav2", "gqa", "textvqa", "pope", "refcoco", "ocid_ref")
    assert sum(VISUAL_SIZES[task].questions for task in six) == 270_018
    result = paper.table_8(scale="1b").lines[0].result
    asked = result.evaluation
    choices = sum(TEXT_SIZES[task].items * TEXT_SIZES[task].choices for task in asked.text_tasks)
    blind = 2 if asked.blind else 1
    questions = blind * (270_018 + VISUAL_SIZES["vizwiz"].questions)
    weighed = blind * VISUAL_SIZES["pope"].questions
    written = (questions - weighed) * asked.max_new_tokens + weighed * 2 * 2
    tokens = questions * (729 + 48) + written + choices * 64
    assert cost(result).tokens == tokens
    slim = result.model_copy(update={"evaluation": asked.model_copy(update={"slim": True})})
    assert (cost(slim).tokens or 0) < 0.1 * tokens
