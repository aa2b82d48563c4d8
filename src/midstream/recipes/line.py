"""What the studies of one text run have in common: how a line starts, anneals and ends."""

from midstream.config import (
    AdamW,
    Budget,
    ContinuedCosine,
    Evaluation,
    Training,
    WarmupCosine,
)
from midstream.study.stage import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    FromScratch,
    Pretrain,
)
from midstream.study.studies import Line

# Every schedule but the fine-tuning's ends here (run records of the paper).
END_RATE = 3e-5
# The text run has no rate to continue there, so that it is warmed up again (paper, section 3.1).
REWARMED = (0.0, 1.0)
FINETUNING = AdamW(weight_decay=0.1, decay="matrices", z_loss=0.0)


def start_at(text: Pretrain, completion: float) -> FromScratch | ContinueFrom:
    """The initialiser at 0, else the text run's milestone."""
    return ContinueFrom(stage=text, completion=completion) if completion else FromScratch()


def image_text_schedule(completion: float, rewarm_rate: float) -> WarmupCosine | ContinuedCosine:
    """Re-warmed where the text schedule has no rate to continue: at 0 % and 100 % (paper, 3.1)."""
    if completion in REWARMED:
        return WarmupCosine(peak_rate=rewarm_rate, end_rate=END_RATE, warmup_fraction=0.05)
    return ContinuedCosine(end_rate=END_RATE)


def finetuned_line(
    continued: Continue, budget: Budget, rate: float, asked: Evaluation, completion: float
) -> Line:
    """Fine-tune and evaluate an image-text model, in its own rows and with its own seed.

    An encoder that the image-text stage trains is trained here too.
    """
    seed = continued.training.seed
    finetuned = Finetune(
        start=continued,
        training=Training(
            budget=budget,
            rows=continued.training.rows,
            optimizer=FINETUNING,
            schedule=WarmupCosine(peak_rate=rate, end_rate=0.0, warmup_fraction=0.05),
            encoder_rate_factor=continued.training.encoder_rate_factor,
            seed=seed,
        ),
    )
    return Line(
        name=f"text {completion:.0%}, seed {seed}",
        axes={"text_completion": completion * 100, "seed": seed},
        result=Evaluate(of=finetuned, evaluation=asked),
    )
