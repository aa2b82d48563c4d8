"""Table 1: how others train a model that sees, beside the paper's own way (docs/published.md).

Each recipe over the language model, encoder and data of one scale.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import isqrt
from typing import Unpack

from midstream.config import (
    AnyEncoderConfig,
    AnySchedule,
    AveragePool,
    Constant,
    ContinuedCosine,
    DecoderConfig,
    Evaluation,
    FewShot,
    FusedEncoder,
    GatedBlocks,
    PatchProjection,
    ProjectorConfig,
    Resampler,
    Rows,
    Training,
)
from midstream.config.model import at_size
from midstream.recipes.published_recipes import RECIPES, ImageText, Recipe, with_adapters
from midstream.recipes.scales import Model, Scale, Settings, find_scale, finetune_stage, mixture
from midstream.study.stages import Continue, Evaluate, Finetune, InitFrom, StartText
from midstream.study.studies import Figure, Line, Study, Table

# Positions of a picture that a recipe's connector leaves at the least, where it has so many.
LEAST_FEATURES = 4
RESAMPLER_HEAD = 64
# Conversations that stand in for a mixture of tasks may come again so often (U).
MULTITASK_PASSES = 12
# Of a picture at most: PaliGemma's largest has so many. Stages of larger ones are left out.
MOST_PATCHES = 4096
# Positions by which the rows of larger pictures grow are a multiple of this.
ROW_MULTIPLE = 64
# Of those that Flamingo's authors ask behind (0, 4, 8, 16 and 32: G), the fewest with pictures.
SHOTS = 4
STAGES, TRAINED, MIXTURE, SCHEDULE = "stages", "trained", "image-text mixture", "schedule"
ASKED = "asked"


def table1(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: int = 4,
    recipes: Sequence[str] = (),
    shrink: float = 1.0,
    lora_rank: int | None = None,
    shots: int | None = SHOTS,
    **given: Unpack[Settings],
) -> Study:
    """Table 1's recipes trained at one scale, side by side.

    `recipes` picks some by their name (all without it); `epochs` are those of fine-tuning.
    `lora_rank` gives IDEFICS its adapters, of this rank, where peft is installed. A recipe that is
    not fine-tuned is asked behind `shots` (None: as the others). The other settings are those of
    the paper's studies (`scales.Settings`). Raises ValueError that lists the recipes for a name
    that is none.
    """
    at = find_scale(scale, shrink, **given)
    # With documents among its sources, and benchmarks of several pictures.
    at = at.others.get("interleaved", at)
    known = {recipe.name: recipe for recipe in RECIPES}
    if lora_rank is not None:
        known["IDEFICS"] = with_adapters(known["IDEFICS"], lora_rank)
    if unknown := [name for name in recipes if name not in known]:
        raise ValueError(f"no recipe {unknown[0]!r}; Table 1 has {', '.join(known)}")
    gated = [name for name, one in known.items() if one.connector.gated_every is not None]
    if isinstance(at.decoder, DecoderConfig):
        gated = []
    if refused := [name for name in recipes if name in gated]:
        raise ValueError(
            f"{refused[0]}'s gated blocks stand between those of an OpenLM decoder, and {scale} is "
            "another one; leave the recipe out"
        )
    chosen = [_fitting(at, known[name]) for name in recipes or known if name not in gated]
    left_out = [f"{', '.join(gated)}: left out, {_GATED}."] if gated and not recipes else []
    asked = at.asked
    return Study(
        name=f"published.table1.{scale}",
        question="Which way of training a language model to see works best on equal data?",
        lines=tuple(
            Line(
                name=f"{recipe.name}, seed {seed}",
                axes={"recipe": recipe.name, "seed": seed},
                result=Evaluate(
                    of=trained(at, recipe, seed, epochs), evaluation=_asked(at, recipe, shots)
                ),
            )
            for recipe, seed in product(chosen, seeds or at.seeds)
        ),
        figure=Figure(x="recipe", x_label="recipe"),
        table=Table(
            title="The recipes of Table 1",
            rows="recipe",
            scores=("stable.vision", "stable.text", *asked.visual_tasks, *asked.text_tasks),
            source="recipes: paper, Table 1",
            labels={recipe.name: words(recipe, shots) for recipe in chosen},
        ),
        notes=(
            *at.notes,
            "Every recipe has this scale's language model, captions, documents and conversations, "
            "and all but DeepSeek-VL one encoder.",
            *left_out,
            *_shots_note(chosen, shots),
            *_notes(chosen),
        ),
        text_rates=at.text_rates,
    )


_GATED = "since gated blocks stand between those of an OpenLM decoder alone"


def _asked(scale: Scale, recipe: Recipe, shots: int | None) -> Evaluation:
    """The scale's benchmarks; behind shots, and fixed answers by probability, where nothing taught
    the recipe how they are asked."""
    if recipe.instruct is not None or shots is None:
        return scale.asked
    few = FewShot(num_shots=shots, layout="document")
    fixed = "both" if scale.asked.fixed_answers == "text" else scale.asked.fixed_answers
    return scale.asked.model_copy(update={"few_shot": few, "fixed_answers": fixed})


def _shots_note(recipes: Sequence[Recipe], shots: int | None) -> list[str]:
    names = [recipe.name for recipe in recipes if recipe.instruct is None]
    if not names:
        return []
    how = "without shots" if shots is None else f"behind {shots} training questions with answers"
    return [f"{', '.join(names)}: not fine-tuned, asked {how}; the others are asked as fine-tuned."]


def trained(scale: Scale, recipe: Recipe, seed: int, epochs: int) -> Continue | Finetune:
    """The last training stage of a recipe at a scale."""
    scale, recipe = scale.drawn(seed), _fitting(scale, recipe)
    seen: Continue | None = None
    for number, stage in enumerate(recipe.image_text):
        goes_on = [one.schedule == "continue" for one in recipe.image_text[number + 1 :]]
        seen = _image_text(scale, recipe, stage, seen, seed, sum(goes_on))
    if recipe.instruct is None:
        assert seen is not None, "a recipe trains something"
        return seen
    before = seen or StartText(
        **scale.text_at(recipe.completion),
        encoder=scale.encoders[recipe.encoder],
        projector=_projector(scale, recipe),
        attention=recipe.attention,
    )
    # As the paper's own fine-tuning in all that a recipe does not say.
    plain = finetune_stage(scale, Model(completion=recipe.completion, seed=seed, epochs=epochs))
    changes: dict[str, object] = {"lora": recipe.lora}
    if recipe.instruct.schedule == "continue":
        changes["schedule"] = ContinuedCosine(end_rate=0.0)
    if recipe.instruct.encoder_rate is not None:
        changes["encoder_rate_factor"] = recipe.instruct.encoder_rate
    if seen is not None and seen.model.encoder is not None:
        changes["rows"] = _rows(scale, recipe, plain.training.rows, seen.model.encoder)
    training = Training(**{**dict(plain.training), **changes})
    return Finetune(start=before, training=training)


def _fitting(scale: Scale, recipe: Recipe) -> Recipe:
    """Without the stages whose pictures have too many patches at a scale; the others share their
    tokens."""
    own, side, stages = _own(scale, recipe), 1.0, recipe.image_text
    kept, sides = list[ImageText](), list[str]()
    for stage in stages:
        side *= stage.side
        size = _image_size(own, side) or own.image_size
        # A stage on the encoder's own pictures stays, however many patches they have.
        if side == 1 or at_size(own, size, owned=False).num_patches <= MOST_PATCHES:
            kept.append(stage)
        else:
            sides.append(f"{side:g} x the side")
    if not sides:
        return recipe
    more = sum(one.tokens for one in stages) / sum(one.tokens for one in kept)
    note = f"the stage on pictures of {', '.join(sides)} is left out, its tokens are the others'"
    return replace(
        recipe,
        image_text=tuple(replace(one, tokens=round(one.tokens * more, 6)) for one in kept),
        notes=(*recipe.notes, f"{note}: they have more than {MOST_PATCHES:,} patches"),
    )


def words(recipe: Recipe, shots: int | None = SHOTS) -> dict[str, str]:
    """A recipe's stages, what each trains, its mixtures and schedules and how it is asked, as the
    table's columns."""
    seen, chat = recipe.image_text, recipe.instruct
    stages = [f"text {recipe.completion:.0%}"]
    stages += ["image-text" + f" on {one.side:g} x the side" * (one.side != 1) for one in seen]
    learns = [_parts(recipe, stage.encoder_rate, stage.trains_decoder) for stage in seen]
    how = [_SCHEDULES[stage.schedule] for stage in seen]
    if chat is not None:
        stages.append("conversations")
        learns.append(_parts(recipe, chat.encoder_rate, True))
        how.append(_SCHEDULES[chat.schedule])
    return {
        STAGES: ", ".join(stages),
        TRAINED: "; ".join(learns),
        MIXTURE: "; ".join(_mixed(stage) for stage in seen) or "none",
        SCHEDULE: "; ".join(how),
        ASKED: "as it is" if chat is not None or shots is None else f"behind {shots} shots",
    }


