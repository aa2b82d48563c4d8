"""Options of training, of evaluation, and of the machine that does either."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from midstream.config.base import Config, Fraction, Positive, Rate
from midstream.config.data import Budget, Caption, Rows
from midstream.identity import Placement


class AdamW(Config):
    """`decay` says which weights decay: all of them (OpenLM), or matrices only (Prismatic)."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.033
    decay: Literal["all", "matrices"] = "all"
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    z_loss: Annotated[float, Field(ge=0)] = 1e-4


class WarmupCosine(Config):
    """Linear warm-up to `peak_rate` over a share of the stage's tokens, then half a cosine."""

    kind: Literal["warmup_cosine"] = "warmup_cosine"
    peak_rate: Rate
    end_rate: Rate = 0.0
    warmup_fraction: Fraction = 0.0


class ContinuedCosine(Config):
    """Half a cosine from the parent schedule's own rate at the checkpoint down to `end_rate`."""

    kind: Literal["continued_cosine"] = "continued_cosine"
    end_rate: Rate = 3e-5


class Constant(Config):
    """Linear warm-up to `peak_rate`, then that rate."""

    kind: Literal["constant"] = "constant"
    peak_rate: Rate
    warmup_fraction: Fraction = 0.0


class WarmupStableDecay(Config):
    """Linear warm-up, `peak_rate`, and over the last `decay_fraction` a line down to `end_rate`."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    peak_rate: Rate
    end_rate: Rate = 0.0
    warmup_fraction: Fraction = 0.0
    decay_fraction: Fraction = 0.2

    @model_validator(mode="after")
    def _fits(self) -> "WarmupStableDecay":
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} "
                "are more than the whole stage"
            )
        return self


AnySchedule = WarmupCosine | ContinuedCosine | Constant | WarmupStableDecay
Schedule = Annotated[AnySchedule, Field(discriminator="kind")]


class Training(Config):
    """What every training stage needs beside its data and its start."""

    budget: Budget
    rows: Rows
    optimizer: AdamW = AdamW()
    schedule: Schedule
    # The encoder's learning rate over that of the rest; None keeps it frozen (paper, appendix H).
    encoder_rate_factor: Annotated[float, Field(gt=0)] | None = None
    # The language model stays as it is; the projector, and the encoder where it has a rate, learn.
    freeze_decoder: bool = False
    seed: int = 0
    checkpoint_every_steps: Annotated[Positive, Placement] = 500


class ContrastiveTraining(Config):
    """Training of a vision tower by the sigmoid image-text loss on a caption source."""

    source: str
    text_hidden_size: Positive
    text_num_layers: Positive
    max_text_tokens: Positive = 48
    batch_images: Positive = 128
    num_steps: Positive
    schedule: WarmupCosine
    weight_decay: float = 0.01
    seed: int = 0
    caption: Caption = "original"


class Evaluation(Config):
    """Which benchmarks, how many examples of each, and how they are asked.

    `visual_tasks` name folders under the world's `bench/`, `text_tasks` files under its
    `text_tasks/`; both stand in its `world.json`. `limit` takes the first examples of a seeded
    order, `slim` the first 1,024 of each split of a visual task. `prompts` chooses the benchmarks'
    published wording (official) or the bare question (short); `wordings` replaces
    either for a task, by a text with {question} in it.

    `fixed_answers`: tasks with given answers (yes or no, letters) are scored by the probability of
    each answer as the reply, as the paper's evaluator does, by the reply's text, or by the first
    with the second beside it. `letters`: lettered options are chosen by their letter, or by the
    likelihood of the option's own text. `box_frame`: boxes are shares of the picture, or of the
    square that it is padded to.
    """

    visual_tasks: tuple[str, ...] = ()
    text_tasks: tuple[str, ...] = ()
    limit: Positive | None = None
    slim: bool = False
    prompts: Literal["official", "short"] = "official"
    wordings: dict[str, str] = Field(default_factory=dict)
    fixed_answers: Literal["probability", "text", "both"] = "probability"
    letters: Literal["letter", "likelihood"] = "letter"
    box_frame: Literal["picture", "square"] = "picture"
    blind: bool = True
    max_new_tokens: Positive = 32
    batch_size: Annotated[Positive, Placement] = 64

    @model_validator(mode="after")
    def _asks(self) -> "Evaluation":
        for task, wording in self.wordings.items():
            if task not in self.visual_tasks:
                raise ValueError(
                    f"wordings names {task!r}, which is none of the visual tasks; there: "
                    f"{', '.join(self.visual_tasks) or 'none'}"
                )
            if "{question}" not in wording:
                raise ValueError(
                    f"the wording of {task!r} is {wording!r}; the question goes where {{question}} "
                    "stands"
                )
        return self


class Machine(Config):
    """Where and how work runs; no part of any identity.

    workers: stages side by side; ranks: processes of one training stage on this machine, and
    `nodes` such machines, of which this is number `node`; `master` (HOST:PORT) is node 0's.
    """

    workers: Positive = 2
    threads: Positive = 1
    ranks: Positive = 1
    nodes: Positive = 1
    node: Annotated[int, Field(ge=0)] = 0
    master: str | None = None
    # Ranks that hold one copy of the model between them; None: all. Copies are kept alike.
    shard_ranks: Positive | None = None
    # A rank that is this long behind the others, or silent, is named and ends the stage.
    rank_timeout_seconds: Annotated[float, Field(gt=0)] = 45.0
    # auto: float32 on a CPU; on a GPU the faster of the two, as measured at the start.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # blocks: each block of the decoder is compiled; auto: on a GPU.
    compile: Literal["auto", "off", "blocks"] = "auto"
    # blocks: only what enters a block is kept for the backward pass, the rest is computed again.
    activation_checkpointing: Literal["off", "blocks"] = "off"
    # Newest checkpoints of a running stage that are kept.
    keep_checkpoints: Positive = 2
    # background: training goes on while a checkpoint is written.
    saving: Literal["background", "foreground"] = "background"
    micro_batch_rows: Positive | None = None
    # Processes that build rows and decode pictures ahead of each training process.
    data_workers: Annotated[int, Field(ge=0)] = 0
    # Whether a frozen encoder's outputs are kept on disk; auto: where that pays (`midstream plan`).
    features: Literal["auto", "stored", "live"] = "auto"
    max_feature_gib: Annotated[float, Field(ge=0)] = 64.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Where metrics go beside metrics.jsonl, and under which project.
    tracking: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    tracking_project: Annotated[str, Field(min_length=1)] = "midstream"

    @model_validator(mode="after")
    def _consistent(self) -> "Machine":
        if len(set(self.tracking)) < len(self.tracking):
            raise ValueError(f"tracking names one twice: {', '.join(self.tracking)}")
        if self.node >= self.nodes:
            raise ValueError(f"node {self.node} is none of {self.nodes} nodes (they start at 0)")
        if self.nodes > 1 and self.master is None:
            raise ValueError(f"{self.nodes} nodes need to know node 0: give master=HOST:PORT")
        if self.nodes > 1 and self.workers > 1:
            raise ValueError(f"over {self.nodes} nodes stages run one by one: give workers=1")
        if self.shard_ranks is not None and self.world_size % self.shard_ranks:
            raise ValueError(
                f"shard_ranks {self.shard_ranks} does not divide the {self.world_size} ranks"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes of one training stage, over all nodes."""
        return self.ranks * self.nodes

    def alone(self) -> "Machine":
        """This machine for what one process does: everything but training."""
        return self.model_copy(
            update={"ranks": 1, "nodes": 1, "node": 0, "master": None, "shard_ranks": None}
        )
