"""A rank's view of the rows; prefetch; its whole state is one integer, the rows consumed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from midstream.batch import IGNORE, PADDING, Batch, Row, stack_rows
from midstream.data.packing import RowPlan
from midstream.data.rows import build_row
from midstream.data.sources import Source
from midstream.tokens import TokenCount

# (source number, example) pairs, int64 [images, 2] -> pixels or stored features, in their order.
Images = Callable[[np.ndarray], Float[Tensor, "images ..."]]
NOTHING = torch.zeros((0, 0, 0))


class NoImages:
    """The pictures of rows that have none."""

    def __call__(self, images: np.ndarray) -> Float[Tensor, "images ..."]:
        """An empty tensor; ValueError if there are pictures."""
        if len(images):
            raise ValueError(f"{len(images)} pictures in rows of a stage that sees none")
        return NOTHING


class RowDataset(Dataset[tuple[Row, Tensor]]):
    """Row k of a plan and the pixels or features of its pictures, a function of k alone."""

    def __init__(
        self, plan: RowPlan, sources: Mapping[str, Source], num_patches: int, images: Images
    ) -> None:
        self.plan = plan
        self.sources = {name: sources[name] for name in plan.names}
        self.num_patches, self.images = num_patches, images

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> tuple[Row, Tensor]:
        row = build_row(self.plan, self.sources, index, self.num_patches)
        return row, self.images(row.images)

    def padding(self) -> tuple[Row, Tensor]:
        """A row that holds nothing: what a rank works on while only others have rows."""
        length = self.plan.rows.row_length
        column, nothing = np.arange(length), np.zeros((0, 2), dtype=np.int64)
        row = Row(
            input_ids=np.zeros(length, dtype=np.int64),
            targets=np.full(length, IGNORE, dtype=np.int64),
            position_ids=column,
            segment_ids=np.full(length, PADDING, dtype=np.int64),
            image_starts=np.zeros(0, dtype=np.int64),
            images=nothing,
            counts=TokenCount(),
        )
        return row, self.images(nothing)


@dataclass(frozen=True)
class View:
    """Which rows of each step a rank works on, and how many at a time.

    Raises ValueError if ranks do not divide the step.
    """

    num_rows: int
    batch_rows: int
    micro_rows: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_rows % self.world_size:
            raise ValueError(
                f"batch_rows {self.batch_rows} is no multiple of {self.world_size} ranks"
            )

    def step(self, step: int, first_row: int = 0) -> list[list[int]]:
        """The rank's micro-batches of one optimiser step, without the rows before `first_row`.

        Every rank gets the same number of them (some may be empty at the plan's end), so that all
        run the same collectives.
        """
        return self._parts(step, first_row, self.rank)

    def _parts(self, step: int, first_row: int, rank: int) -> list[list[int]]:
        low, share = step * self.batch_rows, self.batch_rows // self.world_size
        mine = range(low + rank * share, low + (rank + 1) * share)
        cut = [mine[at : at + self.micro_rows] for at in range(0, share, self.micro_rows)]
        return [[row for row in part if first_row <= row < self.num_rows] for part in cut]

    def steps(self, first_row: int) -> Iterator[list[list[int]]]:
        """The steps that are left once `first_row` rows are consumed.

        A part that is empty on every rank is left out; one that some rank has, every rank has.
        """
        for step in count(first_row // self.batch_rows):
            if max(first_row, step * self.batch_rows) >= self.num_rows:
                return
            ranks = [self._parts(step, first_row, rank) for rank in range(self.world_size)]
            held = [any(parts) for parts in zip(*ranks, strict=True)]
            yield [part for part, used in zip(ranks[self.rank], held, strict=True) if used]


@dataclass(frozen=True)
class _Parts:
    # Makes the loader's work as it goes: a plan may have millions of rows.
    view: View
    first_row: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.view.steps(self.first_row):
            yield from step


def load_steps(
    dataset: RowDataset,
    *,
    first_row: int,
    micro_rows: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> Iterator[list[Batch]]:
    """The micro-batches of each optimiser step from row `first_row` of the plan on.

    `workers` processes build rows and decode pictures ahead; for a GPU `device` batches lie in
    page-locked memory. Neither changes what they hold.
    """
    view = View(len(dataset), dataset.plan.rows.batch_rows, micro_rows, rank, world_size)
    loader = DataLoader(
        dataset,
        batch_sampler=_Parts(view, first_row),
        collate_fn=partial(_collate, dataset),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device is not None and device.type == "cuda",
        # Else the loader draws its workers' seed from the global generator.
        generator=torch.Generator(),
        multiprocessing_context="forkserver" if workers else None,
    )
    batches = iter(loader)
    for step in view.steps(first_row):
        yield [next(batches) for _ in step]


def _collate(dataset: RowDataset, items: list[tuple[Row, Tensor]]) -> Batch:
    items = items or [dataset.padding()]
    return stack_rows([row for row, _ in items], torch.cat([images for _, images in items]))
