"""Loss and learning rate of a stage over its tokens."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from midstream.report.drawing import SERIES, STYLE, saved

MAX_POINTS = 200


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
        return saved(figure, ("svg",))


def _power(value: float | int) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _bins(lines: Sequence[dict[str, Any]], limit: int) -> list[Sequence[dict[str, Any]]]:
    size = -(-len(lines) // limit)
    return [lines[start : start + size] for start in range(0, len(lines), size)]