def _notes(recipes: Sequence[Recipe]) -> list[str]:
    """What stands in for a recipe's own, and recipes that are one and the same here."""
    found: dict[str, list[str]] = {}
    same: dict[tuple[object, ...], list[str]] = {}
    for recipe in recipes:
        for note in recipe.notes:
            found.setdefault(note, []).append(recipe.name)
        trains = (recipe.completion, recipe.image_text, recipe.instruct)
        values = (*trains, recipe.attention, recipe.connector, recipe.encoder)
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


def _parts(recipe: Recipe, encoder_rate: float | None, decoder: bool) -> str:
    """What a stage trains, and the encoder's rate where it has one of its own."""
    own = "" if encoder_rate == 1.0 else f" at {encoder_rate:g} x the rate" if encoder_rate else ""
    names = [
        "projector",
        *([] if encoder_rate is None else [f"encoder{own}"]),
        *([("adapters of the " if recipe.lora else "") + "language model"] if decoder else []),
    ]
    return ", ".join(names)


def _mixed(stage: ImageText) -> str:
    shares = {
        "captions": stage.captions,
        "interleaved": stage.interleaved,
        "conversations": stage.instruct,
        "text": stage.text,
    }
    return ", ".join(f"{100 * share:.3g} % {name}" for name, share in shares.items() if share)


