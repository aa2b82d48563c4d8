"""Every block, command, link, path and option that the documents show is one that there is.

Of the commands in a block that is run, `plan`, `report`, `status`, `logs` and `store` are given as
they stand; of the others that name a study the study is built and planned, and is then known in the
store as if it had been run. What the rest would do is tested elsewhere; here their words are read
by the command line itself.
"""

import ast
import importlib
import inspect
import json
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

import midstream.config as options
import tiny
from documents import (
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    files,
    links,
    prose,
    read,
    spans,
)
from midstream.catalogue import catalogue, find_study, read_settings, with_scale
from midstream.cli import app
from midstream.config import Machine, SlurmResources, SlurmSettings
from midstream.data.worlds.pocket import write_pocket_world
from midstream.storage import read_json, write_json
from midstream.study import stage, studies
from midstream.study.graph import plan
from midstream.study.ledger import Ledger

COMMANDS = get_command(app)
# Run as they stand, in this process.
EXECUTED = {"plan", "report", "status", "logs", "store"}
# Words that stand for a name of the reader's.
PLACEHOLDER = re.compile(r"[A-Z]+(\.\.\.)?")
# Studies of the catalogue, with their arguments, that a page has planned.
PLANNED: set[str] = set()
READERS_OWN = re.compile(r"my_\w+\.py|file\.py")
PYTHON_FILE = re.compile(r"[\w./-]+\.py")
# Programs of others that the documents start, and the first words that may follow.
PROGRAMS = {"python3", "tensorboard", "wandb", "lm_eval", "printf"}
ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
MODELS = {
    name: value
    for module in (options, stage, studies)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, BaseModel)
}
# Names that fragments of the documents use; a reader has values of these kinds by then.
AT_HAND = {
    "world": tiny.DATA,
    "data": tiny.DATA,
    "ENCODER": tiny.ENCODER,
    "encoder": tiny.ENCODER_STAGE,
    "decoder": tiny.DECODER,
    "text": tiny.TEXT,
    "rows": tiny.ROWS,
    "captions": tiny.mixture(4_000, pictures=1.0),
    "mixed": tiny.mixture(4_000, pictures=0.5, web=0.5),
}


def marked(*marks: str, page: str | None = None) -> list[Block]:
    return [b for b in ALL_BLOCKS if b.mark in marks and page in (None, b.page)]


