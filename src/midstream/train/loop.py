"""One training stage: start or resume, step, measure, checkpoint, stop when asked.

Stages differ in plan, start and schedule, which are values. Every rank runs the same loop over its
own rows; counts, decisions and results are those of all ranks.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from midstream.config import AnyEncoderConfig, Machine, Training
from midstream.config.flops import model_flops
from midstream.config.training import check_start, stage_rate
from midstream.core.batch import Batch
from midstream.core.storage import CorruptError
from midstream.core.tokens import TokenCount
from midstream.data.lengths import picture_views
from midstream.data.rows import RowDataset, load_steps, shares_report
from midstream.model.adapters import merge_adapters, renamed
from midstream.model.vision import load_encoder, resized
from midstream.model.vlm import VLM
from midstream.model.weights import fill, read_tensors
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress, Saver
from midstream.train.guards import StartChecks, Watch
from midstream.train.held_out import HeldOut, evaluate
from midstream.train.metrics import MetricsLog, Record, Report, Tracking, meters_of
from midstream.train.parallel import ALONE, Clock, Place, data_workers, device_name, peak_memory
from midstream.train.step import (
    StepTotals,
    Taken,
    freeze,
    is_trained,
    make_optimizer,
    totals_of,
    train_step,
)


class Interrupted(Exception):  # noqa: N818 - it ends a stage without being an error
    """The stage was asked to stop; its checkpoint is written."""


@dataclass(frozen=True)
class Start:
    """How a stage begins: a checkpoint whose weights (and moments) it takes, or the initialiser.

    `parts` are what the checkpoint holds of the model; what it lacks starts from its initialiser,
    an encoder of the model's own from `encoder` where that is given. `moments`: whether Adam's come
    along, start at zero, or start at zero while the rate rises. `parent_rate` is the parent
    schedule's rate there. `held` is the encoder as the weights that it starts from have it: where
    the model's own has positions of another size, they are interpolated once.
    """

    folder: Path | None = None
    parts: tuple[str, ...] = ()
    encoder: Path | None = None
    moments: Literal["carry", "fresh", "warm"] = "fresh"
    parent_rate: float | None = None
    held: AnyEncoderConfig | None = None


@dataclass(frozen=True)
class Job:
    """What to train, on which rows, from where, into which folder.

    `encode` is None where the model looks at pixels itself; `looks`: an encoder sees the pictures
    while the stage runs (False where its features are stored). `milestones` are shares of the
    stage's tokens at which the weights are kept by name. `origin` says what its checkpoints are of
    (stage, data, rows): one that says otherwise is refused. `held_out` is evaluated at milestones
    and at the end.
    """

    model: VLM
    training: Training
    dataset: RowDataset
    encode: Callable[[Tensor], Tensor] | None
    start: Start
    folder: Path
    milestones: tuple[float, ...] = ()
    looks: bool = True
    origin: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)

    def rate_at(self, tokens_seen: int) -> float:
        """The learning rate of the step that follows `tokens_seen` tokens of this stage."""
        total, warm = self.dataset.plan.seen_tokens, self.start.moments == "warm"
        return stage_rate(self.training, tokens_seen, total, self.start.parent_rate, warm=warm)


def train(
    job: Job,
    machine: Machine,
    place: Place,
    *,
    report: Report,
    should_stop: Callable[[], bool],
    watch: Watch | None = None,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Run the stage to its end; returns its `results.json`, on every rank.

    Resumes by itself from the newest checkpoint, bit for bit on a CPU. Raises Interrupted when
    `should_stop` turns true on any rank (after a checkpoint at the step boundary), NonFiniteError
    with the rows of a step from which on the optimiser did not move, OSError where a checkpoint
    cannot be written, ValueError for a schedule that cannot start, ranks that differ, or a trained
    parameter that no gradient reaches.
    """
    training, plan = job.training, job.dataset.plan
    check_start(training.schedule, job.start.parent_rate, str(job.folder))
    if place.mesh is None:
        job.model.to(place.device)
    factor = freeze(job.model, training)
    optimizer = make_optimizer(job.model, training.optimizer, encoder_rate_factor=factor)
    checks = StartChecks(job.model, place, job.origin)
    progress, saved = _begin(job, optimizer, place)
    checks.begin(job.folder, optimizer, progress, job.rate_at(progress.tokens_seen), machine, saved)
    metrics = job.folder / "metrics.jsonl" if place.rank == 0 else None
    log = MetricsLog(metrics, progress.metrics_bytes, tracking)
    saver = Saver(place, background=machine.saving == "background")
    keeper = _Keeper(job, optimizer, saver, machine.keep_checkpoints, progress)
    steps = _load(job, machine, place, progress)
    watch, clock = watch or Watch(ALONE), Clock(place.device, progress.parts)
    record = Record(log, clock, report, progress, rows=(training.rows.batch_rows, len(plan)))
    held_out: dict[str, Any] | None = None
    job.model.train()
    watch.at("waiting for the first rows", "data")
    while True:
        micro_batches = record.next_rows(steps)
        step = f"step {progress.step + 1} of {plan.num_steps}"
        if micro_batches:
            watch.at(f"computing {step}", "step")
        # Asked once after each step, together with what every rank must know of the next one.
        asked = record.has_begun and should_stop()
        totals = totals_of(micro_batches or (), place, plan.names, stop=asked)
        if totals.stop or not micro_batches:
            break
        with record.guard():
            taken = _step(job, optimizer, micro_batches, totals, progress, place, clock)
        # The step before is read while a GPU computes this one.
        record.write()
        used_rate, progress = progress.rate, _advance(progress, job, totals)
        record.hold(progress, taken, used_rate)
        measures = progress.step == plan.num_steps or keeper.is_due(progress)
        waits = measures or keeper.saves(progress) or checks.are_due(sum(totals.num_images))
        if waits:
            checks.after_step(record.read())
        watch.at(f"keeping what {step} gave", "keep")
        if measures:
            with record.pause():
                held_out = _held_out(job, machine, place, watch)
        if waits:
            progress = record.write(held_out if measures else None)
        with clock.part("checkpoint"):
            keeper.keep(progress, log)
        watch.at(f"waiting for rows after {step}", "data")
    if totals.stop:
        watch.at(f"keeping what step {progress.step} gave", "keep")
        _stop(keeper, record, log, plan.num_steps)
    if held_out is None:  # the stage resumes behind its last step
        held_out = _held_out(job, machine, place, watch)
    watch.rest("keeping the stage's weights")
    saver.settle()
    log.close()
    checks.end()
    if training.lora is not None:
        merge_adapters(job.model.decoder)
    return _results(job, progress, place) | {"held_out": held_out}


