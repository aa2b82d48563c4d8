"""Conversations as people write them: which files and records hold them, what a record says.

Entries of a list are numbered from 0, lines from 1 (see `docs/data.md`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from midstream.data.examples import IMAGE_MARK, Turn
from midstream.data.formats.captions import load_shown, picture_in, picture_roots
from midstream.data.formats.files import exists, find_files, full_name, is_folder, join
from midstream.data.formats.json_records import (
    NOT_UNICODE,
    NOT_UTF8,
    entries_of,
    holds_list,
    json_object,
    unicode_problem,
    unquoted,
)
from midstream.data.formats.records import NUM_UNIT_RECORDS, ConversationRecord, ReadOptions, Unit
from midstream.data.formats.tables import TABLES, columns_of, refuse_splits, table_rows
from midstream.data.source_writer import Reject

LLAVA = "llava.json"
SUFFIXES = (".json", ".jsonl", *TABLES)
_OTHERS = ("id", "system", "image", "images", "video", "videos", "audio", "audios")
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
    """The records of a unit in the order of its file: turns and a picture's bytes, or why not.

    Pictures are looked for under `options.images`, else in the file's folder. Blank lines are no
    records. Raises ValueError that names the file if it is cut short or damaged.
    """
    path = unit.files[0]
    roots = picture_roots(path, options)
    if unit.format == "table":
        yield from _read_table(path, roots)
        return
    for where, data in islice(_entries(path), unit.first, unit.last):
        record = json_object(data, where)
        yield record if isinstance(record, Reject) else _conversation(record, where, roots)


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


def _read_table(path: str, roots: Sequence[str]) -> Iterator[ConversationRecord | Reject]:
    columns = [name for name in columns_of(path).names if name in _LISTS + _OTHERS]
    for number, values in enumerate(table_rows(path, columns)):
        where = f"{path}, row {number}"
        try:
            row = {name: value.as_py() for name, value in zip(columns, values, strict=True)}
        except UnicodeDecodeError as error:
            yield Reject(where, NOT_UTF8, str(error))
            continue
        yield _conversation(row, where, roots)


def _conversations_of(path: str) -> list[Unit]:
    if full_name(path).endswith(TABLES):
        if not set(_LISTS) & set(names := columns_of(path).names):
            raise ValueError(
                f"{path} has the columns {names}; a conversation needs one of {', '.join(_LISTS)}"
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
    return isinstance(first, Reject) or not set(_LISTS) & first.keys()


def _entries(path: str) -> Iterator[tuple[str, bytes]]:
    return entries_of(path, listed=_is_list(path))


def _conversation(
    record: dict[str, Any], where: str, roots: Sequence[str]
) -> ConversationRecord | Reject:
    if isinstance(record.get("id"), str | int):
        where = f"{where} ({str(record['id'])[:_ID_CHARACTERS]!r})"
    try:
        talk = conversation_of(record, where)
    except ConversationError as error:
        return Reject(where, error.reason, error.detail)
    for number, turn in enumerate(talk.turns):
        if problem := unicode_problem("\n".join(turn[:3])):
            return Reject(where, NOT_UNICODE, f"in question or reply {number}: {problem}")
    picture = None if talk.picture is None else load_shown(talk.picture, roots, where)
    if isinstance(picture, Reject):
        return picture
    if picture is None:
        return ConversationRecord(where, talk.turns, (), talk.left_out)
    turns = (talk.turns[0]._replace(pictures=(0,)), *talk.turns[1:])
    return ConversationRecord(where, turns, (picture,), talk.left_out)


# Where records keep their turns, and turns their roles and texts.
_LISTS = ("conversations", "messages", "conversation", "texts")
_KEYS = (("from", "value"), ("role", "content"))
_PAIR = ("user", "assistant")
_TOOL = "tool"
_TOOLS = (
    *("tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_result", "function"),
    *("function_call", "function_response", "function_result", "observation", "ipython"),
)
_ROLES = {"user": "human", "assistant": "gpt", "developer": "system"}
_ROLES |= dict.fromkeys(("chatgpt", "model", "bot", "ai"), "gpt") | dict.fromkeys(_TOOLS, _TOOL)
# Why a question, or a system text, is left out; why a conversation is.
NO_REPLY, EMPTY_REPLY, TOOL_TURN = "question without a reply", "empty reply", "tool turn"
NO_QUESTION, NO_REPLIES = "system turn without a question", "no reply left"
NO_TALK, NO_NAME = "no conversation", "not a picture name"
_DETAIL_CHARACTERS = 200
# Qwen-VL's marks hold the name of their picture.
_NAMED = re.compile(
    r"(?i)(?:Picture \d+: *)?<img>([^<>\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?))</img>"
)
# Where a part has its picture.
_SHOWN = ("image", "image_url", "url", "path", "source", "bytes", "base64", "data", "content")


@dataclass(frozen=True)
class Conversation:
    """What a record says: its turns, whether it shows a picture, and why questions are left out.

    `picture` is the name of the picture, or its bytes.
    """

    turns: tuple[Turn, ...]
    has_image: bool
    left_out: tuple[str, ...] = ()
    picture: str | bytes | None = field(default=None, compare=False)


class ConversationError(ValueError):
    """A record that is no conversation that can be learnt from.

    `reason` is one of a few, to count it under; `detail` is about this record.
    """

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {reason} ({detail})")
        self.reason, self.detail = reason, detail


def conversation_of(record: dict[str, Any], where: str) -> Conversation:
    """The questions and replies of a record, and the picture that it shows.

    A list of turns under `conversations`, `messages` or `conversation`, each with its role under
    `from` or `role` and its text under `value` or `content`: a text, or a list of parts (`text`,
    `image`, `image_url`), whose places are the pictures' places. `texts` of {user, assistant} have
    their picture before the first question. The image mark is taken out of the first question. What
    a system turn or the record's `system` says goes to the next question that stays. A question
    whose reply is missing, empty or behind a tool's turn is left out with what follows on it.

    Raises ConversationError that names `where` if a reply is not to a question, a role is unknown,
    a question is empty (but for its picture), no reply is left, or marks and pictures disagree.
    """
    roles, texts, shown = _roles_and_texts(record, where)
    pictures = _pictures(record, where)
    pictures += [picture for picture in shown if picture not in pictures]
    first = roles.index("human") if "human" in roles else 0
    if pictures and not any(IMAGE_MARK in text for text in texts) and _in_pairs(record):
        texts[first] = IMAGE_MARK + texts[first]
    marks = [text.count(IMAGE_MARK) for text in texts]
    _check_marks(where, [marks.pop(first), *marks], len(pictures))
    if pictures:
        texts[first] = texts[first].replace(IMAGE_MARK, "", 1)
    stripped = [text.strip() for text in texts]
    turns, left_out = _turns(roles, stripped, where, first if pictures else None)
    if not turns:
        detail = ", ".join(left_out) or "it has no question"
        raise ConversationError(where, NO_REPLIES, detail[:_DETAIL_CHARACTERS])
    picture = pictures[0] if pictures else None
    return Conversation(tuple(turns), bool(pictures), tuple(left_out), picture)


def _pictures(record: dict[str, Any], where: str) -> list[str | bytes]:
    """What stands under `image` and `images` (one or a list); "" and null are none."""
    for other in ("video", "videos", "audio", "audios"):
        if record.get(other):
            raise ConversationError(where, "video or sound", f"under {other!r}")
    found: list[str | bytes] = []
    for key in ("image", "images"):
        value = unquoted(record.get(key))
        # NaN is how pandas says that there is none.
        absent = value is None or value == "" or value != value
        values = [] if absent else value if isinstance(value, list) else [value]
        found += [_picture(one, where, f"under {key!r}") for one in values if not _is_none(one)]
    return found


def _is_none(value: object) -> bool:
    # Columns of structs say {bytes: null, path: null}.
    return value is None or (isinstance(value, dict) and all(x is None for x in value.values()))


def _picture(value: object, where: str, place: str) -> str | bytes:
    try:
        found = picture_in(value)
    except ValueError as error:
        raise ConversationError(where, NO_NAME, f"{place}: {error}") from None
    if found is None or found == "":
        raise ConversationError(where, NO_NAME, place)
    return found


def _listed(record: dict[str, Any]) -> object:
    found = unquoted(next((record[key] for key in _LISTS if record.get(key) is not None), None))
    if isinstance(found, dict) and found and all(isinstance(x, list) for x in found.values()):
        # A list of structs as some tables keep it: a list of each field.
        return [
            dict(zip(found, values, strict=False)) for values in zip(*found.values(), strict=False)
        ]
    return found


def _in_pairs(record: dict[str, Any]) -> bool:
    turns = _listed(record)
    return isinstance(turns, list) and any(_is_pair(turn) for turn in turns)


def _is_pair(turn: object) -> bool:
    keys = [key for keys in _KEYS for key in keys]
    return (
        isinstance(turn, dict)
        and all(x in turn for x in _PAIR)
        and not any(x in turn for x in keys)
    )


def _roles_and_texts(
    record: dict[str, Any], where: str
) -> tuple[list[str], list[str], list[str | bytes]]:
    turns = _listed(record)
    if not isinstance(turns, list) or not turns:
        keys = ", ".join(repr(key) for key in _LISTS)
        what = "; what is there is text but no JSON" if isinstance(turns, str) else ""
        detail = f"it needs a list of turns under one of {keys}{what}"
        raise ConversationError(where, NO_TALK, detail)
    system, shown = _text_of(record.get("system"), where, "'system'")
    roles: list[str] = ["system"] if system else []
    texts: list[str] = [system] if system else []
    for number, turn in enumerate(turns):
        if _is_pair(turn):
            said = [(name, turn[name]) for name in _PAIR]
        else:
            said = [_said(turn, where, number)]
        for who, content in said:
            roles.append(_ROLES.get(who.lower(), who.lower()))
            text, pictures = "", list[str | bytes]()
            if roles[-1] != _TOOL:
                text, pictures = _text_of(content, where, f"turn {number}")
            texts.append(text)
            shown += pictures
    return roles, texts, shown


def _said(turn: object, where: str, number: int) -> tuple[str, object]:
    """The role and the content of a turn; what calls a tool is a tool's."""
    who = content = None
    if isinstance(turn, dict):
        if any(turn.get(name) for name in _TOOLS):
            return _TOOL, None
        if turn.get("weight") == 0:
            at = f"turn {number}: its reply is not to be learnt; leave turn and question out"
            raise ConversationError(where, "turn of weight 0", at)
        named = [keys for keys in _KEYS if turn.get(keys[0]) is not None]
        role, text = named[0] if named else _KEYS[0]
        who = turn.get(role)
        content = turn.get(text, next((turn[key] for _, key in _KEYS if key in turn), None))
    if not isinstance(who, str):
        keys = " or ".join(repr(key) for key, _ in _KEYS)
        raise ConversationError(where, NO_TALK, f"turn {number} has no role under {keys}")
    return who, content


