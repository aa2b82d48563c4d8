"""What all formats of captions check: keys, splits, captions, and the pictures beside them."""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from midstream.core.tokens import name_some
from midstream.data.formats.files import is_folder
from midstream.data.formats.packed import decoded
from midstream.data.formats.picture_files import NO_PICTURE, held_picture, load_picture, picture_in
from midstream.data.formats.record_files import field_in, unicode_problem, unquoted
from midstream.data.formats.records import TEXTS, CaptionRecord, ReadOptions, Sample
from midstream.data.source_writer import Reject, RejectedError, or_reject

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
# How Python and pandas write what is not there.
_NOTHING = ("", "nan", "NaN", "None")
# A sample that says nothing of a caption, as against one whose caption is no text.
ABSENT, TWO_CAPTIONS = "no caption", "two captions"
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
    return field_in(values, options.text_key.split(".")) if "." in options.text_key else None


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


def caption_of(value: object, reason: str = NOT_UNICODE) -> str:
    """The caption without white space around it; `reason` says what a lone surrogate means.

    Raises RejectedError for what is none.
    """
    if isinstance(value, dict):
        value = value.get("raw", value)
    if isinstance(value, bytes):
        try:
            value = decoded(value)
        except UnicodeDecodeError as error:
            raise RejectedError(NOT_UTF8, str(error)) from None
    if not isinstance(value, str):
        raise RejectedError(ABSENT, f"it is {type(value).__name__}")
    caption = value.strip()
    if problem := unicode_problem(caption):
        raise RejectedError(reason, problem)
    if caption in _NOTHING:
        raise RejectedError("empty caption", f"it is {caption!r}" if caption else "")
    return caption


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
            return [(where, Reject(where, ABSENT, detail))]
        listed = _as_python_writes(entries) or listed
    if isinstance(listed, list) and all(isinstance(one, str | None) for one in listed):
        value = listed
    if not isinstance(value, list) or not value:
        value = [value]
    places = [f"{where}, caption {n}" for n in range(len(value))] if len(value) > 1 else [where]
    return [
        (at, or_reject(at, caption_of, one, reason)) for at, one in zip(places, value, strict=True)
    ]


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
    texts = [end for end in TEXTS if end in members]
    if texts and options.text_key in ("text", *texts):
        text = members[options.text_key if options.text_key in texts else texts[0]]
        if any(members[end].data.strip() != text.data.strip() for end in texts) and (
            options.text_key == "text"
        ):
            detail = f"its .{' and its .'.join(texts)} differ; say which is meant (--text-key)"
            return [(where, Reject(where, TWO_CAPTIONS, detail))]
        return [(where, or_reject(where, caption_of, text.data))]
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
    return [or_reject(sample.where, caption_of, caption, reason) for caption in captions]


def without(sample: Sample, reason: str) -> Reject:
    return Reject(sample.where, reason, f"it has {name_some(sorted(sample.members), 8)}")


def first_folder(candidates: Sequence[str], otherwise: str) -> str:
    return next((folder for folder in candidates if is_folder(folder)), otherwise)


class Folder:
    """Pictures under `roots`, folders or URLs; the last one read is kept for its other captions."""

    def __init__(self, *roots: str) -> None:
        self._load = lru_cache(1)(lambda name: or_reject(roots[0], load_picture, roots, name))

    def record(self, where: str, caption: str | Reject, shown: object) -> CaptionRecord | Reject:
        """A caption with its picture (see `picture_in`), read only if the caption is one."""
        try:
            name = _shown_alone(shown)
            if isinstance(caption, Reject):
                return caption
            picture = held_picture(name) if isinstance(name, bytes) else self._load(name)
        except RejectedError as error:
            return error.at(where)
        if isinstance(picture, Reject):
            return Reject(where, picture.reason, picture.detail)
        return CaptionRecord(where, caption, picture)

    def records(
        self, where: str, captions: object, shown: object, reason: str = NOT_UNICODE
    ) -> Iterator[CaptionRecord | Reject]:
        """A record for the caption, or for each in a list of them."""
        for place, caption in captions_of(captions, where, reason):
            yield self.record(place, caption, shown)


def _shown_alone(shown: object) -> str | bytes:
    """The one picture in a field; RejectedError for none, and for several."""
    shown = unquoted(shown)
    if isinstance(shown, list) and len(shown) == 1:
        shown = shown[0]
    if isinstance(shown, list) and shown:
        if isinstance(shown[0], int | float | list):
            raise RejectedError(NO_PICTURE, "it is numbers, not a file in a picture format")
        raise RejectedError("more than one picture", f"{len(shown)} in a list")
    if (found := picture_in(shown)) is None or found == "":
        raise RejectedError(NO_PICTURE, f"its name is {shown!r}"[:200])
    return found
