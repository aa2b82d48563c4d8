"""What a turn of a conversation says: its role, its text, and where in it pictures stand."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from midstream.data.examples import IMAGE_MARK, without_marks
from midstream.data.formats.picture_files import picture_in
from midstream.data.formats.record_files import unquoted
from midstream.data.formats.records import is_picture
from midstream.data.source_writer import RejectedError

_KEYS = (("from", "value"), ("role", "content"), ("speaker", "text"))
# A question and its reply under names of their own, as a turn or as a whole record.
PAIRS = (
    *(("user", "assistant"), ("human", "assistant"), ("instruction", "output")),
    *(("instruction", "response"), ("query", "response"), ("question", "answer")),
    *(("question", "response"), ("prompt", "completion"), ("prompt", "response")),
    *(("prefix", "suffix"), ("input", "output")),
)
# What stands behind the question of a pair, on a line of its own.
BEHIND = ("input", "context")
# What is asked with a pair, in no form that says where in its question.
ASIDE = ("choices", "options", "hint")
# Where pictures are named: all of the first two, else the first of the others.
_IMAGES = ("image", "images")
_FURTHER = (
    *("image_path", "image_paths", "image_url", "image_urls", "image_file", "image_files"),
    *("image_bytes", "img", "imgs", "img_path", "image_name", "picture", "pictures", "file_name"),
)
PICTURE_KEYS = _IMAGES + _FURTHER
# What may be the name of something else.
_ANY_FILE = "file_name"
VIDEO_KEYS = (
    *("video", "videos", "audio", "audios", "video_path", "video_paths", "video_url", "video_urls"),
    *("audio_path", "audio_paths", "audio_url", "audio_urls"),
)
_SEEN = frozenset((*PICTURE_KEYS, *VIDEO_KEYS))
_TOOL = "tool"
_TOOLS = (
    *("tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_result", "tool_use"),
    *("function", "function_call", "function_response", "function_result"),
    *("observation", "ipython"),
)
_ROLES = {"human": "human", "gpt": "gpt", "system": "system", "developer": "system"}
_ROLES |= dict.fromkeys(("user", "prompter"), "human")
_ROLES |= dict.fromkeys(
    ("assistant", "chatgpt", "gpt4", "gpt-4", "model", "bot", "ai", "bing", "bard", "claude"), "gpt"
)
_ROLES |= dict.fromkeys(_TOOLS, _TOOL)
# Says of a reply whether it is learnt.
_WEIGHTS = ("weight", "loss", "train", "training", "train_detail")
# Why turns are left out.
TOOL_TURN, RATED_LOW = "tool turn", "rated too low"
# Roles whose turns take the question before them out, and why.
MISSING = {_TOOL: TOOL_TURN, RATED_LOW: RATED_LOW}
# Why a conversation is.
NO_TALK, NO_NAME, VIDEO = "no conversation", "not a picture name", "video or sound"
ASKED_ASIDE, SEVERAL = "options beside a question", "several conversations"
MARKS_DIFFER, NO_PICTURE = "marks and pictures disagree", f"{IMAGE_MARK} without a picture"
NO_MARK, OUTSIDE = f"picture without {IMAGE_MARK}", "picture outside a question"
# Qwen-VL's marks hold the name of their picture.
_NAMED = re.compile(
    r"(?i)(?:Picture \d+: *)?"
    r"<img>([^<>\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)|[^<>\n]*/[^<>\n]+)</img>"
)
# Marks of other programs, some with the number of their picture.
_OTHER_MARKS = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|(?:<\|image_pad\|>)+|<\|image\|>"
    r"|<\|?image[ _]?(\d{1,6})\|?>|<image_placeholder>|(?:<Img>)?<ImageHere>(?:</Img>)?"
    r"|<start_of_image>|\[IMG\]"
)
# Those that no text has by chance, and what may be meant for a mark.
_NO_CHANCE = re.compile(
    r"<\|(?:vision_start|image_pad|image(?:_?\d+)?)\|>|<image_placeholder>|<ImageHere>"
)
_LIKE_MARKS = re.compile(
    r"(?i)< ?\|?(?:image|picture)[^<>\n]{0,3}>|<img></img>|<img>(?![^<]*</)|<img_context>"
    r"|</image>|<im_start>|<im_patch>|<image_soft_token>|<__media__>"
)
# What a program put around its marks, or in their place.
_AROUND = re.compile(r"<im_(?:start|end|patch)>|</image>|<IMG_CONTEXT>|<image_soft_token>")
_NUMBERED = re.compile(r"<image_?\d{1,6}>")
# Where a part has its picture.
_SHOWN = (
    *("image", "image_url", "url", "path", "image_path", "file_name"),
    *("source", "bytes", "base64", "data", "content", "value"),
)


@dataclass(frozen=True)
class Said:
    """What a turn says: its role, its text with a mark for each picture, whether it is learnt.

    `shown`: of each mark its own picture, the number of one of the record's, or None for the next.
    """

    role: str
    text: str = ""
    shown: tuple[str | bytes | int | None, ...] = ()
    learnt: bool = True

    @property
    def placed(self) -> tuple[str, tuple[int, ...]]:
        """The text without marks and space around it, and where in it they stood."""
        return without_marks(self.text)


def pair_in(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Under which names an object has a question and its reply, if it has."""
    return next((pair for pair in PAIRS if all(key in values for key in pair)), None)


