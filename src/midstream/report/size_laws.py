"""Laws over the sizes of a study: of held-out losses and effects, and of a size that is left out.

The lines at `Ladder.predict` are in no fit; their means stand beside what the laws tell of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from midstream.core.laws import Losses, Prediction, UnidentifiedError, fit_law, fit_trend
from midstream.report.figures import GRID_COLUMNS, MUTED, PAPER, SERIES, SMALL, saved
from midstream.report.findings import place_words, points, score_name, signed
from midstream.report.line_rows import LineRow, kinds_of, parts_of
from midstream.report.table import Grid
from midstream.report.verdicts import SEED
from midstream.study.results import TrainingResult
from midstream.study.store import Ledger
from midstream.study.studies import Line, Study

Unit = Literal["nats", "points"]
# By place (the axes but size and seed), parameters and seed.
Values = dict[str, dict[int, dict[Any, float]]]
AFTER = {"continue": "after the image-text stage", "finetune": "after fine-tuning"}


@dataclass(frozen=True)
class Rung:
    """The models of one size at one place; `told` is the law's, its interval that of their mean."""

    place: str
    parameters: int
    values: tuple[float, ...]
    predicted: bool
    told: Prediction | None

    @property
    def mean(self) -> float | None:
        """The measured mean; None before there is one."""
        return fmean(self.values) if self.values else None

    @property
    def inside(self) -> bool | None:
        """Whether the mean of a left-out size lies in its interval; None where none can be told."""
        if not self.predicted or self.told is None or self.mean is None:
            return None
        return self.told.holds(self.mean)


@dataclass(frozen=True)
class Laws:
    """One loss or effect over the sizes: its law in words (or why there is none), its rungs."""

    title: str
    unit: Unit
    sentence: str
    rungs: tuple[Rung, ...]
    curves: Mapping[str, Callable[[float], float]]
    signs: bool = False

    def number(self, value: float) -> str:
        """A value in this unit."""
        if self.signs:
            return _changes(value, self.unit)
        return points(value) if self.unit == "points" else f"{value:.4f}"


def _changes(value: float, unit: Unit) -> str:
    """A difference with its sign."""
    return signed(value) if unit == "points" else f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def laws_of(study: Study, rows: Sequence[LineRow], ledger: Ledger) -> list[Laws]:
    """A law for each held-out loss, and for what each other place changes against the first one.

    Empty for a study that is no ladder.
    """
    if study.ladder is None:
        return []
    places, sizes = _places(study), _parameters(study)
    left_out, losses = sizes[study.ladder.predict], _losses(study, ledger)

    def found(title: str, unit: Unit, values: Values, planned: Mapping[str, int], fit: Fit) -> Laws:
        known = dict[str, _Told]()
        seen = {
            place: {
                size: list(own.values()) for size, own in at.items() if size != left_out and own
            }
            for place, at in values.items()
        }
        try:
            known, said = fit(seen, unit)
        except UnidentifiedError as reason:
            said = f"no {'law' if fit is _law else 'line'}, since {reason}"
        rungs = []
        for place, number in planned.items():
            for size in sizes.values():
                own = tuple(values.get(place, {}).get(size, {}).values())
                told = known[place][1](size, len(own) or number) if place in known else None
                rungs.append(Rung(place, size, own, size == left_out, told))
        curves = {place: at for place, (at, _) in known.items()}
        return Laws(title, unit, f"{title}: {said}.", tuple(rungs), curves, signs=fit is not _law)

    scores = {f"stable.{kind}": _scores(study, rows, f"stable.{kind}") for kind in kinds_of(study)}
    effects: list[tuple[str, Unit, Values]] = [
        *((score_name(score), "points", values) for score, values in scores.items()),
        *((title, "nats", values) for title, values in losses.items()),
    ]
    first, *others = places
    return [found(title, "nats", values, places, _law) for title, values in losses.items()] + [
        found(
            f"{title}: {other} less {first}",
            unit,
            {"": _changed(values, first, other)},
            {"": min(places.values())},
            _line,
        )
        for title, unit, values in effects
        for other in others
    ]


