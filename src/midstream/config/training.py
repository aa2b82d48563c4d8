"""Options of training and evaluation; the learning rate as a function of tokens.

Shapes as OpenLM's (open_lm/scheduler.py), tokens for steps.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from midstream.config.base import Config, Fraction, Positive, Rate
from midstream.config.budget import Budget, Caption, Rows
from midstream.core.identity import Placement


class AdamW(Config):
    """`decay` says which weights decay: all of them (OpenLM), or matrices only (Prismatic)."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.033
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


class LoRA(Config):
    """Adapters of low rank beside every linear layer of the decoder's blocks (Hu et al., 2021).

    A layer computes W x + alpha / rank * B A x; A starts drawn and B at zero, and they are added to
    W when the stage ends. The decoder's own weights stay as they are.
    """

    rank: Positive
    alpha: Annotated[float, Field(gt=0)]


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
    # Of the language model adapters learn, and all else as ever.
    lora: LoRA | None = None
    seed: int = 0
    checkpoint_every_steps: Annotated[Positive, Placement] = 500

    @property
    def keeps_decoder(self) -> bool:
        """Whether the language model's own weights have no gradients."""
        return self.freeze_decoder or self.lora is not None

    @model_validator(mode="after")
    def _one_of(self) -> "Training":
        if self.freeze_decoder and self.lora is not None:
            raise ValueError("freeze_decoder and lora are given; leave one out")
        return self


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


# Shots without their pictures where none with them are asked for.
TEXT_ONLY = 2


class FewShot(Config):
    """Training questions with their answers before each question, as earlier turns.

    num_shots: how many; 0 is two of them without their pictures (OpenFlamingo's zero shots). draw:
    for each question anew (OpenFlamingo), or once, so that all questions share what is read.
    layout: turns, as fine-tuning has them, or one document of pictures, questions and answers in
    lines, as models know them that were not fine-tuned.
    """

    num_shots: Annotated[int, Field(ge=0)]
    draw: Literal["each", "once"] = "each"
    layout: Literal["turns", "document"] = "turns"
    seed: int = 0

    @property
    def num_before(self) -> int:
        """How many stand before a question, with their pictures or without."""
        return self.num_shots or TEXT_ONLY


def pool_of(task: str) -> str:
    """The name of the task that holds a benchmark's training questions, where shots come from."""
    return f"{task}_train"


def is_pool(task: str) -> bool:
    """Whether a task of this name is one of `pool_of`."""
    return task.endswith(pool_of(""))


class Evaluation(Config):
    """Which benchmarks, how many examples of each, and how they are asked.

    `visual_tasks` name folders under the world's `bench/`, `text_tasks` files under its
    `text_tasks/` or tasks of the harness; a world's own stand in its `world.json`. `limit` takes
    the first examples of a seeded order, `slim` the first 1,024 of each split of a visual task.
    `prompts` chooses the benchmarks' published wording (official) or the bare question (short);
    `wordings` replaces either for a task, by a text with {question} in it.

    `fixed_answers`: tasks with given answers (yes or no, letters) are scored by the probability of
    each answer as the reply, as the paper's evaluator does, by the reply's text, or by the first
    with the second beside it. `letters`: lettered options are chosen by their letter, or by the
    likelihood of the option's own text. `box_frame`: boxes are shares of the picture, or of the
    square that it is padded to. `few_shot`: visual questions stand behind others that were
    answered; None is behind none.
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
    few_shot: FewShot | None = None
    max_new_tokens: Positive = 32
    batch_size: Annotated[Positive, Placement] = 64

    @property
    def pools(self) -> tuple[str, ...]:
        """The tasks that shots are drawn from."""
        return () if self.few_shot is None else tuple(map(pool_of, self.visual_tasks))

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


# The share of a stage's tokens over which `moments_factor` rises.
_MOMENTS_FRACTION = 0.01


def rate_at(
    schedule: AnySchedule,
    tokens_seen: int,
    total_tokens: int,
    *,
    parent_rate: float | None = None,
    step_tokens: int = 0,
) -> float:
    """The learning rate of the step behind `tokens_seen` of the stage's `total_tokens`.

    `parent_rate` is the parent schedule's rate at the checkpoint, needed by `ContinuedCosine`.
    `step_tokens` is what a whole step holds: a warm-up counts the step that is about to be taken,
    so that the first does not pass at a rate of 0 (OpenLM's `(step + 1) / warmup`).
    """
    if isinstance(schedule, ContinuedCosine):
        assert parent_rate is not None
        return _half_cosine(parent_rate, schedule.end_rate, tokens_seen / total_tokens)
    warmup = schedule.warmup_fraction * total_tokens
    if tokens_seen + step_tokens < warmup:
        return schedule.peak_rate * (tokens_seen + step_tokens) / warmup
    if isinstance(schedule, Constant):
        return schedule.peak_rate
    if isinstance(schedule, WarmupStableDecay):
        decay = schedule.decay_fraction * total_tokens
        left = max(total_tokens - tokens_seen, 0) / decay if decay else 1.0
        return schedule.end_rate + (schedule.peak_rate - schedule.end_rate) * min(left, 1.0)
    rest = max(total_tokens - warmup, 1.0)
    return _half_cosine(
        schedule.peak_rate, schedule.end_rate, max(tokens_seen - warmup, 0.0) / rest
    )


def moments_factor(tokens_seen: int, total_tokens: int, *, step_tokens: int) -> float:
    """What a rate is multiplied by while moments that start at zero fill: a line from 0 to 1.

    It ends after a hundredth of the stage (our choice; the paper carries moments or drops them).
    """
    warm = _MOMENTS_FRACTION * total_tokens
    return min(1.0, (tokens_seen + step_tokens) / warm) if warm else 1.0


def stage_rate(
    training: Training, seen: int, total: int, parent_rate: float | None, *, warm: bool
) -> float:
    """`rate_at` of a stage's next whole step; `warm`: its moments start at zero and fill."""
    step_tokens = training.rows.batch_rows * training.rows.row_length
    at = (seen, total)
    rate = rate_at(training.schedule, *at, parent_rate=parent_rate, step_tokens=step_tokens)
    return rate * moments_factor(*at, step_tokens=step_tokens) if warm else rate


def check_start(schedule: AnySchedule, parent_rate: float | None, where: str) -> None:
    """Raises ValueError for a rate of 0, or where a continued schedule starts at its own end."""
    if not isinstance(schedule, ContinuedCosine):
        if schedule.peak_rate == 0:
            raise ValueError(
                f"{where}: the learning rate is 0 from its first step, so it would learn nothing; "
                "give the schedule a peak_rate above 0"
            )
        return
    if parent_rate is None:
        raise ValueError(
            f"{where}: a continued schedule needs a rate to start at, and its parent has none; "
            "re-warm with WarmupCosine, or import the checkpoint again with --rate"
        )
    if parent_rate <= schedule.end_rate:
        raise ValueError(
            f"{where}: the parent's rate at its checkpoint is {parent_rate:g}, not above the end "
            f"rate {schedule.end_rate:g}; re-warm with WarmupCosine instead"
        )


def _half_cosine(start: float, end: float, done: float) -> float:
    # Weighted so that both ends are exact: a continuation starts at its parent's very rate.
    weight = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return weight * start + (1 - weight) * end
