"""A small study with shared stages, for the rooms that plan and never run it."""

from collections.abc import Callable
from typing import Any

import pytest

from midstream.config import (
    ContinuedCosine,
    DecoderConfig,
    EncoderConfig,
    Epochs,
    Evaluation,
    PocketWorld,
    Rows,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.study.stages import Continue, ContinueFrom, Evaluate, Finetune, Prepare, Pretrain
from midstream.study.studies import Figure, Line, Study
from tiny import encoder_of, mixture

DECODER = DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, vocab_size=300)
ENCODER = EncoderConfig(
    image_size=32, patch_size=16, hidden_size=24, num_layers=3, num_heads=2, intermediate_size=40
)
DATA = Prepare(world=PocketWorld(), tokenizer=TrainedTokenizer(vocab_size=300))
ENCODER_STAGE = encoder_of(
    DATA,
    ENCODER,
    source="captions",
    text_hidden_size=24,
    text_num_layers=2,
    max_text_tokens=16,
    batch_images=8,
    num_steps=10,
)


def training(**given: Any) -> Training:
    rest = {"rows": Rows(row_length=64, batch_rows=2), "schedule": WarmupCosine(peak_rate=1e-3)}
    return Training(**(rest | given))


@pytest.fixture
def make_study() -> Callable[..., Study]:
    def make(completions: tuple[float, ...] = (0.2, 1.0), seeds: tuple[int, ...] = (0,)) -> Study:
        text = Pretrain(
            data=DATA,
            decoder=DECODER,
            training=training(budget=mixture(10_000, stories=1.0)),
            milestones=tuple(sorted({*completions, 1.0})),
        )
        evaluation = Evaluation(visual_tasks=("vqav2", "pope"), text_tasks=("facts",))

        def line(completion: float, seed: int) -> Line:
            budget = mixture(4_000, stories=0.5, captions=0.5)
            seen = Continue(
                data=DATA,
                encoder=ENCODER_STAGE,
                decoder=DECODER,
                start=ContinueFrom(stage=text, completion=completion),
                training=training(budget=budget, seed=seed, schedule=ContinuedCosine()),
            )
            talks = Epochs(sources=("chats",), epochs=2)
            chat = Finetune(start=seen, training=training(budget=talks, seed=seed))
            return Line(
                name=f"{completion} {seed}",
                axes={"completion": completion, "seed": seed},
                result=Evaluate(of=chat, evaluation=evaluation),
            )

        return Study(
            name="small",
            question="When?",
            lines=tuple(line(completion, seed) for completion in completions for seed in seeds),
            figure=Figure(x="completion", x_label="text"),
            baselines={"text only": Evaluate(of=text, evaluation=evaluation)},
        )

    return make


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    """Of two completions and one seed."""
    return make_study()
