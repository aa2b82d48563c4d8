"""The public formats of text, record by record (see `docs/data.md`).

Lines are numbered from 1, rows of parquet files from 0. A record that cannot be used is a `Reject`
with one of the reasons below; a file that cannot be read as its format is a ValueError.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pyarrow
from pyarrow.parquet import ParquetFile

from midstream.data.formats.files import (
    base_name,
    exists,
    find_files,
    open_binary,
    read_lines,
    size_of,
)
from midstream.data.formats.json_records import NOT_UNICODE, NOT_UTF8, json_object, unicode_problem
from midstream.data.formats.read_tokens import EMPTY, Manifests, read_tokens
from midstream.data.formats.records import ReadOptions, TextRecord, TokenRecord, Unit
from midstream.data.source_writer import Reject
from midstream.source_files import TEXT_SUFFIXES

NO_TEXT = "no text"
MAX_DOCUMENT_BYTES = 256 * 2**20
_BATCH_ROWS, _BUFFER_BYTES = 256, 2**20

Item = TextRecord | TokenRecord | Reject


def text_units(sources: Sequence[str], options: ReadOptions) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, one unit a file.

    The format follows from a file's name. `manifest.jsonl` stands for the tokenised shards that it
    lists; `last` of their units is the number of chunks that it promises. Raises FileNotFoundError
    for what is not there, a listed shard too, and ValueError for a file of an unknown format or
    given twice, a shard that the manifest beside it does not list, and a .tar of something else.
    """
    del options
    units = [unit for source in sources for unit in _units(source)]
    for path, times in Counter(unit.files[0] for unit in units).items():
        if times > 1:
            raise ValueError(f"{path} is given {times} times; give each file once")
    return units


def read_text(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    """The records of a unit in the order of its file: documents, tokenised chunks, or why not.

    Blank lines are no records; a .txt or .tex file is one document with line ends "\\n". Raises
    ValueError that names the file if it is cut short, damaged, not of its format, without the
    column of the text, or holds another number of chunks than its manifest says.
    """
    if unit.format not in _READERS:
        raise ValueError(f"{unit.files[0]}: {unit.format!r} is no format of texts; {_known()}")
    return _READERS[unit.format](unit, options)


def _units(source: str) -> list[Unit]:
    files = find_files(source, tuple(end for ends in TEXT_SUFFIXES.values() for end in ends))
    manifests = Manifests()
    lists = {path: listed for path in files if (listed := manifests.listed(path)) is not None}
    shards = {shard: path for path, listed in lists.items() for shard in listed}
    for shard in sorted(shards.keys() - set(files)):
        if not exists(shard):
            raise FileNotFoundError(
                f"{shard} does not exist, {shards[shard]} lists it; fetch it or remove its line"
            )
    units = []
    for path in sorted((set(files) - lists.keys()) | shards.keys()):
        name = _format(path)
        last = manifests.chunks(path) if name == "tokens" else None
        units.append(Unit(name, (path,), last=last))
    return units


def _format(path: str) -> str:
    name = base_name(path)
    found = next((kind for kind, ends in TEXT_SUFFIXES.items() if name.endswith(ends)), None)
    if found is None:
        raise ValueError(f"{path} is of no known format of texts; {_known()}")
    return found


def _known() -> str:
    return "known are " + "; ".join(f"{name} ({', '.join(e)})" for name, e in TEXT_SUFFIXES.items())


def _read_jsonl(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    path, key = unit.files[0], options.text_key
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        found = json_object(line, where)
        if isinstance(found, Reject):
            yield found
        elif not isinstance(found.get(key), str):
            has = f"its keys are {list(found)}" if key not in found else f"{key!r} is no text"
            yield Reject(where, NO_TEXT, has[:200])
        else:
            yield _document(where, found[key])


def _read_parquet(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    path, key = unit.files[0], options.text_key
    with open_binary(path) as stream:
        try:
            file = ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            _check_column(path, file.schema_arrow, key)
            rows = (
                value
                for batch in file.iter_batches(_BATCH_ROWS, columns=[key], use_threads=False)
                for value in batch.column(0)
            )
            for number, value in enumerate(rows):
                yield _from_column(f"{path}, row {number}", value)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no whole parquet file ({error}); fetch it again") from None


def _check_column(path: str, schema: pyarrow.Schema, key: str) -> None:
    if key not in schema.names:
        raise ValueError(f"{path} has no column {key!r}; name one of {schema.names}")
    kind = schema.field(key).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view"):
        raise ValueError(f"{path}: column {key!r} is {kind}, not text; name another column")


def _from_column(where: str, value: pyarrow.Scalar) -> Item:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Reject(where, NOT_UTF8, str(error))
    return Reject(where, NO_TEXT, "it is null") if text is None else _document(where, text)


def _read_txt(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    path = unit.files[0]
    size = size_of(path)
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, a document at most {MAX_DOCUMENT_BYTES:,}; "
            "write its documents as lines of a .jsonl file"
        )
    with open_binary(path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Reject(path, NOT_UTF8, str(error))
        return
    yield _document(path, text.replace("\r\n", "\n"))


def _document(where: str, text: str) -> TextRecord | Reject:
    if not text or text.isspace():
        return Reject(where, EMPTY)
    if problem := unicode_problem(text):
        return Reject(where, NOT_UNICODE, problem)
    return TextRecord(where, text)


def _read_tokens(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    del options
    return read_tokens(unit)


_READERS: dict[str, Callable[[Unit, ReadOptions], Iterator[Item]]] = {
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "txt": _read_txt,
    "tokens": _read_tokens,
}
