"""The plan: which examples, how often, in which order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import mixture

from midstream.config import Epochs, Mixture
from midstream.data.mixture import LongExampleError, Order, Supply, permuted, plan_order, supply
from midstream.tokens import apportion

SEEDS = st.integers(0, 2**32 - 1)


def pieces(name: str, lengths: np.ndarray) -> Supply:
    """A source whose examples are one piece each."""
    return Supply(name, np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Supply], Mixture]:
    """Sources and a budget that they can meet; shares go down to 1e-9."""
    count = draw(st.integers(1, 4))
    random = np.random.default_rng(draw(SEEDS))
    supplies = [
        pieces(name, random.integers(1, draw(st.integers(2, 300)), draw(st.integers(1, 200))))
        for name in "abcd"[:count]
    ]
    weights = [10.0 ** -draw(st.floats(0, 9)) for _ in supplies]
    shares = {item.name: w / sum(weights) for item, w in zip(supplies, weights, strict=True)}
    max_epochs = draw(st.integers(1, 3))
    most = min((int(item.lengths.sum()) * max_epochs - 1) / shares[item.name] for item in supplies)
    total = max(1, int(most * draw(st.floats(0.001, 1))))
    fits = all(
        tokens <= int(item.lengths.sum()) * max_epochs
        for item, tokens in zip(supplies, apportion(total, shares).values(), strict=True)
    )
    if not fits:  # Rounding up by one token is more than the source holds.
        max_epochs += 1
    return supplies, mixture(total, shares, max_epochs)


def planned(supplies: list[Supply], budget: Mixture, seed: int) -> Order | None:
    """The order, or None where the whole budget is less than half an example."""
    parts = apportion(budget.total_tokens, {s.source: s.share for s in budget.shares})
    if all(2 * parts[item.name] <= item.lengths.min() for item in supplies):
        with pytest.raises(ValueError, match="holds no example"):
            plan_order(supplies, budget, seed)
        return None
    if all(2 * parts[item.name] <= item.lengths.max() for item in supplies):
        return None  # Which example comes first decides.
    return plan_order(supplies, budget, seed)


def lengths_in(order: Order, supplies: list[Supply]) -> np.ndarray:
    by_name = {item.name: item for item in supplies}
    return np.array(
        [by_name[order.names[s]].lengths[p] for s, p in zip(order.source, order.piece, strict=True)]
    )


@given(size=st.integers(1, 3000), key=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_permutation_reaches_every_index_once(size: int, key: str) -> None:
    found = permuted(np.arange(size), size, key)
    assert np.array_equal(np.sort(found), np.arange(size))


@given(size=st.integers(1, 10**12), seed=SEEDS, key=st.text(max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_permutation_is_the_same_one_by_one_and_in_bulk(size: int, seed: int, key: str) -> None:
    indices = np.random.default_rng(seed).integers(0, size, (3, 4))
    bulk = permuted(indices, size, key)
    assert bulk.shape == (3, 4)
    assert bulk.min() >= 0
    assert bulk.max() < size
    one_by_one = [[int(permuted(np.array(x), size, key)) for x in row] for row in indices]
    assert bulk.tolist() == one_by_one


def test_permutations_of_different_keys_share_no_more_places_than_chance() -> None:
    size = 2000
    orders = [np.arange(size), *(permuted(np.arange(size), size, f"{k}/a") for k in range(6))]
    for number, one in enumerate(orders):
        for other in orders[number + 1 :]:
            assert int((one == other).sum()) < 12  # chance: 1 on average
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.12


@given(case=mixtures(), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_plan_meets_every_budget_within_half_an_example(
    case: tuple[list[Supply], Mixture], seed: int
) -> None:
    supplies, budget = case
    order = planned(supplies, budget, seed)
    if order is None:
        return
    lengths = lengths_in(order, supplies)
    assert sum(x or 0 for x in order.planned_tokens.values()) == budget.total_tokens
    for item in supplies:
        wanted = order.planned_tokens[item.name]
        assert wanted is not None
        mine = (
            order.source == order.names.index(item.name)
            if item.name in order.names
            else np.zeros(len(order.piece), bool)
        )
        assert order.realised_tokens[item.name] == lengths[mine].sum()
        assert 2 * abs(order.realised_tokens[item.name] - wanted) <= item.lengths.max()
        # A source whose budget is less than half an example may be left out, no other.
        assert mine.any() or 2 * wanted <= item.lengths.max()
        # No example is seen again before all others were seen.
        seen = np.bincount(order.piece[mine], minlength=len(item.lengths))
        assert seen.max() - seen.min() <= 1
        assert seen.max() <= budget.max_epochs


@given(case=mixtures(), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_prefix_of_a_plan_has_the_shares_of_the_whole_within_a_piece_per_source(
    case: tuple[list[Supply], Mixture], seed: int
) -> None:
    supplies, budget = case
    order = planned(supplies, budget, seed)
    if order is None:
        return
    lengths = lengths_in(order, supplies)
    so_far = np.cumsum(lengths)
    largest = {item.name: int(item.lengths.max()) for item in supplies}
    for number, name in enumerate(order.names):
        mine = np.cumsum(np.where(order.source == number, lengths, 0))
        share = order.realised_tokens[name] / int(so_far[-1])
        allowed = (largest[name] + share * sum(largest.values())) / 2
        assert np.abs(mine - share * so_far).max() <= allowed + 1e-6


@given(
    seed=SEEDS,
    count=st.integers(1, 50),
    max_epochs=st.integers(1, 4),
    beyond=st.integers(1, 100_000),
)
@settings(max_examples=40, deadline=None)
def test_a_budget_beyond_the_source_is_refused_with_both_numbers(
    seed: int, count: int, max_epochs: int, beyond: int
) -> None:
    web = pieces("web", np.random.default_rng(seed).integers(1, 500, count))
    have = int(web.lengths.sum())
    assert (
        plan_order([web], mixture(have * max_epochs, {"web": 1.0}, max_epochs), 0).realised_tokens[
            "web"
        ]
        == have * max_epochs
    )
    need = have * max_epochs + beyond
    with pytest.raises(ValueError, match="source 'web'") as caught:
        plan_order([web], mixture(need, {"web": 1.0}, max_epochs), 0)
    assert f"holds {have:,} tokens" in str(caught.value)
    assert f"needs {need:,}" in str(caught.value)
    assert f"max_epochs above {max_epochs}" in str(caught.value)


@given(seed=SEEDS, epochs=st.integers(1, 5), counts=st.lists(st.integers(1, 40), max_size=3))
@settings(max_examples=40, deadline=None)
def test_epochs_repeat_every_example_exactly_so_often(
    seed: int, epochs: int, counts: list[int]
) -> None:
    random = np.random.default_rng(seed)
    sizes = [*counts, 7]
    supplies = [
        pieces(name, random.integers(1, 90, size))
        for name, size in zip("abcd", sizes, strict=False)
    ]
    names = tuple(item.name for item in supplies)
    order = plan_order(supplies, Epochs(sources=names, epochs=epochs), seed % 9)
    assert order.planned_tokens == dict.fromkeys(names)
    for item in supplies:
        mine = order.piece[order.source == order.names.index(item.name)]
        assert np.bincount(mine, minlength=len(item.lengths)).tolist() == [epochs] * len(
            item.lengths
        )
        # One epoch ends before the next begins.
        for epoch in np.split(mine, epochs):
            assert len(set(epoch.tolist())) == len(item.lengths)
        assert order.realised_tokens[item.name] == epochs * item.lengths.sum()


def test_the_order_is_a_function_of_the_seed_and_differs_between_epochs_and_seeds() -> None:
    web = pieces("web", np.full(300, 5))
    twice = Epochs(sources=("web",), epochs=2)
    one, again, other = (plan_order([web], twice, seed).piece for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert (one == other).mean() < 0.05
    assert (one[:300] == one[300:]).mean() < 0.05


def test_a_plan_is_the_same_whatever_other_sources_there_are_and_in_which_order() -> None:
    random = np.random.default_rng(0)
    web, pics, rest = (pieces(n, random.integers(1, 50, 100)) for n in ("web", "pics", "rest"))
    budget = mixture(2000, {"web": 0.3, "pics": 0.7})
    one, other = (plan_order(s, budget, 3) for s in ([web, pics], [rest, pics, web]))
    assert one.names == other.names
    assert np.array_equal(one.piece, other.piece)
    assert np.array_equal(one.source, other.source)


def test_an_unknown_source_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no source 'wbe' in the data; it holds \['web'\]"):
        plan_order([pieces("web", np.ones(3, np.int64))], mixture(2, {"wbe": 1.0}), 0)


def test_a_budget_below_half_of_every_example_is_refused_with_its_number() -> None:
    with pytest.raises(ValueError, match=r"holds no example: .*'web': 20"):
        plan_order([pieces("web", np.array([100, 90]))], mixture(20, {"web": 1.0}), 0)


@given(
    examples=st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=20),
    row_length=st.integers(8, 64),
)
@settings(max_examples=60, deadline=None)
def test_documents_are_cut_into_pieces_without_losing_or_repeating_a_token(
    examples: list[tuple[int, bool]], row_length: int
) -> None:
    patches = np.array([6 if image else 0 for _, image in examples])
    tokens = np.array([min(n, row_length - 6) if image else n for n, image in examples])
    found = supply("web", tokens, patches, row_length)
    covered: list[list[int]] = [[] for _ in examples]
    for example, start, length in zip(found.examples, found.starts, found.lengths, strict=True):
        assert 0 < length <= row_length
        covered[example] += range(start, start + length)
    assert covered == [list(range(n)) for n in tokens + patches]
    assert all((found.examples == e).sum() == 1 for e in np.flatnonzero(patches))


@given(longs=st.sets(st.integers(0, 19), min_size=1), row_length=st.integers(8, 64))
@settings(max_examples=30, deadline=None)
def test_the_first_image_example_longer_than_a_row_is_named(
    longs: set[int], row_length: int
) -> None:
    tokens = np.array([row_length - 3 if e in longs else row_length - 4 for e in range(20)])
    with pytest.raises(LongExampleError, match=f"example {min(longs)}: {row_length + 1} positions"):
        supply("pics", tokens, np.full(20, 4), row_length)
