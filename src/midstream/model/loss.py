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
    """What to train on, and the sum of cross-entropies, which is what to report.

    The first adds `z_loss` times the sum of squared log-normalisers and is differentiable; the
    second is not. `weight` is the decoder's `output.weight`. Both are float32, and zero without
    targets. Where the logits are more than `max_logits` they are computed in pieces and again in
    the backward pass.
    """
    rows = max(1, max_logits // weight.shape[0])
    if len(targets) <= rows:
        loss, square = _sums(hidden, weight, targets, z_loss)
        return loss + square, loss.detach()
    losses, squares = [], []
    for some, theirs in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        loss, square = checkpoint(
            _sums, some, weight, theirs, z_loss, use_reentrant=False, preserve_rng_state=False
        )
        losses.append(loss)
        squares.append(square)
    loss = torch.stack(losses).sum()
    return loss + torch.stack(squares).sum(), loss.detach()


def _sums(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = linear(hidden, weight).float()
    normaliser = logits.logsumexp(dim=-1)
    at_target = logits.gather(1, targets[:, None])
    return normaliser.sum() - at_target.sum(), z_loss * normaliser.square().sum()
