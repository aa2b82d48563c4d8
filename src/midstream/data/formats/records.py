"""The records that readers of public formats yield, and how tar archives are read.

What is wrong with one member or sample is its `problem`; a damaged file is a ValueError.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, Literal

import numpy as np

from midstream.data.examples import Turn
from midstream.data.formats.files import base_name, folder_of, open_whole, shown_files
from midstream.data.source_writer import Reject
from midstream.data.sources import content_hash

Section = Literal["text", "captions", "conversations", "documents"]
# What stands between neighbouring texts of one document.
PARAGRAPH = "\n\n"
# A longer list is cut into units of so many records.
NUM_UNIT_RECORDS = 20_000


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time and one shard of the prepared source holds.

    `format` is the reader's name, `files` are local paths or `fsspec` URLs. `first` and `last`
    (exclusive; None: to the end) number the records of the file where one file makes many units.
    """

    format: str
    files: tuple[str, ...]
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What a user says about the records.

    text_key: the field or column of the text. require: a picture without this kind of caption is
    left out. images: the folder or URL that relative picture names start from, where it is not the
    file's own folder. max_tokens: what has more tokens, but a text, is left out. split:
    what is read of a list that holds several splits, one or more joined by "+". lost: what a
    picture that is not there, or cannot be decoded, takes with it out of a document: nothing, the
    texts that it stands beside, or all. similarity: pictures of MMC4 that are less like their text
    are left out. rating: pairs of FineVision of which any rating is lower are left out.
    """

    text_key: str = "text"
    require: Literal["original", "synthetic"] | None = None
    images: str | None = None
    max_tokens: int | None = None
    split: str | None = None
    lost: Literal["picture", "text", "document"] = "picture"
    similarity: float | None = None
    rating: int | None = None

    def noted(self) -> dict[str, Any]:
        """What a shard keeps of them; options that came later only where they are not the default,
        so that shards made before stay."""
        later = ("lost", "similarity", "rating")
        plain = ReadOptions()
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in later or value != getattr(plain, name)
        }


@dataclass(frozen=True)
class Picture:
    """An encoded picture: its bytes, and where they lie (file, byte offset).

    No file: no range of a file holds them as they are, and the prepared source keeps them.
    """

    file: str
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class TextRecord:
    """A document; `where` names it in messages."""

    where: str
    text: str
    pictures: ClassVar[tuple[Picture, ...]] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All its text, as every record has it."""
        return (self.text,)


@dataclass(frozen=True)
class TokenRecord:
    """A chunk that is tokenised already, taken as it is."""

    where: str
    input_ids: np.ndarray
    pictures: ClassVar[tuple[Picture, ...]] = ()


@dataclass(frozen=True)
class CaptionRecord:
    """A picture and its captions: its own, "" for none, and synthetic ones.

    `left_out` counts those of its captions that cannot be used.
    """

    where: str
    caption: str
    picture: Picture
    synthetic: tuple[str, ...] = ()
    left_out: int = 0

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The only one, as every record has them."""
        return (self.picture,)

    @property
    def texts(self) -> tuple[str, ...]:
        """All captions, its own first."""
        return (self.caption, *self.synthetic) if self.caption else self.synthetic


@dataclass(frozen=True)
class ConversationRecord:
    """Questions and replies, their pictures in order, and why other questions are left out.

    `Turn.pictures` say where the pictures stand, one place each.
    """

    where: str
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def picture(self) -> Picture | None:
        """The first picture."""
        return self.pictures[0] if self.pictures else None

    @property
    def texts(self) -> tuple[str, ...]:
        """What each turn holds: question, reply and, where there is one, its system text."""
        return tuple(text for turn in self.turns for text in turn[:3] if text)


@dataclass(frozen=True)
class DocumentRecord:
    """A document of texts and pictures, each in its place; at least one of each.

    `parts` are as its layout has them; neighbouring texts become one with `joint` between them.
    `left_out`: why pictures, or texts, of it are left out. `lost`: its lost pictures, as rejects.
    """

    where: str
    parts: tuple[str | Picture, ...]
    left_out: tuple[str, ...] = ()
    lost: tuple[Reject, ...] = ()
    joint: str = PARAGRAPH

    @cached_property
    def joined(self) -> tuple[str | Picture, ...]:
        """Its parts, no text beside another."""
        runs = groupby(self.parts, key=lambda part: isinstance(part, str))
        return tuple(
            part
            for are_texts, run in runs
            for part in ([self.joint.join(map(str, run))] if are_texts else run)
        )

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Its pictures, in order; one may be there twice."""
        return tuple(part for part in self.parts if isinstance(part, Picture))

    @property
    def texts(self) -> tuple[str, ...]:
        """Its texts as they are joined, in order."""
        return tuple(part for part in self.joined if isinstance(part, str))


Record = TextRecord | TokenRecord | CaptionRecord | ConversationRecord | DocumentRecord


