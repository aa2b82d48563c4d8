"""The kinds of stage: frozen values that name their parents, with an identity each.

Those of `first_stages.py` can be imported from here too.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from midstream.config import (
    AnyDecoderConfig,
    Attention,
    Config,
    Evaluation,
    Fraction,
    Overflow,
    PatchProjection,
    Positive,
    ProjectorConfig,
    Training,
    VLMConfig,
)
from midstream.config.model import at_size
from midstream.config.training import ContinuedCosine, rate_at
from midstream.study.first_stages import PLANNED as PLANNED
from midstream.study.first_stages import DataStage as DataStage
from midstream.study.first_stages import EncoderStage as EncoderStage
from midstream.study.first_stages import FuseEncoders as FuseEncoders
from midstream.study.first_stages import Imported as Imported
from midstream.study.first_stages import LoadDecoder as LoadDecoder
from midstream.study.first_stages import LoadEncoder as LoadEncoder
from midstream.study.first_stages import Prepare as Prepare
from midstream.study.first_stages import PrepareSource as PrepareSource
from midstream.study.first_stages import PrepareTokenizer as PrepareTokenizer
from midstream.study.first_stages import PrepareWorld as PrepareWorld
from midstream.study.first_stages import Pretrain as Pretrain
from midstream.study.first_stages import StageBase as StageBase
from midstream.study.first_stages import TrainEncoder as TrainEncoder

AnyEncoderSource = Annotated[EncoderStage | PatchProjection, Field(discriminator="kind")]


class FromScratch(Config):
    """Start from the initialiser."""

    kind: Literal["from_scratch"] = "from_scratch"


class _FromText(Config):
    """A text run's milestone, or an imported model: weights and schedule position.

    `optimizer` says whether Adam's moments come along (carry), start at zero (fresh, as OpenLM's
    `--pretrained` does), or start at zero while the rate rises to the schedule's (warm).
    """

    stage: Annotated[Pretrain | LoadDecoder, Field(discriminator="kind")]
    completion: Fraction = 1.0
    optimizer: Literal["carry", "fresh", "warm"] = "fresh"

    @model_validator(mode="after")
    def _held(self) -> "_FromText":
        if isinstance(self.stage, LoadDecoder) and self.completion != 1.0:
            share = f"{self.completion:.0%}"
            raise ValueError(f"an imported model has no weights at {share} but its own (100%)")
        return self


class ContinueFrom(_FromText):
    """Start from a text model (`_FromText`)."""

    kind: Literal["continue_from"] = "continue_from"


class InitFrom(Config):
    """Start from an earlier image-text stage: the weights that it ended with, and its rate there.

    Or from an imported vision-language model. Moments are not kept: they start at zero (fresh), or
    so while the rate rises (warm).
    """

    kind: Literal["init_from"] = "init_from"
    stage: Annotated["Continue | LoadModel", Field(discriminator="kind")]
    optimizer: Literal["fresh", "warm"] = "fresh"


class StartText(_FromText):
    """Fine-tune a text model directly: an encoder beside it, a projector from the initialiser; the
    data is that of the text model."""

    kind: Literal["start_text"] = "start_text"
    encoder: AnyEncoderSource
    projector: ProjectorConfig = ProjectorConfig()
    attention: Attention = "segments"

    @property
    def data(self) -> Prepare:
        """The prepared world, that of the text model."""
        return self.stage.data

    @property
    def encoder_stage(self) -> EncoderStage | None:
        """Where the encoder's weights come from; None for a patch projection."""
        return None if isinstance(self.encoder, PatchProjection) else self.encoder

    @property
    def model(self) -> VLMConfig:
        """The text model and what it will see with, before anything is trained."""
        own: dict[str, Any] = {"projector": self.projector, "attention": self.attention}
        return VLMConfig(decoder=self.stage.decoder, **own, **_sees(self.encoder))


def _check_end(before: "Continue", training: Training) -> None:
    """Raises ValueError where a schedule would continue one that ends at its own end rate."""
    schedule, ends = training.schedule, rate_at(before.training.schedule, 1, 1, parent_rate=0.0)
    if isinstance(schedule, ContinuedCosine) and ends <= schedule.end_rate:
        raise ValueError(
            "a continued schedule starts at the rate with which the stage before ends, "
            f"{ends:g}, which is not above its own end rate {schedule.end_rate:g}; let "
            "that stage end higher, or re-warm with WarmupCosine"
        )


def _check_moments(optimizer: str, training: Training) -> None:
    if optimizer == "carry" and training.keeps_decoder:
        raise ValueError(
            "optimizer='carry' is given, but the decoder is frozen and has no moments; choose "
            "optimizer='fresh'"
        )


def _sees(encoder: EncoderStage | PatchProjection) -> dict[str, Any]:
    """The fields of a model that say what it sees with, before any stage trains that."""
    owned = isinstance(encoder, PatchProjection)
    sees = encoder if isinstance(encoder, PatchProjection) else encoder.encoder
    return {"encoder": sees, "owns_encoder": owned}


