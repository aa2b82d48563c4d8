"""A batch on its way to the device that computes on it, and its pictures' features."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from midstream.core.batch import Batch
from midstream.model.vlm import VLM, Ahead
from midstream.train.parallel import Place


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
