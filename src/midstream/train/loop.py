"""One training stage: start or resume, step, measure, checkpoint, stop when asked.

Stages differ in plan, start and schedule, which are values.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from midstream.batch import Batch, add_counts
from midstream.config import Machine, Training
from midstream.data.loader import RowDataset, load_steps
from midstream.data.rows import shares_report
from midstream.model.vision import load_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import load_weights, weights_digest
from midstream.tokens import TokenCount
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress
from midstream.train.metrics import MetricsLog
from midstream.train.optim import freeze, make_optimizer
from midstream.train.parallel import Place, peak_memory_bytes
from midstream.schedule import check_start, rate_at
from midstream.train.step import NonFiniteError, train_step


class Interrupted(Exception):  # noqa: N818 - it ends a stage without being an error
    """The stage was asked to stop; its checkpoint is written."""


@dataclass(frozen=True)
class Start:
    """How a stage begins: a checkpoint whose weights (and moments) it takes, or the initialiser.

    `parts` are what the checkpoint holds of the model; what it lacks starts from its initialiser,
    an encoder of the model's own from `encoder` where that is given. `parent_rate` is the parent
    schedule's rate there.
    """

    folder: Path | None = None
    parts: tuple[str, ...] = ()
    encoder: Path | None = None
    carry_optimizer: bool = False
    parent_rate: float | None = None


@dataclass(frozen=True)
class Job:
    """What to train, on which rows, from where, into which folder.

    `encode` is None where the model looks at pixels itself. `milestones` are shares of the stage's
    tokens at which the weights are kept by name.
    """

    model: VLM
    training: Training
    dataset: RowDataset
    encode: Callable[[Tensor], Tensor] | None
    start: Start
    folder: Path
    milestones: tuple[float, ...] = ()

    @property
    def step_tokens(self) -> int:
        """Positions of a whole step."""
        rows = self.training.rows
        return rows.batch_rows * rows.row_length


Report = Callable[[dict[str, Any]], None]


def train(
    job: Job,
    machine: Machine,
    place: Place,
    *,
    report: Report,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Run the stage to its end; returns its `results.json`.

    Resumes by itself from the newest checkpoint, bit for bit on a CPU. Raises Interrupted when
    `should_stop` turns true (after a checkpoint at the step boundary), NonFiniteError with the
    rows of the step before the optimiser moves, ValueError for a schedule that cannot start.
    """
    training, plan = job.training, job.dataset.plan
    total = plan.seen_tokens
    check_start(training.schedule, job.start.parent_rate, str(job.folder))
    job.model.to(place.device)
    factor = freeze(job.model, training)
    optimizer = make_optimizer(job.model, training.optimizer, encoder_rate_factor=factor)
    progress = _begin(job, optimizer, total)
    log = MetricsLog(job.folder / "metrics.jsonl", progress.metrics_bytes)
    micro_rows = machine.micro_batch_rows or training.rows.batch_rows
    steps = load_steps(
        job.dataset,
        first_row=progress.step * training.rows.batch_rows,
        micro_rows=micro_rows,
        workers=machine.data_workers,
        device=place.device,
    )
    due = sorted(share for share in job.milestones if share * total > progress.tokens_seen)
    shown = 0.0
    job.model.train()
    for micro_batches in steps:
        before = time.monotonic()
        assert progress.rate is not None, "only an imported checkpoint's may be unknown"
        try:
            result = train_step(
                job.model,
                optimizer,
                micro_batches,
                encode=job.encode,
                rate=progress.rate,
                settings=training.optimizer,
                place=place,
            )
        except NonFiniteError as error:
            low = progress.step * training.rows.batch_rows
            high = min(low + training.rows.batch_rows, len(plan)) - 1
            raise NonFiniteError(
                f"step {progress.step}, rows {low} to {high}: {error}; "
                "the weights are those before the step. Lower the rate or look at these rows"
            ) from None
        seconds = time.monotonic() - before
        used_rate = progress.rate
        progress = _advance(progress, micro_batches, job, result.loss, seconds)
        log.write(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            loss=result.loss,
            rate=used_rate,
            grad_norm=result.grad_norm,
            num_targets=result.num_targets,
            seconds=round(seconds, 6),
        )
        progress = replace(progress, metrics_bytes=log.position)
        while due and progress.tokens_seen >= due[0] * total:
            folder = checkpoint.milestone(job.folder, due.pop(0))
            checkpoint.save(folder, job.model, optimizer, progress)
        stop = should_stop()
        if stop or progress.step % training.checkpoint_every_steps == 0:
            log.sync()
            name = f"step-{progress.step:08d}"
            checkpoint.save(job.folder / "checkpoints" / name, job.model, optimizer, progress)
            checkpoint.keep_newest(job.folder / "checkpoints")
        if stop:
            log.close()
            raise Interrupted(f"stopped after step {progress.step} of {plan.num_steps}")
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            report(_event(progress))
    log.close()
    return _results(job, progress)


