"""What all formats of captions check: keys, splits, captions, and the pictures that they name."""

import ast
import base64
import binascii
import errno
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from midstream.data.formats.beside import TEXTS
from midstream.data.formats.files import (
    folder_of,
    inside,
    is_folder,
    is_url,
    name_some,
    read_range,
)
from midstream.data.formats.json_records import inside as inside_of
from midstream.data.formats.json_records import unicode_problem, unquoted
from midstream.data.formats.packed import decoded
from midstream.data.formats.records import (
    LARGEST_BYTES,
    PICTURES,
    CaptionRecord,
    Picture,
    ReadOptions,
    Sample,
)
from midstream.data.source_writer import Reject

# How JPEG, PNG, WebP and GIF begin in base64; no name of a file is so long and begins so.
_BASE64, _BASE64_CHARACTERS = ("/9j/", "_9j_", "iVBORw0KGgo", "UklGR", "R0lGOD"), 64
# Such bytes as Python shows them: str(base64.b64encode(data)).
_BYTES = re.compile(r"b'([A-Za-z0-9+/]{64,}=*)'")
# Where a picture stands in an object or a table, the first of them that is there.
PICTURE_KEYS = (
    *("file_name", "image", "images", "image_bytes", "img", "jpg", "jpeg", "png", "webp"),
    *("filename", "filepath", "image_path", "image_name", "img_path", "file_path", "image_file"),
)
# What imagefolder calls columns of names, beside `file_name`: image_file_name, image_file_names.
_NAME_ENDS = ("file_names", "_file_name")
# What a record of several splits says its own under.
SPLIT = "split"
# A list or tuple of texts as Python writes it, or a list of numpy's, which has no commas, and where
# it is long no middle.
_TEXT = r"""(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|None|nan)"""
_CUT = "..."
_ENTRY = re.compile(rf"{_TEXT}|{re.escape(_CUT)}", re.DOTALL)
_LIST = re.compile(
    rf"\s*(?:\[\s*{_TEXT}(?:[\s,]++(?:{_ENTRY.pattern}))*+[\s,]*+\]"
    rf"|\(\s*{_TEXT}\s*+,(?:\s*+{_TEXT}\s*+,)*+(?:\s*+{_TEXT})?+\s*+\))\s*",
    re.DOTALL,
)
# A sample that says nothing of a caption, as against one whose caption is no text.
ABSENT = "no caption"
NOT_UTF8, NOT_UNICODE = "caption not UTF-8", "caption not Unicode"
# What img2dataset says it did not get. These are told, and not held against the limit of rejects.
NOT_FETCHED = "not fetched"


def text_keys(options: ReadOptions) -> tuple[str, ...]:
    """Where a caption stands, the first of them that is there."""
    return ("text", "caption") if options.text_key == "text" else (options.text_key,)


def wanted_splits(options: ReadOptions) -> set[str]:
    """The splits that a user names; empty for all."""
    return set(filter(None, (options.split or "").split("+")))


def split_in(values: object) -> str:
    """The split that a record says it is of; "" for none."""
    return str(values.get(SPLIT) or "") if isinstance(values, dict) else ""


def check_splits(path: str, found: Iterable[str], options: ReadOptions) -> None:
    """Raises ValueError if a file's records are of several splits and which are meant is not said,
    or of none of those that are."""
    wanted, named = wanted_splits(options), sorted({*found} - {""})
    if len(named) > 1 and not wanted:
        raise ValueError(
            f"{path} holds the splits {', '.join(named)}, which are never read as one source; name "
            "those that are meant (--split train+restval), or take the records of the others out"
        )
    if absent := sorted(wanted - {*named}):
        raise ValueError(
            f"{path} has no split {', '.join(absent)}; it has {', '.join(named) or 'none'}"
        )


def picture_key(names: Iterable[str], pictures: Iterable[str] = PICTURE_KEYS) -> str | None:
    """Which of a record's names (or a table's columns) is that of its picture; None for none.

    It is the first of `pictures`, else the only one that ends as imagefolder's do.
    """
    names = list(names)
    others = [name for name in names if name.lower().endswith(_NAME_ENDS)]
    return named(names, pictures) or (others[0] if len(others) == 1 else None)


def named(names: Sequence[str], wanted: Iterable[str]) -> str | None:
    """The first wanted name that is there, whatever the case of its letters where none is exact."""
    wanted = list(wanted)
    if exact := next((name for name in wanted if name in names), None):
        return exact
    small = {name.lower(): name for name in reversed(names)}
    return next((small[name] for name in map(str.lower, wanted) if name in small), None)


def field_of(values: dict[str, Any], options: ReadOptions) -> object:
    """The caption in an object, inside another field too (json.caption); None if it has none."""
    if (key := named(_filled(values), text_keys(options))) is not None:
        return values[key]
    return inside_of(values, options.text_key.split(".")) if "." in options.text_key else None


