"""Tables: Parquet and Arrow files row by row, and which split of a data set is meant; those of
`midstream join captions`, where a row is a sample whose picture is a range of an archive."""

import io
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
from midstream.data.formats.files import full_name, inside, open_binary, open_whole
from midstream.data.formats.json_records import NOT_UTF8
from midstream.data.formats.records import Member, ReadOptions, Sample
from midstream.data.remote import RemoteError
from midstream.data.source_writer import Reject
from midstream.data.sources import content_hash

PARQUET, ARROW = (".parquet",), (".arrow",)
TABLES = PARQUET + ARROW
# Pictures stand in rows: fewer of them are read at a time than of texts.
_BATCH_ROWS, _TEXT_ROWS, _BUFFER_BYTES = 32, 256, 2**20
# How messages of a stream of Arrow begin (those of before 2019 do not), and how it ends.
_CONTINUES = b"\xff\xff\xff\xff"
_END_OF_STREAM = _CONTINUES + b"\0\0\0\0"
_SPLIT = re.compile(r"(?<![a-z])(?P<split>train|validation|valid|val|dev|test)(?![a-z])")
# split=train (partitions) and partial-train (the hub's) too.
_SPLIT_FOLDER = re.compile(rf"(?:\w+=|partial-)?{_SPLIT.pattern}")
_NAMES = {"valid": "validation", "val": "validation"}
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
            named = (_SPLIT.search if last else _SPLIT_FOLDER.match)(part.lower())
            if named or part in listed:
                name = part if part in listed or named is None else named["split"]
                shown = re.sub(r"([-_.])\d.*(?=\.)", r"\1*", part) if last else part
                patterns = splits.setdefault(_NAMES.get(name, name), {})
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
