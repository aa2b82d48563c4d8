"""Digests of frozen values and of files, and which files of a folder are data.

Links are followed; hidden files and notes (README, LICENSE, ...) are no data, for readers too.
"""

import hashlib
import json
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from enum import Enum
from fnmatch import translate
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

# Part of every identity: raise it when the meaning of a stored stage changes.
FORMAT_VERSION = 5


# A file that changed this short a time before it was read may change again without another time.
SETTLED_SECONDS = 2.0
# What of `os.stat` tells that a file is as it was: bytes, inode, nanoseconds of both its times.
Seen = tuple[int, int, int, int]


class Placement:
    """Marks a field that says where or how work runs and never what comes out.

    Use as `Annotated[Path, Placement]`; such fields are left out of the identity.
    """


def canonical(value: Any) -> Any:
    """The JSON-able form of `value` that its identity is made of.

    Models become objects of their fields, with the class name under "is" and without the fields
    marked `Placement`; an object with an attribute `identity` is replaced by that string.
    Raises TypeError for what has no stable form (sets, paths, functions) and ValueError for NaN.
    """
    if type(value) is str:  # most of what there is: names and digests of files
        return value
    identity = getattr(value, "identity", None)
    if isinstance(identity, str):
        return {"is": type(value).__name__, "identity": identity}
    if isinstance(value, BaseModel):
        return {"is": type(value).__name__} | fields_of(value)
    if isinstance(value, bool | int | str) or value is None:
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("NaN has no identity")
        return repr(value)
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"only text keys have a stable form, got {list(value)!r}")
        return {key: canonical(value[key]) for key in sorted(value)}
    raise TypeError(f"{type(value).__name__} {value!r} has no stable form for an identity")


def fields_of(model: BaseModel) -> dict[str, Any]:
    """The canonical form of a model's own fields, without `Placement` and without defaults.

    A field that has its default says nothing, so that a new option renames no stage that does not
    use it. A default is therefore a part of what stored identities mean: it never changes without a
    new FORMAT_VERSION (`tests/golden/defaults.json` holds them).
    """
    return {
        name: canonical(value)
        for name, default in _defaults(type(model))
        if (value := getattr(model, name)) is not default and value != default
    }


@cache
def _defaults(kind: type[BaseModel]) -> tuple[tuple[str, Any], ...]:
    """The names of the fields that identities are made of, in order, and their defaults."""
    fields = sorted(kind.model_fields.items())
    return tuple(
        (name, field.get_default(call_default_factory=True))
        for name, field in fields
        if Placement not in field.metadata
    )


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for `value` and the format version."""
    text = json.dumps([FORMAT_VERSION, canonical(value)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, read in pieces; the kept one where the file is as it was."""
    if _kept is None:
        return read_sha256(path)
    return _kept.sha256(path)


@contextmanager
def kept_digests(path: Path, *, again: bool = False) -> Iterator[None]:
    """Within the block `file_sha256` reads a file only if it is new or changed.

    `path` is the database that keeps digests; where it cannot be written none are kept. `again`:
    every file is read, and what was kept is replaced.
    """
    global _kept
    before = _kept
    _kept = _Digests(path, again)
    try:
        yield
    finally:
        _kept.save()
        _kept = before


class _Digests:
    """Digests of files by absolute path, read at once and written at the end."""

    def __init__(self, path: Path, again: bool) -> None:
        self._path = path
        self._known: dict[str, tuple[Seen, str]] = {}
        self._new: dict[str, tuple[Seen, str]] = {}
        self._is_broken = False
        if not again and path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            with closing(sqlite3.connect(self._path)) as database:
                rows = database.execute("SELECT * FROM digests")
                self._known = {row[0]: (tuple(row[1:5]), row[5]) for row in rows}
        except sqlite3.OperationalError:
            pass  # Empty, or of a disk that locks nothing: nothing is known.
        except sqlite3.DatabaseError:
            self._is_broken = True

    def sha256(self, path: str | Path) -> str:
        """The file's digest, read anew only where it may have changed."""
        name = os.path.abspath(path)
        before = _seen(name)
        held = self._new.get(name) or self._known.get(name)
        if held is not None and held[0] == before:
            return held[1]
        found = read_sha256(path)
        settled = time.time_ns() - max(before[2:]) > SETTLED_SECONDS * 1e9
        if settled and _seen(name) == before:
            self._new[name] = before, found
        return found

    def save(self) -> None:
        """Write what is new to the cache."""
        if not self._new:
            return
        rows = [(name, *seen, found) for name, (seen, found) in self._new.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._is_broken:
                self._path.unlink(missing_ok=True)
            with closing(sqlite3.connect(self._path, timeout=30)) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INTEGER, "
                    "inode INTEGER, modified INTEGER, changed INTEGER, sha256 TEXT)"
                )
                database.executemany("INSERT OR REPLACE INTO digests VALUES (?,?,?,?,?,?)", rows)
        except (OSError, sqlite3.DatabaseError):
            return  # A store that one may only read: the next command hashes again.


