"""Curves over tokens: rates of a study before it runs, loss and rate of a stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from midstream.config import ContinuedCosine
from midstream.config.training import check_start, rate_at, stage_rate
from midstream.cost.cost import cost
from midstream.cost.graph import order
from midstream.report.figures import FILES, INK, SERIES, STYLE, saved
from midstream.study.imported import Position, open_imported
from midstream.study.label import label
from midstream.study.stages import (
    PLANNED,
    LoadDecoder,
    LoadModel,
    Trained,
    came_from,
    warms_up_moments,
)
from midstream.study.store import Ledger
from midstream.study.studies import AnyStudy

NUM_POINTS = 400
# What the paper draws its image-text stages longer by.
TIMES = 10
NAMES = {
    "pretrain": "text",
    "given": "text, given",
    "continue": "image-text",
    "finetune": "instruct",
}
LINES = {"pretrain": "--", "given": "--", "continue": "-", "finetune": ":"}


@dataclass(frozen=True)
class Curve:
    """A stage's rate over the tokens that its model has seen since its first stage.

    kind: the stage's, or "given" for a text run whose checkpoints are imported.
    """

    kind: str
    tokens: tuple[int, ...]
    rates: tuple[float, ...]
    # Where its chain leaves the text run; 0 for a chain that starts from scratch.
    leaves: int = 0
    # How its chain starts image-text training: "20 %, continued".
    start: str = ""


class _Span(NamedTuple):
    """Where a stage begins on the axis, its tokens, the rate that it goes on from, where its chain
    leaves the text run, and how."""

    first: int
    tokens: int
    parent_rate: float | None
    leaves: int = 0
    start: str = ""


def curves(study: AnyStudy, ledger: Ledger | None = None) -> tuple[list[Curve], list[str]]:
    """Every different curve of the study, and a sentence for each stage that cannot be drawn.

    A text run whose checkpoints are given is one of them. A stage of whole epochs has a length once
    its data is prepared, an imported model a rate where its folder tells one. Raises ValueError for
    a schedule that cannot start.
    """
    spans: dict[str, _Span] = {}
    found: dict[tuple[object, ...], Curve] = {}
    missing: list[str] = []
    for given in filter(None, (one.text_rates for one in study.studies)):
        tokens, rates = zip(*given, strict=True)
        found.setdefault(("given", tokens, rates), Curve("given", tokens, rates))
    for stage in order(study):
        if not isinstance(stage, Trained):
            continue
        span = _span(stage, spans, ledger)
        if isinstance(span, str):
            missing.append(f"{label(stage)}: {span}")
            continue
        spans[stage.name] = span
        check_start(stage.training.schedule, span.parent_rate, label(stage))
        points, warm = range(NUM_POINTS + 1), warms_up_moments(stage)
        how = (span.tokens, span.parent_rate)
        rates = tuple(
            stage_rate(stage.training, round(at / NUM_POINTS * span.tokens), *how, warm=warm)
            for at in points
        )
        tokens = tuple(span.first + at * span.tokens // NUM_POINTS for at in points)
        curve = Curve(stage.kind, tokens, rates, span.leaves, span.start)
        found.setdefault((stage.kind, tokens, rates), curve)
    return list(found.values()), missing


def write_curves(drawn: Sequence[Curve], path: Path) -> None:
    """One picture (.png, .svg or .pdf); ValueError for another ending, or nothing to draw."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path} is no .png, .svg or .pdf")
    if not drawn:
        raise ValueError("no stage of this study has a length yet; prepare its data first")
    path.parent.mkdir(parents=True, exist_ok=True)
    times = stretch(drawn) or 1
    path.write_bytes(rates_figure(drawn, times, (path.suffix[1:],))[path.suffix[1:]])


def stretch(drawn: Sequence[Curve]) -> int | None:
    """How many times longer to draw what follows the text run so that it can be seen.

    Ten times, as the paper does, or less where the longest chain would then take more than a
    quarter of the text run. None without a text run, or where chains can be seen as they are.
    """
    text = max((curve.tokens[-1] for curve in drawn if _is_text(curve)), default=0)
    chains = [curve.tokens[-1] - curve.leaves for curve in drawn if not _is_text(curve)]
    times = min(TIMES, round(0.25 * text / max(chains))) if chains else 0
    return times if times >= 2 else None


