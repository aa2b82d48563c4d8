"""The public formats of text, as words and as OpenLM's shards of token ids (see `docs/data.md`).

Lines are numbered from 1, rows of parquet files from 0.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import pyarrow

from midstream.core.digests import TEXT_SUFFIXES
from midstream.data.formats.files import (
    base_name,
    exists,
    find_files,
    folder_of,
    full_name,
    is_url,
    join,
    read_head,
    read_lines,
    size_of,
)
from midstream.data.formats.record_files import (
    NOT_UNICODE,
    NOT_UTF8,
    columns_of,
    entries_of,
    holds_list,
    is_wide,
    json_object,
    refuse_splits,
    table_rows,
    unicode_problem,
)
from midstream.data.formats.records import (
    Member,
    ReadOptions,
    TextRecord,
    TokenRecord,
    Unit,
    scan_tar,
)
from midstream.data.remote import RemoteError
from midstream.data.source_writer import Reject, RejectedError, or_reject

MANIFEST = "manifest.jsonl"
# What parts the documents of one file of text, on a line of its own.
_END = re.compile(r"(?m)^<\|endoftext\|>[ \t]*$")
NO_IDS, EMPTY = "not a list of token ids", "empty text"
_MEMBERS = (".txt", ".json", ".json.gz")
_MAX_UNPACKED_BYTES = 64 * 2**20


def read_tokens(unit: Unit) -> Iterator[TokenRecord | Reject]:
    """The chunks of a shard, their ids taken as they are.

    Raises ValueError that names the shard if it is damaged, or holds another number of members
    than `unit.last`.
    """
    path, num_chunks = unit.files[0], 0
    for member in scan_tar(path):
        num_chunks += 1
        where = f"{path}, member {member.name}"
        yield or_reject(where, _chunk_of, member, where)
    if unit.last is not None and num_chunks != unit.last:
        raise ValueError(
            f"{path} holds {num_chunks:,} chunks, {folder_of(path)}/{MANIFEST} says "
            f"{unit.last:,}; fetch both again or correct the manifest"
        )


def _chunk_of(member: Member, where: str) -> TokenRecord:
    """The token ids that a member of an archive holds; RejectedError says why it holds none."""
    if member.problem:
        raise RejectedError(member.problem)
    if not member.name.endswith(_MEMBERS):
        raise RejectedError(NO_IDS, f"its name ends in none of {', '.join(_MEMBERS)}")
    try:
        ids = json.loads(_unpacked(member))
    except (EOFError, OSError, zlib.error, ValueError, RecursionError) as error:
        raise RejectedError(NO_IDS, str(error)) from None
    if ids == []:
        raise RejectedError(EMPTY, "a list without ids")
    # By type, not isinstance: true and false are no ids.
    if not isinstance(ids, list) or set(map(type, ids)) != {int}:
        raise RejectedError(NO_IDS, "ids are whole numbers in one flat list")
    if min(ids) < 0 or max(ids) >= 2**63:
        raise RejectedError(NO_IDS, f"it has ids from {min(ids)} to {max(ids)}")
    return TokenRecord(where, np.array(ids, dtype=np.int64))


def _unpacked(member: Member) -> bytes:
    if not member.name.endswith(".gz"):
        return member.data
    data = gzip.GzipFile(fileobj=io.BytesIO(member.data)).read(_MAX_UNPACKED_BYTES + 1)
    if len(data) > _MAX_UNPACKED_BYTES:
        raise ValueError(f"it unpacks to more than {_MAX_UNPACKED_BYTES:,} bytes")
    return data


def _read_manifest(path: str) -> dict[str, int] | None:
    """Chunks of each shard file that a manifest lists; None if it is absent or lists no shards."""
    if not exists(path):
        return None
    found: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        entry = or_reject(where, json_object, line)
        values = {} if isinstance(entry, Reject) else entry
        if not found and "shard" not in values:
            return None
        name, count = values.get("shard"), values.get("num_sequences", values.get("num_chunks"))
        if not isinstance(name, str) or type(count) is not int or count < 0:
            raise ValueError(
                f"{where}: a shard needs its name under 'shard' and its number of chunks under "
                f"'num_sequences'; found {line[:100]!r}"
            )
        shard = join(folder_of(path), f"{name}.tar", where)
        if shard in found:
            raise ValueError(f"{where}: shard {name!r} is listed twice; remove one line")
        found[shard] = count
    return found or None


NO_TEXT = "no text"
_LINES = "write its documents as lines of a .jsonl file"
MAX_DOCUMENT_BYTES = 256 * 2**20
# Small files are worth no shard of their own.
_UNIT_FILES, _UNIT_BYTES = 1000, 64 * 2**20

Item = TextRecord | TokenRecord | Reject


def text_units(sources: Sequence[str]) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make.

    A file is one unit, but plain texts of a local disk beside each other make one together, up to
    `_UNIT_FILES` and `_UNIT_BYTES`. The format follows from a file's name.
    `manifest.jsonl` stands for the tokenised shards that it lists; `last` of their units is the
    number of chunks that it promises. Raises FileNotFoundError for what is not there, a listed
    shard too, and ValueError for a file of an unknown format, a shard that the manifest beside it
    does not list, and a .tar of something else.
    """
    units = [unit for source in sources for unit in _units(source)]
    runs = groupby(units, key=lambda unit: unit.format == "txt" and not is_url(unit.files[0]))
    return [unit for are_plain, run in runs for unit in (_together(run) if are_plain else run)]


