"""Table 1: how others train a model that sees, beside the paper's own way, at one scale.

The recipes themselves are in `published_recipes.py`; here they become stages. All start from one
text run, see the same image-text tokens (but for Prismatic, which has no such stage) and learn from
the same conversations, so that what differs between lines is what Table 1 tells of them.
"""

from collections.abc import Sequence
from itertools import product
from typing import Unpack

from midstream.config import (
    AnySchedule,
    Constant,
    ContinuedCosine,
    ProjectorConfig,
    Training,
)
from midstream.recipes.models import Model, finetune_stage, mixture
from midstream.recipes.published_recipes import ImageText, Recipe, table_of_recipes
from midstream.recipes.scales import Scale, Settings, find_scale
from midstream.study.stage import Continue, Evaluate, Finetune, InitFrom, StartText
from midstream.study.studies import Figure, Line, Study, Table

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
    known = {recipe.name: recipe for recipe in table_of_recipes()}
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
