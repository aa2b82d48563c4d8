"""Row and Batch: the contract between data and model."""
# Letters in comments: R rows, T positions of a row, N images, P patches of an image. A row is made
# of segments (documents that do not see each other). An image is a run of P positions of its
# segment; `input_ids` there is 0 and is replaced by projected patch features.

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from midstream.core.tokens import TokenCount

# `targets` at positions without a loss.
IGNORE = -100
# `segment_ids` at positions that hold nothing.
PADDING = -1


class Row(NamedTuple):
    """One packed sequence of T positions, as NumPy arrays of int64.

    input_ids, targets (already shifted: the token after each position, or IGNORE), position_ids
    (from 0 in each segment, or over the whole row in the joined layout), segment_ids (PADDING
    behind the end), image_starts (first column of each image), images (what the loader turns into
    pixels or stored features, in the order of image_starts: the source's number, the example and
    which of its pictures), the counts of what it holds, and the same by source (padding belongs to
    none).
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    image_starts: np.ndarray
    images: np.ndarray
    counts: TokenCount
    sources: Mapping[str, TokenCount] = MappingProxyType({})


@dataclass(frozen=True)
class Batch:
    """R rows for the model; `images` holds pixels or stored features, one entry an image.

    `image_slots` lists (row, first column) of each image. `counts` and `sources` are sums over the
    rows.
    """

    input_ids: Int[Tensor, "rows seq"]
    targets: Int[Tensor, "rows seq"]
    position_ids: Int[Tensor, "rows seq"]
    segment_ids: Int[Tensor, "rows seq"]
    image_slots: Int[Tensor, "images 2"]
    images: Float[Tensor, "images ..."]
    counts: TokenCount
    sources: Mapping[str, TokenCount] = field(default_factory=dict)

    @property
    def prefix(self) -> Bool[Tensor, "rows seq"]:
        """True at the head of each segment up to its first position with a target, that included.

        The input of that position ends what is given: the image and the first question. Where
        text is learnt from its first token on, it is that token alone. Padding is no prefix.
        """
        first = torch.ones_like(self.segment_ids, dtype=torch.bool)
        first[:, 1:] = self.segment_ids.diff(dim=1) != 0
        column = torch.arange(first.shape[1], device=first.device).expand_as(first)
        head = torch.where(first, column, 0).cummax(dim=1).values
        has_target = (self.targets != IGNORE).long()
        # Targets before each position, in its row.
        before = has_target.cumsum(dim=1) - has_target
        return (before == before.gather(1, head)) & (self.segment_ids != PADDING)

    def trimmed(self) -> "Batch":
        """Without the columns behind the last that any row holds something in; one at least.

        The same positions see the same ones, so losses and gradients are those of the whole.
        """
        held = (self.segment_ids != PADDING).any(dim=0)
        width = max(1, int(held.nonzero().max()) + 1) if bool(held.any()) else 1
        by_column = {"input_ids", "targets", "position_ids", "segment_ids"}
        changed = {name: getattr(self, name)[:, :width] for name in by_column}
        return replace(self, **changed)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor changed alike."""
        fields: dict[str, Any] = {
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        return Batch(**fields)


def stack_rows(rows: Sequence[Row], images: Float[Tensor, "images ..."]) -> Batch:
    """Put rows of one length into a batch; `images` are theirs, in reading order.

    Raises ValueError if the number of images differs from the rows' own.
    """
    num_images = sum(len(row.image_starts) for row in rows)
    if num_images != len(images):
        raise ValueError(f"the rows hold {num_images} images, {len(images)} were given")
    slots = [(index, int(start)) for index, row in enumerate(rows) for start in row.image_starts]
    counts = sum((row.counts for row in rows), TokenCount())
    return Batch(
        input_ids=_stacked(rows, "input_ids"),
        targets=_stacked(rows, "targets"),
        position_ids=_stacked(rows, "position_ids"),
        segment_ids=_stacked(rows, "segment_ids"),
        image_slots=torch.tensor(slots, dtype=torch.int64).reshape(-1, 2),
        images=images,
        counts=counts,
        sources=add_counts(row.sources for row in rows),
    )


def _stacked(rows: Sequence[Row], name: str) -> Tensor:
    return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))


def add_counts(parts: Iterable[Mapping[str, TokenCount]]) -> dict[str, TokenCount]:
    """Sum of counts by source."""
    total: dict[str, TokenCount] = {}
    for part in parts:
        for name, counts in part.items():
            total[name] = total.get(name, TokenCount()) + counts
    return total
