"""Summed cross-entropy and z-loss over targets; logits exist only where there is a target.

Logits are made piece by piece, and each piece is turned into its part of the gradients at once: so
none is computed twice, and no more than one piece is ever held. torch's own
`linear_cross_entropy` (from 2.13) has no z-loss and takes two to four times as long on a CPU.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Logits held at once, by kind of device. On a CPU larger pieces than 64 MiB are no faster; a GPU
# wants products that are large enough to fill it.
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**28}


def summed_loss(
    hidden: Float[Tensor, "num_targets hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "num_targets"],
    z_loss: float,
    *,
    max_logits: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What to train on, and the sum of cross-entropies, which is what to report.

    The first adds `z_loss` times the sum of squared log-normalisers and is differentiable, once;
    the second is not. `weight` is the decoder's `output.weight`; where it is frozen no gradient of
    it is made. Both are float32, and zero without targets; products have autocast's precision,
    everything else is float32.
    """
    room = max_logits or MAX_LOGITS.get(hidden.device.type, MAX_LOGITS["cuda"])
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif weight.dtype != hidden.dtype:
        hidden = hidden.to(weight.dtype)
    learns = torch.is_grad_enabled()
    wanted = (learns and hidden.requires_grad, learns and weight.requires_grad)
    total, cross_entropy = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, z_loss, room, wanted
    )
    return total, cross_entropy


class _SummedLoss(torch.autograd.Function):
    """Loss and gradients in one go; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        room: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            rows = max(1, room // weight.shape[0])
            # float64 stays what it is, for checks of the gradient.
            exact = torch.promote_types(hidden.dtype, torch.float32)
            sums = torch.zeros(2, dtype=exact, device=hidden.device)
            of_hidden = torch.empty_like(hidden) if wanted[0] else None
            of_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
            for low in range(0, len(targets), rows):
                piece, theirs = hidden[low : low + rows], targets[low : low + rows, None]
                logits = linear(piece, weight).to(exact)
                at_target = logits.gather(1, theirs)
                largest, where = logits.max(dim=1, keepdim=True)
                share = torch.softmax(logits, dim=1)
                # The largest share is at least one in the vocabulary: its logarithm is exact.
                normaliser = largest - share.gather(1, where).log()
                sums[0] += (normaliser - at_target).sum()
                sums[1] += z_loss * normaliser.square().sum()
                if not any(wanted):
                    continue
                # d(total)/d(logits) = scale * (share - one-hot / scale), row by row; the scale
                # goes into the smaller factors of the two products.
                scale = 1 + 2 * z_loss * normaliser
                index = torch.arange(len(piece), device=piece.device)
                share[index, theirs[:, 0]] -= 1 / scale[:, 0]
                share = share.to(weight.dtype)
                if of_hidden is not None:
                    of_hidden[low : low + rows] = (share @ weight) * scale
                if of_weight is not None:
                    _add_product(of_weight, share, (piece * scale).to(weight.dtype))
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.weight_dtype = weight.dtype
        cross_entropy = sums[0].clone()
        ctx.mark_non_differentiable(cross_entropy)
        return sums.sum(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _of_loss: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        return (
            of_hidden * of_total.to(of_hidden.dtype) if ctx.needs_input_grad[0] else None,
            # In place: these are as many numbers as the head has, and nobody else reads them.
            of_weight.mul_(of_total).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T @ right; sums of low-precision pieces are kept in `total`'s."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right
