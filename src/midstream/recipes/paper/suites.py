"""Several experiments as one, and the runs that the paper's authors list."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, Unpack

from midstream.recipes.paper.figure_studies import (
    figure_4,
    figure_5,
    figure_6,
    figure_7,
    figure_8,
    figure_14,
)
from midstream.recipes.paper.table_studies import (
    table_3,
    table_4,
    table_5,
    table_6,
    table_7,
    table_8,
)
from midstream.recipes.scales import Model, Settings, find_scale, line, models, percent, share_label
from midstream.study.studies import Figure, Study, Suite

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


# Decoded from the run names of the authors' evaluation script (github.com/mlfoundations/open_lm,
# scripts/lm_eval.sh): 279 on the branch prismatic_openlm (names that are commented out included: a
# run is once it is evaluated), 93 more at commit a89c15e7; smaller sizes from lm_eval_154.sh and
# lm_eval_411.sh. Epochs of one mixture and start are fine-tunings of one image-text model; all else
# is equal among the runs of a size (siglip, fused projector, token multiplier 1, seed 124).
# Shares in thousandths of captions, conversations (LLaVA) and text (DCLM), then the fine-tuning
# epochs at each start: "14" is one to four, "34" three and four, "0" none, "124" those three.
_LISTED = """
   0    0 1000  14 14 15 14 14 14
  10    0  990  14 14 14 14 14 0
  50    0  950  14 14 14 14 14 34
 100    0  900  14 14 14 14 14 0
1000    0    0  14 14 14 14 14 0
   8    2  990  14 14 15 14 14 0
  40   10  950  14 14 15 14 14 0
  80   20  900  14 14 15 14 0  0
 800  200    0  14 14 15 14 14 0
   0   10  990  14 14 14 14 14 14
   0   50  950  14 14 14 14 0  14
   0  100  900  14 14 14 14 14 14
   0 1000    0  14 14 14 14 14 14
"""
_LATER = """
  10    0  990  0 0 0 0 0  14
  50    0  950  0 0 0 0 0  12
 100    0  900  0 0 0 0 0  14
1000    0    0  0 0 0 0 0  14
   8    2  990  0 0 0 0 0  14
  40   10  950  0 0 0 0 0  14
  80   20  900  0 0 0 0 14 14
 800  200    0  0 0 0 0 0  14
   0   50  950  0 0 0 0 14 0
 200    0  800  124 124 124 124 124 124
 160   40  800  124 124 124 124 124 124
   0  200  800  124 124 124 124 124 124
"""
# The same of the smaller sizes: captions and conversations 4:1 throughout.
_LISTED_154M = """
   8    2  990  0 15 15 15 15 0
  40   10  950  0 15 0  0  0  0
  80   20  900  0 15 0  0  0  0
 160   40  800  0 15 0  0  0  0
 400  100  500  0 15 0  0  0  0
"""
_LISTED_411M = """
   8    2  990  0 15 15 15 15 0
  40   10  950  0 15 0  15 15 0
  80   20  900  0 15 0  15 15 0
 160   40  800  0 15 0  15 15 0
 400  100  500  0 15 0  15 15 0
