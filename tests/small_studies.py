"""A small study with shared stages, for every test of this folder."""

from collections.abc import Callable

import pytest

from midstream.config import (
    ContinuedCosine,
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Epochs,
    Evaluation,
    Mixture,
    PocketWorld,
    Rows,
    Share,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    Prepare,
    Pretrain,
    TrainEncoder,
)
from midstream.study.studies import Figure, Line, Study

DECODER = DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, vocab_size=300)
ENCODER = EncoderConfig(
    image_size=32,
    patch_size=16,
    hidden_size=24,
    num_layers=3,
    num_heads=2,
    intermediate_size=40,
)
ROWS = Rows(row_length=64, batch_rows=2)


def training(
    budget: Mixture | Epochs, *, seed: int = 0, rate: float = 1e-3, continued: bool = False
) -> Training:
    schedule = ContinuedCosine() if continued else WarmupCosine(peak_rate=rate)
    return Training(budget=budget, rows=ROWS, schedule=schedule, seed=seed)


def mixture(tokens: int, **shares: float) -> Mixture:
    parts = tuple(Share(source=name, share=share) for name, share in shares.items())
    return Mixture(total_tokens=tokens, shares=parts)


@pytest.fixture
def make_study() -> Callable[..., Study]:
    def make(completions: tuple[float, ...] = (0.2, 1.0), seeds: tuple[int, ...] = (0,)) -> Study:
        data = Prepare(world=PocketWorld(), tokenizer=TrainedTokenizer(vocab_size=300))
        encoder = TrainEncoder(
            data=data,
            encoder=ENCODER,
            training=ContrastiveTraining(
                source="captions",
                text_hidden_size=24,
                text_num_layers=2,
                max_text_tokens=16,
                batch_images=8,
                num_steps=10,
                schedule=WarmupCosine(peak_rate=1e-3),
            ),
        )
        text = Pretrain(
            data=data,
            decoder=DECODER,
            training=training(mixture(10_000, stories=1.0)),
            milestones=tuple(sorted({*completions, 1.0})),
        )
        evaluation = Evaluation(visual_tasks=("vqav2", "pope"), text_tasks=("facts",))
        lines = []
        for completion in completions:
            for seed in seeds:
                seen = Continue(
                    data=data,
                    encoder=encoder,
                    decoder=DECODER,
                    start=ContinueFrom(stage=text, completion=completion),
                    training=training(
                        mixture(4_000, stories=0.5, captions=0.5), seed=seed, continued=True
                    ),
                )
                chat = Finetune(
                    start=seen,
                    training=training(Epochs(sources=("chats",), epochs=2), seed=seed),
                )
                lines.append(
                    Line(
                        name=f"{completion} {seed}",
                        axes={"completion": completion, "seed": seed},
                        result=Evaluate(of=chat, evaluation=evaluation),
                    )
                )
        return Study(
            name="small",
            question="When?",
            lines=tuple(lines),
            figure=Figure(x="completion", x_label="text"),
            baselines={"text only": Evaluate(of=text, evaluation=evaluation)},
        )

    return make
