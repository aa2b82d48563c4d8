"""Pictures by their addresses: where img2dataset stored each of them, in a tar or as a file."""

import json
import os
import re
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from midstream.core.digests import walk
from midstream.core.storage import require_writable, room_for
from midstream.data.formats.files import is_url, join, read_range
from midstream.data.formats.json_records import json_object
from midstream.data.formats.records import LARGEST_BYTES, Picture, headers_of, is_picture
from midstream.data.source_writer import Reject
from midstream.data.sources import content_hash

# Hidden, so that it is no file of any source.
INDEX = ".pictures-by-url.sqlite"
# A hash stands for an address: addresses are long, and hundreds of millions of them many bytes.
_TABLES = """
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
    CREATE TABLE places (number INTEGER PRIMARY KEY, name TEXT, stamp TEXT);
    CREATE TABLE damaged (problem TEXT);
    CREATE TABLE pictures (url BLOB, place INTEGER, file TEXT, first INTEGER, size INTEGER);
"""
_LOOK_UP = """
    SELECT name || file, first, size FROM pictures JOIN places ON place = number
    WHERE url = ? ORDER BY pictures.rowid LIMIT 1
"""


def index_urls(folder: str) -> None:
    """Write down where the picture of each address lies under `folder`, if it is not yet.

    A picture's address is the `url` in the .json beside it, in a tar or in a folder, as img2dataset
    writes it. Of tars names and .json alone are read, once; the index is a hidden file in the
    folder that memory need not hold. A folder without such pictures, or at an address, gets none.
    Of a tar that is compressed or damaged it holds what is wrong with it alone. Raises
    PermissionError where the folder is somebody else's.
    """
    if is_url(folder):
        return
    stamps = [(number, *found) for number, found in enumerate(sorted(_places(folder).items()))]
    place = Path(folder, INDEX)
    if not stamps or _noted(place) == stamps:
        return
    require_writable(Path(folder))
    temporary = place.with_name(f"{INDEX}.{uuid.uuid4().hex}.tmp")
    try:
        with room_for(place), closing(sqlite3.connect(temporary)) as index:
            index.executescript(_TABLES)
            index.executemany("INSERT INTO places VALUES (?, ?, ?)", stamps)
            for number, name, _ in stamps:
                stored = (_beside if name.endswith("/") else _in_tar)(f"{folder}/{name}")
                rows = ((_key(url), number, *where) for url, *where in stored)
                try:
                    index.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?)", rows)
                except ValueError as error:
                    index.execute("DELETE FROM pictures WHERE place = ?", (number,))
                    index.execute("INSERT INTO damaged VALUES (?)", (str(error),))
            # Sorted once at the end, outside of memory.
            index.execute("CREATE INDEX by_url ON pictures (url)")
            index.commit()
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


class PicturesByUrl:
    """The pictures of a folder that `index_urls` has seen, by their addresses; close it."""

    def __init__(self, folder: str | None) -> None:
        self.folder, self.file = folder or "", Path(folder or "", INDEX)
        self._index = None
        if folder and not is_url(folder) and self.file.is_file():
            name = f"file:{quote(str(self.file))}?mode=ro&immutable=1"
            self._index = sqlite3.connect(name, uri=True)

    def load(self, url: str, where: str) -> Picture | Reject:
        """The picture that was fetched from `url`, as it lies in its tar, or why there is none.

        Raises ValueError where it may be in a tar that is compressed or damaged.
        """
        if self._index is None and self.folder and not is_url(self.folder):
            # The index is named first: it is there once something has been fetched.
            return Reject(where, "missing picture", f"{self.file} has no {url}; fetch it")
        if self._index is None:
            remedy = "name the folder that img2dataset fetched it into with --images"
            return Reject(where, "missing picture", f"--images has no {url}; {remedy}")
        row = self._index.execute(_LOOK_UP, (_key(url),))
        found = row.fetchone()
        if found is None:
            for (problem,) in self._index.execute("SELECT problem FROM damaged LIMIT 1"):
                raise ValueError(f"{where}: {url} may be in a damaged tar: {problem}")
            return Reject(where, "missing picture", f"{self.file} has no {url}; fetch it")
        name, first, size = found
        if not 0 < size <= LARGEST_BYTES:
            reason = "picture too large" if size else "zero-byte picture"
            return Reject(where, reason, f"{self.file} has {size:,} bytes of {url}, in {name}")
        path = join(self.folder, name, where)
        data = read_range(path, first, size)
        if len(data) != size:
            raise ValueError(f"{path} is shorter than when it was indexed; fetch it again")
        return Picture(path, first, data)

    def close(self) -> None:
        """Let go of the index."""
        if self._index is not None:
            self._index.close()


