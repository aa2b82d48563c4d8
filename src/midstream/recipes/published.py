"""Table 1: how others train a model that sees, beside the paper's own way (docs/published.md).

What is trained: K read in the named source, G generally known and not read again, I inferred from
that, U our choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Unpack

from midstream.config import (
    AnyEncoderConfig,
    AnySchedule,
    Attention,
    Constant,
    ContinuedCosine,
    FusedEncoder,
    PatchProjection,
    ProjectorConfig,
    Rows,
    Training,
)
from midstream.config.resolution import at_size
from midstream.recipes.scales import Model, Scale, Settings, find_scale, finetune_stage, mixture
from midstream.study.stages import Continue, Evaluate, Finetune, InitFrom, StartText
from midstream.study.studies import Figure, Line, Study, Table

ONE_PICTURE = "captions with their one picture stand in for text with pictures among it"
MULTITASK = "captions and conversations, half each, stand in for its mixture of tasks"
# Of the rate of the rest where a recipe trains the encoder and its own is not known (U).
A_TENTH = 0.1
# Positions by which the rows of larger pictures grow are a multiple of this.
ROW_MULTIPLE = 64
Rates = Literal["rewarm", "plateau", "continue"]


@dataclass(frozen=True)
class ImageText:
    """An image-text stage: shares of its tokens, what it trains beside the projector, its rate.

    `encoder_rate` is the encoder's over that of the rest; None: frozen. `tokens` is its share of
    the scale's image-text tokens, `side` that of its pictures over those of the stage before, or
    over the encoder's own. Schedules: warmed up again and down to the end (rewarm), or to a plateau
    (plateau), or on from where the stage before ended (continue).
    """

    captions: float
    instruct: float = 0.0
    text: float = 0.0
    encoder_rate: float | None = None
    trains_decoder: bool = True
    schedule: Rates = "rewarm"
    tokens: float = 1.0
    side: float = 1.0


@dataclass(frozen=True)
class Instruct:
    """Fine-tuning on conversations, on pictures as large as those of the stage before; the schedule
    is warmed up again, or goes on."""

    encoder_rate: float | None = None
    schedule: Literal["rewarm", "continue"] = "rewarm"


@dataclass(frozen=True)
class Recipe:
    """A line of Table 1. `completion` of the text run comes first; None: no fine-tuning."""

    name: str
    source: str
    image_text: tuple[ImageText, ...]
    instruct: Instruct | None
    completion: float = 1.0
    attention: Attention = "segments"
    linear_projector: bool = False
    encoder: str = "SigLIP"
    notes: tuple[str, ...] = ()


def _mm1(image: int, text: int) -> Recipe:
    # Everything is trained in both stages (G).
    captions, rest = image / (image + text), text / (image + text)
    return Recipe(
        name=f"MM1 {image}:{text}",
        source="McKinzie et al., 2024, arXiv 2403.09611",
        image_text=(ImageText(captions=captions, text=rest, encoder_rate=A_TENTH),),
        instruct=Instruct(encoder_rate=A_TENTH),
        notes=(ONE_PICTURE, "the projector stands in for its convolutions and pooling"),
    )


# Tokens, schedule and pictures of its two stages.
_PALIGEMMA: tuple[tuple[float, Rates, float], ...] = (
    (0.8, "plateau", 1.0),
    (0.2, "continue", 2.0),
)
# Table 1 in its order, MM1 once for each of its ratios of image-text to text.
RECIPES = (
    # xGen-MM. Encoder frozen, sampler and language model trained (G).
    Recipe(
        name="BLIP3",
        source="Xue et al., 2024, arXiv 2408.08872",
        image_text=(ImageText(captions=1.0),),
        instruct=Instruct(),
        notes=(ONE_PICTURE, "the projector stands in for its token sampler"),
    ),
    # Encoder and language model frozen, what connects them trained (K: pages on arXiv 2204.14198);
    # no fine-tuning (table).
    Recipe(
        name="Flamingo",
        source="Alayrac et al., 2022, arXiv 2204.14198",
        image_text=(ImageText(captions=1.0, trains_decoder=False),),
        instruct=None,
        notes=(
            ONE_PICTURE,
            "the projector stands in for its resampler and the layers that it adds among those of "
            "the language model",
        ),
    ),
    # IDEFICS2, the one over Mistral-7B-v0.1. New parts trained whole, encoder and language model by
    # LoRA (K: its authors' post at its release); the same in fine-tuning (G).
    Recipe(
        name="IDEFICS",
        source="Laurençon et al., 2024, arXiv 2405.02246",
        image_text=(ImageText(captions=1.0, encoder_rate=A_TENTH),),
        instruct=Instruct(encoder_rate=A_TENTH),
        notes=(
            ONE_PICTURE,
            "the projector stands in for its resampler and the layers before it",
            "all weights are trained where it trains adapters of low rank",
        ),
    ),
    *(_mm1(*ratio) for ratio in ((100, 0), (91, 9), (86, 14), (66, 33))),
    # Two towers; first what connects them alone, then joint training with the towers frozen, in
    # fine-tuning all but one tower (K: reports on arXiv 2403.05525). The first stage's tokens are
    # U: it is short, since more of it did not help them (K).
    Recipe(
        name="DeepSeek-VL",
        source="Lu et al., 2024, arXiv 2403.05525",
        image_text=(
            ImageText(captions=1.0, trains_decoder=False, tokens=0.1),
            ImageText(captions=0.15, instruct=0.15, text=0.7, tokens=0.9),
        ),
        instruct=Instruct(encoder_rate=A_TENTH),
        encoder="SigLIP + DINOv2",
        notes=(
            MULTITASK,
            "DINOv2 stands in for SAM, and sees pictures as large as SigLIP's where SAM has larger "
            "ones",
            "one projector stands in for its adaptor of layers for each tower and for both",
            "fine-tuning trains both towers where it keeps SAM as it is",
        ),
    ),
    # First the encoder and the adapter, then everything on pictures of twice the side (224, then
    # 448 pixels), and in fine-tuning all but the encoder (K: reports on arXiv 2308.12966). Its
    # encoder's rate falls by 5 % a layer from the last down (G), over its 48 layers to .38 of it on
    # average (I). The tokens of its two stages are U: half each.
    Recipe(
        name="Qwen-VL",
        source="Bai et al., 2023, arXiv 2308.12966",
        image_text=(
            ImageText(captions=1.0, encoder_rate=0.38, trains_decoder=False, tokens=0.5),
            ImageText(captions=0.5, instruct=0.5, encoder_rate=0.38, tokens=0.5, side=2.0),
        ),
        instruct=Instruct(),
        notes=(
            MULTITASK,
            "the projector stands in for its layer of cross-attention with learned queries",
            "one rate for the encoder stands in for one a layer",
        ),
    ),
    # Nothing frozen, a linear projector, full attention among picture and prompt; a billion
    # examples of 224 pixels, then 50 million of 448 and 10 million of 896 (K: reports on arXiv
    # 2407.07726). A picture has 256, 1,024 or 4,096 tokens (K); with 128 or 512 of text (G) the
    # second stage has a sixth of the tokens of both (I; with the third, which is left out, a
    # quarter): a fifth here. One rate for all (G). Where its rates end is U.
    Recipe(
        name="PaliGemma",
        source="Beyer et al., 2024, arXiv 2407.07726",
        image_text=tuple(
            ImageText(
                captions=0.5,
                instruct=0.5,
                encoder_rate=1.0,
                tokens=tokens,
                schedule=how,
                side=side,
            )
            for tokens, how, side in _PALIGEMMA
        ),
        instruct=Instruct(encoder_rate=1.0, schedule="continue"),
        attention="prefix",
        linear_projector=True,
        notes=(
            MULTITASK,
            "its third size of pictures, four times the side of the first, is left out",
            "the encoder's rate is not warmed up more slowly than that of the rest",
        ),
    ),
    # One stage: conversations, the encoder frozen (K: recipe of its own code).
    Recipe(
        name="Prismatic",
        source="Karamcheti et al., 2024, arXiv 2402.07865",
        image_text=(),
        instruct=Instruct(),
        notes=(
            "the projector is four times as wide between its layers as its own",
            "without an image-text stage it sees fewer tokens than the others",
        ),
    ),
    # The paper's own: 80 % of the text run, then captions among text, the rate going on.
    Recipe(
        name="Ours",
        source="the paper, 10 % images",
        image_text=(ImageText(captions=0.1, text=0.9, schedule="continue"),),
        instruct=Instruct(),
        completion=0.8,
        notes=("the projector is that of its text; its run names say one of three layers",),
    ),
)


STAGES, TRAINED, MIXTURE, SCHEDULE = "stages", "trained", "image-text mixture", "schedule"


def table1(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: int = 4,
    recipes: Sequence[str] = (),
    shrink: float = 1.0,
    **given: Unpack[Settings],
) -> Study:
    """Table 1's recipes trained at one scale, side by side.

    `recipes` picks some by their name (all without it); `epochs` are those of fine-tuning; the
    other settings are those of the paper's studies (`scales.Settings`). Raises ValueError that
    lists the recipes for a name that is none.
    """
    at = find_scale(scale, shrink, **given)
    known = {recipe.name: recipe for recipe in RECIPES}
    if unknown := [name for name in recipes if name not in known]:
        raise ValueError(f"no recipe {unknown[0]!r}; Table 1 has {', '.join(known)}")
    chosen = [known[name] for name in recipes] or list(known.values())
    asked = at.asked
    return Study(
        name=f"published.table1.{scale}",
        question="Which way of training a language model to see works best on equal data?",
        lines=tuple(
            Line(
                name=f"{recipe.name}, seed {seed}",
                axes={"recipe": recipe.name, "seed": seed},
                result=Evaluate(of=trained(at, recipe, seed, epochs), evaluation=asked),
            )
            for recipe, seed in product(chosen, seeds or at.seeds)
        ),
        figure=Figure(x="recipe", x_label="recipe"),
        table=Table(
            title="The recipes of Table 1",
            rows="recipe",
            scores=("stable.vision", "stable.text", *asked.visual_tasks, *asked.text_tasks),
            source="recipes: paper, Table 1",
            labels={recipe.name: words(recipe) for recipe in chosen},
        ),
        notes=(
            *at.notes,
            "Every recipe has this scale's language model, encoder, captions and conversations.",
            *_notes(chosen),
        ),
        text_rates=at.text_rates,
    )


def trained(scale: Scale, recipe: Recipe, seed: int, epochs: int) -> Continue | Finetune:
    """The last training stage of a recipe at a scale."""
    scale = scale.drawn(seed)
    seen: Continue | None = None
    for stage in recipe.image_text:
        seen = _image_text(scale, recipe, stage, seen, seed)
    if recipe.instruct is None:
        assert seen is not None, "a recipe trains something"
        return seen
    before = seen or StartText(
        **scale.text_at(recipe.completion),
        encoder=scale.encoders[recipe.encoder],
        projector=_projector(recipe),
        attention=recipe.attention,
    )
    # As the paper's own fine-tuning in all that a recipe does not say.
    plain = finetune_stage(scale, Model(completion=recipe.completion, seed=seed, epochs=epochs))
    changes: dict[str, object] = {}
    if recipe.instruct.schedule == "continue":
        changes["schedule"] = ContinuedCosine(end_rate=0.0)
    if recipe.instruct.encoder_rate is not None:
        changes["encoder_rate_factor"] = recipe.instruct.encoder_rate
    if seen is not None and seen.model.encoder is not None:
        own, shown = _own(scale, recipe), seen.model.encoder
        changes["rows"] = _rows(plain.training.rows, seen.projector, own, shown)
    training = Training(**{**dict(plain.training), **changes})
    return Finetune(start=before, training=training)


def words(recipe: Recipe) -> dict[str, str]:
    """A recipe's stages, what each trains, its mixtures and schedules, as the table's columns."""
    seen, chat = recipe.image_text, recipe.instruct
    stages = [f"text {recipe.completion:.0%}", *map(_stage_words, seen)]
    learns = [_parts(stage.encoder_rate, stage.trains_decoder) for stage in seen]
    how = [_SCHEDULES[stage.schedule] for stage in seen]
    if chat is not None:
        stages.append("conversations")
        learns.append(_parts(chat.encoder_rate, True))
        how.append(_SCHEDULES[chat.schedule])
    return {
        STAGES: ", ".join(stages),
        TRAINED: "; ".join(learns),
        MIXTURE: "; ".join(_mixed(stage) for stage in seen) or "none",
        SCHEDULE: "; ".join(how),
    }


def _notes(recipes: Sequence[Recipe]) -> list[str]:
    """What stands in for a recipe's own, and recipes that are one and the same here."""
    found: dict[str, list[str]] = {}
    same: dict[tuple[object, ...], list[str]] = {}
    for recipe in recipes:
        for note in recipe.notes:
            found.setdefault(note, []).append(recipe.name)
        trains = (recipe.completion, recipe.image_text, recipe.instruct)
        values = (*trains, recipe.attention, recipe.linear_projector, recipe.encoder)
        same.setdefault(values, []).append(recipe.name)
    notes = [f"{', '.join(names)}: {note}." for note, names in found.items()]
    notes += [
        f"{' and '.join(names)} differ in what stands in here alone, and are one model."
        for names in same.values()
        if len(names) > 1
    ]
    return notes


