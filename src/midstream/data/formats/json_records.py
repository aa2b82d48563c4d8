"""JSON as data sets have it: lists, lines of records, one object, and what stands in them."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from midstream.data.formats.files import read_head, read_lines, read_pieces, unpacked
from midstream.data.source_writer import Reject

NO_OBJECT, NOT_UTF8, NOT_UNICODE = "not a JSON object", "not UTF-8", "not Unicode"
MAX_ENTRY_BYTES, _LONE_BYTES = 256 * 2**20, 2**24
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
    if not data.strip(_SPACE):
        return Reject(where, NO_OBJECT, "nothing stands there; a comma too many?")
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


def inside(value: object, parts: Sequence[str]) -> object:
    """What stands under keys inside each other (see `unquoted`); None where one is not there."""
    for part in parts:
        value = unquoted(value)
        value = value.get(part) if isinstance(value, dict) else None
    return value


def unicode_problem(text: str) -> str:
    """What keeps `text` from being written as UTF-8 (half a surrogate pair), or nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return str(error)
    return ""


def is_wide(data: bytes) -> bool:
    """Whether a text is UTF-16 or UTF-32, by its mark or by zeros in most of its characters."""
    head = data[: 2**10]
    return head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or (
        3 * head.count(0) > len(head) > 3
    )


def _head_of(path: str) -> bytes:
    """How a file of JSON begins; ValueError names one that is not UTF-8 for its most part."""
    head = read_head(path, 2**16)
    if is_wide(head):
        raise ValueError(
            f"{path} is UTF-16 or UTF-32; write it in UTF-8, as iconv -f UTF-16 -t UTF-8 does"
        )
    return head.removeprefix(_BOM).lstrip(_SPACE)


def holds_list(path: str) -> bool:
    """Whether the file's JSON is one list of records, and not lines of them.

    Raises ValueError that names a file in UTF-16, and as `read_lines` does.
    """
    head = _head_of(path)
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
    """Place and bytes of each entry of a JSON list (from 0), of each line that is not blank (from
    1), or of the one object over several lines.

    Errors as of `list_entries` and `read_lines`, and ValueError for a file that ends in an object.
    """
    if listed:
        yield from ((f"{path}, record {n}", data) for n, data in enumerate(list_entries(path)))
        return
    if whole := lone_object(path):
        yield f"{path}, record 0", whole
        return
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        cut = not line.endswith((b"\n", b"\r")) and not line.rstrip(_SPACE + b"\0").endswith(b"}")
        if cut and line.lstrip(_SPACE).startswith(b"{"):
            raise ValueError(
                f"{path} ends inside line {number:,}; fetch it again, or remove that line"
            )
        yield f"{path}, line {number}", line


def lone_object(path: str) -> bytes:
    """The bytes of the one object over several lines that a file of up to 16 MiB holds; else
    nothing."""
    head = _head_of(path)
    line, end, _ = head.partition(b"\n")
    if not head.startswith(b"{") or not end or isinstance(json_object(line, path), dict):
        return b""
    data = read_head(path, _LONE_BYTES + 1)
    whole = len(data) <= _LONE_BYTES and isinstance(json_object(data, path), dict)
    return data if whole else b""


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
                "that hold records (.jsonl for one record a line), or write the list that is "
                "inside an object alone"
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
