"""Whatever the scores are, every point and error bar of a figure lies inside its axes."""

from collections.abc import Callable, Sequence
from typing import Any

import made_studies
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from midstream.report import curves, figures
from midstream.report.figures import Panel, Task, stable_panel, task_panel
from midstream.report.line_rows import Group, Spread

STUDY = made_studies.study({("a",): (0.1,)}, axes=("x",))
TASK = Task("gqa", "vision", 0.25)
SCORES = st.floats(-1, 1, allow_nan=False) | st.sampled_from([-1.0, -0.3, 0.0, 1e-9, 0.3, 1.0])
PLACES = (0.0, 0.2, 1.0)
SLACK = 1e-9


def figure_of(draw: Callable[[], Any], module: Any) -> Figure:
    """The figure that is about to be saved."""
    kept: list[Figure] = []

    def keep(figure: Figure, suffixes: Sequence[str] = ()) -> dict[str, bytes]:
        kept.append(figure)
        return dict.fromkeys(suffixes, b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "saved", keep)
        draw()
    return kept[0]


def require_inside(axes: Axes) -> None:
    """Fails where a limit falls, or what is drawn in data units lies outside them."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < right
    assert bottom < top
    heights = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    within = [line for line in axes.lines if line.get_transform() == axes.transData]
    places = [np.asarray(line.get_xdata(), float) for line in within]
    for item in axes.collections:
        ends = np.concatenate(item.get_segments())
        places.append(ends[:, 0])
        heights.append(ends[:, 1])
    for drawn, low, high in ((places, left, right), (heights, bottom, top)):
        values = np.concatenate([np.empty(0), *drawn])
        values = values[np.isfinite(values)]
        assert (values >= low - SLACK).all()
        assert (values <= high + SLACK).all()


COLUMNS = ("stable.vision", "stable.vision_blind", "stable.text", "gqa.score", "gqa.blind")
# At one to three places of one or two curves, with up to three repetitions.
SCORED = st.lists(
    st.tuples(
        st.sampled_from(PLACES),
        st.sampled_from(["one", "other"]),
        st.fixed_dictionaries(dict.fromkeys(COLUMNS, st.lists(SCORES, max_size=3))),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda found: found[:2],
)


def group(x: float, by: str | None, scores: dict[str, list[float]]) -> Group:
    """The lines at one place."""
    spreads = {
        column: Spread(tuple((f"seed={k}", value) for k, value in enumerate(values)))
        for column, values in scores.items()
    }
    return Group(x, by, 3, spreads)


@settings(max_examples=30, deadline=None)
@given(scored=SCORED, baseline=st.none() | SCORES)
def test_scores_lie_inside_the_axes_of_every_panel_and_up_is_more(
    scored: list[tuple[float, str, dict[str, list[float]]]], baseline: float | None
) -> None:
    groups, beside = [group(*found) for found in scored], {"text only": baseline}
    for panel in (
        stable_panel("vision", {}),
        stable_panel("text", beside),
        task_panel(TASK, beside),
    ):
        axes = Figure().add_subplot()
        figures.draw_panel(axes, STUDY, groups, panel)
        require_inside(axes)


@pytest.mark.parametrize("draw", ["panel_figure", "small_figure", "grid_figure"])
@pytest.mark.parametrize("values", [(-0.2,), (0.001, 0.4)])
def test_every_figure_of_scores_shows_all_of_them(draw: str, values: tuple[float, ...]) -> None:
    groups = [group(x, None, {key: list(values) for key in COLUMNS}) for x in PLACES]
    panels: list[Panel] = [stable_panel("vision", {}), task_panel(TASK, {})]
    shown = panels if draw == "grid_figure" else panels[0]
    figure = figure_of(lambda: getattr(figures, draw)(STUDY, groups, shown), figures)
    for axes in figure.axes:
        require_inside(axes)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1)), min_size=1, max_size=5))
def test_losses_and_rates_lie_inside_their_axes(steps: list[tuple[float, float]]) -> None:
    lines = [
        {"tokens_seen": 100 * k, "loss": loss, "rate": rate}
        | {"held_out": {"web": {"loss": 2 * loss}, "pictures": {"loss": loss + 1}}}
        for k, (loss, rate) in enumerate(steps, start=1)
    ]
    for axes in figure_of(lambda: curves.curve_figure(lines), curves).axes:
        require_inside(axes)


def test_planned_rates_lie_inside_their_axes() -> None:
    drawn = [
        curves.Curve("pretrain", (0, 1_000), (0.0, 3e-3)),
        curves.Curve("continue", (500, 700), (1e-3, 0.0), leaves=500),
    ]
    for axes in figure_of(lambda: curves.rates_figure(drawn, 2), curves).axes:
        require_inside(axes)


def test_dollars_in_a_studys_words_are_no_formula() -> None:
    words = STUDY.figure.model_copy(update={"x_label": r"cost in $\frac{1}{$"})
    study = STUDY.model_copy(update={"figure": words})
    groups = [group(0.5, None, {key: [0.1] for key in COLUMNS})]
    assert figures.small_figure(study, groups, stable_panel("vision", {})).startswith(b"<?xml")
