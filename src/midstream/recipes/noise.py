"""Nulls: one recipe repeated, to know its spread, and two arms that differ by their names only."""

from collections.abc import Sequence
from itertools import product
from typing import Unpack

from midstream.recipes.scales import (
    Model,
    Settings,
    claims_of,
    find_scale,
    finetune_stage,
    line_of,
)
from midstream.study.studies import Axis, Figure, Study


def levels(
    scale: str = "pocket",
    repeats: Sequence[int] = (2, 2, 2),
    epochs: int = 4,
    **given: Unpack[Settings],
) -> Study:
    """How much does each level of the chain add to the spread of a score?

    One model (80 % of text, 10 % captions) with `repeats` text runs, as many image-text stages
    behind each, and as many fine-tunings behind those; the report tells each level's own spread.
    Raises ValueError for a scale whose text run is not trained here.
    """
    at = find_scale(scale, **given)
    if len(repeats) != 3 or min(repeats) < 2:
        raise ValueError(
            f"repeats is {list(repeats)}; give three numbers of 2 or more: text runs, image-text "
            "stages of each, fine-tunings of each of those"
        )
    lines = []
    for text, seen, tuned in product(*(range(1, number + 1) for number in repeats)):
        # Every draw has a seed of its own: a second text run is no repetition of the first.
        drawn = at.drawn(text, ("text",)).drawn(100 * text + seen, ("image-text",))
        model = Model(seed=10_000 * text + 100 * seen + tuned, epochs=epochs)
        axes: dict[str, Axis] = {"text_run": text, "image_text_run": seen, "seed": tuned}
        lines.append(line_of(at, finetune_stage(drawn, model), **axes))
    return Study(
        name=f"noise.levels.{at.name}",
        question="How much does each level of the chain add to the spread of a score?",
        lines=tuple(lines),
        figure=Figure(x="text_run", x_label="text run"),
        levels=("text_run", "image_text_run", "seed"),
        notes=at.notes,
    )


def arms(
    scale: str = "pocket", seeds: Sequence[int] = (), epochs: int = 4, **given: Unpack[Settings]
) -> Study:
    """An A/A study: two arms of one recipe with seeds of their own; "the same" is right.

    Each difference is called higher or lower in one study of twenty, as its interval says.
    """
    at = find_scale(scale, **given)
    return Study(
        name=f"noise.arms.{at.name}",
        question="Are two arms that differ by their names only told apart?",
        lines=tuple(
            line_of(
                at,
                finetune_stage(at, Model(epochs=epochs, seed=2 * seed + number)),
                arm=arm,
                seed=seed,
            )
            for seed, (number, arm) in product(seeds or at.seeds, enumerate("AB"))
        ),
        figure=Figure(x="arm", x_label="arm"),
        claims=claims_of(
            "arm",
            "a null: both arms are one recipe",
            ("stable.vision", "A is better than B at vision", "A", "B"),
            ("stable.text", "A is better than B at text", "A", "B"),
        ),
        notes=at.notes,
    )
