"""A study's tables as files: CSV with all digits, LaTeX to \\input."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.report.latex import Grid, to_latex
from midstream.report.printed import View, view_grid, view_records
from midstream.report.spread import Spread
from midstream.report.table import Group, stable_of, tasks_of
from midstream.report.words import (
    KIND_NAMES,
    duration,
    engineering,
    place,
    points,
    score_name,
    signed,
)
from midstream.storage import write_bytes
from midstream.study.studies import Study

Record = dict[str, Any]


@dataclass(frozen=True)
class Export:
    """One table under a file name: words for people, records with all digits."""

    name: str
    grid: Grid
    records: tuple[Record, ...]


def exports(
    study: Study,
    groups: Sequence[Group],
    pairs: Sequence[Record],
    costs: Sequence[Record],
    view: View | None,
) -> list[Export]:
    """Means, differences on the same examples, cost, and the study's own table if it has one."""
    made = [scores_export(study, groups), _cost_export(study, costs)]
    if pairs:
        made.append(_pairs_export(study, pairs))
    if view is not None:
        made.append(Export("table", view_grid(view), tuple(view_records(view))))
    return made


def write_exports(made: Sequence[Export], folder: Path) -> None:
    """`<name>.csv` and `<name>.tex` for each."""
    for export in made:
        write_bytes(folder / f"{export.name}.tex", to_latex(export.grid).encode())
        if export.records:
            stream = io.StringIO(newline="")
            names = list(dict.fromkeys(key for record in export.records for key in record))
            writer = csv.DictWriter(stream, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(export.records)
            write_bytes(folder / f"{export.name}.csv", stream.getvalue().encode())


def scores_export(study: Study, groups: Sequence[Group]) -> Export:
    """Means over repetitions: a row a place, a column a score."""
    tasks = [f"{task}.score" for task, _ in tasks_of(study)]
    columns = [*stable_of(study), *tasks]
    columns = [c for c in columns if any(group.spreads[c].n for group in groups)]
    about = study.figure
    heads = [about.x_label + (f", {about.by}" if about.by else ""), "n"]
    rows, records = [], []
    for group in groups:
        name = f"{place(group.x)}" + ("" if group.by is None else f", {place(group.by)}")
        n = str(group.n) if group.n == group.planned else f"{group.n} of {group.planned}"
        rows.append((name, n, *(spread_words(group.spreads[c]) for c in columns)))
        record: Record = {about.x: group.x} | ({about.by: group.by} if about.by else {})
        record |= {"planned": group.planned}
        for column in columns:
            spread = group.spreads[column]
            record |= {f"{column}.mean": spread.mean, f"{column}.sd": spread.sd}
            record |= {f"{column}.n": spread.n}
        records.append(record)
    note = "mean ± standard deviation over repetitions, in points of 100"
    grid = Grid(f"{study.name}: scores", (*heads, *map(score_name, columns)), tuple(rows), (note,))
    return Export("scores", grid, tuple(records))


def spread_words(spread: Spread) -> str:
    """Mean ± sd in points; missing without a value."""
    if spread.mean is None:
        return "missing"
    return points(spread.mean) + ("" if spread.sd is None else f" ± {points(spread.sd)}")


def _pairs_export(study: Study, pairs: Sequence[Record]) -> Export:
    tasks = list(dict.fromkeys(task for row in pairs for task in row["tasks"]))
    rows, records = [], []
    for row in pairs:
        name = f"{place(row['best'])} less {place(row['x'])}"
        name += "" if row["by"] is None else f", {study.figure.by} {place(row['by'])}"
        gaps = {"all": row["all"]} | row["tasks"]
        cells = [_gap_words(gaps.get(task)) for task in ("all", *tasks)]
        rows.append((name, *cells))
        for task, gap in gaps.items():
            at = {"best": row["best"], "x": row["x"], "by": row["by"], "task": task}
            numbers = {"mean": gap.mean, "low": gap.low, "high": gap.high, "p": gap.p_value}
            records.append(at | numbers)
    note = "differences in points on the same examples, with 95 % intervals over examples"
    heads = (study.figure.x_label, "all tasks", *tasks)
    grid = Grid(f"{study.name}: on the same examples", heads, tuple(rows), (note,))
    return Export("pairs", grid, tuple(records))


def _gap_words(gap: Any) -> str:
    if gap is None:
        return "–"
    if gap.low is None:
        return signed(gap.mean)
    return f"{signed(gap.mean)} ({signed(gap.low)} to {signed(gap.high)})"


def _cost_export(study: Study, costs: Sequence[Record]) -> Export:
    heads = ("stages", "number", "done", "alone", "tokens seen", "FLOPs", "time", "time alone")
    rows = tuple(
        (
            KIND_NAMES[cost["kind"]],
            str(cost["stages"]),
            str(cost["done"]),
            str(cost["alone"]),
            f"{cost['tokens']:,}" if cost["tokens"] else "–",
            engineering(cost["flops"]) if cost["flops"] else "–",
            duration(cost["seconds"]),
            duration(cost["seconds_alone"]),
        )
        for cost in costs
    )
    grid = Grid(f"{study.name}: cost", heads, rows, ("FLOPs are planned, the rest was spent",))
    return Export("cost", grid, tuple(costs))
