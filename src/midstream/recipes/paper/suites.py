"""Several experiments as one: the figures, the sections, the whole paper, the authors' runs."""

from collections.abc import Sequence
from itertools import product
from typing import Any, Unpack

from midstream.recipes.authors_runs import LISTS
from midstream.recipes.models import Model, line
from midstream.recipes.paper.common import share_label
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
from midstream.recipes.scales import Settings, find_scale
from midstream.study.studies import Figure, Study, Suite


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
            image_share=round(100 * (run.caption_share + run.instruct_share), 10),
            instruct_share=round(100 * run.instruct_share, 10),
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
    lines = [
        line(
            at,
            Model(completion=start, captions=share, epochs=number, seed=seed),
            text_completion=100 * start,
            image_share=round(100 * share, 10),
            epochs=number,
        )
        for start, share, number, seed in product((0.0, 0.8), (0.1, 0.5), (1, 2), seeds)
    ]
    return Study(
        name="paper.slice_of_four_axes",
        question="Do start, share, epochs and seed share what they can?",
        lines=tuple(lines),
        figure=Figure(x="image_share", x_label=share_label(at), by="text_completion"),
    )
