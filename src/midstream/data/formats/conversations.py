"""Conversations as people write them: which files and records hold them (see `turns.py`).

Entries of a list are numbered from 0, lines from 1 (see `docs/data.md`).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from midstream.data.formats.captions import load_shown, picture_roots
from midstream.data.formats.files import exists, find_files, full_name, is_folder, join
from midstream.data.formats.json_records import (
    NOT_UNICODE,
    entries_of,
    holds_list,
    json_object,
    unicode_problem,
)
from midstream.data.formats.records import (
    NUM_UNIT_RECORDS,
    ConversationRecord,
    Picture,
    ReadOptions,
    Unit,
)
from midstream.data.formats.said import PAIRS, ConversationError, pair_in
from midstream.data.formats.tables import TABLES, columns_of, refuse_splits, table_records
from midstream.data.formats.turns import KEYS, LISTS, RATINGS, conversation_of
from midstream.data.source_writer import Reject

LLAVA = "llava.json"
SUFFIXES = (".json", ".jsonl", *TABLES)
_ID_CHARACTERS = 80


def conversation_units(sources: Sequence[str]) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, in their order.

    A folder stands for the `llava.json` in it, or for all JSON files under it. Files are cut every
    20,000 records, for which they are read once. Raises FileNotFoundError for what is not there,
    and ValueError for a file that holds no list or lines of records or is cut short.
    """
    return [
        unit for source in sources for path in _files(source) for unit in _conversations_of(path)
    ]


def read_conversations(unit: Unit, options: ReadOptions) -> Iterator[ConversationRecord | Reject]:
    """The records of a unit in the order of its file: turns and the bytes of pictures, or why not.

    Pictures are looked for under `options.images`, else in the file's folder; a record that lacks
    one is a reject. Blank lines are no records. Raises ValueError that names the file if it is cut
    short or damaged.
    """
    path = unit.files[0]
    roots = picture_roots(path, options)
    if unit.format == "table":
        yield from _read_table(path, roots, options.rating)
        return
    for where, data in islice(_entries(path), unit.first, unit.last):
        found = json_object(data, where)
        if isinstance(found, dict):
            yield _conversation(found, where, roots, options.rating)
        else:
            yield found


def _files(source: str) -> list[str]:
    if is_folder(source) and exists(llava := join(source, LLAVA, source)):
        return [llava]
    files = find_files(source, SUFFIXES)
    refuse_splits(source, files)
    for path in files:
        if not full_name(path).endswith(SUFFIXES):
            raise ValueError(
                f"{path} is of no known format of conversations; known are .json (a list of "
                "records), .jsonl (a record a line), also compressed, and tables "
                f"({', '.join(TABLES)})"
            )
    return files


def _read_table(
    path: str, roots: Sequence[str], rating: int | None
) -> Iterator[ConversationRecord | Reject]:
    wanted = KEYS + (() if rating is None else RATINGS)
    for where, row in table_records(path, wanted):
        yield row if isinstance(row, Reject) else _conversation(row, where, roots, rating)


def _conversations_of(path: str) -> list[Unit]:
    if full_name(path).endswith(TABLES):
        if not _holds_talk(names := columns_of(path).names):
            pairs = ", ".join(" and ".join(pair) for pair in PAIRS)
            raise ValueError(
                f"{path} has the columns {names}; a conversation needs one of {', '.join(LISTS)}, "
                f"or a pair of {pairs}"
            )
        return [Unit("table", (path,))]
    num_records = sum(1 for _ in _entries(path))
    starts = range(0, max(1, num_records), NUM_UNIT_RECORDS)
    name = "json" if _is_list(path) else "jsonl"
    # The last one reads to the file's end.
    ends = [*starts[1:], None]
    return [Unit(name, (path,), first, last) for first, last in zip(starts, ends, strict=True)]


def _is_list(path: str) -> bool:
    if holds_list(path):
        return True
    if not full_name(path).endswith(".json"):
        return False
    # Lines under another name are lines; what else is no list is refused as one.
    _, data = next(entries_of(path, listed=False), ("", b""))
    first = json_object(data, path)
    return isinstance(first, Reject) or not _holds_talk(first)


def _holds_talk(names: Iterable[str]) -> bool:
    return bool({*LISTS} & {*names}) or pair_in(dict.fromkeys(names)) is not None


def _entries(path: str) -> Iterator[tuple[str, bytes]]:
    return entries_of(path, listed=_is_list(path))


def _conversation(
    record: dict[str, Any], where: str, roots: Sequence[str], rating: int | None
) -> ConversationRecord | Reject:
    if isinstance(record.get("id"), str | int):
        where = f"{where} ({str(record['id'])[:_ID_CHARACTERS]!r})"
    try:
        talk = conversation_of(record, where, rating)
    except ConversationError as error:
        return Reject(where, error.reason, error.detail)
    for number, turn in enumerate(talk.turns):
        if problem := unicode_problem("\n".join(turn[:3])):
            return Reject(where, NOT_UNICODE, f"in question or reply {number}: {problem}")
    pictures: list[Picture] = []
    for shown in talk.pictures:
        picture = load_shown(shown, roots, where)
        if isinstance(picture, Reject):
            return picture
        pictures.append(picture)
    return ConversationRecord(where, talk.turns, tuple(pictures), talk.left_out)
