"""The only place that writes: temporary name, fsync, manifest, rename."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class CorruptError(ValueError):
    """A stored file is missing or differs from its manifest."""


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` completely or not at all; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Put `value` as indented JSON at `path` completely or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError names the file and the line if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with a manifest, when the block ends well.

    Every file gets its size and sha256 in `manifest.json`. An existing `path` is replaced only
    then. If the block raises, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(item for item in temporary.rglob("*") if item.is_file())
        entries = {item.relative_to(temporary).as_posix(): _entry(item) for item in files}
        write_json(temporary / MANIFEST, entries)
        for item in files:
            _sync_file(item)
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
            path.replace(old)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def verify(path: Path) -> None:
    """Check every file of a folder made by `new_folder` against its manifest.

    Raises CorruptError with the first file that is missing or has other bytes.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CorruptError(f"{path} has no {MANIFEST}: it was never finished")
    for name, entry in read_json(manifest).items():
        file = path / name
        if not file.is_file():
            raise CorruptError(f"{file} is missing though the manifest lists it")
        if _entry(file) != entry:
            raise CorruptError(f"{file} differs from its manifest; delete {path} and run again")


def remove_leftovers(folder: Path) -> int:
    """Delete what writers killed in the middle left in `folder`; returns how many."""
    left = [item for item in folder.glob(".*") if item.suffix in (".tmp", ".old")]
    for item in left:
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    return len(left)


def append_line(path: Path) -> Callable[[dict[str, Any]], None]:
    """A function that adds one JSON object as a line to `path` and flushes it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def add(value: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

    return add


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    _sync_file(path)
