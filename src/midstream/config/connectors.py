"""How an encoder's features reach the decoder: fewer of them, then linear layers; what that costs.

Features are stored before the connector, so that connectors share them.
"""

from itertools import pairwise
from math import isqrt
from typing import Annotated, Literal

from pydantic import Field, model_validator

from midstream.config.base import Config, Positive

Window = Annotated[int, Field(ge=2)]


class PixelShuffle(Config):
    """The patches of a window side by side in one, window² times as wide (SmolVLM, nanoVLM)."""

    kind: Literal["shuffle"] = "shuffle"
    window: Literal[2, 3, 4]


class AveragePool(Config):
    """The mean of the patches of a window."""

    kind: Literal["average"] = "average"
    window: Window


class AttentionPool(Config):
    """Attention over the patches of a window, whose mean is the query (Molmo)."""

    kind: Literal["attention"] = "attention"
    window: Window
    num_heads: Positive = 16


class Resampler(Config):
    """Learned queries that look at the patches and at each other (Flamingo's Perceiver)."""

    kind: Literal["resampler"] = "resampler"
    num_latents: Positive = 64
    num_layers: Positive = 6
    num_heads: Positive = 8
    head_dim: Positive = 64


Reduction = Annotated[
    PixelShuffle | AveragePool | AttentionPool | Resampler, Field(discriminator="kind")
]
# Width of a resampler's feed-forward part over its own.
RESAMPLER_EXPANSION = 4


class GatedBlocks(Config):
    """Blocks of attention to pictures before every `every`-th block of the decoder (Flamingo)."""

    every: Positive = 1
    num_heads: Positive = 8
    head_dim: Positive = 64

    def places(self, num_layers: int) -> range:
        """The decoder's blocks, counted from 0, that one stands before."""
        return range(self.every - 1, num_layers, self.every)


class ProjectorConfig(Config):
    """Linear layers with GELU between, from encoder to decoder width, behind a reduction or none.

    1: one linear map. 2: over `hidden`, which is four times the encoder's width (the paper's
    wording) or the decoder's (LLaVA-1.5, Prismatic's gelu-mlp). 3: over four times the encoder's
    width and a further layer at the decoder's (Prismatic's fused projector).
    `reduction` makes fewer features of a picture's patches before the first layer. `gated`: the
    decoder looks at what comes out from blocks of its own, and a picture takes one position of a
    row; 0 layers are for those alone, behind a resampler (Flamingo).
    """

    num_layers: Literal[0, 1, 2, 3] = 2
    hidden: Literal["encoder_4x", "decoder"] = "encoder_4x"
    reduction: Reduction | None = None
    gated: GatedBlocks | None = None

    @model_validator(mode="after")
    def _used(self) -> "ProjectorConfig":
        if self.hidden == "decoder" and self.num_layers != 2:
            raise ValueError(
                f"hidden='decoder' is for two layers, the projector has {self.num_layers}"
            )
        if not self.num_layers and not (self.gated and isinstance(self.reduction, Resampler)):
            raise ValueError("num_layers 0 is for gated blocks behind a resampler; give 1")
        return self

    def widths(self, encoder_width: int, decoder_width: int) -> tuple[int, ...]:
        """Width at the first layer's entry, between the layers, and at the exit."""
        reduction, entry = self.reduction, encoder_width
        if isinstance(reduction, PixelShuffle):
            entry *= reduction.window**2
        between = 4 * encoder_width if self.hidden == "encoder_4x" else decoder_width
        if not self.num_layers:
            return (entry,)
        hidden = {1: (), 2: (between,), 3: (between, decoder_width)}[self.num_layers]
        return (entry, *hidden, decoder_width)

    def num_features(self, num_patches: int) -> int:
        """What a picture of so many patches comes to behind the reduction."""
        if self.reduction is None:
            return num_patches
        if isinstance(self.reduction, Resampler):
            return self.reduction.num_latents
        return num_patches // self.reduction.window**2

    def check_fits(self, num_patches: int, encoder_width: int) -> None:
        """Raises ValueError, with what would fit, for windows that do not divide the grid of
        patches, or heads that do not divide the encoder's width."""
        reduction, side = self.reduction, isqrt(num_patches)
        if reduction is None or isinstance(reduction, Resampler):
            return
        if side**2 != num_patches:
            raise ValueError(
                f"a {reduction.kind} connector wants a square of patches, the encoder gives "
                f"{num_patches}; take a resampler"
            )
        if side % reduction.window:
            fits = [str(one) for one in range(2, side + 1) if side % one == 0]
            raise ValueError(
                f"window {reduction.window} of the {reduction.kind} connector does not divide the "
                f"encoder's {side} x {side} patches; {', '.join(fits) or 'no window'} would"
            )
        if isinstance(reduction, AttentionPool) and encoder_width % reduction.num_heads:
            fits = [str(one) for one in range(1, 33) if encoder_width % one == 0]
            raise ValueError(
                f"num_heads {reduction.num_heads} of the attention connector does not divide the "
                f"encoder's width {encoder_width}; {', '.join(fits)} would"
            )


