"""Parameter groups and the optimiser."""

import torch
from torch import nn

from midstream.config import AdamW


def make_optimizer(model: nn.Module, settings: AdamW) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, with or without decay on vectors.

    decay = all is OpenLM's choice (its no-decay list is empty), matrices is Prismatic's.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trainable if settings.decay == "all" or p.ndim >= 2]
    rest = [p for p in trainable if settings.decay != "all" and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in every group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