# The largest member, and all members of a sample together.
LARGEST_BYTES = 256 * 2**20
UNSAFE = "unsafe member name"
TWICE = "member there twice"
TOO_LARGE = "member too large"

_ZIP = b"PK\x03\x04"
# Long names and attributes, which `tarfile` reads whole; real ones have some hundred bytes.
_LARGEST_HEADER_BYTES = 2**20
_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


# The format of samples whose files lie beside each other: a picture and what is said of it.
FILES = "files"
# The members or files that hold a caption alone.
TEXTS = ("txt", "caption", "text")
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif")


def is_picture(name: str) -> bool:
    """Whether a member or file of this name is a picture of a sample."""
    return name.lower().endswith(tuple(f".{end}" for end in PICTURES))


@dataclass(frozen=True)
class Member:
    """A file in an archive: `size` bytes from `offset` on of `file`, which are `data`.

    `problem` is empty or says why `data` is left empty: UNSAFE (a link, a device, a name that is
    absolute or goes up) or TOO_LARGE.
    """

    name: str
    offset: int
    size: int
    data: bytes = field(repr=False)
    problem: str = ""
    file: str = field(default="", compare=False)


@dataclass(frozen=True)
class Sample:
    """The members of one WebDataset key, by suffix in lower case without its dot ("syn.json").

    `problem` is empty or the reason to leave the sample out: UNSAFE, TWICE or TOO_LARGE; `detail`
    names the member. `members` is empty then. `pictures` are the names of all that are pictures by
    their ends, whatever stands before the ends.
    """

    path: str
    key: str
    members: dict[str, Member]
    problem: str = ""
    detail: str = ""
    pictures: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return f"{self.path}, sample {self.key}"


def scan_tar(path: str) -> Iterator[Member]:
    """The files of an archive in its order, one in memory at a time; compressed or not.

    Folders are left out; no link is followed and no name is used as a path. Raises ValueError if
    the archive is cut at any byte, a header is damaged, a file is sparse, or anything but zeros
    stands behind the end. What was yielded before that is whole.
    """
    with open_whole(path) as (stream, size, packed):
        for info in headers_of(path, stream, size):
            if not info.isdir():
                yield replace(_member(path, info, stream), file="" if packed else path)


