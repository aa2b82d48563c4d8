"""A plan's price on a fleet of GPUs: hours, memory, disk, and what sharing stages saves."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from midstream.config import Machine
from midstream.core.tokens import duration, quantity, rounded
from midstream.cost import LEAST_HOURS, UTILISATION, Gpu
from midstream.cost.cost import Flops, model_parameters, trained_parameters, work_of
from midstream.cost.graph import Plan, PlanRow
from midstream.cost.known import (
    Number,
    Schedule,
    Task,
    facts_of,
    ids_of,
    prepared_index,
    schedule,
)
from midstream.cost.pictures import FeaturePlan
from midstream.cost.taken import FLOAT, Memory, Setting, memory
from midstream.cost.workload import Workload
from midstream.study.label import label
from midstream.study.stages import (
    Continue,
    Evaluate,
    Finetune,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    PrepareSource,
    Pretrain,
    Trained,
    TrainEncoder,
)
from midstream.study.store import Ledger
from midstream.study.studies import Study

# Checkpoints of a running stage: those that are kept (`Machine.keep_checkpoints`), one in writing.
CHECKPOINTS = 3
# The name of a caption's or a conversation's record, about.
NAME_BYTES = 40
# What an evaluation keeps of each question: prompt, answer, scores.
ANSWER_BYTES = 512
# Positions of a question and its answers at the least, about: more of them keep no more bytes.
QUESTION_POSITIONS = 128


@dataclass(frozen=True)
class Fleet:
    """GPUs of one kind, how many a training stage takes (None: what memory asks for), how fast.

    `utilisation`: model FLOPs over the peak; `num_measured` done stages reached it, 0 where it is
    given.
    """

    gpu: Gpu
    number: int = 1
    per_stage: int | None = None
    utilisation: Number = UTILISATION
    checkpointing: bool = False
    num_measured: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ValueError(
                f"the utilisation is a share of the peak, above 0 and at most 1, not "
                f"{self.utilisation:g}"
            )

    def gpu_hours(self, flops: Number) -> Number:
        """Hours of one GPU at this utilisation, of model FLOPs."""
        return flops / (self.gpu.tflops * 1e12 * self.utilisation * 3600)


@dataclass(frozen=True)
class Fit:
    """How a training stage is laid out: GPUs, rows of a micro-batch, the memory of each GPU.

    `micro_rows` is the most that fits; 0 where not even one row does, `memory` then says by how
    much.
    """

    gpus: int
    micro_rows: int
    memory: Memory

    @property
    def fits(self) -> bool:
        """Whether a row at a time fits."""
        return self.micro_rows > 0


@dataclass(frozen=True)
class StagePrice:
    """One stage of a plan: GPU-hours and wall hours where it is to run, memory, bytes on disk.

    `kept` stays when the stage is done, `running` is there while it runs.
    """

    row: PlanRow
    gpus: int
    gpu_hours: Number | None
    wall_hours: Number | None
    fit: Fit | None
    kept: Number
    running: Number


@dataclass(frozen=True)
class Price:
    """A plan on a fleet; stages that are done cost nothing more, unknown ones are left out."""

    fleet: Fleet
    stages: tuple[StagePrice, ...]
    timing: Schedule
    feature_bytes: Number
    new_feature_bytes: Number

    @property
    def gpu_hours(self) -> Number:
        """Of all stages that are to run."""
        return sum((stage.gpu_hours or 0.0 for stage in self.stages), 0.0)

    @property
    def kept_bytes(self) -> Number:
        """What all stages leave on disk, stored features among it."""
        return sum((stage.kept for stage in self.stages), self.feature_bytes)

    @property
    def peak_bytes(self) -> Number:
        """The most on disk at once: what is there, and what stages take while they run."""
        done = sum((s.kept for s in self.stages if s.row.state == "done"), 0.0)
        return done + self.timing.peak_bytes + self.feature_bytes

    @property
    def needed_bytes(self) -> Number:
        """The most that the disk must take beside what is there."""
        return self.timing.peak_bytes + self.new_feature_bytes

    @property
    def parts(self) -> Flops:
        """FLOPs by part of the model, of all stages once."""
        total = Flops()
        for stage in self.stages:
            total += stage.row.cost.parts or Flops()
        return total

    @property
    def too_large(self) -> tuple[StagePrice, ...]:
        """Stages that do not fit."""
        return tuple(stage for stage in self.stages if stage.fit and not stage.fit.fits)


def price(plan: Plan, ledger: Ledger, fleet: Fleet, features: Sequence[FeaturePlan] = ()) -> Price:
    """The price of what is left of a plan.

    Raises ValueError where a stage wants more GPUs than there are.
    """
    stages = tuple(_price_of(row, ledger, fleet) for row in plan.rows)
    tasks = [
        Task(
            name=stage.row.stage.name,
            hours=stage.wall_hours or 0.0,
            gpus=stage.gpus,
            parents=tuple(parent.name for parent in stage.row.stage.parents),
            kept=stage.kept,
            running=stage.running,
        )
        for stage in stages
        if stage.row.state != "done"
    ]
    stored = [found for found in features if found.choice.decision == "stored"]
    return Price(
        fleet,
        stages,
        schedule(tasks, fleet.number),
        sum((found.store_bytes or 0.0 for found in stored), 0.0),
        sum((found.new_bytes or 0.0 for found in stored), 0.0),
    )


def _price_of(row: PlanRow, ledger: Ledger, fleet: Fleet) -> StagePrice:
    stage, flops, work = row.stage, row.cost.model_flops, row.cost.work
    fit, gpus = None, 0
    if isinstance(stage, Trained):
        if work is not None:
            fit = _fit(stage, work, fleet)
        gpus = fit.gpus if fit is not None else (fleet.per_stage or 1)
    elif isinstance(stage, Evaluate | TrainEncoder):
        gpus = 1
    hours = None if flops is None else fleet.gpu_hours(0.0 if row.state == "done" else flops)
    wall = None if hours is None else hours / max(gpus, 1)
    return StagePrice(row, gpus, hours, wall, fit, *_disk(row, work, ledger))


def _fit(stage: Trained, work: Workload, fleet: Fleet) -> Fit:
    """The fewest GPUs of which each has room for a row, or as many as are asked for."""
    batch = stage.training.rows.batch_rows
    numbers = [n for n in range(1, min(batch, fleet.number) + 1) if not batch % n]
    numbers, found = [fleet.per_stage] if fleet.per_stage else numbers, None
    for number in numbers:
        if batch % number:
            raise ValueError(
                f"{label(stage)}: batch_rows {batch} is no multiple of {number} GPUs; choose "
                "another --gpus-per-stage"
            )
        found = _largest(stage, work, fleet, number)
        if found.fits:
            break
    assert found is not None, "one GPU divides every step"
    return found


def _largest(stage: Trained, work: Workload, fleet: Fleet, ranks: int) -> Fit:
    """The largest micro-batch that fits."""

    def taken(rows: int) -> Memory:
        return memory(stage, work, Setting(ranks, rows, fleet.checkpointing))

    numbers = range(1, stage.training.rows.batch_rows // ranks + 1)
    # How many numbers of rows have room.
    rows = bisect_left(numbers, True, key=lambda rows: taken(rows).total > fleet.gpu.room)
    return Fit(ranks, rows, taken(max(rows, 1)))


def rows_that_fit(
    stage: Trained, ledger: Ledger, machine: Machine, device_bytes: Number
) -> Fit | None:
    """The largest micro-batch of a stage on this machine's ranks, by a GPU's memory as a plan
    reads it; None where nothing is known of the stage's data."""
    work = work_of(stage, ledger)
    if work is None:
        return None
    ranks = min(machine.world_size, stage.training.rows.batch_rows)
    recomputed = machine.activation_checkpointing == "blocks"
    gpu = Gpu("this GPU", 0, device_bytes / 2**30)
    return _largest(stage, work, Fleet(gpu, ranks, ranks, checkpointing=recomputed), ranks)


