"""The digests by which data enters an identity, and where a benchmark's files lie.

Needs neither torch nor a reader: plans ask for them before any work.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from midstream.core.digests import FORMAT_VERSION as FORMAT_VERSION
from midstream.core.digests import Placement as Placement
from midstream.core.digests import any_of, is_hidden, is_note, is_text, walk
from midstream.core.digests import canonical as canonical
from midstream.core.digests import digest as digest
from midstream.core.digests import fields_of as fields_of
from midstream.core.digests import file_sha256 as file_sha256
from midstream.core.digests import kept_digests as kept_digests
from midstream.core.storage import read_json
from midstream.core.tokens import nearest

# Published files of text tasks, by lm-evaluation-harness's names: alternatives, the data set's own
# form first; the files of one alternative lie in one folder, under the names of the patterns.
TEXT_FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "agieval_lsat_ar": (("lsat-ar.jsonl",),),
    "agieval_sat_en": (("sat-en.jsonl",),),
    "arc_challenge": (("ARC-Challenge-Test.jsonl",), ("arc_challenge.jsonl",)),
    "arc_easy": (("ARC-Easy-Test.jsonl",), ("arc_easy.jsonl",)),
    "bigbench_conceptual_combinations_multiple_choice": (
        ("conceptual_combinations/task.json",),
        ("bigbench_conceptual_combinations.jsonl",),
    ),
    "bigbench_cs_algorithms": (("bigbench_cs_algorithms.jsonl",),),
    "bigbench_cs_algorithms_multiple_choice": (("cs_algorithms/task.json",),),
    "boolq": (("BoolQ/val.jsonl",), ("boolq/dev.jsonl",), ("boolq.jsonl",)),
    "copa": (("COPA/val.jsonl",), ("copa.jsonl",)),
    "hellaswag": (("hellaswag_val.jsonl",), ("hellaswag_val*.txt",)),
    "mathqa": (("MathQA/test.json",), ("math_qa.jsonl",)),
    "openbookqa": (("Main/test.jsonl",), ("openbook_qa.jsonl",)),
    "piqa": (("valid.jsonl", "valid-labels.lst"),),
    "pubmedqa": (("ori_pqal.json", "test_ground_truth.json"),),
    "winogrande": (("winogrande_1.1/dev.jsonl",), ("winogrande.jsonl",)),
}
# Beside a visual benchmark's official files: {example's id: group}, whose scores are told apart.
GROUPS_FILE = "groups.json"
_FIRST_NAMES = any_of(
    first.rpartition("/")[2] for ways in TEXT_FILES.values() for first, *_ in ways
)
# llm-foundry has files of the same names in another form, for models behind an interface.
_OTHER_FORM = "api_compatible_gauntlet"


def benchmark_digest(world: Path, task: str) -> str:
    """Sixteen digits for all that a benchmark asks: its entry in world.json, and the names and
    bytes of its files, questions and pictures; links are followed.

    `world` is a world, or a folder of official files.
    A text task of which nothing is there (lm-evaluation-harness fetches it) counts by its name.
    Raises FileNotFoundError where a visual benchmark's folder or a listed file is missing.
    """
    entry, root, files = _parts(world, task)
    listing = [[path.relative_to(root).as_posix(), file_sha256(path)] for path in files]
    return digest([task, entry, sorted(listing)])


def benchmark_names(world: Path) -> list[str]:
    """The benchmarks whose files a world holds: those of world.json, and text tasks' published
    files or folders."""
    listed = [*listed_tasks(world, "visual_tasks"), *listed_tasks(world, "text_tasks")]
    paths = _maybe_published(world)
    published = [name for name in TEXT_FILES if _published(paths, name)]
    return sorted({*listed, *published, *hub_folders(world)})


def listed_tasks(world: Path, kind: str) -> dict[str, Any]:
    """The entries of a world.json under `kind` ("visual_tasks", "text_tasks"); {} without one."""
    path = world / "world.json"
    about = read_json(path) if path.is_file() else {}
    found = about.get(kind, {}) if isinstance(about, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {kind!r} is no object of tasks by name (docs/data.md)")
    return found


def visual_folder(world: Path, name: str) -> Path:
    """Where a visual benchmark's official files lie: `bench/<name>` of a world; without world.json
    also `<name>`, or the folder itself."""
    own = world / "bench" / name
    if (world / "world.json").is_file():
        if not own.is_dir():
            there = sorted(path.name for path in own.parent.glob("*") if path.is_dir())
            raise FileNotFoundError(
                f"benchmark folder {own} does not exist; there: {', '.join(there) or 'nothing'}"
            )
        return own
    if not world.is_dir():
        raise FileNotFoundError(f"{world} does not exist; give the folder of the official files")
    return next(path for path in (own, world / name, world) if path.is_dir())


def own_text_file(world: Path, name: str) -> Path:
    """The file of a text task that world.json lists."""
    return world / "text_tasks" / f"{name}.jsonl"


def published_files(world: Path, name: str) -> tuple[Path, ...]:
    """The published files of a text task, wherever they lie under `world`; () where none does."""
    if name not in TEXT_FILES:
        return ()
    return _published(_maybe_published(world), name)


def _maybe_published(world: Path) -> list[Path]:
    """The files that are called as a published one: of a million pictures none."""
    return [
        Path(path) for path in _outside_sources(world) if _FIRST_NAMES.match(os.path.basename(path))
    ]


def _published(paths: Sequence[Path], name: str) -> tuple[Path, ...]:
    """The first alternative of a task's files that begins with one of `paths`."""
    for first, *others in TEXT_FILES[name]:
        for path in paths:
            if path.match(first) and _OTHER_FORM not in path.parts:
                return (path, *(path.parent / other for other in others))
    return ()


