"""Files of records: JSON lists, lines and lone objects, and Parquet and Arrow tables row by row.

Also which split of a data set is meant, and the tables of `midstream join captions`, where a row is
a sample whose picture is a range of an archive.
"""

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import pyarrow
from pyarrow import ipc
from pyarrow.parquet import ParquetFile

from midstream.core.storage import read_json
from midstream.data.formats.files import (
    full_name,
    inside,
    open_binary,
    open_whole,
    read_head,
    read_lines,
    read_pieces,
    unpacked,
)
from midstream.data.formats.records import Member, ReadOptions, Sample
from midstream.data.remote import RemoteError
from midstream.data.source_writer import Reject, RejectedError, or_reject
from midstream.data.sources import content_hash

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


def json_object(data: bytes, lists: str = "") -> dict[str, Any]:
    """The JSON object in `data`; RejectedError says why there is none.

    Where `lists` is a key, a list of objects is an object that has it under that key.
    """
    if not data.strip(_SPACE):
        raise RejectedError(NO_OBJECT, "nothing stands there; a comma too many?")
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RejectedError(NOT_UTF8, str(error)) from None
    # ValueError: also numbers of thousands of digits; RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise RejectedError(NO_OBJECT, str(error)) from None
    if lists and isinstance(found, list) and found and all(isinstance(x, dict) for x in found):
        return {lists: found}
    if not isinstance(found, dict):
        raise RejectedError(NO_OBJECT, type(found).__name__)
    return found