def _disk(row: PlanRow, work: Workload | None, ledger: Ledger) -> tuple[Number, Number]:
    """Bytes that a stage leaves, and that it takes beside while it runs."""
    stage = row.stage
    match stage:
        case Pretrain() | Continue() | Finetune():
            weights = FLOAT * float(model_parameters(stage.model))
            state = weights + 2 * FLOAT * float(trained_parameters(stage))
            written = CHECKPOINTS
            if work is not None:
                written = min(written, work.steps // stage.training.checkpoint_every_steps)
            kept = len(stage.milestones) * state if isinstance(stage, Pretrain) else weights
            return kept, written * state
        case PrepareSource():
            facts = facts_of(stage, ledger)
            if facts is None or prepared_index(stage) is not None:
                # Nothing is known of it, or it lies in the user's own folder.
                return 0.0, 0.0
            # The columns of `data/source_writer.py`.
            ids = ids_of(stage.tokenizer.tokenizer)
            token, example = 2 if ids is None or ids <= 2**16 else 4, 24
            if facts.kind != "text":
                # Which tokens are targets; pictures and where they lie; the record's name.
                token, example = token + 1, example + 32 + NAME_BYTES
            return facts.tokens * token + facts.examples * example, 0.0
        case LoadDecoder() | LoadModel() | LoadEncoder() | TrainEncoder():
            return FLOAT * float(row.cost.parameters), 0.0
        case Evaluate():
            tokens = row.cost.tokens or 0
            return ANSWER_BYTES * tokens / QUESTION_POSITIONS, 0.0
        case _:
            return 0.0, 0.0


def price_json(found: Price, plan: Plan) -> dict[str, Any]:
    """The price as plain values, beside those of the plan."""
    fleet, timing, (once, alone) = found.fleet, found.timing, plan.model_flops
    by_stage = {}
    for stage in found.stages:
        parts, fit, name = stage.row.cost.parts, stage.fit, stage.row.stage.name
        by_stage[name] = {
            "basis": stage.row.cost.basis,
            "flops_by_part": None if parts is None else asdict(parts),
            "model_flops": stage.row.cost.model_flops,
            "gpus": stage.gpus,
            "gpu_hours": stage.gpu_hours,
            "wall_hours": stage.wall_hours,
            "starts_after_hours": timing.starts.get(name),
            "memory": None if fit is None else asdict(fit.memory),
            "micro_rows": None if fit is None else fit.micro_rows,
            "fits": None if fit is None else fit.fits,
            "disk_kept_bytes": stage.kept,
            "disk_running_bytes": stage.running,
        }
    return {
        "gpu": asdict(fleet.gpu),
        "gpus": fleet.number,
        "utilisation": fleet.utilisation,
        "utilisation_of_stages": fleet.num_measured,
        "gpu_hours": found.gpu_hours,
        "gpu_hours_once": fleet.gpu_hours(once),
        "gpu_hours_alone": fleet.gpu_hours(alone),
        "wall_hours": timing.hours,
        "lower_bound_hours": timing.lower_bound,
        "critical_path": list(timing.critical_path),
        "critical_path_hours": timing.critical_hours,
        "flops_by_part": asdict(found.parts),
        "disk_kept_bytes": found.kept_bytes,
        "disk_peak_bytes": found.peak_bytes,
        "disk_needed_bytes": found.needed_bytes,
        "feature_bytes": found.feature_bytes,
        "too_large": [stage.row.stage.name for stage in found.too_large],
        "by_stage": by_stage,
    }


@dataclass(frozen=True)
class SizesPrice:
    """Model FLOPs, and hours here (None where not all is measured), of what a ladder has to run.

    `fitted`: those that only sizes of the fit use; `predicted`: those of the left-out size alone;
    `shared`: those of both.
    """

    predict: float
    flops: dict[str, float]
    hours: dict[str, float | None]

    def sentence(self, gpu_hours: Callable[[float], float]) -> str:
        """The two sums, what is shared, and their times."""
        words = {
            "fitted": "for the sizes that laws are fitted to",
            "predicted": f"for size {self.predict:g}, which they predict",
            "shared": "for what both use",
        }
        parts = []
        for key, what in words.items():
            here = self.hours[key]
            time = f", {duration(3600 * here)} of one process here" if here else ""
            flops = self.flops[key]
            number = f"{quantity(flops)}{'' if flops >= 1e3 else ' '}FLOPs"
            parts.append(
                f"{number} ({rounded(gpu_hours(flops), LEAST_HOURS)} GPU-hours{time}) {what}"
            )
        return f"ladder: {'; '.join(parts)}"


def sizes_price(study: Study, plan: Plan, hours: Mapping[str, float]) -> SizesPrice | None:
    """What the ladder costs, and the size that it predicts apart; None for a study without one."""
    if study.ladder is None:
        return None
    axis, predict = study.ladder.axis, study.ladder.predict
    left_out = {line.name for line in study.lines if line.axes[axis] == predict}
    own = {line.name for line in study.lines} - left_out
    flops = dict.fromkeys(("fitted", "predicted", "shared"), 0.0)
    time: dict[str, float | None] = dict(flops)
    for row in plan.to_run:
        users = {name.removeprefix(f"{study.name}: ") for name in row.lines}
        of = (bool(users & own), bool(users & left_out))
        if any(of):
            key = {(True, True): "shared", (True, False): "fitted"}.get(of, "predicted")
            flops[key] += row.cost.model_flops or 0.0
            before, here = time[key], hours.get(row.stage.name)
            time[key] = None if before is None or here is None else before + here
    return SizesPrice(predict, flops, time)
