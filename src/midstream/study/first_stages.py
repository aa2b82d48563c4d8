"""Stages that no training on pictures precedes: data, encoders, text models.

Identity covers what changes the result; equal identity means the same folder.
"""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

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
    PocketWorld,
    PretrainedEncoder,
    PublicFolder,
    Rate,
    SmallReal,
    Tokenizer,
    TokenizerFile,
    Training,
    VLMConfig,
    World,
)
from midstream.core.identity import Placement, canonical, digest, fields_of

# Begins what stands for a fingerprint or digest in a plan made without the data or checkpoint.
PLANNED = "planned"
# Not `Self`, which the tests' type checks of single methods cannot read.
Own = TypeVar("Own", bound="Deriving")


class Deriving(Config):
    """A value that keeps what follows from its fields: the attributes `DERIVED`."""

    DERIVED: ClassVar[tuple[str, ...]] = ()

    def model_copy(
        self: Own, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Own:
        """A copy with other values, and therefore with all that follows from them anew."""
        copied = super().model_copy(update=update, deep=deep)
        for derived in self.DERIVED:
            copied.__dict__.pop(derived, None)
        return copied


class OfWorld:
    """What has to do with a `world`."""

    if TYPE_CHECKING:
        world: World

    @property
    def laid_out(self) -> "tuple[PrepareWorld, ...]":
        """The stage that writes a generated world; none for a folder of a user."""
        return () if isinstance(self.world, PublicFolder) else (_world_stage(self.world),)


class StageBase(Deriving):
    """What all stages share: an identity and a folder name. Each has `parents`: what it reads."""

    DERIVED: ClassVar[tuple[str, ...]] = ("identity", "_model")

    @cached_property
    def identity(self) -> str:
        """Sixteen digits of configuration and ancestry."""
        return digest([type(self).__name__, self.identity_fields])

    @property
    def identity_fields(self) -> dict[str, Any]:
        """What the identity is made of: the fields, and of the data only what the stage reads."""
        fields = fields_of(self)
        if "data" in fields:
            del fields["data"]
            fields |= self._reads()
        return fields

    @property
    def parents(self) -> "tuple[StageBase, ...]":
        """The stages that this one reads."""
        raise NotImplementedError

    def _reads(self) -> dict[str, Any]:
        """The identities of the data stages among the parents."""
        return {"reads": [p.identity for p in self.parents if isinstance(p, DataStage)]}

    @property
    def name(self) -> str:
        """The folder's name in the store: kind and identity."""
        return f"{type(self).__name__.lower()}-{self.identity}"


class PrepareWorld(StageBase):
    """A generated world's public files, laid out once for all that read them."""

    kind: Literal["prepare_world"] = "prepare_world"
    world: Annotated[PocketWorld | SmallReal, Field(discriminator="kind")]

    @property
    def identity_fields(self) -> dict[str, Any]:
        fields = super().identity_fields
        if isinstance(self.world, PocketWorld):
            fields["version"] = self.world.VERSION
            if self.world.num_albums:
                fields["albums"] = self.world.ALBUMS_VERSION
        return fields

    @property
    def parents(self) -> "tuple[()]":
        return ()


class PrepareTokenizer(OfWorld, StageBase):
    """A tokenizer: a file's, or one trained on sources of `world`."""

    kind: Literal["prepare_tokenizer"] = "prepare_tokenizer"
    world: World
    tokenizer: Tokenizer

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The sources that it is trained on; none for a file."""
        if isinstance(self.tokenizer, TokenizerFile):
            return ()
        return self.tokenizer.sources or self.world.text_names or self.world.source_names

    @property
    def identity_fields(self) -> dict[str, Any]:
        fields = {"tokenizer": canonical(self.tokenizer)}
        parts = [self.world.source_part(name) for name in self.trained_on]
        return fields | ({"trained on": parts} if parts else {})

    @property
    def parents(self) -> "tuple[PrepareWorld, ...]":
        return self.laid_out if self.trained_on else ()


class PrepareSource(OfWorld, StageBase):
    """One source of a world, its examples indexed in the tokens of a tokenizer.

    `expected` is what plans count with until it is there.
    """

    kind: Literal["prepare_source"] = "prepare_source"
    world: World
    source: str
    tokenizer: PrepareTokenizer
    expected: Annotated[ExpectedSource | None, Placement] = None

    @property
    def identity_fields(self) -> dict[str, Any]:
        part = self.world.source_part(self.source)
        return {"source": self.source, "part": part, "tokenizer": self.tokenizer.identity}

    @property
    def parents(self) -> "tuple[PrepareWorld | PrepareTokenizer, ...]":
        return (*self.laid_out, self.tokenizer)


class Prepare(OfWorld, Deriving):
    """A world and a tokenizer: what stages name their sources in.

    Each source that a stage uses is a stage of its own (`source`), and so is the tokenizer; what
    no stage uses is never prepared. `expected` is what plans count with until sources are there.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("vocabulary", "_sources")

    kind: Literal["prepare"] = "prepare"
    world: World
    tokenizer: Tokenizer
    expected: Annotated[tuple[ExpectedSource, ...], Placement] = ()

    @cached_property
    def vocabulary(self) -> PrepareTokenizer:
        """The tokenizer's stage."""
        return PrepareTokenizer(world=self.world, tokenizer=self.tokenizer)

    def source(self, name: str) -> PrepareSource:
        """The stage of one source, there or not."""
        if name not in self._sources:
            expected = next((source for source in self.expected if source.name == name), None)
            self._sources[name] = PrepareSource(
                world=self.world, source=name, tokenizer=self.vocabulary, expected=expected
            )
        return self._sources[name]

    @cached_property
    def _sources(self) -> dict[str, PrepareSource]:
        return {}

    def needed_by(self, training: Training) -> "tuple[PrepareTokenizer | PrepareSource, ...]":
        """The tokenizer, and the sources that a budget draws from."""
        return (self.vocabulary, *map(self.source, training.budget.source_names))


@lru_cache(maxsize=64)
def _world_stage(world: PocketWorld | SmallReal) -> PrepareWorld:
    # One object, whose identity is worked out once for all that read the world.
    return PrepareWorld(world=world)


# What makes data of public files.
DataStage = PrepareWorld | PrepareTokenizer | PrepareSource


class TrainEncoder(StageBase):
    """A SigLIP or DINOv2 tower trained on captions where no public one is at hand."""

    kind: Literal["train_encoder"] = "train_encoder"
    data: Prepare
    encoder: EncoderConfig
    training: ContrastiveTraining

    @model_validator(mode="after")
    def _trainable(self) -> "TrainEncoder":
        if self.encoder.family not in ("siglip", "dinov2"):
            raise ValueError(
                f"a {self.encoder.family} tower is imported, not trained on captions; choose "
                "siglip or dinov2"
            )
        return self

    @property
    def parents(self) -> "tuple[PrepareTokenizer | PrepareSource, ...]":
        return (self.data.vocabulary, self.data.source(self.training.source))


class Imported(Config):
    """A folder of `midstream import`; `content` stands for weights, moments and position.

    `source` is what `midstream import` makes it of, where that is public.
    """

    folder: Annotated[Path, Placement]
    content: str
    source: Annotated[str, Placement] = ""


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

    `planned_rate`, `planned_tokens` and `planned_total_tokens`: its learning rate, the tokens that
    it has seen and those of its whole run, which plans draw while the folder is not at hand.
    """

    kind: Literal["load_decoder"] = "load_decoder"
    data: Prepare
    checkpoint: Imported
    decoder: AnyDecoderConfig
    planned_rate: Annotated[Rate | None, Placement] = None
    planned_tokens: Annotated[int | None, Placement] = None
    planned_total_tokens: Annotated[int | None, Placement] = None

    @property
    def parents(self) -> "tuple[PrepareTokenizer, ...]":
        return (self.data.vocabulary,)

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
        for name in ("freeze_decoder", "lora"):
            if getattr(self.training, name):
                raise ValueError(f"{name} is given, but a text run has nothing else to train")
        return self

    @property
    def parents(self) -> "tuple[PrepareTokenizer | PrepareSource, ...]":
        return self.data.needed_by(self.training)

    @property
    def model(self) -> VLMConfig:
        """The model this stage trains."""
        return VLMConfig(decoder=self.decoder)
