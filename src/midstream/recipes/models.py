"""One model of the paper's study, from the values that its experiments vary to an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from midstream.config import (
    AdamW,
    ContinuedCosine,
    Epochs,
    Evaluation,
    Mixture,
    Share,
    Training,
    WarmupCosine,
)
from midstream.recipes.line import REWARMED
from midstream.recipes.scales import DATACOMP_DR, Scale
from midstream.study.stage import Continue, Evaluate, Finetune
from midstream.study.studies import Axis, Line, line_name


@dataclass(frozen=True)
class Model:
    """What tells one model of the paper from another; the defaults are those it varies least.

    completion: share of the text run before the first picture. captions, instruct: shares of the
    image-text tokens, the rest is text. multiple: image-text tokens over those of the scale.
    """

    completion: float = 0.8
    captions: float = 0.1
    instruct: float = 0.0
    epochs: int = 4
    seed: int = 7
    caption_set: str = DATACOMP_DR
    encoder: str = "SigLIP"
    trains_encoder: bool = False
    multiple: float = 1.0


def image_text_stage(scale: Scale, model: Model) -> Continue:
    """The image-text stage of a model: 0 % and 100 % warm up again, others continue (Figure 3)."""
    schedule: WarmupCosine | ContinuedCosine = ContinuedCosine(end_rate=scale.end_rate)
    if model.completion in REWARMED:
        # The same number of tokens, whatever the length (paper, Figure 3).
        fraction = scale.rewarm.warmup_fraction / model.multiple
        schedule = scale.rewarm.model_copy(update={"warmup_fraction": fraction})
    seed = model.seed if scale.image_text_seed is None else scale.image_text_seed
    return Continue(
        data=scale.data,
        encoder=scale.encoders[model.encoder],
        decoder=scale.decoder,
        start=scale.start(model.completion),
        training=Training(
            budget=mixture(
                scale,
                model.captions,
                model.instruct,
                round(1.0 - model.captions - model.instruct, 10),
                multiple=model.multiple,
                caption_set=model.caption_set,
            ),
            rows=scale.rows,
            optimizer=scale.optimizer,
            schedule=schedule,
            encoder_rate_factor=1.0 if model.trains_encoder else None,
            seed=seed,
        ),
    )


def mixture(
    scale: Scale,
    captions: float,
    instruct: float,
    text: float,
    *,
    multiple: float,
    caption_set: str = DATACOMP_DR,
) -> Mixture:
    """`multiple` times the scale's image-text tokens: captions, conversations and text.

    Sources without a share are left out.
    """
    source, caption = scale.captions[caption_set]
    shares = [
        Share(source=source, share=captions, caption=caption),
        Share(source=scale.instruct_source, share=instruct),
        *(
            Share(source=name, share=text if part == 1.0 else round(text * part, 12))
            for name, part in scale.text_sources
        ),
    ]
    return Mixture(
        total_tokens=round(scale.image_text_tokens * multiple),
        shares=tuple(share for share in shares if share.share),
        max_epochs=scale.max_epochs,
        by=scale.by,
        sampling=scale.sampling,
    )


def finetune_stage(scale: Scale, model: Model, continued: Continue | None = None) -> Finetune:
    """Conversations for whole epochs, its own schedule each (paper, section 2.1.3, appendix D)."""
    return Finetune(
        start=image_text_stage(scale, model) if continued is None else continued,
        training=Training(
            budget=Epochs(sources=(scale.instruct_source,), epochs=model.epochs),
            rows=scale.finetune_rows,
            # Prismatic's: matrices decay by 0.1, no z-loss; beta2 is the paper's.
            optimizer=AdamW(weight_decay=0.1, decay="matrices", z_loss=0.0),
            schedule=WarmupCosine(
                peak_rate=scale.finetune_rate, end_rate=0.0, warmup_fraction=0.05
            ),
            encoder_rate_factor=1.0 if model.trains_encoder else None,
            seed=model.seed,
        ),
    )


def line(scale: Scale, model: Model, /, **axes: Axis) -> Line:
    """A model as a line that lies at these axes and its seed; its name is made of them."""
    return Line(
        name=line_name({**axes, "seed": model.seed}),
        axes={**axes, "seed": model.seed},
        result=Evaluate(of=finetune_stage(scale, model), evaluation=scale.asked),
    )


def text_baselines(scale: Scale, completions: Sequence[float]) -> dict[str, Evaluate]:
    """The text run itself at these shares of its tokens, on the text tasks.

    Shares at which the scale has no weights are left out.
    """
    asked = text_only(scale.asked)
    return {
        f"text only, {share:.0%}": Evaluate(**_evaluated(scale, share), evaluation=asked)
        for share in completions
        if share in scale.completions
    }


def text_only(asked: Evaluation) -> Evaluation:
    """The same evaluation without its visual tasks."""
    return Evaluation(text_tasks=asked.text_tasks, limit=asked.limit)


def _evaluated(scale: Scale, completion: float) -> dict[str, Any]:
    held = scale.text_at(completion)
    return {"of": held["stage"], "completion": held["completion"]}
