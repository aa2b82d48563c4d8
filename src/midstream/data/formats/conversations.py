"""Conversations as people write them: which files and records hold them (see `turns.py`).

Entries of a list are numbered from 0, lines from 1 (see `docs/data.md`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

from midstream.data.formats.captions import picture_roots
from midstream.data.formats.document_parts import Pictures, Shown
from midstream.data.formats.files import exists, find_files, full_name, is_folder, is_url, join
from midstream.data.formats.json_records import (
    NOT_UNICODE,
    entries_of,
    holds_list,
    json_object,
    unicode_problem,
)
from midstream.data.formats.picture_urls import PicturesByUrl, index_urls
from midstream.data.formats.records import (
    NUM_UNIT_RECORDS,
    ConversationRecord,
    Picture,
    ReadOptions,
    Unit,
)
from midstream.data.formats.said import (
    PAIRS,
    PICTURE_KEYS,
    ConversationError,
    is_absent,
    pair_in,
)
from midstream.data.formats.tables import TABLES, columns_of, refuse_splits, table_records
from midstream.data.formats.turns import (
    KEYS,
    LISTS,
    RATINGS,
    conversation_of,
    unread_picture,
)
from midstream.data.source_writer import Reject

LLAVA = "llava.json"
SUFFIXES = (".json", ".jsonl", *TABLES)
# What is read of a folder, in words.
NAMES = (*(f"*{end}" for end in SUFFIXES), f"or {LLAVA} alone where the folder has it")
_ID_CHARACTERS = 80
# Rows of a table that are looked at for pictures in other columns.
_NUM_LOOKED_AT = 32
_PLAIN = ReadOptions()
_URL = re.compile(rb'"https?:\\?/')


def conversation_units(sources: Sequence[str], options: ReadOptions = _PLAIN) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, in their order.

    A folder stands for the `llava.json` in it, or for all JSON files under it. Files are cut every
    20,000 records, for which they are read once. Where records show addresses, those of what
    img2dataset left under `options.images` are indexed (see `index_urls`). Raises FileNotFoundError
    for what is not there, and ValueError for a file that holds no list or lines of records or is
    cut short.
    """
    images = options.images
    asks = images is not None
    parts = [_conversations_of(path, asks=asks) for source in sources for path in _files(source)]
    if images is not None and any(have_urls for _, have_urls in parts):
        index_urls(images)
    return [unit for units, _ in parts for unit in units]


def read_conversations(unit: Unit, options: ReadOptions) -> Iterator[ConversationRecord | Reject]:
    """The records of a unit in the order of its file: turns and the bytes of pictures, or why not.

    Pictures are looked for under `options.images`, else in the file's folder, and addresses in what
    img2dataset left there; a record that lacks one is a reject. Blank lines are no records. Raises
    ValueError that names the file if it is cut short or damaged.
    """
    path = unit.files[0]
    with closing(PicturesByUrl(options.images)) as by_url:
        pictures = Pictures(picture_roots(path, options), by_url)
        if unit.format == "table":
            yield from _read_table(path, pictures, options.rating)
            return
        for where, data in islice(_entries(path), unit.first, unit.last):
            found = json_object(data, where)
            if isinstance(found, dict):
                yield _conversation(found, where, pictures, options.rating)
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
    path: str, pictures: Pictures, rating: int | None
) -> Iterator[ConversationRecord | Reject]:
    wanted = KEYS + (() if rating is None else RATINGS)
    for where, row in table_records(path, wanted):
        yield row if isinstance(row, Reject) else _conversation(row, where, pictures, rating)


def _conversations_of(path: str, *, asks: bool) -> tuple[list[Unit], bool]:
    """The units of a file and, if one `asks`, whether its records (of a table the first) show
    addresses."""
    if full_name(path).endswith(TABLES):
        if not _holds_talk(names := columns_of(path).names):
            pairs = ", ".join(" and ".join(pair) for pair in PAIRS)
            raise ValueError(
                f"{path} has the columns {names}; a conversation needs one of {', '.join(LISTS)}, "
                f"or a pair of {pairs}"
            )
        _refuse_unread_pictures(path, names)
        first = islice(table_records(path, KEYS), int(asks))
        return [Unit("table", (path,))], any(_has_address(*row) for row in first)
    num_records, have_urls = 0, False
    for where, data in _entries(path):
        num_records += 1
        if asks and not have_urls and _URL.search(data) is not None:
            have_urls = _has_address(where, json_object(data, where))
    starts = range(0, max(1, num_records), NUM_UNIT_RECORDS)
    name = "json" if _is_list(path) else "jsonl"
    # The last one reads to the file's end.
    ends = [*starts[1:], None]
    units = [Unit(name, (path,), first, last) for first, last in zip(starts, ends, strict=True)]
    return units, have_urls


def _refuse_unread_pictures(path: str, names: Sequence[str]) -> None:
    """Raises ValueError for a table with a column of pictures that is not read, and no picture in
    one that is."""
    others = [name for name in names if name not in KEYS and names.count(name) == 1]
    read = [name for name in names if name in PICTURE_KEYS and names.count(name) == 1]
    for _, row in islice(table_records(path, [*others, *read]), _NUM_LOOKED_AT) if others else ():
        if isinstance(row, Reject) or not all(is_absent(row[name]) for name in read):
            continue
        if column := unread_picture(row):
            raise ValueError(
                f"{path} has a column {column!r} of pictures, which is not read, and its "
                "conversations would be text alone; call it image, or images for lists"
            )


def _has_address(where: str, record: dict[str, Any] | Reject) -> bool:
    try:
        shown = () if isinstance(record, Reject) else conversation_of(record, where).pictures
    except ConversationError:
        return False
    return any(isinstance(x, str) and is_url(x) and not x.startswith("file:") for x in shown)


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
    record: dict[str, Any], where: str, pictures: Pictures, rating: int | None
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
    loaded: list[Picture] = []
    for shown in talk.pictures:
        picture = pictures.load(Shown((shown,)), where)
        if isinstance(picture, Reject):
            return picture
        loaded.append(picture)
    return ConversationRecord(where, talk.turns, tuple(loaded), talk.left_out)
