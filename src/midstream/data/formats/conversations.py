"""Conversations as people write them: which files and records hold them, and their turns.

Entries of a list are numbered from 0, lines from 1 (see `docs/data.md`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from midstream.data.examples import IMAGE_MARK, Turn
from midstream.data.formats.document_parts import Pictures
from midstream.data.formats.files import exists, find_files, full_name, is_folder, is_url, join
from midstream.data.formats.picture_files import PicturesByUrl, index_urls, picture_roots
from midstream.data.formats.record_files import (
    NOT_UNICODE,
    TABLES,
    columns_of,
    entries_of,
    holds_list,
    json_object,
    refuse_splits,
    table_records,
    unicode_problem,
    unquoted,
)
from midstream.data.formats.records import (
    NUM_UNIT_RECORDS,
    ConversationRecord,
    ReadOptions,
    Unit,
    is_picture,
)
from midstream.data.formats.said import (
    ASIDE,
    BEHIND,
    MISSING,
    NO_TALK,
    OUTSIDE,
    PAIRS,
    PICTURE_KEYS,
    SEVERAL,
    VIDEO_KEYS,
    Said,
    in_places,
    is_absent,
    marked,
    pair_in,
    pictures_under,
    said_of,
    text_of,
)
from midstream.data.source_writer import Reject, RejectedError, or_reject

# Where records keep their turns.
LISTS = ("conversations", "messages", "conversation", "texts")
# The key of a record that is a list of turns and nothing else.
_LIST_ALONE = "messages"
# FineVision's ratings of each pair of a question and a reply.
RATINGS = tuple(
    f"{name}_ratings"
    for name in ("relevance", "image_correspondence", "visual_dependency", "formatting")
)
_HISTORY, _SYSTEM = "history", ("system", "system_prompt")
# Records of two replies of which one is the better, or of one that is not to be learnt.
_BETTER = ("chosen", "rejected", "rejected_response", "rejected_messages")
_JUDGED = ("kto_tag", "label")
# Placeholders that another key of the record fills.
_BOXES, _PLACEHOLDERS = "objects", ("<bbox>", "<ref-object>")
# All keys of records that are read.
KEYS = (
    *(*LISTS, "id", *_SYSTEM, _HISTORY, _BOXES, *BEHIND, *ASIDE, *_BETTER, *_JUDGED),
    *(*PICTURE_KEYS, *VIDEO_KEYS, *dict.fromkeys(key for pair in PAIRS for key in pair)),
)
# Further keys that speak of a picture, and how files of pictures begin.
_ABOUT_ONE = re.compile(r"(?i)(?:image|img|photo|picture|screenshot)s?(?:[ _-]?(?:ids?|\d+))?")
_BEGINS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")
_KNOWN = frozenset(KEYS)
# Why a question, or a system text, is left out; why a conversation is.
NO_REPLY, EMPTY_REPLY, NO_ASKED = (
    "question without a reply",
    "empty reply",
    "reply without a question",
)
NO_QUESTION_LEFT = "picture without a question left"
NO_QUESTION, NO_REPLIES = "system turn without a question", "no reply left"
OTHER_KEY = "picture under another key"
_DETAIL_CHARACTERS = 200
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
            wanted = KEYS + (() if options.rating is None else RATINGS)
            for where, row in table_records(path, wanted):
                yield _conversation(row, where, pictures, options.rating)
            return
        for where, data in islice(_entries(path), unit.first, unit.last):
            found = or_reject(where, json_object, data, _LIST_ALONE)
            yield _conversation(found, where, pictures, options.rating)


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
        return [Unit("table", (path,))], any(_has_address(row) for _, row in first)
    num_records, have_urls = 0, False
    for where, data in _entries(path):
        num_records += 1
        if asks and not have_urls and _URL.search(data) is not None:
            have_urls = _has_address(or_reject(where, json_object, data, _LIST_ALONE))
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


def _has_address(record: dict[str, Any] | Reject) -> bool:
    try:
        shown = () if isinstance(record, Reject) else conversation_of(record).pictures
    except RejectedError:
        return False
    return any(isinstance(x, str) and is_url(x) and not x.startswith("file:") for x in shown)


def _is_list(path: str) -> bool:
    if holds_list(path):
        return True
    if not full_name(path).endswith(".json"):
        return False
    # Lines under another name are lines; what else is no list is refused as one.
    _, data = next(entries_of(path, listed=False), ("", b""))
    first = or_reject(path, json_object, data)
    return isinstance(first, Reject) or not _holds_talk(first)


def _holds_talk(names: Iterable[str]) -> bool:
    return bool({*LISTS} & {*names}) or pair_in(dict.fromkeys(names)) is not None


def _entries(path: str) -> Iterator[tuple[str, bytes]]:
    return entries_of(path, listed=_is_list(path))


def _conversation(
    record: dict[str, Any] | Reject, where: str, pictures: Pictures, rating: int | None
) -> ConversationRecord | Reject:
    if isinstance(record, Reject):
        return record
    if isinstance(record.get("id"), str | int):
        where = f"{where} ({str(record['id'])[:_ID_CHARACTERS]!r})"
    try:
        talk = conversation_of(record, rating)
        for number, turn in enumerate(talk.turns):
            if problem := unicode_problem("\n".join(turn[:3])):
                raise RejectedError(NOT_UNICODE, f"in question or reply {number}: {problem}")
        loaded = tuple(pictures.load(where, shown) for shown in talk.pictures)
    except RejectedError as error:
        return error.at(where)
    return ConversationRecord(where, talk.turns, loaded, talk.left_out)


@dataclass(frozen=True)
class Conversation:
    """What a record says: its turns, its pictures, and why questions are left out.

    `pictures` are names or bytes, in the order of the places that the turns give them.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[str | bytes, ...] = ()
    left_out: tuple[str, ...] = ()


