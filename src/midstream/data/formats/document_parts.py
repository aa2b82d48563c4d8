"""A document of its parts: where a record's pictures are found, and what goes with lost ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from midstream.data.formats.files import is_url
from midstream.data.formats.picture_files import (
    LARGEST_FILE,
    MISSING,
    NO_PICTURE,
    PICTURE_TOO_LARGE,
    PicturesByUrl,
    load_range,
    load_shown,
    picture_in,
)
from midstream.data.formats.record_files import NOT_UNICODE, unicode_problem
from midstream.data.formats.records import (
    LARGEST_BYTES,
    PARAGRAPH,
    DocumentRecord,
    Member,
    Picture,
    ReadOptions,
)
from midstream.data.picture_checks import frame_as_png, num_frames
from midstream.data.source_writer import Reject, RejectedError, or_reject

PLACES = "texts and pictures disagree"
_ONLY_PICTURES, _BESIDE = "pictures without a text", "text beside a lost picture"
# How TIFFs begin; a frame's number means nothing in other pictures.
TIFF = (b"II", b"MM")


class Shown(NamedTuple):
    """A picture by what it is called: the first of these that is there."""

    values: tuple[object, ...]


Part = str | Picture | Reject | Shown


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
        return Reject(where, NO_PICTURE, why or "text alone belongs into a source of text")
    if not record.texts:
        return Reject(where, _ONLY_PICTURES, why or f"it has {len(record.pictures)}")
    if problem := unicode_problem("\n".join(record.texts)):
        return Reject(where, NOT_UNICODE, problem)
    if (size := sum(len(picture.data) for picture in record.pictures)) > LARGEST_BYTES:
        return Reject(where, "document too large", f"its pictures have {size:,} bytes")
    return record


@dataclass(frozen=True)
class Pictures:
    """Where pictures are looked for: in folders, and by their addresses."""

    roots: Sequence[str]
    by_url: PicturesByUrl

    def load(self, where: str, *values: object) -> Picture:
        """The picture of the record at `where`, by the first of the values that is there.

        Raises RejectedError where none is.
        """
        problem: RejectedError | None = None
        for value in values:
            if value is None or value == "":
                continue
            try:
                held = picture_in(value)
                if held is None:
                    raise RejectedError(NO_PICTURE, f"it is {type(value).__name__}")
                if isinstance(held, str) and is_url(held) and not held.startswith("file:"):
                    return self.by_url.load(held, where)
                return load_shown(held, self.roots)
            except RejectedError as error:
                problem = problem or error
        raise problem or RejectedError(NO_PICTURE, "it has neither a name nor bytes")

    def range(self, name: str, first: int, size: int) -> Picture:
        """The picture that is `size` bytes from `first` on of the file `name`."""
        if size > LARGEST_BYTES:
            raise RejectedError(PICTURE_TOO_LARGE, f"{name} has {size:,} bytes of it")
        if not 0 <= first < LARGEST_FILE:
            raise RejectedError(MISSING, f"{name} has no byte {first:,}")
        picture = load_range(self.roots, name, first, size)
        if (have := len(picture.data)) != size:
            detail = f"{picture.file} has {have:,} of {size:,} bytes at {first:,}"
            raise RejectedError(MISSING, detail)
        return picture


def frames_of(tiff: Member, count: int, where: str) -> Iterator[Picture | Reject]:
    """The pictures of a TIFF; raises RejectedError before the first for more than `count`."""
    try:
        held = num_frames(tiff.data, tiff.name)
    except ValueError:
        held = 0  # Those before the damage may be whole.
    if held > count:
        raise RejectedError(PLACES, f"{tiff.name} holds {held} pictures, the document {count}")
    if held == count == 1:
        yield Picture(tiff.file, tiff.offset, tiff.data)
        return
    for number in range(count):
        yield or_reject(where, frame_of, tiff.data, number, tiff.name)


def frame_of(data: bytes, number: int, name: str) -> Picture:
    """Picture `number` of the TIFF that is called `name`, as a file of its own."""
    try:
        return Picture("", 0, frame_as_png(data, number, f"{name}, frame {number}"))
    except ValueError as error:
        raise RejectedError("picture cannot be decoded", str(error)) from None