# What a law says of one place: the value at a size, and the mean of so many models there.
_Told = tuple[Callable[[float], float], Callable[[int, int], Prediction]]
Fit = Callable[[Losses, Unit], tuple[dict[str, _Told], str]]


def _law(losses: Losses, _: Unit) -> tuple[dict[str, _Told], str]:
    law = fit_law({place: at for place, at in losses.items() if at})
    floors = [
        f"{law.floor(place):.4f}{f' at {place}' if place else ''}"
        if law.floor(place) is not None
        else f"not seen{f' at {place}' if place else ''}"
        for place in law.places
    ]
    found = law.exponent
    return {p: (partial(law.at, p), partial(law.predict, p)) for p in law.places}, (
        f"loss = E + {law.amplitude:.4g} (N / {law.base:,.0f})^\N{MINUS SIGN}{found.value:.3f}, "
        f"exponent {found.low:.3f} to {found.high:.3f}, E {', '.join(floors)}; one model varies "
        f"by {100 * law.spread:.2f} % about it"
    )


def _line(changes: Losses, unit: Unit) -> tuple[dict[str, _Told], str]:
    line = fit_trend(changes[""])
    slope = line.doubling
    value, low, high = (_changes(x, unit) for x in (slope.value, slope.low, slope.high))
    return {"": (line.at, line.predict)}, (
        f"{value} {unit} with each doubling of the decoder, 95 % interval {low} to {high}"
    )


def _place(study: Study, line: Line) -> str:
    """A line's axes but its size and seed, where they differ in the study."""
    assert study.ladder is not None, "asked of ladders only"
    others = [axis for axis in line.axes if axis not in (study.ladder.axis, SEED)]
    varied = [axis for axis in others if len({one.axes.get(axis) for one in study.lines}) > 1]
    return place_words({axis: line.axes[axis] for axis in varied})


def _places(study: Study) -> dict[str, int]:
    """Every place, and how many models of each size are planned there."""
    seeds: dict[str, set[Any]] = {}
    for line in study.lines:
        seeds.setdefault(_place(study, line), set()).add(line.axes.get(SEED))
    return {place: len(own) for place, own in seeds.items()}


def _parameters(study: Study) -> dict[Any, int]:
    """The decoder's parameters by place of the ladder's axis, smallest first."""
    assert study.ladder is not None, "asked of ladders only"
    axis = study.ladder.axis
    found = {line.axes[axis]: line.result.of.model.decoder.num_parameters for line in study.lines}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _losses(study: Study, ledger: Ledger) -> dict[str, Values]:
    """Held-out losses by source and stage; those of fine-tuning where it is of its own source."""
    found: dict[str, Values] = {}
    for line in study.lines:
        for kind, part in parts_of(line.result).items():
            if kind not in AFTER or not ledger.is_done(part.stage):
                continue
            for source, held in ledger.result(part.stage, TrainingResult).held_out.items():
                if held.loss is not None:
                    title = f"loss on held-out {source}, {AFTER[kind]}"
                    _put(found.setdefault(title, {}), study, line, held.loss)
    return found


def _scores(study: Study, rows: Sequence[LineRow], column: str) -> Values:
    by_name = {row.name: row for row in rows if row.role == "line"}
    found: Values = {}
    for line in study.lines:
        value = by_name[line.name].values[column]
        if value is not None:
            _put(found, study, line, value)
    return found


def _put(values: Values, study: Study, line: Line, value: float) -> None:
    size = line.result.of.model.decoder.num_parameters
    at = values.setdefault(_place(study, line), {}).setdefault(size, {})
    at[line.axes.get(SEED)] = value


def _changed(values: Values, first: str, other: str) -> dict[int, dict[Any, float]]:
    """Other less first by size, for the seeds that have both."""
    one, two = values.get(first, {}), values.get(other, {})
    return {
        size: {seed: value - one[size][seed] for seed, value in own.items() if seed in one[size]}
        for size, own in two.items()
        if size in one
    }


