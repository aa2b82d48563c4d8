"""One optimiser step: micro-batches on all ranks, one denominator, clip, finite guard."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.batch import Batch
from midstream.config import AdamW
from midstream.model.vlm import VLM
from midstream.train.meters import Clock
from midstream.train.optim import set_rate
from midstream.train.parallel import Place
from midstream.train.sharding import whole


@dataclass(frozen=True)
class StepResult:
    """Mean cross-entropy over the step's targets (nats), gradient norm before clipping.

    `num_targets` and `num_images` are those of all ranks; `untouched` names trained parameters
    that no gradient reached (theirs are taken as zero, so that they decay as everywhere).
    """

    loss: float
    grad_norm: float
    num_targets: int
    num_images: int = 0
    untouched: tuple[str, ...] = ()


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite; the optimiser has not moved."""


def train_step(
    model: VLM,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    encode: Callable[[Tensor], Tensor] | None,
    rate: float,
    settings: AdamW,
    place: Place,
    clock: Clock | None = None,
) -> StepResult:
    """Move the weights once; the gradient is that of the mean loss over the step's targets.

    Every rank brings the same number of micro-batches. `encode` turns a batch's `images` into
    patch features (the identity for stored ones); None for a model that looks at them itself.
    `clock` measures its parts.
    Raises NonFiniteError before the optimiser moves on any rank, ValueError for a step without a
    target.
    """
    # Counted before the first backward, so that cutting the step into other
    # micro-batches, or over other ranks, leaves the gradient unchanged.
    mine = [sum(batch.counts.target for batch in micro_batches)]
    mine += [len(batch.images) for batch in micro_batches]
    num_targets, *num_images = (int(value) for value in place.sum(mine))
    if not num_targets:
        raise ValueError(
            "a step holds no target; its rows carry nothing to learn from: raise batch_rows, or "
            "look at them with `midstream show-data`"
        )
    clock = clock or Clock(place.device)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for cpu_batch, shown in zip(micro_batches, num_images, strict=True):
        batch = _placed(cpu_batch, place)
        with clock.part("encoder", on_device=True), place.autocast():
            features = _features(model, batch, encode, shown)
        with clock.part("model", on_device=True):
            with place.autocast():
                loss, cross_entropy = model.losses(batch, features, settings.z_loss)
            (loss / num_targets).backward()  # type: ignore[no-untyped-call]
            total += cross_entropy
    untouched = _touch(model)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    with clock.part("optimizer", on_device=True):
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)))
    (summed,) = place.sum([float(total)])
    result = StepResult(summed / num_targets, norm, num_targets, sum(num_images), untouched)
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise NonFiniteError(f"loss {result.loss}, gradient norm {result.grad_norm}")
    set_rate(optimizer, rate)
    with clock.part("optimizer", on_device=True):
        optimizer.step()
    return result


def _placed(batch: Batch, place: Place) -> Batch:
    # Shapes that change from batch to batch cost a processor nothing, and a GPU its kernels.
    return batch.trimmed() if place.device.type == "cpu" else batch.to(place.device)


def _features(
    model: VLM, batch: Batch, encode: Callable[[Tensor], Tensor] | None, num_images: int
) -> Tensor | None:
    """What stands for the batch's pictures; `num_images` counts those of all ranks.

    A model's own encoder is sharded: it looks on every rank, if need be at nothing, or on none.
    """
    if encode is not None:
        return encode(batch.images) if len(batch.images) else None
    config = model.config.encoder
    if config is None or num_images:
        return None
    return torch.zeros((0, config.num_patches, config.hidden_size), device=batch.input_ids.device)


def _touch(model: VLM) -> tuple[str, ...]:
    untouched = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            untouched.append(name)
            parameter.grad = torch.zeros_like(parameter)
    return tuple(untouched)
