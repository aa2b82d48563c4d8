"""The pictures that records name: by a file's name, bytes, a range of an archive, or an address.

Addresses are looked up where img2dataset stored what it fetched: in a tar, a table or as a file.
"""

import base64
import binascii
import errno
import json
import os
import re
import sqlite3
import unicodedata
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from itertools import accumulate, groupby
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.parse import quote, unquote

from pyarrow.parquet import ParquetFile

from midstream.core.digests import walk
from midstream.core.storage import room_for
from midstream.data.formats.files import folder_of, inside, is_url, join, read_range
from midstream.data.formats.record_files import PARQUET, columns_of, json_object, table_rows
from midstream.data.formats.records import (
    LARGEST_BYTES,
    PICTURES,
    Picture,
    ReadOptions,
    headers_of,
    is_picture,
)
from midstream.data.source_writer import RejectedError, or_reject
from midstream.data.sources import content_hash

# How JPEG, PNG, WebP and GIF begin in base64; no name of a file is so long and begins so.
_BASE64, _BASE64_CHARACTERS = ("/9j/", "_9j_", "iVBORw0KGgo", "UklGR", "R0lGOD"), 64
# Such bytes as Python shows them: str(base64.b64encode(data)).
_BYTES = re.compile(r"b'([A-Za-z0-9+/]{64,}=*)'")
MISSING, ZERO_BYTES, PICTURE_TOO_LARGE = "missing picture", "zero-byte picture", "picture too large"
NO_PICTURE = "no picture"
# No file has so many bytes.
LARGEST_FILE = 2**63


def picture_roots(path: str, options: ReadOptions) -> list[str]:
    """Where the names in a file start, first, and its own folder, for absolute ones."""
    return [*([] if options.images is None else [options.images]), folder_of(path)]


def load_picture(roots: Sequence[str], name: str) -> Picture:
    """What a record calls `name`, under the folders or URLs `roots` (see `inside`).

    Raises RejectedError where there is none, or none that can be read.
    """
    picture = load_range(roots, name, 0, LARGEST_BYTES + 1)
    if not picture.data:
        raise RejectedError(ZERO_BYTES, picture.file)
    if len(picture.data) > LARGEST_BYTES:
        raise RejectedError(PICTURE_TOO_LARGE, f"{picture.file} has over {LARGEST_BYTES:,} bytes")
    return picture


def load_range(roots: Sequence[str], name: str, first: int, size: int) -> Picture:
    """Up to `size` bytes from `first` on of what `load_picture` would load.

    Where no file has the name it may have / for \\ (lists of Windows), the same letters in another
    form of Unicode (files of macOS), its characters as in an address (%20), or, on a local disk,
    the end in letters of the other case (.JPG of cameras).
    """
    try:
        return _load_range(roots, name, first, size)
    except RejectedError as error:
        if error.reason != MISSING:
            raise
        missing = error
    if "\\" in name:
        return load_range(roots, name.replace("\\", "/"), first, size)
    stem, end = os.path.splitext(name)
    others = {unquote(name), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))}
    others |= set() if is_url(roots[0]) else {stem + end.lower(), stem + end.upper()}
    for other in sorted(others - {name}):
        with suppress(RejectedError):
            return _load_range(roots, other, first, size)
    raise _with_hint(missing)


def _with_hint(missing: RejectedError) -> RejectedError:
    """The same with a file that has the same name but for its end (OCR-VQA's .gif), if any.

    It may be another picture, such as a mask: it is not read.
    """
    stem, end = os.path.splitext(missing.detail)
    if is_url(missing.detail) or not end:
        return missing
    others = [f"{stem}.{other}" for other in PICTURES[:5] if f".{other}" != end.lower()]
    beside = next((other for other in others if os.path.isfile(other)), None)
    if beside is None:
        return missing
    detail = f"{missing.detail} has another end there, {os.path.basename(beside)}; rename one"
    return RejectedError(MISSING, detail)


def _load_range(roots: Sequence[str], name: str, first: int, size: int) -> Picture:
    try:
        path = inside(roots, name, "")
    except ValueError as error:
        raise RejectedError("picture outside the folder", str(error).removeprefix(": ")) from None
    try:
        return Picture(path, first, read_range(path, first, size))
    except OSError as error:
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        # A failing disk or connection is no missing picture.
        if not isinstance(error, absent) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise RejectedError(MISSING, not_there(path, error.errno)) from None


def load_shown(shown: str | bytes, roots: Sequence[str]) -> Picture:
    """A picture by its name, or of bytes that no range of a file holds as they are."""
    return load_picture(roots, shown) if isinstance(shown, str) else held_picture(shown)


def held_picture(data: bytes, what: str = "") -> Picture:
    """A picture of bytes that no range of a file holds as they are; `what` they are, for errors."""
    if len(data) > LARGEST_BYTES:
        raise RejectedError(PICTURE_TOO_LARGE, what or f"over {LARGEST_BYTES:,} bytes")
    if not data:
        raise RejectedError(ZERO_BYTES, what)
    return Picture("", 0, data)


