"""Summed cross-entropy and z-loss over targets; logits exist only where there is a target."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

# Logits held at once. 2^25 in float32 are 128 MiB, and about four times that in the backward pass.
MAX_LOGITS = 2**25


def summed_loss(
    hidden: Float[Tensor, "num_targets hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "num_targets"],
    z_loss: float,
    *,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sum of cross-entropies, and `z_loss` times the sum of squared log-normalisers.

    Train on the sum of both; the first alone is the loss to report. `weight` is the decoder's
    `output.weight`. Both are float32, differentiable, and zero without targets. Where the logits
    are more than `max_logits` they are computed in pieces and again in the backward pass.
    """
    rows = max(1, max_logits // weight.shape[0])
    if len(targets) <= rows:
        return _sums(hidden, weight, targets, z_loss)
    losses, squares = [], []
    for some, theirs in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        loss, square = checkpoint(
            _sums, some, weight, theirs, z_loss, use_reentrant=False, preserve_rng_state=False
        )
        losses.append(loss)
        squares.append(square)
    return torch.stack(losses).sum(), torch.stack(squares).sum()


def _sums(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = linear(hidden, weight).float()
    normaliser = logits.logsumexp(dim=-1)
    at_target = logits.gather(1, targets[:, None])
    return normaliser.sum() - at_target.sum(), z_loss * normaliser.square().sum()