def ladder_grid(study: Study, laws: Sequence[Laws]) -> Grid:
    """Every rung: what was measured, what the law tells, whether a left-out size lies inside."""
    heads = ("what", "place", "parameters", "models", "measured", "law", "95 % interval", "inside")
    rows = tuple(
        (
            law.title,
            rung.place or "–",
            f"{rung.parameters:,}" + (", left out" if rung.predicted else ""),
            str(len(rung.values)),
            _measured(law, rung),
            "–" if rung.told is None else law.number(rung.told.value),
            f"{law.number(rung.told.low)} to {law.number(rung.told.high)}"
            if rung.told is not None and rung.predicted
            else "–",
            {None: "–", True: "yes", False: "no"}[rung.inside],
        )
        for law in laws
        for rung in law.rungs
    )
    note = (
        "measured: mean ± standard deviation over seeds; losses in nats, scores in points; the "
        "interval is that of a mean of so many further models, and told of the size that no law "
        "was fitted to"
    )
    return Grid(f"{study.name}: sizes", heads, rows, (note,))


def ladder_records(laws: Sequence[Laws]) -> list[dict[str, Any]]:
    """The rungs with all digits."""
    return [
        {
            "what": law.title,
            "place": rung.place,
            "parameters": rung.parameters,
            "left_out": rung.predicted,
            "n": len(rung.values),
            "mean": rung.mean,
            "sd": stdev(rung.values) if len(rung.values) > 1 else None,
            "law": rung.told and rung.told.value,
            "low": rung.told and rung.told.low,
            "high": rung.told and rung.told.high,
            "inside": rung.inside,
        }
        for law in laws
        for rung in law.rungs
    ]


def _measured(law: Laws, rung: Rung) -> str:
    if rung.mean is None:
        return "missing"
    if len(rung.values) < 2:
        return law.number(rung.mean)
    spread = stdev(rung.values)
    return f"{law.number(rung.mean)} ± " + (
        points(spread) if law.unit == "points" else f"{spread:.4f}"
    )


def ladder_figure(laws: Sequence[Laws]) -> dict[str, bytes]:
    """A panel a law: means with their spread, the law, and the left-out size's interval, hollow."""
    columns = min(GRID_COLUMNS, len(laws))
    lines = -(-len(laws) // columns)
    with matplotlib.rc_context(SMALL):
        figure = Figure(figsize=(max(3.4 * columns, 4.2), 2.9 * lines))
        for number, law in enumerate(laws):
            axes = figure.add_subplot(lines, columns, number + 1)
            _draw(axes, law)
        figure.supxlabel("decoder parameters", fontsize=10)
        return saved(figure)


def _draw(axes: Axes, law: Laws) -> None:
    scale = 100 if law.unit == "points" else 1
    sizes = sorted({rung.parameters for rung in law.rungs})
    along = np.geomspace(sizes[0], sizes[-1], 60)
    for number, place in enumerate(dict.fromkeys(rung.place for rung in law.rungs)):
        colour = SERIES[number % len(SERIES)]
        if place in law.curves:
            told = [scale * law.curves[place](float(size)) for size in along]
            axes.plot(along, told, color=colour, linewidth=1.2, label=place or None)
        for rung in (one for one in law.rungs if one.place == place):
            if rung.predicted and rung.told is not None:
                ends = [
                    [scale * (rung.told.value - rung.told.low)],
                    [scale * (rung.told.high - rung.told.value)],
                ]
                hollow: dict[str, Any] = {"markerfacecolor": PAPER, "markersize": 7, "capsize": 4}
                at = [rung.parameters], [scale * rung.told.value]
                axes.errorbar(*at, yerr=ends, fmt="o", color=colour, **hollow)
            if rung.mean is not None:
                spread = scale * stdev(rung.values) if len(rung.values) > 1 else None
                filled: dict[str, Any] = {"markersize": 4, "elinewidth": 0.8, "capsize": 2}
                at = [rung.parameters], [scale * rung.mean]
                axes.errorbar(*at, yerr=spread, fmt="o", color=colour, **filled)
    if law.signs:
        axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(length=0)
    axes.set_title(law.title.replace(", after", ",\nafter").replace(": ", ":\n"), fontsize=8)
    axes.set_ylabel(law.unit)
    if len(law.curves) > 1:
        axes.legend(fontsize=7)
