"""A tiny world and tiny stages, so that tests run every kind of stage in about a second."""

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from midstream.config import (
    ContinuedCosine,
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Epochs,
    Evaluation,
    Machine,
    Mixture,
    PocketWorld,
    Rows,
    Share,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.core.identity import file_sha256
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    FromScratch,
    Prepare,
    Pretrain,
    Stage,
    TrainEncoder,
)
from midstream.study.store import Ledger, Stopped
from midstream.work.run_stage import StageRunner

MACHINE = Machine(workers=1, threads=1, device="cpu")
VOCAB_SIZE = 400
DECODER = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=VOCAB_SIZE)
ENCODER = EncoderConfig(
    image_size=24, patch_size=12, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32
)
ROWS = Rows(row_length=192, batch_rows=4)
RATE, END_RATE = 4e-3, 3e-5

DATA = Prepare(
    world=PocketWorld(
        num_documents=200,
        num_captions=320,
        num_conversations=60,
        num_questions=12,
        num_text_items=8,
    ),
    tokenizer=TrainedTokenizer(vocab_size=VOCAB_SIZE, sources=("web", "pictures", "talks")),
)
WORLD = DATA.laid_out[0]
TOKENIZER = DATA.vocabulary
# All that prepares the data of the stages below.
PREPARED = (WORLD, TOKENIZER, *map(DATA.source, ("web", "pictures", "talks")))


def encoder_of(data: Prepare, encoder: EncoderConfig = ENCODER, **changes: Any) -> TrainEncoder:
    """An encoder trained for three steps on the captions of `data`."""
    training = {
        "source": "pictures",
        "text_hidden_size": 16,
        "text_num_layers": 1,
        "max_text_tokens": 128,
        "batch_images": 16,
        "num_steps": 3,
        "schedule": WarmupCosine(peak_rate=1e-3),
    }
    return TrainEncoder(
        data=data, encoder=encoder, training=ContrastiveTraining(**(training | changes))
    )


def mixture(total_tokens: int, max_epochs: int = 1, **shares: float) -> Mixture:
    """A budget by the sources' names."""
    parts = tuple(Share(source=name, share=share) for name, share in shares.items())
    return Mixture(total_tokens=total_tokens, shares=parts, max_epochs=max_epochs)


def warm(peak_rate: float = RATE, warmup_fraction: float = 0.1) -> WarmupCosine:
    """Warm-up and half a cosine."""
    return WarmupCosine(peak_rate=peak_rate, end_rate=END_RATE, warmup_fraction=warmup_fraction)


def training(**changes: Any) -> Training:
    """Small rows, and a checkpoint every five steps."""
    return Training(**({"rows": ROWS, "checkpoint_every_steps": 5} | changes))


def text_run(total_tokens: int = 16_000, **changes: Any) -> Pretrain:
    """Text only, milestones at 20, 40, ... 100 %; `changes` are fields of its training."""
    given = {"budget": mixture(total_tokens, web=1.0), "schedule": warm()}
    return Pretrain(
        data=DATA,
        decoder=DECODER,
        training=training(**(given | changes)),
        milestones=(0.2, 0.4, 0.6, 0.8, 1.0),
    )


ENCODER_STAGE = encoder_of(DATA)
TEXT = text_run()


def image_run(
    start: FromScratch | ContinueFrom | None = None, total_tokens: int = 8_000, **changes: Any
) -> Continue:
    """Captions and text, half each, from the text run's 40 % where nothing else is said."""
    given = {
        "budget": mixture(total_tokens, pictures=0.5, web=0.5),
        "schedule": ContinuedCosine(end_rate=END_RATE),
    }
    return Continue(
        data=DATA,
        encoder=ENCODER_STAGE,
        decoder=DECODER,
        start=start or ContinueFrom(stage=TEXT, completion=0.4),
        training=training(**(given | changes)),
    )


SEEN = image_run()
CHAT = Finetune(
    start=SEEN,
    training=Training(
        budget=Epochs(sources=("talks",), epochs=1), rows=ROWS, schedule=warm(peak_rate=1e-3)
    ),
)
EVALUATION = Evaluation(
    visual_tasks=("vqav2", "pope"),
    text_tasks=("pocket_facts",),
    limit=6,
    prompts="short",
    max_new_tokens=3,
    batch_size=8,
)
RESULT = Evaluate(of=CHAT, evaluation=EVALUATION)


def runner(
    ledger: Ledger,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    machine: Machine = MACHINE,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> StageRunner:
    """A runner in this process."""
    return StageRunner(ledger, machine, report, should_stop)


def run_missing(ledger: Ledger, *stages: Stage | Prepare) -> None:
    """Run stages and, before them, their ancestors, where they are not done."""
    for stage in _expanded(stages):
        if not ledger.is_done(stage):
            run_missing(ledger, *stage.parents)
            runner(ledger).run(stage)


def _expanded(stages: Sequence[Stage | Prepare]) -> tuple[Stage, ...]:
    return tuple(
        one for stage in stages for one in (PREPARED if isinstance(stage, Prepare) else (stage,))
    )


def store_with(ledger: Ledger, folder: Path, *stages: Stage | Prepare) -> Ledger:
    """A store of its own that holds copies of stages that are done in `ledger`; DATA stands for
    the stages that prepare it."""
    run_missing(ledger, *stages)
    for stage in _expanded(stages):
        shutil.copytree(ledger.folder(stage), folder / stage.name, dirs_exist_ok=True)
    if (ledger.store / "features").is_dir():
        shutil.copytree(ledger.store / "features", folder / "features", dirs_exist_ok=True)
    return Ledger(folder)


def begun(ledger: Ledger, folder: Path, *stages: Stage) -> Ledger:
    """As `store_with`, of all that stages on pictures start from, and of `stages`."""
    return store_with(ledger, folder, DATA, ENCODER_STAGE, TEXT, *stages)


def weights(ledger: Ledger, stage: Stage) -> dict[str, Tensor]:
    """What a training stage has saved."""
    return dict(load_file(ledger.folder(stage) / "weights" / "model.safetensors"))


def run_in_two(ledger: Ledger, stage: Stage, steps: int) -> None:
    """Stop a stage after so many steps, and go on."""
    asked = itertools.count(1)
    with pytest.raises(Stopped):
        runner(ledger, should_stop=lambda: next(asked) == steps).run(stage)
    runner(ledger).run(stage)


def bits(ledger: Ledger, stage: Stage) -> dict[str, Any]:
    """What two runs of one stage share where they are equal bit for bit: no seconds, no memory."""
    timed = {"seconds", "meters", "peak_memory_bytes"}
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in ledger.metrics(stage)]
    results = {k: v for k, v in ledger.results(stage).items() if k not in timed}
    folder = ledger.folder(stage)
    weights = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }
    return {"metrics": lines, "results": results, "weights": weights}