_SCHEDULES = {
    "rewarm": "warmed up again",
    "plateau": "warmed up again, held",
    "continue": "continued",
}


def _stage_words(stage: ImageText) -> str:
    return "image-text" if stage.side == 1.0 else f"image-text on {stage.side:g} x the side"


def _parts(encoder_rate: float | None, decoder: bool) -> str:
    """What a stage trains, and the encoder's rate where it has one of its own."""
    own = "" if encoder_rate == 1.0 else f" at {encoder_rate:g} x the rate" if encoder_rate else ""
    names = [
        "projector",
        *([] if encoder_rate is None else [f"encoder{own}"]),
        *(["language model"] if decoder else []),
    ]
    return ", ".join(names)


def _mixed(stage: ImageText) -> str:
    shares = {"captions": stage.captions, "conversations": stage.instruct, "text": stage.text}
    return ", ".join(f"{100 * share:.3g} % {name}" for name, share in shares.items() if share)


def _image_text(
    scale: Scale, recipe: Recipe, stage: ImageText, before: Continue | None, seed: int
) -> Continue:
    own = _own(scale, recipe)
    seen = (before.model.encoder if before is not None else None) or own
    image_size = _image_size(seen, stage.side)
    shown = at_size(seen, image_size or seen.image_size, owned=False)
    projector = _projector(recipe)
    return Continue(
        data=scale.data,
        encoder=scale.encoders[recipe.encoder],
        decoder=scale.decoder,
        projector=projector,
        attention=recipe.attention,
        start=scale.start(recipe.completion) if before is None else InitFrom(stage=before),
        training=Training(
            budget=mixture(
                scale, stage.captions, stage.instruct, stage.text, multiple=stage.tokens
            ),
            rows=_rows(scale.rows, projector, own, shown),
            optimizer=scale.optimizer,
            schedule=_schedule(scale, stage, before),
            encoder_rate_factor=stage.encoder_rate,
            freeze_decoder=not stage.trains_decoder,
            seed=seed if scale.image_text_seed is None else scale.image_text_seed,
        ),
        image_size=image_size,
    )


