"""A step's batches: what they hold over all ranks, counted on the host before the step is computed;
on their way to the device, and their pictures' features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache

import torch
from torch import Tensor

from midstream.core.batch import Batch
from midstream.core.tokens import TokenCount
from midstream.model.vlm import VLM, Ahead
from midstream.train.parallel import Place

_WIDTH = len(fields(TokenCount))


@dataclass(frozen=True)
class StepTotals:
    """Counts of a step over all ranks, and the same by source; the pictures of each micro-batch;
    rows with a picture and the padding in them; `attended`, the sum over positions of how many each
    looks at; whether a rank was asked to stop.
    """

    counts: TokenCount
    sources: Mapping[str, TokenCount]
    num_images: tuple[int, ...]
    image_rows: int
    image_row_pad: int
    attended: int
    stop: bool


def totals_of(
    micro_batches: Sequence[Batch], place: Place, names: Sequence[str] = (), *, stop: bool = False
) -> StepTotals:
    """The sums over the ranks, of which each brings its own and equally many micro-batches.

    `names` are the sources that are counted; `stop` is whether this rank was asked to stop. One
    collective of the hosts.
    """
    image_rows = image_row_pad = attended = 0
    for batch in micro_batches:
        attended += int((batch.position_ids + 1)[batch.segment_ids >= 0].sum())
        shown = torch.unique(batch.image_slots[:, 0])
        image_rows += len(shown)
        image_row_pad += int((batch.segment_ids[shown] < 0).sum())
    nothing = TokenCount()
    held = [sum((batch.counts for batch in micro_batches), nothing)]
    for name in names:
        held.append(sum((batch.sources.get(name, nothing) for batch in micro_batches), nothing))
    mine = [int(stop), image_rows, image_row_pad, attended]
    mine += [number for counts in held for number in astuple(counts)]
    mine += [len(batch.images) for batch in micro_batches]
    asked, image_rows, image_row_pad, attended, *rest = map(int, place.sum(mine))
    end = _WIDTH * len(held)
    every = [TokenCount(*rest[at : at + _WIDTH]) for at in range(0, end, _WIDTH)]
    return StepTotals(
        counts=every[0],
        sources=dict(zip(names, every[1:], strict=True)),
        num_images=tuple(rest[end:]),
        image_rows=image_rows,
        image_row_pad=image_row_pad,
        attended=attended,
        stop=asked > 0,
    )


def placed(model: VLM, batch: Batch, place: Place) -> tuple[Batch, Ahead]:
    """A batch of this rank on its device, as large as its kernels like it, and what the model needs
    to know of it.

    To a GPU both are copied from page-locked memory beside what it computes meanwhile.
    """
    # Shapes that change from batch to batch cost a processor nothing, and a GPU its kernels.
    if place.device.type == "cpu":
        batch = batch.trimmed()
        return batch, model.ahead(batch)
    ahead = model.ahead(batch, place.device)
    copying, computing = _copy_stream(place.device), torch.cuda.current_stream(place.device)

    def copied(tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        there = pinned.to(place.device, non_blocking=True)
        # So that its memory is not given away before `computing` has done with it.
        there.record_stream(computing)
        return there

    with torch.cuda.stream(copying):
        found = batch.map(copied), ahead.map(copied)
    computing.wait_stream(copying)
    return found


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def features_of(
    model: VLM, batch: Batch, encode: Callable[[Tensor], Tensor] | None, num_images: int
) -> Tensor | None:
    """The batch's patch features, or None; `num_images` counts the pictures of all ranks."""
    if encode is not None:
        return encode(batch.images) if len(batch.images) else None
    # A model's own encoder is sharded: it runs on every rank, if need be on no picture, or on none.
    config = model.config.encoder
    if config is None or num_images:
        return None
    return torch.zeros((0, config.num_patches, config.hidden_size), device=batch.input_ids.device)
