"""The learning rates of a study before anything runs: `midstream plan --curves`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from midstream.report.drawing import FILES, INK, SERIES, STYLE, saved
from midstream.schedule import check_start, moments_factor, rate_at
from midstream.study.chain import came_from, warms_up_moments
from midstream.study.cost import cost
from midstream.study.graph import order
from midstream.study.imported import open_imported
from midstream.study.ledger import Ledger
from midstream.study.stage import (
    PLANNED,
    LoadDecoder,
    Trained,
)
from midstream.study.studies import AnyStudy

NUM_POINTS = 400
STYLES = {"pretrain": (INK, "-"), "continue": (SERIES[0], "-"), "finetune": (SERIES[1], "--")}
NAMES = {"pretrain": "text", "continue": "image-text", "finetune": "instruct"}


@dataclass(frozen=True)
class Curve:
    """A stage's rate over the tokens that its model has seen since its first stage."""

    stage: str
    kind: str
    tokens: tuple[int, ...]
    rates: tuple[float, ...]
    # Where its chain leaves the text run; 0 for a chain that starts from scratch.
    leaves: int = 0


@dataclass(frozen=True)
class _Span:
    """Where a stage begins on the axis, its tokens, the rate that it goes on from, and where its
    chain leaves the text run."""

    first: int
    tokens: int
    parent_rate: float | None
    leaves: int = 0


def curves(study: AnyStudy, ledger: Ledger | None = None) -> tuple[list[Curve], list[str]]:
    """Every different curve of the study, and a sentence for each stage that cannot be drawn.

    A stage of whole epochs has a length once its data is prepared, an imported model a rate where
    its folder tells one. Raises ValueError for a schedule that cannot start.
    """
    spans: dict[str, _Span] = {}
    found: dict[tuple[object, ...], Curve] = {}
    missing: list[str] = []
    for stage in order(study):
        if not isinstance(stage, Trained):
            continue
        span = _span(stage, spans, ledger)
        if span is None:
            missing.append(f"{stage.name}: its length is known once its data is prepared")
            continue
        spans[stage.name] = span
        check_start(stage.training.schedule, span.parent_rate, stage.name)
        rates = tuple(_rate(stage, span, share / NUM_POINTS) for share in range(NUM_POINTS + 1))
        tokens = tuple(
            span.first + share * span.tokens // NUM_POINTS for share in range(NUM_POINTS + 1)
        )
        curve = Curve(stage.name, stage.kind, tokens, rates, span.leaves)
        found.setdefault((stage.kind, tokens, rates), curve)
    return list(found.values()), missing


def write_curves(drawn: Sequence[Curve], path: Path) -> None:
    """One picture (.png, .svg or .pdf); ValueError for another ending, or nothing to draw."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path} is no .png, .svg or .pdf")
    if not drawn:
        raise ValueError("no stage of this study has a length yet; prepare its data first")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rates_figure(drawn, suffixes=(path.suffix[1:],))[path.suffix[1:]])


def stretch(drawn: Sequence[Curve]) -> int | None:
    """How many times longer to draw what follows the text run so that it can be seen.

    The longest chain then takes a quarter of the text run. None without a text run, or where the
    chains can be seen as they are.
    """
    text = max((curve.tokens[-1] for curve in drawn if curve.kind == "pretrain"), default=0)
    chains = [c.tokens[-1] - c.leaves for c in drawn if c.kind != "pretrain"]
    times = round(0.25 * text / max(chains)) if chains else 0
    return times if times >= 2 else None


def rates_figure(
    drawn: Sequence[Curve], times: int = 1, suffixes: Sequence[str] = FILES
) -> dict[str, bytes]:
    """The rates over tokens, the stages after the text run drawn `times` as long (Figure 3)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8) if times == 1 else (7.2, 3.9))
        axes = figure.add_subplot()
        for curve in drawn:
            colour, line = STYLES[curve.kind]
            at = [curve.leaves + times * (token - curve.leaves) for token in curve.tokens]
            if curve.kind == "pretrain":
                at = list(curve.tokens)
            axes.plot(at, curve.rates, color=colour, linestyle=line, linewidth=1.6)
        label = "tokens seen since the first stage"
        axes.set_xlabel(
            label if times == 1 else f"tokens; image stages drawn {times} times as long"
        )
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(length=0)
        kinds = [kind for kind in STYLES if any(curve.kind == kind for curve in drawn)]
        keys = [
            Line2D([], [], color=STYLES[kind][0], linestyle=STYLES[kind][1], label=NAMES[kind])
            for kind in kinds
        ]
        figure.legend(handles=keys, loc="outside upper right", ncols=len(keys))
        return saved(figure, suffixes)


def _span(stage: Trained, spans: dict[str, _Span], ledger: Ledger | None) -> _Span | None:
    tokens = cost(stage, ledger).tokens
    if tokens is None:
        return None
    found = came_from(stage)
    if found is None:
        return _Span(0, tokens, None)
    parent, completion = found
    if isinstance(parent, LoadDecoder):
        return _Span(0, tokens, _imported_rate(parent))
    before = spans.get(parent.name)
    if before is None:
        return None
    seen = round(completion * before.tokens)
    rate = rate_at(parent.training.schedule, seen, before.tokens, parent_rate=before.parent_rate)
    first = before.first + seen
    return _Span(first, tokens, rate, first if parent.kind == "pretrain" else before.leaves)


def _rate(stage: Trained, span: _Span, share: float) -> float:
    seen = round(share * span.tokens)
    rows = stage.training.rows
    step_tokens = rows.batch_rows * rows.row_length
    rate = rate_at(
        stage.training.schedule,
        seen,
        span.tokens,
        parent_rate=span.parent_rate,
        step_tokens=step_tokens,
    )
    if warms_up_moments(stage):
        rate *= moments_factor(seen, span.tokens, step_tokens=step_tokens)
    return rate


def _imported_rate(stage: LoadDecoder) -> float | None:
    if stage.checkpoint.content.startswith(PLANNED):
        return stage.planned_rate
    position = open_imported(stage.checkpoint).position
    return None if position is None else position.rate
