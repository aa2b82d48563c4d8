"""Small stages on a world of one's own, and all that is wrong with a study of them."""

from typing import Any

import own_world
import tiny
from midstream.config import Budget, DecoderConfig, Evaluation, PatchProjection, Rows, Training
from midstream.cost.graph import plan
from midstream.launch.check_data import Problem
from midstream.launch.checks import problems
from midstream.study.stages import (
    Continue,
    Evaluate,
    Finetune,
    FromScratch,
    LoadDecoder,
    Prepare,
    Pretrain,
)
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study
from tiny import mixture as mixed

DECODER = DecoderConfig(hidden_size=16, num_layers=1, num_heads=2, vocab_size=own_world.VOCAB_SIZE)
PATCHES = PatchProjection(image_size=24, patch_size=12, hidden_size=16)
ROWS = Rows(row_length=64, batch_rows=2)
ASKED = Evaluation(text_tasks=("quiz",), limit=4)
Model = Pretrain | Continue | Finetune | LoadDecoder


def trained(budget: Budget, rows: Rows = ROWS, **changes: Any) -> Training:
    return Training(budget=budget, rows=rows, **({"schedule": tiny.warm()} | changes))


def text_run(data: Prepare, budget: Budget | None = None, **changes: Any) -> Pretrain:
    training = trained(budget or mixed(300, web=1.0))
    return Pretrain(data=data, decoder=DECODER, training=training, **changes)


def seen(data: Prepare, budget: Budget, rows: Rows = ROWS, **changes: Any) -> Continue:
    return Continue(
        data=data,
        encoder=PATCHES,
        decoder=DECODER,
        start=FromScratch(),
        training=trained(budget, rows, **changes),
    )


def study_of(*models: Model | Evaluate, asked: Evaluation = ASKED) -> Study:
    lines = tuple(
        Line(
            name=f"line {number}",
            axes={"number": number},
            result=model if isinstance(model, Evaluate) else Evaluate(of=model, evaluation=asked),
        )
        for number, model in enumerate(models)
    )
    figure = Figure(x="number", x_label="number")
    return Study(name="mine", question="Why?", lines=lines, figure=figure)


def told(ledger: Ledger, *models: Model | Evaluate, needed: float | None = None) -> list[Problem]:
    """Everything that is wrong with a study, but for benchmarks."""
    found = problems(plan(study_of(*models), ledger), ledger, needed)
    return [problem for problem in found if "task" not in problem.what]