def conversation_of(record: dict[str, Any], rating: int | None = None) -> Conversation:
    """The questions and replies of a record, and the pictures that it shows.

    A list of turns under one of `LISTS`, each with its role under `from` or `role` and its text
    under `value` or `content`: a text, or a list of parts (`text`, `image`, `image_url`), whose
    places are the pictures' places; or pairs of a question and a reply under one of the names of
    `PAIRS`, of which the record itself may be one. Marks stand for the record's pictures in order
    and are taken out; where nothing marks any, all stand before the first question. A lone picture
    in the first question stands before it. What a system turn or the record's `system` says goes
    to the next question that stays. A question whose reply is missing, empty, behind a tool's turn
    or rated below `rating` is left out with what follows on it, as are replies before the first
    question; its pictures go to the next question that stays. Replies of weight 0 stay, unlearnt.

    Raises RejectedError if two replies are to one question, a role is
    unknown, a question is empty (but for pictures), no reply to learn is left, a picture stands
    elsewhere than in a question or under a key that is not read, marks and pictures disagree, a
    pair has one of `ASIDE`, or the record compares replies.
    """
    said = _said_in(record, rating)
    pictures = pictures_under(record)
    named = any(isinstance(mark, str | bytes) for one in said for mark in one.shown)
    if not pictures and not named and (key := unread_picture(record)):
        detail = f"{key!r} is no key that is read; it would be text alone"
        raise RejectedError(OTHER_KEY, detail)
    said = marked(said, len(pictures))
    first = next((n for n, one in enumerate(said) if one.role == "human"), 0)
    shown = in_places([mark for one in said for mark in one.shown], pictures)
    if outside := [one.role for one in said if one.shown and one.role != "human"]:
        raise RejectedError(OUTSIDE, f"in a turn of {outside[0]!r}")
    if len(shown) == 1 and said[first].shown:
        question = said[first].text.replace(IMAGE_MARK, "")
        said[first] = replace(said[first], text=IMAGE_MARK + question)
    turns, kept, left_out = _turns(said)
    if not any(turn.learnt for turn in turns):
        detail = ", ".join(left_out) or ("all are of weight 0" if turns else "it has no question")
        raise RejectedError(NO_REPLIES, detail[:_DETAIL_CHARACTERS])
    return Conversation(tuple(turns), tuple(shown[n] for n in kept), tuple(left_out))


def unread_picture(record: Mapping[str, Any]) -> str:
    """The first key of a record, none of `KEYS`, that shows a picture or speaks of one; "" for
    none."""
    others = [(key, x) for key, x in record.items() if key not in _KNOWN and not is_absent(x)]
    others = [(key, x) for key, x in others if x is not False]
    return next((k for k, x in others if _ABOUT_ONE.fullmatch(k) or _is_picture(x)), "")


def _is_picture(value: object) -> bool:
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value.startswith(_BEGINS) or (value[:4], value[8:12]) == (b"RIFF", b"WEBP")
    # Titles speak of files, and addresses lead to what goes with a text, such as an avatar.
    is_name = isinstance(value, str) and not re.search(r"\s|://", value)
    return is_name and is_picture(str(value))


def _listed(record: dict[str, Any]) -> object:
    """The turns of a record: a list, or what stands in its place; None for none."""
    found = unquoted(next((record[key] for key in LISTS if not is_absent(record.get(key))), None))
    if isinstance(found, dict) and found and all(isinstance(x, list) for x in found.values()):
        # A list of structs as some tables keep it: a list of each field.
        return [
            dict(zip(found, values, strict=False)) for values in zip(*found.values(), strict=False)
        ]
    if isinstance(found, list):
        # VisionArena has a list for each turn; two lists of several are two conversations, and so
        # are the columns of a file of many records.
        inner = [x if isinstance(x, list) else [x] for x in found]
        if len(inner) > 1 and any(len(x) > 1 for x in inner):
            detail = f"{len(inner)} lists of turns in one record; write a record for each"
            raise RejectedError(SEVERAL, detail)
        return [one for x in inner for one in x]
    return found or _alone(record)


