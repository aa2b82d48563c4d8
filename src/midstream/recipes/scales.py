"""What a study of the paper is made of at each size: models, data, budgets, rates.

`pocket` is generated and runs in minutes. The others of SIZES are the paper's: OpenLM decoders,
SigLIP and DINOv2 as public, three text sources, four caption sets, LLaVA's conversations. The names
of `study/revisions.py` (pythia-160m, ...) are public models along whose checkpoints the study goes,
and `imported` is any model of yours. Their folders are named once, by `inputs`; without it a study
can be planned and priced, and says so when it is to run:

    INPUTS/data/            a world (docs/data.md): text/{dclm,starcoder,proofpile,mathpile},
                            captions/{datacompdr,datacomp,cc12m,shutterstock}, instruct/llava,
                            bench/, tokenizer.json
    INPUTS/encoders/        siglip/ and dinov2/, folders of `midstream import`
    INPUTS/checkpoints/     20/, 40/, 60/, 80/, 100/: the text run's checkpoints, imported; of a
                            public model in a folder of its name
"""

from pathlib import Path
from typing import Literal, TypedDict, Unpack

from midstream.config import DECODERS, Caption
from midstream.recipes.paper_scale import Asked, paper_scale
from midstream.recipes.paper_sources import TextGiven, text_mixture_of
from midstream.recipes.pocket_scale import pocket_scale
from midstream.recipes.public_scale import IMPORTED, public_scale
from midstream.recipes.scale import COMPLETIONS, DATACOMP_DR, Encoder, Scale
from midstream.study.revisions import PUBLIC_MODELS

__all__ = ["COMPLETIONS", "DATACOMP_DR", "SIZES", "Encoder", "Scale", "Settings", "find_scale"]
SIZES = ("pocket", *(size for size in DECODERS if size != "7b"))


class Settings(TypedDict, total=False):
    """What every study of the paper can be given beside its own arguments.

    inputs: the folder of `recipes/scales.py`. text: "trained" runs the text stage here, "given"
    imports its checkpoints; by default trained, but at 1b, whose text run is public and costs 4.3T
    tokens (paper, 2.1.1). rows: "filled" mixes by tokens in filled rows (ours, the default),
    "paper" by sequences with one picture a padded row (inferred of the authors' code). caption:
    which of DataComp-DR's captions is seen: random (the default: a synthetic one drawn at each
    view, as MobileCLIP's training does), synthetic (the first) or original (the alt text); which
    the paper saw is unknown. text_mixture: the text of both stages, one source's name or shares by
    source; by default DCLM with StarCoder and ProofPile, or MathPile.
    """

    inputs: str
    text: str
    rows: Literal["filled", "paper"]
    caption: Caption
    text_mixture: TextGiven


def find_scale(name: str, shrink: float = 1.0, **given: Unpack[Settings]) -> Scale:
    """The scale of that name: one of SIZES, a public model, or "imported".

    `shrink` multiplies the pocket scale's budgets, for tests and timings. Raises ValueError for a
    name that is none and for settings that a scale does not have, FileNotFoundError for what
    `inputs` lacks.
    """
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
