"""Stages that no training on pictures precedes: data, encoders, text models.

Identity covers what changes the result (configuration, parents, data fingerprints, format
version); fields marked `Placement` are left out. Equal identity means the same folder.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from midstream.config import (
    AnyDecoderConfig,
    Config,
    ContrastiveTraining,
    EncoderConfig,
    ExpectedSource,
    FeatureType,
    Fraction,
    FusedEncoder,
    PretrainedEncoder,
    Rate,
    Tokenizer,
    Training,
    VLMConfig,
    World,
)
from midstream.identity import Placement, digest, fields_of

# Begins what stands for a fingerprint or digest in a plan made without the data or checkpoint.
PLANNED = "planned"
# Not `Self`, which the tests' type checks of single methods cannot read.
Own = TypeVar("Own", bound="StageBase")


class StageBase(Config):
    """What all stages share: an identity and a folder name. Each has `parents`: what it reads."""

    @cached_property
    def identity(self) -> str:
        """Sixteen digits of configuration and ancestry."""
        return digest([type(self).__name__, fields_of(self)])

    def model_copy(
        self: Own, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Own:
        """A copy with other values, and therefore with an identity of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("identity", None)
        return copied

    @property
    def name(self) -> str:
        """The folder's name in the store: kind and identity."""
        return f"{type(self).__name__.lower()}-{self.identity}"


class Prepare(StageBase):
    """A world's public files -> indexed sources, tokenizer and benchmarks.

    `expected` is what plans count with until the sources are there.
    """

    kind: Literal["prepare"] = "prepare"
    world: World
    tokenizer: Tokenizer
    expected: Annotated[tuple[ExpectedSource, ...], Placement] = ()

    @property
    def parents(self) -> "tuple[()]":
        return ()


class TrainEncoder(StageBase):
    """A SigLIP or DINOv2 tower trained on captions where no public one is at hand."""

    kind: Literal["train_encoder"] = "train_encoder"
    data: Prepare
    encoder: EncoderConfig
    training: ContrastiveTraining

    @model_validator(mode="after")
    def _trainable(self) -> "TrainEncoder":
        if self.encoder.family == "siglip2":
            raise ValueError(
                "a siglip2 tower is imported, not trained on captions; choose siglip or dinov2"
            )
        return self

    @property
    def parents(self) -> "tuple[Prepare, ...]":
        return (self.data,)


class Imported(Config):
    """A folder of `midstream import`; `content` stands for weights, moments and position."""

    folder: Annotated[Path, Placement]
    content: str


class LoadEncoder(StageBase):
    """Imported vision towers, checked and put together as one encoder; one folder a tower."""

    kind: Literal["load_encoder"] = "load_encoder"
    towers: Annotated[tuple[Imported, ...], Field(min_length=1)]
    encoder: PretrainedEncoder

    @model_validator(mode="after")
    def _paired(self) -> "LoadEncoder":
        wanted = len(self.encoder.towers) if isinstance(self.encoder, FusedEncoder) else 1
        if len(self.towers) != wanted:
            raise ValueError(f"the encoder has {wanted} towers, {len(self.towers)} were given")
        return self

    @property
    def parents(self) -> "tuple[()]":
        return ()


class FuseEncoders(StageBase):
    """Encoders of other stages put side by side as one; each tower's features are its own.

    Prismatic's SigLIP + DINOv2, of towers that are trained here.
    """

    kind: Literal["fuse_encoders"] = "fuse_encoders"
    towers: Annotated[
        tuple[Annotated[TrainEncoder | LoadEncoder, Field(discriminator="kind")], ...],
        Field(min_length=2),
    ]
    feature_dtype: FeatureType = "bfloat16"

    @model_validator(mode="after")
    def _alike(self) -> "FuseEncoders":
        for tower in self.towers:
            if isinstance(tower.encoder, FusedEncoder):
                raise ValueError(f"{tower.name} is fused itself; give its towers one by one")
        _ = self.encoder  # Refuses towers that do not look at the same pictures.
        return self

    @property
    def parents(self) -> "tuple[TrainEncoder | LoadEncoder, ...]":
        return self.towers

    @property
    def encoder(self) -> FusedEncoder:
        """The towers as one encoder."""
        towers = tuple(t.encoder for t in self.towers if isinstance(t.encoder, EncoderConfig))
        return FusedEncoder(towers=towers, feature_dtype=self.feature_dtype)


# What brings an encoder that is frozen unless a later stage trains it.
EncoderStage = TrainEncoder | LoadEncoder | FuseEncoders


class LoadDecoder(StageBase):
    """An imported language model as a text run that is done; `data` must speak its tokens.

    `planned_rate`: the learning rate that plans draw while the folder is not at hand.
    """

    kind: Literal["load_decoder"] = "load_decoder"
    data: Prepare
    checkpoint: Imported
    decoder: AnyDecoderConfig
    planned_rate: Annotated[Rate | None, Placement] = None

    @property
    def parents(self) -> "tuple[Prepare, ...]":
        return (self.data,)

    @property
    def model(self) -> VLMConfig:
        """The model this stage loads."""
        return VLMConfig(decoder=self.decoder)


class Pretrain(StageBase):
    """Text only; weights are kept at `milestones` (shares of its tokens) along one run."""

    kind: Literal["pretrain"] = "pretrain"
    data: Prepare
    decoder: AnyDecoderConfig
    training: Training
    milestones: tuple[Fraction, ...] = (1.0,)

    @model_validator(mode="after")
    def _blind(self) -> "Pretrain":
        if self.training.encoder_rate_factor is not None:
            raise ValueError("encoder_rate_factor is given, but a text run has no encoder")
        if self.training.freeze_decoder:
            raise ValueError("freeze_decoder is given, but a text run has nothing else to train")
        return self

    @property
    def parents(self) -> "tuple[Prepare, ...]":
        return (self.data,)

    @property
    def model(self) -> VLMConfig:
        """The model this stage trains."""
        return VLMConfig(decoder=self.decoder)