def _stop(keeper: "_Keeper", record: Record, log: MetricsLog, num_steps: int) -> NoReturn:
    """Keep what the last step gave, and say so by Interrupted."""
    progress = record.write()
    keeper.keep(progress, log, stop=True)
    log.close()
    raise Interrupted(f"stopped after step {progress.step} of {num_steps}")


def _load(job: Job, machine: Machine, place: Place, progress: Progress) -> Iterator[list[Batch]]:
    rows = job.training.rows
    return load_steps(
        job.dataset,
        first_row=progress.step * rows.batch_rows,
        micro_rows=machine.micro_batch_rows or rows.batch_rows,
        workers=data_workers(machine, place.device),
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        looks=job.looks,
    )


def _held_out(job: Job, machine: Machine, place: Place, watch: Watch) -> dict[str, Any]:
    at = partial(watch.at, kind="step")
    return evaluate(job.model, job.held_out, encode=job.encode, machine=machine, place=place, at=at)


def _step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    totals: StepTotals,
    progress: Progress,
    place: Place,
    clock: Clock,
) -> Taken:
    assert progress.rate is not None, "only an imported checkpoint's may be unknown"
    return train_step(
        job.model,
        optimizer,
        micro_batches,
        encode=job.encode,
        rate=progress.rate,
        settings=job.training.optimizer,
        place=place,
        clock=clock,
        totals=totals,
    )


class _Keeper:
    """Decides when the state is kept, and where."""

    def __init__(
        self,
        job: Job,
        optimizer: torch.optim.Optimizer,
        saver: Saver,
        number: int,
        progress: Progress,
    ) -> None:
        self.job, self.optimizer, self.saver, self.number = job, optimizer, saver, number
        self.total = progress.total_tokens
        self.due = sorted(s for s in job.milestones if s * self.total > progress.tokens_seen)
        self.newest: Path | None = None

    def is_due(self, progress: Progress) -> bool:
        """Whether a milestone is reached that is not kept yet."""
        return bool(self.due) and progress.tokens_seen >= self.due[0] * self.total

    def saves(self, progress: Progress) -> bool:
        """Whether a checkpoint follows this step."""
        return progress.step % self.job.training.checkpoint_every_steps == 0

    def keep(self, progress: Progress, log: MetricsLog, *, stop: bool = False) -> None:
        """Keep what is due after a step, and let go of older checkpoints once it is whole."""
        places = []
        while self.is_due(progress):
            places.append(checkpoint.milestone(self.job.folder, self.due.pop(0)))
        checkpoints = self.job.folder / "checkpoints"
        newest = checkpoints / f"step-{progress.step:08d}"
        if (stop or self.saves(progress)) and newest != self.newest:
            self.newest = newest
            places.append(newest)
        if places:
            log.sync()
        for folder in places:
            self.saver.start(
                folder,
                self.job.model,
                self.optimizer,
                progress,
                self.job.origin,
                then=lambda: checkpoint.keep_newest(checkpoints, self.number),
            )
        if stop:
            self.saver.settle()
        else:
            self.saver.proceed()


