"""More pictures, or the same ones again: the size of a pool × image-text tokens.

A share of captions says how many views of pictures a stage has, not of how many pictures: more
tokens mean new pictures until the source ends, and passes from then on. Here the two move apart.
"""

from collections.abc import Sequence
from itertools import product
from typing import Unpack

from midstream.order.mixture import needs_of
from midstream.recipes.scales import (
    Model,
    Scale,
    Settings,
    decidable,
    find_scale,
    finetune_stage,
    image_text_stage,
    line_of,
)
from midstream.study.stages import Continue, Finetune
from midstream.study.studies import Axis, Claim, Figure, Study

# Ours (U), of the views of pictures in the longest image-text stage: one to four passes over the
# smallest pool, up to one over the largest.
PARTS = (0.25, 0.5, 1.0)
MULTIPLES = (0.25, 0.5, 1.0)
# A limit that no run is meant to reach. It is one for text as well: a plan says where that comes
# again.
MAX_PASSES = 64
# "Scaling Data-Constrained Language Models": up to four passes over text are as good as new text.
REPEATED = "asked of pictures here; of text, up to four passes are as good (arXiv 2305.16264)"


def more_or_again(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: int = 4,
    pools: Sequence[int] = (),
    multiples: Sequence[float] = MULTIPLES,
    share: float = 0.1,
    shrink: float = 1.0,
    **given: Unpack[Settings],
) -> Study:
    """Do more views help because they are of new pictures, or do the same pictures again as well?

    Each of the `pools` (numbers of pictures, each contained in the larger ones) at each of the
    `multiples` of the scale's image-text tokens, of which captions are `share`; by default PARTS of
    as many pictures as the longest of the stages shows. Raises ValueError for fewer than two of
    either, and without pools at a scale that does not say what its captions hold.
    """
    for name, values in (("pools", pools or PARTS), ("multiples", multiples)):
        if len(set(values)) < 2:
            raise ValueError(f"{name} is {list(values)}; give two different ones or more")
    at = find_scale(scale, shrink, **given)
    if not pools:
        views = _views(at, Model(captions=share, multiple=max(multiples)))
        pools = tuple(round(part * views) for part in PARTS)
    lines = [
        line_of(
            at,
            _model(at, pool, Model(0.8, share, 0.0, epochs, seed, multiple=multiple)),
            pool=pool,
            tokens=multiple,
            seed=seed,
        )
        for pool, multiple, seed in product(pools, multiples, seeds or at.seeds)
    ]
    few, many, short, long = min(pools), max(pools), min(multiples), max(multiples)
    return Study(
        name=f"pools.more_or_again.{at.name}",
        question="Do more views of pictures help because the pictures are new, or again as well?",
        lines=tuple(lines),
        figure=Figure(x="pool", x_label="pictures that may be seen", by="tokens"),
        claims=decidable(
            (
                _claim("As many views of more pictures help vision", (many, long), (few, long)),
                _claim("The same pictures again help vision", (few, long), (few, short)),
                _claim("More views of more pictures help vision", (many, long), (few, short)),
                _claim(
                    "As many views of more pictures help text",
                    (many, long),
                    (few, long),
                    score="stable.text",
                ),
            ),
            lines,
        ),
        notes=(
            "tokens: image-text tokens over those of the scale. A pool is the first so many "
            "pictures of the image-text stage's order: with one seed each is contained in the "
            "larger ones, and is seen in the same order until it comes again; so are the other "
            "sources, also where the paper draws with replacement.",
            "Pools are of the image-text stage. What trained the encoder, and the conversations, "
            "are the same in every line and show other pictures as well.",
            *at.notes,
        ),
    )


def _views(scale: Scale, model: Model) -> int:
    """How often the image-text stage of a model shows a picture with its caption, to two digits,
    or as many as there are of them, by what the scale expects of its captions."""
    stage, (source, _) = image_text_stage(scale, model), scale.captions[model.caption_set]
    held = next((one for one in scale.data.expected if one.name == source), None)
    if held is None:
        raise ValueError(
            f"scale {scale.name!r} as it is asked for does not say what {source!r} holds; give "
            "pools as numbers of pictures"
        )
    size = (held.num_tokens + stage.model.image_tokens * held.num_images) / held.num_examples
    needs = needs_of(stage.training.budget, stage.training.rows.row_length, ())
    (need,) = (need for need in needs if need.source == source)
    views = need.amount / (size if need.unit == "tokens" else 1)
    return min(int(float(f"{views:.2g}")), held.num_examples)


def _model(scale: Scale, pool: int, model: Model) -> Finetune:
    """A model of the paper whose image-text stage sees a pool of its captions' pictures."""
    plain = finetune_stage(scale, model)
    assert isinstance(plain.start, Continue), "the paper's models are fine-tuned from one"
    budget, (source, _) = plain.start.training.budget, scale.captions[model.caption_set]
    assert budget.kind == "mixture", "an image-text stage has one"
    shares = tuple(
        one.model_copy(update={"pool": pool}) if one.source == source else one
        for one in budget.shares
    )
    # Drawn with replacement, a picture comes again before others have been seen.
    passes = {"max_epochs": MAX_PASSES, "sampling": "permutation"}
    pooled = budget.model_copy(update={"shares": shares} | passes)
    training = plain.start.training.model_copy(update={"budget": pooled})
    seen = plain.start.model_copy(update={"training": training})
    return plain.model_copy(update={"start": seen})


def _claim(
    text: str, higher: tuple[int, float], lower: tuple[int, float], score: str = "stable.vision"
) -> Claim:
    """A finding at two places, each a pool and a multiple of the tokens."""
    places: list[dict[str, Axis]] = [{"pool": p, "tokens": t} for p, t in (higher, lower)]
    return Claim(text=text, higher=places[0], lower=places[1], score=score, source=REPEATED)
