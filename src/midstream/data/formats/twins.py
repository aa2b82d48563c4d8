"""Files that are one and the same data, which would count twice.

Names are enough for files that lie side by side. Elsewhere bytes are compared, and only those of
files that could be equal, each read once.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from midstream.data.formats.files import (
    GZIP,
    ZSTD,
    base_name,
    folder_of,
    is_url,
    read_head,
    read_range,
)

# Of two files with one name, one of these holds what the other does in another format.
_RECORDS = (".jsonl", ".json", ".parquet", ".tar")
_EDGE_BYTES, _HEAD_BYTES, _PIECE_BYTES = 2**16, 2**20, 2**22


def refuse_twins(sizes: Mapping[str, int]) -> None:
    """Raises ValueError with the names of two of these files, given with their bytes, that are one.

    That is a file beside its compressed self or beside the same in another format (by their names),
    a link and what it leads to, and a copy anywhere: a file of the same bytes, or, compressed and
    under the same name, of bytes that begin the same. Empty files are no copies.
    """
    for side_by_side in _alike(sizes, _place):
        raise _refusal(side_by_side, "are the same records, by their names,")
    for linked in _alike((file for file in sizes if not is_url(file)), _inode):
        raise _refusal(linked, "are one file")
    filled = [file for file in sizes if sizes[file]]
    for equal in _alike(filled, sizes.__getitem__):
        for near in _alike(equal, lambda file: _edges(file, sizes[file])):
            for copies in _alike(near, lambda file: _digest(file, sizes[file])):
                raise _refusal(copies, f"hold the same {sizes[copies[0]]:,} bytes")
    for named in _alike(filled, lambda file: _unpacked(base_name(file))):
        if any(_is_packed(file) for file in named) and not all(map(_is_packed, named)):
            for copies in _alike(named, lambda file: read_head(file, _HEAD_BYTES)):
                raise _refusal(copies, "hold the same records, once compressed,")


def _alike(files: Iterable[str], key: Callable[[str], object]) -> Iterator[list[str]]:
    """The groups of two files and more that have one key; None is no key."""
    groups = defaultdict[object, list[str]](list)
    for file in files:
        groups[key(file)].append(file)
    return (group for found, group in groups.items() if len(group) > 1 and found is not None)


def _refusal(files: list[str], how: str) -> ValueError:
    one, two = sorted(files)[:2]
    return ValueError(
        f"{one} and {two} {how} and would count twice; remove one, or name the files to read"
    )


def _is_packed(file: str) -> bool:
    return base_name(file).endswith(GZIP + ZSTD)


def _unpacked(name: str) -> str:
    ends = (end for end in GZIP + ZSTD if name.endswith(end))
    return name.removesuffix(next(ends, ""))


def _place(file: str) -> tuple[str, str] | None:
    name = _unpacked(base_name(file))
    ends = [end for end in _RECORDS if name.endswith(end)]
    return (folder_of(file), name.removesuffix(ends[0])) if ends else None


def _inode(file: str) -> tuple[int, int] | None:
    found = os.stat(file)
    return (found.st_dev, found.st_ino) if found.st_ino else None


def _edges(file: str, size: int) -> tuple[bytes, bytes]:
    end = max(0, size - _EDGE_BYTES)
    return read_range(file, 0, _EDGE_BYTES), read_range(file, end, _EDGE_BYTES)


def _digest(file: str, size: int) -> bytes:
    found = hashlib.sha256()
    for start in range(0, size, _PIECE_BYTES):
        found.update(read_range(file, start, _PIECE_BYTES))
    return found.digest()
