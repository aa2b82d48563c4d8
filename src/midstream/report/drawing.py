"""What all figures share: colours, style, where the values of an axis stand, and files."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Place = float | int | str

# Okabe and Ito's colours and two more, told apart with every common colour vision; markers differ
# as well.
SERIES = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a5230",
    "#7d7f00",
)
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
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
FILES = ("svg", "png", "pdf")
# More values than this are drawn to scale, however near they lie.
MAX_EVEN_PLACES = 14


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
    gaps = [right - left for left, right in itertools.pairwise(values)]
    return bool(gaps) and min(gaps) < 0.07 * (values[-1] - values[0])


def set_places(axes: Axes, scale: Scale) -> None:
    """Label the places on the x axis."""
    if scale.numeric and not scale.even and crowded(sorted(scale.at.values())):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return
    names = [f"{place:g}" if isinstance(place, int | float) else place for place in scale.at]
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
