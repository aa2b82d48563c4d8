"""A folder that one may only read, for root as well."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.utime", "os.chmod", "os.link")
_closed: list[str] = []


@contextmanager
def only_read(folder: Path) -> Iterator[None]:
    """Within the block this process changes nothing below `folder`: PermissionError."""
    before = _names(folder)
    _closed.append(f"{folder.resolve()}{os.sep}")
    try:
        yield
    finally:
        _closed.pop()
    assert _names(folder) == before


def _names(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def _watch(event: str, details: tuple[Any, ...]) -> None:
    if not _closed or (event != "open" and event not in _CHANGES):
        return
    if event == "open" and not (details[2] or 0) & _WRITES:
        return
    for path in details[:2]:
        if isinstance(path, str | bytes | os.PathLike):
            name = os.path.abspath(os.fsdecode(path))
            if name.startswith(tuple(_closed)):
                raise PermissionError(13, "Permission denied", name)


sys.addaudithook(_watch)