def _alone(record: dict[str, Any]) -> list[Any] | None:
    """The turns of a record that is a pair of a question and a reply, behind its `history`."""
    if (pair := pair_in(record)) is None:
        return None
    asked, reply = (record[key] for key in pair)
    if any(_are_messages(value) for value in (asked, reply)):
        # TRL's: messages on one side or both, of which those of the reply are learnt.
        before, behind = _messages("user", asked), _messages("assistant", reply)
        return [x | {"weight": 0} if isinstance(x, dict) else x for x in before] + behind
    history = unquoted(record.get(_HISTORY))
    history = [] if is_absent(history) else history if isinstance(history, list) else [history]
    said = [
        dict(zip(PAIRS[0], x, strict=True)) if isinstance(x, list) and len(x) == len(pair) else x
        for x in history
    ]
    return [*said, {key: record[key] for key in (*pair, *BEHIND, *ASIDE) if key in record}]


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(x, dict) and "role" in x for x in value)


def _messages(role: str, value: Any) -> list[Any]:
    return value if _are_messages(value) else [{"role": role, "content": value}]


def _said_in(record: dict[str, Any], rating: int | None) -> list[Said]:
    if better := [key for key in _BETTER if not is_absent(record.get(key))]:
        detail = f"it has {better[0]!r} beside what is said"
        raise RejectedError("preference pair", detail)
    judged = [key for key in _JUDGED if record.get(key) is False]
    # Beside a question and its answer a label is something else.
    if judged and (judged != ["label"] or pair_in(record) is None):
        raise RejectedError("reply judged bad", f"{judged[0]!r} is false")
    turns = _listed(record)
    if not isinstance(turns, list) or not turns:
        keys = ", ".join(repr(key) for key in LISTS)
        what = "; what is there is text but no JSON" if isinstance(turns, str) else ""
        pairs = "a pair such as question and answer"
        detail = f"it needs a list of turns under one of {keys}, or {pairs}{what}"
        raise RejectedError(NO_TALK, detail)
    told = next((record[key] for key in _SYSTEM if not is_absent(record.get(key))), None)
    system = text_of("system", told, "'system'")
    said = [system] if system.text else []
    for number, turn in enumerate(turns):
        low = rating is not None and _lowest(record, number, rating) < rating
        said += said_of(turn, number, is_rated_low=low)
    if not is_absent(record.get(_BOXES)):
        for name in _PLACEHOLDERS:
            if any(name in one.text for one in said):
                detail = f"{name} stands for one of {_BOXES!r}; write its words and numbers"
                raise RejectedError("placeholder not filled in", detail)
    return said


def _lowest(record: dict[str, Any], number: int, otherwise: int) -> float:
    """The lowest rating of a pair; `otherwise` where it has none."""
    lists = [unquoted(record.get(key)) for key in RATINGS]
    given = [x[number] for x in lists if isinstance(x, list) and number < len(x)]
    return min((x for x in given if isinstance(x, int | float)), default=otherwise)


def _turns(said: Sequence[Said]) -> tuple[list[Turn], list[int], list[str]]:
    """The turns with a reply to learn, the numbers of their pictures, and why other questions are
    left out."""
    turns: list[Turn] = []
    kept: list[int] = []
    left_out: list[str] = []
    system: list[str] = []
    # `missing` says what the last question lacks so far; "" where it is answered.
    question = missing = ""
    # Pictures of the last question, and of those before it that are left out.
    places: tuple[int, ...] = ()
    waiting: list[int] = []
    num_shown = 0
    for one in said:
        role, (text, places_in) = one.role, one.placed
        if role == "system":
            system.append(text)
        elif role == "human":
            left_out += [missing] if missing else []
            question, missing, places = text, NO_REPLY, places_in
            waiting += range(num_shown, num_shown + len(places_in))
            num_shown += len(places_in)
        elif role in MISSING and (turns or left_out or missing):
            missing = MISSING[role]
        elif role == "gpt" and missing == NO_REPLY and not text:
            left_out.append(EMPTY_REPLY)
            missing = ""
        elif role == "gpt" and missing == NO_REPLY:
            if not question and not places:
                raise RejectedError("empty turn", f"to which the reply is {text[:80]!r}")
            # Some files give it twice: in the record and as its first turn.
            told = "\n".join(dict.fromkeys(filter(None, system)))
            before = (0,) * (len(waiting) - len(places))
            turns.append(Turn(question, text, told, before + places, one.learnt))
            kept += waiting
            system, missing, waiting = [], "", []
        elif role == "gpt" and not (turns or missing) and {*left_out} <= {NO_ASKED}:
            left_out.append(NO_ASKED)
        elif role != "gpt" or not missing:
            reason = "roles do not alternate"
            listed = f"found {[one.role for one in said]}"[:_DETAIL_CHARACTERS]
            raise RejectedError(reason, listed)
    left_out += [missing] if missing else []
    left_out += [NO_QUESTION] if turns and any(system) else []
    return turns, kept, left_out + [NO_QUESTION_LEFT] * len(waiting)
