"""Floating-point operations of the models, a product and a sum as two; no torch.

Forward passes; training is three of them for what is trained, and one for what is frozen before
it. Weights that are frozen behind what is trained pass its gradient on and need none of their own:
two.
"""

from midstream.config import (
    AnyDecoderConfig,
    AnyEncoderConfig,
    FusedEncoder,
    PatchProjection,
    Rows,
)


def decoder_flops(config: AnyDecoderConfig, *, context: float) -> float:
    """Forward FLOPs of one position without the head, attending to `context` positions."""
    attended = 2 * 2 * config.hidden_size * context
    return 2 * config.linear_parameters + config.num_layers * attended


def head_flops(config: AnyDecoderConfig) -> float:
    """Forward FLOPs of the logits at one position."""
    return 2.0 * config.hidden_size * config.vocab_size


def frozen_saving(config: AnyDecoderConfig, positions: float | int, asked: float | int) -> float:
    """What a decoder that stays as it is saves of three forward passes: its weights' gradients.

    `positions` go through the blocks, `asked` of them through the head. Attention has no weights.
    """
    return 2.0 * config.linear_parameters * positions + head_flops(config) * asked


def mean_context(rows: Rows) -> float:
    """Positions that one position attends to, on average.

    (T + 1) / 2 under the causal mask of joined rows. Rows with segments count T: a masked
    attention computes all of it, and the segments' lengths are not known before the packing.
    """
    return (rows.row_length + 1) / 2 if rows.layout == "joined" else float(rows.row_length)


def encoder_flops(config: AnyEncoderConfig) -> float:
    """Forward FLOPs of one image up to the layer that the projector sees."""
    if isinstance(config, FusedEncoder):
        return sum(encoder_flops(tower) for tower in config.towers)
    e, patches = config.hidden_size, config.num_patches
    embed = 2 * patches * (3 * config.patch_size**2) * e
    if isinstance(config, PatchProjection):
        return float(embed)
    block = patches * (2 * (4 * e * e + 2 * e * config.intermediate_size) + 2 * 2 * e * patches)
    return float(embed + (config.num_layers + 1 + config.feature_layer) * block)
