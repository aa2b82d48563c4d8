"""Rows by number: every planned token in exactly one, examples whole, rows full."""

import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.config import Budget, Epochs, Mixture, Rows, Sampling, Share
from midstream.order import plan as order_plan
from midstream.order import stream
from midstream.order.mixture import Supply
from midstream.order.plan import Filled, Joined, Padded, Placement, RowPlan, make_plan
from midstream.order.stream import ArrayLengths, parts_of, pieces_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plan_scale import TABLE, DrawnLengths

SEEDS = st.integers(0, 2**32 - 1)
LAYOUTS = st.sampled_from(["filled", "padded", "joined"])


@contextmanager
def small(block_rows: int, *, checked: int = 512, groups: bool = False) -> Iterator[None]:
    """Tiny data goes through many blocks, and where asked through many groups and chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_plan, "BLOCK_ROWS", block_rows)
        patch.setattr(order_plan, "CHECKED_BLOCKS", checked)
        if groups:
            patch.setattr(stream, "MAX_CHUNKS", 9)
            patch.setattr(stream, "MIN_CHUNK", 2)
            patch.setattr(stream, "GROUP_EXAMPLES", 13)
        yield


def mixed(total: int, shares: Mapping[str, float], sampling: Sampling = "permutation") -> Mixture:
    """Shares of a total, three passes at most."""
    parts = tuple(Share(source=name, share=share) for name, share in shares.items())
    return Mixture(total_tokens=total, shares=parts, max_epochs=3, sampling=sampling)


def supplies_of(seed: int, row_length: int) -> list[Supply]:
    """Long and short texts, captions that fill most of a row, conversations of any length."""
    random = np.random.default_rng(seed)
    caption = max(1, 2 * row_length // 3)

    def draw(count: int, low: int, high: int) -> ArrayLengths:
        return ArrayLengths(random.integers(low, high + 1, count))

    return [
        Supply("web", draw(60, 1, 4 * row_length), True),
        Supply("notes", draw(50, 1, max(1, row_length // 3)), True),
        Supply("pics", draw(50, caption, min(row_length, caption + 3)), False),
        Supply("talks", draw(40, 1, row_length), False),
    ]


Asked = tuple[list[Supply], Budget, Rows, int]


@st.composite
def plans(draw: st.DrawFn, layout: str | None = None) -> Asked:
    """What `make_plan` takes, of each layout over tiny sources: passes, or shares of a total."""
    row_length, seed = draw(st.integers(2, 40)), draw(SEEDS)
    rows = Rows(row_length=row_length, batch_rows=4, layout=layout or draw(LAYOUTS))
    supplies = supplies_of(seed, row_length)[: 2 if rows.layout == "joined" else 4]
    names = draw(st.lists(st.sampled_from([s.name for s in supplies]), min_size=1, unique=True))
    budget: Budget = Epochs(sources=tuple(names), epochs=draw(st.integers(1, 2)))
    if draw(st.booleans()):
        weights = [10.0 ** -draw(st.floats(0, 3)) for _ in names]
        shares = {name: w / sum(weights) for name, w in zip(names, weights, strict=True)}
        have = {supply.name: supply.lengths.total for supply in supplies}
        most = min(int(have[name] / share) for name, share in shares.items())
        sampling: Sampling = draw(st.sampled_from(["permutation", "replacement"]))
        budget = mixed(draw(st.integers(1, min(2 * most, 5000))), shares, sampling)
    return supplies, budget, rows, seed % 5


Taken = dict[int, np.ndarray]


def planned(plan: RowPlan, supplies: Sequence[Supply]) -> Taken:
    """By source: how often each of its tokens is planned, as its stream says."""
    found = {}
    for number, quota in enumerate(plan.quotas):
        if quota.divisible:
            taken = quota.stream.tokens(0, quota.tokens)
        else:
            taken = quota.stream.places(0, quota.examples)
        pieces = zip(taken.examples, taken.starts, taken.lengths, strict=True)
        found[number] = tally(
            plan, number, supplies, [(int(e), int(s), int(n)) for e, s, n in pieces]
        )
    return found


def tally(
    plan: RowPlan, number: int, supplies: Sequence[Supply], pieces: list[tuple[int, int, int]]
) -> np.ndarray:
    lengths = next(s for s in supplies if s.name == plan.names[number]).lengths
    assert isinstance(lengths, ArrayLengths)
    begins = np.cumsum([0, *lengths.lengths])
    times = np.zeros(begins[-1], dtype=np.int64)
    for example, start, length in pieces:
        assert 0 < length <= lengths.lengths[example] - start
        times[begins[example] + start : begins[example] + start + length] += 1
    return times


def rows_of(plan: RowPlan) -> list[list[Placement]]:
    return [plan.layout.row(index) for index in range(len(plan))]


def check_rows(plan: RowPlan, supplies: Sequence[Supply]) -> list[list[Placement]]:
    """Every planned token once, whole examples whole, rows without a gap or an overflow."""
    found, wanted = rows_of(plan), planned(plan, supplies)
    pieces: dict[int, list[tuple[int, int, int]]] = {number: [] for number in wanted}
    for row in found:
        end = 0
        for placed in row:
            assert placed.column == end
            end += placed.length
            pieces[placed.source].append((placed.example, placed.start, placed.length))
        assert end <= plan.rows.row_length
    for number, mine in pieces.items():
        assert np.array_equal(tally(plan, number, supplies, mine), wanted[number])
        quota = plan.quotas[number]
        if not quota.divisible:
            examples, starts, lengths = np.array(mine, dtype=np.int64).reshape(-1, 3).T
            assert not starts.any()
            assert np.array_equal(lengths, quota.stream.lengths.of(examples))
            assert len(mine) == quota.examples
    held = sum(placed.length for row in found for placed in row)
    assert held == plan.seen_tokens == sum(quota.tokens for quota in plan.quotas)
    return found


@given(data=st.data(), block_rows=st.sampled_from([1, 3, 10, 1024]), groups=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_planned_token_stands_in_exactly_one_row(
    data: st.DataObject, block_rows: int, groups: bool
) -> None:
    with small(block_rows, groups=groups):
        asked = data.draw(plans())
        plan = make_plan(*asked)
        found = check_rows(plan, asked[0])
    assert plan.num_steps == -(-len(found) // 4)
    if plan.rows.layout != "joined":
        assert all(found)
    if isinstance(plan.layout, Filled):
        check_cuts(plan, found)


def check_cuts(plan: RowPlan, rows: list[list[Placement]]) -> None:
    """Text is cut where it fills a row, behind rows of a longer document, or where its budget ends.

    So no document is cut that a row had room for.
    """
    size, last = plan.rows.row_length, set()
    for number, quota in enumerate(plan.quotas):
        if quota.divisible and quota.tokens:
            end = quota.stream.tokens(quota.tokens - 1, quota.tokens)
            last.add((number, int(end.examples[0]), int(end.starts[0]) + 1))
    for row in rows:
        for placed in row:
            quota, end_of = plan.quotas[placed.source], placed.start + placed.length
            whole = int(quota.stream.lengths.of(np.array([placed.example]))[0])
            full = row[-1].column + row[-1].length == size
            budget_ends = (placed.source, placed.example, end_of) in last
            assert end_of == whole or end_of % size == 0 or budget_ends or full


@pytest.mark.parametrize("seed", range(2))
def test_plans_of_more_blocks_than_are_looked_at_hold_every_token_too(seed: int) -> None:
    supplies = supplies_of(seed, 30)
    total = int(0.9 * supplies[0].lengths.total / 0.55)
    budget = mixed(total, {"web": 0.55, "notes": 0.05, "pics": 0.3, "talks": 0.1})
    with small(16, checked=3):
        plan = make_plan(supplies, budget, Rows(row_length=30, batch_rows=4), seed)
        assert isinstance(plan.layout, Filled)
        assert plan.layout.num_blocks > 3
        assert len(plan) == plan.layout.num_blocks * plan.layout.block_rows
        rows = check_rows(plan, supplies)
        # Rows behind the need of a block take over what others have several of.
        assert sum(not row for row in rows) == 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.faults)])
@pytest.mark.slow
def test_no_block_of_a_long_plan_needs_more_rows_than_it_has(seed: int) -> None:
    # How many conversations fit side by side is up to chance, and no text evens it out.
    lengths = np.random.default_rng(seed).integers(5, 101, 2000)
    supplies = [Supply("talks", ArrayLengths(lengths), False)]
    with small(32, checked=64):
        plan = make_plan(
            supplies,
            Epochs(sources=("talks",), epochs=25),
            Rows(row_length=100, batch_rows=8),
            seed,
        )
        assert isinstance(plan.layout, Filled)
        assert plan.layout.num_blocks > 10 * 64
        held = [sum(p.length for p in plan.layout.row(row)) for row in range(len(plan))]
        assert sum(held) == plan.seen_tokens


@pytest.mark.parametrize(("checked", "share"), [(512, 0.1), (512, 0.4), (512, 0.7), (3, 0.4)])
def test_rows_of_a_picture_and_texts_have_at_most_one_percent_padding(
    checked: int, share: float
) -> None:
    random = np.random.default_rng(0)
    captions = 729 + np.clip(random.normal(15, 4, 9000).round(), 4, 60)
    texts = np.clip(np.exp(random.normal(np.log(300), 1.0, 20_000)).round(), 5, 8000)
    supplies = [
        Supply("pics", ArrayLengths(captions), False),
        Supply("web", ArrayLengths(texts), True),
    ]
    rows = Rows(row_length=1024, batch_rows=64)
    with small(1024, checked=checked):
        plan = make_plan(supplies, mixed(6_000_000, {"pics": share, "web": 1 - share}), rows, 0)
        found = rows_of(plan)
    assert 5000 < len(plan) < 7000
    assert plan.seen_tokens >= 0.99 * 1024 * len(plan)
    parts = Counter(p.example for row in found for p in row if p.source == 1)
    if share == 0.1:  # More rows of text than tails of pictures: no text need be cut.
        assert all(num == 1 for example, num in parts.items() if texts[example] <= 1024)


@pytest.mark.parametrize("layout", ["filled", "padded", "joined"])
@pytest.mark.parametrize("checked", [512, 4])
def test_every_block_has_the_shares_of_the_whole(layout: str, checked: int) -> None:
    supplies = supplies_of(1, 40)
    shares = {"web": 0.6, "notes": 0.1, "pics": 0.2, "talks": 0.1}
    if layout == "joined":
        supplies, shares = supplies[:2], {"web": 0.9, "notes": 0.1}
    total = int(min(s.lengths.total / shares[s.name] for s in supplies))
    rows = Rows.model_validate({"row_length": 40, "batch_rows": 4, "layout": layout})
    with small(12, checked=checked):
        plan = make_plan(supplies, mixed(total, shares), rows, 0)
        num_blocks = plan.layout.num_blocks  # type: ignore[attr-defined]
        assert num_blocks > 4
        found = rows_of(plan)
    block_tokens = plan.seen_tokens / num_blocks
    so_far = np.cumsum([sum(p.length for p in row) for row in found])
    for number, quota in enumerate(plan.quotas):
        mine = np.cumsum([sum(p.length for p in row if p.source == number) for row in found])
        share = quota.tokens / plan.seen_tokens
        assert np.abs(mine - share * so_far).max() <= share * block_tokens + 2 * 40


@given(data=st.data(), block_rows=st.sampled_from([2, 7]), groups=st.booleans())
@settings(max_examples=12, deadline=None)
@pytest.mark.slow
def test_padded_rows_hold_one_whole_example_each_and_text_as_in_joined_ones(
    data: st.DataObject, block_rows: int, groups: bool
) -> None:
    with small(block_rows, groups=groups):
        asked = data.draw(plans("padded"))
        plan = make_plan(*asked)
        found = check_rows(plan, asked[0])
        layout = plan.layout
        assert isinstance(layout, Padded)
        text = [number for number, quota in enumerate(plan.quotas) if quota.divisible]
        joined = Joined(plan.quotas, text, plan.rows.row_length, layout.key)
        expected = [joined.row(index) for index in range(len(joined))]
    seen = []
    for index, row in enumerate(found):
        if layout.sees_all(index):
            seen.append(row)
        else:
            assert len(row) == 1
            assert row[0].source not in text
    assert sorted(seen, key=repr) == sorted(expected, key=repr)
    # All but the last are full.
    room = sum(plan.rows.row_length - p.column - p.length for *_, p in expected)
    assert room < plan.rows.row_length


@given(seed=SEEDS, row_length=st.integers(1, 30), block_rows=st.sampled_from([2, 5, 1024]))
@settings(max_examples=20, deadline=None)
def test_joined_rows_of_one_source_are_its_documents_in_order_cut_and_shuffled_in_windows(
    seed: int, row_length: int, block_rows: int
) -> None:
    supply = supplies_of(seed, row_length)[0]
    with small(block_rows):
        rows = Rows(row_length=row_length, batch_rows=2, layout="joined")
        plan = make_plan([supply], Epochs(sources=("web",), epochs=2), rows, 0)
        found = rows_of(plan)
        assert all(plan.layout.sees_all(index) for index in range(len(plan)))
    order = plan.quotas[0].stream.places(0, 2 * len(supply.lengths))
    text = [
        (int(e), at) for e, n in zip(order.examples, order.lengths, strict=True) for at in range(n)
    ]
    expected = [text[at : at + row_length] for at in range(0, len(text), row_length)]
    held = [[(p.example, p.start + at) for p in row for at in range(p.length)] for row in found]
    for low in range(0, len(expected), block_rows):
        window = slice(low, low + block_rows)
        assert sorted(held[window]) == sorted(expected[window])
    if len(expected) > 30 and block_rows > 2:
        assert held != expected


def check_row_by_row(asked: Asked) -> None:
    """Rows are equal whoever is asked, in whatever order, and however little."""
    plan = make_plan(*asked)
    once, order = rows_of(plan), np.random.default_rng(0).permutation(len(plan)).tolist()
    again, travelled = make_plan(*asked), pickle.loads(pickle.dumps(plan))
    assert len(again) == len(travelled) == len(plan)
    for k in order[:40]:
        assert again.layout.row(k) == travelled.layout.row(k) == once[k]
        assert again.layout.sees_all(k) == plan.layout.sees_all(k)
    assert make_plan(*asked).layout.row(order[0]) == once[order[0]]
    # Pickled before it was asked for anything.
    fresh = pickle.loads(pickle.dumps(make_plan(*asked)))
    assert fresh.layout.row(order[-1]) == once[order[-1]]


@given(data=st.data(), block_rows=st.sampled_from([1, 5, 1024]), groups=st.booleans())
@settings(max_examples=12, deadline=None)
@pytest.mark.slow
def test_row_k_is_a_function_of_the_plan_and_k_alone(
    data: st.DataObject, block_rows: int, groups: bool
) -> None:
    with small(block_rows, groups=groups):
        check_row_by_row(data.draw(plans()))


@pytest.mark.parametrize("layout", ["filled", "padded"])
def test_row_k_is_a_function_of_the_plan_and_k_alone_in_plans_of_many_blocks(layout: str) -> None:
    rows = Rows.model_validate({"row_length": 30, "batch_rows": 4, "layout": layout})
    budget = mixed(5000, {"web": 0.6, "notes": 0.05, "pics": 0.25, "talks": 0.1})
    with small(16, checked=3):
        check_row_by_row((supplies_of(1, 30), budget, rows, 0))


@pytest.mark.parametrize("layout", ["filled", "padded", "joined"])
def test_another_seed_gives_other_rows(layout: str) -> None:
    supplies = supplies_of(0, 30)[: 2 if layout == "joined" else 4]
    rows = Rows.model_validate({"row_length": 30, "batch_rows": 4, "layout": layout})
    budget = Epochs(sources=tuple(supply.name for supply in supplies), epochs=1)
    one, other = (rows_of(make_plan(supplies, budget, rows, seed)) for seed in (0, 1))
    assert sum(a == b for a, b in zip(one, other, strict=False)) < 0.1 * len(one)


def test_rows_of_a_block_are_not_sorted_by_what_they_hold() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 700)
    supply = Supply("web", ArrayLengths(lengths), True)
    rows = Rows(row_length=60, batch_rows=4)
    found = rows_of(make_plan([supply], Epochs(sources=("web",), epochs=1), rows, 0))
    assert 200 < len(found) < order_plan.BLOCK_ROWS
    longest = [max(placed.length for placed in row) for row in found]
    assert abs(np.corrcoef(longest, np.arange(len(found)))[0, 1]) < 0.2


def test_joined_rows_with_images_are_refused() -> None:
    rows = Rows(row_length=32, batch_rows=4, layout="joined")
    with pytest.raises(ValueError, match=r"joined layout is for text only, \['pics'\] are none"):
        make_plan(supplies_of(0, 32), Epochs(sources=("web", "pics"), epochs=1), rows, 0)


def test_a_plan_lists_the_whole_examples_of_a_source_in_its_order() -> None:
    supplies = supplies_of(0, 30)
    plan = make_plan(
        supplies, Epochs(sources=("web", "pics"), epochs=2), Rows(row_length=30, batch_rows=4), 0
    )
    found = [example for part in plan.examples_of(1, at_once=7) for example in part.tolist()]
    assert sorted(found) == sorted(2 * list(range(50)))
    assert found == plan.quotas[1].stream.places(0, 100).examples.tolist()


class Counted(DrawnLengths):
    """Lengths of very many examples; it counts what it is asked for."""

    asked = chunks = 0

    def of(self, examples: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """Length of each."""
        self.asked += len(examples)
        return super().of(examples)

    def totals(self, chunks: np.ndarray, size: int, draws: np.ndarray | None = None) -> np.ndarray:
        """Summed lengths of whole chunks."""
        self.chunks += len(chunks)
        return super().totals(chunks, size)


@pytest.mark.parametrize(
    ("layout", "sampling"), [("filled", "permutation"), ("padded", "replacement")]
)
@pytest.mark.slow
def test_any_row_of_a_billion_captions_and_ten_billion_documents_costs_alike(
    layout: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_plan, "CHECKED_BLOCKS", 4)
    rows = Rows.model_validate({"row_length": 1024, "batch_rows": 256, "layout": layout})
    budget = mixed(28_795_904_000, {"pics": 0.5, "web": 0.5}, sampling)

    def made() -> tuple[RowPlan, list[Counted]]:
        tables = np.arange(TABLE) // 4 + 733, np.arange(TABLE) + 500
        numbers = 10**9 + 7, 10**10 + 77
        lengths = [Counted(n, table) for n, table in zip(numbers, tables, strict=True)]
        supplies = [Supply("pics", lengths[0], False), Supply("web", lengths[1], True)]
        return make_plan(supplies, budget, rows, 0), lengths

    plan, lengths = made()
    assert len(plan) > 2.8e7
    assert abs(plan.seen_tokens - 28_795_904_000) < 800
    for item in lengths:
        # Groups of up to 16,384 examples: no more than those of the examples that are taken.
        assert item.asked < 50 * 2**14
        assert item.chunks < 3e7 / 200
    asked = []
    for index in (0, 1, 10**6, len(plan) // 2, len(plan) - 2, len(plan) - 1):
        before = sum(item.asked + item.chunks for item in lengths)
        row = plan.layout.row(index)
        asked.append(sum(item.asked + item.chunks for item in lengths) - before)
        assert row
        assert sum(placed.length for placed in row) <= 1024
        for placed in row:
            assert placed.source or placed.start == 0
    assert max(asked) <= 12 * 2**14
    other, _ = made()
    middle = len(plan) // 2
    assert other.layout.row(middle) == plan.layout.row(middle)


class DrawnDocuments(ArrayLengths):
    """Documents as OBELICS has them: 815 text tokens in the mean, log-normal with a deviation of 1
    of the logarithm, and 2.5 pictures, geometric and at most 30, anywhere among the tokens."""

    def __init__(self, seed: int, count: int, num_patches: int) -> None:
        random = np.random.default_rng(seed)
        drawn = np.rint(random.lognormal(np.log(815) - 0.5, 1.0, count))
        self.tokens = np.maximum(drawn, 2).astype(np.int64)
        self.pictures = np.minimum(random.geometric(1 / 2.5, count), np.minimum(30, self.tokens))
        self.seed, self.num_patches = seed, num_patches
        super().__init__(self.tokens + num_patches * self.pictures)

    def parts(self, example: int) -> list[int]:
        """The pictures at places that follow from the example."""
        num_tokens, number = int(self.tokens[example]), int(self.pictures[example])
        random = np.random.default_rng((self.seed, example))
        places = sorted(random.choice(num_tokens, number, replace=False).tolist())
        return parts_of(places, num_tokens, self.num_patches)


@pytest.mark.parametrize(
    ("row_length", "num_patches", "most"),
    [(2048, 256, 0.01), (2048, 576, 0.035), (4096, 576, 0.01)],
)
def test_rows_of_documents_alone_are_full_to_one_per_cent_where_pictures_allow_it(
    row_length: int, num_patches: int, most: float
) -> None:
    lengths = DrawnDocuments(0, 4000, num_patches)
    rows = Rows(row_length=row_length, batch_rows=8)
    supply = Supply("pages", lengths, False)
    plan = make_plan([supply], Epochs(sources=("pages",), epochs=1), rows, 0)
    placed = rows_of(plan)
    assert all(sum(part.length for part in row) <= row_length for row in placed)
    assert 1 - plan.seen_tokens / (len(plan) * row_length) <= most
    assert isinstance(plan.layout, Filled)
    assert plan.layout.num_placed(0) == sum(map(len, placed))
    found: dict[int, list[tuple[int, int]]] = {}
    for part in (part for row in placed for part in row):
        found.setdefault(part.example, []).append((part.start, part.length))
    assert len(found) == 4000
    for example, parts in found.items():
        size, ends = int(lengths.lengths[example]), [0]
        for start, length in sorted(parts):
            assert start == ends[-1]
            ends.append(start + length)
        assert ends[-1] == size
        # What fits into a row is whole; what does not is cut between its parts.
        assert len(parts) == 1 or size > row_length
        bounds = np.cumsum([0, *lengths.parts(example)]).tolist()
        longer = [pair for pair in pairwise(bounds) if pair[1] - pair[0] > row_length]
        for end in ends:
            assert end in bounds or any(low < end < high for low, high in longer)


def test_documents_are_cut_no_finer_where_texts_fill_the_rows() -> None:
    lengths = DrawnDocuments(0, 900, 576)
    texts = np.random.default_rng(0).integers(20, 300, 1500)
    supplies = [Supply("pages", lengths, False), Supply("web", ArrayLengths(texts), True)]
    rows, number = Rows(row_length=2048, batch_rows=8), 0
    plan = make_plan(supplies, Epochs(sources=("pages", "web"), epochs=1), rows, 0)
    assert isinstance(plan.layout, Filled)
    for example, size in enumerate(lengths.lengths.tolist()):
        number += 1 if size <= 2048 else len(pieces_of(lengths.parts(example), 2048))
    assert plan.layout.num_placed(0) == number
    alone = make_plan(supplies[:1], Epochs(sources=("pages",), epochs=1), rows, 0)
    assert isinstance(alone.layout, Filled)
    assert alone.layout.num_placed(0) > number


@pytest.mark.parametrize("checked", [2, 512])
def test_every_piece_of_a_long_document_lies_in_one_row_of_its_block(checked: int) -> None:
    lengths = DrawnDocuments(1, 300, 40)
    rows = Rows(row_length=512, batch_rows=8)
    supplies = [
        Supply("pages", lengths, False),
        Supply("web", ArrayLengths(np.full(90, 700)), True),
    ]
    with small(16, checked=checked):
        plan = make_plan(supplies, Epochs(sources=("pages", "web"), epochs=2), rows, 0)
        found: dict[int, list[tuple[int, int]]] = {}
        for row in rows_of(plan):
            for part in row:
                if part.source == 0:
                    found.setdefault(part.example, []).append((part.start, part.length))
    assert len(found) == 300
    for example, parts in found.items():
        size = int(lengths.lengths[example])
        sizes = [size] if size <= 512 else pieces_of(lengths.parts(example), 512)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        assert sorted(parts) == sorted(2 * list(zip(starts, sizes, strict=True)))
