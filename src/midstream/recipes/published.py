"""Table 1: how others train a model that sees, beside the paper's own way (docs/published.md).

What is trained: K read in the named source, G generally known and not read again, U our choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Unpack

from midstream.config import (
    AnySchedule,
    Attention,
    Constant,
    ContinuedCosine,
    ProjectorConfig,
    Training,
)
from midstream.recipes.scales import Model, Scale, Settings, find_scale, finetune_stage, mixture
from midstream.study.stages import Continue, Evaluate, Finetune, InitFrom, StartText
from midstream.study.studies import Figure, Line, Study, Table

ONE_PICTURE = "captions with their one picture stand in for text with pictures among it"
MULTITASK = "captions and conversations, half each, stand in for its mixture of tasks"
LARGER_PICTURES = "pictures keep their size where its second stage has larger ones"
Rates = Literal["rewarm", "plateau", "continue"]
PLATEAU_THEN_ON: tuple[Rates, Rates] = ("plateau", "continue")


@dataclass(frozen=True)
class ImageText:
    """An image-text stage: shares of its tokens, what it trains beside the projector, its rate.

    `tokens` is its share of the scale's image-text tokens. Schedules: warmed up again and down to
    the end (rewarm), or to a plateau (plateau), or on from where the stage before ended (continue).
    """

    captions: float
    instruct: float = 0.0
    text: float = 0.0
    trains_encoder: bool = False
    trains_decoder: bool = True
    schedule: Rates = "rewarm"
    tokens: float = 1.0


@dataclass(frozen=True)
class Instruct:
    """Fine-tuning on conversations; the schedule is warmed up again, or goes on."""

    trains_encoder: bool = False
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
    notes: tuple[str, ...] = ()


def _mm1(image: int, text: int) -> Recipe:
    # Everything is trained in both stages (G).
    captions, rest = image / (image + text), text / (image + text)
    return Recipe(
        name=f"MM1 {image}:{text}",
        source="McKinzie et al., 2024, arXiv 2403.09611",
        image_text=(ImageText(captions=captions, text=rest, trains_encoder=True),),
        instruct=Instruct(trains_encoder=True),
        notes=(ONE_PICTURE, "the projector stands in for its convolutions and pooling"),
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
        image_text=(ImageText(captions=1.0, trains_encoder=True),),
        instruct=Instruct(trains_encoder=True),
        notes=(
            ONE_PICTURE,
            "the projector stands in for its resampler and the layers before it",
            "all weights are trained where it trains adapters of low rank",
        ),
    ),
    *(_mm1(*ratio) for ratio in ((100, 0), (91, 9), (86, 14), (66, 33))),
    # Joint training with the encoder frozen (K: a report on arXiv 2403.05525); the encoder trained
    # in fine-tuning (G, of its two towers the one).
    Recipe(
        name="DeepSeek-VL",
        source="Lu et al., 2024, arXiv 2403.05525",
        image_text=(ImageText(captions=0.15, instruct=0.15, text=0.7),),
        instruct=Instruct(trains_encoder=True),
        notes=(
            MULTITASK,
            "one encoder and the projector stand in for its two towers and their adaptor",
            "the first training of its adaptor alone is left out, as in the table",
        ),
    ),
    # First the encoder and the adapter, then everything, and in fine-tuning all but the encoder (K:
    # reports on arXiv 2308.12966). The tokens of its two stages are U: half each.
    Recipe(
        name="Qwen-VL",
        source="Bai et al., 2023, arXiv 2308.12966",
        image_text=(
            ImageText(captions=1.0, trains_encoder=True, trains_decoder=False, tokens=0.5),
            ImageText(captions=0.5, instruct=0.5, trains_encoder=True, tokens=0.5),
        ),
        instruct=Instruct(),
        notes=(
            MULTITASK,
            "the projector stands in for its layer of cross-attention with learned queries",
            LARGER_PICTURES,
        ),
    ),
    # Nothing frozen, a linear projector, full attention among picture and prompt (K: reports on
    # arXiv 2407.07726). Where its rates end, and its tokens by stage, are U.
    Recipe(
        name="PaliGemma",
        source="Beyer et al., 2024, arXiv 2407.07726",
        image_text=tuple(
            ImageText(captions=0.5, instruct=0.5, trains_encoder=True, tokens=0.5, schedule=how)
            for how in PLATEAU_THEN_ON
        ),
        instruct=Instruct(trains_encoder=True, schedule="continue"),
        attention="prefix",
        linear_projector=True,
        notes=(MULTITASK, LARGER_PICTURES),
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


ENCODER = "SigLIP"
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
        encoder=scale.encoders[ENCODER],
        projector=_projector(recipe),
        attention=recipe.attention,
    )
    # As the paper's own fine-tuning in all that a recipe does not say.
    plain = finetune_stage(scale, Model(completion=recipe.completion, seed=seed, epochs=epochs))
    changes: dict[str, object] = {}
    if recipe.instruct.schedule == "continue":
        changes["schedule"] = ContinuedCosine(end_rate=0.0)
    if recipe.instruct.trains_encoder:
        changes["encoder_rate_factor"] = 1.0
    training = Training(**{**dict(plain.training), **changes})
    return Finetune(start=before, training=training)


def words(recipe: Recipe) -> dict[str, str]:
    """A recipe's stages, what each trains, its mixtures and schedules, as the table's columns."""
    seen, chat = recipe.image_text, recipe.instruct
    stages = [f"text {recipe.completion:.0%}", *("image-text" for _ in seen)]
    learns = [_parts(stage.trains_encoder, stage.trains_decoder) for stage in seen]
    how = [_SCHEDULES[stage.schedule] for stage in seen]
    if chat is not None:
        stages.append("conversations")
        learns.append(_parts(chat.trains_encoder, True))
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
        values = (recipe.completion, recipe.image_text, recipe.instruct, recipe.attention)
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


def _parts(encoder: bool, decoder: bool) -> str:
    names = [
        "projector",
        *(["encoder"] if encoder else []),
        *(["language model"] if decoder else []),
    ]
    return ", ".join(names)


def _mixed(stage: ImageText) -> str:
    shares = {"captions": stage.captions, "conversations": stage.instruct, "text": stage.text}
    return ", ".join(f"{100 * share:.3g} % {name}" for name, share in shares.items() if share)


def _image_text(
    scale: Scale, recipe: Recipe, stage: ImageText, before: Continue | None, seed: int
) -> Continue:
    return Continue(
        data=scale.data,
        encoder=scale.encoders[ENCODER],
        decoder=scale.decoder,
        projector=_projector(recipe),
        attention=recipe.attention,
        start=scale.start(recipe.completion) if before is None else InitFrom(stage=before),
        training=Training(
            budget=mixture(
                scale, stage.captions, stage.instruct, stage.text, multiple=stage.tokens
            ),
            rows=scale.rows,
            optimizer=scale.optimizer,
            schedule=_schedule(scale, stage, before),
            encoder_rate_factor=1.0 if stage.trains_encoder else None,
            freeze_decoder=not stage.trains_decoder,
            seed=seed if scale.image_text_seed is None else scale.image_text_seed,
        ),
    )


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
