"""Onset × share: what is held fixed while the onset moves."""

from typing import Any

import pytest

from midstream.config import Mixture
from midstream.config.training import rate_at
from midstream.recipes.onset import onset_by_share
from midstream.study.stages import Continue, ContinueFrom, Pretrain
from midstream.study.studies import Line


def parts(line: Line) -> tuple[Continue, Mixture, float]:
    """The stage with pictures, its budget, and the share of all tokens before it."""
    finetuned = line.result.of
    budget, onset = finetuned.start.training.budget, line.axes["onset"]
    return finetuned.start, budget, onset / 100


def before(stage: Continue) -> tuple[Pretrain, int] | None:
    """The text run and its tokens that come before a stage with pictures."""
    if not isinstance(stage.start, ContinueFrom):
        return None
    run = stage.start.stage
    return run, round(run.training.budget.total_tokens * stage.start.completion)


def test_the_rate_after_every_token_is_the_same_at_every_onset() -> None:
    whole, found = 1_200_000, []
    for line in onset_by_share(seeds=(7,)).lines:
        stage, budget, _ = parts(line)
        text = before(stage)
        rates = []
        for seen in range(0, whole, 10_000):
            schedule, at, total = stage.training.schedule, seen, budget.total_tokens
            if text is not None and seen < text[1]:
                run = text[0].training
                schedule, total = run.schedule, run.budget.total_tokens
            elif text is not None:
                at = seen - text[1]
            rates.append(rate_at(schedule, at, total))
        found.append(rates)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert found[2] == pytest.approx(found[0], rel=1e-9)
    assert max(found[0]) > 5 * found[0][-1], "the rate falls at the end"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"points": ((0.0, 0.1), (0.5, 0.5))}, r"0\.1, 0\.25"),
        ({"points": ((0.0, 0.05), (0.95, 1.0))}, "decay begins"),
        ({"scale": "1b"}, "text='trained'"),
        ({"points": ((0.5, 0.2),)}, "one onset"),
        ({"points": ((0.0, 0.098), (0.02, 0.1))}, "warms up"),
    ],
)
def test_what_would_not_hold_things_fixed_is_refused(given: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        onset_by_share(**given)