def connector_parameters(config: ProjectorConfig, encoder_width: int, decoder_width: int) -> int:
    """Weights, gains and biases of a connector."""
    e, reduction = encoder_width, config.reduction
    widths = config.widths(e, decoder_width)
    total = sum(before * after + after for before, after in pairwise(widths))
    if isinstance(reduction, AttentionPool):
        total += 4 * (e * e + e)
    elif isinstance(reduction, Resampler):
        inner = reduction.num_heads * reduction.head_dim
        layer = 3 * e + 4 * e * inner + 2 * RESAMPLER_EXPANSION * e * e
        total += reduction.num_latents * e + reduction.num_layers * layer + e
    return total


def connector_flops(
    config: ProjectorConfig, num_patches: int, encoder_width: int, decoder_width: int
) -> float:
    """Forward FLOPs of one picture's features through a connector."""
    e, reduction, kept = encoder_width, config.reduction, config.num_features(num_patches)
    widths = config.widths(e, decoder_width)
    total = 2.0 * kept * sum(before * after for before, after in pairwise(widths))
    if isinstance(reduction, AttentionPool):
        # Query and what the heads mix for each window, key and value of each patch.
        total += 4.0 * e * e * (kept + num_patches) + 4.0 * e * num_patches
    elif isinstance(reduction, Resampler):
        inner, seen = reduction.num_heads * reduction.head_dim, num_patches + kept
        matrices = 4.0 * e * inner * (kept + seen) + 4.0 * RESAMPLER_EXPANSION * e * e * kept
        total += reduction.num_layers * (matrices + 4.0 * inner * kept * seen)
    return total


def untaken_flops(
    config: ProjectorConfig, num_patches: int, encoder_width: int, decoder_width: int
) -> float:
    """What the backward pass leaves out where nothing is trained before the connector: gradients
    of one picture's features, in the products that take them as they are."""
    e, kept = encoder_width, config.num_features(num_patches)
    if isinstance(config.reduction, Resampler):
        # A norm with a gain of its own stands before each of its products.
        return 0.0
    if isinstance(config.reduction, AttentionPool):
        return 2.0 * e * e * (kept + 2 * num_patches)
    before, after = config.widths(e, decoder_width)[:2]
    return 2.0 * kept * before * after


def gated_parameters(config: GatedBlocks, num_layers: int, width: int, seen_width: int) -> int:
    """Parameters of a decoder's gated blocks, and of the embedding of a picture's position."""
    inner = config.num_heads * config.head_dim
    block = 2 * width + 2 * width * inner + 2 * seen_width * inner + 2
    block += 2 * RESAMPLER_EXPANSION * width * width
    return width + len(config.places(num_layers)) * block


def gated_flops(
    config: GatedBlocks, num_layers: int, width: int, seen_width: int, num_features: int
) -> tuple[float, float]:
    """Forward FLOPs in a decoder's gated blocks: of one position that looks at a picture of so many
    features, and of one picture."""
    inner, blocks = config.num_heads * config.head_dim, len(config.places(num_layers))
    position = 4.0 * width * inner + 4.0 * RESAMPLER_EXPANSION * width * width
    position += 4.0 * inner * num_features
    return blocks * position, blocks * 4.0 * seen_width * inner * num_features


def kept_numbers(
    config: ProjectorConfig, num_patches: int, encoder_width: int, decoder_width: int
) -> int:
    """Numbers of one picture that a connector keeps for its backward pass: what goes into each
    product, and what stands before and behind each activation."""
    e, reduction, kept = encoder_width, config.reduction, config.num_features(num_patches)
    widths = config.widths(e, decoder_width)
    total = kept * (widths[0] + 2 * sum(widths[1:-1]))
    if isinstance(reduction, AttentionPool):
        total += 3 * e * num_patches + 3 * e * kept
    elif isinstance(reduction, Resampler):
        inner, seen = reduction.num_heads * reduction.head_dim, num_patches + kept
        wide = (3 + 2 * RESAMPLER_EXPANSION) * e * kept + 2 * inner * kept
        total += reduction.num_layers * (wide + 2 * inner * seen + 2 * e * seen)
    return total
