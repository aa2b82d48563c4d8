"""The sizes of the paper with its settings, and the text run of each, or its checkpoints.

K: known, the paper's or its records'; I: inferred; U: unknown, our choice.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from midstream.config import (
    DECODERS,
    AdamW,
    AnyDecoderConfig,
    Caption,
    EncoderConfig,
    Evaluation,
    FusedEncoder,
    Mixture,
    PatchProjection,
    Rows,
    Share,
    Training,
    WarmupCosine,
)
from midstream.config.training import rate_at
from midstream.recipes.lines import (
    COMPLETIONS,
    END_RATE,
    IMAGE_TEXT,
    TEXT_RUN,
    Encoder,
    Scale,
    TextMixture,
    caption_sets,
    imported,
    world,
)
from midstream.study.stages import Imported, LoadDecoder, LoadEncoder, Prepare, Pretrain

# K: OpenLM's batches of 512 sequences of 2,048 (run records; Table 2: 256).
_TEXT_ROWS = Rows(row_length=2048, batch_rows=512, layout="joined")
# K: text run of 1.4B and its peak; multiplier 150 (x 20) of 79M. I: the same for the other sizes.
_TEXT_TOKENS = {"1b": 4_319_385_600_000}
_TEXT_MULTIPLE = 3000
_TEXT_PEAK = {"1b": 1e-2}
_TEXT_DECAY = {"1b": 0.01}
# K at 1b (records of the hero run), and at 411m (411m_1x.json); I: the others as that.
_TEXT_Z_LOSS = {"1b": 1e-6}
_TEXT_WARMUP_STEPS = {"1b": 5000, "154m": 1000, "411m": 2500}
# K: rates of the records at 20, 40, 60 and 80 % of the text runs; at 100 % their end.
_RATES = {
    name: dict(zip(COMPLETIONS, (*rates, END_RATE), strict=True))
    for name, rates in {
        "154m": (
            0.0027302113853274333,
            0.002032983979588796,
            0.001150377107417605,
            0.000388134179188036,
        ),
        "411m": (
            0.0027314818349182604,
            0.002010618392029235,
            0.0011054291676185495,
            0.0003519129789093403,
        ),
        "1b": (
            0.009080349589287376,
            0.006499974971416897,
            0.0034466737184832607,
            0.0009788970261355868,
        ),
    }.items()
}


def text_run(name: str, data: Prepare, mixture: TextMixture) -> Pretrain:
    """The text run, with weights kept where image-text training may start."""
    return Pretrain(
        data=data,
        decoder=DECODERS[name],
        milestones=COMPLETIONS,
        training=Training(
            budget=Mixture(
                total_tokens=_text_tokens(name),
                shares=tuple(Share(source=source, share=share) for source, share in mixture),
                max_epochs=2,
            ),
            rows=_TEXT_ROWS,
            optimizer=AdamW(
                weight_decay=_TEXT_DECAY.get(name, 0.033), z_loss=_TEXT_Z_LOSS.get(name, 1e-4)
            ),
            schedule=_text_schedule(name),
        ),
    )


def checkpoints(name: str, data: Prepare, inputs: Path | None) -> dict[float, LoadDecoder]:
    """The run's imported checkpoints by their share of its tokens; planned where absent."""
    known = _RATES.get(name, {})
    return {
        share: LoadDecoder(
            data=data,
            checkpoint=imported(
                inputs,
                "checkpoints",
                f"{share * 100:.0f}",
                "TRI-ML/DCLM-1B" if (name, share) == ("1b", 1.0) else "",
            ),
            decoder=DECODERS[name],
            planned_rate=known.get(share, _text_rate(name, share)),
            planned_tokens=round(share * _text_tokens(name)),
            planned_total_tokens=_text_tokens(name),
        )
        for share in COMPLETIONS
    }


def _text_tokens(name: str) -> int:
    return _TEXT_TOKENS.get(name, _TEXT_MULTIPLE * DECODERS[name].num_parameters)


