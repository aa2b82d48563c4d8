"""Small tables as LaTeX and Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    return "".join(f"| {' | '.join(map(escape_cell, row))} |\n" for row in rows)


def escape_cell(text: str) -> str:
    """Text in a cell of a Markdown table: no new line, no bar, no tag."""
    return escape_markdown(text).replace("|", "\\|")


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
