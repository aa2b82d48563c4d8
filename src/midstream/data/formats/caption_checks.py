"""What all formats of captions check: the text, the JSON that it stands in, and the picture."""

import errno
import json
from dataclasses import replace
from typing import Any

from midstream.data.formats.files import inside, read_range, size_of
from midstream.data.formats.records import CaptionRecord, Picture, ReadOptions
from midstream.data.formats.tars import LARGEST_BYTES
from midstream.data.kept import Kept
from midstream.data.source_writer import Reject

NOT_UTF8, NOT_UNICODE = "caption not UTF-8", "caption not Unicode"


def record_of(
    where: str, caption: str | Reject, picture: Picture | Reject
) -> CaptionRecord | Reject:
    """A record of both, or why the first of them that is none cannot be used."""
    if isinstance(caption, Reject):
        return caption
    if isinstance(picture, Reject):
        return replace(picture, where=where)
    return CaptionRecord(where, caption, picture)


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
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        return Reject(where, reason, str(error))
    return caption if caption else Reject(where, "empty caption")


class Folder:
    """Pictures under `root`, a folder or URL; the last one read is kept for its other captions."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._kept = Kept[str, Picture | Reject](self._load, 1)

    def record(self, where: str, caption: str | Reject, name: object) -> CaptionRecord | Reject:
        """A caption with the picture called `name`, which is read only if the caption is one."""
        if not isinstance(name, str) or not name:
            return Reject(where, "no picture", f"its name is {name!r}")
        if isinstance(caption, Reject):
            return caption
        return record_of(where, caption, self._kept[name])

    def _load(self, name: str) -> Picture | Reject:
        try:
            path = inside(self.root, name, self.root)
        except ValueError as error:
            return Reject(self.root, "picture outside the folder", str(error))
        try:
            size = size_of(path)
            if size > LARGEST_BYTES:
                return Reject(self.root, "picture too large", f"{path} has {size:,} bytes")
            data = read_range(path, 0, size)
        except OSError as error:
            absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
            if not isinstance(error, absent) and error.errno not in (
                errno.ENAMETOOLONG,
                errno.ELOOP,
            ):
                raise
            return Reject(self.root, "missing picture", path)
        return Picture(path, 0, data) if data else Reject(self.root, "zero-byte picture", path)
