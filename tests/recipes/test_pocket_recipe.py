"""The pocket recipe: one text run, whose rate is continued where there is one."""

import pytest

from midstream.config import ContinuedCosine, WarmupCosine
from midstream.cost.graph import order
from midstream.recipes.lines import image_text_schedule
from midstream.recipes.pocket import MILESTONES, when_images_arrive
from midstream.study.stages import Pretrain


def test_all_lines_share_one_text_run_whatever_completions_are_asked_for() -> None:
    runs = {
        stage.identity
        for completions in ((0.0, 1.0), MILESTONES)
        for stage in order(when_images_arrive(completions=completions))
        if isinstance(stage, Pretrain)
    }
    assert len(runs) == 1


@pytest.mark.parametrize("completion", [0.0, *MILESTONES])
def test_the_rate_is_warmed_up_again_only_where_there_is_none_to_continue(
    completion: float,
) -> None:
    kind = WarmupCosine if completion in (0.0, 1.0) else ContinuedCosine
    assert isinstance(image_text_schedule(completion, 1e-3), kind)
