"""What is trained, at which rate, and the optimiser."""

import torch
from torch import nn

from midstream.config import AdamW, PatchProjection, Training
from midstream.model.vlm import VLM

# The parameters of a model's own encoder.
_ENCODER = "encoder."


def freeze(model: VLM, training: Training) -> float:
    """Decide by the stage which parameters are trained; returns the encoder's rate factor.

    All of them, but for the decoder where the stage keeps it, and a model's own encoder where the
    stage gives it no rate. A patch projection is always trained. Raises ValueError for a rate
    without an encoder of the model's own, and where nothing is left to train.
    """
    factor = training.encoder_rate_factor
    if factor is not None and model.encoder is None:
        raise ValueError("encoder_rate_factor is given, but the model owns no encoder to train")
    if factor is None and isinstance(model.config.encoder, PatchProjection):
        factor = 1.0
    if training.freeze_decoder and model.projector is None:
        raise ValueError("freeze_decoder is given, but the model has nothing else to train")
    model.requires_grad_(True)
    model.decoder.requires_grad_(not training.freeze_decoder)
    if model.encoder is not None:
        model.encoder.requires_grad_(factor is not None)
    return factor or 1.0


def is_trained(part: nn.Module | None) -> bool:
    """Whether a part of the model is there and learns anything."""
    return part is not None and any(value.requires_grad for value in part.parameters())


def make_optimizer(
    model: nn.Module, settings: AdamW, *, encoder_rate_factor: float = 1.0
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, with or without decay on vectors.

    decay = all is OpenLM's choice (its no-decay list is empty), matrices is Prismatic's. The
    encoder's parameters are in groups of their own, at their share of the rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = settings.decay == "all" or parameter.ndim >= 2
            factor = encoder_rate_factor if name.startswith(_ENCODER) else 1.0
            key = (-factor, -settings.weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[key], "weight_decay": -key[1], "rate_factor": -key[0]}
            for key in sorted(groups)
        ],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