def rates_figure(
    drawn: Sequence[Curve], times: int = 1, suffixes: Sequence[str] = FILES
) -> dict[str, bytes]:
    """The rates over tokens, the stages after the text run drawn `times` as long (Figure 3).

    The text run is dashed; each start of image-text training has a colour and a label, and what
    follows it is dotted in the same.
    """
    starts = list(dict.fromkeys(curve.start for curve in drawn if not _is_text(curve)))
    # As many colours as starts, however many there are.
    colours = {start: SERIES[index % len(SERIES)] for index, start in enumerate(starts)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2))
        axes = figure.add_subplot()
        for curve in drawn:
            colour = INK if _is_text(curve) else colours[curve.start]
            by = 1 if _is_text(curve) else times
            at = [curve.leaves + by * (token - curve.leaves) for token in curve.tokens]
            axes.plot(at, curve.rates, color=colour, linestyle=LINES[curve.kind], linewidth=1.6)
        stretched = f"tokens; image stages drawn {times} times as long"
        axes.set_xlabel("tokens seen since the first stage" if times == 1 else stretched)
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(length=0)
        figure.legend(handles=_keys(drawn, colours), loc="outside upper right", ncols=3)
        return saved(figure, suffixes)


def _keys(drawn: Sequence[Curve], colours: Mapping[str, str]) -> list[Line2D]:
    kinds = {curve.kind for curve in drawn} - {"continue"}
    keys = [Line2D([], [], color=colour, label=start) for start, colour in colours.items()]
    return keys + [
        Line2D([], [], color=INK, linestyle=line, label=NAMES[kind])
        for kind, line in LINES.items()
        if kind in kinds
    ]


def _is_text(curve: Curve) -> bool:
    return curve.kind in ("pretrain", "given")


def _span(stage: Trained, spans: dict[str, _Span], ledger: Ledger | None) -> _Span | str:
    """Where a stage stands on the axis, or why that is not known."""
    tokens = cost(stage, ledger).tokens
    if tokens is None:
        return "its length is known once its data is prepared"
    how = "continued" if isinstance(stage.training.schedule, ContinuedCosine) else "warmed up again"
    found = came_from(stage)
    if found is None:
        return _Span(0, tokens, None, start=f"0 %, {how}")
    parent, completion = found
    if isinstance(parent, LoadDecoder | LoadModel):
        first, total, rate = _position(parent)
        share = "given" if not total else f"{100 * first / total:.3g} %"
        return _Span(first, tokens, rate, first, f"{share}, {how}")
    before = spans.get(parent.name)
    if before is None:
        return f"it goes on from {parent.name}, which is not drawn"
    seen = round(completion * before.tokens)
    rate = rate_at(parent.training.schedule, seen, before.tokens, parent_rate=before.parent_rate)
    first = before.first + seen
    if parent.kind == "pretrain":
        return _Span(first, tokens, rate, first, f"{100 * completion:.3g} %, {how}")
    return _Span(first, tokens, rate, before.leaves, before.start)


def _position(stage: LoadDecoder | LoadModel) -> tuple[int, int | None, float | None]:
    """Tokens that an imported model has seen, those of its whole run, and its learning rate."""
    if isinstance(stage, LoadDecoder) and stage.checkpoint.content.startswith(PLANNED):
        return stage.planned_tokens or 0, stage.planned_total_tokens, stage.planned_rate
    position = open_imported(stage.checkpoint).position or Position()
    return position.tokens_seen or 0, position.total_tokens, position.rate


MAX_POINTS = 200


def curve_figure(metrics: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Loss and learning rate of one training stage over its tokens.

    At most 200 points; a point is the mean loss of equally many steps and their last rate. What is
    held out of each source is drawn as points, where it was evaluated.
    """
    if not metrics:
        raise ValueError("no metrics to draw: the stage has taken no step")
    size = -(-len(metrics) // MAX_POINTS)
    bins = [metrics[start : start + size] for start in range(0, len(metrics), size)]
    at = [lines[-1]["tokens_seen"] for lines in bins]
    loss = [fmean(line["loss"] for line in lines) for lines in bins]
    rate = [lines[-1]["rate"] for lines in bins]
    # Fixed margins: a layout that is solved draws each of many figures twice.
    with matplotlib.rc_context(STYLE | {"font.size": 9.5, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(3.6, 2.7))
        figure.subplots_adjust(left=0.19, right=0.96, top=0.97, bottom=0.17, hspace=0.12)
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        upper.plot(at, loss, color=SERIES[0], linewidth=1.4)
        _draw_held_out(upper, metrics)
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
        return saved(figure, ("svg",))


def _draw_held_out(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    """A series of points a source, named in a key; nothing where nothing is held out."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for source, measured in line.get("held_out", {}).items():
            if measured["loss"] is not None:
                points.setdefault(source, []).append((line["tokens_seen"], measured["loss"]))
    for number, (source, places) in enumerate(points.items(), start=2):
        colour = SERIES[number % len(SERIES)]
        axes.plot(*zip(*places, strict=True), "o", markersize=3.5, color=colour, label=source)
    if points:
        axes.legend(title="held out", fontsize=7, title_fontsize=7)


def _power(value: float | int) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
