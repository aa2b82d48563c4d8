"""The loader: ranks, workers, micro-batches and restarts are views of the same rows."""

import pickle
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_sources, mixture
from made_documents import drawn_documents
from torch import Tensor

from midstream.config import Rows
from midstream.core.batch import PADDING, Batch, Row, add_counts
from midstream.core.tokens import TokenCount
from midstream.data.rows import RowDataset, View, build_row, load_steps, plan_rows
from midstream.order import plan as order_plan

PATCHES, BATCH_ROWS = 4, 8


class Pictures:
    """What stands for a picture: its source and example. A class, since workers are sent it."""

    def __call__(self, images: np.ndarray) -> Tensor:
        """float [images, 2]."""
        return torch.from_numpy(images).float()


class Fewer:
    """One picture less than was asked for."""

    def __call__(self, images: np.ndarray) -> Tensor:
        """float [images - 1, 2]."""
        return torch.from_numpy(images[1:]).float()


@pytest.fixture(scope="module", params=["filled", "padded"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowDataset:
    """Rows of texts, captions and conversations; in the last step half of the ranks have none."""
    sources = make_sources(tmp_path_factory.mktemp("data"), 7, longest=28)
    rows = Rows(row_length=32, batch_rows=BATCH_ROWS, layout=request.param)
    for total in range(1400, 2000, 16):
        shares = {"web": 0.5, "pics": 0.3, "talks": 0.1, "notes": 0.1}
        plan = plan_rows(sources, PATCHES, mixture(total, shares, 2), rows, 1)
        if 0 < len(plan) % BATCH_ROWS <= BATCH_ROWS // 2:
            break
    assert 0 < len(plan) % BATCH_ROWS <= BATCH_ROWS // 2
    assert plan.num_steps >= 5
    return RowDataset(plan, sources, PATCHES, Pictures())


@pytest.fixture(scope="module")
def rows(dataset: RowDataset) -> list[Row]:
    """Every row, built one by one."""
    return [build_row(dataset.plan, dataset.sources, k, PATCHES) for k in range(len(dataset))]


def check(batches: Sequence[Batch], expected: Sequence[Row]) -> None:
    """The batches hold exactly these rows and their pictures, in this order."""
    for name in ("input_ids", "targets", "position_ids", "segment_ids"):
        found = [row.tolist() for batch in batches for row in getattr(batch, name)]
        assert found == [getattr(row, name).tolist() for row in expected]
    shown = [image for batch in batches for image in batch.images.int().tolist()]
    assert shown == [image for row in expected for image in row.images.tolist()]
    low, slots = 0, []
    for batch in batches:
        slots += [(int(row) + low, int(column)) for row, column in batch.image_slots]
        low += len(batch.input_ids)
        assert len(batch.image_slots) == len(batch.images)
        assert sum(batch.sources.values(), TokenCount(pad=batch.counts.pad)) == batch.counts
    assert slots == [(k, int(c)) for k, row in enumerate(expected) for c in row.image_starts]
    total = sum((batch.counts for batch in batches), TokenCount())
    assert total == sum((row.counts for row in expected), TokenCount())
    assert add_counts(b.sources for b in batches) == add_counts(r.sources for r in expected)


def padding(batch: Batch) -> bool:
    """Whether a batch is what a rank without rows works on."""
    return bool((batch.segment_ids == PADDING).all())


def check_steps(steps: Sequence[Sequence[Batch]], expected: list[Row], first_row: int = 0) -> None:
    """Each step holds its rows from `first_row` on, and there are no other steps."""
    bounds = range(first_row // BATCH_ROWS * BATCH_ROWS, len(expected), BATCH_ROWS)
    wanted = [expected[max(low, first_row) : low + BATCH_ROWS] for low in bounds]
    wanted = [part for part in wanted if part]
    assert len(steps) == len(wanted)
    for batches, part in zip(steps, wanted, strict=True):
        check(batches, part)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("first_row", [0, 11])
def test_the_rows_of_a_step_are_the_same_for_every_number_of_ranks(
    dataset: RowDataset, rows: list[Row], world_size: int, first_row: int
) -> None:
    ranks = [
        list(
            load_steps(dataset, first_row=first_row, micro_rows=3, rank=rank, world_size=world_size)
        )
        for rank in range(world_size)
    ]
    # No rank runs out of steps before the others; one without rows in a part gets padding there.
    together = list(zip(*ranks, strict=True))
    assert all(len({len(batches) for batches in step}) == 1 for step in together)
    steps = [[b for batches in step for b in batches if not padding(b)] for step in together]
    check_steps(steps, rows, first_row)
    idle = [b for step in together for batches in step for b in batches if padding(b)]
    assert bool(idle) == (world_size > 1)
    assert all(b.counts == TokenCount() and len(b.images) == 0 for b in idle)


@pytest.mark.parametrize("seed", range(2))
def test_ranks_that_look_at_pictures_get_alike_many_of_the_same_rows(
    tmp_path: Path, seed: int
) -> None:
    sources = make_sources(tmp_path, seed, longest=60)
    sources["docs"] = drawn_documents(tmp_path, "docs", seed, 60, longest=40)
    shares = {"web": 0.3, "pics": 0.2, "docs": 0.5}
    budget = mixture(2600, shares, 2)
    plan = plan_rows(sources, PATCHES, budget, Rows(row_length=64, batch_rows=BATCH_ROWS), seed)
    data = RowDataset(plan, sources, PATCHES, Pictures())
    expected = [build_row(plan, sources, index, PATCHES) for index in range(len(plan))]
    shown = [data.num_pictures(index) for index in range(len(plan))]
    assert shown == [len(row.images) for row in expected]
    assert max(shown) > 3
    views = [View(len(plan), BATCH_ROWS, 2, rank, 2, data.num_pictures) for rank in range(2)]
    loaded = [
        list(load_steps(data, first_row=0, micro_rows=2, rank=rank, world_size=2, looks=True))
        for rank in range(2)
    ]
    dealt = [list(view.steps(0)) for view in views]
    for step in range(plan.num_steps):
        ranks = [steps[step] for steps in dealt]
        rows = sorted(row for parts in ranks for part in parts for row in part)
        assert rows == list(range(step * BATCH_ROWS, min((step + 1) * BATCH_ROWS, len(plan))))
        totals = [sum(shown[row] for part in parts for row in part) for parts in ranks]
        halves = combinations([shown[row] for row in rows], len(rows) // 2)
        assert abs(totals[0] - totals[1]) == min(
            abs(2 * sum(half) - sum(totals)) for half in halves
        )
        for parts, steps in zip(ranks, loaded, strict=True):
            for part, batch in zip(parts, steps[step], strict=True):
                check([batch] if part else [], [expected[row] for row in part])
    alone = list(load_steps(data, first_row=0, micro_rows=3, looks=True))
    check_steps(alone, expected)


@pytest.mark.parametrize("micro_rows", range(1, BATCH_ROWS + 2))
def test_the_rows_of_a_step_are_the_same_for_every_micro_batch(
    dataset: RowDataset, rows: list[Row], micro_rows: int
) -> None:
    steps = list(load_steps(dataset, first_row=0, micro_rows=micro_rows))
    assert all(0 < len(batch.input_ids) <= micro_rows for step in steps for batch in step)
    check_steps(steps, rows)


@pytest.mark.parametrize("world_size", [1, 2])
def test_loading_from_any_row_continues_as_if_never_stopped(
    dataset: RowDataset, rows: list[Row], world_size: int
) -> None:
    # Every row of the last steps, and some before.
    firsts = [*range(0, len(rows) - 13, 5), *range(len(rows) - 13, len(rows) + 3)]
    for first in firsts:
        ranks = [
            list(load_steps(dataset, first_row=first, micro_rows=3, rank=r, world_size=world_size))
            for r in range(world_size)
        ]
        steps = [
            [b for batches in step for b in batches if not padding(b)]
            for step in zip(*ranks, strict=True)
        ]
        check_steps(steps, rows, first)


class Consumer:
    """Takes a loader's rows one by one, and remembers nothing but how many it took."""

    def __init__(self, dataset: RowDataset, first_row: int) -> None:
        self.rows_consumed = first_row
        steps = load_steps(dataset, first_row=first_row, micro_rows=1)
        self._batches: Iterator[Batch] = (batch for step in steps for batch in step)

    def take(self, count: int) -> list[bytes]:
        """What the next rows hold."""
        found = []
        for _ in range(count):
            batch = next(self._batches)
            tensors = (batch.input_ids, batch.targets, batch.segment_ids, batch.images)
            found.append(b"".join(tensor.numpy().tobytes() for tensor in tensors))
            self.rows_consumed += 1
        return found

    def is_done(self) -> bool:
        """Whether no row is left."""
        return next(self._batches, None) is None


@pytest.mark.parametrize("layout", ["filled", pytest.param("padded", marks=pytest.mark.faults)])
@pytest.mark.slow
def test_restoring_at_every_row_twice_in_a_row_gives_the_uninterrupted_sequence(
    tmp_path: Path, layout: Literal["filled", "padded"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_plan, "BLOCK_ROWS", 6)
    sources = make_sources(tmp_path, 3, longest=28)
    budget = mixture(300, {"web": 0.4, "pics": 0.4, "talks": 0.2})
    plan = plan_rows(sources, PATCHES, budget, Rows(row_length=32, batch_rows=4, layout=layout), 1)
    kept = pickle.dumps(RowDataset(plan, sources, PATCHES, Pictures()))
    count = len(plan)
    assert 8 < count < 18
    uninterrupted = Consumer(pickle.loads(kept), 0).take(count)
    assert len(set(uninterrupted)) == count
    for first in range(count + 1):
        one = Consumer(pickle.loads(kept), 0)
        assert one.take(first) == uninterrupted[:first]
        for second in range(first, count + 1):
            two = Consumer(pickle.loads(kept), one.rows_consumed)
            assert two.take(second - first) == uninterrupted[first:second]
            three = Consumer(pickle.loads(kept), two.rows_consumed)
            assert three.take(count - second) == uninterrupted[second:]
            assert three.is_done()


@pytest.mark.slow
def test_worker_processes_load_the_same_rows(dataset: RowDataset, rows: list[Row]) -> None:
    steps = list(load_steps(dataset, first_row=11, micro_rows=3, workers=2))
    check_steps(steps, rows, 11)


def test_loading_leaves_the_global_generators_alone(dataset: RowDataset) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    list(load_steps(dataset, first_row=0, micro_rows=4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


@given(
    num_rows=st.integers(1, 60),
    share=st.integers(1, 6),
    world_size=st.integers(1, 5),
    micro_rows=st.integers(1, 9),
    first_row=st.integers(0, 70),
)
@settings(max_examples=60, deadline=None)
def test_every_rank_gets_the_same_number_of_micro_batches_and_every_row_comes_once(
    num_rows: int, share: int, world_size: int, micro_rows: int, first_row: int
) -> None:
    batch_rows = share * world_size
    views = [View(num_rows, batch_rows, micro_rows, rank, world_size) for rank in range(world_size)]
    seen: list[int] = []
    for step in range(-(-num_rows // batch_rows)):
        ranks = views[0].ranks(step, first_row)
        assert all(view.ranks(step, first_row) == ranks for view in views)
        assert len({len(parts) for parts in ranks}) == 1
        assert all(len(part) <= micro_rows for parts in ranks for part in parts)
        seen += [row for parts in ranks for part in parts for row in part]
    assert seen == list(range(first_row, num_rows))
    steps = zip(*(view.steps(first_row) for view in views), strict=True)
    left = [[row for parts in step for part in parts for row in part] for step in steps]
    assert [row for step in left for row in step] == list(range(first_row, num_rows))
    # A plan that is consumed has no step left, not one without rows.
    assert all(left)


def test_ranks_that_do_not_divide_a_step_are_refused_with_both_numbers(dataset: RowDataset) -> None:
    with pytest.raises(ValueError, match="batch_rows 8 is no multiple of 3 ranks"):
        list(load_steps(dataset, first_row=0, micro_rows=2, rank=0, world_size=3))


def test_pictures_that_do_not_match_the_rows_are_refused(dataset: RowDataset) -> None:
    fewer = RowDataset(dataset.plan, dataset.sources, PATCHES, Fewer())
    with pytest.raises(ValueError, match=r"rows hold \d+ images, \d+ were given"):
        list(load_steps(fewer, first_row=0, micro_rows=8))