def shown_in(values: dict[str, Any]) -> object:
    """The picture in a JSON object; None if it has none."""
    key = picture_key(_filled(values))
    return None if key is None else values[key]


def _filled(values: dict[str, Any]) -> list[str]:
    return [name for name, value in values.items() if value is not None]


def json_object(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object, and why a half of a surrogate pair may stand in it; None and the reason if none.

    Bytes that are no UTF-8 stand in it as such halves.
    """
    try:
        text, reason = decoded(data), NOT_UNICODE
    except UnicodeDecodeError:
        text, reason = data.decode("utf-8", "surrogateescape"), NOT_UTF8
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None, "metadata not JSON"
    return (found, reason) if isinstance(found, dict) else (None, "metadata not JSON")


def caption_of(value: object, where: str, reason: str = NOT_UNICODE) -> str | Reject:
    """The caption without white space around it; `reason` says what a lone surrogate means."""
    if isinstance(value, dict):
        value = value.get("raw", value)
    if isinstance(value, bytes):
        try:
            value = decoded(value)
        except UnicodeDecodeError as error:
            return Reject(where, NOT_UTF8, str(error))
    if not isinstance(value, str):
        return Reject(where, "no caption", f"it is {type(value).__name__}")
    caption = value.strip()
    if problem := unicode_problem(caption):
        return Reject(where, reason, problem)
    return caption or Reject(where, "empty caption")


def captions_of(
    value: object, where: str, reason: str = NOT_UNICODE
) -> list[tuple[str, str | Reject]]:
    """The caption (see `caption_of`), or each in a list of them, with their places.

    The list may stand in a text: as JSON, or as Python and numpy write it.
    """
    listed = unquoted(value)
    if isinstance(listed, str) and _LIST.fullmatch(listed):
        entries = _ENTRY.findall(listed)
        if _CUT in entries:
            detail = f"its list was cut where it was written: {listed}"[:200]
            return [(where, Reject(where, "no caption", detail))]
        listed = _as_python_writes(entries) or listed
    if isinstance(listed, list) and all(isinstance(one, str | None) for one in listed):
        value = listed
    if not isinstance(value, list) or not value:
        return [(where, caption_of(value, where, reason))]
    places = [f"{where}, caption {n}" for n in range(len(value))] if len(value) > 1 else [where]
    return [(at, caption_of(one, at, reason)) for at, one in zip(places, value, strict=True)]


def _as_python_writes(entries: Sequence[str]) -> list[str | None]:
    """The texts of a list, None for what is none; nothing where Python does not read them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" is no escape
        try:
            return [None if entry == "nan" else ast.literal_eval(entry) for entry in entries]
        except (ValueError, SyntaxError):
            return []


def first_usable(captions: Iterable[tuple[str, str | Reject]]) -> str | None:
    """The first of `captions_of` that is one; None for none."""
    return next((one for _, one in captions if isinstance(one, str)), None)


def original_captions(sample: Sample, options: ReadOptions) -> list[tuple[str, str | Reject]]:
    """The sample's own captions with their places, one at least, or why it has none.

    `text_key` in .json comes before .txt only where a user names it.
    """
    members, where = sample.members, sample.where
    text = next((members[end] for end in TEXTS if end in members), None)
    if text is not None and options.text_key == "text":
        return [(where, caption_of(text.data, where))]
    if "json" not in members:
        return [(where, without(sample, ABSENT))]
    values, reason = json_object(members["json"].data)
    if values is None:
        return [(where, Reject(where, reason, members["json"].name))]
    caption = field_of(values, options)
    if caption is None:
        detail = f"{members['json'].name} has none under {options.text_key!r}"
        return [(where, Reject(where, ABSENT, detail))]
    return captions_of(caption, where, reason)


def synthetic_captions(sample: Sample) -> list[str | Reject]:
    """DataCompDR's list `syn_text`, in .syn.json or else in .json."""
    member = sample.members.get("syn.json", sample.members.get("json"))
    if member is None:
        return []
    values, reason = json_object(member.data)
    if values is None:
        own = member is sample.members.get("json")
        return [] if own else [Reject(sample.where, reason, member.name)]
    captions = values.get("syn_text")
    if not isinstance(captions, list):
        return []
    return [caption_of(caption, sample.where, reason) for caption in captions]


def without(sample: Sample, reason: str) -> Reject:
    return Reject(sample.where, reason, f"it has {name_some(sorted(sample.members), 8)}")


def picture_roots(path: str, options: ReadOptions) -> list[str]:
    """Where the names in a file start, first, and its own folder, for absolute ones."""
    return [*([] if options.images is None else [options.images]), folder_of(path)]


def load_picture(roots: Sequence[str], name: str, where: str) -> Picture | Reject:
    """What the record at `where` calls `name`, under the folders or URLs `roots` (see `inside`)."""
    picture = load_range(roots, name, 0, LARGEST_BYTES + 1, where)
    if isinstance(picture, Reject) or 0 < len(picture.data) <= LARGEST_BYTES:
        return picture
    if picture.data:
        detail = f"{picture.file} has over {LARGEST_BYTES:,} bytes"
        return Reject(where, "picture too large", detail)
    return Reject(where, "zero-byte picture", picture.file)


def load_range(
    roots: Sequence[str], name: str, first: int, size: int, where: str
) -> Picture | Reject:
    """Up to `size` bytes from `first` on of what `load_picture` would load.

    Where no file has the name it may have / for \\ (lists of Windows), the same letters in another
    form of Unicode (files of macOS), its characters as in an address (%20), or, on a local disk,
    the end in letters of the other case (.JPG of cameras).
    """
    found = _load_range(roots, name, first, size, where)
    if "\\" in name and _is_missing(found):
        name = name.replace("\\", "/")
        found = _load_range(roots, name, first, size, where)
    if not _is_missing(found):
        return found
    stem, end = os.path.splitext(name)
    others = {unquote(name), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))}
    others |= set() if is_url(roots[0]) else {stem + end.lower(), stem + end.upper()}
    again = (_load_range(roots, other, first, size, where) for other in sorted(others - {name}))
    return next((one for one in again if isinstance(one, Picture)), _with_hint(found))


