"""Options of the model, the paper's sizes by name, and the FLOPs that follow from them; no torch.

FLOPs count matrix products, a product and a sum as two; attention by what is attended to.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from midstream.config.base import Config, Positive
from midstream.config.connectors import ProjectorConfig


class DecoderConfig(Config):
    """An OpenLM decoder (open_lm/model.py; recipe of DCLM-1B: qk-norm, gain-only LayerNorm)."""

    kind: Literal["openlm"] = "openlm"
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    vocab_size: Positive = 50432
    qk_norm: bool = True
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    @model_validator(mode="after")
    def _divides(self) -> "DecoderConfig":
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads "
                f"{self.num_heads}, since rotary embeddings turn pairs of channels"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        """Width of SwiGLU: two thirds of 4x, rounded up to a multiple of 256."""
        return 256 * -(-int(8 * self.hidden_size / 3) // 256)

    @property
    def num_parameters(self) -> int:
        """All parameters, both embedding matrices included."""
        d, qk = self.hidden_size, 2 * self.hidden_size if self.qk_norm else 0
        layer = 4 * d * d + 3 * d * self.ffn_size + 2 * d + qk
        return self.num_layers * layer + d + 2 * self.vocab_size * d

    @property
    def linear_parameters(self) -> int:
        """Weights that a position is multiplied with, the head left out."""
        d = self.hidden_size
        return self.num_layers * (4 * d * d + 3 * d * self.ffn_size)


class TransformersDecoderConfig(Config):
    """A causal language model of `transformers`, by its own configuration.

    `model_type` is one of the families of `model/pretrained.py`, `settings` what its
    `config.json` says. The sizes follow from them and are stated so that planning needs no torch;
    `midstream import` writes all of it.
    """

    kind: Literal["transformers"] = "transformers"
    model_type: str
    settings: dict[str, Any]
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    vocab_size: Positive
    num_parameters: Positive
    tied_embeddings: bool

    @property
    def linear_parameters(self) -> int:
        """Weights that a position is multiplied with, the head left out (and norms with it)."""
        embeddings = self.vocab_size * self.hidden_size
        return self.num_parameters - embeddings * (1 if self.tied_embeddings else 2)


AnyDecoderConfig = Annotated[DecoderConfig | TransformersDecoderConfig, Field(discriminator="kind")]


Colour = tuple[float, float, float]
# float32 rounds nothing: stock Llava classes, which do not round, then see what training saw.
FeatureType = Literal["float32", "bfloat16", "int8"]


class ImageTransform(Config):
    """How a picture becomes pixels: fitted to a square, then (value - mean) / std by channel.

    letterbox: padded to a square with the mean's colour, then resized; square: resized, whatever
    its shape; crop: resized by its shorter side, the middle cut out.
    """

    size: Positive
    resize: Literal["letterbox", "square", "crop"] = "letterbox"
    mean: Colour = (0.5, 0.5, 0.5)
    std: Colour = (0.5, 0.5, 0.5)


class EncoderConfig(Config):
    """A vision tower: SigLIP, SigLIP 2 (`siglip2` is its NaFlex class), CLIP, DINOv2 or DINOv3.

    `feature_layer` picks the hidden states that the projector sees: -1 is the last block's output,
    -2 the second to last as Prismatic takes it; `final_norm` applies the tower's last norm to them.
    Features are rounded to `feature_dtype`, whether they are stored or computed anew (int8: one
    scale a patch). `position_size` is the image size whose positions the weights hold; another
    `image_size` interpolates them (DINOv3 turns patches by where they lie and holds none).
    Registers and `ffn` are DINOv2's and DINOv3's.
    """

    kind: Literal["tower"] = "tower"
    family: Literal["siglip", "siglip2", "clip", "dinov2", "dinov3"] = "siglip"
    image_size: Positive
    patch_size: Positive
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    intermediate_size: Positive
    position_size: Positive | None = None
    num_registers: Annotated[int, Field(ge=0)] = 0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    hidden_act: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-6
    feature_layer: int = -2
    final_norm: bool = False
    resize: Literal["letterbox", "square", "crop"] = "letterbox"
    pixel_mean: Colour = (0.5, 0.5, 0.5)
    pixel_std: Colour = (0.5, 0.5, 0.5)
    feature_dtype: FeatureType = "bfloat16"

    @property
    def transform(self) -> ImageTransform:
        """How pictures become this encoder's pixels."""
        return ImageTransform(
            size=self.image_size, resize=self.resize, mean=self.pixel_mean, std=self.pixel_std
        )

    @model_validator(mode="after")
    def _fits(self) -> "EncoderConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_heads}")
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer {self.feature_layer} must lie in -{self.num_layers}..-1"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} holds no patch of {self.patch_size}")
        is_dino = self.family in ("dinov2", "dinov3")
        if not is_dino and (self.num_registers or self.ffn != "mlp"):
            raise ValueError(f"registers and swiglu are DINO's, this is {self.family}")
        return self

    @property
    def num_patches(self) -> int:
        """Patch features per image: the length of an image in a row."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches, no part of the features: a class token and registers."""
        return 0 if self.family in ("siglip", "siglip2") else 1 + self.num_registers

    @property
    def position_patches(self) -> int:
        """Patches that the weights hold positions for."""
        return ((self.position_size or self.image_size) // self.patch_size) ** 2


class FusedEncoder(Config):
    """Towers that look at the same picture, their patch features side by side (Prismatic: SigLIP
    and DINOv2). Pixels are those of the first tower; the others' mean and std are applied to them.
    """

    kind: Literal["fused"] = "fused"
    towers: Annotated[tuple[EncoderConfig, ...], Field(min_length=2)]
    feature_dtype: FeatureType = "bfloat16"

    @model_validator(mode="after")
    def _alike(self) -> "FusedEncoder":
        looks = {(tower.image_size, tower.num_patches, tower.resize) for tower in self.towers}
        if len(looks) > 1:
            raise ValueError(
                "fused towers must agree in image_size, patches and resize, these are "
                + ", ".join(map(str, sorted(looks)))
            )
        return self

    @property
    def image_size(self) -> int:
        """Side of the square picture, in pixels."""
        return self.towers[0].image_size

    @property
    def num_patches(self) -> int:
        """Patch features per image."""
        return self.towers[0].num_patches

    @property
    def hidden_size(self) -> int:
        """The towers' widths, added up."""
        return sum(tower.hidden_size for tower in self.towers)

    @property
    def transform(self) -> ImageTransform:
        """How pictures become the first tower's pixels."""
        return self.towers[0].transform


class PatchProjection(Config):
    """No tower: a linear map of raw patches, from its initialiser and trained with the model."""

    kind: Literal["patches"] = "patches"
    image_size: Positive
    patch_size: Positive
    hidden_size: Positive
    resize: Literal["letterbox", "square", "crop"] = "letterbox"

    @property
    def num_patches(self) -> int:
        """Patch features per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def transform(self) -> ImageTransform:
        """How pictures become pixels, from -1 to 1."""
        return ImageTransform(size=self.image_size, resize=self.resize)


PretrainedEncoder = Annotated[EncoderConfig | FusedEncoder, Field(discriminator="kind")]
AnyEncoderConfig = Annotated[
    EncoderConfig | FusedEncoder | PatchProjection, Field(discriminator="kind")
]


def at_size(encoder: AnyEncoderConfig, image_size: int, *, owned: bool) -> AnyEncoderConfig:
    """The encoder on square pictures of another size, in more or fewer patches.

    One that the model owns has positions of that size; of a frozen one those that its weights hold
    are interpolated in every pass. Raises ValueError for a size that the patches do not fill, with
    the nearest that they do.
    """
    if image_size == encoder.image_size:
        return encoder
    if isinstance(encoder, FusedEncoder):
        towers = tuple(_tower_at(tower, image_size, owned=owned) for tower in encoder.towers)
        return FusedEncoder(towers=towers, feature_dtype=encoder.feature_dtype)
    if isinstance(encoder, EncoderConfig):
        return _tower_at(encoder, image_size, owned=owned)
    _check_filled(encoder.patch_size, image_size)
    return encoder.model_copy(update={"image_size": image_size})


def _tower_at(tower: EncoderConfig, image_size: int, *, owned: bool) -> EncoderConfig:
    _check_filled(tower.patch_size, image_size)
    held = image_size if owned else tower.position_size or tower.image_size
    if not owned and held == image_size:
        # Back at its own size: the encoder that it was.
        return tower.model_copy(update={"image_size": image_size, "position_size": None})
    return tower.model_copy(update={"image_size": image_size, "position_size": held})


def _check_filled(patch_size: int, image_size: int) -> None:
    if rest := image_size % patch_size:
        near = sorted({max(image_size - rest, patch_size), image_size - rest + patch_size})
        raise ValueError(
            f"image_size {image_size} is no multiple of the encoder's patch_size {patch_size}; "
            f"choose {' or '.join(map(str, near))}"
        )


Attention = Literal["causal", "segments", "prefix", "pictures", "latest"]


class VLMConfig(Config):
    """Decoder, and how it sees: without `encoder` it is a plain language model.

    attention: who sees whom. causal: all that stands before in the row; segments: before in the
    same segment; prefix: so too, and the image and the question behind it see each other
    (PaliGemma); pictures: as segments, and the positions of one picture see each other; latest: as
    segments, but of pictures a position sees its own or the latest before it alone (Flamingo).
    `owns_encoder`: the encoder's weights are the model's own, since some stage trains
    them; else features arrive from a frozen one.
    """

    decoder: AnyDecoderConfig
    encoder: AnyEncoderConfig | None = None
    projector: ProjectorConfig = ProjectorConfig()
    attention: Attention = "segments"
    owns_encoder: bool = False

    @model_validator(mode="after")
    def _owned(self) -> "VLMConfig":
        if isinstance(self.encoder, PatchProjection) and not self.owns_encoder:
            raise ValueError("a patch projection is the model's own; set owns_encoder")
        if self.owns_encoder and self.encoder is None:
            raise ValueError("owns_encoder is set, but there is no encoder")
        return self

    @model_validator(mode="after")
    def _connects(self) -> "VLMConfig":
        if self.encoder is not None:
            self.projector.check_fits(self.encoder.num_patches, self.encoder.hidden_size)
        if (gated := self.projector.gated) is not None:
            if not isinstance(self.decoder, DecoderConfig):
                raise ValueError(
                    "gated blocks stand between those of an OpenLM decoder; leave gated out for "
                    f"a {self.decoder.model_type}"
                )
            if gated.every > self.decoder.num_layers:
                raise ValueError(
                    f"a gated block before every {gated.every}th block comes to none of the "
                    f"decoder's {self.decoder.num_layers}; lower every"
                )
        return self

    @property
    def num_patches(self) -> int:
        """Patches of a picture before the connector; 0 without an encoder."""
        return 0 if self.encoder is None else self.encoder.num_patches

    @property
    def image_tokens(self) -> int:
        """Positions of a row that a picture takes, behind the connector; 0 without an encoder."""
        if self.encoder is None:
            return 0
        if self.projector.gated is not None:
            return 1
        return self.projector.num_features(self.encoder.num_patches)


# OpenLM's open_lm/model_configs: open_lm_11m_v2, 79m_v2, 154m_v2, 411m_v2, 1b (the paper's 1.4B)
# and 7b. All with qk-norm, as in DCLM.
DECODERS = {
    "11m": DecoderConfig(hidden_size=96, num_layers=8, num_heads=4),
    "79m": DecoderConfig(hidden_size=512, num_layers=8, num_heads=4),
    "154m": DecoderConfig(hidden_size=576, num_layers=24, num_heads=8),
    "411m": DecoderConfig(hidden_size=1024, num_layers=24, num_heads=8),
    "1b": DecoderConfig(hidden_size=2048, num_layers=24, num_heads=16),
    "7b": DecoderConfig(hidden_size=4096, num_layers=32, num_heads=32),
}


def weight_flops(config: AnyDecoderConfig) -> float:
    """Forward FLOPs of one position in the blocks' matrices."""
    return 2.0 * config.linear_parameters


def attention_flops(config: AnyDecoderConfig) -> float:
    """Forward FLOPs of one position that looks at another, in all blocks: scores and mixing."""
    return 4.0 * config.hidden_size * config.num_layers


# How a step goes about it, for those who do it (`model/`, `data/images.py`) and those who count it.
# Where more of the positions than this have a target, the last block works on all of them.
MOST_TARGETS = 0.8
# On a CPU shorter rows stay under one dense mask. Forward and backward, dense over cut, in time:
# rows of 1,024 positions and 8 heads of 64 channels 13 with segments of 12 positions, 6.5 with 128,
# 1.9 with 512; 8 rows of 192 and 4 heads of 32 channels 1.3 to 1.9, 32 such rows 0.8 to 1.0.
LEAST_CUT_ROW = 256
# Positions of a block of FlexAttention's masks.
MASK_BLOCK = 128
# Logits held at once, by kind of device. On a CPU larger pieces than 64 MiB are no faster; a GPU
# wants products that are large enough to fill it.
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**28}
# Pictures that are read, and with small towers or on a GPU looked at, together; a tower of so many
# patches fills a CPU with one picture.
FILL_BATCH, LARGE_TOWER = 8, 256


def picture_bytes(config: PretrainedEncoder) -> int:
    """Bytes of one picture's stored features: four or two a number, or one and two a patch."""
    if config.feature_dtype == "int8":
        return config.num_patches * (config.hidden_size + 2)
    return config.num_patches * config.hidden_size * (4 if config.feature_dtype == "float32" else 2)


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
