"""The pocket scale: the paper's questions in minutes on two CPU cores."""

from collections.abc import Sequence

from midstream.config import (
    AdamW,
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
from midstream.study.stage import (
    Continue,
    ContinueFrom,
    Evaluate,
    Figure,
    Finetune,
    FromScratch,
    Line,
    Prepare,
    Pretrain,
    Study,
    TrainEncoder,
)

VOCAB_SIZE = 640
DECODER = DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, vocab_size=VOCAB_SIZE)
ENCODER = EncoderConfig(
    image_size=72,
    patch_size=24,
    hidden_size=64,
    num_layers=3,
    num_heads=2,
    intermediate_size=256,
    feature_layer=-3,
)
# Small steps: at this size many of them teach more than large ones over the same tokens.
TEXT_ROWS = Rows(row_length=256, batch_rows=2, layout="filled")
IMAGE_ROWS = Rows(row_length=256, batch_rows=1, layout="filled")
END_RATE = 3e-5
# Kept along every text run, so that studies of other completions share it.
MILESTONES = (0.2, 0.4, 0.6, 0.8, 1.0)
VISUAL_TASKS = ("vqav2", "gqa", "textvqa", "pope", "refcoco", "ocid_ref")
TEXT_TASKS = ("pocket_reading", "pocket_words", "pocket_facts")


def when_images_arrive(
    completions: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    seeds: Sequence[int] = (7, 365),
    image_share: float = 0.8,
    text_tokens: int = 1_200_000,
    continue_tokens: int = 250_000,
    epochs: int = 1,
    text_rate: float = 2e-3,
    rewarm_rate: float = 1e-3,
    finetune_rate: float = 1e-3,
    encoder_steps: int = 700,
) -> Study:
    """Figure 4 of the paper: how much text should come before the first image?

    One text run with checkpoints along the way; each of them (and the initialiser, 0 %) is
    continued on captions and text, fine-tuned on conversations and evaluated, once a seed. The
    seed draws the order of captions and conversations, and the projector.
    """
    data = Prepare(world=PocketWorld(), tokenizer=TrainedTokenizer(vocab_size=VOCAB_SIZE))
    encoder = TrainEncoder(
        data=data,
        encoder=ENCODER,
        training=ContrastiveTraining(
            source="pictures",
            text_hidden_size=64,
            text_num_layers=1,
            max_text_tokens=80,
            batch_images=64,
            num_steps=encoder_steps,
            schedule=WarmupCosine(peak_rate=1e-3, end_rate=1e-5, warmup_fraction=0.1),
        ),
    )
    text = Pretrain(
        data=data,
        decoder=DECODER,
        milestones=MILESTONES,
        training=Training(
            budget=Mixture(total_tokens=text_tokens, shares=(Share(source="web", share=1.0),)),
            rows=TEXT_ROWS,
            schedule=WarmupCosine(peak_rate=text_rate, end_rate=END_RATE, warmup_fraction=0.05),
        ),
    )
    asked = Evaluation(visual_tasks=VISUAL_TASKS, text_tasks=TEXT_TASKS, prompts="short")
    lines = [
        _line(
            completion,
            seed,
            Continue(
                data=data,
                encoder=encoder,
                decoder=DECODER,
                start=_start(text, completion),
                training=Training(
                    budget=Mixture(
                        total_tokens=continue_tokens,
                        shares=(
                            Share(source="pictures", share=image_share),
                            Share(source="web", share=1.0 - image_share),
                        ),
                    ),
                    rows=IMAGE_ROWS,
                    schedule=_continued(completion, rewarm_rate),
                    seed=seed,
                ),
            ),
            epochs,
            finetune_rate,
            asked,
        )
        for completion in completions
        for seed in seeds
    ]
    return Study(
        name="pocket.when_images_arrive",
        question="After what share of text training should a language model first see images?",
        lines=tuple(lines),
        figure=Figure(
            x="text_completion",
            x_label="text training done before the first image (%)",
            hollow=(0.0, 100.0),
        ),
        baselines={
            f"text only, {share:.0%}": Evaluate(
                of=text, completion=share, evaluation=Evaluation(text_tasks=TEXT_TASKS)
            )
            for share in (1.0,)
        },
    )


def _start(text: Pretrain, completion: float) -> FromScratch | ContinueFrom:
    return ContinueFrom(stage=text, completion=completion) if completion else FromScratch()


def _continued(completion: float, rewarm_rate: float) -> WarmupCosine | ContinuedCosine:
    """Re-warmed where the text schedule has no rate to continue: at 0 % and 100 %."""
    if completion in (0.0, 1.0):
        return WarmupCosine(peak_rate=rewarm_rate, end_rate=END_RATE, warmup_fraction=0.05)
    return ContinuedCosine(end_rate=END_RATE)


def _line(
    completion: float,
    seed: int,
    start: Continue,
    epochs: int,
    rate: float,
    asked: Evaluation,
) -> Line:
    finetuned = Finetune(
        start=start,
        training=Training(
            budget=Epochs(sources=("talks",), epochs=epochs),
            rows=IMAGE_ROWS,
            optimizer=AdamW(weight_decay=0.1, decay="matrices", z_loss=0.0),
            schedule=WarmupCosine(peak_rate=rate, end_rate=0.0, warmup_fraction=0.05),
            seed=seed,
        ),
    )
    return Line(
        name=f"text {completion:.0%}, seed {seed}",
        axes={"text_completion": completion * 100, "seed": seed},
        result=Evaluate(of=finetuned, evaluation=asked),
    )
