"""Which input files are one and the same: they would count twice, and are refused."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

from midstream.core.digests import PACKED, PACKED_TARS, is_unnamed
from midstream.data.formats.files import base_name, folder_of, is_url, read_head, read_range

T = TypeVar("T")

# Of two files with one name, one of these holds what the other does in another format.
_RECORDS = (".jsonl", ".json", ".parquet", ".arrow", ".tar")
_LINES = (".jsonl", ".json")
_TELLING_BYTES = 64
_EDGE_BYTES, _HEAD_BYTES, _COMPARED_BYTES = 2**16, 2**20, 2**22


def refuse_twins(sizes: Mapping[str, int]) -> None:
    """Raises ValueError with the names of two of these files, given with their bytes, that are one.

    That is a file beside its compressed self or beside the same in another format (by their names),
    a link and what it leads to, and a copy anywhere: a file of the same bytes, or, compressed and
    under the same name, of bytes that begin the same. So is what a local file of lines begins with
    in a file that is named after it or has no suffix (`split` makes such): a copy that was cut, or
    the first of its parts. Empty files are no copies.
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
    for named in _alike(filled, lambda file: _unpacked_name(base_name(file))):
        if not any(map(_is_packed, named)):
            continue
        for near in _alike(named, lambda file: read_head(file, _EDGE_BYTES)):
            for copies in _alike(near, lambda file: read_head(file, _HEAD_BYTES)):
                raise _refusal(copies, "hold the same records, once compressed,")

    for near in _alike(filter(_holds_lines, filled), _first_lines):
        for part, whole in combinations(sorted(near, key=sizes.__getitem__), 2):
            if _named_after(part, whole) and _begins(part, whole, sizes[part]):
                raise ValueError(
                    f"{part} is what {whole} begins with, a part of it or a copy that was cut, and "
                    "would count twice; remove it, and the other parts if it is one, or name the "
                    "files to read"
                )


def refuse_twin_samples(samples: Iterable[Sequence[str]], sizes: Mapping[str, int]) -> None:
    """Raises ValueError with the names of two samples, each of files beside each other, that are
    one: links to the same files, or files of the same names and bytes in another folder.

    Other samples may show one picture, or have one caption.
    """
    listed = [tuple(files) for files in samples]
    for linked in _alike((files for files in listed if not is_url(files[0])), _inodes):
        raise _refusal([files[0] for files in linked], "are one file, and so are their captions,")
    for named in _alike(listed, lambda files: tuple((base_name(x), sizes[x]) for x in files)):
        for copies in _alike(named, lambda files: tuple(_digest(x, sizes[x]) for x in files)):
            raise _refusal([files[0] for files in copies], "and their captions are copies")


def _alike(files: Iterable[T], key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """The groups of two files and more that have one key; None is no key."""
    groups = defaultdict[Hashable, list[T]](list)
    for file in files:
        groups[key(file)].append(file)
    return (group for found, group in groups.items() if len(group) > 1 and found is not None)


def _refusal(files: list[str], how: str) -> ValueError:
    one, two = sorted(files)[:2]
    return ValueError(
        f"{one} and {two} {how} and would count twice; remove one, or name the files to read"
    )


def _is_packed(file: str) -> bool:
    return base_name(file).lower().endswith(PACKED + PACKED_TARS)


def _holds_lines(file: str) -> bool:
    name = base_name(file).lower()
    return not (is_url(file) or _is_packed(file)) and (name.endswith(_LINES) or is_unnamed(name))


def _first_lines(file: str) -> bytes | None:
    """Two of them at least, since a single record may be in two files, and more where they are as
    short as those that many files of JSON begin with."""
    head = read_range(file, 0, _EDGE_BYTES)
    second = head.find(b"\n") + 1
    end = head.find(b"\n", max(second, _TELLING_BYTES)) if second else -1
    return head[:end] if end >= 0 else head if len(head) == _EDGE_BYTES else None


def _named_after(part: str, whole: str) -> bool:
    """Whether a file's name says that it may be a part or copy of another: all.jsonl.00 and
    all (1).jsonl of all.jsonl, xaa of any; not 10.jsonl of 1.jsonl."""
    one, two = (base_name(file).lower() for file in (part, whole))
    short, long = sorted((os.path.splitext(name)[0] for name in (one, two)), key=len)
    return is_unnamed(one) or (long.startswith(short) and not long[len(short) :][:1].isalnum())


def _begins(part: str, whole: str, size: int) -> bool:
    steps = (
        (first, min(_COMPARED_BYTES, size - first)) for first in range(0, size, _COMPARED_BYTES)
    )
    return all(read_range(part, *step) == read_range(whole, *step) for step in steps)


def _unpacked_name(name: str) -> str:
    # Unlike `plain_name` in the case of its letters, since "a" and "A" are two files.
    stem, end = os.path.splitext(name)
    tar = end.lower() in PACKED_TARS
    return f"{stem}.tar" if tar else stem if end.lower() in PACKED else name


def _place(file: str) -> tuple[str, str] | None:
    stem, end = os.path.splitext(_unpacked_name(base_name(file)))
    return (folder_of(file), stem) if end.lower() in _RECORDS else None


def _inode(file: str) -> tuple[int, int] | None:
    found = os.stat(file)
    return (found.st_dev, found.st_ino) if found.st_ino else None


def _inodes(files: Sequence[str]) -> Hashable:
    found = tuple(map(_inode, files))
    return None if None in found else found


def _edges(file: str, size: int) -> tuple[bytes, bytes]:
    end = max(0, size - _EDGE_BYTES)
    return read_range(file, 0, _EDGE_BYTES), read_range(file, end, _EDGE_BYTES)


def _digest(file: str, size: int) -> bytes:
    found = hashlib.sha256()
    for start in range(0, size, _COMPARED_BYTES):
        found.update(read_range(file, start, _COMPARED_BYTES))
    return found.digest()
