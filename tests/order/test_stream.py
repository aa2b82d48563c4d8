"""The seeded order of a source: every question has the answer of a plain list."""

import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.config import Sampling
from midstream.order import stream
from midstream.order.stream import ArrayLengths, Stream, drawn_from, permuted

SEEDS = st.integers(0, 2**32 - 1)
SAMPLINGS = st.sampled_from(["permutation", "replacement"])
# At most so many chunks, of a multiple of so many examples; examples permuted together.
SIZES = st.sampled_from(
    [(1, 1, 1), (2, 1, 4), (3, 2, 5), (7, 5, 16), (10, 4, 1), (1000, 1, 1), (1000, 1, 7)]
)
Sizes = tuple[int, int, int]


@contextmanager
def sized(sizes: Sizes) -> Iterator[None]:
    """Small data takes the path of a large one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("MAX_CHUNKS", "MIN_CHUNK", "GROUP_EXAMPLES"), sizes, strict=True):
            patch.setattr(stream, name, value)
        yield


def lengths_of(seed: int, count: int, longest: int = 9) -> ArrayLengths:
    return ArrayLengths(np.random.default_rng(seed).integers(1, longest + 1, count))


def order(found: Stream, count: int) -> list[int]:
    """The first examples, asked for one by one."""
    return [int(found.places(place, place + 1).examples[0]) for place in range(count)]


@given(sizes=SIZES, count=st.integers(1, 30), seed=SEEDS, sampling=SAMPLINGS, key=st.text())
@settings(max_examples=25, deadline=None)
def test_places_and_tokens_are_those_of_a_plain_list(
    sizes: Sizes, count: int, seed: int, sampling: Sampling, key: str
) -> None:
    lengths = lengths_of(seed, count)
    random = np.random.default_rng(seed)
    with sized(sizes):
        examples = order(Stream(lengths, key, sampling), 2 * count + 3)
        plain = [(e, at) for e in examples for at in range(lengths.lengths[e])]
        begins = np.cumsum([0, *lengths.lengths[examples]])
        asked = Stream(lengths, key, sampling)
        for _ in range(20):
            low, high = sorted(random.integers(0, len(examples) + 1, 2).tolist())
            found = asked.places(low, high)
            assert found.examples.tolist() == examples[low:high]
            assert found.starts.tolist() == [0] * (high - low)
            assert found.lengths.tolist() == lengths.lengths[examples[low:high]].tolist()
            assert asked.tokens_before(low) == begins[low]
            low, high = sorted(random.integers(0, len(plain) + 1, 2).tolist())
            found = asked.tokens(low, high)
            pieces = zip(found.examples, found.starts, found.lengths, strict=True)
            assert [(e, s + at) for e, s, n in pieces for at in range(n)] == plain[low:high]
            assert (found.lengths > 0).all()
            twice = int(random.integers(0, 2 * len(plain) - 1))
            middles = begins[:-1] + begins[1:]
            assert asked.count_before(twice) == int((middles < twice).sum())


@given(sizes=SIZES, count=st.integers(1, 30), seed=SEEDS, size=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_text_is_cut_at_the_nearest_place_where_a_document_begins_or_rows_of_it_end(
    sizes: Sizes, count: int, seed: int, size: int
) -> None:
    lengths = lengths_of(seed, count, longest=40)
    with sized(sizes):
        found = Stream(lengths, "a")
        begins = np.cumsum([0, *lengths.lengths[order(found, 2 * count)]])
        allowed = sorted({int(begins[-1])}.union(*(range(b, e, size) for b, e in pairwise(begins))))
        for token in range(lengths.total + 1):
            cut = found.cut_near(token, size)
            assert cut in allowed
            assert abs(cut - token) == min(abs(place - token) for place in allowed)


@given(sizes=SIZES, count=st.integers(1, 40), seed=SEEDS, sampling=SAMPLINGS)
@settings(max_examples=12, deadline=None)
def test_a_fresh_stream_asked_one_thing_answers_as_one_that_was_asked_everything(
    sizes: Sizes, count: int, seed: int, sampling: Sampling
) -> None:
    lengths = lengths_of(seed, count)
    with sized(sizes):
        old = Stream(lengths, "key", sampling)
        examples = order(old, 3 * count)
        travelled = pickle.loads(pickle.dumps(old))
        for place in np.random.default_rng(seed).permutation(3 * count)[:4].tolist():
            token = old.tokens_before(place)
            for other in (Stream(lengths, "key", sampling), travelled):
                assert other.places(place, place + 1).examples.tolist() == [examples[place]]
                assert other.tokens_before(place) == token
            late = Stream(lengths, "key", sampling)
            assert late.tokens(token, token + 1).examples.tolist() == [examples[place]]
            assert late.count_before(2 * token) == place


@pytest.mark.parametrize("sizes", [(2**22, 256, 2**14), (2**22, 256, 100), (60, 5, 100)])
def test_passes_and_keys_share_no_more_places_than_chance(sizes: Sizes) -> None:
    count, lengths = 1200, ArrayLengths(np.ones(1200))
    with sized(sizes):
        one, other = (Stream(lengths, key).places(0, 3 * count).examples for key in "ab")
    orders = [np.arange(count), *one.reshape(3, count), *other.reshape(3, count)]
    for number, first in enumerate(orders):
        for second in orders[number + 1 :]:
            # Chance: one place on average; examples of a chunk stay in one group of 100.
            assert int((first == second).sum()) < 12
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.35


def test_examples_of_a_chunk_do_not_stay_in_their_order() -> None:
    with sized((60, 20, 200)):
        found = Stream(ArrayLengths(np.ones(1200)), "a").places(0, 1200).examples
    steps = np.diff(found)
    assert (steps == 1).mean() < 0.03
    # Ten chunks of twenty are permuted together: neighbours are of one chunk once in ten times.
    assert 0.05 < (found[1:] // 20 == found[:-1] // 20).mean() < 0.2


def test_other_seeds_of_a_few_examples_give_all_their_orders_alike() -> None:
    for size, orders in ((2, 2), (3, 6), (4, 24)):
        keys = 60 * orders
        seen = Counter(
            tuple(permuted(np.arange(size), size, f"{key}").tolist()) for key in range(keys)
        )
        assert len(seen) == orders
        # 60 each on average, by chance 8 more or less.
        assert 25 < min(seen.values()) <= max(seen.values()) < 100


@pytest.mark.parametrize("size", [5, 33])
def test_each_example_comes_at_each_place_alike(size: int) -> None:
    keys = 1200
    found = np.stack([permuted(np.arange(size), size, f"{key}") for key in range(keys)])
    expected = keys / size
    for place in (0, 1, size // 2, size - 1):
        seen = np.bincount(found[:, place], minlength=size)
        chi = float(((seen - expected) ** 2 / expected).sum())
        assert abs(chi - (size - 1)) < 6 * np.sqrt(2 * (size - 1))


@pytest.mark.parametrize(("size", "sizes"), [(50, (2**22, 256, 256)), (100, (50, 2, 256))])
def test_draws_with_replacement_are_uniform_and_independent_and_never_end(
    size: int, sizes: Sizes
) -> None:
    with sized(sizes):
        found = Stream(ArrayLengths(np.ones(size)), "a", "replacement")
        chunk, draws = found.chunk, 51_200
        assert found.num_chunks == 50
        taken = found.places(0, chunk * draws).examples
    # A chunk is drawn whole: the draws of chunks are those of examples, one in each.
    whole, counted = np.unique(taken, return_counts=True)
    assert whole.tolist() == list(range(size))
    assert counted.reshape(50, chunk).min(axis=1).tolist() == counted[::chunk].tolist()
    chi = float(((counted[::chunk] - 1024) ** 2 / 1024).sum())
    assert abs(chi - 49) < 6 * np.sqrt(2 * 49)
    if chunk == 1:
        for behind in (1, 2, 16, 50):
            pairs = np.bincount(taken[:-behind] * size + taken[behind:], minlength=size**2)
            expected = (draws - behind) / size**2
            chi = float(((pairs - expected) ** 2 / expected).sum())
            assert abs(chi - (size**2 - 1)) < 6 * np.sqrt(2 * (size**2 - 1))


def test_draws_differ_between_keys() -> None:
    one, other = (drawn_from(np.arange(5000), 100, key) for key in "ab")
    assert 20 < (one == other).sum() < 90


@given(size=st.integers(1, 3000), key=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_permutation_reaches_every_index_once(size: int, key: str) -> None:
    found = permuted(np.arange(size), size, key)
    assert np.array_equal(np.sort(found), np.arange(size))


@given(size=st.integers(1, 10**12), seed=SEEDS, key=st.text(max_size=8))
@settings(max_examples=15, deadline=None)
def test_a_permutation_and_draws_are_the_same_one_by_one_and_in_bulk(
    size: int, seed: int, key: str
) -> None:
    indices = np.random.default_rng(seed).integers(0, size, (3, 4))
    for send in (permuted, drawn_from):
        bulk = send(indices, size, key)
        assert bulk.shape == (3, 4)
        assert bulk.min() >= 0
        assert bulk.max() < size
        one_by_one = [[int(send(np.array([x]), size, key)[0]) for x in row] for row in indices]
        assert bulk.tolist() == one_by_one


def test_a_source_without_an_example_is_refused() -> None:
    with pytest.raises(ValueError, match="0/web: the source holds no example"):
        Stream(ArrayLengths(np.zeros(0)), "0/web")
