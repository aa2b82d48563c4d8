"""One training stage: start or resume, step, measure, checkpoint, stop when asked.

Stages differ in plan, start and schedule, which are values. Every rank runs the same loop over its
own rows; counts, decisions and results are those of all ranks.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from midstream.config import AnyEncoderConfig, Machine, Training
from midstream.config.flops import model_flops
from midstream.config.training import check_start, moments_factor, rate_at
from midstream.core.batch import Batch
from midstream.core.storage import CorruptError
from midstream.core.tokens import TokenCount
from midstream.data.rows import RowDataset, load_steps, shares_report
from midstream.data.views import picture_views
from midstream.model.vision import load_encoder, resized
from midstream.model.vlm import VLM
from midstream.model.weights import fill, read_tensors
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress, Saver
from midstream.train.guards import StartChecks, Watch
from midstream.train.held_out import HeldOut, evaluate
from midstream.train.metrics import MetricsLog, Tracking, meters_of, progress_event
from midstream.train.parallel import ALONE, Place, device_name, peak_memory
from midstream.train.step import (
    Clock,
    NonFiniteError,
    StepResult,
    freeze,
    is_trained,
    make_optimizer,
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

    @property
    def step_tokens(self) -> int:
        """Positions of a whole step."""
        rows = self.training.rows
        return rows.batch_rows * rows.row_length

    def rate_at(self, tokens_seen: int) -> float:
        """The learning rate of the step that follows `tokens_seen` tokens of this stage."""
        total, step_tokens = self.dataset.plan.seen_tokens, self.step_tokens
        rate = rate_at(
            self.training.schedule,
            tokens_seen,
            total,
            parent_rate=self.start.parent_rate,
            step_tokens=step_tokens,
        )
        if self.start.moments == "warm":
            rate *= moments_factor(tokens_seen, total, step_tokens=step_tokens)
        return rate


Report = Callable[[dict[str, Any]], None]


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
    with the rows of the step before the optimiser moves, OSError where a checkpoint cannot be
    written, ValueError for a schedule that cannot start, ranks that differ, or a trained parameter
    that no gradient reaches.
    """
    training, plan = job.training, job.dataset.plan
    check_start(training.schedule, job.start.parent_rate, str(job.folder))
    if place.mesh is None:
        job.model.to(place.device)
    factor = freeze(job.model, training)
    optimizer = make_optimizer(job.model, training.optimizer, encoder_rate_factor=factor)
    checks = StartChecks(job.model, place, job.origin)
    progress = _begin(job, optimizer, place)
    checks.begin(job.folder, optimizer, progress, job.rate_at(progress.tokens_seen), machine)
    metrics = job.folder / "metrics.jsonl" if place.rank == 0 else None
    log = MetricsLog(metrics, progress.metrics_bytes, tracking)
    saver = Saver(place, background=machine.saving == "background")
    keeper = _Keeper(job, optimizer, saver, machine.keep_checkpoints, progress)
    steps = load_steps(
        job.dataset,
        first_row=progress.step * training.rows.batch_rows,
        micro_rows=machine.micro_batch_rows or training.rows.batch_rows,
        workers=machine.data_workers,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
    )
    shown, before = 0.0, time.monotonic()
    watch, clock = watch or Watch(ALONE), Clock(place.device, progress.parts)
    held_out: dict[str, Any] | None = None
    job.model.train()
    watch.at("waiting for the first rows", "data")
    while (micro_batches := _next(steps, clock)) is not None:
        step = f"step {progress.step + 1} of {plan.num_steps}"
        watch.at(f"computing {step}", "step")
        result = _step(job, optimizer, micro_batches, progress, place, clock)
        checks.after_step(result)
        before, seconds = time.monotonic(), time.monotonic() - before
        used_rate = progress.rate
        mine = [float(should_stop()), *_tally(micro_batches, plan.names)]
        stop, *tally = place.sum(mine)
        watch.at(f"keeping what {step} gave", "keep")
        progress = _advance(progress, job, tally, result, seconds, clock)
        held_out, since = None, time.monotonic()
        if progress.step == plan.num_steps or keeper.is_due(progress):
            held_out = _held_out(job, machine, place, watch)
            before += time.monotonic() - since
        log.write(**_line(progress, result, used_rate, seconds, held_out))
        progress = replace(progress, metrics_bytes=log.position)
        with clock.part("checkpoint"):
            keeper.keep(progress, log, stop=stop > 0)
        watch.at(f"waiting for rows after {step}", "data")
        if stop:
            log.close()
            raise Interrupted(f"stopped after step {progress.step} of {plan.num_steps}")
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            told = progress.loss, progress.seconds
            report(progress_event(progress.tokens_seen, progress.total_tokens, *told))
    if held_out is None:  # the stage resumes behind its last step
        held_out = _held_out(job, machine, place, watch)
    watch.rest("keeping the stage's weights")
    saver.settle()
    log.close()
    checks.end()
    return _results(job, progress, place) | {"held_out": held_out}


