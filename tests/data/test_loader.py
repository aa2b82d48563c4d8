"""The loader: ranks, workers, micro-batches and restarts are views of the same rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_sources, mixture
from torch import Tensor

from midstream.batch import Batch, Row
from midstream.config import Rows
from midstream.data.loader import RowDataset, load_steps, micro_batches_of_step
from midstream.data.packing import build_row, plan_rows
from midstream.tokens import TokenCount

PATCHES, BATCH_ROWS = 4, 8


def pictures(images: np.ndarray) -> Tensor:
    """What stands for a picture: its source and example."""
    return torch.from_numpy(images).float()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> RowDataset:
    """Rows of texts and captions; in the last step half of the ranks have none."""
    sources = make_sources(tmp_path_factory.mktemp("data"), 7, longest=28)
    rows = Rows(row_length=32, batch_rows=BATCH_ROWS)
    budget = mixture(1400, {"web": 0.5, "pics": 0.4, "notes": 0.1})
    found = RowDataset(plan_rows(sources, PATCHES, budget, rows, 1), sources, PATCHES, pictures)
    assert 0 < len(found) % BATCH_ROWS <= BATCH_ROWS // 2
    assert found.plan.num_steps >= 5
    return found


@pytest.fixture(scope="module")
def rows(dataset: RowDataset) -> list[Row]:
    """Every row, built one by one."""
    return [build_row(dataset.plan, dataset.sources, k, PATCHES) for k in range(len(dataset))]


def check(batches: list[Batch], expected: list[Row]) -> None:
    """The batches of a step hold exactly these rows and their pictures, in this order."""
    for name in ("input_ids", "targets", "position_ids", "segment_ids"):
        found = [row for batch in batches for row in getattr(batch, name).numpy()]
        assert np.array_equal(found, [getattr(row, name) for row in expected])
    shown = [image for batch in batches for image in batch.images.int().tolist()]
    assert shown == [image for row in expected for image in row.images.tolist()]
    low, slots = 0, []
    for batch in batches:
        slots += [(int(row) + low, int(column)) for row, column in batch.image_slots]
        low += len(batch.input_ids)
        assert len(batch.image_slots) == len(batch.images)
    assert slots == [(k, int(c)) for k, row in enumerate(expected) for c in row.image_starts]
    total = sum((batch.counts for batch in batches), TokenCount())
    assert total == sum((row.counts for row in expected), TokenCount())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_rows_of_a_step_are_the_same_for_every_number_of_ranks(
    dataset: RowDataset, rows: list[Row], world_size: int
) -> None:
    ranks = [
        list(load_steps(dataset, first_step=0, micro_rows=3, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(steps) for steps in ranks} == {dataset.plan.num_steps}
    for step in range(dataset.plan.num_steps):
        batches = [batch for steps in ranks for batch in steps[step]]
        check(batches, rows[step * BATCH_ROWS : (step + 1) * BATCH_ROWS])


@pytest.mark.parametrize("micro_rows", range(1, BATCH_ROWS + 2))
def test_the_rows_of_a_step_are_the_same_for_every_micro_batch(
    dataset: RowDataset, rows: list[Row], micro_rows: int
) -> None:
    steps = list(load_steps(dataset, first_step=0, micro_rows=micro_rows))
    assert len(steps) == dataset.plan.num_steps
    for step, batches in enumerate(steps):
        assert all(0 < len(batch.input_ids) <= micro_rows for batch in batches)
        check(batches, rows[step * BATCH_ROWS : (step + 1) * BATCH_ROWS])


def test_loading_from_any_step_continues_as_if_never_stopped(
    dataset: RowDataset, rows: list[Row]
) -> None:
    for first in range(dataset.plan.num_steps + 1):
        steps = list(load_steps(dataset, first_step=first, micro_rows=3))
        assert len(steps) == dataset.plan.num_steps - first
        for number, batches in enumerate(steps):
            low = (first + number) * BATCH_ROWS
            check(batches, rows[low : low + BATCH_ROWS])


@pytest.mark.slow
def test_a_worker_process_loads_the_same_rows(dataset: RowDataset, rows: list[Row]) -> None:
    steps = list(load_steps(dataset, first_step=1, micro_rows=3, workers=1))
    assert len(steps) == dataset.plan.num_steps - 1
    for number, batches in enumerate(steps):
        check(batches, rows[(number + 1) * BATCH_ROWS : (number + 2) * BATCH_ROWS])


def test_loading_leaves_the_global_generators_alone(dataset: RowDataset) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    list(load_steps(dataset, first_step=0, micro_rows=4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


@given(
    num_rows=st.integers(1, 60),
    share=st.integers(1, 6),
    world_size=st.integers(1, 5),
    micro_rows=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_rank_gets_the_same_number_of_micro_batches_and_every_row_comes_once(
    num_rows: int, share: int, world_size: int, micro_rows: int
) -> None:
    batch_rows = share * world_size
    seen: list[int] = []
    for step in range(-(-num_rows // batch_rows)):
        ranks = [
            micro_batches_of_step(num_rows, batch_rows, step, micro_rows, rank, world_size)
            for rank in range(world_size)
        ]
        assert len({len(parts) for parts in ranks}) == 1
        assert all(len(part) <= micro_rows for parts in ranks for part in parts)
        seen += [row for parts in ranks for part in parts for row in part]
    assert seen == list(range(num_rows))


def test_ranks_that_do_not_divide_a_step_are_refused_with_both_numbers(
    dataset: RowDataset,
) -> None:
    with pytest.raises(ValueError, match="batch_rows 8 is no multiple of 3 ranks"):
        list(load_steps(dataset, first_step=0, micro_rows=2, rank=0, world_size=3))


def test_pictures_that_do_not_match_the_rows_are_refused(dataset: RowDataset) -> None:
    fewer = RowDataset(dataset.plan, dataset.sources, PATCHES, lambda images: pictures(images[1:]))
    with pytest.raises(ValueError, match=r"rows hold \d+ images, \d+ were given"):
        list(load_steps(fewer, first_step=0, micro_rows=8))


def test_larger_steps_hold_the_same_rows(dataset: RowDataset, rows: list[Row]) -> None:
    plan = replace(dataset.plan, rows=dataset.plan.rows.model_copy(update={"batch_rows": 11}))
    other = RowDataset(plan, dataset.sources, PATCHES, pictures)
    steps = list(load_steps(other, first_step=0, micro_rows=4))
    for step, batches in enumerate(steps):
        check(batches, rows[step * 11 : (step + 1) * 11])
