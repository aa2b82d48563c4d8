"""Nulls: one recipe repeated, to know its spread, and two arms that differ by their names only."""

from collections.abc import Sequence
from itertools import product
from typing import Unpack

from midstream.recipes.scales import (
    Model,
    Scale,
    Settings,
    claims_of,
    find_scale,
    finetune_stage,
    line,
)
from midstream.study.stages import Evaluate
from midstream.study.studies import Axis, Figure, Line, Study, line_name


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
        axes = {"text_run": text, "image_text_run": seen, "seed": tuned}
        # Every draw has a seed of its own: a second text run is no repetition of the first.
        numbers = (text, 100 * text + seen, 10_000 * text + 100 * seen + tuned)
        lines.append(Line(name=line_name(axes), axes=axes, result=_evaluated(at, numbers, epochs)))
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
    lines = []
    for seed, (number, arm) in product(seeds or at.seeds, enumerate("AB")):
        made = line(at, Model(epochs=epochs, seed=2 * seed + number), arm=arm)
        axes: dict[str, Axis] = {"arm": arm, "seed": seed}
        lines.append(Line(name=line_name(axes), axes=axes, result=made.result))
    return Study(
        name=f"noise.arms.{at.name}",
        question="Are two arms that differ by their names only told apart?",
        lines=tuple(lines),
        figure=Figure(x="arm", x_label="arm"),
        claims=claims_of(
            "arm",
            "a null: both arms are one recipe",
            ("stable.vision", "A is better than B at vision", "A", "B"),
            ("stable.text", "A is better than B at text", "A", "B"),
        ),
        notes=at.notes,
    )


def _evaluated(scale: Scale, numbers: tuple[int, int, int], epochs: int) -> Evaluate:
    text, seen, tuned = numbers
    drawn = scale.drawn(text, ("text",)).drawn(seen, ("image-text",))
    return Evaluate(
        of=finetune_stage(drawn, Model(seed=tuned, epochs=epochs)), evaluation=scale.asked
    )