def _held_out(job: Job, machine: Machine, place: Place, watch: Watch) -> dict[str, Any]:
    def at(doing: str) -> None:
        watch.at(doing, "step")

    return evaluate(job.model, job.held_out, encode=job.encode, machine=machine, place=place, at=at)


def _line(
    progress: Progress,
    result: StepResult,
    used_rate: float | None,
    seconds: float,
    held_out: Mapping[str, Any] | None,
) -> dict[str, Any]:
    line = {
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "loss": result.loss,
        "rate": used_rate,
        "grad_norm": result.grad_norm,
        "num_targets": result.num_targets,
        "seconds": round(seconds, 6),
    }
    return line | ({"held_out": held_out} if held_out else {})


def _next(steps: Iterator[list[Batch]], clock: Clock) -> list[Batch] | None:
    with clock.part("data"):
        return next(steps, None)


def _step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    progress: Progress,
    place: Place,
    clock: Clock,
) -> StepResult:
    assert progress.rate is not None, "only an imported checkpoint's may be unknown"
    low = progress.step * job.training.rows.batch_rows
    high = min(low + job.training.rows.batch_rows, len(job.dataset)) - 1
    try:
        return train_step(
            job.model,
            optimizer,
            micro_batches,
            encode=job.encode,
            rate=progress.rate,
            settings=job.training.optimizer,
            place=place,
            clock=clock,
        )
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {progress.step}, rows {low} to {high}: {error}; "
            "the weights are those before the step. Lower the rate or look at these rows"
        ) from None


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

    def is_due(self, progress: Progress) -> bool:
        """Whether a milestone is reached that is not kept yet."""
        return bool(self.due) and progress.tokens_seen >= self.due[0] * self.total

    def keep(self, progress: Progress, log: MetricsLog, *, stop: bool) -> None:
        """Keep what is due after a step, and let go of older checkpoints once it is whole."""
        places = []
        while self.is_due(progress):
            places.append(checkpoint.milestone(self.job.folder, self.due.pop(0)))
        checkpoints = self.job.folder / "checkpoints"
        if stop or progress.step % self.job.training.checkpoint_every_steps == 0:
            places.append(checkpoints / f"step-{progress.step:08d}")
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
        if stop or self.saver.over():
            self.saver.settle()


def _begin(job: Job, optimizer: torch.optim.Optimizer, place: Place) -> Progress:
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
            return found
    if broken is not None:
        raise broken
    if job.start.encoder is not None:
        assert job.model.encoder is not None, "the stage's model owns it"
        load_encoder(job.model.encoder, job.start.encoder, job.start.held)
    if job.start.folder is not None:
        checkpoint.read_progress(job.start.folder, place=place)
        parts = nn.ModuleDict({name: getattr(job.model, name) for name in job.start.parts})
        fill(parts, _read(job, job.start.folder), path=job.start.folder)
        if job.start.moments == "carry":
            checkpoint.load_moments(job.start.folder, job.model, optimizer)
    return Progress(0, 0, job.dataset.plan.seen_tokens, job.rate_at(0), TokenCount())


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


