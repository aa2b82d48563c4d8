"""The pocket scale: the paper's questions in minutes on two CPU cores."""

from collections.abc import Sequence

from midstream.config import (
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
from midstream.recipes.line import END_RATE, finetuned_line, image_text_schedule, start_at
from midstream.study.stage import (
    Continue,
    Evaluate,
    Prepare,
    Pretrain,
    TrainEncoder,
)
from midstream.study.studies import Figure, Study

VOCAB_SIZE = 640
# So few that words of captions and conversations are learnt for themselves.
TOKENIZER = TrainedTokenizer(vocab_size=VOCAB_SIZE, sources=("web", "pictures", "talks"))
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
DINOV2 = ENCODER.model_copy(update={"family": "dinov2"})
# Small steps: at this size many of them teach more than large ones over the same tokens.
TEXT_ROWS = Rows(row_length=256, batch_rows=2, layout="filled")
IMAGE_ROWS = Rows(row_length=256, batch_rows=1, layout="filled")
# Kept along every text run, so that studies of other completions share it.
MILESTONES = (0.2, 0.4, 0.6, 0.8, 1.0)
VISUAL_TASKS = ("vqav2", "gqa", "textvqa", "pope", "refcoco", "ocid_ref")
TEXT_TASKS = ("pocket_reading", "pocket_words", "pocket_facts")


ASKED = Evaluation(
    visual_tasks=VISUAL_TASKS,
    text_tasks=TEXT_TASKS,
    prompts="short",
    # Its conversations say "yes" and "no"; the official answers begin with a capital.
    fixed_answers="text",
)


def encoder_stage(
    data: Prepare, *, num_steps: int, encoder: EncoderConfig = ENCODER
) -> TrainEncoder:
    """The tiny SigLIP encoder, or another tower, trained on the world's captions."""
    return TrainEncoder(
        data=data,
        encoder=encoder,
        training=ContrastiveTraining(
            source="pictures",
            text_hidden_size=64,
            text_num_layers=1,
            max_text_tokens=80,
            batch_images=64,
            num_steps=num_steps,
            schedule=WarmupCosine(peak_rate=1e-3, end_rate=1e-5, warmup_fraction=0.1),
        ),
    )


def text_stage(
    data: Prepare,
    *,
    total_tokens: int,
    rate: float = 2e-3,
    source: str = "web",
    milestones: Sequence[float] = MILESTONES,
) -> Pretrain:
    """The text run, with checkpoints along the way."""
    return Pretrain(
        data=data,
        decoder=DECODER,
        milestones=tuple(milestones),
        training=Training(
            budget=Mixture(total_tokens=total_tokens, shares=(Share(source=source, share=1.0),)),
            rows=TEXT_ROWS,
            schedule=WarmupCosine(peak_rate=rate, end_rate=END_RATE, warmup_fraction=0.05),
        ),
    )


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
    data = Prepare(world=PocketWorld(), tokenizer=TOKENIZER)
    encoder = encoder_stage(data, num_steps=encoder_steps)
    # A start of one's own is kept beside those that all such studies share.
    kept = sorted({*MILESTONES, *completions} - {0.0})
    text = text_stage(data, total_tokens=text_tokens, rate=text_rate, milestones=kept)
    lines = [
        finetuned_line(
            Continue(
                data=data,
                encoder=encoder,
                decoder=DECODER,
                start=start_at(text, completion),
                training=Training(
                    budget=Mixture(
                        total_tokens=continue_tokens,
                        shares=(
                            Share(source="pictures", share=image_share),
                            Share(source="web", share=1.0 - image_share),
                        ),
                    ),
                    rows=IMAGE_ROWS,
                    schedule=image_text_schedule(completion, rewarm_rate),
                    seed=seed,
                ),
            ),
            Epochs(sources=("talks",), epochs=epochs),
            finetune_rate,
            ASKED,
            completion,
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
