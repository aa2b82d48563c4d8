"""The figures of a study: scores over its axis; and the style that all figures share."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from midstream.report.line_rows import Group, kind_of
from midstream.study.studies import Study, place_name

Place = float | int | str

# Okabe and Ito's colours and two more, told apart with every common colour vision; markers differ
# as well.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5230", "#7d7f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
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
    "#7a5230": "#b98a62",
    "#7d7f00": "#b9bb3a",
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
    "pdf.fonttype": 42,
    "text.color": INK,
    # A study's "$" is a dollar.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
FILES = ("svg", "png", "pdf")
# More values than this are drawn to scale, however near they lie.
MAX_EVEN_PLACES = 14
# What a digit of a label takes of the x axis.
LETTER_WIDTH = 0.0235

# Names longer than this together stand aslant, more than so many of them steeply.
MAX_NAMES_LENGTH, MAX_ASLANT_NAMES = 30, 5


@dataclass(frozen=True)
class Scale:
    """Where each value of an axis stands; `even` where numbers stand as far apart as names do."""

    at: dict[Place, float]
    numeric: bool
    even: bool

    @property
    def reach(self) -> float:
        """From the first place to the last; 1 for a single one."""
        return max(self.at.values()) - min(self.at.values()) or 1.0


def scale_of(places: Sequence[Place]) -> Scale:
    """Numbers to scale, names evenly; numbers evenly too where some would touch (0, 1, 5, 100)."""
    distinct = list(dict.fromkeys(places))
    numbers = [place for place in distinct if isinstance(place, int | float)]
    if len(numbers) < len(distinct):
        return Scale({place: float(i) for i, place in enumerate(distinct)}, False, False)
    numbers.sort()
    if crowded(numbers) and len(numbers) <= MAX_EVEN_PLACES:
        return Scale({place: float(i) for i, place in enumerate(numbers)}, True, True)
    return Scale({place: float(place) for place in numbers}, True, False)


def crowded(values: Sequence[float | int]) -> bool:
    """Whether two of the rising values lie too near each other for their labels."""
    width = LETTER_WIDTH * max((len(place_name(value)) for value in values), default=0)
    gaps = [right - left for left, right in itertools.pairwise(values)]
    return bool(gaps) and min(gaps) < width * (values[-1] - values[0])


def set_places(axes: Axes, scale: Scale) -> None:
    """Label the places on the x axis."""
    if scale.numeric and not scale.even and crowded(sorted(scale.at.values())):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return
    names = [place_name(place) for place in scale.at]
    axes.set_xticks(list(scale.at.values()), names)
    if not scale.numeric and sum(map(len, names)) > MAX_NAMES_LENGTH:
        axes.tick_params(axis="x", rotation=20 if len(names) <= MAX_ASLANT_NAMES else 60)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")


def saved(figure: Figure, suffixes: Sequence[str] = FILES) -> dict[str, bytes]:
    """The figure as files, by suffix; an SVG has colours for dark pages as well."""
    engine = figure.get_layout_engine()
    if engine is not None:
        # Solved once, not for each file.
        engine.execute(figure)
        figure.set_layout_engine("none")
    files = {}
    for suffix in suffixes:
        stream = io.BytesIO()
        # No dates: the same figure is the same bytes.
        dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        figure.savefig(stream, format=suffix, dpi=160, metadata=dateless)
        files[suffix] = stream.getvalue()
    return files | ({"svg": _with_dark(files["svg"])} if "svg" in files else {})


def _with_dark(svg: bytes) -> bytes:
    """The same drawing with a style sheet that recolours it on a dark screen."""
    text = svg.decode()
    rules = [
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in text
    ]
    sheet = f"<style>@media screen and (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    head, tag, rest = text.partition("<defs>")
    return f"{head}{sheet}{tag}{rest}".encode()


TITLES = {"vision": "Vision: mean score above chance", "text": "Text: mean score above chance"}
# With more curves than this single repetitions and the keys' names give way to the means.
FEW_CURVES = 3
GRID_COLUMNS = 3
# Columns of a key: two of them stand side by side.
KEY_LENGTH = 30
SMALL = STYLE | {"font.size": 9.5, "legend.fontsize": 9, "axes.titlesize": 10.5}


@dataclass(frozen=True)
class Panel:
    """One panel: a score over the study's axis, one curve for each value of `by`.

    `score` and `blind` are columns of `Group.spreads`; `chance` is drawn as a line, and so are
    `baselines`. All from 0 to 1.
    """

    score: str
    title: str
    blind: str | None = None
    chance: float | None = None
    baselines: dict[str, float | int | None] = field(default_factory=dict)
    y_label: str = "score (points)"


def stable_panel(kind: str, baselines: dict[str, float | int | None]) -> Panel:
    """The panel of a stable score, `vision` or `text`; text-only `baselines` only for text."""
    sees, label = kind == "vision", "stable score (points)"
    blind, beside = "stable.vision_blind" if sees else None, {} if sees else baselines
    return Panel(f"stable.{kind}", TITLES[kind], blind, baselines=beside, y_label=label)


def probability_panel(column: str) -> Panel:
    """The panel of a stable score by the probability of right answers."""
    kind, label = kind_of(column).capitalize(), "probability above chance"
    return Panel(column, f"{kind}: {label}", y_label=f"{label} (points)")


@dataclass(frozen=True)
class Task:
    """A benchmark of a study; `kind` is vision or text, `chance` None until it is known."""

    name: str
    kind: str
    chance: float | None


def task_panel(task: Task, baselines: dict[str, float | int | None]) -> Panel:
    """The panel of one benchmark."""
    blind = f"{task.name}.blind" if task.kind == "vision" else None
    return Panel(f"{task.name}.score", task.name, blind, task.chance, baselines)


def panel_figure(study: Study, groups: Sequence[Group], panel: Panel) -> dict[str, bytes]:
    """One panel with its keys, as {"svg": ..., "png": ..., "pdf": ...}.

    Mean over repetitions with its standard deviation, each repetition as a small dot beside it,
    hollow marks at the x values of `study.figure.hollow`; the panel's blind score is a dashed
    line, its baselines are dotted ones.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 3.9))
        axes = figure.add_subplot()
        keys = draw_panel(axes, study, groups, panel)
        axes.set(title=panel.title, xlabel=fill(x_label(study, groups), 46), ylabel=panel.y_label)
        figure.legend(handles=keys, loc="outside lower left", ncols=2, columnspacing=1.2)
        return saved(figure)


