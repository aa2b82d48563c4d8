"""One optimiser step: micro-batches, one denominator, clip, finite guard."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.batch import Batch
from midstream.config import AdamW
from midstream.model.vlm import VLM
from midstream.train.optim import set_rate
from midstream.train.parallel import Place


@dataclass(frozen=True)
class StepResult:
    """Mean cross-entropy over the step's targets (nats), gradient norm before clipping."""

    loss: float
    grad_norm: float
    num_targets: int


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
) -> StepResult:
    """Move the weights once; the gradient is that of the mean loss over the step's targets.

    `encode` turns a batch's `images` into patch features (the identity for stored ones); None for
    a model that looks at them itself.
    Raises NonFiniteError before the optimiser moves, ValueError for a step without a target.
    """
    # Counted before the first backward, so that cutting the step into other
    # micro-batches leaves the gradient unchanged.
    num_targets = sum(batch.counts.target for batch in micro_batches)
    if not num_targets:
        raise ValueError("a step holds no target; its rows carry nothing to learn from")
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for cpu_batch in micro_batches:
        batch = cpu_batch.to(place.device)
        with place.autocast():
            features = encode(batch.images) if encode and len(batch.images) else None
            loss, cross_entropy = model.losses(batch, features, settings.z_loss)
        (loss / num_targets).backward()  # type: ignore[no-untyped-call]
        total += cross_entropy
    norm = torch.nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.grad is not None], settings.clip_norm
    )
    result = StepResult(float(total) / num_targets, float(norm), num_targets)
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise NonFiniteError(f"loss {result.loss}, gradient norm {result.grad_norm}")
    set_rate(optimizer, rate)
    optimizer.step()
    return result
