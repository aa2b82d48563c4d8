"""What stands for data: each source of a world and each of its benchmarks by its own digest.

A source's digest covers the names and bytes of its files, links followed; hidden files and notes
(`source_files.py`) are left out. A benchmark's covers its files and its entry in `world.json`.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from midstream.benchmark_files import benchmark_digest, benchmark_names
from midstream.digests import (
    FORMAT_VERSION,
    Placement,
    canonical,
    digest,
    fields_of,
    file_sha256,
    kept_digests,
)
from midstream.source_files import is_note, is_text, walk
from midstream.storage import read_json

__all__ = [
    "FORMAT_VERSION",
    "SECTIONS",
    "Placement",
    "WorldFingerprint",
    "canonical",
    "digest",
    "fields_of",
    "file_sha256",
    "folder_fingerprint",
    "kept_digests",
    "source_digest",
    "source_folders",
    "text_column",
    "world_fingerprint",
]

Kind = Literal["text", "caption", "instruct"]
# Where a world keeps its sources, and what their text counts as.
SECTIONS: dict[str, Kind] = {"text": "text", "captions": "caption", "instruct": "instruct"}
# The index that makes a folder a prepared source.
PREPARED = "source.json"


class SourceFingerprint(BaseModel):
    """What a source's text counts as, and what stands for its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    digest: str


class WorldFingerprint(BaseModel):
    """What stands for each source and each benchmark that a world held when it was planned."""

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
        raise FileNotFoundError(
            f"world folder {root} does not exist; give the folder that holds it"
        )
    listed: dict[str, tuple[Kind, Path]] = {}
    for section, kind in SECTIONS.items():
        for folder in sorted(path for path in root.glob(f"{section}/[!.]*") if path.is_dir()):
            if folder.name in listed:
                raise ValueError(f"{folder}: the name {folder.name!r} is used by another source")
            listed[folder.name] = (kind, folder)
    if not listed:
        raise FileNotFoundError(
            f"{root} holds no source under {', '.join(SECTIONS)}; see docs/data.md"
        )
    return listed


def source_digest(root: Path, name: str, folder: Path) -> str:
    """Sixteen digits for a source's files, and for the column of its text where one is named."""
    index = folder / PREPARED
    if index.is_file():
        return str(json.loads(index.read_text(encoding="utf-8"))["fingerprint"])
    listing: list[Any] = [
        [path.removeprefix(f"{folder}{os.sep}"), file_sha256(path)]
        for path in walk(folder)
        if _is_data(path, folder)
    ]
    column = text_column(root, name)
    return digest([listing] if column is None else [listing, {"column": column}])


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
    there = [path.name for path in sorted(root.glob("text/[!.]*")) if path.is_dir()]
    for source, values in said.items():
        if source not in there:
            near = get_close_matches(source, there, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{path}: 'text' names the source {source!r}; {hint}{root / 'text'} holds "
                f"{', '.join(there) or 'none'}"
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