def picture_in(value: object) -> str | bytes | None:
    """The picture in a value: its name, its bytes, base64 of them, or an object that holds one.

    Base64 stands in a data: URL or alone; an object is {bytes, path}, {url}, {base64} or {source}.
    None: there is none. Raises RejectedError for base64 that is damaged.
    """
    if isinstance(value, dict):
        value = _held_in(value)
    if not isinstance(value, str):
        return value if isinstance(value, bytes) else None
    if (repr_of := _BYTES.fullmatch(value)) is not None:
        value = repr_of[1]
    alone = value.startswith(_BASE64) and len(value) >= _BASE64_CHARACTERS
    if not alone and value[:5].lower() != "data:":
        return value
    head, comma, data = (";base64", ",", value) if alone else value.partition(",")
    data = "".join(data.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        if comma and head.lower().endswith(";base64"):
            # Some leave the filling at its end out.
            return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except binascii.Error:
        pass
    raise RejectedError(
        NO_PICTURE, "its base64 is damaged" if alone else "its data: URL is no base64"
    )


def _held_in(value: dict[str, Any]) -> object:
    value = value["source"] if isinstance(value.get("source"), dict) else value
    held = next((value[x] for x in ("bytes", "base64", "data") if value.get(x) is not None), None)
    if isinstance(held, bytes):
        return held
    if isinstance(held, str) and held:
        return held if held.startswith("data:") else f"data:;base64,{held}"
    return next((value[x] for x in ("path", "url") if value.get(x)), None)


def not_there(path: str, number: int | None = None) -> str:
    """A file that cannot be opened, and why where that is known; `number` is the error's."""
    if number == errno.ENAMETOOLONG:
        return f"{path[:200]}... has {len(path):,} characters, too many for a file's name"
    if number == errno.ELOOP:
        return f"{path} has links that go round in a circle"
    if not is_url(path) and os.path.islink(path):
        return f"{path} has no file behind it: it links to {os.readlink(path)}"
    return path


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
_DAMAGED = "SELECT problem FROM damaged LIMIT 1"


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

    def load(self, url: str, where: str) -> Picture:
        """The picture that was fetched from `url`, as it lies in its tar.

        Raises RejectedError where there is none, and ValueError that names `where` if it may
        be in a tar that is compressed or damaged.
        """
        if self._index is None and (not self.folder or is_url(self.folder)):
            remedy = "name the folder that img2dataset fetched it into with --images"
            raise RejectedError(MISSING, f"--images has no {url}; {remedy}")
        found = None
        # The index is named first below: it is there once something has been fetched.
        if self._index is not None:
            found = self._index.execute(_LOOK_UP, (_key(url),)).fetchone()
        if found is None:
            for (problem,) in self._index.execute(_DAMAGED) if self._index else ():
                raise ValueError(f"{where}: {url} may be in a damaged tar: {problem}")
            raise RejectedError(MISSING, f"{self.file} has no {url}; fetch it")
        name, first, size = found
        path = join(self.folder, name, where)
        if name.endswith(PARQUET):
            return self._in_row(path, first)
        if not 0 < size <= LARGEST_BYTES:
            reason = PICTURE_TOO_LARGE if size else ZERO_BYTES
            raise RejectedError(reason, f"{self.file} has {size:,} bytes of {url}, in {name}")
        data = read_range(path, first, size)
        if len(data) != size:
            raise ValueError(f"{path} is shorter than when it was indexed; fetch it again")
        return Picture(path, first, data)

    def _in_row(self, path: str, row: int) -> Picture:
        """The picture in a row of a table, whose group of rows stays in memory for the next."""
        file, first, held = self._group
        if file != path or not first <= row < first + len(held):
            with ParquetFile(path) as table:
                sizes = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
                ends = list(accumulate(sizes))
                if row >= sum(sizes):
                    raise ValueError(f"{path} is shorter than when it was indexed; fetch it again")
                number = bisect_right(ends, row)
                column = _picture_column(path)
                held = table.read_row_group(number, columns=[column]).column(0).to_pylist()
            first = ends[number] - sizes[number]
            self._group = (path, first, held)
        data = held[row - first] or b""
        return held_picture(data, f"row {row} of {path} has {len(data):,} bytes")

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
            index.execute(_DAMAGED)
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
            url = _url_in(Path(folder, f"{stem}.json").read_bytes())
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
                url = _url_in(stream.read(min(info.size, LARGEST_BYTES)))
            elif info.isreg() and is_picture(info.name):
                picture = (info.offset_data, info.size)
            if url is not None and picture is not None:
                yield url, "", *picture
                url, picture = None, None


def _url_in(data: bytes) -> str | None:
    found = or_reject("", json_object, data)
    url = found.get("url") if isinstance(found, dict) else None
    return url if isinstance(url, str) else None