def _begin(
    job: Job, optimizer: torch.optim.Optimizer, place: Place
) -> tuple[Progress, dict[str, str]]:
    """Where the stage stands, and the digests of the checkpoint that it goes on from, if any."""
    names = place.gather([path.name for path in checkpoint.by_age(job.folder / "checkpoints")])[0]
    broken: CorruptError | None = None
    for name in names:
        folder = job.folder / "checkpoints" / name
        try:
            found = checkpoint.load(folder, job.model, optimizer, place=place, origin=job.origin)
        except CorruptError as error:
            broken = error
            print(f"{error}: it is not used, the one before it is", file=sys.stderr)
        else:
            return found, checkpoint.stored_digests(folder)
    if broken is not None:
        raise broken
    if job.start.encoder is not None:
        assert job.model.encoder is not None, "the stage's model owns it"
        load_encoder(job.model.encoder, job.start.encoder, job.start.held)
    if job.start.folder is not None:
        carried = ("optimizer",) if job.start.moments == "carry" else ()
        checkpoint.check_files(job.start.folder, place=place, stems=("model", *carried))
        parts = nn.ModuleDict({name: getattr(job.model, name) for name in job.start.parts})
        tensors = renamed(parts, _read(job, job.start.folder))
        fill(parts, tensors, path=job.start.folder)
        if job.start.moments == "carry":
            checkpoint.load_moments(job.start.folder, job.model, optimizer)
    return Progress(0, 0, job.dataset.plan.seen_tokens, job.rate_at(0), TokenCount()), {}


def _read(job: Job, folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; an encoder's positions are for the pictures of this stage."""
    tensors, held, wanted = read_tensors(folder), job.start.held, job.model.config.encoder
    prefix = "encoder."
    own = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    if own and held is not None and wanted is not None:
        fitting = resized(own, held, wanted, path=folder)
        tensors |= {prefix + name: value for name, value in fitting.items()}
    return tensors


def _advance(progress: Progress, job: Job, totals: StepTotals) -> Progress:
    """Behind a step whose loss and seconds are not known yet."""
    counts, known = progress.counts + totals.counts, progress.sources
    return replace(
        progress,
        step=progress.step + 1,
        tokens_seen=counts.seen,
        rate=job.rate_at(counts.seen),
        counts=counts,
        sources={
            name: known.get(name, TokenCount()) + part
            for name, part in totals.sources.items()
            if name in known or part != TokenCount()
        },
        image_rows=progress.image_rows + totals.image_rows,
        image_row_pad=progress.image_row_pad + totals.image_row_pad,
        num_images=progress.num_images + sum(totals.num_images),
        attended=progress.attended + totals.attended,
    )


def _views(job: Job) -> list[dict[str, Any] | None]:
    """By source, how often its pictures were seen."""
    data = job.dataset
    views = [picture_views(quota, data.sources[quota.name]) for quota in data.plan.quotas]
    return [None if shown is None else shown.model_dump(mode="json") for shown in views]


def stage_meters(
    job: Job, place: Place, progress: Progress, parts: Mapping[str, float]
) -> dict[str, Any]:
    """`meters_of` what a job's steps held and took; every rank calls it."""
    counts, images = progress.counts, progress.num_images
    return meters_of(
        counts=counts,
        images=images,
        flops=model_flops(
            job.model.config,
            positions=counts.seen,
            texts=counts.seen - counts.image,
            attended=progress.attended,
            images=images,
            encoded=images if job.looks else 0,
            trains_encoder=is_trained(job.model.encoder),
            trains_decoder=not job.training.keeps_decoder,
        ),
        seconds=progress.seconds,
        parts=parts,
        device=device_name(place.device),
        num_devices=place.world_size,
        product_flops=place.peak_flops,
        memory=peak_memory(place),
    )


def _results(job: Job, progress: Progress, place: Place) -> dict[str, Any]:
    row_length = job.training.rows.row_length
    image_positions = progress.image_rows * row_length
    parts = place.sum([each / place.world_size for each in progress.parts.values()])
    meters = stage_meters(job, place, progress, dict(zip(progress.parts, parts, strict=True)))
    data = job.dataset
    planned_shares = shares_report(data.plan, data.sources, data.num_patches)
    views = place.gather(_views(job) if place.rank == 0 else None)[0]
    return {
        "tokens_seen": progress.tokens_seen,
        "steps": progress.step,
        "first_rate": job.rate_at(0),
        "last_rate": progress.rate,
        "final_loss": progress.loss,
        "tokens": {**progress.counts.__dict__},
        "sources": {
            name: planned
            | {"seen": {**progress.sources.get(name, TokenCount()).__dict__}, "pictures": shown}
            for (name, planned), shown in zip(planned_shares.items(), views, strict=True)
        },
        "pad_fraction": progress.counts.pad / max(progress.counts.total, 1),
        "image_row_pad_fraction": (
            progress.image_row_pad / image_positions if image_positions else None
        ),
        "weights_digest": checkpoint.digests(job.model, None, place=place)["model"],
        "seconds": progress.seconds,
        "meters": meters,
        **{name: meters[name] for name in ("peak_memory_bytes", "memory_of")},
    }
