"""Every block, command, link, path and option that the documents show is one that there is.

Of the commands in a block that is run, `plan`, `report`, `status`, `logs` and `store` are given as
they stand; of the others that name a study the study is built and planned, and is then known in the
store as if it had been run. What the rest would do is tested elsewhere; here their words are read
by the command line itself.
"""

import ast
import json
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import midstream.config as options
import tiny
from documents import (
    ALL_BLOCKS,
    MODELS,
    PAGES,
    READERS_OWN,
    ROOT,
    Block,
    all_options,
    anchors,
    blocks,
    check_call,
    check_midstream,
    check_other,
    check_python,
    commands,
    files,
    links,
    marked,
    options_of_scripts,
    parsed,
    read,
    spans,
    synopsis_problems,
)
from midstream.cli.app import app
from midstream.cli.catalogue import catalogue, find_study, read_settings, with_scale
from midstream.config import Machine, SlurmSettings
from midstream.core.storage import read_json, write_json
from midstream.cost.graph import plan
from midstream.study import results, stages, studies
from midstream.study.store import Ledger
from midstream.worlds.pocket_world import write_pocket_world

# Run as they stand, in this process.
EXECUTED = {"plan", "report", "status", "logs", "store"}
# Studies of the catalogue, with their arguments, that a page has planned.
PLANNED: set[str] = set()
PYTHON_FILE = re.compile(r"[\w./-]+\.py")
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
ALL_SPANS = [(page, *span) for page in PAGES for span in spans(page)]