def _image_text(
    scale: Scale, recipe: Recipe, stage: ImageText, before: Continue | None, seed: int, later: int
) -> Continue:
    own = _own(scale, recipe)
    seen = (before.model.encoder if before is not None else None) or own
    image_size = _image_size(seen, stage.side)
    budget = mixture(
        scale,
        stage.captions,
        stage.instruct,
        stage.text,
        multiple=stage.tokens,
        interleaved=stage.interleaved,
    )
    if stage.instruct:
        budget = budget.model_copy(update={"max_epochs": max(budget.max_epochs, MULTITASK_PASSES)})
    shown = at_size(seen, image_size or seen.image_size, owned=False)
    return Continue(
        data=scale.data,
        encoder=scale.encoders[recipe.encoder],
        decoder=scale.decoder,
        projector=_projector(scale, recipe),
        attention=recipe.attention,
        start=scale.start(recipe.completion) if before is None else InitFrom(stage=before),
        training=Training(
            budget=budget,
            rows=_rows(scale, recipe, scale.rows, shown),
            optimizer=scale.optimizer,
            schedule=_schedule(scale, stage, before, later),
            encoder_rate_factor=stage.encoder_rate,
            freeze_decoder=not stage.trains_decoder,
            lora=recipe.lora,
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


def _rows(scale: Scale, recipe: Recipe, rows: Rows, seen: AnyEncoderConfig) -> Rows:
    """Rows in which as much text has room beside the most pictures that a conversation shows as
    beside those of the encoder's own size."""
    own, projector = _own(scale, recipe), _projector(scale, recipe)
    sizes = (projector.num_features(one.num_patches) for one in (seen, own))
    more = scale.most_pictures * max(0, next(sizes) - next(sizes))
    length = rows.row_length + ROW_MULTIPLE * -(-more // ROW_MULTIPLE)
    return rows.model_copy(update={"row_length": length})


def _schedule(scale: Scale, stage: ImageText, before: Continue | None, later: int) -> AnySchedule:
    """A stage's rate, where so many `later` image-text stages go on with it."""
    # The same number of tokens, whatever the length (paper, Figure 3).
    fraction = min(1.0, scale.rewarm.warmup_fraction / stage.tokens)
    if stage.schedule == "rewarm":
        return scale.rewarm.model_copy(update={"warmup_fraction": fraction})
    if stage.schedule == "plateau":
        return Constant(peak_rate=scale.rewarm.peak_rate, warmup_fraction=fraction)
    # One that goes on from an image-text stage leaves a rate to go on from, at last in fine-tuning.
    last, peak = min(scale.finetune_rate, scale.rewarm.peak_rate / 2), scale.rewarm.peak_rate
    end = scale.end_rate if before is None else last + (peak - last) * later / (later + 1)
    return ContinuedCosine(end_rate=end)


def _projector(scale: Scale, recipe: Recipe) -> ProjectorConfig:
    """A recipe's connector over the scale's encoder, with as many features of its patches as a
    share of the recipe's own, and at least LEAST_FEATURES."""
    own, connector = _own(scale, recipe), recipe.connector
    if connector.kind in ("mlp", "linear"):
        return ProjectorConfig(num_layers=1 if connector.kind == "linear" else 2)
    wanted = max(min(LEAST_FEATURES, own.num_patches), round(own.num_patches * connector.left))
    if connector.kind == "resampler":
        heads = max(1, own.hidden_size // RESAMPLER_HEAD)
        reduction = Resampler(
            num_latents=wanted,
            num_layers=connector.num_layers,
            num_heads=heads,
            head_dim=min(RESAMPLER_HEAD, own.hidden_size),
        )
        if connector.gated_every is None:
            return ProjectorConfig(reduction=reduction)
        gated = GatedBlocks(
            every=connector.gated_every, num_heads=heads, head_dim=reduction.head_dim
        )
        return ProjectorConfig(num_layers=0, reduction=reduction, gated=gated)
    side = isqrt(own.num_patches)
    windows = [n for n in range(2, side) if side % n == 0 and (side // n) ** 2 >= LEAST_FEATURES]
    if not windows:
        return ProjectorConfig()
    window = min(windows, key=lambda n: abs((side // n) ** 2 - wanted))
    return ProjectorConfig(reduction=AveragePool(window=window))