def hub_folder(world: Path, name: str) -> Path | None:
    """The folder that holds a text task's data set as a hub has it: one with the task's name."""
    places = (world / "text_tasks" / name, world / "bench" / name, world / name)
    return next((path for path in places if path.is_dir()), None)


def hub_folders(world: Path) -> list[str]:
    """The text tasks whose data sets' own files lie in a folder `text_tasks/<name>`."""
    folders = sorted((world / "text_tasks").glob("*"))
    return [path.name for path in folders if path.is_dir() and not is_hidden(path.name)]


def _parts(world: Path, task: str) -> tuple[Any, Path, list[Path]]:
    """A benchmark's entry in world.json, the folder that names are relative to, and its files."""
    visual, text = (listed_tasks(world, kind) for kind in ("visual_tasks", "text_tasks"))
    if task in visual:
        folder = visual_folder(world, task)
        return visual[task], folder, _all(folder)
    if task in text:
        path = own_text_file(world, task)
        if not path.is_file():
            raise FileNotFoundError(f"text task {path} does not exist; world.json lists it")
        return text[task], world, [path]
    published = published_files(world, task)
    if published:
        return None, published[0].parent, [path for path in published if path.is_file()]
    own = hub_folder(world, task)
    if own is not None:
        return None, own, _all(own)
    if task not in TEXT_FILES and not (world / "world.json").is_file():
        return None, world, _all(visual_folder(world, task))
    near = get_close_matches(task, [*visual, *text], 1, cutoff=0.85)
    if near and task not in TEXT_FILES:
        raise FileNotFoundError(
            f"{world / 'world.json'} lists no task {task!r}; did you mean {near[0]}?"
        )
    return None, world, []


def _all(folder: Path) -> list[Path]:
    return [path for path in map(Path, walk(folder)) if not is_note(path.name)]


def _outside_sources(world: Path) -> Iterator[str]:
    """A world's files that are neither trained on nor a visual benchmark's; else all."""
    if not (world / "world.json").is_file():
        yield from walk(world)
        return
    visual = listed_tasks(world, "visual_tasks")
    for top in sorted(world.iterdir()):
        inner = sorted(top.iterdir()) if top.name == "bench" and top.is_dir() else [top]
        for path in inner:
            if path.is_dir() and path.name not in (*SECTIONS, *visual):
                yield from walk(path)
            elif path.is_file():
                yield str(path)


Kind = Literal["text", "caption", "instruct", "interleaved"]
# Where a world keeps its sources, and what their text counts as.
SECTIONS: dict[str, Kind] = {
    "text": "text",
    "captions": "caption",
    "instruct": "instruct",
    "documents": "interleaved",
}
# The index that makes a folder a prepared source, and what lies there from the beginning on.
PREPARED, PREPARING = "source.json", "prepare.lock"


class SourceFingerprint(BaseModel):
    """What a source's text counts as, and what stands for its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    digest: str


class WorldFingerprint(BaseModel):
    """The digest of each source and each benchmark that a world held when it was planned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: Mapping[str, SourceFingerprint]
    benchmarks: Mapping[str, str] = {}


def world_fingerprint(root: Path) -> WorldFingerprint:
    """What stands for the bytes of a world's sources and benchmarks.

    A prepared source counts by the fingerprint that its `source.json` names, and its bytes are not
    read. Raises FileNotFoundError if the folder is missing or holds no source, ValueError for a
    name that two sources have.
    """
    return WorldFingerprint(
        sources={
            name: SourceFingerprint(kind=kind, digest=source_digest(root, name, folder))
            for name, (kind, folder) in source_folders(root).items()
        },
        benchmarks=_benchmarks(root),
    )


def _benchmarks(root: Path) -> dict[str, str]:
    digests = {}
    for name in benchmark_names(root):
        # One that is listed and not there is asked for by no digest, and refused by the checks.
        with suppress(FileNotFoundError):
            digests[name] = benchmark_digest(root, name)
    return digests


