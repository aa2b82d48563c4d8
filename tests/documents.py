"""The documents as data, read against the code: blocks with their marks, code spans, links.

A mark is a comment that no reader sees, on the line above a block:

    <!-- test: run -->         the block is run: python with made values at hand, commands as far as
                               they are cheap (`test_documents.py` says which)
    <!-- test: parse -->       read against the code, not run: it needs a GPU, a cluster, a network
                               or somebody's model
    <!-- test: file NAME -->   a file that a reader saves; the page's commands find it under NAME.
                               A fence that has the name itself, ```json NAME, needs no mark
    <!-- test: shape -->       a listing or a synopsis; of its commands the options must exist

A block without a mark is refused, so that none is forgotten. Each check raises AssertionError, or
what the command line says, where something is not there.
"""

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel
from typer.main import get_command

import midstream.config as options
from midstream.cli.app import app
from midstream.cli.catalogue import _parameters, catalogue, read_settings, with_scale
from midstream.config import Machine, SlurmResources, SlurmSettings
from midstream.study import stages, studies

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
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
COMMANDS = get_command(app)
# Words that stand for a name of the reader's.
PLACEHOLDER = re.compile(r"[A-Z]+(\.\.\.)?")
READERS_OWN = re.compile(r"my_\w+\.py|file\.py")
# Programs of others that the documents start.
PROGRAMS = {"python3", "tensorboard", "wandb", "lm_eval", "printf"}
MODELS = {
    name: value
    for module in (options, stages, studies)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, BaseModel)
}


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
def _tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(read(page))


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """A page's fenced blocks, in order; ValueError for one that has no mark."""
    lines = read(page).split("\n")
    return tuple(_block(page, lines, t) for t in _tokens(page) if t.type == "fence")


def _block(page: str, lines: Sequence[str], token: Token) -> Block:
    assert token.map
    start = token.map[0]
    language, _, name = token.info.strip().partition(" ")
    mark = _MARK.fullmatch(f"<!-- test: file {name} -->" if name else lines[start - 1])
    if mark is None or mark[1] not in MARKS or (mark[1] == "file") != bool(mark[2]):
        raise ValueError(
            f"{page}:{start + 1}: a block needs a mark on the line above it, such as "
            f"<!-- test: run -->; there are {', '.join(MARKS)} (tests/documents.py)"
        )
    name = mark[2] or ""
    if language == "bash" or not (language or name):
        language = "shell"
    language = language or Path(name).suffix.removeprefix(".")
    return Block(page, start + 1, language, mark[1], name, token.content)


def _inline(page: str) -> Iterator[tuple[int, Token]]:
    """The parts of a page's prose, each with its line."""
    for token in _tokens(page):
        line = token.map[0] + 1 if token.map else 0
        for part in token.children or ():
            yield line, part
            line += part.type == "softbreak"


def spans(page: str) -> Iterator[tuple[int, str]]:
    """The code spans of a page's prose, each with its line."""
    parts = _inline(page)
    return ((line, " ".join(p.content.split())) for line, p in parts if p.type == "code_inline")


def links(page: str) -> Iterator[tuple[int, str]]:
    """The targets of a page's links, each with its line."""
    return ((line, str(p.attrs["href"])) for line, p in _inline(page) if p.type == "link_open")


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors of a page's headings."""
    tokens = _tokens(page)
    heads = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    return frozenset(re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads)


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


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]


