"""What repetitions draw anew, and studies of nothing but that."""

import pytest

from midstream.recipes.lines import LEVELS, Level
from midstream.recipes.noise import levels
from midstream.recipes.onset import onset_by_share
from midstream.recipes.paper import figure_4, table_4
from midstream.recipes.published import table1
from midstream.report.gather import repeated


@pytest.mark.parametrize(
    ("draws", "own"),
    [
        ((), {"continue", "finetune"}),
        (("text",), {"pretrain", "continue", "finetune"}),
        (("encoder",), {"train_encoder", "continue", "finetune"}),
        (("encoder", "text", "image-text"), {"train_encoder", "pretrain", "continue", "finetune"}),
    ],
)
def test_a_study_says_what_its_repetitions_draw_anew(
    draws: tuple[Level, ...], own: set[str]
) -> None:
    study = figure_4(seeds=(1, 2), completions=(0.8,), draws=draws)
    assert set(repeated(study)["own"]) == own


@pytest.mark.parametrize("recipe", [figure_4, table_4, table1, onset_by_share])
def test_every_recipe_of_a_scale_draws_the_whole_chain_where_it_is_asked(recipe: object) -> None:
    assert callable(recipe)
    study = recipe(scale="pocket", seeds=(1, 2), draws=LEVELS)
    assert set(repeated(study)["shared"]) == set()


def test_what_is_given_cannot_be_drawn_anew() -> None:
    for level in ("text", "encoder"):
        with pytest.raises(ValueError, match=f"leave {level} out of draws"):
            figure_4(scale="1b", seeds=(1,), completions=(0.8,), draws=(level,))


def test_an_image_text_stage_that_is_fixed_is_drawn_anew_where_it_is_asked() -> None:
    study = figure_4(scale="1b", seeds=(1, 2), completions=(0.8,), draws=("image-text",))
    assert repeated(study)["own"] == ["continue", "finetune"]


def test_levels_are_three_numbers_of_two_or_more() -> None:
    with pytest.raises(ValueError, match="three numbers of 2 or more"):
        levels(repeats=(2, 1, 2))