def said_of(turn: object, number: int, *, is_rated_low: bool = False) -> Iterator[Said]:
    """What a turn says, or of a pair both question and reply; pictures of its own stand before it.

    Raises RejectedError.
    """
    at = f"turn {number}"
    own: list[str | bytes] = []
    if isinstance(turn, dict):
        own = pictures_under(turn, f" of {at}")
        if any(key in turn for keys in _KEYS for key in keys):
            pair = None
        elif pair := pair_in(turn):
            if aside := [key for key in ASIDE if not is_absent(unquoted(turn.get(key)))]:
                raise RejectedError(ASKED_ASIDE, f"{at} has {aside[0]!r}")
            system = text_of("system", turn.get("system"), at)
            yield from [system] if system.text else []
            yield _showing(text_of("human", _question(turn, pair, at), at), own)
            yield Said(RATED_LOW) if is_rated_low else _reply(turn, pair[1], at)
            return
    who, content = _role_and_content(turn, at)
    role = _ROLES.get(who.strip().lower())
    if role is None:
        known = "user, assistant, system, tool and names like these"
        raise RejectedError("unknown role", f"{at}: {who[:80]!r}; known are {known}")
    said = text_of(role, None if role in MISSING else content, at)
    said = _showing(said, own)
    unlearnt = role == "gpt" and not _is_learnt(turn, at)
    yield replace(said, learnt=False) if unlearnt else said


def _question(turn: Mapping[str, Any], pair: tuple[str, str], at: str) -> object:
    asked = turn[pair[0]]
    if isinstance(asked, list) and len(asked) > 1 and all(isinstance(x, str) for x in asked):
        detail = f"{at} has {len(asked)} questions under {pair[0]!r}; write a record for each"
        raise RejectedError(SEVERAL, detail)
    behind = [turn.get(key) for key in BEHIND if key not in pair]
    texts = [x for x in (asked, *behind) if isinstance(x, str) and x.strip()]
    return "\n".join(texts) if isinstance(asked, str) else asked


def _reply(turn: Mapping[str, Any], key: str, at: str) -> Said:
    reply = turn[key]
    if isinstance(reply, list) and len(reply) > 1 and all(isinstance(x, str) for x in reply):
        detail = f"{at} has {len(reply)} replies under {key!r}; keep one"
        raise RejectedError("more than one reply", detail)
    return replace(text_of("gpt", reply, at), learnt=_is_learnt(turn, at))


def _showing(said: Said, own: Sequence[str | bytes]) -> Said:
    """A turn with the pictures that it names beside its text, as a record of that turn alone."""
    if own and said.role != "human":
        raise RejectedError(OUTSIDE, f"in a turn of {said.role!r}")
    if not own:
        return said
    (one,) = marked([said], len(own))
    return replace(one, shown=tuple(in_places(one.shown, own)))


def _is_learnt(turn: Any, at: str) -> bool:
    for key in _WEIGHTS:
        value = turn.get(key)
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if not is_absent(value) and value not in (0, 1):
            detail = f"{at}: {key} is {value!r}"[:200]
            raise RejectedError("weight other than 0 and 1", detail)
        if value == 0:
            return False
    return True


