"""Pictures by their addresses: where img2dataset stored each, in a tar, in a table or as a file."""

import json
import os
import re
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.parse import quote

from pyarrow.parquet import ParquetFile

from midstream.core.digests import walk
from midstream.core.storage import room_for
from midstream.data.formats.files import is_url, join, read_range
from midstream.data.formats.json_records import json_object
from midstream.data.formats.records import LARGEST_BYTES, Picture, headers_of, is_picture
from midstream.data.formats.tables import PARQUET, columns_of, table_rows
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

    A picture's address is the `url` in the .json beside it, in a tar or in a folder, or in its row
    of a Parquet table, as img2dataset writes it. Of tars names and .json alone are read, once, of
    tables addresses; the index is a hidden file in the folder, or where that cannot be written to
    one in the user's cache, that memory need not hold. A folder without such pictures, or at an
    address, gets none. Of what is compressed or damaged it holds what is wrong with it alone.
    """
    if is_url(folder):
        return
    stamps = [(number, *found) for number, found in enumerate(sorted(_places(folder).items()))]
    beside, place = Path(folder, INDEX), _cached(folder)
    if not stamps or _noted(beside) == stamps:
        # Else `PicturesByUrl` would open that.
        place.unlink(missing_ok=True)
        return
    if os.access(folder, os.W_OK | os.X_OK):
        place.unlink(missing_ok=True)
        place = beside
    elif _noted(place) == stamps:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{INDEX}.{uuid.uuid4().hex}.tmp")
    try:
        with room_for(place), closing(sqlite3.connect(temporary)) as index:
            index.executescript(_TABLES)
            index.executemany("INSERT INTO places VALUES (?, ?, ?)", stamps)
            for number, name, _ in stamps:
                read = _beside if name.endswith("/") else _in_tar
                read = _in_table if name.endswith(PARQUET) else read
                rows = ((_key(url), number, *where) for url, *where in read(f"{folder}/{name}"))
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
        self._group: tuple[str, int, list[Any]] = ("", 0, [])
        if folder and not is_url(folder) and (cached := _cached(folder)).is_file():
            self.file = cached
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
        if name.endswith(PARQUET):
            return self._in_row(join(self.folder, name, where), first, where)
        if not 0 < size <= LARGEST_BYTES:
            reason = "picture too large" if size else "zero-byte picture"
            return Reject(where, reason, f"{self.file} has {size:,} bytes of {url}, in {name}")
        path = join(self.folder, name, where)
        data = read_range(path, first, size)
        if len(data) != size:
            raise ValueError(f"{path} is shorter than when it was indexed; fetch it again")
        return Picture(path, first, data)

    def _in_row(self, path: str, row: int, where: str) -> Picture | Reject:
        """The picture in a row of a table, whose group of rows stays in memory for the next."""
        file, first, held = self._group
        if file != path or not first <= row < first + len(held):
            with ParquetFile(path) as table:
                first, number = 0, 0
                while number < table.num_row_groups:
                    rows = table.metadata.row_group(number).num_rows
                    if row < first + rows:
                        break
                    first, number = first + rows, number + 1
                else:
                    raise ValueError(f"{path} is shorter than when it was indexed; fetch it again")
                column = _picture_column(path)
                held = table.read_row_group(number, columns=[column]).column(0).to_pylist()
            self._group = (path, first, held)
        data = held[row - first]
        if not data or len(data) > LARGEST_BYTES:
            reason = "picture too large" if data else "zero-byte picture"
            return Reject(where, reason, f"row {row} of {path} has {len(data or b''):,} bytes")
        return Picture("", 0, data)

    def close(self) -> None:
        """Let go of the index."""
        if self._index is not None:
            self._index.close()


def _cached(folder: str) -> Path:
    """Where the index of a folder is that cannot be written to."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):  # a user without a home, as containers have them
        caches = gettempdir()
    name = content_hash(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hex()
    return Path(caches, "midstream", f"pictures-by-url-{name}.sqlite")


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
    """What tells the state of each tar and table of pictures under a folder, and, with a slash, of
    each folder where .json lie beside pictures."""
    names = [os.path.relpath(name, folder) for name in walk(folder)]
    shown = {os.path.splitext(name)[0] for name in names if is_picture(name)}
    pairs = shown & {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def stamp(name: str) -> list[int]:
        stat = os.stat(f"{folder}/{name}")
        return [stat.st_size, stat.st_mtime_ns]

    found = {name: json.dumps(stamp(name)) for name in names if name.lower().endswith(".tar")}
    # What is beside a tar or a folder tells of its pictures again.
    told = {os.path.splitext(name)[0] for name in found} | {os.path.dirname(name) for name in names}
    tables = (x for x in names if x.endswith(PARQUET) and os.path.splitext(x)[0] not in told)
    found |= {x: json.dumps(stamp(x)) for x in tables if _holds_pictures(f"{folder}/{x}")}
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


def _picture_column(path: str) -> str | None:
    """The column of a table's pictures, which is called as their files would end; None where it has
    none, or no addresses."""
    names = columns_of(path).names
    return next((x for x in names if is_picture(f"x.{x}")), None) if "url" in names else None


def _holds_pictures(path: str) -> bool:
    try:
        return _picture_column(path) is not None
    except ValueError:
        return True  # It may; what is wrong with it is written down.


def _in_table(path: str) -> Iterator[tuple[str, str, int, int]]:
    """The address of each picture of a table, "", its row, and 1."""
    column = _picture_column(path)
    assert column is not None, "`_places` lists no other table"
    told = "status" if "status" in columns_of(path).names else column
    for row, (url, state) in enumerate(table_rows(path, ["url", told])):
        fetched = state.as_py() == "success" if told == "status" else state.is_valid
        if fetched and url.is_valid:
            yield str(url.as_py()), "", row, 1


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