def by_place(chosen: Sequence[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made data in the public layout, under the names that docs/how-to.md gives to its folders;
    beside it a store that holds what was run before."""
    folder = tmp_path_factory.mktemp("public") / "my_data"
    folder.mkdir()
    few = {"num_documents": 40, "num_captions": 40, "num_conversations": 10}
    write_pocket_world(options.PocketWorld(**few, num_questions=6, num_text_items=4), folder)
    about = read_json(folder / "world.json")
    (folder / "text_tasks" / "pocket_facts.jsonl").rename(folder / "text_tasks" / "quiz.jsonl")
    about["text_tasks"]["quiz"] = about["text_tasks"].pop("pocket_facts")
    write_json(folder / "world.json", about)
    Ledger(folder.parent / "runs").save_study(find_study("pocket.when_images_arrive", []))
    return folder.parent


@pytest.fixture
def desk(
    tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """Where a reader sits: a folder with the data and with the files that the page has saved."""
    page = request.node.callspec.params["page"]
    shutil.copytree(public, tmp_path, copy_function=_link, dirs_exist_ok=True)
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    for block in marked("file", page=page):
        (tmp_path / block.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / block.name).write_text(block.text)
    # What reports draw has tests of its own and takes half a minute.
    nothing = dict.fromkeys(("svg", "png", "pdf"), b"<svg/>")
    for name in ("panel_figure", "grid_figure", "rates_figure", "curve_figure"):
        monkeypatch.setattr(f"midstream.report.page.{name}", lambda *args, **kwargs: nothing)
    monkeypatch.setattr("midstream.report.page.small_figure", lambda *args: b"<svg/>")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def test_every_block_says_how_it_is_tested() -> None:
    for page in PAGES:
        fences = sum(line.startswith("```") for line in read(page).split("\n"))
        assert fences == 2 * len(blocks(page)), page


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


def check_records(text: str) -> None:
    """One value of JSON, or one a line: what has the suffix .json may be either."""
    try:
        json.loads(text)
    except ValueError:
        assert all(json.loads(line) for line in text.splitlines())


@by_place([b for b in ALL_BLOCKS if b.language != "shell"])
def test_every_block_of_a_language_is_written_in_it(block: Block) -> None:
    match block.language:
        case "python" | "py":
            check_python(block.text)
        case "toml":
            SlurmSettings.model_validate(tomllib.loads(block.text))
        case "json" | "jsonl":
            check_records(block.text)
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


@pytest.mark.parametrize("page", sorted({b.page for b in marked("run", "file")}))
@pytest.mark.usefixtures("desk")
def test_what_a_page_runs_runs(page: str) -> None:
    shown = "".join(block.text for block in marked("run", page=page))
    for block in marked("file", page=page):
        # A study that no command of the page plans is planned as it is.
        if block.name.endswith(".py") and block.name not in shown:
            run_command(block.place, ["midstream", "plan", f"{block.name}:study"])
    for block in marked("run", page=page):
        if block.language == "python":
            known = {**{n: v for m in (options, stages, studies) for n, v in vars(m).items()}}
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


@by_place([b for b in marked("shape") if "midstream " in b.text])
def test_a_synopsis_has_the_options_that_there_are(block: Block) -> None:
    text = re.sub(r"[\[\]]", " ", block.text)
    found = re.findall(r"^midstream (?:.+\n?(?:\s+--?.*\n?)*)", text, re.MULTILINE)
    assert not [problem for one in found for problem in synopsis_problems(one)]


def test_commands_and_options_in_the_text_are_some_that_there_are() -> None:
    other = all_options() | options_of_scripts()
    problems = []
    for page, line, span in ALL_SPANS:
        if span.startswith("midstream "):
            problems += [f"{page}:{line}: {one}" for one in synopsis_problems(span)]
        elif re.match(r"--[a-z]", span):
            option = span.split()[0].split("=")[0]
            if option not in other:
                problems.append(f"{page}:{line}: no command has {option}")
        elif re.fullmatch(r"make \w+", span):
            check_other(span.split())
    assert not problems


def test_fields_in_the_text_are_some_that_there_are() -> None:
    problems = []
    for page, line, span in ALL_SPANS:
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


def test_files_of_code_in_the_text_are_there() -> None:
    known = {f"/{name}" for name in files()} | {f"/{b.name}" for b in marked("file")}
    problems = []
    for page, line, span in ALL_SPANS:
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


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_names_of_code_that_a_reader_is_sent_to_are_in_the_source(page: str) -> None:
    source = "".join(
        (ROOT / name).read_text()
        for name in files()
        if name.startswith("src/") and name.endswith((".py", ".toml"))
    )
    words = {*re.findall(r"\w+", source), *(Path(name).name for name in files())}
    problems = []
    for line, span in spans(page):
        if re.fullmatch(r"\w+", span) and span not in words:
            problems.append(f"{page}:{line}: nothing in src/ is called {span}")
    assert not problems


def test_a_name_that_is_said_to_be_in_a_file_is_in_it() -> None:
    problems = []
    for page in PAGES:
        text = " ".join(re.sub(r"(?ms)^```.*?^```", "", read(page)).split())
        told = re.findall(r"`(\w+)`(?: of| in|,)? \(?`([\w/]+\.py)`", text)
        turned = re.findall(r"`([\w/]+\.py)` \(`(?:\w+\.)?(\w+)`", text)
        for name, file in [*told, *((name, file) for file, name in turned)]:
            file = file.removeprefix("src/midstream/")
            held = [one for one in files() if one.startswith("src/") and one.endswith(f"/{file}")]
            if held and not any(re.search(rf"\b{name}\b", (ROOT / o).read_text()) for o in held):
                problems.append(f"{page}: {file} has no {name}")
    assert not problems


def test_the_catalogue_of_studies_names_every_recipe() -> None:
    rows = read("docs/studies.md").partition("\n| recipe | asks |\n")[2].partition("\n\n")[0]
    named = [
        name
        for row in rows.split("\n")
        for name in re.findall(r"`([\w.]+)`", row[: row.find(" | ")])
    ]
    between = [f"paper.table_{number}" for number in range(4, 8)]
    assert sorted([*named, *between]) == sorted(catalogue())


def test_every_link_leads_somewhere() -> None:
    problems, shown = [], [(page, *link) for page in PAGES for link in links(page)]
    for page, line, target in shown:
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
    lines = read(page).split("\n")
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


def test_the_page_of_the_store_names_every_key_of_results() -> None:
    text = read("docs/store.md")
    models = [one for one in vars(results).values() if isinstance(one, type)]
    keys = {key for one in models if issubclass(one, BaseModel) for key in one.model_fields}
    assert len(keys) > 80
    assert not [key for key in sorted(keys) if not re.search(rf"\b{key}\b", text)]


def test_every_format_of_data_names_a_test_that_there_is() -> None:
    text = (ROOT / "docs" / "data.md").read_text().partition("\n## Formats\n")[2]
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    for row in rows[1:]:
        file = ""
        names = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", row.split(" | ")[-1])
        assert names, row
        for other, test in names:
            file = other or file
            assert f"def {test}(" in (ROOT / "tests/data" / file).read_text(), row


def test_the_map_of_the_package_names_every_module() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    modules = {path.name for path in (ROOT / "src" / "midstream").rglob("*.py")}
    # Modelling files are named by their folder.
    folder = {path.name for path in (ROOT / "src/midstream/exchange/modeling").glob("*.py")}
    assert not {name for name in modules - folder if name not in text and name[0] != "_"}
