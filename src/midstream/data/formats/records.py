"""The records that readers of public formats yield, and how JSON lists and tar archives are read.

What is wrong with one member or sample is its `problem`; a damaged file is a ValueError.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np

from midstream.data.examples import Turn
from midstream.data.formats.files import open_whole, read_head, read_lines, read_pieces, unpacked
from midstream.data.source_writer import Reject
from midstream.data.sources import content_hash

Section = Literal["text", "captions", "conversations"]
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
    file's own folder. max_tokens: captions and conversations of more tokens are left out. split:
    what is read of a list that holds several splits, one or more joined by "+".
    """

    text_key: str = "text"
    require: Literal["original", "synthetic"] | None = None
    images: str | None = None
    max_tokens: int | None = None
    split: str | None = None


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
    picture: None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All its text, as every record has it."""
        return (self.text,)


@dataclass(frozen=True)
class TokenRecord:
    """A chunk that is tokenised already, taken as it is."""

    where: str
    input_ids: np.ndarray
    picture: None = None


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
    def texts(self) -> tuple[str, ...]:
        """All captions, its own first."""
        return (self.caption, *self.synthetic) if self.caption else self.synthetic


@dataclass(frozen=True)
class ConversationRecord:
    """Questions and replies, the picture that the first one shows, and why others are left out."""

    where: str
    turns: tuple[Turn, ...]
    picture: Picture | None
    left_out: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """What each turn holds: question, reply and, where there is one, its system text."""
        return tuple(text for turn in self.turns for text in turn if text)


Record = TextRecord | TokenRecord | CaptionRecord | ConversationRecord


NO_OBJECT, NOT_UTF8, NOT_UNICODE = "not a JSON object", "not UTF-8", "not Unicode"
MAX_ENTRY_BYTES = 256 * 2**20
_PIECE_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
# What stands before the next bracket or, between the entries of the list itself, comma: other
# characters, and strings, in which brackets and commas mean nothing.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_NEXT_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+([{}\[\]])", re.DOTALL)
_NEXT_IN_LIST = re.compile(rb'(?:[^"{}\[\],]++|' + _STRING + rb")*+([{}\[\],])", re.DOTALL)


def json_object(data: bytes, where: str) -> dict[str, Any] | Reject:
    """The JSON object in `data`, or why there is none."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Reject(where, NOT_UTF8, str(error))
    # ValueError: also numbers of thousands of digits; RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        return Reject(where, NO_OBJECT, str(error))
    return found if isinstance(found, dict) else Reject(where, NO_OBJECT, type(found).__name__)


def unquoted(value: object) -> object:
    """The list or object that a text is as JSON, as columns of text hold them; else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list | dict) else value


def unicode_problem(text: str) -> str:
    """What keeps `text` from being written as UTF-8 (half a surrogate pair), or nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return str(error)
    return ""


def holds_list(path: str) -> bool:
    """Whether the file's JSON is one list of records, and not lines of them."""
    head = read_head(path, 2**16).removeprefix(_BOM).lstrip(_SPACE)
    line, _, rest = head.partition(b"\n")
    if not head.startswith(b"[") or not rest.strip():
        return head.startswith(b"[")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    # Its first line is a list of its own.
    return False


def entries_of(path: str, *, listed: bool) -> Iterator[tuple[str, bytes]]:
    """Place and bytes of each entry of a JSON list (from 0), or of each line that is not blank
    (from 1); errors as of `list_entries` and `read_lines`."""
    if listed:
        yield from ((f"{path}, record {n}", data) for n, data in enumerate(list_entries(path)))
        return
    for number, line in enumerate(read_lines(path), start=1):
        if not line.isspace():
            yield f"{path}, line {number}", line