"""
_EPOCHS: dict[str, tuple[int, ...]] = {"0": (), "12": (1, 2), "34": (3, 4), "124": (1, 2, 4)}
_EPOCHS |= {"14": (1, 2, 3, 4), "15": (1, 2, 3, 4, 5)}
# Table 4's row of DataComp's own captions.
_OTHER_CAPTIONS = AuthorsRun(0.1, 0.0, 0.9, 0.8, 4, "DataComp")


def _expand(listed: str) -> tuple[AuthorsRun, ...]:
    found = []
    for row in listed.strip().splitlines():
        captions, instruct, text, *columns = row.split()
        shares = int(captions) / 1000, int(instruct) / 1000, int(text) / 1000
        for completion, column in zip(STARTS, columns, strict=True):
            found += [AuthorsRun(*shares, completion, n, "DataComp-DR") for n in _EPOCHS[column]]
    return tuple(found)


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


def figures(scale: str = "pocket", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Suite:
    """Figures 4 to 8 as the paper draws them: one curve each."""
    common: dict[str, Any] = {"scale": scale, "seeds": seeds, **given}
    drawn = (figure_4, figure_5, figure_6, figure_7, figure_8)
    return Suite(
        name=f"paper.figures.{scale}",
        question="When, and how, should a language model first see images?",
        studies=tuple(figure(**common) for figure in drawn),
    )


def sections(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Suite:
    """Sections 3.1 to 3.5 with every model at 1 to 4 epochs (Figure 8: 6), as one suite.

    114 lines and nothing beside them: what sharing their stages saves.
    """
    common: dict[str, Any] = {"scale": scale, "seeds": seeds, **given}
    four = (1, 2, 3, 4)
    figures = (figure_4, figure_5, figure_6, figure_7)
    studies = (*(figure(epochs=four, **common) for figure in figures), figure_8(**common))
    return Suite(
        name=f"paper.sections.{scale}",
        question="What do all models of the paper's sections 3.1 to 3.5 cost together?",
        studies=tuple(study.model_copy(update={"baselines": {}}) for study in studies),
    )


def authors_runs(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """The fine-tuned models that the authors' scripts name: both lists of 1.4B, or those of a size.

    At a size that has no list of its own the lists of 1.4B are asked. Runs on captions that the
    scale does not have are left out, and counted in the notes.
    """
    at = find_scale(scale, **given)
    at = at.others.get("captions", at)
    listed = LISTS.get(scale, LISTS["1b"])
    runs = [run for run in listed if run.caption_set in at.captions]
    lines = [
        line(
            at,
            Model(
                completion=run.completion,
                captions=run.caption_share,
                instruct=run.instruct_share,
                epochs=run.epochs,
                seed=seed,
                caption_set=run.caption_set,
            ),
            image_share=percent(run.caption_share + run.instruct_share),
            instruct_share=percent(run.instruct_share),
            text_completion=100 * run.completion,
            epochs=run.epochs,
            captions=run.caption_set,
        )
        for run, seed in product(runs, seeds or at.seeds)
        if not run.completion or run.completion in at.completions
    ]
    notes = [] if scale in LISTS else [f"{scale} has no list of its own: these are 1.4B's runs."]
    if len(runs) < len(listed):
        notes.append(
            f"{len(listed) - len(runs)} runs on captions that this scale lacks are left out."
        )
    return Study(
        name=f"paper.authors_runs.{scale}",
        question="Which of all mixtures, starts and epochs that the authors ran is best?",
        lines=tuple(lines),
        figure=Figure(
            x="image_share",
            x_label=f"pictures' sources in the image-text stage (% of {at.by})",
            by="text_completion",
        ),
        notes=(*at.notes, *notes),
        text_rates=at.text_rates,
    )


def suite(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Suite:
    """The whole paper: every figure and table, and the authors' other runs, sharing their stages.

    Figure 14 and Table 3 are of 79M models in the paper; here they are of the asked scale too.
    """
    common: dict[str, Any] = {"scale": scale, "seeds": seeds, **given}
    seeded: dict[str, Any] = common if seeds else {**common, "seeds": (7, 365)}
    return Suite(
        name=f"paper.suite.{scale}",
        question="When, and how, should a language model first see images?",
        studies=(
            figure_4(epochs=(1, 2, 3, 4), **common),
            *sections(**common).studies[1:],
            figure_14(**common),
            table_3(**common),
            table_4(**common),
            table_5(**common),
            table_6(**seeded),
            table_7(**common),
            table_8(**common),
            authors_runs(**common),
        ),
    )


def slice_of_four_axes(shrink: float = 1.0, seeds: Sequence[int] = (7, 365, 124)) -> Study:
    """24 pocket models over four axes (start, share, epochs, seed): what timings run."""
    at = find_scale("pocket", shrink=shrink)
    varied = {"completion": (0.0, 0.8), "captions": (0.1, 0.5), "epochs": (1, 2)}
    lines = [
        line(
            at,
            one,
            text_completion=100 * one.completion,
            image_share=percent(one.captions),
            epochs=one.epochs,
        )
        for one in models(at, seeds, **varied)
    ]
    return Study(
        name="paper.slice_of_four_axes",
        question="Do start, share, epochs and seed share what they can?",
        lines=tuple(lines),
        figure=Figure(x="image_share", x_label=share_label(at), by="text_completion"),
    )