def _noted(place: Path) -> list[tuple[int, str, str]]:
    """The tars and folders that an index is of, as they were; none where there is no whole one."""
    if not place.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"file:{quote(str(place))}?mode=ro", uri=True)) as index:
            index.execute("SELECT problem FROM damaged LIMIT 1")
            return list(index.execute("SELECT number, name, stamp FROM places ORDER BY number"))
    except sqlite3.DatabaseError:
        return []


def _key(text: str) -> bytes:
    return content_hash(text.encode("utf-8", "replace"))


def _places(folder: str) -> dict[str, str]:
    """What tells the state of each tar under a folder, and, with a slash, of each folder where
    .json lie beside pictures."""
    names = [os.path.relpath(name, folder) for name in walk(folder)]
    shown = {os.path.splitext(name)[0] for name in names if is_picture(name)}
    pairs = shown & {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def stamp(name: str) -> list[int]:
        stat = os.stat(f"{folder}/{name}")
        return [stat.st_size, stat.st_mtime_ns]

    found = {name: json.dumps(stamp(name)) for name in names if name.lower().endswith(".tar")}
    beside = [
        name
        for name in names
        if (name.endswith(".json") or is_picture(name)) and os.path.splitext(name)[0] in pairs
    ]
    # A folder's own time changes with the index.
    for place, files in groupby(sorted(beside, key=os.path.split), key=os.path.dirname):
        stamps = "\n".join(json.dumps([name, *stamp(name)]) for name in files)
        found[f"{place or '.'}/"] = _key(stamps).hex()
    return found


def _beside(folder: str) -> Iterator[tuple[str, str, int, int]]:
    """The address of each picture of a folder, its name, 0, and its size."""
    with os.scandir(folder) as entries:
        files = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    pictures = {os.path.splitext(name)[0]: name for name in sorted(files) if is_picture(name)}
    for stem, name in pictures.items():
        if f"{stem}.json" in files:
            url = _url_in(Path(folder, f"{stem}.json").read_bytes(), folder)
            if url is not None:
                yield url, name, 0, files[name]


def _in_tar(path: str) -> Iterator[tuple[str, str, int, int]]:
    """The address of each picture of a tar, "", its first byte and its size."""
    key, url = "", None
    picture: tuple[int, int] | None = None
    with open(path, "rb") as stream:
        for info in headers_of(path, stream, os.fstat(stream.fileno()).st_size):
            own = re.sub(r"(?<=[^/])\.[^/]*$", "", info.name)
            if own != key:
                key, url, picture = own, None, None
            if info.isreg() and info.name.endswith(".json"):
                stream.seek(info.offset_data)
                url = _url_in(stream.read(min(info.size, LARGEST_BYTES)), path)
            elif info.isreg() and is_picture(info.name):
                picture = (info.offset_data, info.size)
            if url is not None and picture is not None:
                yield url, "", *picture
                url, picture = None, None


def _url_in(data: bytes, where: str) -> str | None:
    found = json_object(data, where)
    url = None if isinstance(found, Reject) else found.get("url")
    return url if isinstance(url, str) else None
