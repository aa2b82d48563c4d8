"""What a job on a Slurm cluster is given; no part of any identity (docs/cluster.md)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from midstream.config.base import Config, Positive

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


class SlurmResources(Config):
    """What a job asks for; None leaves it to the cluster, or for a kind of stage to the others.

    `memory` is of a node, as `sbatch --mem` takes it (64G). `gpus`, `ranks` and `cpus` are of a
    node too: ranks are as many as GPUs where nothing is said, CPUs what the ranks' threads and
    data workers take. `nodes` and `ranks` count for stages that several ranks share. `extra` are
    further parameters of sbatch, without their dashes; true stands for a flag.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_minutes: Minutes | None = None
    nodes: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    ranks: Positive | None = None
    cpus: Positive | None = None
    memory: str | None = None
    extra: dict[str, str | int | bool] = Field(default_factory=dict)


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
    setup: tuple[str, ...] = ()
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
        names = SlurmResources.model_fields
        common = {name: getattr(self, name) for name in names}
        own = self.stages.get(kind, SlurmResources())
        given = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
        extra = {**self.extra, **own.extra}
        return SlurmResources.model_validate({**common, **given, "extra": extra})
