"""What a study of the paper is made of at each size: models, data, budgets, rates.

`pocket` is generated and runs in minutes. The others are the paper's: OpenLM decoders, SigLIP and
DINOv2 as public, DCLM text, four caption sets, LLaVA's conversations. Their folders are named once,
by `inputs`; without it a study can be planned and priced, and says so when it is to run:

    INPUTS/data/            a world (docs/data.md): text/dclm, captions/{datacompdr,datacomp,cc12m,
                            shutterstock}, instruct/llava, bench/, tokenizer.json
    INPUTS/encoders/        siglip/ and dinov2/, folders of `midstream import`
    INPUTS/checkpoints/     20/, 40/, 60/, 80/, 100/: the text run's checkpoints, imported
"""

from pathlib import Path

from midstream.config import DECODERS
from midstream.recipes.paper_scale import paper_scale
from midstream.recipes.pocket_scale import pocket_scale
from midstream.recipes.scale import COMPLETIONS, DATACOMP_DR, Encoder, Scale

__all__ = ["COMPLETIONS", "DATACOMP_DR", "SIZES", "Encoder", "Scale", "find_scale"]
SIZES = ("pocket", *(size for size in DECODERS if size != "7b"))


def find_scale(name: str, inputs: str = "", text: str = "", shrink: float = 1.0) -> Scale:
    """The scale of that name, over the folder `inputs` where one is given.

    `text`: "trained" runs the text stage here, "given" imports its checkpoints; by default
    trained, but at 1b, whose text run is public and costs 4.3T tokens (paper, 2.1.1). `shrink`
    multiplies the pocket scale's budgets, for tests and timings. Raises ValueError for a name that
    is none, FileNotFoundError for what `inputs` lacks.
    """
    if name not in SIZES:
        raise ValueError(f"no scale {name!r}; there are {', '.join(SIZES)}")
    if text not in ("", "given", "trained"):
        raise ValueError(f"text is 'given' or 'trained', not {text!r}")
    if name != "pocket":
        if shrink != 1.0:
            raise ValueError(f"shrink is for the pocket scale, this is {name}")
        given = text == "given" or (not text and name == "1b")
        return paper_scale(name, Path(inputs).resolve() if inputs else None, given)
    if inputs or text == "given":
        raise ValueError("the pocket scale is generated and trains its own text; see own_model")
    return pocket_scale(shrink)
