"""A document of its parts: where a layout's pictures are found, and what goes with lost ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from midstream.data.formats.captions import load_picture, load_range, load_shown, picture_in
from midstream.data.formats.files import is_url
from midstream.data.formats.json_records import NOT_UNICODE, unicode_problem
from midstream.data.formats.picture_urls import PicturesByUrl
from midstream.data.formats.records import (
    LARGEST_BYTES,
    PARAGRAPH,
    DocumentRecord,
    Member,
    Picture,
    ReadOptions,
)
from midstream.data.picture_checks import frame_as_png, num_frames
from midstream.data.source_writer import Reject

PLACES = "texts and pictures disagree"
_ONLY_PICTURES, _BESIDE = "pictures without a text", "text beside a lost picture"
_NO_PICTURE, _MISSING = "no picture", "missing picture"
# How TIFFs begin; a frame's number means nothing in other pictures.
TIFF = (b"II", b"MM")
# No file has so many bytes.
LARGEST_FILE = 2**63


def document_of(
    where: str,
    parts: Sequence[str | Picture | Reject],
    options: ReadOptions,
    left_out: Sequence[str] = (),
    joint: str = PARAGRAPH,
) -> DocumentRecord | Reject:
    """A document of its parts, of which lost pictures are rejects; or why there is none.

    With a lost picture goes what `options.lost` says, each counted in the document's `left_out`.
    `joint` is what stands between neighbouring texts. A document needs a text and a picture.
    """
    lost = {n: part for n, part in enumerate(parts) if isinstance(part, Reject)}
    first = next(iter(lost.values()), None)
    reasons = [*left_out, *(part.reason for part in lost.values())]
    gone = {*lost}
    if options.lost == "text":
        around = {n for place in lost for n in (place - 1, place + 1) if 0 <= n < len(parts)}
        texts = {n for n in around if isinstance(parts[n], str)}
        gone |= texts
        reasons += [_BESIDE] * len(texts)
    left = (x for n, x in enumerate(parts) if n not in gone and not isinstance(x, Reject))
    record = DocumentRecord(where, tuple(left), tuple(reasons), tuple(lost.values()), joint)
    if first is not None and (options.lost == "document" or not record.pictures):
        return replace(first, where=where)
    why = ", ".join(dict.fromkeys(reasons))
    if not record.pictures:
        return Reject(where, _NO_PICTURE, why or "text alone belongs into a source of text")
    if not record.texts:
        return Reject(where, _ONLY_PICTURES, why or f"it has {len(record.pictures)}")
    if problem := unicode_problem("\n".join(record.texts)):
        return Reject(where, NOT_UNICODE, problem)
    if (size := sum(len(picture.data) for picture in record.pictures)) > LARGEST_BYTES:
        return Reject(where, "document too large", f"its pictures have {size:,} bytes")
    return record


class Shown(NamedTuple):
    """A picture by what it is called: the first of these that is there."""

    values: tuple[object, ...]


Part = str | Picture | Reject | Shown


class DocumentError(ValueError):
    """A record that is no document; the reason to count it under, and what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Pictures:
    """Where pictures are looked for: members of the same sample, folders, addresses."""

    roots: Sequence[str]
    by_url: PicturesByUrl

    def load(self, shown: Shown, where: str) -> Picture | Reject:
        """The first of its values that is there, or why none is."""
        found: Picture | Reject | None = None
        for value in shown.values:
            if value is None or value == "":
                continue
            try:
                held = picture_in(value)
            except ValueError as error:
                found = found or Reject(where, _NO_PICTURE, str(error))
                continue
            if held is None:
                found = found or Reject(where, _NO_PICTURE, f"it is {type(value).__name__}")
                continue
            if isinstance(held, str) and is_url(held) and not held.startswith("file:"):
                picture = self.by_url.load(held, where)
            else:
                picture = load_shown(held, self.roots, where)
            if isinstance(picture, Picture):
                return picture
            found = found or picture
        return found or Reject(where, _NO_PICTURE, "it has neither a name nor bytes")

    def range(self, name: str, first: int, size: int, where: str) -> Picture | Reject:
        """The picture that is `size` bytes from `first` on of the file `name`."""
        if size > LARGEST_BYTES:
            return Reject(where, "picture too large", f"{name} has {size:,} bytes of it")
        if not 0 <= first < LARGEST_FILE:
            return Reject(where, _MISSING, f"{name} has no byte {first:,}")
        picture = load_range(self.roots, name, first, size, where)
        if isinstance(picture, Picture) and (have := len(picture.data)) != size:
            detail = f"{picture.file} has {have:,} of {size:,} bytes at {first:,}"
            return Reject(where, _MISSING, detail)
        return picture

    def file(self, name: str, where: str) -> Picture | Reject:
        """The picture that is the file `name`."""
        return load_picture(self.roots, name, where)


def frames_of(tiff: Member, count: int, where: str) -> Iterator[Picture | Reject]:
    """The pictures of a TIFF; raises DocumentError before the first for more than `count`."""
    try:
        held = num_frames(tiff.data, tiff.name)
    except ValueError:
        held = 0  # Those before the damage may be whole.
    if held > count:
        raise DocumentError(PLACES, f"{tiff.name} holds {held} pictures, the document {count}")
    if held == count == 1:
        yield Picture(tiff.file, tiff.offset, tiff.data)
        return
    for number in range(count):
        yield frame_of(tiff.data, number, where, tiff.name)


def frame_of(data: bytes, number: int, where: str, name: str) -> Picture | Reject:
    """Picture `number` of the TIFF that is called `name`, as a file of its own, or why not."""
    try:
        return Picture("", 0, frame_as_png(data, number, f"{name}, frame {number}"))
    except ValueError as error:
        return Reject(where, "picture cannot be decoded", str(error))
