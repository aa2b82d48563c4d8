"""What all formats of captions check, and lists of them: COCO, CSV, JSON, tables."""

import base64
import binascii
import csv
import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import ijson

from midstream.core.digests import plain_name
from midstream.data.formats.files import (
    base_name,
    folder_of,
    inside,
    is_folder,
    is_url,
    read_lines,
    read_range,
    unpacked,
)
from midstream.data.formats.records import (
    LARGEST_BYTES,
    CaptionRecord,
    Picture,
    ReadOptions,
    Unit,
    list_entries,
    unicode_problem,
)
from midstream.data.formats.tables import columns_of, table_rows
from midstream.data.source_writer import Reject

# Where a picture stands in an object or a table, the first of them that is there.
PICTURE_KEYS = ("file_name", "image", "images", "jpg", "jpeg", "png", "webp")
NOT_UTF8, NOT_UNICODE = "caption not UTF-8", "caption not Unicode"


def text_keys(options: ReadOptions) -> tuple[str, ...]:
    """Where a caption stands, the first of them that is there."""
    return ("text", "caption") if options.text_key == "text" else (options.text_key,)


def field_of(values: dict[str, Any], options: ReadOptions) -> object:
    """The caption in a JSON object; None if it has none."""
    return next((values[key] for key in text_keys(options) if key in values), None)


