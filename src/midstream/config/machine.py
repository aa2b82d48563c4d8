"""Options of the machine, and of jobs on a cluster; they are in no identity."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from midstream.config.base import Config, Positive, listed

# A host and its port.
_PLACE = re.compile(r"\S+:\d{1,5}")

Tracker = Literal["tensorboard", "wandb", "trackio"]


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
    # auto: float32 on a CPU; on a GPU the faster of the two, as measured at the start. float8: the
    # products of the decoder's blocks, the others in bfloat16.
    precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    # blocks: each block of the decoder is compiled; auto: on a GPU, unless `off` was measured to be
    # faster there (`work/choices.py`).
    compile: Literal["auto", "off", "blocks"] = "auto"
    # blocks: only what enters a block is kept for the backward pass, the rest is computed again.
    activation_checkpointing: Literal["off", "blocks"] = "off"
    # Newest checkpoints of a running stage that are kept.
    keep_checkpoints: Positive = 2
    # background: training goes on while a checkpoint is written.
    saving: Literal["background", "foreground"] = "background"
    micro_batch_rows: Positive | None = None
    # Processes that build rows and decode pictures ahead of each training process; None: as many
    # as keep it busy (`train.parallel.data_workers`).
    data_workers: Annotated[int, Field(ge=0)] | None = None
    # Whether a frozen encoder's outputs are kept on disk; auto: where that pays (`midstream plan`).
    features: Literal["auto", "stored", "live"] = "auto"
    max_feature_gib: Annotated[float, Field(ge=0)] = 64.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Where metrics go beside metrics.jsonl, and under which project.
    tracking: Annotated[tuple[Tracker, ...], BeforeValidator(listed)] = ()
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
        if self.master is not None and not _PLACE.fullmatch(self.master):
            raise ValueError(f"master is {self.master!r}; node 0 is reached at HOST:PORT")
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
        alone = {"workers": 1, "ranks": 1, "nodes": 1, "node": 0}
        return self.model_copy(update={**alone, "master": None, "shard_ranks": None})


StageKind = Literal[
    "prepare_world",
    "prepare_tokenizer",
    "prepare_source",
    "train_encoder",
    "load_encoder",
    "fuse_encoders",
    "load_decoder",
    "load_model",
    "pretrain",
    "continue",
    "finetune",
    "evaluate",
]
# Below it the warning before the end of a job's time comes as the job starts.
LEAST_MINUTES = 10
Minutes = Annotated[int, Field(ge=LEAST_MINUTES)]
# Accounts that are numbers are names.
Name = Annotated[str, Field(coerce_numbers_to_str=True)]
# What jobs are found by, and what waits for what, is not for `extra`; options stand for the others.
OURS = ("job-name", "array", "dependency", "output", "error", "open-mode", "signal", "requeue")
OF_OPTIONS = {"time": "time_minutes", "mem": "memory", "cpus-per-task": "cpus"} | {
    name: name for name in ("partition", "account", "qos", "constraint", "nodes")
}


def _lines(value: Any) -> Any:
    """A text as its lines; anything else as it is."""
    return value.splitlines() if isinstance(value, str) else value


def _plain_names(extra: Any) -> Any:
    """Parameters of sbatch without their dashes."""
    if not isinstance(extra, dict):
        return extra
    return {str(name).lstrip("-").replace("_", "-"): value for name, value in extra.items()}


class SlurmResources(Config):
    """What a job asks for; None leaves it to the cluster, or for a kind of stage to the others.

    `memory` is of a node, as `sbatch --mem` takes it (64G). `gpus`, `ranks` and `cpus` are of a
    node too: ranks are as many as GPUs where nothing is said, CPUs what the ranks' threads and
    data workers take. `nodes` and `ranks` count for stages that several ranks share, `tasks` for
    sources: an array of so many shares their files. `extra` are further parameters of sbatch,
    without their dashes; true stands for a flag.
    """

    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Name | None = None
    time_minutes: Minutes | None = None
    nodes: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    ranks: Positive | None = None
    cpus: Positive | None = None
    tasks: Positive | None = None
    memory: str | None = None
    extra: Annotated[dict[str, str | int | bool], BeforeValidator(_plain_names)] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _not_ours(self) -> "SlurmResources":
        for name in self.extra:
            if name in OURS:
                raise ValueError(f"extra gives {name}, which jobs need as it is; leave it out")
            if name in OF_OPTIONS:
                raise ValueError(f"extra gives {name}; give {OF_OPTIONS[name]} in its place")
        return self


class SlurmSettings(SlurmResources):
    """How a study is run by Slurm: what jobs get, by kind of stage, and how they are followed.

    A job is told to keep a checkpoint `warn_seconds` before its time ends, and goes on in the next
    piece of time. `restarts`: how often a stage whose processes were killed is begun again by
    itself; 0 leaves it failed. `max_jobs`: so many jobs are in the queue at once, `array_limit`: so
    many of an array run at once. `setup` are lines of shell before the job's command.
    """

    time_minutes: Minutes = 240
    nodes: Positive = 1
    warn_seconds: Positive = 90
    restarts: Annotated[int, Field(ge=0)] = 0
    max_jobs: Positive = 500
    array_limit: Positive | None = None
    poll_seconds: Annotated[float, Field(gt=0)] = 10.0
    setup: Annotated[tuple[str, ...], BeforeValidator(_lines)] = ()
    # Where the first rank of a stage on several nodes is reached by the others.
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    stages: dict[StageKind, SlurmResources] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _time_to_stop(self) -> "SlurmSettings":
        minutes = [self.time_minutes, *(one.time_minutes for one in self.stages.values())]
        for given in minutes:
            if given is not None and self.warn_seconds * 2 > given * 60:
                raise ValueError(
                    f"warn_seconds {self.warn_seconds} is more than half of time_minutes {given}; "
                    "ask for more time, or be warned later"
                )
        return self

    def resources(self, kind: StageKind) -> SlurmResources:
        """What a job of this kind of stage asks for: its own values, else those of all."""
        own = self.stages.get(kind, SlurmResources())
        common = self.model_dump(include=set(SlurmResources.model_fields))
        extra = {**self.extra, **own.extra}
        return SlurmResources(**{**common, **own.model_dump(exclude_none=True), "extra": extra})