def small_figure(study: Study, groups: Sequence[Group], panel: Panel) -> bytes:
    """One panel of many as SVG: small, without keys."""
    with matplotlib.rc_context(SMALL | {"figure.constrained_layout.use": False}):
        figure = Figure(figsize=(3.3, 2.5))
        figure.subplots_adjust(left=0.15, right=0.97, top=0.89, bottom=0.23)
        axes = figure.add_subplot()
        draw_panel(axes, study, groups, panel)
        axes.set(title=panel.title)
        axes.set_xlabel(fill(x_label(study, groups), 46), fontsize=8)
        return saved(figure, ("svg",))["svg"]


def grid_figure(study: Study, groups: Sequence[Group], panels: Sequence[Panel]) -> dict[str, bytes]:
    """Many panels with one set of keys, for print (the paper's Figures 9 to 13)."""
    columns = min(GRID_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(SMALL):
        figure = Figure(figsize=(3.1 * columns, 2.4 * lines + 0.6))
        keys: dict[str, Line2D] = {}
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(lines, columns, number + 1)
            for key in draw_panel(axes, study, groups, panel):
                keys.setdefault(str(key.get_label()), key)
            axes.set(title=panel.title)
            if number % columns == 0:
                axes.set_ylabel(panel.y_label)
        # Once for all panels: it is as long as several of them.
        figure.supxlabel(x_label(study, groups), fontsize=10, color=INK)
        shown = list(keys.values())
        figure.legend(handles=shown, loc="outside lower left", ncols=max(2, 2 * columns - 2))
        return saved(figure)


def x_label(study: Study, groups: Sequence[Group]) -> str:
    """The axis in words; it says where the places do not stand to scale."""
    even = scale_of([group.x for group in groups]).even if groups else False
    return study.figure.x_label + (" \N{MIDDLE DOT} not to scale" if even else "")


def draw_panel(axes: Axes, study: Study, groups: Sequence[Group], panel: Panel) -> list[Line2D]:
    """Draw curves, chance and baselines on axes of their own; returns the legend's keys."""
    keys = _draw_curves(axes, study, groups, panel)
    if panel.chance is not None:
        look: dict[str, Any] = {"color": MUTED, "linestyle": "-.", "linewidth": 1.0}
        axes.axhline(panel.chance, **look)
        keys.append(Line2D([], [], label="chance", **look))
    keys += _draw_baselines(axes, panel.baselines)
    axes.margins(x=0.07, y=0.12)
    if len({group.x for group in groups}) == 1:
        middle = sum(axes.get_xlim()) / 2
        axes.set_xlim(middle - 0.5, middle + 0.5)
    lowest, highest = axes.dataLim.intervaly
    if lowest <= 0 <= highest:
        axes.axhline(0, color=MUTED, linewidth=0.8)
    elif lowest > 0 > axes.get_ylim()[0]:
        axes.set_ylim(bottom=0)  # Only the margin reached below it.
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(length=0)
    return keys


def _draw_curves(axes: Axes, study: Study, groups: Sequence[Group], panel: Panel) -> list[Line2D]:
    about = study.figure
    scale = scale_of([group.x for group in groups])
    curves = list(dict.fromkeys(group.by for group in groups))
    few = len(curves) <= FEW_CURVES
    keys, dots, blind = [], False, False
    for index, by in enumerate(curves):
        own = [group for group in groups if group.by == by]
        look = _look(index)
        # Curves stand side by side by a hair, so that error bars do not hide each other.
        shift = (index - (len(curves) - 1) / 2) * 0.012 * scale.reach
        known = [group for group in own if group.spreads[panel.score].n]
        _draw_curve(axes, known, panel.score, look, about.hollow, scale, shift, single=few)
        dots |= few and any(group.spreads[panel.score].n > 1 for group in known)
        label = "mean ± sd over seeds" if about.by is None else f"{about.by} = {_name(by)}"
        label = fill(label, KEY_LENGTH)
        drawn = {"linewidth": 1.6} if scale.numeric else {"linestyle": "none"}
        keys.append(Line2D([], [], label=label, markersize=8, **drawn, **look))
        if panel.blind is not None:
            seen: list[Any] = [(g.x, g.spreads[panel.blind].mean) for g in own]
            seen = [(scale.at[x] + shift, mean) for x, mean in seen if mean is not None]
            thin: dict[str, Any] = {"color": look["color"], "linewidth": 1.6 if few else 0.8}
            axes.plot([x for x, _ in seen], [y for _, y in seen], "--", **thin)
            blind |= bool(seen)
    if set(about.hollow) & scale.at.keys():
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": PAPER, "linestyle": "none"}
        keys.append(
            Line2D([], [], label="rate warmed up again", color=SERIES[0], markersize=8, **hollow)
        )
    if dots:
        keys.append(Line2D([], [], label="one seed", color=MUTED, marker=".", linestyle="none"))
    if blind:
        keys.append(Line2D([], [], label="blind (wrong picture)", color=MUTED, linestyle="--"))
    set_places(axes, scale)
    return keys


def _look(index: int) -> dict[str, Any]:
    # Beyond the last colour the markers move on by one, so that no pair comes twice.
    turns = index // len(SERIES)
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[(index + turns) % len(MARKERS)]}


