"""What a plan says of pools before anything runs, against numbers made by hand."""

from pathlib import Path
from typing import Any

import pytest
from test_pictures import SOURCES, MakeStudy, first_continue, only, prepared, with_budget

from midstream.config import Amount, Amounts, Mixture, Sampling, Share
from midstream.cost.known import sources_of
from midstream.cost.pictures import passes_seen, pictures_seen
from midstream.cost.workload import taken, workload


def pooled(pool: int | None, tokens: int, **changes: Any) -> Mixture:
    """Half captions, half text."""
    shares = (Share(source="captions", share=0.5, pool=pool), Share(source="stories", share=0.5))
    return Mixture(total_tokens=tokens, shares=shares, max_epochs=99, **changes)


def test_passes_over_pools_and_whole_sources_are_told(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study()
    first = first_continue(study)
    ledger = prepared(first.parents, tmp_path, SOURCES)
    # A caption is 6 tokens and 4 patches: 1,000 tokens are 100 views.
    stages = [
        with_budget(first, pooled(pool, tokens))
        for pool, tokens in ((None, 1_000), (20, 1_000), (20, 2_000), (50, 2_000))
    ]
    assert passes_seen(stages, ledger) == [
        "passes over source 'captions' (20 pictures): 2.5 to 5",
        "passes over source 'captions' (50 pictures): 2",
        "passes over source 'captions' (100 pictures): 0.5",
    ]
    assert "50 to 100 with shares of tokens" in pictures_seen(stages, ledger)[0]


def test_a_text_that_comes_again_is_told(make_study: MakeStudy, tmp_path: Path) -> None:
    first = first_continue(make_study())
    ledger = prepared(first.parents, tmp_path, SOURCES)
    stories = sources_of(first.data, {"stories": "original"}, ledger)
    held = stories["stories"].size(0)
    stages = [with_budget(first, pooled(20, round(2 * held * part))) for part in (0.5, 1)]
    assert len(passes_seen(stages, ledger)) == 1
    stages.append(with_budget(first, pooled(20, 6 * held)))
    assert passes_seen(stages, ledger)[1].endswith("tokens): 0.5 to 3")
    assert "'stories'" in passes_seen(stages, ledger)[1]


@pytest.mark.parametrize(
    ("sampling", "seen"), [("permutation", 30), ("replacement", 30 * (1 - (29 / 30) ** 200))]
)
def test_a_store_of_features_holds_the_largest_pool_of_a_seed(
    make_study: MakeStudy, tmp_path: Path, sampling: Sampling, seen: float
) -> None:
    first = first_continue(make_study())
    ledger = prepared(first.parents, tmp_path, SOURCES)
    stages: list[Any] = [
        with_budget(first, pooled(pool, 4_000, sampling=sampling)) for pool in (10, 30)
    ]
    found = only(stages, ledger)
    assert found.pictures == pytest.approx(seen, rel=0.01)
    assert found.views == pytest.approx(400)


def test_amounts_of_a_pool_and_their_work_are_those_of_so_many_pictures(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    first = first_continue(make_study())
    ledger = prepared(first.parents, tmp_path, SOURCES)

    def work(**given: Any) -> tuple[float, float, int]:
        budget = Amounts(amounts=(Amount(source="captions", **given),), max_epochs=99)
        stage = with_budget(first, budget)
        sources = sources_of(stage.data, budget.captions, ledger)
        part = taken(stage.training, sources, stage.model)["captions"]
        found = workload(stage.model, stage.training, sources, "cpu")
        return part.examples, found.images, found.tokens

    assert work(epochs=3, pool=20) == pytest.approx((60, 60, 600))
    assert work(tokens=600, pool=20) == pytest.approx(work(tokens=600))
