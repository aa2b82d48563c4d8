"""Pools × tokens: what moves, what is held fixed, and the ledger of a small run."""

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest

import tiny
from midstream.recipes.pools import MAX_PASSES, more_or_again
from midstream.report.gather import gather
from midstream.report.page import summary_text, write_facts
from midstream.study.results import TrainingResult
from midstream.study.store import Ledger
from midstream.work.open_model import open_sources


@pytest.mark.parametrize(
    ("scale", "rows"), [("11m", "paper"), ("1b", "filled"), ("pythia-410m", "paper")]
)
def test_pools_of_other_scales_are_seen_whole_before_they_come_again(
    scale: str, rows: Literal["filled", "paper"]
) -> None:
    found: dict[int, list[float]] = {}
    for line in more_or_again(scale=scale, rows=rows, seeds=(7,)).lines:
        stage = line.result.of.start
        budget, encoder = stage.training.budget, stage.model.encoder
        assert budget.sampling == "permutation"
        (source, pool), *_ = budget.pools.items()
        (held,) = (one for one in stage.data.expected if one.name == source)
        assert pool <= held.num_examples
        size = stage.training.rows.row_length
        if budget.by == "tokens":
            size = encoder.num_patches + held.num_tokens // held.num_examples
        share = budget.shares[0].share
        found.setdefault(pool, []).append(budget.total_tokens * share / size / pool)
    few, _, many = (found[pool] for pool in sorted(found))
    assert few == pytest.approx([1, 2, 4], rel=0.05)
    assert many == pytest.approx([0.25, 0.5, 1], rel=0.05)


def test_a_scale_that_does_not_say_what_its_captions_hold_asks_for_pools() -> None:
    with pytest.raises(ValueError, match="does not say what 'pictures' holds; give pools"):
        more_or_again(shrink=0.01)


@pytest.mark.parametrize("given", [{"pools": (10, 10)}, {"multiples": (1.0,)}])
def test_one_pool_or_one_length_compares_with_nothing(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="two different ones"):
        more_or_again(**given)


@pytest.mark.faults
@pytest.mark.slow
def test_a_small_run_sees_its_pools_as_often_as_its_ledger_says(tmp_path: Path) -> None:
    study = more_or_again(
        seeds=(7,), epochs=1, shrink=0.01, pools=(20, 80), multiples=(0.5, 1.0), share=0.2
    )
    ledger = Ledger(tmp_path / "store")
    tiny.run_missing(ledger, *study.results)
    found = {}
    for line in study.lines:
        stage = line.result.of.start
        views = ledger.result(stage, TrainingResult).sources["pictures"].pictures
        found[line.axes["pool"], line.axes["tokens"]] = views
        # A permutation: all pictures of a pool as often as each other, or once more.
        assert all(high - low == 1 for (low, _), (high, _) in pairwise(views.times))
        assert views.views == sum(often * number for often, number in views.times)
    (half, whole), (half_of_many, whole_of_many) = (
        (found[pool, 0.5], found[pool, 1.0]) for pool in (20, 80)
    )
    assert half.distinct == whole.distinct == 20
    assert whole.views == pytest.approx(2 * half.views, rel=0.05)
    assert MAX_PASSES > whole.times[-1][0] > whole_of_many.times[-1][0]
    assert 20 < half_of_many.distinct <= whole_of_many.distinct <= 80
    assert len(open_sources(stage.data, ("pictures",), ledger)["pictures"]) == 400

    facts = gather(study, ledger)
    page = write_facts(facts, out=tmp_path / "out")
    with (page.parent / "seen.csv").open(newline="") as stream:
        records = [row for row in csv.DictReader(stream) if row["source"] == "pictures"]
    for record in records:
        views = found[int(record["axis.pool"]), float(record["axis.tokens"])]
        times = " ".join(f"{often}:{number}" for often, number in views.times)
        assert (record["pictures"], record["views"]) == (str(views.distinct), str(views.views))
        assert record["times"] == times
    assert len(records) == 4
    assert "How often pictures were seen" in page.read_text()
    assert "Image-text training | pictures | 1 | 20 |" in summary_text([facts], "T", "c")
