"""Rows dealt by their pictures, against every way to deal them."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.order import pack as dealing
from midstream.order.pack import deal, deal_parts


def spread(pictures: Sequence[int], shares: Sequence[Sequence[int]]) -> int:
    totals = [sum(pictures[row] for row in share) for share in shares]
    return max(totals) - min(totals)


def least_spread(pictures: Sequence[int], size: int, totals: tuple[int, ...] = ()) -> int:
    """The smallest spread of shares of `size` rows, by trying all of them."""
    if not pictures:
        return max(totals) - min(totals)
    found = []
    for others in combinations(range(1, len(pictures)), size - 1):
        chosen = {0, *others}
        left = [number for at, number in enumerate(pictures) if at not in chosen]
        mine = sum(pictures[at] for at in chosen)
        found.append(least_spread(left, size, (*totals, mine)))
    return min(found)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=10))
@settings(max_examples=150, deadline=None)
def test_two_shares_are_as_alike_as_any_two_can_be(pictures: list[int]) -> None:
    size = len(pictures) // 2
    pictures = pictures[: 2 * size]
    shares = deal(pictures, [size, size])
    assert sorted(row for share in shares for row in share) == list(range(2 * size))
    assert [len(share) for share in shares] == [size, size]
    assert spread(pictures, shares) == least_spread(pictures, size)


@pytest.mark.parametrize(("ranks", "size"), [(3, 2), (3, 3), (4, 2)])
def test_shares_differ_by_one_picture_at_most_wherever_rows_allow_it(ranks: int, size: int) -> None:
    possible = 0
    for seed in range(60):
        # Rows of a mixture: none, one or some pictures.
        random = np.random.default_rng(seed)
        pictures = random.integers(0, 7, ranks * size) * random.integers(0, 2, ranks * size)
        numbers: list[int] = pictures.tolist()
        least = least_spread(numbers, size)
        found = spread(numbers, deal(numbers, [size] * ranks))
        assert found == least or least > 1, (seed, numbers)
        possible += least <= 1
    assert 5 < possible < 60


@given(
    pictures=st.lists(st.integers(0, 3), min_size=1, max_size=50),
    num_ranks=st.integers(2, 5),
    most_rows=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_ranks_and_their_micro_batches_get_every_row_once(
    pictures: list[int], num_ranks: int, most_rows: int
) -> None:
    rows = range(7, 7 + len(pictures))
    ranks = deal_parts(rows, lambda row: pictures[row - 7], num_ranks, most_rows)
    assert sorted(row for parts in ranks for part in parts for row in part) == list(rows)
    sizes = [sum(map(len, parts)) for parts in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert len({len(parts) for parts in ranks}) == 1
    assert all(len(part) <= most_rows for parts in ranks for part in parts)


def test_ranks_have_alike_many_pictures_in_each_micro_batch() -> None:
    for seed in range(20):
        pictures = np.random.default_rng(seed).integers(0, 5, 64).tolist()
        ranks = deal_parts(range(64), pictures.__getitem__, 4, 4)
        shown = np.array([[sum(pictures[row] for row in p) for p in parts] for parts in ranks])
        assert np.ptp(shown.sum(axis=1)) <= 1
        assert np.ptp(shown, axis=0).max() <= 1
        assert np.ptp(shown, axis=1).max() <= 1


def test_rows_without_pictures_stay_in_their_order() -> None:
    assert deal_parts(range(8), lambda row: 0, 2, 2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_steps_of_too_many_rows_stay_as_they_are_dealt_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [3, 3, 2, 2, 2]
    assert spread(pictures, deal(pictures, [3, 2])) == 0
    monkeypatch.setattr(dealing, "MOST_BITS", 0)
    shares = deal(pictures, [3, 2])
    assert [len(share) for share in shares] == [3, 2]
    assert spread(pictures, shares) == 2
