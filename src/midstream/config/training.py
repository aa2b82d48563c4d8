"""Options of training, of evaluation, and of the machine that does either."""

from typing import Annotated, Literal

from pydantic import Field

from midstream.config.base import Config, Fraction, Positive, Rate
from midstream.config.data import Budget, Rows
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


Schedule = Annotated[WarmupCosine | ContinuedCosine, Field(discriminator="kind")]


class Training(Config):
    """What every training stage needs beside its data and its start."""

    budget: Budget
    rows: Rows
    optimizer: AdamW = AdamW()
    schedule: Schedule
    # The encoder's learning rate over that of the rest; None keeps it frozen (paper, appendix H).
    encoder_rate_factor: Annotated[float, Field(gt=0)] | None = None
    seed: int = 0
    checkpoint_every_steps: Annotated[Positive, Placement] = 500


class ContrastiveTraining(Config):
    """Training of a SigLIP encoder by the sigmoid image-text loss on a caption source."""

    source: str
    text_hidden_size: Positive
    text_num_layers: Positive
    max_text_tokens: Positive = 48
    batch_images: Positive = 128
    num_steps: Positive
    schedule: WarmupCosine
    weight_decay: float = 0.01
    seed: int = 0


class Evaluation(Config):
    """Which benchmarks, how many examples of each, and how they are asked.

    `visual_tasks` name folders under the world's `bench/`, `text_tasks` files under its
    `text_tasks/`; both stand in its `world.json`. `limit` takes the first examples of a seeded
    order. `prompts` chooses the benchmarks' published wording (official) or the bare question
    (short).
    """

    visual_tasks: tuple[str, ...] = ()
    text_tasks: tuple[str, ...] = ()
    limit: Positive | None = None
    prompts: Literal["official", "short"] = "official"
    blind: bool = True
    max_new_tokens: Positive = 32
    batch_size: Annotated[Positive, Placement] = 64


class Machine(Config):
    """Where work runs; no part of any identity."""

    workers: Positive = 2
    threads: Positive = 1
    micro_batch_rows: Positive | None = None
    # Processes that build rows and decode pictures ahead of each training process.
    data_workers: Annotated[int, Field(ge=0)] = 0
    # Whether a frozen encoder's outputs are kept on disk; auto: where that pays (`midstream plan`).
    features: Literal["auto", "stored", "live"] = "auto"
    max_feature_gib: Annotated[float, Field(ge=0)] = 64.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