def _trained(before: Mapping[str, Any], stage: "Continue | Finetune") -> VLMConfig:
    """What a stage makes of a model: it sees pictures of its size, and may own its encoder."""
    owned = before["owns_encoder"] or stage.training.encoder_rate_factor is not None
    sees, size = before["encoder"], stage.image_size
    sees = sees if size is None else at_size(sees, size, owned=owned)
    # Anew, so that the connector is seen to fit the patches.
    return VLMConfig(**{**before, "owns_encoder": owned, "encoder": sees})


def _check_room(model: VLMConfig, training: Training) -> None:
    patches, length = model.image_tokens, training.rows.row_length
    if patches >= length:
        raise ValueError(
            f"an image takes {patches} positions, a row has {length}; raise row_length, lower the "
            "encoder's image_size, or take a connector that leaves fewer"
        )


class LoadModel(StageBase):
    """An imported vision-language model as an image-text stage that is done; `data` must speak its
    tokens.

    `encoder` loads the towers that were imported with it; a map of patches is the model's own.
    """

    kind: Literal["load_model"] = "load_model"
    data: Prepare
    checkpoint: Imported
    encoder: Annotated[LoadEncoder | PatchProjection, Field(discriminator="kind")]
    decoder: AnyDecoderConfig
    projector: ProjectorConfig
    attention: Attention

    @property
    def parents(self) -> "tuple[Stage, ...]":
        encoder = self.encoder_stage
        return (self.data.vocabulary, *(() if encoder is None else (encoder,)))

    @property
    def encoder_stage(self) -> LoadEncoder | None:
        """Where the encoder's weights come from; None for a patch projection."""
        return None if isinstance(self.encoder, PatchProjection) else self.encoder

    @property
    def model(self) -> VLMConfig:
        """The model this stage loads."""
        own: dict[str, Any] = {"projector": self.projector, "attention": self.attention}
        return VLMConfig(decoder=self.decoder, **own, **_sees(self.encoder))


class Continue(StageBase):
    """Image-text training: from scratch, a milestone of a text run, or an earlier such stage.

    `image_size` is the side of this stage's pictures in pixels; without it that of the stage it
    starts from, or the encoder's own. What comes after takes it over.
    """

    kind: Literal["continue"] = "continue"
    data: Prepare
    encoder: AnyEncoderSource
    decoder: AnyDecoderConfig
    projector: ProjectorConfig = ProjectorConfig()
    attention: Attention = "segments"
    start: Annotated[FromScratch | ContinueFrom | InitFrom, Field(discriminator="kind")]
    training: Training
    image_size: Positive | None = None

    @model_validator(mode="after")
    def _room(self) -> "Continue":
        _check_room(self.model, self.training)
        if isinstance(self.start, ContinueFrom):
            _check_moments(self.start.optimizer, self.training)
        return self

    @model_validator(mode="after")
    def _goes_on(self) -> "Continue":
        if isinstance(self.start, InitFrom):
            before = self.start.stage
            for part in ("decoder", "encoder", "projector"):
                if getattr(self, part) != getattr(before, part):
                    raise ValueError(
                        f"the {part} differs from that of {before.name}, which this stage starts "
                        "from; give it the same"
                    )
            if isinstance(before, Continue):
                _check_end(before, self.training)
        return self

    @property
    def parents(self) -> "tuple[Stage, ...]":
        before = () if isinstance(self.start, FromScratch) else (self.start.stage,)
        encoder = () if self.encoder_stage is None else (self.encoder_stage,)
        return (*self.data.needed_by(self.training), *encoder, *before)

    @property
    def encoder_stage(self) -> EncoderStage | None:
        """Where the encoder's weights come from; None for a patch projection."""
        return None if isinstance(self.encoder, PatchProjection) else self.encoder

    @property
    def model(self) -> VLMConfig:
        """The model this stage trains."""
        return self._model

    @cached_property
    def _model(self) -> VLMConfig:
        own = {name: getattr(self, name) for name in ("decoder", "projector", "attention")}
        if isinstance(self.start, InitFrom):
            return _trained(dict(self.start.stage.model) | own, self)
        return _trained(_sees(self.encoder) | own, self)


