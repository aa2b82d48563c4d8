"""Floating-point operations of the models, a product and a sum as two; no torch.

Matrix products alone are counted: norms, activations and the optimiser are left out. A position's
attention counts what it looks at; torch's own counter takes a causal mask for none, so that who
wants its numbers says that every position of a row looks at all of them.
"""

from collections.abc import Sequence
from itertools import pairwise

from midstream.config import (
    AnyDecoderConfig,
    AnyEncoderConfig,
    DecoderConfig,
    EncoderConfig,
    FusedEncoder,
    PatchProjection,
)


def weight_flops(config: AnyDecoderConfig) -> float:
    """Forward FLOPs of one position in the blocks' matrices."""
    return 2.0 * config.linear_parameters


def attention_flops(config: AnyDecoderConfig) -> float:
    """Forward FLOPs of one position that looks at another, in all blocks: scores and mixing."""
    return 4.0 * config.hidden_size * config.num_layers


def decoder_flops(config: AnyDecoderConfig, *, context: float | int) -> float:
    """Forward FLOPs of one position without the head, attending to `context` positions."""
    return weight_flops(config) + attention_flops(config) * context


def last_block_flops(config: AnyDecoderConfig) -> float:
    """What a position saves in the last block where nothing is asked of it: all behind the mixing.

    0 for decoders of `transformers`, whose blocks are computed whole.
    """
    if not isinstance(config, DecoderConfig):
        return 0.0
    return 2.0 * config.hidden_size * (config.hidden_size + 3 * config.ffn_size)


def head_flops(config: AnyDecoderConfig) -> float:
    """Forward FLOPs of the logits at one position."""
    return 2.0 * config.hidden_size * config.vocab_size


def frozen_saving(config: AnyDecoderConfig, positions: float | int, asked: float | int) -> float:
    """What training saves where the decoder is frozen: the gradients of its weights.

    `asked`: positions with logits. Attention has no weights; its backward pass stays.
    """
    return weight_flops(config) * positions + head_flops(config) * asked


def patch_flops(config: AnyEncoderConfig) -> float:
    """Forward FLOPs of one image's patches as the encoder takes them in."""
    if isinstance(config, FusedEncoder):
        return sum(patch_flops(tower) for tower in config.towers)
    return 2.0 * config.num_patches * (3 * config.patch_size**2) * config.hidden_size


def encoder_flops(config: AnyEncoderConfig) -> float:
    """Forward FLOPs of one image up to the layer that the projector sees."""
    if isinstance(config, FusedEncoder):
        return sum(encoder_flops(tower) for tower in config.towers)
    if isinstance(config, PatchProjection):
        return patch_flops(config)
    e, length = config.hidden_size, config.num_patches + config.num_prefix
    matrices = 4 * e * e + feed_forward_parameters(config)
    block = length * (2 * matrices + 2 * 2 * e * length)
    return patch_flops(config) + (config.num_layers + 1 + config.feature_layer) * block


def feed_forward_parameters(config: EncoderConfig) -> int:
    """Weights of one block's feed-forward part, biases left out."""
    e, m = config.hidden_size, config.intermediate_size
    if config.ffn == "mlp":
        return 2 * e * m
    # Gate and value, then out; DINOv2 takes two thirds, rounded up to a multiple of 8.
    inner = m if config.family == "dinov3" else (int(m * 2 / 3) + 7) // 8 * 8
    return 3 * e * inner


def projector_flops(widths: Sequence[int], patches: float | int) -> float:
    """Forward FLOPs of this many patches through linear layers of these widths."""
    return 2.0 * patches * sum(before * after for before, after in pairwise(widths))
