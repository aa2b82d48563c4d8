"""The kinds of stage: frozen values that name their parents, with an identity each.

Identity covers what changes the result (configuration, parents, data fingerprints, format
version); fields marked `Placement` are left out. Equal identity means the same folder.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter

from midstream.config import (
    Config,
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Evaluation,
    Fraction,
    ProjectorConfig,
    Tokenizer,
    Training,
    VLMConfig,
    World,
)
from midstream.identity import digest, fields_of

# Not `Self`, which the tests' type checks of single methods cannot read.
Own = TypeVar("Own", bound="StageBase")


class StageBase(Config):
    """What all stages share: an identity, parents, a folder name."""

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

    @property
    def parents(self) -> "tuple[Stage, ...]":
        """The stages whose results this one reads."""
        return ()


class Prepare(StageBase):
    """A world's public files -> indexed sources, tokenizer and benchmarks."""

    kind: Literal["prepare"] = "prepare"
    world: World
    tokenizer: Tokenizer


class TrainEncoder(StageBase):
    """A SigLIP encoder trained on captions where no public one is at hand."""

    kind: Literal["train_encoder"] = "train_encoder"
    data: Prepare
    encoder: EncoderConfig
    training: ContrastiveTraining

    @property
    def parents(self) -> "tuple[Stage, ...]":
        return (self.data,)


class Pretrain(StageBase):
    """Text only; weights are kept at `milestones` (shares of its tokens) along one run."""

    kind: Literal["pretrain"] = "pretrain"
    data: Prepare
    decoder: DecoderConfig
    training: Training
    milestones: tuple[Fraction, ...] = (1.0,)

    @property
    def parents(self) -> "tuple[Stage, ...]":
        return (self.data,)

    @property
    def model(self) -> VLMConfig:
        """The model this stage trains."""
        return VLMConfig(decoder=self.decoder)


class FromScratch(Config):
    """Start from the initialiser."""

    kind: Literal["from_scratch"] = "from_scratch"


class ContinueFrom(Config):
    """Start from a text run's milestone: weights and schedule position.

    `optimizer` says whether Adam's moments come along (carry) or start at zero (fresh, as
    OpenLM's `--pretrained` does).
    """

    kind: Literal["continue_from"] = "continue_from"
    stage: Pretrain
    completion: Fraction
    optimizer: Literal["carry", "fresh"] = "fresh"


class Continue(StageBase):
    """Image-text training, from scratch or from a milestone of a text run."""

    kind: Literal["continue"] = "continue"
    data: Prepare
    encoder: TrainEncoder
    decoder: DecoderConfig
    projector: ProjectorConfig = ProjectorConfig()
    start: Annotated[FromScratch | ContinueFrom, Field(discriminator="kind")]
    training: Training

    @property
    def parents(self) -> "tuple[Stage, ...]":
        text = () if isinstance(self.start, FromScratch) else (self.start.stage,)
        return (self.data, self.encoder, *text)

    @property
    def model(self) -> VLMConfig:
        """The model this stage trains."""
        return VLMConfig(
            decoder=self.decoder, encoder=self.encoder.encoder, projector=self.projector
        )


class Finetune(StageBase):
    """Conversations; starts from the weights of an image-text stage."""

    kind: Literal["finetune"] = "finetune"
    start: Continue
    training: Training

    @property
    def parents(self) -> "tuple[Stage, ...]":
        return (self.start, self.start.data, self.start.encoder)

    @property
    def data(self) -> Prepare:
        """The prepared world, that of the start."""
        return self.start.data

    @property
    def model(self) -> VLMConfig:
        """The model this stage trains."""
        return self.start.model


class Evaluate(StageBase):
    """Benchmarks of one model; `completion` picks a milestone where `of` is a text run."""

    kind: Literal["evaluate"] = "evaluate"
    of: Annotated[Pretrain | Continue | Finetune, Field(discriminator="kind")]
    completion: Fraction = 1.0
    evaluation: Evaluation

    @property
    def parents(self) -> "tuple[Stage, ...]":
        sees = self.of.model.encoder is not None
        encoder = (self.of.start.encoder,) if isinstance(self.of, Finetune) else ()
        encoder = (self.of.encoder,) if isinstance(self.of, Continue) else encoder
        return (self.of, self.of.data, *(encoder if sees else ()))


Stage = Annotated[
    Prepare | TrainEncoder | Pretrain | Continue | Finetune | Evaluate, Field(discriminator="kind")
]

_ADAPTER: TypeAdapter[Stage] = TypeAdapter(Stage)


def stage_from_json(text: str | bytes) -> Stage:
    """The stage written by `stage.model_dump_json()`; ValidationError if it is none."""
    return _ADAPTER.validate_json(text)


class Line(Config):
    """A chain of stages that ends in an evaluated model, and where it lies on the axes."""

    name: str
    axes: dict[str, float | int | str]
    result: Evaluate


class Figure(Config):
    """The study's picture: stable score over one axis, one curve per value of `by`.

    `hollow` lists the x values whose learning rate was re-warmed (paper, Figure 4).
    """

    x: str
    x_label: str
    by: str | None = None
    hollow: tuple[float, ...] = ()


class Study(Config):
    """A set of lines, the question they answer and the figure that shows it.

    `baselines` are evaluations beside the lines: text-only models, by a name for the table.
    """

    name: str
    question: str
    lines: tuple[Line, ...]
    figure: Figure
    baselines: dict[str, Evaluate] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[Evaluate, ...]:
        """Every evaluation the study asks for."""
        return (*(line.result for line in self.lines), *self.baselines.values())
