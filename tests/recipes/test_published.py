"""Table 1's recipes in Midstream's terms: what each trains, on what, at which rates."""

from pathlib import Path

import pytest

from midstream.config import (
    Resampler,
)
from midstream.cost.graph import plan
from midstream.recipes.published import table1, trained
from midstream.recipes.published_recipes import RECIPES, Recipe
from midstream.recipes.scales import SIZES, Model, Scale, find_scale, finetune_stage
from midstream.report.curves import curves
from midstream.study.stages import Continue, Finetune, came_from
from midstream.study.store import Ledger

BY_NAME = {recipe.name: recipe for recipe in RECIPES}


@pytest.fixture(scope="module")
def pocket() -> Scale:
    return find_scale("pocket", shrink=0.05).others["interleaved"]


def chain(scale: Scale, recipe: Recipe) -> list[Continue | Finetune]:
    """Its stages on pictures, the first one first."""
    stage: object = trained(scale, recipe, seed=7, epochs=1)
    found = []
    while isinstance(stage, Continue | Finetune):
        found.append(stage)
        before = came_from(stage)
        stage = before[0] if before else None
    return found[::-1]


def test_paligemma_sees_three_sizes_where_the_largest_has_no_more_patches_than_its_own(
    pocket: Scale,
) -> None:
    sides = [stage.model.encoder.image_size for stage in chain(pocket, BY_NAME["PaliGemma"])]  # type: ignore[union-attr]
    assert sides == [72, 144, 288, 288]
    large = find_scale("1b")
    first, second, chat = chain(large, BY_NAME["PaliGemma"])
    sides = [stage.model.encoder.image_size for stage in (first, second, chat)]  # type: ignore[union-attr]
    assert sides == [384, 770, 770]
    budgets = [stage.training.budget.total_tokens for stage in (first, second)]  # type: ignore[union-attr]
    assert sum(budgets) == pytest.approx(large.image_text_tokens, abs=2)
    left_out = "stage on pictures of 4 x the side is left out"
    for scale, told in (("1b", True), ("pocket", False)):
        notes = table1(scale=scale, recipes=("PaliGemma",), seeds=(7,)).notes
        assert any(left_out in note for note in notes) == told


def test_each_recipe_has_a_connector_of_its_own_kind(pocket: Scale) -> None:
    large = find_scale("1b")
    for scale, tokens in ((pocket, (4, 4, 4, 9)), (large, (128, 64, 64, 729))):
        found = {}
        for name in ("BLIP3", "Flamingo", "IDEFICS", "Qwen-VL"):
            model = chain(scale, BY_NAME[name])[0].model
            assert isinstance(model.projector.reduction, Resampler)
            found[name] = model.projector.reduction.num_latents
            # Gated blocks look at Flamingo's; its pictures take one position.
            assert model.image_tokens == (1 if name == "Flamingo" else found[name])
        assert tuple(found.values()) == tokens
        assert chain(scale, BY_NAME["Flamingo"])[0].model.projector.gated is not None
    assert chain(large, BY_NAME["MM1 91:9"])[0].model.image_tokens == 81
    assert chain(pocket, BY_NAME["MM1 91:9"])[0].model.image_tokens == 9
    assert chain(pocket, BY_NAME["PaliGemma"])[0].model.projector.num_layers == 1


def test_ours_is_the_papers_model_to_the_last_digit(pocket: Scale) -> None:
    mine = trained(pocket, BY_NAME["Ours"], seed=7, epochs=4)
    assert mine.identity == finetune_stage(pocket, Model(seed=7)).identity


@pytest.mark.parametrize(
    "scale",
    [SIZES[0], *(pytest.param(x, marks=pytest.mark.faults) for x in SIZES[1:-1]), SIZES[-1]],
)
def test_table_1_can_be_planned_and_its_rates_drawn_at_every_scale(
    scale: str, tmp_path: Path
) -> None:
    study = table1(scale=scale, seeds=(7,))
    assert len(study.lines) == 12
    work = plan(study, Ledger(tmp_path))
    assert work.naive_flops >= work.shared_flops > 0
    curves(study)
    rows = {line.axes["recipe"] for line in study.lines}
    assert study.table.labels.keys() == rows
    assert all(len(text) == 5 for text in study.table.labels.values())


def test_what_stands_in_for_a_recipes_own_is_said() -> None:
    notes = table1(recipes=("Flamingo", "Qwen-VL")).notes
    assert any(note.startswith("Flamingo: it has no videos") for note in notes)
    assert not any("BLIP3" in note for note in notes)


def test_a_recipe_that_is_not_fine_tuned_is_asked_behind_shots_and_no_other_is() -> None:
    asked = {line.axes["recipe"]: line.result.evaluation for line in table1(seeds=(7,)).lines}
    few = {name: one.few_shot and one.few_shot.num_shots for name, one in asked.items()}
    assert few.pop("Flamingo") == 4
    assert set(few.values()) == {None}
    # The same questions of the same benchmarks.
    assert asked["Flamingo"].fixed_answers == "both"
    alike = {"few_shot": None, "fixed_answers": "both"}
    assert len({one.model_copy(update=alike).model_dump_json() for one in asked.values()}) == 1
    study = table1(recipes=("Flamingo", "Ours"), seeds=(7,))
    columns = {name: text["asked"] for name, text in study.table.labels.items()}
    assert columns == {"Flamingo": "behind 4 shots", "Ours": "as it is"}
    assert any(note.startswith("Flamingo: not fine-tuned, asked behind 4") for note in study.notes)
    plain = table1(recipes=("Flamingo",), seeds=(7,), shots=None).lines[0].result
    assert plain.evaluation == asked["Ours"]
    assert plain.of.identity == study.lines[0].result.of.identity


def test_no_two_recipes_are_one_model() -> None:
    study = table1()
    assert not any("are one model" in note for note in study.notes)
    first = [line.result.identity for line in study.lines if line.axes["seed"] == 7]
    assert len(set(first)) == len(first) == 12


def test_gated_blocks_are_left_out_over_other_decoders_and_that_is_said() -> None:
    study = table1(scale="pythia-70m", seeds=(7,))
    assert "Flamingo" not in {line.axes["recipe"] for line in study.lines}
    assert any(note.startswith("Flamingo: left out, since gated blocks") for note in study.notes)
    with pytest.raises(ValueError, match=r"Flamingo's gated blocks .* leave the recipe out"):
        table1(scale="pythia-70m", recipes=("Ours", "Flamingo"))


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'LLaVA'; Table 1 has BLIP3, Flamingo"):
        table1(recipes=("LLaVA",))