def _text_schedule(name: str) -> WarmupCosine:
    steps = _text_tokens(name) / (_TEXT_ROWS.row_length * _TEXT_ROWS.batch_rows)
    return WarmupCosine(
        peak_rate=_TEXT_PEAK.get(name, 3e-3),
        end_rate=END_RATE,
        warmup_fraction=_TEXT_WARMUP_STEPS.get(name, 400) / steps,
    )


def _text_rate(name: str, share: float) -> float:
    total = _text_tokens(name)
    return rate_at(_text_schedule(name), round(share * total), total)


def rates_along(name: str) -> tuple[tuple[int, float], ...]:
    """The text run's rate at some of its tokens, the end of its warm-up among them."""
    shares = {_text_schedule(name).warmup_fraction, *(part / 100 for part in range(101))}
    return tuple(
        (round(share * _text_tokens(name)), _text_rate(name, share)) for share in sorted(shares)
    )


# K: batches of 256 rows of 1,024 for image-text training (run names, paper 2.1.2).
_IMAGE_ROWS = Rows(row_length=1024, batch_rows=256, layout="filled")
# K: 256 conversations a step; U: their length. Prismatic's default is 2,048 tokens at most; a
# filled row of that length holds two conversations with a picture.
_FINETUNE_ROWS = Rows(row_length=2048, batch_rows=128, layout="filled")
# I: the authors' own rows: one picture and its caption, or one conversation, and padding.
_IMAGE_PADDED = Rows(row_length=1024, batch_rows=256, layout="padded")
_FINETUNE_PADDED = Rows(row_length=2048, batch_rows=256, layout="padded")
_IMAGE_TEXT_MULTIPLE = 20
# K: 20 x the parameters without qk gains.
_IMAGE_TEXT_TOKENS = {"1b": 28_795_904_000}
# K but for 11m: warm-up steps of a re-warmed image-text stage, at a peak of 3e-3 everywhere.
_REWARM_STEPS = {"11m": 100, "79m": 400, "154m": 1000, "411m": 2500, "1b": 5000}
_REWARM_PEAK = 3e-3
# What `midstream import` makes the encoders' folders of. K: Prismatic's DINOv2 has registers.
_TOWERS = {
    "siglip": "google/siglip-so400m-patch14-384",
    "dinov2": "facebook/dinov2-with-registers-large",
}
# K: Prismatic's siglip-vit-so400m-384px, second-to-last block, with the exact GELU of its timm
# (0.9.10; the weights were trained with the tanh's); its DINOv2 partner at 384 pixels.
SIGLIP = EncoderConfig(
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    num_layers=27,
    num_heads=16,
    intermediate_size=4304,
    hidden_act="gelu",
)
DINOV2 = EncoderConfig(
    family="dinov2",
    image_size=384,
    position_size=518,
    patch_size=14,
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    intermediate_size=4096,
    num_registers=4,
    pixel_mean=(0.485, 0.456, 0.406),
    pixel_std=(0.229, 0.224, 0.225),
    hidden_act="gelu",
)
# VizWiz is asked and shown, and in no average (paper, appendix F).
VISUAL_TASKS = ("vqav2", "gqa", "textvqa", "pope", "refcoco", "ocid_ref", "vizwiz")
# The authors' scripts average these (recipe facts 8), Table 7 has BIG-bench CS for BoolQ.
TEXT_TASKS = (
    "agieval_sat_en",
    "arc_easy",
    "bigbench_conceptual_combinations_multiple_choice",
    "boolq",
    "copa",
    "hellaswag",
    "mathqa",
    "piqa",
    "pubmedqa",
)


@dataclass(frozen=True)
class Asked:
    """What a user chooses of a scale of the paper; see `scales.Settings`."""

    inputs: Path | None = None
    rows: Literal["filled", "paper"] = "filled"
    caption: Caption = "random"
    text_mixture: TextMixture | None = None