def _own(scale: Scale, recipe: Recipe) -> AnyEncoderConfig:
    """The recipe's encoder on pictures of its own size."""
    given = scale.encoders[recipe.encoder]
    return given if isinstance(given, PatchProjection) else given.encoder


def _image_size(seen: AnyEncoderConfig, side: float) -> int | None:
    """The nearest to `side` times the pictures' that the patches fill; None for the same."""
    patch = seen.towers[0].patch_size if isinstance(seen, FusedEncoder) else seen.patch_size
    return None if side == 1.0 else patch * round(side * seen.image_size / patch)


def _rows(
    rows: Rows, projector: ProjectorConfig, own: AnyEncoderConfig, seen: AnyEncoderConfig
) -> Rows:
    """Rows in which as much text has room beside a picture as beside one of the encoder's own
    size."""
    more = max(
        0, projector.num_features(seen.num_patches) - projector.num_features(own.num_patches)
    )
    length = rows.row_length + ROW_MULTIPLE * -(-more // ROW_MULTIPLE)
    return rows.model_copy(update={"row_length": length})


def _schedule(scale: Scale, stage: ImageText, before: Continue | None) -> AnySchedule:
    # The same number of tokens, whatever the length (paper, Figure 3).
    fraction = min(1.0, scale.rewarm.warmup_fraction / stage.tokens)
    if stage.schedule == "rewarm":
        return scale.rewarm.model_copy(update={"warmup_fraction": fraction})
    if stage.schedule == "plateau":
        return Constant(peak_rate=scale.rewarm.peak_rate, warmup_fraction=fraction)
    # One that goes on from an image-text stage leaves a rate to go on from in fine-tuning.
    end = scale.end_rate if before is None else min(scale.finetune_rate, scale.rewarm.peak_rate / 2)
    return ContinuedCosine(end_rate=end)


def _projector(recipe: Recipe) -> ProjectorConfig:
    return ProjectorConfig(num_layers=1) if recipe.linear_projector else ProjectorConfig()