def by_place(chosen: Sequence[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made data in the public layout, under the names that docs/how-to.md gives to its folders."""
    folder = tmp_path_factory.mktemp("public") / "my_data"
    folder.mkdir()
    world = tiny.DATA.world
    assert isinstance(world, options.PocketWorld)
    write_pocket_world(world, folder)
    about = read_json(folder / "world.json")
    (folder / "text_tasks" / "pocket_facts.jsonl").rename(folder / "text_tasks" / "quiz.jsonl")
    about["text_tasks"]["quiz"] = about["text_tasks"].pop("pocket_facts")
    write_json(folder / "world.json", about)
    return folder


@pytest.fixture
def desk(
    tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """Where a reader sits: a folder with the data and with the files that the page has saved."""
    page = request.node.callspec.params["page"]
    shutil.copytree(public, tmp_path / "my_data", copy_function=_link)
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    for block in marked("file", page=page):
        (tmp_path / block.name).write_text(block.text)
    # What reports draw has tests of its own and takes half a minute.
    nothing = dict.fromkeys(("svg", "png", "pdf"), b"<svg/>")
    for name in ("panel_figure", "grid_figure", "rates_figure", "curve_figure"):
        monkeypatch.setattr(f"midstream.report.page.{name}", lambda *args, **kwargs: nothing)
    for module in ("page", "suite"):
        monkeypatch.setattr(f"midstream.report.{module}.small_figure", lambda *args: b"<svg/>")
    monkeypatch.chdir(tmp_path)
    # What was run here before: a store holds it.
    Ledger(Path("runs")).save_study(find_study("pocket.when_images_arrive", []))
    return tmp_path


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


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
        takes = [*inspect.signature(catalogue()[name]).parameters]
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


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_how_it_is_tested(page: str) -> None:
    assert sum(line.startswith("```") for line in read(page).split("\n")) == 2 * len(blocks(page))


def test_a_block_without_a_mark_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("documents.read", lambda page: "# A page\n\n```\nmidstream demo\n```\n")
    with pytest.raises(ValueError, match=r"docs/none\.md:3: a block needs a mark"):
        blocks("docs/none.md")


@by_place([b for b in marked("run", "parse") if b.language == "shell"])
def test_every_command_is_one_that_there_is(block: Block) -> None:
    for number, words in commands(block.text):
        try:
            if Path(words[0]).name == "midstream":
                check_midstream(words, block.page)
            else:
                check_other(words)
        except Exception as error:
            place = f"{block.page}:{block.line + number}"
            raise AssertionError(f"{place}: {' '.join(words)}: {error}") from error


@by_place([b for b in ALL_BLOCKS if b.language != "shell"])
def test_every_block_of_a_language_is_written_in_it(block: Block) -> None:
    match block.language:
        case "python" | "py":
            check_python(block.text)
        case "jsonl":
            assert [json.loads(line) for line in block.text.splitlines()]
        case "toml":
            SlurmSettings.model_validate(tomllib.loads(block.text))
        case "json":
            json.loads(block.text)
        case _:
            raise AssertionError(f"{block.place}: nothing here reads {block.language}")


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=str)
def test_commands_of_the_examples_are_some_that_there_are(path: Path) -> None:
    about = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    block = "\n".join(line for line in about.split("\n") if line.startswith("    "))
    shown = [words for _, words in commands(block)]
    assert shown
    for words in shown:
        check_midstream(words, path.name)


@pytest.mark.parametrize("page", sorted({block.page for block in marked("run")}))
@pytest.mark.usefixtures("desk")
def test_what_a_page_runs_runs(page: str) -> None:
    for block in marked("run", page=page):
        if block.language == "python":
            known = {**{n: v for m in (options, stage, studies) for n, v in vars(m).items()}}
            exec(compile(block.text, block.place, "exec"), {**known, **AT_HAND})
            continue
        for number, words in commands(block.text):
            place = f"{block.page}:{block.line + number}: {' '.join(words)}"
            assert Path(words[0]).name == "midstream", f"{place} is not run by this test"
            run_command(place, words)


def run_command(place: str, words: Sequence[str]) -> None:
    """Give a command as it stands, or plan the study that it would run.

    What another page has planned is not planned again; a suite's stages are only ordered, since
    their prices take as long as all the rest.
    """
    _, values = parsed(words)
    settings = with_scale(values.get("settings"), values.get("scale"))
    named, store = values.get("study"), values.get("store")
    asked = f"{named} {read_settings('--set', settings)}"
    if words[1] in EXECUTED and asked not in PLANNED and named != "paper.suite":
        ended = CliRunner().invoke(app, list(words[1:]))
        assert ended.exit_code == 0, f"{place} ended with {ended.exit_code}: {ended.output}"
    elif asked not in PLANNED:
        assert named, f"{place} names no study; mark its block parse"
        assert plan(find_study(named, settings), Ledger(store)).rows, place
    if words[1] == "run":
        Ledger(store).save_study(find_study(named, settings))
    elif words[1] == "plan" and ".py" not in named:
        PLANNED.add(asked)


def _options(command: Any) -> set[str]:
    own = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return own | {"--help"}


def _all_options() -> set[str]:
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


@by_place([b for b in marked("shape") if "midstream " in b.text])
def test_a_synopsis_has_the_options_that_there_are(block: Block) -> None:
    text = re.sub(r"[\[\]]", " ", block.text)
    found = re.findall(r"^midstream (?:.+\n?(?:\s+--?.*\n?)*)", text, re.MULTILINE)
    assert not [problem for one in found for problem in synopsis_problems(one)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_in_the_text_are_some_that_there_are(page: str) -> None:
    other = _all_options() | _options_of_scripts()
    problems = []
    for line, span in spans(page):
        if span.startswith("midstream "):
            problems += [f"{page}:{line}: {one}" for one in synopsis_problems(span)]
        elif re.match(r"--[a-z]", span):
            option = span.split()[0].split("=")[0]
            if option not in other:
                problems.append(f"{page}:{line}: no command has {option}")
        elif re.fullmatch(r"make \w+", span):
            check_other(span.split())
    assert not problems


def _options_of_scripts() -> set[str]:
    scripts = [name for name in files() if name.startswith("benchmarks/") and name[-3:] == ".py"]
    text = " ".join((ROOT / name).read_text() for name in scripts)
    return set(re.findall(r'"(--[a-z][a-z-]*)"', text))


@pytest.mark.parametrize("page", PAGES)
def test_fields_in_the_text_are_some_that_there_are(page: str) -> None:
    problems = []
    for line, span in spans(page):
        match = re.match(r"([A-Z]\w+)(?:\((.*)\)|\.([a-z_]\w*))$", span)
        if match is None or match[1] not in MODELS:
            continue
        try:
            call = ast.parse(span, mode="eval").body
        except SyntaxError:  # such as ContinueFrom(optimizer=...) with words in it
            problems.append(f"{page}:{line}: {span} is no Python")
            continue
        if isinstance(call, ast.Call):
            check_call(match[1], call)
        elif not hasattr(MODELS[match[1]], match[3]) and match[3] not in (
            MODELS[match[1]].model_fields
        ):
            problems.append(f"{page}:{line}: {match[1]} has no {match[3]}")
    assert not problems


@pytest.mark.parametrize("page", PAGES)
def test_files_of_code_in_the_text_are_there(page: str) -> None:
    known = {f"/{name}" for name in files()} | {f"/{b.name}" for b in marked("file")}
    problems = []
    for line, span in spans(page):
        for name in PYTHON_FILE.findall(span.partition("::")[0]):
            if not READERS_OWN.fullmatch(name) and not any(
                one.endswith(f"/{name}") for one in known
            ):
                problems.append(f"{page}:{line}: there is no {name}")
        path, two, test = span.partition("::")
        if two and PYTHON_FILE.fullmatch(path):
            found = [one for one in files() if f"/{one}".endswith(f"/{path}")]
            assert f"def {test}(" in (ROOT / found[0]).read_text(), f"{page}:{line}: {span}"
    assert not problems


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    problems = []
    for line, target in links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        if not found.exists():
            problems.append(f"{page}:{line}: {target} is not there")
        elif anchor and anchor not in anchors(found.resolve().relative_to(ROOT).as_posix()):
            problems.append(f"{page}:{line}: {path or page} has no heading {anchor}")
    assert not problems


def table_rows(page: str, head: str) -> Iterator[tuple[list[str], str]]:
    """The names in a row's first cell, and its second cell, of the table with this head."""
    lines = prose(page).split("\n")
    start = lines.index(head) + 2
    for line in lines[start:]:
        if not line.startswith("|"):
            return
        first, second = [cell.strip() for cell in line.strip("|").split(" | ")][:2]
        yield re.findall(r"`(\w+)`", first), second


@pytest.mark.parametrize(
    ("page", "model"), [("docs/training.md", Machine), ("docs/cluster.md", SlurmSettings)]
)
def test_a_table_of_options_names_their_defaults(page: str, model: type[BaseModel]) -> None:
    for names, default in table_rows(page, "| name | default | is |"):
        for name in names:
            assert name in model.model_fields, f"{page}: {model.__name__} has no {name}"
            is_value = re.fullmatch(r"`(\w+)`|([\d.]+)", default)
            if is_value:
                have = model.model_fields[name].default
                said = is_value[1] or is_value[2]
                assert said in (str(have), f"{have:g}" if isinstance(have, float) else said), name
                assert is_value[1] or float(said) == have, f"{page}: {name} is {have}, not {said}"
