"""Studies of documents and connectors: shares, shots, and equal tokens of pictures."""

import pytest

from midstream.config import FewShot
from midstream.cost.cost import cost
from midstream.recipes.interleaved import connectors, share
from midstream.study.label import labels
from midstream.study.studies import Line


def shares(line: Line) -> dict[str, float]:
    budget = line.result.of.start.training.budget
    return {one.source: one.share for one in budget.shares}


def test_shots_are_priced_and_told_apart() -> None:
    study = share(seeds=(7,), parts=(0.0, 1.0), shots=(0, 4))
    own = [line.result for line in study.lines if line.axes["interleaved"] == 0.0]
    zero, four = own[1:]
    assert zero.evaluation.few_shot == FewShot(num_shots=0)
    prices = [cost(stage).tokens for stage in (zero, four)]
    # Asked blind as well.
    questions, patches, shot = 2 * 2_000, 9, 48 + 2
    # Zero shots are two without pictures.
    assert prices[1] - prices[0] == questions * (4 * (patches + shot) - 2 * shot)
    names = labels(own)
    assert len(set(names.values())) == 3


def test_connectors_see_equal_tokens_of_pictures() -> None:
    study = connectors(seeds=(7,), vision_tokens=(0.05,))
    text = next(
        one for one in study.lines[0].result.of.start.data.expected if one.name == "pictures"
    )
    each = text.num_tokens / text.num_examples
    for line in study.lines:
        positions = line.result.of.start.model.image_tokens
        found = shares(line)["pictures"] * positions / (positions + each)
        assert found == pytest.approx(0.05, rel=1e-4), line.name
    assert len({line.axes["connector"] for line in study.lines}) == 5
    before = connectors(seeds=(7,), vision_tokens=(0.05,), by="patches")
    budgets = {line.result.of.start.training.budget for line in before.lines}
    (budget,) = budgets
    assert budget.by == "patches"
    (mlp,) = (line for line in study.lines if line.axes["connector"] == "MLP")
    assert budget == mlp.result.of.start.training.budget.model_copy(update={"by": "patches"})
    with pytest.raises(ValueError, match="as pictures of 1 positions need captions of"):
        connectors(vision_tokens=(0.2,))
    with pytest.raises(ValueError, match="rows='paper' makes them of sequences"):
        connectors(rows="paper")
