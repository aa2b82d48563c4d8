"""The study's table beside the paper's, small tables as Markdown and LaTeX, what a study took."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from midstream.cost.graph import Plan
from midstream.report.findings import column_of, place, place_words, points, rows_at, score_name
from midstream.report.line_rows import KINDS, LineRow, Part, Snapshot, Spread
from midstream.study.results import StageResult, TrainingResult
from midstream.study.stages import Trained
from midstream.study.studies import Study, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": r"$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{EN DASH}": "--",
    "\N{NO-BREAK SPACE}": "~",
    "\n": " ",
    "\r": " ",
    "\t": " ",
}


@dataclass(frozen=True)
class Grid:
    """A table of words: a title, heads, rows as long as the heads, and notes below."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it reads."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def to_latex(grid: Grid) -> str:
    r"""A `tabular` to `\input`; it needs `\usepackage{booktabs}` and nothing else.

    Title and notes stand above it as comments, for the caption.
    """
    lines = [f"% {_one_line(text)}" for text in (grid.title, *grid.notes) if text]
    lines += [r"% needs \usepackage{booktabs}"]
    lines += [r"\begin{tabular}{l" + "r" * (len(grid.heads) - 1) + "}", r"\toprule"]
    lines += [_latex_row(grid.heads), r"\midrule"]
    lines += [_latex_row(row) for row in grid.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_markdown(grid: Grid) -> str:
    """A table of GitHub's Markdown, without title and notes."""
    rows = [grid.heads, ("---", *("---:" for _ in grid.heads[1:])), *grid.rows]
    cells = [[escape_markdown(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def escape_markdown(text: str) -> str:
    """Text that is no tag, no emphasis and no new line."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]" else letter for letter in text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _latex_row(cells: Sequence[str]) -> str:
    # A bracket that opens a row would be taken for the optional argument of \\.
    return (
        " & ".join(
            f"{{}}{cell}" if cell.startswith("[") else cell for cell in map(escape_latex, cells)
        )
        + r" \\"
    )


SCORES = "scores"


@dataclass(frozen=True)
class Cell:
    """Ours, what the paper prints there (by the axes that the table does not show), or others'.

    `planned` counts the study's lines there; `ours` is None in a column of a published model.
    """

    score: str
    ours: Spread | None
    planned: int
    printed: tuple[tuple[str, float | int], ...] = ()
    published: float | int | None = None
    error: float | int | None = None

    @property
    def published_words(self) -> str:
        """What is quoted of others, with its ±."""
        if self.published is None:
            return ""
        error = "" if self.error is None else f" ± {100 * self.error:.1f}"
        return f"{100 * self.published:.2f}{error}"

    @property
    def our_words(self) -> str:
        """Mean ± sd (n), or why there is none."""
        if self.ours is None:
            return ""
        if self.ours.mean is None:
            return "missing" if self.planned else "not measured"
        sd = "" if self.ours.sd is None else f" ± {points(self.ours.sd)}"
        return f"{points(self.ours.mean)}{sd} ({self.ours.n})"

    @property
    def printed_words(self) -> str:
        """What the paper prints, each with the axes that tell it from the others."""
        several = len(self.printed) > 1
        return ", ".join(
            f"{100 * value:.2f}{f' ({at})' if several and at else ''}" for at, value in self.printed
        )


@dataclass(frozen=True)
class Column:
    """A column of the table; `kind` is ours, baseline or published."""

    name: str
    kind: str = "ours"


Row = tuple[str, tuple[Cell, ...]]


@dataclass(frozen=True)
class View:
    """A study's table filled in, as it is shown, exported and quoted."""

    table: Table
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def corner(self) -> str:
        """What the rows are."""
        return "score" if self.table.rows == SCORES else self.table.rows.replace("_", " ")

    @property
    def labels(self) -> tuple[str, ...]:
        """The heads of columns of words."""
        return tuple(dict.fromkeys(one for words in self.table.labels.values() for one in words))

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the numbers of others stand."""
        return tuple(f"{model.name}: {model.source}" for model in self.table.published)

    def words_of(self, row: str) -> tuple[str, ...]:
        """What describes a row, by `labels`; nothing where it is not described."""
        return tuple(self.table.labels.get(row, {}).get(label, "") for label in self.labels)

    @property
    def has_printed(self) -> bool:
        """Whether the paper prints any number of it."""
        return any(cell.printed for _, cells in self.rows for cell in cells)


def table_view(study: Study, rows: Sequence[LineRow]) -> View | None:
    """The study's table from the rows of `line_rows`; None where the study has none.

    A row for each value of an axis, with the scores at each value of another (without one also of
    baselines and published models); or turned, a row for each score. Places that only the paper
    has stand there too, as not measured.
    """
    table = study.table
    if table is None:
        return None
    across = _places(table, table.columns, rows)
    ats: list[dict[str, Any]] = [{table.columns: at} for at in across] if table.columns else [{}]
    others = _others(table, rows)
    if table.rows == SCORES:
        ours = [(Column(place_words(at) or "ours"), _cells(table, rows, at)) for at in ats]
        shown = [*ours, *others]
        turned = [
            (score_name(score), tuple(cells[number] for _, cells in shown))
            for number, score in enumerate(table.scores)
        ]
        return View(table, tuple(column for column, _ in shown), tuple(turned))
    heads = []
    for at in ats:
        for score in table.scores:
            told = [] if at and len(table.scores) == 1 else [score_name(score)]
            heads.append(Column(", ".join([*([place_words(at)] if at else []), *told])))
    found = []
    for value in _places(table, table.rows, rows):
        parts = [_cells(table, rows, {table.rows: value} | at) for at in ats]
        found.append((str(place(value)), tuple(cell for part in parts for cell in part)))
    if table.columns is None:
        quoted = {"published": " (quoted)"}
        found += [(one.name + quoted.get(one.kind, ""), part) for one, part in others]
    return View(table, tuple(heads), tuple(found))


def view_grid(view: View) -> Grid:
    """The table as words; the paper's numbers in columns of their own, named so."""
    heads: list[str] = [view.corner, *view.labels]
    keep = [
        (column, any(cells[index].printed for _, cells in view.rows))
        for index, column in enumerate(view.columns)
    ]
    for column, printed in keep:
        heads += [column.name, *([f"{column.name} (paper)"] if printed else [])]
    lines = []
    for name, cells in view.rows:
        line = [name, *(words or "–" for words in view.words_of(name))]
        for cell, (_, printed) in zip(cells, keep, strict=True):
            own = cell.published_words or cell.our_words
            line += [own or "–", *([cell.printed_words or "–"] if printed else [])]
        lines.append(tuple(line))
    return Grid(view.table.title, tuple(heads), tuple(lines), view_notes(view))


def view_notes(view: View) -> tuple[str, ...]:
    """What the numbers are and where those of others stand."""
    notes = ["ours: mean ± standard deviation (number of repetitions), in points of 100"]
    if view.has_printed:
        notes.append(f"paper: as printed in {view.table.source or 'the paper'}, not computed here")
    notes += [f"quoted, not computed here: {source}" for source in view.sources]
    return tuple(notes)


def view_records(view: View) -> list[dict[str, Any]]:
    """One flat record for each number, for CSV; scores from 0 to 1."""
    records: list[dict[str, Any]] = []
    nothing: dict[str, Any] = dict.fromkeys(
        ("mean", "sd", "n", "published", "printed", "printed_at")
    )
    for name, cells in view.rows:
        for column, cell in zip(view.columns, cells, strict=True):
            place_of = {"row": name, "column": column.name, "kind": column.kind}
            at: dict[str, Any] = place_of | {"score": cell.score} | nothing
            ours = cell.ours or Spread(())
            numbers = {"mean": ours.mean, "sd": ours.sd, "n": ours.n, "published": cell.published}
            records.append(at | numbers)
            records += [
                at | {"printed": value, "printed_at": where} for where, value in cell.printed
            ]
    return records


def _others(table: Table, rows: Sequence[LineRow]) -> list[tuple[Column, tuple[Cell, ...]]]:
    """Baselines, then published models, each with a cell a score."""
    scores = table.scores
    baselines = [
        (Column(row.name, "baseline"), tuple(_baseline(table, row, score) for score in scores))
        for row in rows
        if row.role == "baseline"
    ]
    return baselines + [
        (
            Column(one.name, "published"),
            tuple(Cell(s, None, 0, (), one.scores.get(s), one.errors.get(s)) for s in scores),
        )
        for one in table.published
    ]


def _places(table: Table, axis: str | None, rows: Sequence[LineRow]) -> list[Any]:
    """The values of an axis that lines have, then those that only the paper has; [] of none."""
    if axis is None:
        return []
    names = {row.name for row in rows if row.role == "baseline"}
    lines = [row.at(axis) for row in rows if row.role == "line"]
    printed = [number.at.get(axis) for number in table.printed]
    found = [v for v in dict.fromkeys([*lines, *printed]) if v is not None and v not in names]
    if all(isinstance(value, int | float) for value in found):
        found.sort()
    return found


def _cells(table: Table, rows: Sequence[LineRow], at: dict[str, Any]) -> tuple[Cell, ...]:
    """A cell a score, of the lines there."""
    members, cells = rows_at(rows, at), []
    for score in table.scores:
        asked = {
            r.name: r.values[column_of(score)] for r in members if column_of(score) in r.values
        }
        values = tuple((name, value) for name, value in asked.items() if value is not None)
        cells.append(Cell(score, Spread(values), len(asked), _printed(table, at, score)))
    return tuple(cells)


def _baseline(table: Table, row: LineRow, score: str) -> Cell:
    value = row.values.get(column_of(score))
    values = () if value is None else ((row.name, value),)
    printed = _printed(table, {table.columns: row.name}, score) if table.columns else ()
    return Cell(score, Spread(values), int(row.state != "done"), printed)


def _printed(table: Table, at: dict[str, Any], score: str) -> tuple[tuple[str, float | int], ...]:
    return tuple(
        (place_words({axis: v for axis, v in number.at.items() if axis not in at}), number.value)
        for number in table.printed
        if number.score == score and all(number.at.get(axis) == v for axis, v in at.items())
    )


@dataclass(frozen=True)
class KindCost:
    """What the stages of a kind took; `alone` and `seconds_alone` if every line ran by itself."""

    kind: str
    stages: int
    done: int
    alone: int
    tokens: int
    flops: float
    seconds: float
    seconds_alone: float


def cost_rows(planned: Plan, ledger: Snapshot) -> list[KindCost]:
    """By kind of stage: how many, tokens, FLOPs and seconds; once, and for every line alone."""
    found = []
    for kind in KINDS:
        rows = [row for row in planned.rows if row.stage.kind == kind]
        if not rows:
            continue
        alone = [Part(row.stage, share) for row in rows for share in row.needs.values()]
        once = [ledger.spent(Part(row.stage)) for row in rows]
        found.append(
            KindCost(
                kind=kind,
                stages=len(rows),
                done=sum(row.state == "done" for row in rows),
                alone=len(alone),
                tokens=sum(tokens or 0 for tokens, _ in once),
                flops=sum(row.cost.flops or 0.0 for row in rows),
                seconds=sum(seconds or 0.0 for _, seconds in once),
                seconds_alone=sum(ledger.spent(part)[1] or 0.0 for part in alone),
            )
        )
    return found


def budgets(planned: Plan, ledger: Snapshot) -> dict[str, int]:
    """Over all (stage, source) with a planned number: how many, the largest difference in tokens,
    and how many differ by more than the source's largest example."""
    gaps = []
    for row in planned.rows:
        if row.state == "done" and isinstance(row.stage, Trained):
            for source in ledger.result(row.stage, TrainingResult).sources.values():
                counted = source.unreduced or source
                if counted.planned_tokens is not None:
                    gap = abs(counted.realised_tokens - counted.planned_tokens)
                    gaps.append((gap, counted.largest_example_tokens))
    return {
        "pairs": len(gaps),
        "worst": max((gap for gap, _ in gaps), default=0),
        "beyond": sum(gap > largest for gap, largest in gaps),
    }


def made(planned: Plan, ledger: Snapshot) -> dict[str, Any]:
    """When the stages ran, for how long, and the most memory that one of them took."""
    times, memory, devices = [], {}, set()
    for row in planned.rows:
        if row.state == "done":
            status = ledger.status(row.stage)
            times.append(tuple(datetime.fromisoformat(status[key]) for key in ("started", "ended")))
            result = ledger.result(row.stage, StageResult)
            memory[row.stage.name] = result.peak_memory_bytes
            if result.memory_of == "device":
                devices.add(row.stage.name)
    peak = max(memory, key=memory.__getitem__) if memory else None
    return {
        "store": str(ledger.store),
        "first": min(started for started, _ in times) if times else None,
        "last": max(ended for _, ended in times) if times else None,
        "wall": sum((ended - started for started, ended in times), timedelta()).total_seconds(),
        "peak_stage": None if peak is None else planned.labels[peak],
        "peak_bytes": None if peak is None else memory[peak],
        "peak_of_gpu": peak in devices,
    }