def _tally(batches: list[Batch], names: tuple[str, ...]) -> list[int]:
    """Image rows, padding in them, positions attended to, the counts of all and of each source."""
    image_rows = image_row_pad = attended = 0
    for batch in batches:
        attended += int((batch.position_ids + 1)[batch.segment_ids >= 0].sum())
        shown = torch.unique(batch.image_slots[:, 0])
        image_rows += len(shown)
        image_row_pad += int((batch.segment_ids[shown] < 0).sum())
    nothing = TokenCount()
    held = [sum((batch.counts for batch in batches), nothing)]
    for name in names:
        held.append(sum((batch.sources.get(name, nothing) for batch in batches), nothing))
    return [image_rows, image_row_pad, attended, *(n for counts in held for n in astuple(counts))]


def _advance(
    progress: Progress,
    job: Job,
    tally: list[float],
    result: StepResult,
    seconds: float,
    clock: Clock,
) -> Progress:
    image_rows, image_row_pad, attended, *numbers = (int(value) for value in tally)
    width = len(fields(TokenCount))
    held = [TokenCount(*numbers[at : at + width]) for at in range(0, len(numbers), width)]
    counts = progress.counts + held[0]
    sources = {
        name: progress.sources.get(name, TokenCount()) + part
        for name, part in zip(job.dataset.plan.names, held[1:], strict=True)
        if name in progress.sources or part != TokenCount()
    }
    return replace(
        progress,
        step=progress.step + 1,
        tokens_seen=counts.seen,
        rate=job.rate_at(counts.seen),
        counts=counts,
        sources=sources,
        loss=result.loss,
        image_rows=progress.image_rows + image_rows,
        image_row_pad=progress.image_row_pad + image_row_pad,
        num_images=progress.num_images + result.num_images,
        attended=progress.attended + attended,
        seconds=progress.seconds + seconds,
        parts=clock.read(),
    )


def _views(job: Job) -> list[dict[str, Any] | None]:
    """By source, how often its pictures were seen."""
    data = job.dataset
    views = [picture_views(quota, data.sources[quota.name]) for quota in data.plan.quotas]
    return [None if shown is None else shown.model_dump(mode="json") for shown in views]


def _results(job: Job, progress: Progress, place: Place) -> dict[str, Any]:
    row_length = job.training.rows.row_length
    image_positions = progress.image_rows * row_length
    counts, memory = progress.counts, peak_memory(place)
    flops = model_flops(
        job.model.config,
        positions=counts.seen,
        texts=counts.seen - counts.image,
        attended=progress.attended,
        images=progress.num_images,
        encoded=progress.num_images if job.looks else 0,
        trains_encoder=is_trained(job.model.encoder),
        trains_decoder=is_trained(job.model.decoder),
    )
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
            | {
                "seen": {**progress.sources.get(name, TokenCount()).__dict__},
                "pictures": shown,
            }
            for (name, planned), shown in zip(planned_shares.items(), views, strict=True)
        },
        "pad_fraction": progress.counts.pad / max(progress.counts.total, 1),
        "image_row_pad_fraction": (
            progress.image_row_pad / image_positions if image_positions else None
        ),
        "weights_digest": checkpoint.digests(job.model, None, place=place)["model"],
        "seconds": progress.seconds,
        "meters": meters_of(
            counts=counts,
            images=progress.num_images,
            flops=flops,
            seconds=progress.seconds,
            parts=progress.parts,
            device=device_name(place.device),
            num_devices=place.world_size,
            product_flops=place.peak_flops,
            memory=memory,
        ),
        **memory,
    }
