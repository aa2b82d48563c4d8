"""The documents as data: their fenced blocks with the marks above them, their code spans and links.

A mark is a comment that no reader sees, on the line above a block:

    <!-- test: run -->         the block is run: python with made values at hand, commands as far as
                               they are cheap (`test_documents.py` says which)
    <!-- test: parse -->       read against the code, not run: it needs a GPU, a cluster, a network
                               or somebody's model
    <!-- test: file NAME -->   a file that a reader saves; the page's commands find it under NAME.
                               A fence that has the name itself, ```json NAME, needs no mark
    <!-- test: shape -->       a listing or a synopsis; of its commands the options must exist

A block without a mark is refused, so that none is forgotten.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
]
MARKS = ("run", "parse", "file", "shape")
# Folders of a checkout that are not its content.
OTHERS = {".venv", ".git", "runs", "build", "dist", "__pycache__"}

_MARK = re.compile(r"<!-- test: (\w+)(?: (\S+))? -->")
_SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its fence, from 1."""

    page: str
    line: int
    language: str
    mark: str
    name: str
    text: str

    @property
    def place(self) -> str:
        """Where it stands, as errors and test names say it."""
        return f"{self.page}:{self.line}"


@cache
def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """A page's fenced blocks, in order; ValueError for one that has no mark or is not closed."""
    lines = read(page).split("\n")
    found: list[Block] = []
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language, _, name = lines[start][3:].strip().partition(" ")
        mark = _MARK.fullmatch(f"<!-- test: file {name} -->" if name else lines[start - 1])
        place = f"{page}:{start + 1}"
        if mark is None or mark[1] not in MARKS or (mark[1] == "file") != bool(mark[2]):
            raise ValueError(
                f"{place}: a block needs a mark on the line above it, such as "
                f"<!-- test: run -->; there are {', '.join(MARKS)} (tests/documents.py)"
            )
        found.append(
            Block(
                page=page,
                line=start + 1,
                language=_language(language, mark[2] or ""),
                mark=mark[1],
                name=mark[2] or "",
                text="\n".join(lines[start + 1 : number]) + "\n",
            )
        )
        start = None
    if start is not None:
        raise ValueError(f"{page}:{start + 1}: the block has no end")
    return tuple(found)


def _language(said: str, name: str) -> str:
    """What a block is written in: as its fence or the name of its file says, else shell."""
    if said == "bash" or not (said or name):
        return "shell"
    return said or Path(name).suffix.removeprefix(".")


@cache
def prose(page: str) -> str:
    """A page without its blocks; every line keeps its number."""
    lines, inside = [], False
    for line in read(page).split("\n"):
        fence = line.startswith("```")
        lines.append("" if inside or fence else line)
        inside ^= fence
    return "\n".join(lines)


def spans(page: str) -> Iterator[tuple[int, str]]:
    """The code spans of a page's prose, each with its line."""
    text = prose(page)
    for match in _SPAN.finditer(text):
        content = " ".join(match[2].split()).replace("\\|", "|")
        yield text.count("\n", 0, match.start()) + 1, content


def links(page: str) -> Iterator[tuple[int, str]]:
    """The targets of a page's links, each with its line."""
    text = _SPAN.sub(lambda match: "\n" * match[0].count("\n"), prose(page))
    # The text of a link may be code, and may have been broken over a line.
    for match in _LINK.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[1]


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors of a page's headings."""
    found = set()
    for line in prose(page).split("\n"):
        if re.match(r"#{1,6} ", line):
            words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(words.replace(" ", "-"))
    return frozenset(found)


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The commands of a block of shell, as words, each with its line in the block, from 1.

    Continued lines are one; pipes and `&&` part commands; comments and assignments before a
    command are left out.
    """
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        first, line = number + 1, lines[number]
        while line.endswith("\\"):
            number += 1
            line = line[:-1] + lines[number]
        number += 1
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                if words:
                    yield first, words
                words = []
            elif words or not _ASSIGNMENT.fullmatch(word):
                words.append(word)


@cache
def files() -> tuple[str, ...]:
    """Every file of the checkout, relative to it."""
    found = []
    for path in ROOT.iterdir():
        if path.name in OTHERS:
            continue
        inside = path.rglob("*") if path.is_dir() else [path]
        found += [
            one.relative_to(ROOT).as_posix()
            for one in inside
            if one.is_file() and not OTHERS & set(one.parts)
        ]
    return tuple(found)
