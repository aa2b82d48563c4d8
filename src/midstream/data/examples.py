"""Example -> tokens, and which of them are targets: separators, masks, conversation turns."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, processors

from midstream.config import own_begin_of_text, read_tokenizer
from midstream.data.tokenise import fast_encoder

END_OF_TEXT = "<|endoftext|>"
SEPARATOR = "<|separator|>"
# Ends a reply in tokenizers that have it; nothing of ours writes it.
AGENT_STOP = "<|agent_stop|>"
# A tokenizer's own end of text is the first of these that it has.
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>")
IMAGE_MARK = "<image>"
# Where the layouts of conversations keep their turns, and in a turn its role and its text.
_LAYOUTS = (("conversations", "from", "value"), ("messages", "role", "content"))
_TOOL = "tool"
_TOOLS = (
    *("tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_result", "function"),
    *("function_call", "function_response", "function_result", "observation", "ipython"),
)
_ROLES = {"user": "human", "assistant": "gpt"} | dict.fromkeys(_TOOLS, _TOOL)
# Why a question, or a system text, is left out; why a conversation is.
NO_REPLY, EMPTY_REPLY, TOOL_TURN = "question without a reply", "empty reply", "tool turn"
NO_QUESTION, NO_REPLIES = "system turn without a question", "no reply left"
_DETAIL_CHARACTERS = 200


@dataclass(frozen=True)
class Example:
    r"""Token ids and, for each, whether it is a target when it is the next token.

        text          tokens <eot>                                all are targets
        caption       [image] <sep> caption <eot>                 caption and <eot> are targets
        conversation  [image] <sep> system\nIn: question\nOut: <sep> reply <sep> In: ...
                                                                  replies and their <sep> are

    One separator ends the image, every human turn and every reply (paper, sections 2.1.2-2.1.3; a
    token of its own here). The image's slots are none of the tokens. What begins a text
    (`TextCodec.begin_of_text`) stands first, before the image, and is a target in a text alone.
    """

    input_ids: np.ndarray
    supervised: np.ndarray


class Turn(NamedTuple):
    """A question and its reply, and the system text that stands before the question ("": none)."""

    question: str
    reply: str
    system: str = ""

    @property
    def asked(self) -> str:
        """All that stands before the separator in front of the reply."""
        return (f"{self.system}\n" if self.system else "") + f"In: {self.question}\nOut:"


@dataclass(frozen=True)
class Conversation:
    """What a record says: its turns, whether it shows a picture, and why questions are left out."""

    turns: tuple[Turn, ...]
    has_image: bool
    left_out: tuple[str, ...] = ()


class TextCodec:
    """A tokenizer with an end of text and Midstream's separator; may be sent to other processes.

    End of text is the tokenizer's own (`<|endoftext|>`, `<|end_of_text|>` or `</s>`), else
    `<|endoftext|>` is added, as the separator is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        held = [token for token in _ENDS_OF_TEXT if tokenizer.token_to_id(token) is not None]
        end_of_text = held[0] if held else END_OF_TEXT
        tokenizer.add_special_tokens(
            [AddedToken(end_of_text, special=True), AddedToken(SEPARATOR, special=True)]
        )
        # A file may carry its model's own cut and padding; examples are whole and as they are.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Marks of special tokens inside data are read as plain text, never as the tokens.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.end_of_text = int(tokenizer.token_to_id(end_of_text) or 0)
        self.separator = int(tokenizer.token_to_id(SEPARATOR) or 0)

    def __reduce__(self) -> tuple[type["TextCodec"], tuple[Tokenizer]]:
        return TextCodec, (self.tokenizer,)

    @classmethod
    def from_file(cls, path: Path) -> "TextCodec":
        """Read a `tokenizers` JSON file; ValueError names it if it is none."""
        return cls(read_tokenizer(path))

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def begin_of_text(self) -> int | None:
        """The token that begins each text by the tokenizer's rule (Llama's `<s>`), if it has one.

        `beginning_with` changes the rule.
        """
        return own_begin_of_text(self.tokenizer)

    @property
    def begin_ids(self) -> list[int]:
        """`begin_of_text` as the head of an example: one id or none."""
        return [] if self.begin_of_text is None else [self.begin_of_text]

    def beginning_with(self, token: str | None) -> "TextCodec":
        """The same with another rule: `token` begins each text; "": none does, None: as it is."""
        own = self.begin_of_text
        if token is None or token == ("" if own is None else self.tokenizer.id_to_token(own)):
            return self
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        if token:
            tokenizer.post_processor = begins_with(token, int(tokenizer.token_to_id(token) or 0))
            return TextCodec(tokenizer)
        content = json.loads(tokenizer.to_str())
        return TextCodec(Tokenizer.from_str(json.dumps(content | {"post_processor": None})))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: end of text, the separator, the agent's stop where there is one."""
        stop = self.tokenizer.token_to_id(AGENT_STOP)
        return frozenset({self.end_of_text, self.separator, *([] if stop is None else [stop])})

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any special token."""
        if self._fast is not None:
            return self._fast(text)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        if self._fast is not None:
            return [self._fast(text) for text in texts]
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(item.ids) for item in found]

    @cached_property
    def _fast(self) -> Callable[[str], list[int]] | None:
        # Made when it is first used: a codec that only decodes needs none.
        return fast_encoder(self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def begins_with(token: str, number: int) -> processors.TemplateProcessing:
    """The rule of `tokenizers` that puts a token before each text."""
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, number)]
    )


def text_example(codec: TextCodec, ids: list[int]) -> Example:
    """A document and the end-of-text behind it."""
    tokens = np.array([*codec.begin_ids, *ids, codec.end_of_text], dtype=np.int64)
    return Example(tokens, np.ones(len(tokens), dtype=np.uint8))


def caption_example(codec: TextCodec, ids: list[int]) -> Example:
    """The separator behind the image, the caption, end-of-text."""
    head = [*codec.begin_ids, codec.separator]
    tokens = np.array([*head, *ids, codec.end_of_text], dtype=np.int64)
    supervised = np.ones(len(tokens), dtype=np.uint8)
    supervised[: len(head)] = 0
    return Example(tokens, supervised)


def question_ids(codec: TextCodec, question: str, *, has_image: bool) -> list[int]:
    """What stands before a reply, of an image what is behind it; training and evaluation share it.

    Before the image stands `codec.begin_of_text`.
    """
    head = [codec.separator] if has_image else codec.begin_ids
    return head + _asked(codec, Turn(question, ""))


def conversation_example(
    codec: TextCodec, turns: Sequence[tuple[str, str] | Turn], *, has_image: bool
) -> Example:
    """A conversation's tokens; only replies and the separators behind them are targets."""
    tokens = codec.begin_ids + ([codec.separator] if has_image else [])
    supervised = [0] * len(tokens)
    for turn in (Turn(*turn) for turn in turns):
        human = _asked(codec, turn)
        answer = [*codec.encode(f" {turn.reply.strip()}"), codec.separator]
        tokens += human + answer
        supervised += [0] * len(human) + [1] * len(answer)
    return Example(np.array(tokens, dtype=np.int64), np.array(supervised, dtype=np.uint8))