def read_text(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    """The records of a unit in the order of its file: documents, tokenised chunks, or why not.

    Blank lines are no records; a .txt or .tex file is one document with line ends "\\n", or those
    that lines of <|endoftext|> part. Raises ValueError that names the file if it is cut short,
    damaged, not of its format, without the column of the text, or holds another number of chunks
    than its manifest says.
    """
    return _READERS[unit.format](unit, options)


def _units(source: str) -> list[Unit]:
    files = find_files(source, tuple(end for ends in TEXT_SUFFIXES.values() for end in ends))
    refuse_splits(source, files)
    listed = cache(_read_manifest)
    lists = {path for path in files if base_name(path) == MANIFEST and listed(path) is not None}
    shards = {shard: path for path in sorted(lists) for shard in listed(path) or ()}
    for shard in sorted(shards.keys() - set(files)):
        if not exists(shard):
            raise FileNotFoundError(
                f"{shard} does not exist, {shards[shard]} lists it; fetch it or remove its line"
            )
    units, checked = [], set[str]()
    for path in sorted((set(files) - lists) | shards.keys()):
        name, last = _format(path), None
        if name == "tokens":
            manifest = join(folder_of(path), MANIFEST, path)
            chunks = listed(manifest)
            if chunks is not None and path not in chunks:
                raise ValueError(
                    f"{path} is not in {manifest}; add its line, move the file away, or give the "
                    "manifest itself to read only what it lists"
                )
            if chunks is None and manifest not in checked:
                _check_tokenised(path)
                checked.add(manifest)
            last = None if chunks is None else chunks[path]
        units.append(Unit(name, (path,), last=last))
    return units


def _together(units: Iterable[Unit]) -> Iterator[Unit]:
    """Units of a file each as ones that are worth a shard."""
    held, held_bytes = list[str](), 0
    for file in (unit.files[0] for unit in units):
        # One that cannot be opened is told when it is read.
        size = os.path.getsize(file) if os.path.exists(file) else 0
        if held and (len(held) == _UNIT_FILES or held_bytes + size > _UNIT_BYTES):
            yield Unit("txt", tuple(held))
            held, held_bytes = [], 0
        held.append(file)
        held_bytes += size
    yield Unit("txt", tuple(held))


def _check_tokenised(path: str) -> None:
    for member in islice(scan_tar(path), 1):
        found = or_reject(f"{path}, member {member.name}", _chunk_of, member, path)
        if isinstance(found, Reject):
            raise ValueError(
                f"{found}: no shard of token ids; pictures are prepared as captions, and archives "
                "of texts unpacked first"
            )


def _format(path: str) -> str:
    name = full_name(path)
    found = next((kind for kind, ends in TEXT_SUFFIXES.items() if name.endswith(ends)), None)
    if found is None:
        known = "; ".join(f"{kind} ({', '.join(ends)})" for kind, ends in TEXT_SUFFIXES.items())
        raise ValueError(
            f"{path} is of no known format of texts, by its name or how it begins; known are "
            f"{known}; name it so if it is one of these, or write its texts (those that token ids "
            "were made from) as lines of JSON"
        )
    return found


def _read_jsonl(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    path = unit.files[0]
    entries = entries_of(path, listed=holds_list(path))
    first = list(islice(entries, 2))
    if len(first) == 1:
        _refuse_columns(path, first[0][1], options.text_key)
    for where, data in chain(first, entries):
        yield or_reject(where, _text_in, where, data, options.text_key)


def _refuse_columns(path: str, data: bytes, key: str) -> None:
    """Raises ValueError for a file that is one object of columns, or of a list of records."""
    found = or_reject(path, json_object, data)
    texts = None if isinstance(found, Reject) else _inside(found, _parts(found, key))
    held = list(texts.values()) if isinstance(texts, dict) else texts
    if isinstance(held, list) and len(held) > 1 and all(isinstance(x, str) for x in held):
        raise ValueError(
            f"{path} is one object with {len(held):,} texts under {key!r}; write a record a line "
            '(pandas: to_json(orient="records", lines=True))'
        )


def _text_in(where: str, data: bytes, key: str) -> TextRecord:
    found = json_object(data)
    parts = _parts(found, key)
    text = _inside(found, parts)
    if isinstance(text, str):
        return _document(where, text)
    has = f"{key!r} is no text" if parts[0] in found else f"its keys are {list(found)}"
    lists = ((name, x) for name, x in found.items() if isinstance(x, list) and x)
    if held := [name for name, x in lists if isinstance(_inside(x[0], parts), str)]:
        has = f"it is a record of records: write the list under {held[0]!r} alone"
    raise RejectedError(NO_TEXT, has[:200])


def _parts(names: Container[str], key: str) -> list[str]:
    """The field that a key names, and the fields inside it (data.text) where none has its name."""
    return [key] if key in names else key.split(".")


def _inside(value: Any, parts: Sequence[str]) -> Any:
    """What stands under fields inside each other; None where one of them is not there."""
    for part in parts:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _read_table(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    path, schema = unit.files[0], columns_of(unit.files[0])
    column, *inner = _parts(schema.names, options.text_key)
    _check_column(path, schema, options.text_key)
    for number, (value,) in enumerate(table_rows(path, [column])):
        where = f"{path}, row {number}"
        yield or_reject(where, _from_column, where, value, inner)


def _check_column(path: str, schema: pyarrow.Schema, key: str) -> None:
    column, *inner = _parts(schema.names, key)
    fields = {name: schema.field(name) for name in schema.names}
    for part in (column, *inner):
        if part not in fields:
            raise ValueError(
                f"{path} has no column {key!r}; name that of the texts (--text-key), one of "
                f"{list(fields)}"
            )
        kind = fields[part].type
        nested = kind.fields if pyarrow.types.is_struct(kind) else []
        fields = {one.name: one for one in nested}
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in _TEXT_TYPES:
        raise ValueError(f"{path}: column {key!r} is {kind}, not text; name another column")


def _from_column(where: str, value: pyarrow.Scalar, inner: Sequence[str]) -> TextRecord:
    try:
        text = _inside(value.as_py(), inner)
        # Where the writer did not say that its bytes are text.
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise RejectedError(NOT_UTF8, str(error)) from None
    if text is None:
        raise RejectedError(NO_TEXT, "it is null")
    return _document(where, text)


def _read_txt(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    problems: list[str] = []
    for path in unit.files:
        try:
            yield from _documents_of(path)
        except RemoteError:
            raise
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join(problems))


def _documents_of(path: str) -> Iterator[Item]:
    size = size_of(path)
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, a document at most {MAX_DOCUMENT_BYTES:,}; {_LINES}"
        )
    data = read_head(path, MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{path} unpacks to more than {MAX_DOCUMENT_BYTES:,} bytes; {_LINES}")
    if is_wide(data):
        yield Reject(path, NOT_UTF8, "it is UTF-16 or UTF-32")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Reject(path, NOT_UTF8, str(error))
        return
    first, *others = _END.split(text.replace("\r\n", "\n"))
    if not others:
        yield or_reject(path, _document, path, first)
        return
    for number, part in enumerate([first, *others]):
        # Nothing stands behind the last one.
        if part := part.strip("\n"):
            where = f"{path}, document {number}"
            yield or_reject(where, _document, where, part)


def _document(where: str, text: str) -> TextRecord:
    if not text or text.isspace():
        raise RejectedError(EMPTY)
    if problem := unicode_problem(text):
        raise RejectedError(NOT_UNICODE, problem)
    return TextRecord(where, text)


# All values of a column of type null are absent.
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "null")
_READERS: dict[str, Callable[[Unit, ReadOptions], Iterator[Item]]] = {
    "jsonl": _read_jsonl,
    "parquet": _read_table,
    "arrow": _read_table,
    "txt": _read_txt,
    "tokens": lambda unit, _: read_tokens(unit),
}
