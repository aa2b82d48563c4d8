"""The fine-tuned runs of the paper's authors, as facts: mixture, start, fine-tuning epochs.

Decoded from the run names in the authors' evaluation script (github.com/mlfoundations/open_lm,
scripts/lm_eval.sh). Its version on the branch prismatic_openlm lists the 279 of AUTHORS_RUNS
(names that are commented out included: a run is commented out once it is evaluated). A later
version (commit a89c15e7) lists the 93 of AUTHORS_LATER_RUNS: what was missing of the grid of 13
mixtures, 6 starts and 4 epochs, mixtures with 20 % of pictures, and one run on other captions.
Beside it lm_eval_154.sh and lm_eval_411.sh list the 40 and 80 of the smaller sizes; of 79M they
name the text run alone. The epochs of one mixture and start are fine-tunings of one image-text
model; all else is equal among the runs of a size (siglip, fused projector, token multiplier 1,
seed 124).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

CaptionSet = Literal["DataComp-DR", "DataComp"]

# Shares of the text run that an image-text stage started from: one column of the tables each.
STARTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class AuthorsRun(NamedTuple):
    """One fine-tuned run: its image-text mixture, where that started, fine-tuning epochs.

    The shares add up to 1; `completion` is the nominal share of the text run done before. The
    captions' data set is stated also where `caption_share` is 0 and it plays no part.
    """

    caption_share: float
    instruct_share: float
    text_share: float
    completion: float
    epochs: int
    caption_set: CaptionSet


# Shares in thousandths of captions, conversations (LLaVA) and text (DCLM), then the fine-tuning
# epochs at each start: "14" is one to four, "34" three and four, "0" none, "124" those three.
_Row = tuple[tuple[int, int, int], str]
_LISTED: tuple[_Row, ...] = (
    ((0, 0, 1000), "14 14 15 14 14 14"),
    ((10, 0, 990), "14 14 14 14 14 0"),
    ((50, 0, 950), "14 14 14 14 14 34"),
    ((100, 0, 900), "14 14 14 14 14 0"),
    ((1000, 0, 0), "14 14 14 14 14 0"),
    ((8, 2, 990), "14 14 15 14 14 0"),
    ((40, 10, 950), "14 14 15 14 14 0"),
    ((80, 20, 900), "14 14 15 14 0 0"),
    ((800, 200, 0), "14 14 15 14 14 0"),
    ((0, 10, 990), "14 14 14 14 14 14"),
    ((0, 50, 950), "14 14 14 14 0 14"),
    ((0, 100, 900), "14 14 14 14 14 14"),
    ((0, 1000, 0), "14 14 14 14 14 14"),
)
_LATER: tuple[_Row, ...] = (
    ((10, 0, 990), "0 0 0 0 0 14"),
    ((50, 0, 950), "0 0 0 0 0 12"),
    ((100, 0, 900), "0 0 0 0 0 14"),
    ((1000, 0, 0), "0 0 0 0 0 14"),
    ((8, 2, 990), "0 0 0 0 0 14"),
    ((40, 10, 950), "0 0 0 0 0 14"),
    ((80, 20, 900), "0 0 0 0 14 14"),
    ((800, 200, 0), "0 0 0 0 0 14"),
    ((0, 50, 950), "0 0 0 0 14 0"),
    ((200, 0, 800), "124 124 124 124 124 124"),
    ((160, 40, 800), "124 124 124 124 124 124"),
    ((0, 200, 800), "124 124 124 124 124 124"),
)
_EPOCHS: dict[str, tuple[int, ...]] = {
    "0": (),
    "12": (1, 2),
    "14": (1, 2, 3, 4),
    "15": (1, 2, 3, 4, 5),
    "34": (3, 4),
    "124": (1, 2, 4),
}
# The same of the smaller sizes: captions and conversations 4:1 throughout.
_LISTED_154M: tuple[_Row, ...] = (
    ((8, 2, 990), "0 15 15 15 15 0"),
    ((40, 10, 950), "0 15 0 0 0 0"),
    ((80, 20, 900), "0 15 0 0 0 0"),
    ((160, 40, 800), "0 15 0 0 0 0"),
    ((400, 100, 500), "0 15 0 0 0 0"),
)
_LISTED_411M: tuple[_Row, ...] = (
    ((8, 2, 990), "0 15 15 15 15 0"),
    ((40, 10, 950), "0 15 0 15 15 0"),
    ((80, 20, 900), "0 15 0 15 15 0"),
    ((160, 40, 800), "0 15 0 15 15 0"),
    ((400, 100, 500), "0 15 0 15 15 0"),
)
# Table 4's row of DataComp's own captions.
_OTHER_CAPTIONS = AuthorsRun(0.1, 0.0, 0.9, 0.8, 4, "DataComp")


def _expand(rows: tuple[_Row, ...]) -> tuple[AuthorsRun, ...]:
    return tuple(
        AuthorsRun(
            caption_share=captions / 1000,
            instruct_share=conversations / 1000,
            text_share=text / 1000,
            completion=completion,
            epochs=epochs,
            caption_set="DataComp-DR",
        )
        for (captions, conversations, text), columns in rows
        for completion, column in zip(STARTS, columns.split(), strict=True)
        for epochs in _EPOCHS[column]
    )


# The first list, by mixture, start and epochs.
AUTHORS_RUNS: tuple[AuthorsRun, ...] = _expand(_LISTED)
# What the later list adds.
AUTHORS_LATER_RUNS: tuple[AuthorsRun, ...] = (*_expand(_LATER), _OTHER_CAPTIONS)
# By size; those of 1.4B together.
LISTS: Mapping[str, tuple[AuthorsRun, ...]] = {
    "154m": _expand(_LISTED_154M),
    "411m": _expand(_LISTED_411M),
    "1b": (*AUTHORS_RUNS, *AUTHORS_LATER_RUNS),
}