def marked(*marks: str, page: str | None = None) -> list[Block]:
    """The blocks with these marks, of one page or of all."""
    return [b for b in ALL_BLOCKS if b.mark in marks and page in (None, b.page)]


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The name and the values of a `midstream` command; what it refuses is raised."""
    command, at, context = COMMANDS, 1, None
    while hasattr(command, "commands"):
        assert len(words) > at, f"{' '.join(words)} names no command"
        assert words[at] in command.commands, f"there is no command {words[at]!r}"
        command, at = command.commands[words[at]], at + 1
    name = " ".join(words[1:at])
    context = command.make_context(name, list(words[at:]))
    return name, context.params


def check_study(name: str, settings: Sequence[str], page: str) -> None:
    """A study of the catalogue or of a file, with its arguments; or the name of one that ran."""
    saved = {block.name: block.text for block in marked("file", page=page)}
    ran = re.findall(r'name="([\w.]+)"', " ".join(saved.values()))
    if PLACEHOLDER.fullmatch(name) or name in ran:
        return
    if ".py" in name:
        path = name.partition(":")[0]
        if path not in saved and READERS_OWN.fullmatch(path):
            return
        assert path in {*saved, *files()}, f"no block of {page} and no file is {path}"
        takes = file_arguments(name, saved.get(path) or (ROOT / path).read_text())
    else:
        assert name in catalogue(), f"{name} is no study"
        takes = [*_parameters(catalogue()[name])]
    unknown = read_settings("--set", settings).keys() - {*takes}
    assert not unknown, f"{name} takes {', '.join(takes)}, not {', '.join(unknown)}"


def file_arguments(name: str, source: str) -> list[str]:
    """The arguments of FILE:FUNCTION, whose file holds this."""
    path, _, function = name.partition(":")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    raise AssertionError(f"{path} has no function {function}")


def check_midstream(words: Sequence[str], page: str) -> tuple[str, dict[str, Any]]:
    """Parse a `midstream` command; what it names is there."""
    command, values = parsed(words)
    settings = with_scale(values.get("settings"), values.get("scale"))
    for name in [values.get("study"), *(values.get("studies") or [])]:
        if name is not None:
            check_study(name, settings, page)
    if values.get("others") and "=" in values["others"][0]:
        several = values.get("nodes") or 1
        given = read_settings("--machine", values["others"])
        ranks = (values.get("ranks") or 8) * several
        Machine.model_validate({"ranks": ranks, **given})
    for name in read_settings("--slurm-set", values.get("slurm_sets") or []):
        kind, dot, own = name.partition(".")
        fields = SlurmResources.model_fields if dot else SlurmSettings.model_fields
        assert not dot or kind in get_args(options.StageKind), f"{kind} is no kind of stage"
        assert (own if dot else name) in fields, f"{name} is nothing that a job is given"
    return command, values


def check_other(words: Sequence[str]) -> None:
    """A command that is none of ours: its target, script or extra is there."""
    program, *rest = words
    name = Path(program).name
    if name == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= {*targets}, f"the Makefile has {', '.join(targets)}"
    elif name == "pip" or rest[:2] == ["-m", "pip"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        asked = re.findall(r"(?:midstream|\.)\[([\w,]+)\]", " ".join(rest))
        assert {e for group in asked for e in group.split(",")} <= extras.keys()
    elif name == "python":
        assert rest[0] in files(), f"there is no {rest[0]}"
        source = (ROOT / rest[0]).read_text()
        unknown = [w for w in rest if w.startswith("--") and f'"{w}"' not in source]
        assert not unknown, f"{rest[0]} has no {', '.join(unknown)}"
    else:
        assert name in PROGRAMS, f"{name} is no program that the documents start"


def check_python(text: str) -> None:
    """Code that compiles, whose imports of ours resolve and whose options exist."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("midstream"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("midstream"):
                    importlib.import_module(name.name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            check_call(node.func.id, node)


def check_call(name: str, call: ast.Call) -> None:
    """Where a frozen value of ours is made: its fields."""
    if name in MODELS:
        given = {keyword.arg for keyword in call.keywords if keyword.arg}
        unknown = given - MODELS[name].model_fields.keys()
        assert not unknown, f"{name} has no {', '.join(unknown)}"


def _options(command: Any) -> set[str]:
    own = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return own | {"--help"}


def all_options() -> set[str]:
    found, left = set[str](), [COMMANDS]
    while left:
        command = left.pop()
        found |= _options(command)
        left += getattr(command, "commands", {}).values()
    return found


def synopsis_problems(text: str) -> Iterator[str]:
    """What a `midstream` command that is only mentioned has and there is not."""
    words = text.split()
    command, at = COMMANDS, 1
    while hasattr(command, "commands") and at < len(words):
        names = words[at].split("|")
        if words[at].startswith("-"):
            break
        missing = [name for name in names if name not in command.commands]
        if missing:
            yield f"there is no command {', '.join(missing)}"
            return
        command, at = command.commands[names[0]], at + 1
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(words[at:])):
        if option not in _options(command):
            yield f"midstream {' '.join(words[1:at])} has no {option}"


def options_of_scripts() -> set[str]:
    scripts = [name for name in files() if name.startswith("benchmarks/") and name[-3:] == ".py"]
    text = " ".join((ROOT / name).read_text() for name in scripts)
    return set(re.findall(r'"(--[a-z][a-z-]*)"', text))