def unquoted(value: object) -> object:
    """The list or object that a text is as JSON, as columns of text hold them; else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list | dict) else value


def field_in(value: object, parts: Sequence[str]) -> object:
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
    head = data[: 2**10].rstrip(b"\0")  # a crash leaves zeros at a file's end
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
    if not head.startswith(b"{") or not end or _is_object(line):
        return b""
    data = read_head(path, _LONE_BYTES + 1)
    return data if len(data) <= _LONE_BYTES and _is_object(data) else b""


def _is_object(data: bytes) -> bool:
    return isinstance(or_reject("", json_object, data), dict)


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
                "that hold records (.jsonl for one record a line), or write what is inside an "
                "object (columns, or records by their ids) as a list of records"
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


PARQUET, ARROW = (".parquet",), (".arrow",)
TABLES = PARQUET + ARROW
# Pictures stand in rows: fewer of them are read at a time than of texts.
_BATCH_ROWS, _TEXT_ROWS, _BUFFER_BYTES = 32, 256, 2**20
# How messages of a stream of Arrow begin (those of before 2019 do not), and how it ends.
_CONTINUES = b"\xff\xff\xff\xff"
_END_OF_STREAM = _CONTINUES + b"\0\0\0\0"
SPLIT_WORD = re.compile(r"(?<![a-z])(?P<split>train|validation|valid|val|dev|test)(?![a-z])")
# split=train (partitions) and partial-train (the hub's) too.
_SPLIT_FOLDER = re.compile(rf"(?:\w+=|partial-)?{SPLIT_WORD.pattern}")
SPLIT_NAMES = {"valid": "validation", "val": "validation"}
_SPLIT_LIST = "dataset_dict.json"


def columns_of(path: str) -> pyarrow.Schema:
    """The columns of a table; ValueError names a file that is none."""
    with _opened(path) as (table, _):
        return table.schema_arrow if isinstance(table, ParquetFile) else table.schema


def table_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[pyarrow.Scalar, ...]]:
    """The values of some columns, row by row; a part of the file is in memory at a time.

    Raises ValueError that names the file if it is cut short or damaged.
    """
    with _opened(path) as (table, stream):
        schema = table.schema_arrow if isinstance(table, ParquetFile) else table.schema
        if twice := [name for name in columns if schema.names.count(name) > 1]:
            raise ValueError(f"{path} has several columns {twice[0]}; give each a name of its own")
        for batch in _batches(table, list(columns)):
            yield from zip(*(batch.column(name) for name in columns), strict=True)
        if isinstance(table, ipc.RecordBatchStreamReader):
            _check_end(path, stream)


def table_records(
    path: str, wanted: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    """Rows as records of those of the `wanted` columns that are there, and where each stands; a
    reject for text that is no UTF-8. Raises as `table_rows` does."""
    columns = [name for name in columns_of(path).names if name in wanted]
    for number, values in enumerate(table_rows(path, columns)):
        where = f"{path}, row {number}"
        try:
            yield where, {name: value.as_py() for name, value in zip(columns, values, strict=True)}
        except UnicodeDecodeError as error:
            yield where, Reject(where, NOT_UTF8, str(error))


def _batches(table: Any, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    if isinstance(table, ParquetFile):
        rows = _TEXT_ROWS if len(columns) == 1 else _BATCH_ROWS
        batches: Iterator[pyarrow.RecordBatch] = table.iter_batches(
            rows, columns=columns, use_threads=False
        )
        return batches
    if isinstance(table, ipc.RecordBatchStreamReader):
        return iter(table)
    return (table.get_batch(number) for number in range(table.num_record_batches))


def _check_end(path: str, stream: IO[bytes]) -> None:
    """Raises ValueError where a stream of Arrow that was read does not end, or goes on."""
    # pyarrow takes the end of a file between two batches for the stream's, and reads no second one.
    end = stream.tell()
    stream.seek(0)
    is_old = stream.read(4) != _CONTINUES
    stream.seek(max(0, end - len(_END_OF_STREAM)))
    tail = stream.read(len(_END_OF_STREAM) + 1)
    if tail[len(_END_OF_STREAM) :]:
        raise ValueError(
            f"{path} goes on behind the end of its Arrow stream, at byte {end:,}; give each stream "
            "as a file of its own"
        )
    if tail != _END_OF_STREAM and not is_old:
        raise ValueError(
            f"{path} is no whole Arrow file (it ends without the mark of its end, as one does that "
            "was not written to its end); write or fetch it again"
        )


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, IO[bytes]]]:
    kind = "Arrow" if full_name(path).endswith(ARROW) else "parquet"
    with open_whole(path) as (stream, _, _):
        try:
            if kind == "parquet":
                yield ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False), stream
            elif stream.peek(6)[:6] == b"ARROW1":  # type: ignore[attr-defined]
                yield ipc.open_file(stream), stream
            else:
                yield ipc.open_stream(stream), stream
        except RemoteError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no whole {kind} file ({error}); fetch it again") from None


def refuse_splits(source: str, files: Sequence[str]) -> None:
    """Raises ValueError if a folder or pattern stands for tables of several splits.

    A split is a word of a folder's or a file's name (train-00000-of-00001.parquet), or a folder
    that `dataset_dict.json` lists.
    """
    listing = Path(source, _SPLIT_LIST)
    listed = read_json(listing).get("splits", []) if listing.is_file() else []
    tables = [file.split("/") for file in files if full_name(file).endswith(TABLES)]
    levels = zip(*(parts[:-1] for parts in tables), strict=False)
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    splits: dict[str, dict[str, None]] = {}
    for parts in tables:
        for depth, part in enumerate(parts[shared:], start=shared):
            last = depth + 1 == len(parts)
            named = (SPLIT_WORD.search if last else _SPLIT_FOLDER.match)(part.lower())
            if named or part in listed:
                name = part if part in listed or named is None else named["split"]
                shown = re.sub(r"([-_.])\d.*(?=\.)", r"\1*", part) if last else part
                patterns = splits.setdefault(SPLIT_NAMES.get(name, name), {})
                patterns["/".join([*parts[:depth], shown])] = None
                break
    if len(splits) > 1:
        raise ValueError(
            f"{source} holds the splits {', '.join(sorted(splits))}, which are never read as one "
            f"source; give the one that is meant: "
            + " or ".join(" with ".join(splits[name]) for name in sorted(splits))
        )


# What a table notes: the folder of its pictures.
JOINED_ROOT = b"midstream.pictures"
_COLUMNS = ("file", "key", "picture", "offset", "size", "hash", "text", "syn.json")


def is_joined(path: str) -> bool:
    """Whether a table is one of `midstream join captions`."""
    return JOINED_ROOT in (columns_of(path).metadata or {})


def joined_samples(table: str, options: ReadOptions) -> Iterator[Sample]:
    """The samples of a table, each with its picture, its own caption and the made ones.

    Raises ValueError for an archive that is gone, or that holds another picture than when the
    table was written.
    """
    root = options.images or columns_of(table).metadata[JOINED_ROOT].decode()
    with ExitStack() as opened:
        yield from _samples(table, root, opened)


def _samples(table: str, root: str, opened: ExitStack) -> Iterator[Sample]:
    archive = ""
    for row in table_rows(table, _COLUMNS):
        file, key, name, offset, size, hashed, text, made = (value.as_py() for value in row)
        path = inside([root], file, f"{table}, sample {key}")
        # A table's rows stand in the order of their pictures in one archive after the other.
        if path != archive:
            opened.close()
            archive, stream = path, opened.enter_context(_archive(path, table))
        stream.seek(offset)
        data = stream.read(size)
        if content_hash(data) != hashed:
            raise ValueError(
                f"{path}, sample {key}: its picture is another than when {table} was joined; put "
                "the archive back, or run `midstream join captions` again"
            )
        _, suffix = os.path.splitext(name.lower())
        members = {suffix[1:]: Member(name, offset, size, data, file=path)}
        others = {"txt": None if text is None else text.encode(), "syn.json": made}
        for end, told in others.items():
            if told is not None:
                members[end] = Member(f"{key}.{end}", 0, len(told), told, file=table)
        yield Sample(path, key, members, pictures=(name,))


def _archive(path: str, table: str) -> io.BufferedReader:
    try:
        return open_binary(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is gone, which {table} names; put it back, or say with --images where "
            "its pictures are now"
        ) from None
