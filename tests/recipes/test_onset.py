"""Onset × share: what is held fixed while the onset moves."""

from typing import Any

import pytest

from midstream.config.training import rate_at
from midstream.recipes.onset import onset_by_share
from midstream.study.stages import ContinueFrom


def test_the_rate_after_every_token_is_the_same_at_every_onset() -> None:
    found = []
    for line in onset_by_share(seeds=(7,)).lines:
        stage = line.result.of.start
        late, total, first = stage.training.schedule, stage.training.budget.total_tokens, 0
        if isinstance(stage.start, ContinueFrom):
            run = stage.start.stage.training
            first = round(run.budget.total_tokens * stage.start.completion)
        found.append(
            [
                rate_at(run.schedule, seen, run.budget.total_tokens)
                if seen < first
                else rate_at(late, seen - first, total)
                for seen in range(0, 1_200_000, 10_000)
            ]
        )
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
