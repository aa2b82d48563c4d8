"""How often an evaluation asks, what it shows and what it reads."""

from typing import Any

import pytest

from midstream.config import Evaluation, FewShot
from midstream.cost.cost import cost
from midstream.cost.questions import ANSWER_TOKENS, PROMPT_TOKENS, Asked, asked_of
from midstream.study.stages import Evaluate
from tiny import CHAT, DATA

PATCHES = CHAT.model.image_tokens
ALL = DATA.world.num_questions  # type: ignore[union-attr]


def asked(task: str, **changes: Any) -> Asked:
    """A visual task of the tiny world."""
    given: dict[str, Any] = {"visual_tasks": (task,), "blind": False} | changes
    (found,) = asked_of(Evaluate(of=CHAT, evaluation=Evaluation(**given)), None, {})
    return found


def test_questions_about_several_pictures_are_asked_in_another_order_too() -> None:
    one, several = asked("pope"), asked("nlvr2")
    assert (one.pictures, several.pictures) == (ALL, 2 * ALL)
    assert several.positions == ALL * (2 * PATCHES + PROMPT_TOKENS + 2 * ANSWER_TOKENS)
    for task, passes in (("pope", 2), ("nlvr2", 3)):
        once, blind = asked(task), asked(task, blind=True)
        assert blind.pictures == passes * once.pictures
        assert blind.positions == passes * once.positions


def test_fixed_answers_are_weighed_written_or_both() -> None:
    how = {name: asked("pope", fixed_answers=name) for name in ("probability", "text", "both")}
    written = ALL * (PATCHES + PROMPT_TOKENS + 32)
    assert how["text"].positions == written == asked("vqav2").positions
    assert how["both"].positions == how["probability"].positions + written
    assert how["probability"].positions < written


@pytest.mark.parametrize(("shots", "shown"), [(4, 5), (0, 1)])
def test_shots_are_read_with_each_question_or_once_a_batch(shots: int, shown: int) -> None:
    plain = asked("vqav2")
    each = asked("vqav2", few_shot=FewShot(num_shots=shots))
    assert each.pictures == shown * ALL
    shot = PROMPT_TOKENS + ANSWER_TOKENS
    before = (shots or 2) * shot + shots * PATCHES
    assert each.positions == plain.positions + ALL * before
    once = asked("vqav2", few_shot=FewShot(num_shots=shots, draw="once"), batch_size=7)
    assert once.positions == plain.positions + -(-ALL // 7) * before
    # Whether read once or not, what stands before is looked at.
    assert once.squares / once.positions == each.squares / each.positions


def test_model_flops_of_an_evaluation_count_a_causal_mask_once() -> None:
    stage = Evaluate(of=CHAT, evaluation=Evaluation(visual_tasks=("vqav2",)))
    found = cost(stage)
    assert 0.5 * found.flops < found.model_flops < found.flops
