"""What a record of a conversation says: its turns, and where in them its pictures stand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from midstream.data.examples import IMAGE_MARK, Turn
from midstream.data.formats.captions import picture_in
from midstream.data.formats.json_records import unquoted

# Where records keep their turns, and turns their roles and texts.
LISTS = ("conversations", "messages", "conversation", "texts")
# FineVision's ratings of each pair of a question and a reply.
RATINGS = tuple(
    f"{name}_ratings"
    for name in ("relevance", "image_correspondence", "visual_dependency", "formatting")
)
_KEYS = (("from", "value"), ("role", "content"), ("speaker", "text"))
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
RATED_LOW, NO_QUESTION_LEFT = "rated too low", "picture without a question left"
NO_QUESTION, NO_REPLIES = "system turn without a question", "no reply left"
NO_TALK, NO_NAME = "no conversation", "not a picture name"
MARKS_DIFFER, OUTSIDE = "marks and pictures disagree", "picture outside a question"
# Roles whose turns take the question before them out, and why.
_MISSING = {_TOOL: TOOL_TURN, RATED_LOW: RATED_LOW}
_DETAIL_CHARACTERS = 200
# Qwen-VL's marks hold the name of their picture.
_NAMED = re.compile(
    r"(?i)(?:Picture \d+: *)?<img>([^<>\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?))</img>"
)
# Where a part has its picture.
_SHOWN = (
    *("image", "image_url", "url", "path", "image_path", "file_name"),
    *("source", "bytes", "base64", "data", "content"),
)


@dataclass(frozen=True)
class Conversation:
    """What a record says: its turns, its pictures, and why questions are left out.

    `pictures` are names or bytes, in the order of the places that the turns give them.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[str | bytes, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Said:
    """What a turn says: its text, with a mark for each picture.

    `shown`: the picture of each mark that has one of its own, None for one of the record's.
    """

    role: str
    text: str = ""
    shown: tuple[str | bytes | None, ...] = ()

    @property
    def placed(self) -> tuple[str, tuple[int, ...]]:
        """The text without marks and space around it, and where in it they stood."""
        pieces = self.text.split(IMAGE_MARK)
        whole = "".join(pieces)
        text = whole.strip()
        before = len(whole) - len(whole.lstrip())
        ends = list(accumulate(map(len, pieces)))[:-1]
        return text, tuple(min(max(end - before, 0), len(text)) for end in ends)


class ConversationError(ValueError):
    """A record that is no conversation that can be learnt from.

    `reason` is one of a few, to count it under; `detail` is about this record.
    """

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {reason} ({detail})")
        self.reason, self.detail = reason, detail


def conversation_of(record: dict[str, Any], where: str, rating: int | None = None) -> Conversation:
    """The questions and replies of a record, and the pictures that it shows.

    A list of turns under `conversations`, `messages` or `conversation`, each with its role under
    `from` or `role` and its text under `value` or `content`: a text, or a list of parts (`text`,
    `image`, `image_url`), whose places are the pictures' places. `texts` of {user, assistant}
    without marks have all pictures before the first question. Marks stand for the record's
    pictures in order and are taken out; a lone picture in the first question stands before it.
    What a system turn or the record's `system` says goes to the next question that stays. A
    question whose reply is missing, empty, behind a tool's turn or rated below `rating` is left out
    with what follows on it; its pictures go to the next question that stays.

    Raises ConversationError that names `where` if a reply is not to a question, a role is unknown,
    a question is empty (but for pictures), no reply is left, a picture stands elsewhere than in a
    question, or marks and pictures disagree.
    """
    said = _said_in(record, where, rating)
    pictures = _pictures(record, where)
    first = next((n for n, one in enumerate(said) if one.role == "human"), 0)
    if pictures and not any(one.shown for one in said) and _in_pairs(record):
        marks = IMAGE_MARK * len(pictures)
        said[first] = _Said("human", marks + said[first].text, (None,) * len(pictures))
    shown = _in_places(where, [mark for one in said for mark in one.shown], pictures)
    if outside := [one.role for one in said if one.shown and one.role != "human"]:
        raise ConversationError(where, OUTSIDE, f"in a turn of {outside[0]!r}")
    if len(shown) == 1 and said[first].shown:
        question = said[first].text.replace(IMAGE_MARK, "")
        said[first] = replace(said[first], text=IMAGE_MARK + question)
    turns, kept, left_out = _turns(said, where)
    if not turns:
        detail = ", ".join(left_out) or "it has no question"
        raise ConversationError(where, NO_REPLIES, detail[:_DETAIL_CHARACTERS])
    return Conversation(tuple(turns), tuple(shown[n] for n in kept), tuple(left_out))


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
    found = unquoted(next((record[key] for key in LISTS if record.get(key)), None))
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


def _said_in(record: dict[str, Any], where: str, rating: int | None) -> list[_Said]:
    turns = _listed(record)
    if not isinstance(turns, list) or not turns:
        keys = ", ".join(repr(key) for key in LISTS)
        what = "; what is there is text but no JSON" if isinstance(turns, str) else ""
        detail = f"it needs a list of turns under one of {keys}{what}"
        raise ConversationError(where, NO_TALK, detail)
    system = _text_of("system", record.get("system"), where, "'system'")
    found = [system] if system.text else []
    for number, turn in enumerate(turns):
        if _is_pair(turn):
            said = [(name, turn[name]) for name in _PAIR]
            if rating is not None and _lowest(record, number, rating) < rating:
                said[1] = (RATED_LOW, None)
        else:
            said = [_said(turn, where, number)]
        for who, content in said:
            role = _ROLES.get(who.lower(), who.lower())
            content = None if role in _MISSING else content
            found.append(_text_of(role, content, where, f"turn {number}"))
    return found


def _lowest(record: dict[str, Any], number: int, otherwise: int) -> float:
    """The lowest rating of a pair; `otherwise` where it has none."""
    lists = [unquoted(record.get(key)) for key in RATINGS]
    given = [x[number] for x in lists if isinstance(x, list) and number < len(x)]
    return min((x for x in given if isinstance(x, int | float)), default=otherwise)


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


def _text_of(role: str, content: object, where: str, place: str) -> _Said:
    """The text of a turn, with the image mark where a part shows a picture, and those pictures."""
    if content is None or isinstance(content, str):
        pieces = _NAMED.split(content or "")
        shown: list[str | bytes | None] = []
        for number, piece in enumerate(pieces):
            # Between the texts stand the names of the pictures.
            named = number % 2
            shown += [_picture(piece, where, place)] if named else _unnamed(piece)
        return _Said(role, IMAGE_MARK.join(pieces[::2]), tuple(shown))
    content = [content] if isinstance(content, dict) and "type" in content else content
    if not isinstance(content, list):
        raise ConversationError(where, NO_TALK, f"{place} has no text but {type(content).__name__}")
    text, shown = "", []
    for number, part in enumerate(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        said = part.get("text", part.get("content")) if isinstance(part, dict) else None
        at = f"{place}, part {number}"
        value = next((part[x] for x in _SHOWN if part.get(x)), None) if kind or not said else None
        if kind in ("image", "image_url", "input_image") or (kind is None and value is not None):
            shown.append(None if value is None else _picture(value, where, at))
            text += IMAGE_MARK
        elif kind in ("text", "input_text", "output_text", None) and isinstance(said, str):
            apart = text and not text.endswith(IMAGE_MARK) and not text[-1].isspace()
            text += "\n" + said if apart and said and not said[0].isspace() else said
            shown += _unnamed(said)
        elif isinstance(kind, str) and ("video" in kind or "audio" in kind):
            raise ConversationError(where, "video or sound", at)
        else:
            raise ConversationError(where, NO_TALK, f"{at} is neither text nor picture: {kind!r}")
    return _Said(role, text, tuple(shown))


def _unnamed(text: str) -> list[None]:
    return [None] * text.count(IMAGE_MARK)


def _turns(said: Sequence[_Said], where: str) -> tuple[list[Turn], list[int], list[str]]:
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
    for role, (text, marked) in ((one.role, one.placed) for one in said):
        if role == "system":
            system.append(text)
        elif role == "human":
            left_out += [missing] if missing else []
            question, missing, places = text, NO_REPLY, marked
            waiting += range(num_shown, num_shown + len(marked))
            num_shown += len(marked)
        elif role in _MISSING and (turns or left_out or missing):
            missing = _MISSING[role]
        elif role == "gpt" and missing == NO_REPLY and not text:
            left_out.append(EMPTY_REPLY)
            missing = ""
        elif role == "gpt" and missing == NO_REPLY:
            if not question and not places:
                raise ConversationError(where, "empty turn", f"to which the reply is {text[:80]!r}")
            # Some files give it twice: in the record and as its first turn.
            told = "\n".join(dict.fromkeys(filter(None, system)))
            before = (0,) * (len(waiting) - len(places))
            turns.append(Turn(question, text, told, before + places))
            kept += waiting
            system, missing, waiting = [], "", []
        elif role != "gpt" or not missing:
            begins = role == "gpt" and not (turns or left_out)
            reason = "starts with a reply" if begins else "roles do not alternate"
            listed = f"found {[one.role for one in said]}"[:_DETAIL_CHARACTERS]
            raise ConversationError(where, reason, listed)
    left_out += [missing] if missing else []
    left_out += [NO_QUESTION] if turns and any(system) else []
    return turns, kept, left_out + [NO_QUESTION_LEFT] * len(waiting)


def _in_places(
    where: str, marks: Sequence[str | bytes | None], pictures: Sequence[str | bytes]
) -> list[str | bytes]:
    """The picture of each mark: its own, else the next of the record's that are no mark's own."""
    own = [mark for mark in marks if mark is not None]
    rest = [picture for picture in pictures if picture not in own]
    found = f"{len(marks)} {IMAGE_MARK} marks, {len(rest) + len(own)} pictures"
    if marks and not own and not rest:
        raise ConversationError(where, f"{IMAGE_MARK} without a picture", found)
    if rest and not marks:
        raise ConversationError(where, f"picture without {IMAGE_MARK}", found)
    if len(marks) - len(own) != len(rest):
        raise ConversationError(where, MARKS_DIFFER, found)
    following = iter(rest)
    return [next(following) if mark is None else mark for mark in marks]