def source_folders(root: Path) -> dict[str, tuple[Kind, Path]]:
    """Kind and folder of each source of a world; ValueError for a name that is used twice."""
    if not root.is_dir():
        # What was an address, as a path: s3:/bucket/world.
        far = any(part.endswith(":") for part in root.parts)
        remedy = "; a world is a folder here, and `midstream prepare` fills it from addresses"
        raise FileNotFoundError(
            f"world folder {root} does not exist"
            f"{remedy if far else '; give the folder that holds it'}"
        )
    listed: dict[str, tuple[Kind, Path]] = {}
    for section, kind in SECTIONS.items():
        for folder in sorted(path for path in root.glob(f"{section}/*") if path.is_dir()):
            if is_hidden(folder.name):
                continue
            if folder.name in listed:
                raise ValueError(f"{folder}: the name {folder.name!r} is used by another source")
            listed[folder.name] = (kind, folder)
    if not listed:
        raise FileNotFoundError(no_source(root, *SECTIONS))
    return listed


def no_source(root: Path, *sections: str) -> str:
    """What is told of a world that has no source in these sections."""
    there = [path.name for path in sorted(root.iterdir()) if not is_hidden(path.name)]
    return (
        f"{root} holds no source under {', '.join(sections)}; a source is a folder there, such as "
        f"{sections[0]}/mine, with its files (docs/data.md). There are {', '.join(there) or 'none'}"
    )


def source_digest(root: Path, name: str, folder: Path) -> str:
    """Sixteen digits for a source's files, and for the column of its text where one is named."""
    index = folder / PREPARED
    if index.is_file():
        about = read_json(index)
        if not isinstance(about, dict) or "fingerprint" not in about:
            raise ValueError(f"{index} is none that `midstream prepare` writes; call it otherwise")
        return str(about["fingerprint"])
    refuse_unfinished(folder)
    listing: list[Any] = [
        [path.removeprefix(f"{folder}{os.sep}"), file_sha256(path)]
        for path in walk(folder)
        if _is_data(path, folder)
    ]
    column = text_column(root, name)
    return digest([listing] if column is None else [listing, {"column": column}])


def holds_data(folder: Path) -> bool:
    """Whether a source's folder is prepared, or has a file that counts."""
    return (folder / PREPARED).is_file() or any(_is_data(path, folder) for path in walk(folder))


def refuse_unfinished(folder: Path) -> None:
    """Raises ValueError for a folder that `midstream prepare` has begun to fill, and not finished.

    What lies there is no source, and no data to make one from.
    """
    if (folder / PREPARING).is_file() and not (folder / PREPARED).is_file():
        raise ValueError(
            f"{folder} is a source that is not prepared to its end; give the `midstream prepare` "
            "again that makes it, which goes on where it was"
        )


def text_column(root: Path, name: str) -> str | None:
    """The field or column of a source's text, where `world.json` names one under `text`.

    It says {"text": {source: {"column": name}}}. Raises ValueError that names the file if that is
    said of a source that is not there, or in another form.
    """
    path = root / "world.json"
    world = read_json(path) if path.is_file() else {}
    said = world.get("text", {}) if isinstance(world, dict) else world
    form = '{"text": {"SOURCE": {"column": "NAME"}}}'
    if not isinstance(said, dict):
        raise ValueError(f"{path}: 'text' is {said!r}; write {form}")
    there = [x.name for x in sorted(root.glob("text/*")) if x.is_dir() and not is_hidden(x.name)]
    for source, values in said.items():
        if source not in there:
            raise ValueError(
                f"{path}: 'text' names the source {source!r}; {nearest(source, there)}"
                f"{root / 'text'} holds {', '.join(there) or 'none'}"
            )
        column = values.get("column") if isinstance(values, dict) else None
        if not isinstance(column, str) or not column or len(values) > 1:
            raise ValueError(f"{path}: 'text' says {values!r} of {source!r}; write {form}")
    return str(said[name]["column"]) if name in said else None


def _is_data(path: str, folder: Path) -> bool:
    """Whether a file of a source may be read: of captions and talks any, which records may name."""
    name = os.path.basename(path)
    return is_text(name) if folder.parent.name == "text" else not is_note(name)


def folder_fingerprint(root: Path, patterns: tuple[str, ...] = ("**/*",)) -> str:
    """Sixteen digits for the names and bytes of the files under `root` that match `patterns`.

    Raises FileNotFoundError if the folder is missing or nothing matches.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist; give the folder that holds it")
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    if not found:
        raise FileNotFoundError(f"no file under {root} matches {', '.join(patterns)}")
    listing = [[path.relative_to(root).as_posix(), file_sha256(path)] for path in sorted(found)]
    return digest(listing)