def headers_of(path: str, stream: Any, size: int) -> Iterator[tarfile.TarInfo]:
    """What an archive of `size` bytes says of its members; of these nothing is read.

    `stream` is at its start, and may be read between. Raises ValueError as `scan_tar` does.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Info, encoding="utf-8") as archive:
            while (info := archive.next()) is not None:
                _check_extent(info, archive.offset, size)
                # `tarfile` keeps every member that it has seen.
                archive.members.clear()  # type: ignore[attr-defined]
                yield info
            _check_end(stream, archive.offset, size)
    # ValueError: attributes that are no numbers or no text; RecursionError: headers without
    # end; OverflowError: sizes that no file has.
    except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
        stream.seek(0)
        if stream.read(len(_ZIP)) == _ZIP:
            raise ValueError(f"{path} is a zip, not a tar; unpack it into a folder") from None
        joined = isinstance(error, _JoinedError)
        remedy = "give each as a file of its own" if joined else "fetch it again"
        raise ValueError(f"{path} is not a whole tar file ({error}); {remedy}") from None


def samples_of(path: str, whole: tuple[str, ...] = ()) -> Iterator[Sample]:
    """The samples of an archive, each when its last member is read.

    A key is a member's name up to the first dot behind its folders, or where it ends as one of
    `whole` up to that end (arXiv's 0704.0001.json); names without one, and hidden
    files, are no sample's. A sample's members stand together: a key that comes back later, and a
    suffix that is there twice, is TWICE. One sample is in memory at a time, and 16 bytes for each
    key. Raises ValueError as `scan_tar` does.
    """
    seen: set[bytes] = set()
    named = ((*_key_and_suffix(member, whole), member) for member in scan_tar(path))
    for key, group in groupby((item for item in named if item[0]), key=lambda item: item[0]):
        yield _sample(path, key, ((suffix, member) for _, suffix, member in group), seen)


class _JoinedError(tarfile.ReadError):
    """A file is several archives, one behind the other."""


class _Info(tarfile.TarInfo):
    def _proc_member(self, archive: Any) -> tarfile.TarInfo:
        # Before `tarfile` acts on the size: a negative one would send it back to where it was.
        if self.size < 0:
            raise tarfile.ReadError(f"a member has {self.size:,} bytes")
        if self.type in _HEADERS and self.size > _LARGEST_HEADER_BYTES:
            raise tarfile.ReadError(f"a member's name or attributes have {self.size:,} bytes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found


def _check_extent(info: tarfile.TarInfo, next_offset: int, size: int) -> None:
    if info.issparse():
        raise tarfile.ReadError(f"{info.name} is sparse; pack it again without holes")
    if info.size < 0 or next_offset <= info.offset:
        raise tarfile.ReadError(f"{info.name} has {info.size:,} bytes")
    if next_offset > size:
        raise tarfile.ReadError(f"it has {size:,} bytes, {info.name} ends at {next_offset:,}")


def _check_end(stream: Any, offset: int, size: int) -> None:
    # `tarfile` takes a file that was cut between two members, and any damaged header, for its end.
    if size - offset < 2 * tarfile.BLOCKSIZE or size % tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without the mark of its end")
    if not offset and size > tarfile.RECORDSIZE:
        raise tarfile.ReadError(f"its {size:,} bytes are all zero")
    stream.seek(offset)
    left = size - offset
    while left:
        block = stream.read(min(left, 2**20))
        if rest := block.lstrip(b"\0"):
            first = (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            if block[first + 257 : first + 262] == b"ustar":
                at = size - left + first
                raise _JoinedError(f"another one begins behind its end, at byte {at:,}")
        if not block or rest:
            raise tarfile.ReadError(f"damaged or further data behind byte {offset:,}")
        left -= len(block)


def _member(path: str, info: tarfile.TarInfo, stream: Any) -> Member:
    problem = ""
    parts = re.split(r"[/\\]", info.name)
    if not info.isreg() or not parts[0] or ".." in parts:
        problem = UNSAFE
    elif info.size > LARGEST_BYTES:
        problem = TOO_LARGE
    data = b""
    if not problem:
        stream.seek(info.offset_data)
        data = stream.read(info.size)
        if len(data) != info.size:
            have = f"{info.name} has {len(data):,} of {info.size:,} bytes"
            raise ValueError(f"{path} is not a whole tar file ({have}); fetch it again")
    return Member(info.name, info.offset_data, info.size, data, problem)


def _key_and_suffix(member: Member, whole: tuple[str, ...]) -> tuple[str, str]:
    folder, slash, base = member.name.rpartition("/")
    parted = base.rpartition if base.lower().endswith(whole) else base.partition
    stem, dot, suffix = parted(".")
    if stem and dot and not base.startswith("."):
        return f"{folder}{slash}{stem}", suffix.lower()
    # A link or a name that goes up is named even where it belongs to no sample.
    return (member.name or "(no name)", "") if member.problem == UNSAFE else ("", "")


def _sample(path: str, key: str, members: Iterator[tuple[str, Member]], seen: set[bytes]) -> Sample:
    found: dict[str, Member] = {}
    pictures: list[str] = []
    problem = detail = ""
    total = 0
    digest = content_hash(key.encode("utf-8", "surrogatepass"))
    if digest in seen:
        problem, detail = TWICE, "its members do not stand together; pack them in order of name"
    seen.add(digest)
    for suffix, member in members:
        total += member.size
        pictures += [member.name] if is_picture(member.name) else []
        if problem:
            continue
        if member.problem == UNSAFE:
            problem, detail = UNSAFE, f"{member.name} leads out of the archive or is no file"
        elif suffix in found:
            problem, detail = TWICE, f"{member.name}; remove one"
        elif total > LARGEST_BYTES:
            problem, detail = TOO_LARGE, f"{total:,} bytes up to {member.name}"
        else:
            found[suffix] = member
        if problem:
            found.clear()
    return Sample(path, key, found, problem, detail, tuple(pictures))


def sample_units(source: str) -> list[Unit]:
    """Units of the samples that lie as files beside each other: a picture, and its .txt or .json.

    Files of no picture are none of a sample's.
    """
    samples: dict[tuple[str, str], list[str]] = {}
    for file in shown_files(source):
        folder, stem, suffix = parts_of(file)
        if suffix in (*PICTURES, *TEXTS, "json", "syn.json"):
            samples.setdefault((folder, stem), []).append(file)
    shown = [files for _, files in sorted(samples.items()) if any(map(is_picture, files))]
    if all(is_picture(file) for files in shown for file in files):
        return []
    parts = (shown[x : x + NUM_UNIT_RECORDS] for x in range(0, len(shown), NUM_UNIT_RECORDS))
    return [Unit(FILES, tuple(file for files in part for file in files)) for part in parts]


def samples_beside(unit: Unit) -> Iterator[list[str]]:
    """The files of each sample of a unit of them that has more than its picture."""
    if unit.format == FILES:
        for _, files in groupby(unit.files, key=lambda file: parts_of(file)[:2]):
            if len(sample := list(files)) > 1:
                yield sample


def parts_of(file: str) -> tuple[str, str, str]:
    """The folder of a sample's file, the sample's name, and what of it the file is."""
    name = base_name(file)
    end = ".syn.json" if name.lower().endswith(".syn.json") else os.path.splitext(name)[1]
    stem = name.removesuffix(name[-len(end) :] if end else "")
    if is_picture(stem) and not is_picture(name):
        stem = os.path.splitext(stem)[0]  # 0.jpg.txt beside 0.jpg
    return folder_of(file), stem, end[1:].lower()
