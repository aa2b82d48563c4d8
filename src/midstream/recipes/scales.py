"""What a study of the paper is made of at each size, and one model of it.

`inputs` is the folder of docs/studies.md; without it a study can be planned and priced.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from midstream.config import (
    DECODERS,
    AnyDecoderConfig,
    Caption,
    ContinuedCosine,
    EncoderConfig,
    Epochs,
    Mixture,
    ProjectorConfig,
    Share,
    Training,
    WarmupCosine,
)
from midstream.recipes.lines import DATACOMP_DR as DATACOMP_DR
from midstream.recipes.lines import (
    LEVELS,
    REWARMED,
    Level,
    TextGiven,
    finetuning,
    imported,
    text_mixture_of,
    text_only,
    world,
)
from midstream.recipes.lines import Scale as Scale
from midstream.recipes.paper_scale import Asked, paper_scale, scale_of
from midstream.recipes.pocket import pocket_scale
from midstream.study.families import PUBLIC_MODELS, rates_along
from midstream.study.imported import ImportRecord, Position, read_import
from midstream.study.stages import PLANNED, Continue, Evaluate, Finetune, Imported, LoadDecoder
from midstream.study.studies import Axis, Claim, Line, line_name

IMPORTED = "imported"
# Along other people's checkpoints (U): image-text tokens a parameter, the share of them that warms
# up again to the run's own peak, and the end as a share of that (the paper's 3e-3 and 3e-5).
IMAGE_TEXT_MULTIPLE = 20
WARMUP_SHARE = 0.05
END_SHARE = 0.01
# Where neither a table nor an import tells the run's peak: the paper's at most of its sizes.
PEAK = 3e-3


def public_scale(name: str, asked: Asked) -> Scale:
    """A public model by its name in `study/families.py`, or the checkpoints of your own.

    Those of your own lie under INPUTS/checkpoints, in folders named by the percentage of their run.
    Raises ValueError where there are none, or where they are not of one model.
    """
    found = _own(asked) if name == IMPORTED else _public(name, asked)
    records = {
        share: read_import(one.folder) for share, (one, _) in found.items() if _is_there(one)
    }
    decoder = _decoder(name, records)
    folders = [one.folder for one, _ in found.values() if _is_there(one)]
    positions = {share: position for share, (_, position) in found.items()}
    positions |= {share: one.position for share, one in records.items() if one.position is not None}
    peak = next((p.peak_rate for p in positions.values() if p.peak_rate), PEAK)
    end = round(END_SHARE * peak, 12)
    tokens = IMAGE_TEXT_MULTIPLE * decoder.num_parameters
    tokenizer = folders[0] / "tokenizer.json" if folders else None
    data = world(asked.inputs if folders else None, tokenizer)
    text = {
        share: LoadDecoder(
            data=data,
            checkpoint=one,
            decoder=decoder,
            planned_rate=positions[share].rate,
            planned_tokens=positions[share].tokens_seen,
            planned_total_tokens=positions[share].total_tokens,
        )
        for share, (one, _) in found.items()
    }
    made = scale_of(
        name,
        decoder,
        data,
        text,
        asked,
        image_text_tokens=tokens,
        rewarm_peak=peak,
        rewarm_steps=0.0,
        end_rate=end,
        text_rates=() if name == IMPORTED else rates_along(PUBLIC_MODELS[name].repository),
        notes=(
            f"{name} is no model of the paper. Settings are the paper's; {IMAGE_TEXT_MULTIPLE} "
            "image-text tokens a parameter, and a rate that is warmed up again to "
            f"{peak:g} or ends at {end:g}, are our choice.",
        ),
    )
    return replace(made, rewarm=made.rewarm.model_copy(update={"warmup_fraction": WARMUP_SHARE}))


def _public(name: str, asked: Asked) -> dict[float, tuple[Imported, Position]]:
    model = PUBLIC_MODELS[name]
    return {
        share: (
            imported(asked.inputs, "checkpoints", f"{name}/{share * 100:.0f}", model.source(share)),
            model.position(share),
        )
        for share in model.revisions
    }


def _own(asked: Asked) -> dict[float, tuple[Imported, Position]]:
    folder = (asked.inputs or Path("INPUTS")) / "checkpoints"
    found: dict[float, tuple[Imported, Position]] = {}
    for path in folder.glob("*") if asked.inputs else ():
        try:
            share = float(path.name) / 100
        except ValueError:
            continue
        found[share] = (imported(asked.inputs, "checkpoints", path.name, ""), Position())
    if not found:
        raise ValueError(
            f"scale 'imported' goes along the checkpoints of {folder}, in folders named by the "
            "percentage of their run (20, 37.5, 100), and there is none; make them with midstream "
            "import and name their folder with --set inputs=DIR"
        )
    return dict(sorted(found.items()))


def _is_there(one: Imported) -> bool:
    return not one.content.startswith(PLANNED)


def _decoder(name: str, records: dict[float, ImportRecord]) -> AnyDecoderConfig:
    """The model that all imported checkpoints are of; as published where none is there."""
    decoder: AnyDecoderConfig | None = None
    for share, record in records.items():
        if isinstance(record.config, EncoderConfig):
            raise ValueError(
                f"the checkpoint at {share:.0%} is a vision encoder, no language model"
            )
        decoder = decoder or record.config
        if record.config != decoder:
            raise ValueError(
                f"the checkpoints at {min(records):.0%} and {share:.0%} are of two models; import "
                "revisions of one, with the same --add-token and --pad-vocab-to"
            )
    return decoder or PUBLIC_MODELS[name].decoder


SIZES = ("pocket", *(size for size in DECODERS if size != "7b"))


class Settings(TypedDict, total=False):
    """What every study of the paper can be given beside its own arguments.

    inputs: the folder of docs/studies.md. text: "trained" runs the text stage here, "given"
    imports its checkpoints; by default trained, but at 1b, whose text run is public and costs 4.3T
    tokens (paper, 2.1.1). rows: "filled" mixes by tokens in filled rows (ours, the default),
    "paper" by sequences with one picture a padded row (inferred of the authors' code). caption:
    which of DataComp-DR's captions is seen: random (the default: a synthetic one drawn at each
    view, as MobileCLIP's training does), synthetic (the first) or original (the alt text); which
    the paper saw is unknown. text_mixture: the text of both stages, one source's name or shares by
    source; by default DCLM with StarCoder and ProofPile, or MathPile. draws: what the repetitions
    draw anew beside fine-tuning, of encoder, text and image-text: with all of them an interval over
    seeds covers the whole chain; by default what the scale's own seeds draw.
    """

    inputs: str
    text: str
    rows: Literal["filled", "paper"]
    caption: Caption
    text_mixture: TextGiven
    draws: Sequence[Level]


def find_scale(name: str, shrink: float = 1.0, **given: Unpack[Settings]) -> Scale:
    """The scale of that name: one of SIZES, a public model, or "imported".

    `shrink` multiplies the pocket scale's budgets, for tests and timings. Raises ValueError for a
    name that is none and for settings that a scale does not have, FileNotFoundError for what
    `inputs` lacks.
    """
    made = _find_scale(name, shrink, given)
    draws = tuple(level for level in LEVELS if level in given.get("draws", ()))
    others = {name: replace(other, draws=draws) for name, other in made.others.items()}
    return replace(made, draws=draws, others=others)


def _find_scale(name: str, shrink: float, given: Settings) -> Scale:
    inputs, text = given.get("inputs", ""), given.get("text", "")
    rows, caption = given.get("rows", "filled"), given.get("caption")
    if name not in (*SIZES, *PUBLIC_MODELS, IMPORTED):
        known = ", ".join((*SIZES, *PUBLIC_MODELS, IMPORTED))
        raise ValueError(f"no scale {name!r}; there are {known}")
    for key, value, values in (
        ("text", text, ("", "given", "trained")),
        ("rows", rows, ("filled", "paper")),
        ("caption", caption, (None, "random", "synthetic", "original")),
    ):
        if value not in values:
            words = " or ".join(repr(one) for one in values if one)
            raise ValueError(f"{key} is {words}, not {value!r}")
    mixture = text_mixture_of(given.get("text_mixture"))
    if name == "pocket":
        if inputs or text == "given":
            raise ValueError("the pocket scale is generated and trains its own text; see own_model")
        if caption not in (None, "original"):
            raise ValueError(
                f"caption={caption!r} is given, but the pocket scale's pictures have their own "
                "captions alone; choose another scale, or leave it out"
            )
        return pocket_scale(shrink, rows, mixture)
    if shrink != 1.0:
        raise ValueError(f"shrink is for the pocket scale, this is {name}")
    asked = Asked(
        inputs=Path(inputs).resolve() if inputs else None,
        rows=rows,
        caption=caption or "random",
        text_mixture=mixture,
    )
    if name in SIZES:
        return paper_scale(name, asked, given=text == "given" or (not text and name == "1b"))
    if text == "trained":
        raise ValueError(f"the text of {name} is there already; leave text='trained' out")
    return public_scale(name, asked)


@dataclass(frozen=True)
class Model:
    """What tells one model of the paper from another; the defaults are those it varies least.

    completion: share of the text run before the first picture. captions, instruct, interleaved:
    shares of the image-text tokens, the rest is text. multiple: image-text tokens over those of
    the scale. projector: the paper's own without one.
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
    interleaved: float = 0.0
    projector: ProjectorConfig | None = None


def image_text_stage(scale: Scale, model: Model) -> Continue:
    """The image-text stage of a model: 0 % and 100 % warm up again, others continue (Figure 3)."""
    scale = scale.drawn(model.seed)
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
        projector=model.projector or ProjectorConfig(),
        start=scale.start(model.completion),
        training=Training(
            budget=mixture(
                scale,
                model.captions,
                model.instruct,
                round(1.0 - model.captions - model.instruct - model.interleaved, 10),
                multiple=model.multiple,
                caption_set=model.caption_set,
                interleaved=model.interleaved,
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
    interleaved: float = 0.0,
) -> Mixture:
    """`multiple` times the scale's image-text tokens: captions, conversations, documents with
    pictures among their text, and text.

    Sources without a share are left out. Raises ValueError for a scale without such documents.
    """
    if interleaved and not scale.interleaved:
        raise ValueError(f"scale {scale.name} has no documents with pictures among their text")
    source, caption = scale.captions[caption_set]
    shares = [
        Share(source=source, share=captions, caption=caption),
        Share(source=scale.instruct_source, share=instruct),
        *([Share(source=scale.interleaved, share=interleaved)] if interleaved else []),
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


def finetune_stage(scale: Scale, model: Model) -> Finetune:
    """Conversations for whole epochs, its own schedule each (paper, section 2.1.3, appendix D)."""
    return Finetune(
        start=image_text_stage(scale, model),
        training=finetuning(
            Epochs(sources=(scale.instruct_source, *scale.talks), epochs=model.epochs),
            scale.finetune_rows,
            rate=scale.finetune_rate,
            seed=model.seed,
            encoder_rate_factor=1.0 if model.trains_encoder else None,
        ),
    )


def line(scale: Scale, model: Model, /, **axes: Axis) -> Line:
    """A model as a line that lies at these axes and its seed; its name is made of them."""
    return line_of(scale, finetune_stage(scale, model), **axes, seed=model.seed)


def line_of(scale: Scale, trained: Continue | Finetune, /, **axes: Axis) -> Line:
    """What a scale asks a trained model, as a line whose name is made of its axes."""
    result = Evaluate(of=trained, evaluation=scale.asked)
    return Line(name=line_name(axes), axes=axes, result=result)


def models(scale: Scale, seeds: Sequence[int], /, **varied: Sequence[Any]) -> Iterator[Model]:
    """Every combination of these fields of a model, once a seed (the scale's own without any)."""
    for values in product(*varied.values(), seeds or scale.seeds):
        yield Model(**dict(zip((*varied, "seed"), values, strict=True)))


def percent(share: float) -> float:
    """A share as it stands on an axis."""
    return round(100 * share, 10)


def text_baselines(scale: Scale, completions: Sequence[float]) -> dict[str, Evaluate]:
    """The text run itself at these shares of its tokens, on the text tasks.

    Shares at which the scale has no weights are left out.
    """
    asked = text_only(scale.asked)
    return {
        f"text only, {share:.0%}": Evaluate(
            of=held["stage"], completion=held["completion"], evaluation=asked
        )
        for share in completions
        if share in scale.completions
        for held in [scale.text_at(share)]
    }


def share_label(at: Scale) -> str:
    """What an axis of shares counts."""
    return f"captions in the image-text stage (% of {at.by})"


def curve_of(epochs: Sequence[int]) -> str | None:
    """The axis that tells curves apart: epochs where there are several."""
    return "epochs" if len(epochs) > 1 else None


def decidable(claims: Sequence[Claim], lines: Sequence[Line]) -> tuple[Claim, ...]:
    """The claims that have lines on both sides."""
    there = [line.axes.items() for line in lines]

    def is_there(place: Mapping[str, Axis]) -> bool:
        return any(place.items() <= axes for axes in there)

    return tuple(one for one in claims if is_there(one.higher) and is_there(one.lower))


def claims_of(axis: str, source: str, *found: tuple[str, str, Axis, Axis]) -> tuple[Claim, ...]:
    """Findings along an axis: the score, what is said, where it is higher and where lower."""
    return tuple(
        Claim(text=text, higher={axis: higher}, lower={axis: lower}, score=score, source=source)
        for score, text, higher, lower in found
    )