def _role_and_content(turn: object, at: str) -> tuple[str, object]:
    """The role and the content of a turn; what calls a tool is a tool's."""
    who = content = None
    if isinstance(turn, dict):
        if any(turn.get(name) for name in _TOOLS):
            return _TOOL, None
        named = [keys for keys in _KEYS if turn.get(keys[0]) is not None]
        role, text = named[0] if named else _KEYS[0]
        who = turn.get(role)
        content = turn.get(text, next((turn[key] for _, key in _KEYS if key in turn), None))
    if not isinstance(who, str):
        keys = " or ".join(repr(key) for key, _ in _KEYS)
        raise RejectedError(NO_TALK, f"{at} has no role under {keys}")
    parts = content if isinstance(content, list) else []
    calls = any(isinstance(part, dict) and part.get("type") in _TOOLS for part in parts)
    return (_TOOL, None) if calls else (who, content)


def text_of(role: str, content: Any, place: str) -> Said:
    """The text of a turn, with the image mark where a part shows a picture, and those pictures."""
    content = str(content) if type(content) in (int, float) and content == content else content
    if is_absent(content) or isinstance(content, str):
        pieces = _NAMED.split(content if isinstance(content, str) else "")
        shown: list[str | bytes | int | None] = []
        for number, piece in enumerate(pieces):
            # Between the texts stand the names of the pictures.
            named = number % 2
            shown += [_picture(piece, place)] if named else _unnamed(piece)
        return Said(role, IMAGE_MARK.join(pieces[::2]), tuple(shown))
    content = [content] if isinstance(content, dict) and "type" in content else content
    if not isinstance(content, list):
        what = f"{place} has no text but {type(content).__name__}; write it as a text"
        raise RejectedError(NO_TALK, what)
    text, shown = "", []
    for number, part in enumerate(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        at = f"{place}, part {number}"
        if not isinstance(part, dict):
            raise RejectedError(NO_TALK, f"{at} is {type(part).__name__}")
        kind, said = part.get("type"), _text_in(part)
        value = next((part[x] for x in _SHOWN if part.get(x)), None) if kind or not said else None
        if kind in ("image", "image_url", "input_image") or (kind is None and value is not None):
            index = part.get("index")
            of_record = index if type(index) is int else None
            shown.append(of_record if value is None else _picture(value, at))
            text += IMAGE_MARK
        elif kind in ("text", "input_text", "output_text", None) and isinstance(said, str):
            apart = text and not text.endswith(IMAGE_MARK) and not text[-1].isspace()
            text += "\n" + said if apart and said and not said[0].isspace() else said
            shown += _unnamed(said)
        elif isinstance(kind, str) and ("video" in kind or "audio" in kind):
            raise RejectedError(VIDEO, at)
        else:
            raise RejectedError(NO_TALK, f"{at} is neither text nor picture: {kind!r}")
    return Said(role, text, tuple(shown))


def _text_in(part: Mapping[str, Any]) -> object:
    return next((part[key] for key in ("text", "content", "value") if key in part), None)


def _unnamed(text: str) -> list[None]:
    return [None] * text.count(IMAGE_MARK)


def pictures_under(values: Mapping[str, Any], place: str = "") -> list[str | bytes]:
    """The pictures that a record or a turn names; "", null, NaN, numbers and {bytes: null} are
    none, and so is a `file_name` that ends as no picture's does.

    Raises RejectedError, also for videos and sound.
    """
    if _SEEN.isdisjoint(values):
        return []
    for other in VIDEO_KEYS:
        if not _says_nothing(other, values.get(other)):
            raise RejectedError(VIDEO, f"under {other!r}{place}")
    have = [key for key in PICTURE_KEYS if not _says_nothing(key, values.get(key))]
    keys = [key for key in have if key in _IMAGES] or have[:1]
    if len(keys) > 1 and _as_list(values[keys[0]]) == _as_list(values[keys[1]]):
        keys = keys[:1]  # the same ones under both
    found: list[str | bytes] = []
    for key in keys:
        value = unquoted(values[key])
        if isinstance(value, dict) and all(map(_NUMBERED.fullmatch, value)):
            # MiniCPM-V's: a name for each mark.
            value = [value[mark] for mark in sorted(value, key=lambda x: int(x.strip("<image_>")))]
        held = [x for x in _as_list(value) if not _is_none(x)]
        found += [_picture(x, f"under {key!r}{place}") for x in held]
    return found


def _as_list(value: object) -> list[Any]:
    value = unquoted(value)
    return value if isinstance(value, list) else [value]


def _says_nothing(key: str, value: object) -> bool:
    other = key == _ANY_FILE and isinstance(value, str) and not is_picture(value.split("?")[0])
    return other or isinstance(value, int | float) or is_absent(value)


def is_absent(value: object) -> bool:
    """Whether there is nothing; NaN is how pandas says so."""
    if isinstance(value, list | dict):
        return all(map(_is_none, value)) if isinstance(value, list) else _is_none(value)
    return value is None or value == "" or value != value


def _is_none(value: object) -> bool:
    # Columns of structs say {bytes: null, path: null}.
    return value is None or (isinstance(value, dict) and all(x is None for x in value.values()))


def _picture(value: object, place: str) -> str | bytes:
    try:
        found = picture_in(value)
    except RejectedError as error:
        raise RejectedError(NO_NAME, f"{place}: {error.detail}") from None
    if found is None or found == "":
        raise RejectedError(NO_NAME, place)
    return found


def marked(said: Sequence[Said], num_pictures: int) -> list[Said]:
    """The turns with a mark for the record's pictures: where other programs' marks stand in
    questions, or, where nothing does, all before the first question.

    Raises RejectedError for such marks in a record without pictures, and for
    what may be meant for a mark.
    """
    asked = [n for n, one in enumerate(said) if one.role == "human"]
    questions = "\n".join(said[n].text for n in asked)
    if any(one.shown for one in said):
        if (mark := _AROUND.search(questions)) is not None:
            raise RejectedError(MARKS_DIFFER, f"{mark[0]!r} stands beside {IMAGE_MARK}")
        return list(said)
    if not asked:
        return list(said)
    if not num_pictures:
        if (mark := _NO_CHANCE.search(questions)) is not None:
            raise RejectedError(NO_PICTURE, f"{mark[0]!r} stands in a question")
        return list(said)
    found = [_with_marks(one) if one.role == "human" else one for one in said]
    if not any(one.shown for one in found):
        if (mark := _LIKE_MARKS.search(questions)) is not None:
            raise RejectedError(NO_MARK, f"{mark[0]!r} stands for none")
        text = IMAGE_MARK * num_pictures + said[asked[0]].text
        found[asked[0]] = replace(said[asked[0]], text=text, shown=(None,) * num_pictures)
    return found


def _with_marks(one: Said) -> Said:
    pieces = _OTHER_MARKS.split(one.text)
    numbers = pieces[1::2]
    shown = tuple(None if number is None else int(number) for number in numbers)
    return replace(one, text=IMAGE_MARK.join(pieces[::2]), shown=shown)


def in_places(
    marks: Sequence[str | bytes | int | None], pictures: Sequence[str | bytes]
) -> list[str | bytes]:
    """The picture of each mark: its own, or one of the record's that are no mark's own, by its
    number (from 0 or 1) where all have one, else the next."""
    own = [mark for mark in marks if isinstance(mark, str | bytes)]
    rest = [picture for picture in pictures if picture not in own]
    others = [mark for mark in marks if not isinstance(mark, str | bytes)]
    found = f"{len(marks)} {IMAGE_MARK} marks, {len(rest) + len(own)} pictures"
    if marks and not own and not rest:
        raise RejectedError(NO_PICTURE, found)
    if rest and not marks:
        raise RejectedError(NO_MARK, found)
    numbers = [mark for mark in others if isinstance(mark, int)]
    if numbers and len(numbers) == len(others):
        found += f", marks of the numbers {sorted({*numbers})}"
    else:
        numbers = list(range(len(others)))
    first = min(numbers, default=0)
    if first not in (0, 1) or {*numbers} != {*range(first, first + len(rest))}:
        raise RejectedError(MARKS_DIFFER, found[:200])
    following = iter(rest[number - first] for number in numbers)
    return [mark if isinstance(mark, str | bytes) else next(following) for mark in marks]