def _text_of(content: object, where: str, place: str) -> tuple[str, list[str | bytes]]:
    """The text of a turn, with the image mark where a part shows a picture, and those pictures."""
    if content is None or isinstance(content, str):
        pieces = _NAMED.split(content or "")
        # Between the texts stand the names of the pictures.
        return IMAGE_MARK.join(pieces[::2]), [_picture(x, where, place) for x in pieces[1::2]]
    content = [content] if isinstance(content, dict) and "type" in content else content
    if not isinstance(content, list):
        raise ConversationError(where, NO_TALK, f"{place} has no text but {type(content).__name__}")
    text, pictures = "", list[str | bytes]()
    for number, part in enumerate(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        said = part.get("text", part.get("content")) if isinstance(part, dict) else None
        at = f"{place}, part {number}"
        value = next((part[x] for x in _SHOWN if part.get(x)), None) if kind or not said else None
        if kind in ("image", "image_url", "input_image") or (kind is None and value is not None):
            pictures += [] if value is None else [_picture(value, where, at)]
            text += IMAGE_MARK
        elif kind in ("text", "input_text", "output_text", None) and isinstance(said, str):
            apart = text and not text.endswith(IMAGE_MARK) and not text[-1].isspace()
            text += "\n" + said if apart and said and not said[0].isspace() else said
        elif isinstance(kind, str) and ("video" in kind or "audio" in kind):
            raise ConversationError(where, "video or sound", at)
        else:
            raise ConversationError(where, NO_TALK, f"{at} is neither text nor picture: {kind!r}")
    return text, pictures


def _turns(
    roles: Sequence[str], texts: Sequence[str], where: str, shown: int | None
) -> tuple[list[Turn], list[str]]:
    """The turns with a reply to learn, and why each other question is left out.

    The question at `shown` has a picture and needs no text.
    """
    turns: list[Turn] = []
    left_out: list[str] = []
    system: list[str] = []
    # `missing` says what the last question lacks so far; "" where it is answered.
    question = missing = ""
    pictured = False
    for number, (role, text) in enumerate(zip(roles, texts, strict=True)):
        if role == "system":
            system.append(text)
        elif role == "human":
            left_out += [missing] if missing else []
            question, missing, pictured = text, NO_REPLY, number == shown
        elif role == _TOOL and (turns or left_out or missing):
            missing = TOOL_TURN
        elif role == "gpt" and missing == NO_REPLY and not text:
            left_out.append(EMPTY_REPLY)
            missing = ""
        elif role == "gpt" and missing == NO_REPLY:
            if not question and not pictured:
                raise ConversationError(where, "empty turn", f"to which the reply is {text[:80]!r}")
            # Some files give it twice: in the record and as its first turn.
            told = "\n".join(dict.fromkeys(filter(None, system)))
            turns.append(Turn(question, text, told))
            system, missing = [], ""
        elif role != "gpt" or not missing:
            begins = role == "gpt" and not (turns or left_out)
            reason = "starts with a reply" if begins else "roles do not alternate"
            raise ConversationError(where, reason, f"found {list(roles)}"[:_DETAIL_CHARACTERS])
    left_out += [missing] if missing else []
    left_out += [NO_QUESTION] if turns and any(system) else []
    return turns, left_out


def _check_marks(where: str, marks: list[int], num_pictures: int) -> None:
    """Raises ConversationError unless the first turn alone has one mark for one picture."""
    found = f"{sum(marks)} {IMAGE_MARK} marks, {num_pictures} pictures"
    if num_pictures > 1:
        raise ConversationError(where, "more than one picture", found)
    if not num_pictures and any(marks):
        raise ConversationError(where, f"{IMAGE_MARK} without a picture", found)
    if num_pictures and not any(marks):
        raise ConversationError(where, f"picture without {IMAGE_MARK}", found)
    if any(marks[1:]):
        raise ConversationError(where, "picture not in the first turn", found)
    if marks[0] > 1:
        raise ConversationError(where, "more than one picture", found)