def _begin(job: Job, optimizer: torch.optim.Optimizer, total: int) -> Progress:
    newest = checkpoint.newest(job.folder / "checkpoints")
    if newest is not None:
        return checkpoint.load(newest, job.model, optimizer)
    if job.start.encoder is not None:
        assert job.model.encoder is not None, "the stage's model owns it"
        load_encoder(job.model.encoder, job.start.encoder / "model.safetensors")
    if job.start.folder is not None:
        checkpoint.read_progress(job.start.folder)
        parts = nn.ModuleDict({name: getattr(job.model, name) for name in job.start.parts})
        load_weights(parts, job.start.folder / "model.safetensors")
        if job.start.carry_optimizer:
            checkpoint.load_moments(job.start.folder, job.model, optimizer)
    rate = rate_at(
        job.training.schedule,
        0,
        total,
        parent_rate=job.start.parent_rate,
        step_tokens=job.step_tokens,
    )
    return Progress(0, 0, total, rate, TokenCount())


def _advance(
    progress: Progress, batches: list[Batch], job: Job, loss: float, seconds: float
) -> Progress:
    counts = sum((batch.counts for batch in batches), progress.counts)
    rate = rate_at(
        job.training.schedule,
        counts.seen,
        progress.total_tokens,
        parent_rate=job.start.parent_rate,
        step_tokens=job.step_tokens,
    )
    image_rows = image_row_pad = 0
    for batch in batches:
        shown = torch.unique(batch.image_slots[:, 0])
        image_rows += len(shown)
        image_row_pad += int((batch.segment_ids[shown] < 0).sum())
    return replace(
        progress,
        step=progress.step + 1,
        tokens_seen=counts.seen,
        rate=rate,
        counts=counts,
        sources=add_counts([progress.sources, *(batch.sources for batch in batches)]),
        loss=loss,
        image_rows=progress.image_rows + image_rows,
        image_row_pad=progress.image_row_pad + image_row_pad,
        seconds=progress.seconds + seconds,
    )


def _event(progress: Progress) -> dict[str, Any]:
    return {
        "done": progress.tokens_seen / progress.total_tokens,
        "tokens_seen": progress.tokens_seen,
        "total_tokens": progress.total_tokens,
        "loss": progress.loss,
        "tokens_per_second": progress.tokens_seen / max(progress.seconds, 1e-9),
        "note": "",
    }


def _results(job: Job, progress: Progress) -> dict[str, Any]:
    schedule, parent = job.training.schedule, job.start.parent_rate
    row_length = job.training.rows.row_length
    image_positions = progress.image_rows * row_length
    return {
        "tokens_seen": progress.tokens_seen,
        "steps": progress.step,
        "first_rate": rate_at(
            schedule,
            0,
            progress.total_tokens,
            parent_rate=parent,
            step_tokens=job.step_tokens,
        ),
        "last_rate": progress.rate,
        "final_loss": progress.loss,
        "tokens": {**progress.counts.__dict__},
        "sources": {
            name: planned | {"seen": {**progress.sources.get(name, TokenCount()).__dict__}}
            for name, planned in shares_report(
                job.dataset.plan, job.dataset.sources, job.dataset.num_patches
            ).items()
        },
        "pad_fraction": progress.counts.pad / max(progress.counts.total, 1),
        "image_row_pad_fraction": (
            progress.image_row_pad / image_positions if image_positions else None
        ),
        "weights_digest": weights_digest(job.model),
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens_seen / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(),
    }
