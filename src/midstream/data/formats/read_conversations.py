"""The public formats of conversations, record by record (see `docs/data.md`).

A file is a JSON list of records, numbered from 0, or JSON lines, numbered from 1. A record that
cannot be used is a `Reject` with a short reason; a file that cannot be read is a ValueError.
"""

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from midstream.data.examples import ConversationError, conversation_of, picture_names
from midstream.data.formats.files import (
    base_name,
    exists,
    find_files,
    folder_of,
    inside,
    is_folder,
    join,
    read_lines,
    read_range,
)
from midstream.data.formats.json_records import (
    NOT_UNICODE,
    json_object,
    list_entries,
    unicode_problem,
)
from midstream.data.formats.records import ConversationRecord, Picture, ReadOptions, Unit
from midstream.data.source_writer import Reject
from midstream.source_files import JSON_LINES

UNIT_RECORDS = 20_000
MAX_PICTURE_BYTES = 256 * 2**20
LLAVA = "llava.json"
SUFFIXES = (".json", *JSON_LINES)
_ID_CHARACTERS = 80


def conversation_units(sources: Sequence[str], options: ReadOptions) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, in their order.

    A folder stands for the `llava.json` in it, or for all JSON files under it. Files are cut every
    20,000 records, for which they are read once. Raises FileNotFoundError for what is not there,
    and ValueError for a file that holds no list or lines of records, is cut short or given twice.
    """
    if options.images is not None and not is_folder(options.images):
        raise FileNotFoundError(f"{options.images} is no folder of pictures; correct its name")
    files = [file for source in sources for file in _files(source)]
    for path, times in Counter(files).items():
        if times > 1:
            raise ValueError(f"{path} is given {times} times; give each file once")
    return [unit for path in files for unit in _cut(path)]


def read_conversations(unit: Unit, options: ReadOptions) -> Iterator[ConversationRecord | Reject]:
    """The records of a unit in the order of its file: turns and a picture's bytes, or why not.

    Pictures are looked for under `options.images`, else in the file's folder. Blank lines are no
    records. Raises ValueError that names the file if it is cut short or damaged.
    """
    path = unit.files[0]
    root = folder_of(path) if options.images is None else options.images
    for where, data in islice(_entries(path), unit.first, unit.last):
        record = json_object(data, where)
        yield record if isinstance(record, Reject) else _conversation(record, where, root)


def _files(source: str) -> list[str]:
    if is_folder(source) and exists(llava := join(source, LLAVA, source)):
        return [llava]
    files = find_files(source, SUFFIXES)
    for path in files:
        if not base_name(path).endswith(SUFFIXES):
            raise ValueError(
                f"{path} is of no known format of conversations; known are .json (a list of "
                f"records) and lines of records ({', '.join(JSON_LINES)})"
            )
    return files


def _cut(path: str) -> list[Unit]:
    num_records = sum(1 for _ in _entries(path))
    starts = range(0, max(1, num_records), UNIT_RECORDS)
    name = "json" if _is_list(path) else "jsonl"
    # The last one reads to the file's end.
    ends = [*starts[1:], None]
    return [Unit(name, (path,), first, last) for first, last in zip(starts, ends, strict=True)]


def _is_list(path: str) -> bool:
    return base_name(path).endswith(".json")


def _entries(path: str) -> Iterator[tuple[str, bytes]]:
    if _is_list(path):
        for number, data in enumerate(list_entries(path)):
            yield f"{path}, record {number}", data
        return
    for number, line in enumerate(read_lines(path), start=1):
        if not line.isspace():
            yield f"{path}, line {number}", line


def _conversation(record: dict[str, Any], where: str, root: str) -> ConversationRecord | Reject:
    if isinstance(record.get("id"), str | int):
        where = f"{where} ({str(record['id'])[:_ID_CHARACTERS]!r})"
    try:
        talk = conversation_of(record, where)
        names = picture_names(record, where)
    except ConversationError as error:
        return Reject(where, error.reason, error.detail)
    for number, turn in enumerate(talk.turns):
        if problem := unicode_problem("\n".join(turn)):
            return Reject(where, NOT_UNICODE, f"in question or reply {number}: {problem}")
    picture = _picture(names[0], where, root) if names else None
    if isinstance(picture, Reject):
        return picture
    return ConversationRecord(where, talk.turns, picture, talk.left_out)


def _picture(name: str, where: str, root: str) -> Picture | Reject:
    try:
        path = inside(root, name, where)
    except ValueError as error:
        return Reject(where, "picture outside the folder", str(error).removeprefix(f"{where}: "))
    try:
        data = read_range(path, 0, MAX_PICTURE_BYTES + 1)
    except OSError as error:
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        # A failing disk or connection is no missing picture.
        if not isinstance(error, absent) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        return Reject(where, "missing picture", path)
    if len(data) > MAX_PICTURE_BYTES:
        return Reject(where, "picture too large", f"{path} has over {MAX_PICTURE_BYTES:,} bytes")
    return Picture(path, 0, data) if data else Reject(where, "zero-byte picture", path)