class Finetune(StageBase):
    """Conversations; starts from the weights of an image-text stage or an imported model that sees,
    or from a text model. `image_size` as in `Continue`."""

    kind: Literal["finetune"] = "finetune"
    start: Annotated[Continue | LoadModel | StartText, Field(discriminator="kind")]
    training: Training
    image_size: Positive | None = None

    @model_validator(mode="after")
    def _room(self) -> "Finetune":
        _check_room(self.model, self.training)
        if isinstance(self.start, StartText):
            _check_moments(self.start.optimizer, self.training)
        elif isinstance(self.start, Continue):
            _check_end(self.start, self.training)
        return self

    @property
    def parents(self) -> "tuple[Stage, ...]":
        before = self.start.stage if isinstance(self.start, StartText) else self.start
        encoder = self.encoder_stage
        needed = self.data.needed_by(self.training)
        return (before, *needed, *(() if encoder is None else (encoder,)))

    @property
    def identity_fields(self) -> dict[str, Any]:
        return super().identity_fields | self._reads()

    @property
    def data(self) -> Prepare:
        """The prepared world, that of the start."""
        return self.start.data

    @property
    def encoder_stage(self) -> EncoderStage | None:
        """Where the encoder's weights come from before any stage trains them."""
        return self.start.encoder_stage

    @property
    def model(self) -> VLMConfig:
        """The model this stage trains; it owns its encoder once a stage trains that."""
        return self._model

    @cached_property
    def _model(self) -> VLMConfig:
        return _trained(dict(self.start.model), self)


# What several ranks train together.
Trained = Pretrain | Continue | Finetune
WithModel = Pretrain | LoadDecoder | LoadModel | Continue | Finetune


def overflow_of(stage: Trained) -> Overflow:
    """What becomes of a caption or conversation longer than the stage's rows."""
    default: Overflow = "cut" if isinstance(stage, Finetune) else "refuse"
    return stage.training.rows.overflow or default


class Evaluate(StageBase):
    """Benchmarks of one model; `completion` picks a milestone where `of` is a text run."""

    kind: Literal["evaluate"] = "evaluate"
    of: Annotated[WithModel, Field(discriminator="kind")]
    completion: Fraction = 1.0
    evaluation: Evaluation

    @property
    def parents(self) -> "tuple[Stage, ...]":
        sees = isinstance(self.of, LoadModel | Continue | Finetune) and self.of.encoder_stage
        data = self.of.data
        return (self.of, data.vocabulary, *data.laid_out, *((sees,) if sees else ()))

    @property
    def identity_fields(self) -> dict[str, Any]:
        return super().identity_fields | {"benchmarks": self.benchmarks}

    @property
    def benchmarks(self) -> dict[str, Any]:
        """By task, what stands for its files; None for one that the world does not hold."""
        world = self.of.data.world
        asked = self.evaluation
        tasks = (*asked.visual_tasks, *asked.text_tasks, *asked.pools)
        return {task: world.benchmark_part(task) for task in tasks}


# What several ranks can share.
Ranked = Trained | Evaluate

Stage = Annotated[
    PrepareWorld
    | PrepareTokenizer
    | PrepareSource
    | TrainEncoder
    | LoadEncoder
    | FuseEncoders
    | LoadDecoder
    | LoadModel
    | Pretrain
    | Continue
    | Finetune
    | Evaluate,
    Field(discriminator="kind"),
]

_ADAPTER: TypeAdapter[Stage] = TypeAdapter(Stage)


def stage_from_json(text: str | bytes) -> Stage:
    """The stage written by `stage.model_dump_json()`; ValidationError if it is none."""
    return _ADAPTER.validate_json(text)


def came_from(stage: Stage) -> tuple[WithModel, float] | None:
    """The stage whose weights a stage starts from, or evaluates, and the share of its tokens there.

    None where it starts from the initialiser, and for what takes no weights.
    """
    if isinstance(stage, Evaluate):
        return stage.of, stage.completion
    if isinstance(stage, Finetune):
        before = stage.start
        if isinstance(before, StartText):
            return before.stage, before.completion
        return before, 1.0
    if isinstance(stage, Continue) and isinstance(stage.start, InitFrom):
        return stage.start.stage, 1.0
    if isinstance(stage, Continue) and isinstance(stage.start, ContinueFrom):
        return stage.start.stage, stage.start.completion
    return None


def lineage(stage: Stage, completion: float = 1.0) -> Iterator[tuple[Stage, float]]:
    """A stage and those that its weights come from, the last one first, each with the share of its
    tokens that is used."""
    found: tuple[Stage, float] | None = (stage, completion)
    while found is not None:
        yield found
        found = came_from(found[0])


def encoders_of(stage: Stage) -> tuple[EncoderStage, ...]:
    """Where a stage's encoder comes from before any stage trains it, in the order in which they
    run: the towers of a fused one, and itself. Empty for what has no such encoder."""
    encoder = stage.encoder_stage if isinstance(stage, LoadModel | Continue | Finetune) else None
    towers = encoder.towers if isinstance(encoder, FuseEncoders) else ()
    return towers if encoder is None else (*towers, encoder)


def warms_up_moments(stage: Stage) -> bool:
    """Whether the rate is held back while moments that start at zero fill."""
    start = stage.start if isinstance(stage, Continue | Finetune) else None
    return isinstance(start, ContinueFrom | InitFrom | StartText) and start.optimizer == "warm"
