"""Pictures by their addresses: where in the tars of img2dataset each of them was stored."""

import json
import os
import re
import sqlite3
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from midstream.core.digests import walk
from midstream.core.storage import require_writable, room_for
from midstream.data.formats.files import is_url, join, read_range
from midstream.data.formats.json_records import json_object
from midstream.data.formats.records import LARGEST_BYTES, Picture, is_picture
from midstream.data.source_writer import Reject
from midstream.data.sources import content_hash

# Hidden, so that it is no file of any source.
INDEX = ".pictures-by-url.sqlite"
# A hash stands for an address: addresses are long, and hundreds of millions of them many bytes.
_TABLES = """
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
    CREATE TABLE tars (number INTEGER PRIMARY KEY, name TEXT, stamp TEXT);
    CREATE TABLE pictures (url BLOB, tar INTEGER, first INTEGER, size INTEGER);
"""
_LOOK_UP = """
    SELECT name, first, size FROM pictures JOIN tars ON tar = number
    WHERE url = ? ORDER BY pictures.rowid LIMIT 1
"""


def index_urls(folder: str) -> None:
    """Write down where the tars under `folder` have the picture of each address, if it is not yet.

    A picture's address is the `url` in the .json beside it, as img2dataset writes it. Names and
    .json alone are read, once; the index is a hidden file in the folder that memory need not hold.
    A folder without tars, or at an address, gets none. Raises ValueError for a tar that is
    compressed or damaged, and PermissionError where the folder is somebody else's.
    """
    if is_url(folder):
        return
    tars = sorted(os.path.relpath(x, folder) for x in walk(folder) if x.lower().endswith(".tar"))
    stamps = [(number, name, _stamp(f"{folder}/{name}")) for number, name in enumerate(tars)]
    place = Path(folder, INDEX)
    if not tars or _noted(place) == stamps:
        return
    require_writable(Path(folder))
    temporary = place.with_name(f"{INDEX}.{uuid.uuid4().hex}.tmp")
    try:
        with room_for(place), closing(sqlite3.connect(temporary)) as index:
            index.executescript(_TABLES)
            index.executemany("INSERT INTO tars VALUES (?, ?, ?)", stamps)
            for number, name, _ in stamps:
                rows = ((*row[:1], number, *row[1:]) for row in _pictures_in(f"{folder}/{name}"))
                index.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?)", rows)
            # Sorted once at the end, outside of memory.
            index.execute("CREATE INDEX by_url ON pictures (url)")
            index.commit()
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


class PicturesByUrl:
    """The pictures of a folder that `index_urls` has seen, by their addresses; close it."""

    def __init__(self, folder: str | None) -> None:
        self.folder, self._index = folder or "", None
        if folder and not is_url(folder) and Path(folder, INDEX).is_file():
            name = f"file:{quote(str(Path(folder, INDEX)))}?mode=ro&immutable=1"
            self._index = sqlite3.connect(name, uri=True)

    def load(self, url: str, where: str) -> Picture | Reject:
        """The picture that was fetched from `url`, as it lies in its tar."""
        if self._index is None:
            remedy = "name the folder of the tars that img2dataset fetched it into with --images"
            return Reject(where, "missing picture", f"{url} is an address; {remedy}")
        row = self._index.execute(_LOOK_UP, (content_hash(url.encode("utf-8", "replace")),))
        found = row.fetchone()
        if found is None:
            return Reject(where, "missing picture", f"{url} is in no tar under {self.folder}")
        name, first, size = found
        if not 0 < size <= LARGEST_BYTES:
            reason = "picture too large" if size else "zero-byte picture"
            return Reject(where, reason, f"{url} has {size:,} bytes in {name}")
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
    """The tars that an index was made of, as they were; none where there is no whole one."""
    if not place.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"file:{quote(str(place))}?mode=ro", uri=True)) as index:
            return list(index.execute("SELECT number, name, stamp FROM tars ORDER BY number"))
    except sqlite3.DatabaseError:
        return []


def _stamp(path: str) -> str:
    found = os.stat(path)
    return json.dumps([found.st_size, found.st_mtime_ns])


def _pictures_in(path: str) -> Iterator[tuple[bytes, int, int]]:
    """The hash of its address, the first byte and the size of each picture of a tar."""
    key, url = "", None
    picture: tuple[int, int] | None = None
    try:
        with tarfile.open(path, "r:") as archive:
            while (info := archive.next()) is not None:
                # `tarfile` keeps every member that it has seen.
                archive.members.clear()  # type: ignore[attr-defined]
                own = re.sub(r"(?<=[^/])\.[^/]*$", "", info.name)
                if own != key:
                    key, url, picture = own, None, None
                if info.isreg() and info.name.endswith(".json"):
                    stream = archive.extractfile(info)
                    found = json_object(b"" if stream is None else stream.read(), path)
                    url = None if isinstance(found, Reject) else found.get("url")
                elif info.isreg() and is_picture(info.name):
                    picture = (info.offset_data, info.size)
                if isinstance(url, str) and picture is not None:
                    yield (content_hash(url.encode("utf-8", "replace")), *picture)
                    url, picture = None, None
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no whole tar file, or compressed ({error}); fetch it again or unpack it"
        ) from None
