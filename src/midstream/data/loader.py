"""A rank's view of the rows; prefetch; its whole state is one integer."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from midstream.batch import Batch, Row, stack_rows
from midstream.data.packing import RowPlan, build_row
from midstream.data.sources import Source

Images = Callable[[np.ndarray], Float[Tensor, "images ..."]]


class RowDataset(Dataset[tuple[Row, Tensor]]):
    """Row k of a plan and the pixels or features of its pictures, a function of k alone."""

    def __init__(
        self, plan: RowPlan, sources: Mapping[str, Source], num_patches: int, images: Images
    ) -> None:
        self.plan, self.sources = plan, sources
        self.num_patches, self.images = num_patches, images

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> tuple[Row, Tensor]:
        row = build_row(self.plan, self.sources, index, self.num_patches)
        return row, self.images(row.images)


def micro_batches_of_step(
    num_rows: int, batch_rows: int, step: int, micro_rows: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """The rows of one optimiser step that a rank works on, cut into micro-batches.

    Every rank gets the same number of micro-batches (some may be empty at the plan's end), so
    that all run the same collectives. Raises ValueError if ranks do not divide the step.
    """
    if batch_rows % world_size:
        raise ValueError(f"batch_rows {batch_rows} is no multiple of {world_size} ranks")
    low = step * batch_rows
    share = batch_rows // world_size
    mine = range(low + rank * share, low + (rank + 1) * share)
    cut = [mine[at : at + micro_rows] for at in range(0, share, micro_rows)]
    return [[row for row in part if row < num_rows] for part in cut]


def load_steps(
    dataset: RowDataset,
    *,
    first_step: int,
    micro_rows: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[Batch]]:
    """The micro-batches of each optimiser step from `first_step` on; empty ones are left out."""
    rows = dataset.plan.rows
    steps = [
        [
            part
            for part in micro_batches_of_step(
                len(dataset), rows.batch_rows, step, micro_rows, rank, world_size
            )
            if part
        ]
        for step in range(first_step, dataset.plan.num_steps)
    ]
    loader = DataLoader(
        dataset,
        batch_sampler=[part for step in steps for part in step],
        collate_fn=_collate,
        num_workers=workers,
        # Else the loader draws its workers' seed from the global generator.
        generator=torch.Generator(),
        multiprocessing_context="forkserver" if workers else None,
    )
    batches = iter(loader)
    for step in steps:
        yield [next(batches) for _ in step]


def _collate(items: list[tuple[Row, Tensor]]) -> Batch:
    return stack_rows([row for row, _ in items], torch.cat([images for _, images in items]))
