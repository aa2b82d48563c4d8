"""How many pictures each line saw, and how often: the ledger of a study's stages as a table."""

from dataclasses import dataclass
from typing import Any

from midstream.core.tokens import counted
from midstream.report.findings import KIND_NAMES, place
from midstream.report.line_rows import parts_of
from midstream.report.table import Grid
from midstream.study.results import PictureViews, TrainingResult
from midstream.study.store import Ledger
from midstream.study.studies import Line, Study

_SEEING = ("continue", "finetune")
_HEADS = ("stage", "source", "lines", "pictures", "views of each", "seen")
# More rows of words than these stay with the records.
MOST_ROWS = 60


@dataclass(frozen=True)
class Seen:
    """How often a stage of a line, of this kind, showed the pictures of a source."""

    line: Line
    kind: str
    source: str
    views: PictureViews


def seen_records(study: Study, ledger: Ledger) -> list[Seen]:
    """One a line, stage and source of pictures, where the stage is done and counted them."""
    records = []
    for line in study.lines:
        parts = parts_of(line.result)
        for part in (parts[kind] for kind in _SEEING if kind in parts):
            for stage in (*part.before, part.stage):
                if not ledger.is_done(stage):
                    continue
                for name, share in ledger.result(stage, TrainingResult).sources.items():
                    if (views := share.pictures) is not None:
                        records.append(Seen(line, stage.kind, name, views))
    return records


def seen_grid(study: Study, records: list[Seen]) -> Grid:
    """The records as words: what all repetitions at a place saw alike stands once, else as means
    and the span of views."""
    figure = study.figure
    axes = [axis for axis in (figure.x, figure.by) if axis is not None]
    alike: dict[tuple[Any, ...], list[PictureViews]] = {}
    for one in records:
        key = (*(one.line.axes[axis] for axis in axes), one.kind, one.source)
        alike.setdefault(key, []).append(one.views)
    rows = []
    for (*at, kind, source), views in alike.items():
        distinct, number = sum(one.distinct for one in views), sum(one.views for one in views)
        times = sorted({pair[0] for one in views for pair in one.times})
        span = f"{times[0]:,} to {counted(times[-1], 'time')}" if times else "never"
        if len(times) == 1:
            span = counted(times[0], "time")
        where = ", ".join(map(place, at))
        told = (KIND_NAMES[kind], source, str(len(views)), f"{distinct / len(views):,.0f}")
        rows.append((where, *told, f"{number / max(distinct, 1):,.2f}", span))
    left = len(rows) - MOST_ROWS
    notes = ["pictures are told apart by their bytes; means over lines"]
    notes += [f"{left:,} more rows: seen.csv has all of them"] if left > 0 else []
    label = figure.x_label + (f", {figure.by}" if figure.by else "")
    title = f"{study.name}: how often pictures were seen"
    return Grid(title, (label, *_HEADS), tuple(rows[:MOST_ROWS]), tuple(notes))


def flat_records(records: list[Seen]) -> list[dict[str, Any]]:
    """For a file: axes as in results.csv; `times` is "views:pictures", one after the other."""
    return [
        {"line": one.line.name}
        | {f"axis.{axis}": at for axis, at in one.line.axes.items()}
        | {"stage": one.kind, "source": one.source}
        | {"pictures": one.views.distinct, "views": one.views.views}
        | {"times": " ".join(f"{often}:{number}" for often, number in one.views.times)}
        for one in records
    ]