def list_entries(path: str) -> Iterator[bytes]:
    """The bytes of each entry of the JSON list that a file holds, one in memory at a time.

    An entry is what stands between the commas of the list; whether it is JSON is not looked at.
    (`ijson` changes halves of surrogate pairs, gives up a file for one byte that is no UTF-8, and
    takes memory without bound for nested brackets.)
    Raises ValueError that names the file if it does not begin with a list, ends inside it, goes on
    behind it, or has an entry of more than 256 MiB.
    """
    with unpacked(path) as stream:
        read = read_pieces(path, stream)
        text = read(_PIECE_BYTES).removeprefix(_BOM).lstrip(_SPACE)
        if not text.startswith(b"["):
            raise ValueError(
                f"{path} begins with {text[:20]!r}, not with a list of records; name the files "
                "that hold records (.jsonl for one record a line)"
            )
        # `start` is where the entry begins, `position` how far it is known.
        depth, start, position, count = 1, 1, 1, 0
        while depth:
            pattern = _NEXT_IN_LIST if depth == 1 else _NEXT_BRACKET
            found = pattern.match(text, position)
            if found is None:
                # As much again as is there, so that a long string is not looked at for each piece.
                text, position = text[start:], position - start
                start = 0
                more = read(max(_PIECE_BYTES, len(text)))
                _check(path, more, len(text), count)
                text += more
                continue
            position, mark = found.end(), found[1]
            depth += 1 if mark in b"[{" else -1 if mark in b"]}" else 0
            if depth == 0 or mark == b",":
                entry = text[start : position - 1].strip(_SPACE)
                start, count = position, count + 1
                if entry or mark == b"," or count > 1:
                    yield entry
        rest = text[position:].strip(_SPACE)
        while not rest and (text := read(_PIECE_BYTES)):
            rest = text.strip(_SPACE)
        if rest:
            raise ValueError(f"{path} goes on behind its list ({rest[:20]!r}); fetch it again")


def _check(path: str, more: bytes, num_bytes: int, entry: int) -> None:
    if not more:
        raise ValueError(f"{path} ends inside its list, in entry {entry:,}; fetch it again")
    if num_bytes > MAX_ENTRY_BYTES:
        raise ValueError(
            f"{path}: entry {entry:,} is longer than {MAX_ENTRY_BYTES:,} bytes; a quotation mark "
            "may be missing in it"
        )


# The largest member, and all members of a sample together.
LARGEST_BYTES = 256 * 2**20
UNSAFE = "unsafe member name"
TWICE = "member there twice"
TOO_LARGE = "member too large"

# Long names and attributes, which `tarfile` reads whole; real ones have some hundred bytes.
_LARGEST_HEADER_BYTES = 2**20
_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


PICTURES = ("jpg", "jpeg", "png", "webp")


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
        try:
            with tarfile.open(
                fileobj=stream, mode="r:", tarinfo=_Info, encoding="utf-8"
            ) as archive:
                while (info := archive.next()) is not None:
                    _check_extent(info, archive.offset, size)
                    # `tarfile` keeps every member that it has seen.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not info.isdir():
                        yield replace(_member(info, stream), file="" if packed else path)
                _check_end(stream, archive.offset, size)
        # ValueError: attributes that are no numbers or no text; RecursionError: headers without
        # end; OverflowError: sizes that no file has.
        except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is not a whole tar file ({error}); fetch it again") from None


def samples_of(path: str) -> Iterator[Sample]:
    """The samples of an archive, each when its last member is read.

    A key is a member's name up to the first dot behind its folders; names without one, and hidden
    files, are no sample's. A sample's members stand together: a key that comes back later, and a
    suffix that is there twice, is TWICE. One sample is in memory at a time, and 16 bytes for each
    key. Raises ValueError as `scan_tar` does.
    """
    seen: set[bytes] = set()
    named = ((*_key_and_suffix(member), member) for member in scan_tar(path))
    for key, group in groupby((item for item in named if item[0]), key=lambda item: item[0]):
        yield _sample(path, key, ((suffix, member) for _, suffix, member in group), seen)


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
        if not block or any(block):
            raise tarfile.ReadError(f"damaged or further data behind byte {offset:,}")
        left -= len(block)


def _member(info: tarfile.TarInfo, stream: Any) -> Member:
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
            raise tarfile.ReadError(f"{info.name} has {len(data):,} of {info.size:,} bytes")
    return Member(info.name, info.offset_data, info.size, data, problem)


def _key_and_suffix(member: Member) -> tuple[str, str]:
    folder, slash, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if stem and dot:
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