class ConversationError(ValueError):
    """A record that is no conversation that can be learnt from.

    `reason` is one of a few, to count it under; `detail` is about this record.
    """

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {reason} ({detail})")
        self.reason, self.detail = reason, detail


def conversation_of(record: dict[str, Any], where: str) -> Conversation:
    """The questions and replies of a record, and whether it shows a picture (`picture_names`).

    Layouts: LLaVA's and ShareGPT's `conversations` of {from: human or gpt, value}, and `messages`
    of {role: user or assistant, content}. The image mark is taken out of the first question. What
    a system turn or the record's `system` says goes to the next question that stays. A question
    whose reply is missing, empty or behind a tool's turn is left out with what follows on it.

    Raises ConversationError that names `where` if a reply is not to a question, a role is unknown,
    a question is empty, no reply is left, or marks and pictures disagree.
    """
    roles, texts = _roles_and_texts(record, where)
    names = picture_names(record, where)
    first = roles.index("human") if "human" in roles else 0
    marks = [text.count(IMAGE_MARK) for text in texts]
    _check_marks(where, [marks.pop(first), *marks], names)
    if names:
        texts[first] = texts[first].replace(IMAGE_MARK, "", 1)
    turns, left_out = _turns(roles, [text.strip() for text in texts], where)
    if not turns:
        detail = ", ".join(left_out) or "it has no question"
        raise ConversationError(where, NO_REPLIES, detail[:_DETAIL_CHARACTERS])
    return Conversation(tuple(turns), bool(names), tuple(left_out))


