"""The figures: stable scores over the study's axis, loss and learning rate over tokens."""

import io
import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from midstream.report.table import Group, Spread
from midstream.study.studies import Study

# Okabe and Ito's colours, told apart with every common colour vision; markers differ as well.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6470", "#dde2e8", "#ffffff"
# What each colour becomes where the reader prefers a dark page.
DARK = {
    INK: "#e8eaed",
    MUTED: "#a3acb8",
    GRID: "#333a44",
    PAPER: "#1c2027",
    "#0072b2": "#4aa8e8",
    "#d55e00": "#f08a4b",
    "#009e73": "#3fc79c",
}
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "grid.color": GRID,
    "legend.fontsize": 10,
    "legend.frameon": False,
    # The same figure is the same bytes, glyphs included, wherever it is drawn.
    "svg.fonttype": "path",
    "svg.hashsalt": "midstream",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
TITLES = {"vision": "Vision: mean score above chance", "text": "Text: mean score above chance"}
MAX_POINTS = 200


def score_figure(
    study: Study, groups: Sequence[Group], baselines: dict[str, float | int | None], panel: str
) -> dict[str, bytes]:
    """One panel, `vision` or `text`, of the study's figure as {"svg": ..., "png": ...}.

    Mean over repetitions with its standard deviation, each repetition as a small dot beside it,
    hollow marks at the x values of `study.figure.hollow`; in vision the blind score as a dashed
    line, in text the `baselines` (name to stable text score) as dotted ones.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 3.9))
        axes = figure.add_subplot()
        keys = _draw_curves(axes, study, groups, f"stable.{panel}")
        if panel == "text":
            keys += _draw_baselines(axes, baselines)
        axes.margins(x=0.07, y=0.12)
        if axes.dataLim.y0 < 0 < axes.dataLim.y1:
            axes.axhline(0, color=MUTED, linewidth=0.8)
        elif axes.get_ylim()[0] < 0:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(length=0)
        axes.set(title=TITLES[panel], xlabel=study.figure.x_label, ylabel="stable score (points)")
        figure.legend(handles=keys, loc="outside lower left", ncols=2, columnspacing=1.2)
        return _saved(figure)


def curve_figure(metrics: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Loss and learning rate of one training stage over its tokens.

    At most 200 points; a point is the mean loss of equally many steps and their last rate.
    """
    if not metrics:
        raise ValueError("no metrics to draw: the stage has taken no step")
    bins = _bins(metrics, MAX_POINTS)
    at = [lines[-1]["tokens_seen"] for lines in bins]
    loss = [fmean(line["loss"] for line in lines) for lines in bins]
    rate = [lines[-1]["rate"] for lines in bins]
    # Fixed margins: a layout that is solved draws each of many figures twice.
    with matplotlib.rc_context(STYLE | {"font.size": 9.5, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(3.6, 2.7))
        figure.subplots_adjust(left=0.19, right=0.96, top=0.97, bottom=0.17, hspace=0.12)
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        upper.plot(at, loss, color=SERIES[0], linewidth=1.4)
        upper.set_ylabel("loss")
        lower.plot(at, rate, color=SERIES[1], linewidth=1.4)
        lower.set_ylabel("rate")
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_formatter(lambda value, _: _power(value))
        lower.set_xlabel("tokens seen")
        lower.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in (upper, lower):
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(length=0)
        figure.align_ylabels()
        return _saved(figure)


def _draw_curves(axes: Axes, study: Study, groups: Sequence[Group], column: str) -> list[Line2D]:
    """Draw the curve of each value of `by`; returns the legend's keys."""
    about = study.figure
    places = list(dict.fromkeys(group.x for group in groups))
    numeric = all(isinstance(place, int | float) for place in places)
    at: dict[Any, Any] = {place: place if numeric else i for i, place in enumerate(places)}
    reach = max(at.values()) - min(at.values()) or 1
    curves = list(dict.fromkeys(group.by for group in groups))
    keys = []
    for index, by in enumerate(curves):
        own = [group for group in groups if group.by == by]
        look: dict[str, Any] = {
            "color": SERIES[index % len(SERIES)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        # Curves stand side by side by a hair, so that error bars do not hide each other.
        shift = (index - (len(curves) - 1) / 2) * 0.012 * reach
        points = [(at[group.x] + shift, group.spreads[column], group.x) for group in own]
        known = [point for point in points if point[1].n]
        _draw_curve(axes, known, look, about.hollow, 0.025 * reach)
        label = "mean ± sd over seeds" if about.by is None else f"{about.by} = {by}"
        keys.append(Line2D([], [], label=label, markersize=8, linewidth=1.6, **look))
        if column == "stable.vision":
            blind: list[Any] = [
                (at[g.x] + shift, g.spreads["stable.vision_blind"].mean) for g in own
            ]
            seen = [point for point in blind if point[1] is not None]
            axes.plot([x for x, _ in seen], [y for _, y in seen], "--", color=look["color"])
    if set(about.hollow) & set(places):
        hollow: dict[str, Any] = {
            "marker": "o",
            "markerfacecolor": PAPER,
            "color": SERIES[0],
            "linestyle": "none",
        }
        keys.append(Line2D([], [], label="rate warmed up again", markersize=8, **hollow))
    keys.append(Line2D([], [], label="one seed", color=MUTED, marker=".", linestyle="none"))
    if column == "stable.vision":
        keys.append(Line2D([], [], label="blind (wrong picture)", color=MUTED, linestyle="--"))
    names = None if numeric else [str(place) for place in places]
    axes.set_xticks(list(at.values()), names)
    if numeric and _crowded(sorted(at.values())):
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return keys


def _draw_curve(
    axes: Axes,
    points: Sequence[tuple[float | int, Spread, Any]],
    look: dict[str, Any],
    hollow: Sequence[float | int],
    beside: float,
) -> None:
    means: list[Any] = [spread.mean for _, spread, _ in points]
    axes.plot([x for x, _, _ in points], means, color=look["color"], linewidth=1.6)
    for (x, spread, place), mean in zip(points, means, strict=True):
        values = [value for _, value in spread.values]
        if len(values) > 1:
            dots: dict[str, Any] = {"color": look["color"], "alpha": 0.6, "markersize": 5}
            axes.plot([x + beside] * len(values), values, ".", **dots)
        axes.errorbar(
            x,
            mean,
            yerr=spread.sd,
            ecolor=look["color"],
            capsize=3,
            marker=look["marker"],
            markersize=8,
            markerfacecolor=PAPER if place in hollow else look["color"],
            markeredgecolor=look["color"],
            markeredgewidth=1.6,
            linestyle="none",
            zorder=4,
        )


def _draw_baselines(axes: Axes, baselines: dict[str, float | int | None]) -> list[Line2D]:
    keys = []
    for index, (name, score) in enumerate(baselines.items()):
        if score is not None:
            look: dict[str, Any] = {
                "color": MUTED,
                "linestyle": (0, (1, 1 + 1.5 * index)),
                "linewidth": 1.5,
            }
            axes.axhline(score, **look)
            keys.append(Line2D([], [], label=name, **look))
    return keys


def _crowded(values: Sequence[float | int]) -> bool:
    gaps = [right - left for left, right in itertools.pairwise(values)]
    return bool(gaps) and min(gaps) < 0.07 * (values[-1] - values[0])


def _power(value: float | int) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _bins(lines: Sequence[dict[str, Any]], limit: int) -> list[Sequence[dict[str, Any]]]:
    size = -(-len(lines) // limit)
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def _saved(figure: Figure) -> dict[str, bytes]:
    files = {}
    for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix, **options)
        files[suffix] = stream.getvalue()
    return files | {"svg": _with_dark(files["svg"])}


def _with_dark(svg: bytes) -> bytes:
    """The same drawing with a style sheet that recolours it on a dark page."""
    text = svg.decode()
    rules = [
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in text
    ]
    sheet = f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    head, tag, rest = text.partition("<defs>")
    return f"{head}{sheet}{tag}{rest}".encode()
