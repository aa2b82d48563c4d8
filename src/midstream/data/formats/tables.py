"""Tables: Parquet and Arrow files row by row, and which split of a data set is meant."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc
from pyarrow.parquet import ParquetFile

from midstream.core.storage import read_json
from midstream.data.formats.files import full_name, open_whole
from midstream.data.formats.json_records import NOT_UTF8
from midstream.data.remote import RemoteError
from midstream.data.source_writer import Reject

PARQUET, ARROW = (".parquet",), (".arrow",)
TABLES = PARQUET + ARROW
# Pictures stand in rows: fewer of them are read at a time than of texts.
_BATCH_ROWS, _TEXT_ROWS, _BUFFER_BYTES = 32, 256, 2**20
_SPLIT = re.compile(r"(?<![a-z])(?P<split>train|validation|valid|val|dev|test)(?![a-z])")
# split=train (partitions) and partial-train (the hub's) too.
_SPLIT_FOLDER = re.compile(rf"(?:\w+=|partial-)?{_SPLIT.pattern}")
_NAMES = {"valid": "validation", "val": "validation"}
_SPLIT_LIST = "dataset_dict.json"


def columns_of(path: str) -> pyarrow.Schema:
    """The columns of a table; ValueError names a file that is none."""
    with _opened(path) as table:
        return table.schema_arrow if isinstance(table, ParquetFile) else table.schema


def table_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[pyarrow.Scalar, ...]]:
    """The values of some columns, row by row; a part of the file is in memory at a time.

    Raises ValueError that names the file if it is cut short or damaged.
    """
    with _opened(path) as table:
        schema = table.schema_arrow if isinstance(table, ParquetFile) else table.schema
        if twice := [name for name in columns if schema.names.count(name) > 1]:
            raise ValueError(f"{path} has several columns {twice[0]}; give each a name of its own")
        for batch in _batches(table, list(columns)):
            yield from zip(*(batch.column(name) for name in columns), strict=True)


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


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    kind = "Arrow" if full_name(path).endswith(ARROW) else "parquet"
    with open_whole(path) as (stream, _, _):
        try:
            if kind == "parquet":
                yield ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            elif stream.peek(6)[:6] == b"ARROW1":  # type: ignore[attr-defined]
                yield ipc.open_file(stream)
            else:
                yield ipc.open_stream(stream)
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