def paper_scale(name: str, asked: Asked, *, given: bool) -> Scale:
    """A size of OpenLM's decoder; `given`: along imported checkpoints, not a text run here."""
    decoder = DECODERS[name]
    data = world(asked.inputs, None)
    tokens = _IMAGE_TEXT_TOKENS.get(name, _IMAGE_TEXT_MULTIPLE * decoder.num_parameters)
    notes: tuple[str, ...] = ()
    if name == "1b":
        notes = (
            "Where the paper and its run records differ, this follows the records: the text run "
            "and the image-text stages end at a rate of 3e-5 (paper, section 2.1.1: 1e-5), and the "
            "text run has batches of 512 sequences (paper, Table 2: 256).",
        )
    return scale_of(
        name,
        decoder,
        data,
        checkpoints(name, data, asked.inputs)
        if given
        else text_run(name, data, asked.text_mixture or TEXT_RUN),
        asked,
        image_text_tokens=tokens,
        rewarm_peak=_REWARM_PEAK,
        rewarm_steps=_REWARM_STEPS[name],
        text_rates=rates_along(name) if given else (),
        notes=notes,
    )


def scale_of(
    name: str,
    decoder: AnyDecoderConfig,
    data: Prepare,
    text: Pretrain | dict[float, LoadDecoder],
    asked: Asked,
    *,
    image_text_tokens: int,
    rewarm_peak: float,
    rewarm_steps: float | int,
    end_rate: float = END_RATE,
    text_rates: tuple[tuple[int, float], ...] = (),
    notes: tuple[str, ...] = (),
) -> Scale:
    """The paper's settings around a language model and its text run."""
    inputs, paper_rows = asked.inputs, asked.rows == "paper"
    rows, finetune_rows = (
        (_IMAGE_PADDED, _FINETUNE_PADDED) if paper_rows else (_IMAGE_ROWS, _FINETUNE_ROWS)
    )
    steps = image_text_tokens / (rows.row_length * rows.batch_rows)
    encoders: dict[str, Encoder] = {
        "SigLIP": LoadEncoder(towers=(_tower(inputs, "siglip"),), encoder=SIGLIP),
        "SigLIP + DINOv2": LoadEncoder(
            towers=(_tower(inputs, "siglip"), _tower(inputs, "dinov2")),
            encoder=FusedEncoder(towers=(SIGLIP, DINOV2)),
        ),
        "patch projection": PatchProjection(
            image_size=384, patch_size=14, hidden_size=decoder.hidden_size
        ),
    }
    return Scale(
        name=name,
        decoder=decoder,
        data=data,
        text=text,
        encoders=encoders,
        captions=caption_sets(asked.caption, inputs),
        text_sources=asked.text_mixture or IMAGE_TEXT,
        instruct_source="llava",
        interleaved="obelics",
        image_text_tokens=image_text_tokens,
        rewarm=WarmupCosine(
            peak_rate=rewarm_peak, end_rate=end_rate, warmup_fraction=rewarm_steps / steps
        ),
        rows=rows,
        finetune_rows=finetune_rows,
        # K: weight decay. I: z-loss, clipping, beta2, as in DCLM's 1b_1x_fast.json.
        optimizer=AdamW(weight_decay=0.033, z_loss=1e-4),
        finetune_rate=3e-4,
        asked=Evaluation(visual_tasks=VISUAL_TASKS, text_tasks=TEXT_TASKS, max_new_tokens=128),
        seeds=(7,),
        image_text_seed=124,
        by="sequences" if paper_rows else "tokens",
        sampling="replacement",
        end_rate=end_rate,
        text_rates=text_rates,
        notes=(*notes, *_choices(asked)),
    )


def _choices(asked: Asked) -> tuple[str, ...]:
    """What the paper leaves open, and how it is decided here."""
    seen = {
        "random": "a synthetic caption drawn at each view",
        "synthetic": "the first synthetic caption",
        "original": "the text that the picture came with",
    }[asked.caption]
    shares = {
        "filled": "tokens, in rows filled with whole examples (rows='paper' chooses otherwise); "
        "the authors' code seems to count sequences, one picture each",
        "paper": "sequences, one picture each, as the authors' code seems to count them",
    }[asked.rows]
    return (
        "The paper does not say which of DataComp-DR's captions a picture is seen with; here it "
        f"is {seen}.",
        f"Shares of the image-text stage are of {shares}.",
    )


def _tower(inputs: Path | None, name: str) -> Imported:
    return imported(inputs, "encoders", name, _TOWERS[name])
