"""Pools: the first pictures of a source's order, over and over, and how often each was seen."""

import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_source
from pydantic import ValidationError

from midstream.config import Amount, Amounts, Budget, Mixture, Rows, Sampling, Share
from midstream.data import lengths
from midstream.data.lengths import picture_views
from midstream.data.rows import plan_rows, shares_report
from midstream.data.sources import Pictures, Source
from midstream.order import stream
from midstream.order.mixture import Supply, quotas_of
from midstream.order.plan import RowPlan
from midstream.order.stream import ArrayLengths, Stream
from midstream.study.results import PictureViews

PATCHES = 4
ROWS = Rows(row_length=32, batch_rows=4)
NUM_EXAMPLES = 60


def order_of(size: int, pool: int | None, places: int, key: str = "7/pics") -> list[int]:
    """What a stream of `size` examples gives at its first places."""
    lengths = ArrayLengths(np.random.default_rng(size).integers(1, 9, size))
    return Stream(lengths, key, pool=pool).places(0, places).examples.tolist()


@given(size=st.integers(1, 90), data=st.data(), small=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_pool_is_the_beginning_of_the_order_and_of_every_larger_pool(
    size: int, data: st.DataObject, small: bool
) -> None:
    pool = data.draw(st.integers(1, size))
    with pytest.MonkeyPatch.context() as patch:
        if small:  # as a source of more than four million examples
            patch.setattr(stream, "MAX_CHUNKS", 4)
            patch.setattr(stream, "MIN_CHUNK", 3)
            patch.setattr(stream, "GROUP_EXAMPLES", 6)
        whole = order_of(size, None, size)
        assert sorted(whole) == list(range(size))
        found = order_of(size, pool, 3 * pool)
        assert found[:pool] == whole[:pool]
        # Each further pass is over the same ones.
        for low in (pool, 2 * pool):
            assert sorted(found[low : low + pool]) == sorted(found[:pool])
        larger = data.draw(st.integers(pool, size))
        assert order_of(size, larger, pool) == found[:pool]
        # With replacement as well, nothing else is drawn.
        lengths = ArrayLengths(np.ones(size, np.int64))
        drawn = Stream(lengths, "7/pics", "replacement", pool).places(0, 4 * pool).examples
        assert set(drawn.tolist()) <= set(whole[:pool])


def test_passes_are_drawn_anew_and_another_seed_has_another_pool() -> None:
    found = order_of(80, 20, 60)
    assert found[:20] != found[20:40] != found[40:60]
    assert set(order_of(80, 20, 20, "8/pics")) != set(found)


@given(
    size=st.integers(2, 80),
    part=st.floats(0.01, 1.0),
    passes=st.floats(0.1, 4.0),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_budget_over_a_pool_is_met_as_over_a_whole_source(
    size: int, part: float, passes: float, seed: int
) -> None:
    lengths, pool = np.random.default_rng(seed).integers(1, 9, size), max(1, round(part * size))
    text = Supply("web", ArrayLengths(np.full(200, 50)), divisible=True)
    supply = Supply("pics", ArrayLengths(lengths), divisible=False)
    tokens = max(1, round(passes * pool * 4))
    budget = Amounts(
        amounts=(Amount(source="pics", tokens=tokens, pool=pool), Amount(source="web", tokens=100)),
        max_epochs=40,
    )
    quota, other = quotas_of([supply, text], budget, row_length=32, seed=seed)
    seen = quota.stream.places(0, quota.examples).examples
    assert abs(int(lengths[seen].sum()) - tokens) <= int(lengths.max())
    assert (quota.tokens, other.tokens) == (int(lengths[seen].sum()), 100)
    assert len(set(seen.tolist())) <= pool
    # The views of a quota are a count of its places.
    assert quota.views().tolist() == np.bincount(seen, minlength=size).tolist()
    once = Amounts(amounts=(Amount(source="pics", epochs=2, pool=pool),))
    (twice,) = quotas_of([supply], once, row_length=32, seed=seed)
    assert (twice.examples, set(twice.views().tolist())) == (
        2 * pool,
        {0, 2} if pool < size else {2},
    )


def test_a_pool_without_enough_passes_is_refused_with_both_numbers() -> None:
    supply = Supply("pics", ArrayLengths(np.full(50, 10)), divisible=False)
    budget = Amounts(amounts=(Amount(source="pics", tokens=301, pool=10),), max_epochs=3)
    expected = r"pool of 10 of source 'pics' holds 100 tokens, the plan needs 301; raise max_epochs"
    with pytest.raises(ValueError, match=expected):
        quotas_of([supply], budget, row_length=32, seed=0)


@pytest.fixture(scope="module")
def pics(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Captions; every fifth shows the picture of the one before it."""
    shown = [number - (number % 5 == 4) for number in range(NUM_EXAMPLES)]
    lengths = np.random.default_rng(1).integers(3, 9, NUM_EXAMPLES).tolist()
    base = tmp_path_factory.mktemp("pics")
    return make_source(base, "pics", "caption", lengths, pictures=shown, shards=3)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Conversations, some without a picture."""
    shown = [None if number % 3 == 0 else number % 7 for number in range(24)]
    return make_source(
        tmp_path_factory.mktemp("talks"), "talks", "instruct", [6] * 24, number=1, pictures=shown
    )


def counted(plan: RowPlan, source: Source) -> PictureViews:
    """The views in all rows of a plan, one by one."""
    number, found = plan.names.index(source.name), Counter[bytes]()
    for row in range(len(plan)):
        for placed in plan.layout.row(row):
            if placed.source == number:
                for hashed in source.pictures_of(np.array([placed.example])).hashes:
                    found[hashed.tobytes()] += 1
    return PictureViews(
        distinct=len(found),
        views=found.total(),
        times=tuple(sorted(Counter(found.values()).items())),
    )


@pytest.mark.parametrize("sampling", ["permutation", "replacement"])
@pytest.mark.parametrize("pool", [None, 1, 7, 40, NUM_EXAMPLES])
def test_the_ledger_counts_what_the_rows_show(
    pics: Source, talks: Source, pool: int | None, sampling: Sampling
) -> None:
    shares = (Share(source="pics", share=0.7, pool=pool), Share(source="talks", share=0.3))
    budget = Mixture(total_tokens=1_500, shares=shares, max_epochs=999, sampling=sampling)
    sources = {"pics": pics, "talks": talks}
    plan = plan_rows(sources, PATCHES, budget, ROWS, 5)
    for quota in plan.quotas:
        source = sources[quota.name]
        assert picture_views(quota, source) == counted(plan, source)
    found = picture_views(plan.quotas[0], pics)
    assert found is not None
    assert found.distinct <= (pool or NUM_EXAMPLES)
    if pool == 1:
        assert found.times == ((found.views, 1),)
    # Passes are over the pool.
    report = shares_report(plan, sources, PATCHES)["pics"]
    assert report["epochs"] == pytest.approx(report["examples"] / (pool or NUM_EXAMPLES), rel=0.2)


def test_text_and_sources_too_large_have_no_ledger(
    pics: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = make_source(tmp_path, "web", "text", [30] * 8, number=2)
    sources = {"pics": pics, "web": web}
    shares = (Share(source="pics", share=0.5), Share(source="web", share=0.5))
    plan = plan_rows(sources, PATCHES, Mixture(total_tokens=200, shares=shares), ROWS, 5)
    assert picture_views(plan.quotas[1], web) is None
    monkeypatch.setattr(lengths, "MOST_PICTURES", NUM_EXAMPLES - 1)
    assert picture_views(plan.quotas[0], pics) is None


def test_what_is_counted_takes_few_bytes_an_example() -> None:
    number = 2**18
    views = np.arange(number, dtype=np.uint32) % 3 + 1
    hashes = np.random.default_rng(0).integers(0, 256, (number, 16), np.uint8)

    class Many:
        num_images = number

        def __len__(self) -> int:
            return number

        def pictures_of(self, examples: np.ndarray) -> Pictures:
            return Pictures(np.stack([examples, np.zeros_like(examples)], axis=1), hashes[examples])

    quota: Any = SimpleNamespace(divisible=False, views=views.copy)
    many: Any = Many()
    tracemalloc.start()
    found = picture_views(quota, many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert (found.distinct, found.views) == (number, int(views.sum()))
    assert peak / number < 55


def test_views_are_told_in_words() -> None:
    few = PictureViews(distinct=5, views=9, times=((1, 1), (2, 4)))
    assert few.words == "5 pictures, 1.80 views each: 1 seen 1 time, 4 seen 2 times"
    many = PictureViews(distinct=5, views=15, times=tuple((n, 1) for n in range(1, 6)))
    assert many.words == "5 pictures, 3.00 views each: 1 to 5"
    assert PictureViews(distinct=0, views=0, times=()).words == "no picture is seen"


def pooled(name: str, pool: int) -> Budget:
    return Amounts(amounts=(Amount(source=name, tokens=50, pool=pool),), max_epochs=99)


def test_a_pool_that_is_none_is_refused(pics: Source, talks: Source, tmp_path: Path) -> None:
    web = make_source(tmp_path, "web", "text", [30] * 8, number=2)
    sources = {"pics": pics, "web": web, "talks": talks}
    with pytest.raises(ValueError, match=r"'pics' holds 60 examples, the pool asks for 61; lower"):
        plan_rows(sources, PATCHES, pooled("pics", 61), ROWS, 0)
    with pytest.raises(ValueError, match=r"'web' holds text, and a pool is of pictures"):
        plan_rows(sources, PATCHES, pooled("web", 3), ROWS, 0)
    with pytest.raises(ValueError, match=r"'talks' holds instruct, and a pool is of pictures"):
        plan_rows(sources, PATCHES, pooled("talks", 3), ROWS, 0)
    with pytest.raises(ValidationError, match=r"pool\n.*greater than 0"):
        Share(source="pics", share=1.0, pool=0)