def _draw_curve(
    axes: Axes,
    groups: Sequence[Group],
    column: str,
    look: dict[str, Any],
    hollow: Sequence[float | int],
    scale: Scale,
    shift: float,
    *,
    single: bool,
) -> None:
    spreads = [group.spreads[column] for group in groups]
    at = [scale.at[group.x] + shift for group in groups]
    means: list[Any] = [spread.mean for spread in spreads]
    # Between names there is nothing that a line could stand for.
    if scale.numeric:
        axes.plot(at, means, color=look["color"], linewidth=1.6)
    for x, group, spread, mean in zip(at, groups, spreads, means, strict=True):
        values = [value for _, value in spread.values]
        if single and len(values) > 1:
            dots: dict[str, Any] = {"color": look["color"], "alpha": 0.6, "markersize": 5}
            axes.plot([x + 0.025 * scale.reach] * len(values), values, ".", **dots)
        axes.errorbar(
            x,
            mean,
            yerr=spread.sd,
            ecolor=look["color"],
            capsize=3,
            marker=look["marker"],
            markersize=8 if single else 6,
            markerfacecolor=PAPER if group.x in hollow else look["color"],
            markeredgecolor=look["color"],
            markeredgewidth=1.6,
            linestyle="none",
            zorder=4,
        )


def _draw_baselines(axes: Axes, baselines: dict[str, float | int | None]) -> list[Line2D]:
    keys = []
    for index, (name, score) in enumerate(baselines.items()):
        if score is not None:
            dots = (0, (1, 1 + 1.5 * index))
            look: dict[str, Any] = {"color": MUTED, "linestyle": dots, "linewidth": 1.5}
            axes.axhline(score, **look)
            keys.append(Line2D([], [], label=name, **look))
    return keys


def _name(value: float | int | str | None) -> str:
    return str(value) if value is None else place_name(value)
