"""One real stage of `plan_reality.py`: what torch counts of it, over what the plan says."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from midstream.config import (
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Epochs,
    Machine,
    Mixture,
    PatchProjection,
    PocketWorld,
    Rows,
    Share,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.config.flops import model_flops
from midstream.core.tokens import TokenCount
from midstream.cost.cost import cost, trains_encoder, work_of
from midstream.cost.taken import Setting, memory
from midstream.data.rows import load_steps
from midstream.study.stages import (
    Continue,
    Finetune,
    FromScratch,
    Prepare,
    Pretrain,
    Stage,
    Trained,
    TrainEncoder,
)
from midstream.study.store import Ledger
from midstream.train.parallel import peak_memory_bytes
from midstream.train.step import freeze, make_optimizer, train_step
from midstream.work.run_stage import StageRunner
from plan_reality import SIZES

VOCAB_SIZE = 2048
# Steps until Adam's moments are there.
WARM_STEPS = 2


DATA = Prepare(
    world=PocketWorld(num_documents=2_000, num_captions=1_500, num_conversations=600),
    tokenizer=TrainedTokenizer(vocab_size=VOCAB_SIZE),
)


def stage_of(
    kind: str, width: int, layers: int, rows: Rows, tokens: int, data: Prepare = DATA
) -> Trained:
    """A stage of that kind over a small pocket world, whose tokenizer is to be trained."""
    assert isinstance(data.tokenizer, TrainedTokenizer)
    decoder = DecoderConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        vocab_size=data.tokenizer.vocab_size,
    )
    schedule = WarmupCosine(peak_rate=1e-3)

    def training(**shares: float) -> Training:
        parts = tuple(Share(source=name, share=share) for name, share in shares.items())
        budget = Mixture(total_tokens=tokens, shares=parts)
        return Training(budget=budget, rows=rows, schedule=schedule)

    if kind == "text":
        return Pretrain(data=data, decoder=decoder, training=training(web=1.0))
    mixed = training(pictures=0.5, web=0.5)
    if kind == "trained":
        mixed = mixed.model_copy(update={"encoder_rate_factor": 0.1})
    seen = Continue(
        data=data,
        encoder=_encoder(data, kind),
        decoder=decoder,
        start=FromScratch(),
        training=mixed,
    )
    if kind != "chat":
        return seen
    passes = Training(budget=Epochs(sources=("talks",), epochs=1), rows=rows, schedule=schedule)
    return Finetune(start=seen, training=passes)


def _encoder(data: Prepare, kind: str) -> TrainEncoder | PatchProjection:
    if kind == "patches":
        return PatchProjection(image_size=72, patch_size=12, hidden_size=96)
    return TrainEncoder(
        data=data,
        encoder=EncoderConfig(
            image_size=72,
            patch_size=12,
            hidden_size=96,
            num_layers=3,
            num_heads=2,
            intermediate_size=384,
        ),
        training=ContrastiveTraining(
            source="pictures",
            text_hidden_size=32,
            text_num_layers=1,
            max_text_tokens=128,
            batch_images=16,
            num_steps=1,
            schedule=WarmupCosine(peak_rate=1e-3),
        ),
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """FLOPs and peak memory of the stage, and what the plan says over each."""
    size, kind, store = options.child
    rows = Rows(row_length=options.row_length, batch_rows=options.rows)
    stage = stage_of(kind, *SIZES[size], rows, options.tokens)
    found = Reality(Ledger(Path(store)), options.device, options.micro_rows, options.checkpointing)
    took, resident = found.memory(stage)
    flops = found.flops(stage)
    return {
        "flops": flops,
        "flops_ratio": found.planned_flops(stage) / flops,
        "memory": took,
        "memory_ratio": found.planned_memory(stage) / took,
        "resident": resident,
    }


class Reality:
    """Trains stages and counts; `micro_rows` 0: a step is one micro-batch."""

    def __init__(
        self, ledger: Ledger, device: str, micro_rows: int = 0, checkpointing: bool = False
    ) -> None:
        self.ledger, self.device = ledger, device
        self.machine = Machine.model_validate(
            {
                "workers": 1,
                "device": device,
                "features": "live",
                "compile": "off",
                "micro_batch_rows": micro_rows or None,
                "activation_checkpointing": "blocks" if checkpointing else "off",
            }
        )
        self.runner = StageRunner(ledger, self.machine, lambda event: None, lambda: False)

    def prepare(self, *stages: Stage) -> None:
        """Run what these stages need; the image-text stage before a fine-tuning is not needed."""
        for stage in stages:
            parents = stage.parents[1:] if isinstance(stage, Finetune) else stage.parents
            for parent in parents:
                if not self.ledger.is_done(parent):
                    self.prepare(parent)
                    self.runner.run(parent)

    def planned_flops(self, stage: Trained) -> float:
        """What the plan says, once the data is prepared."""
        self.prepare(stage)
        found = cost(stage, self.ledger, self.device).flops  # type: ignore[arg-type]
        assert found is not None
        return found

    def planned_memory(self, stage: Trained) -> float:
        """What the plan says, without a frozen encoder's weights (they are no part of a step)."""
        work = work_of(stage, self.ledger, self.device)  # type: ignore[arg-type]
        assert work is not None
        setting = Setting(
            micro_rows=self.machine.micro_batch_rows,
            checkpointing=self.machine.activation_checkpointing == "blocks",
            device=self.device,  # type: ignore[arg-type]
        )
        found = memory(stage, work, setting)
        return found.total - found.encoder

    def _steps(self, stage: Trained) -> Any:
        """A function that takes one step of the stage, or returns None behind the last."""
        self.prepare(stage)
        job = self.runner.job(stage, self.ledger.store / "unused")
        place = self.runner.place
        job.model.to(place.device)
        factor = freeze(job.model, job.training)
        optimizer = make_optimizer(job.model, job.training.optimizer, encoder_rate_factor=factor)
        job.model.train()
        steps = load_steps(
            job.dataset,
            first_row=0,
            micro_rows=self.machine.micro_batch_rows or job.training.rows.batch_rows,
            device=place.device,
        )

        def take() -> Any:
            batches = next(steps, None)
            if batches is not None:
                train_step(
                    job.model,
                    optimizer,
                    batches,
                    encode=job.encode,
                    rate=0.0,
                    settings=job.training.optimizer,
                    place=place,
                ).read()
            return batches

        held = sum(p.numel() for p in job.model.parameters())
        held += 2 * sum(p.numel() for p in job.model.parameters() if p.requires_grad)
        return take, 4 * held

    def flops(self, stage: Trained) -> float:
        """Every step under torch's counter, which lacks the product that adds in place; attention
        is the plain one, since the fused one of a CPU is not counted."""
        take, _ = self._steps(stage)

        def added(total: Any, left: Any, right: Any, **_: Any) -> int:
            return int(2 * left[0] * left[1] * right[1])

        mapping = {torch.ops.aten.addmm_: added}
        with (
            FlopCounterMode(display=False, custom_mapping=mapping) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):
            while take() is not None:
                pass
        return float(counter.get_total_flops())

    def model_flops(self, stage: Trained) -> float:
        """As results and profiles count them, of the batches that the stage is given."""
        self.prepare(stage)
        job = self.runner.job(stage, self.ledger.store / "unused")
        counts, attended, images = TokenCount(), 0, 0
        rows = job.training.rows.batch_rows
        for batches in load_steps(job.dataset, first_row=0, micro_rows=rows):
            for batch in batches:
                counts, images = counts + batch.counts, images + len(batch.images)
                attended += int((batch.position_ids + 1)[batch.segment_ids >= 0].sum())
        return float(
            model_flops(
                job.model.config,
                positions=counts.seen,
                texts=counts.seen - counts.image,
                attended=attended,
                images=images,
                encoded=images,
                trains_encoder=trains_encoder(stage),
                trains_decoder=not job.training.freeze_decoder,
            )
        )

    def memory(self, stage: Trained) -> tuple[float, int]:
        """The allocator's peak over a step with its moments there; the process's resident peak."""
        take, held = self._steps(stage)
        for _ in range(WARM_STEPS):
            take()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            take()
            return float(torch.cuda.max_memory_allocated()), peak_memory_bytes()
        with (
            contextlib.redirect_stdout(None),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        ):
            take()
        now = peak = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return float(held + peak), peak_memory_bytes()