def _with_hint(missing: Picture | Reject) -> Picture | Reject:
    """The reject with a file that has the same name but for its end (OCR-VQA's .gif), if any.

    It may be another picture, such as a mask: it is not read.
    """
    if not isinstance(missing, Reject) or is_url(missing.detail):
        return missing
    stem, end = os.path.splitext(missing.detail)
    others = [f"{stem}.{other}" for other in PICTURES[:5] if f".{other}" != end.lower()]
    beside = next((other for other in others if os.path.isfile(other)), None) if end else None
    if beside is None:
        return missing
    detail = f"{missing.detail} has another end there, {os.path.basename(beside)}; rename one"
    return replace(missing, detail=detail)


def _is_missing(found: Picture | Reject) -> bool:
    return isinstance(found, Reject) and found.reason == "missing picture"


def _load_range(
    roots: Sequence[str], name: str, first: int, size: int, where: str
) -> Picture | Reject:
    try:
        path = inside(roots, name, where)
    except ValueError as error:
        return Reject(where, "picture outside the folder", str(error).removeprefix(f"{where}: "))
    try:
        return Picture(path, first, read_range(path, first, size))
    except OSError as error:
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        # A failing disk or connection is no missing picture.
        if not isinstance(error, absent) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        return Reject(where, "missing picture", not_there(path, error.errno))


def load_shown(shown: str | bytes, roots: Sequence[str], where: str) -> Picture | Reject:
    """A picture by its name, or of bytes that no range of a file holds as they are."""
    if isinstance(shown, str):
        return load_picture(roots, shown, where)
    if len(shown) > LARGEST_BYTES:
        return Reject(where, "picture too large", f"over {LARGEST_BYTES:,} bytes")
    return Picture("", 0, shown) if shown else Reject(where, "zero-byte picture")


def picture_in(value: object) -> str | bytes | None:
    """The picture in a value: its name, its bytes, base64 of them, or an object that holds one.

    Base64 stands in a data: URL or alone; an object is {bytes, path}, {url}, {base64} or {source}.
    None: there is none. Raises ValueError for base64 that is damaged.
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
    raise ValueError("its base64 is damaged" if alone else "its data: URL is no base64")


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


def first_folder(candidates: Sequence[str], otherwise: str) -> str:
    return next((folder for folder in candidates if is_folder(folder)), otherwise)


class Folder:
    """Pictures under `roots`, folders or URLs; the last one read is kept for its other captions."""

    def __init__(self, *roots: str) -> None:
        self._roots = roots
        self._load = lru_cache(1)(lambda name: load_picture(roots, name, roots[0]))

    def record(self, where: str, caption: str | Reject, shown: object) -> CaptionRecord | Reject:
        """A caption with its picture (see `picture_in`), read only if the caption is one."""
        shown = unquoted(shown)
        if isinstance(shown, list) and len(shown) == 1:
            shown = shown[0]
        if isinstance(shown, list) and shown and isinstance(shown[0], int | float | list):
            return Reject(where, "no picture", "it is numbers, not a file in a picture format")
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
        for place, caption in captions_of(captions, where, reason):
            yield self.record(place, caption, shown)