def json_object(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object, and why a half of a surrogate pair may stand in it; None and the reason if none.

    Bytes that are no UTF-8 stand in it as such halves.
    """
    try:
        text, reason = data.decode("utf-8-sig"), NOT_UNICODE
    except UnicodeDecodeError:
        text, reason = data.decode("utf-8", "surrogateescape"), NOT_UTF8
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None, "metadata not JSON"
    return (found, reason) if isinstance(found, dict) else (None, "metadata not JSON")


def caption_of(value: object, where: str, reason: str = NOT_UNICODE) -> str | Reject:
    """The caption without white space around it; `reason` says what a lone surrogate means."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Reject(where, NOT_UTF8, str(error))
    if not isinstance(value, str):
        return Reject(where, "no caption", f"it is {type(value).__name__}")
    caption = value.strip()
    if problem := unicode_problem(caption):
        return Reject(where, reason, problem)
    return caption or Reject(where, "empty caption")


def picture_roots(path: str, options: ReadOptions) -> list[str]:
    """Where the names in a file start, first, and its own folder, for absolute ones."""
    return [*([] if options.images is None else [options.images]), folder_of(path)]


def load_picture(roots: Sequence[str], name: str, where: str) -> Picture | Reject:
    """What the record at `where` calls `name`, under the folders or URLs `roots` (see `inside`)."""
    try:
        path = inside(roots, name, where)
    except ValueError as error:
        return Reject(where, "picture outside the folder", str(error).removeprefix(f"{where}: "))
    try:
        data = read_range(path, 0, LARGEST_BYTES + 1)
    except OSError as error:
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        # A failing disk or connection is no missing picture.
        if not isinstance(error, absent) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        return Reject(where, "missing picture", path + _broken_link(path, error))
    if len(data) > LARGEST_BYTES:
        return Reject(where, "picture too large", f"{path} has over {LARGEST_BYTES:,} bytes")
    return Picture(path, 0, data) if data else Reject(where, "zero-byte picture", path)


def load_shown(shown: str | bytes, roots: Sequence[str], where: str) -> Picture | Reject:
    """A picture by its name, or of bytes that no range of a file holds as they are."""
    if isinstance(shown, str):
        return load_picture(roots, shown, where)
    if len(shown) > LARGEST_BYTES:
        return Reject(where, "picture too large", f"over {LARGEST_BYTES:,} bytes")
    return Picture("", 0, shown) if shown else Reject(where, "zero-byte picture")


def picture_in(value: object) -> str | bytes | None:
    """The picture in a value: its name, its bytes, a data: URL, {bytes, path} or {url}.

    None: there is none. Raises ValueError for a data: URL that holds no base64.
    """
    if isinstance(value, dict):
        held, named = value.get("bytes"), (value.get("path"), value.get("url"))
        value = held if isinstance(held, bytes) else next(filter(None, named), None)
    if not isinstance(value, str) or not value.startswith("data:"):
        return value if isinstance(value, str | bytes) else None
    head, comma, data = value.partition(",")
    try:
        if comma and head.endswith(";base64"):
            return base64.b64decode("".join(data.split()), validate=True)
    except binascii.Error:
        pass
    raise ValueError("its data: URL is no base64")


def _broken_link(path: str, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return " has links that go round in a circle"
    if not is_url(path) and os.path.islink(path):
        return f" has no picture behind it: it links to {os.readlink(path)}"
    return ""


class Folder:
    """Pictures under `roots`, folders or URLs; the last one read is kept for its other captions."""

    def __init__(self, *roots: str) -> None:
        self._roots = roots
        self._load = lru_cache(1)(lambda name: load_picture(roots, name, roots[0]))

    def record(self, where: str, caption: str | Reject, shown: object) -> CaptionRecord | Reject:
        """A caption with its picture (see `picture_in`), read only if the caption is one."""
        if isinstance(shown, list) and len(shown) == 1:
            shown = shown[0]
        if isinstance(shown, list) and shown:
            return Reject(where, "more than one picture", f"{len(shown)} in a list")
        try:
            found = picture_in(shown)
        except ValueError as error:
            return Reject(where, "no picture", str(error))
        if found is None or found == "":
            return Reject(where, "no picture", f"its name is {shown!r}"[:200])
        if isinstance(caption, Reject):
            return caption
        held = isinstance(found, bytes)
        picture = load_shown(found, self._roots, where) if held else self._load(found)
        if isinstance(picture, Reject):
            return replace(picture, where=where)
        return CaptionRecord(where, caption, picture)

    def records(
        self, where: str, captions: object, shown: object, reason: str = NOT_UNICODE
    ) -> Iterator[CaptionRecord | Reject]:
        """A record for the caption, or for each in a list of them."""
        if not isinstance(captions, list) or not captions:
            yield self.record(where, caption_of(captions, where, reason), shown)
            return
        for number, caption in enumerate(captions):
            place = f"{where}, caption {number}" if len(captions) > 1 else where
            yield self.record(place, caption_of(caption, place, reason), shown)


# Python's own limit is 131,072 characters.
csv.field_size_limit(2**24)
_BOM = b"\xef\xbb\xbf"


def read_coco(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """An annotation a record; its picture is the `file_name` of its image in the split's folder."""
    path = unit.files[0]
    wanted = list(islice(_items(path, "annotations"), unit.first, unit.last))
    # The images are read again for each unit: a list of all of them need not fit in memory.
    ids = {_image_id(annotation, "image_id") for annotation in wanted} - {None}
    names = {
        key: image.get("file_name")
        for image in _items(path, "images")
        if (key := _image_id(image, "id")) in ids
    }
    folder = _coco_pictures(path, options)
    pictures = Folder(folder, *picture_roots(path, options))
    # Some files name pictures from the folder above the split's.
    above = f"{base_name(folder)}/"
    above = "" if is_folder(f"{folder}/{above}") else above
    for number, annotation in enumerate(wanted, unit.first):
        where, key = f"{path}, record {number}", _image_id(annotation, "image_id")
        if not isinstance(annotation, dict):
            yield Reject(where, "no caption", "it is no JSON object")
        elif key not in names:
            yield Reject(where, "missing picture", f"the list images has no id {key}")
        else:
            name = names[key]
            name = name.removeprefix(above) if isinstance(name, str) else name
            yield pictures.record(where, caption_of(field_of(annotation, options), where), name)


def count_annotations(path: str, options: ReadOptions) -> int:
    """How many there are; ValueError if the file is no whole one of COCO's captions."""
    count = 0
    for annotation in _items(path, "annotations"):
        if not count and (
            not isinstance(annotation, dict) or field_of(annotation, options) is None
        ):
            raise ValueError(f"{path}: its first annotation has no caption; give captions_*.json")
        count += 1
    if not count or next(_items(path, "images"), None) is None:
        raise ValueError(
            f"{path} lacks entries in the lists images and annotations; give COCO's captions_*.json"
        )
    return count


def _items(path: str, name: str) -> Iterator[Any]:
    """The entries of the list `name` in a JSON object."""
    count = 0
    try:
        with unpacked(path) as stream:
            if stream.peek(len(_BOM)).startswith(_BOM):
                stream.read(len(_BOM))
            for item in ijson.items(stream, f"{name}.item", use_float=True):
                yield item
                count += 1
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        # NaN is no JSON, but pandas writes it; Python's reader takes the file whole.
        found = _whole(path) if re.search("NaN|Infinity", reason) else None
        if not isinstance(found, dict):
            message = f"{path} is not whole JSON in UTF-8 ({reason}); fetch it again"
            raise ValueError(message) from None
        listed = found.get(name)
        yield from listed[count:] if isinstance(listed, list) else ()


def _whole(path: str) -> Any:
    with unpacked(path) as stream:
        try:
            return json.load(stream)
        except ValueError:
            return None


def _image_id(value: object, name: str) -> str | None:
    """The id as text: 1, 1.0 and "1" are one."""
    found = value.get(name) if isinstance(value, dict) else None
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    return str(found) if isinstance(found, int | str) else None


def _coco_pictures(path: str, options: ReadOptions) -> str:
    """The folder of the split's pictures: train2014/ for captions_train2014.json."""
    named = re.match(r"captions_([^.]+)", base_name(path))
    split = named[1] if named else ""
    if options.images is not None:
        return _first_folder([f"{options.images}/{split}"] if split else [], options.images)
    beside = folder_of(path)
    above = f"{beside}/.." if base_name(beside) in (".", "..") else folder_of(beside)
    bases = [beside, f"{beside}/images", above, f"{above}/images"]
    splits = [f"{base}/{split}" for base in bases] if split else []
    return _first_folder([*splits, f"{beside}/images"], beside)


def _first_folder(candidates: Sequence[str], otherwise: str) -> str:
    return next((folder for folder in candidates if is_folder(folder)), otherwise)


def read_csv(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """A row a record; its picture lies under images/ or Images/ beside the file, or beside it.

    metadata.csv (Hugging Face imagefolder) names pictures from its own folder.
    """
    path = unit.files[0]
    beside = folder_of(path)
    folders = [] if base_name(path).startswith("metadata") else ["images", "Images"]
    root = options.images or _first_folder([f"{beside}/{name}" for name in folders], beside)
    pictures = Folder(root, *picture_roots(path, options))
    for number, row in islice(enumerate(rows_of(path, options)), unit.first, unit.last):
        where = f"{path}, record {number}"
        if isinstance(row, str):
            yield Reject(where, "wrong number of columns", row)
        else:
            name = row[0]
            if not options.images and root != beside and not is_folder(f"{root}/{base_name(root)}"):
                name = name.removeprefix(f"{base_name(root)}/")  # from where the list lies
            yield pictures.record(where, caption_of(row[1], where, NOT_UTF8), name)


def rows_of(path: str, options: ReadOptions) -> Iterator[tuple[str, str] | str]:
    """(picture, caption) of each row under the header, or what is wrong with its columns.

    Bytes that are no UTF-8 stay visible as lone surrogates. Lines without anything are no rows.
    """
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(path))
    # Strict: a quote that is never closed would make one caption of the rest of the file.
    reader = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        image = next((name for name in ("image", "file_name") if name in header), None)
        caption = next((name for name in text_keys(options) if name in header), None)
        if image is None or caption is None:
            asked = " or ".join(text_keys(options))
            raise ValueError(f"{path} has the columns {header}; it needs image and {asked}")
        columns = header.index(image), header.index(caption)
        for row in reader:
            if row and len(row) != len(header):
                yield f"{len(row)}, the header has {len(header)}; quote what holds a comma"
            elif row:
                yield row[columns[0]], row[columns[1]]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num:,}: no CSV ({error}); quote fields that hold commas, "
            "quotes or line ends, and double the quotes inside"
        ) from None


def read_objects(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """An object of a list or of lines a record: {file_name or image, text or caption}."""
    path = unit.files[0]
    pictures = Folder(*picture_roots(path, options))
    for number, data in islice(enumerate(objects_of(path)), unit.first, unit.last):
        where = f"{path}, record {number}"
        values, reason = json_object(data)
        if values is None:
            yield Reject(where, reason)
        else:
            shown = next((values[key] for key in PICTURE_KEYS if key in values), None)
            yield from pictures.records(where, field_of(values, options), shown, reason)


def read_table(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """A row a record, or several where its caption is a list of them."""
    path = unit.files[0]
    pictures = Folder(*picture_roots(path, options))
    for number, (shown, caption) in enumerate(table_rows(path, caption_columns(path, options))):
        where = f"{path}, row {number}"
        try:
            yield from pictures.records(where, caption.as_py(), shown.as_py())
        except UnicodeDecodeError as error:
            yield Reject(where, NOT_UTF8, str(error))


def caption_columns(path: str, options: ReadOptions) -> tuple[str, str]:
    """The columns of the picture and of the caption in a table; ValueError lists its columns."""
    schema = columns_of(path)
    names = schema.names
    # Pictures come before names of pictures.
    held = [
        name for name in PICTURE_KEYS if name in names and str(schema.field(name).type) != "string"
    ]
    image = next((name for name in (*held, *PICTURE_KEYS) if name in names), None)
    caption = next((name for name in text_keys(options) if name in names), None)
    if image is None or caption is None:
        asked = " or ".join(text_keys(options))
        raise ValueError(f"{path} has the columns {names}; it needs image and {asked}")
    return image, caption


def objects_of(path: str) -> Iterator[bytes]:
    """The entries of a JSON list (in a .json file), or the lines that are not blank."""
    if plain_name(base_name(path)).endswith(".json"):
        return list_entries(path)
    return (line for line in _lines(path) if line.strip())


def first_line(path: str) -> bytes:
    """The first line of a file, empty if it has none."""
    return next(_lines(path), b"")


def _lines(path: str) -> Iterator[bytes]:
    for number, line in enumerate(read_lines(path)):
        yield line if number else line.removeprefix(_BOM)