_kept: _Digests | None = None


def _seen(path: str) -> Seen:
    # Of what a link leads to: its own times say nothing of the bytes.
    found = os.stat(path)
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def read_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes as they are now."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Folders and files that systems, editors and notebooks leave behind, beside those with a dot.
LEFT_BEHIND = (
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    "Thumbs.db",
    "desktop.ini",
    "*~",
    "#*#",
    "*.swp",
    "cache-*.arrow",
)
# How compressed files are called, and compressed tars.
PACKED = (".gz", ".gzip", ".bgz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
PACKED_TARS = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
# What the names of text files end in, by their format; no other file of a text source is read.
# Letters may be large, and what a file is compressed with may stand behind (`plain_name`).
TEXT_SUFFIXES = {
    "jsonl": (".jsonl", ".json"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "txt": (".txt", ".tex"),
    "tokens": (".tar",),
}
# Further ends of names that say less than the content does.
_OTHER_ENDS = (".ndjson", ".jsonlines", ".jl", ".pq", ".parq", ".feather", ".ipc")
# Documents about data, whatever the case of their letters. Records and pictures are none, whatever
# they are called.
NOTES = (
    "readme*",
    "license*",
    "licence*",
    "copying*",
    "notice*",
    "citation*",
    "changelog*",
    "requirements*.txt",
    "dataset_card*",
    "md5sum*",
    "sha*sum*",
    "checksums*",
)
_DOCUMENTS = ("", ".md", ".txt", ".rst", ".html", ".pdf", ".cff", ".bib", ".yaml", ".yml")
# What the libraries of data sets write beside them.
_INFOS = (
    *("dataset_infos.json", "dataset_info.json", "dataset_card.json"),
    *("dataset_dict.json", "state.json"),
)


def any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """What matches a name (no path) that fits one of the shell's `patterns`."""
    return re.compile("|".join(map(translate, patterns)))


_LEFT_BEHIND, _NOTES = any_of(LEFT_BEHIND), any_of(NOTES)
_TEXT_ENDS = tuple(end for ends in TEXT_SUFFIXES.values() for end in ends)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name (no path) is hidden or left behind by a program."""
    return name.startswith(".") or _LEFT_BEHIND.match(name) is not None


def is_note(name: str) -> bool:
    """Whether a file of this name (no path) is about data rather than data."""
    name = name.lower()
    if os.path.splitext(name)[1] not in _DOCUMENTS:
        return name in _INFOS
    return _NOTES.match(name) is not None


def is_text(name: str) -> bool:
    """Whether a file of this name (no path) is one that a text source may be read from."""
    plain = plain_name(name)
    return not is_note(name) and (plain.endswith(_TEXT_ENDS) or is_unnamed(plain))


def is_unnamed(name: str) -> bool:
    """Whether a file's name (as of `plain_name`) leaves it to the content what the file is."""
    end = os.path.splitext(name)[1]
    # Programs put marks such as _SUCCESS beside the parts that they wrote.
    return not name.startswith("_") and (not end.strip(".0123456789") or end in _OTHER_ENDS)


def plain_name(name: str) -> str:
    """The name of a file in small letters, as if it were not compressed (.tgz is a .tar)."""
    stem, end = os.path.splitext(name := name.lower())
    return f"{stem}.tar" if end in PACKED_TARS else stem if end in PACKED else name


def walk(root: str | Path, circles: list[str] | None = None) -> Iterator[str]:
    """The files under `root` that are not hidden, in order, as paths that begin with it.

    Linked folders are entered, but for a link to a folder that it lies in, which is added to
    `circles`; a link to nowhere, or to itself, is listed, so that opening it says so. Raises
    OSError for a folder that cannot be read.
    """
    yield from _walk(os.fspath(root), frozenset(), [] if circles is None else circles)


def _walk(folder: str, above: frozenset[str], circles: list[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        circles.append(folder)
        return
    with os.scandir(folder) as entries:
        shown = sorted((e for e in entries if not is_hidden(e.name)), key=lambda entry: entry.name)
    for entry in shown:
        # `entry.is_dir` would end the walk at a link that leads to itself.
        linked = entry.is_symlink() and os.path.isdir(entry.path)
        if linked or entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, above | {real}, circles)
        else:
            yield entry.path