def picture_names(record: dict[str, Any], where: str) -> list[str]:
    """The picture files under `image` and `images` (a name or a list); "" and null are none.

    Raises ConversationError for anything else, and for a record with videos or sound.
    """
    for other in ("video", "videos", "audio", "audios"):
        if record.get(other):
            raise ConversationError(where, "video or sound", f"under {other!r}")
    names: list[str] = []
    for key in ("image", "images"):
        value = record.get(key)
        found = (
            [] if value is None or value == "" else value if isinstance(value, list) else [value]
        )
        if not all(isinstance(name, str) and name for name in found):
            raise ConversationError(where, "not a picture name", f"under {key!r}")
        names += found
    return names


def _roles_and_texts(record: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
    key, role, content = next(
        (keys for keys in _LAYOUTS if record.get(keys[0]) is not None), _LAYOUTS[0]
    )
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        keys = " or ".join(repr(keys[0]) for keys in _LAYOUTS)
        raise ConversationError(where, "no conversation", f"it needs a list of turns under {keys}")
    system = "" if record.get("system") is None else record["system"]
    if not isinstance(system, str):
        raise ConversationError(where, "no conversation", "it has no text under 'system'")
    roles: list[str] = ["system"] if system else []
    texts: list[str] = [system] if system else []
    for number, turn in enumerate(turns):
        who = turn.get(role) if isinstance(turn, dict) else None
        if not isinstance(who, str):
            raise ConversationError(where, "no conversation", f"turn {number} has no {role!r}")
        called = any(turn.get(name) for name in _TOOLS)
        roles.append(_TOOL if called else _ROLES.get(who, who))
        text = "" if turn.get(content) is None or roles[-1] == _TOOL else turn[content]
        if not isinstance(text, str):
            detail = f"turn {number} has no text under {content!r}"
            raise ConversationError(where, "no conversation", detail)
        texts.append(text)
    return roles, texts


def _turns(roles: Sequence[str], texts: Sequence[str], where: str) -> tuple[list[Turn], list[str]]:
    """The turns with a reply to learn, and why each other question is left out."""
    turns: list[Turn] = []
    left_out: list[str] = []
    system: list[str] = []
    # `missing` says what the last question lacks so far; "" where it is answered.
    question = missing = ""
    for role, text in zip(roles, texts, strict=True):
        if role == "system":
            system.append(text)
        elif role == "human":
            left_out += [missing] if missing else []
            question, missing = text, NO_REPLY
        elif role == _TOOL and (turns or left_out or missing):
            missing = TOOL_TURN
        elif role == "gpt" and missing == NO_REPLY and not text:
            left_out.append(EMPTY_REPLY)
            missing = ""
        elif role == "gpt" and missing == NO_REPLY:
            if not question:
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


def _check_marks(where: str, marks: list[int], names: list[str]) -> None:
    """Raises ConversationError unless the first turn alone has one mark for one picture."""
    found = f"{sum(marks)} {IMAGE_MARK} marks, {len(names)} pictures"
    if len(names) > 1:
        raise ConversationError(where, "more than one picture", found)
    if not names and any(marks):
        raise ConversationError(where, f"{IMAGE_MARK} without a picture", found)
    if names and not any(marks):
        raise ConversationError(where, f"picture without {IMAGE_MARK}", found)
    if any(marks[1:]):
        raise ConversationError(where, "picture not in the first turn", found)
    if marks[0] > 1:
        raise ConversationError(where, "more than one picture", found)


def _asked(codec: TextCodec, turn: Turn) -> list[int]:
    return [*codec.encode(turn.asked), codec.separator]
