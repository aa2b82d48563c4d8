"""Example -> tokens, and which of them are targets: separators, masks, conversation turns.

In a row a picture has its positions before the token of its place, the separator that ends it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, processors

from midstream.config import END_OF_TEXT as END_OF_TEXT
from midstream.config import SEPARATOR as SEPARATOR
from midstream.config import add_own_tokens, own_begin_of_text, read_tokenizer
from midstream.data.tokenise import fast_encoder

# Ends a reply in tokenizers that have it; nothing of ours writes it.
AGENT_STOP = "<|agent_stop|>"
IMAGE_MARK = "<image>"
_SOME_CHARACTERS = "7{é中😀"


@dataclass(frozen=True)
class Example:
    r"""Token ids and, for each, whether it is a target when it is the next token.

        text          tokens <eot>                                all are targets
        caption       [image] <sep> caption <eot>                 caption and <eot> are targets
        conversation  [image] <sep> system\nIn: question\nOut: <sep> reply <sep> In: ...
                                                                  replies and their <sep> are

        document      text [image] <sep> text [image] <sep> text <eot>    texts and <eot> are

    One separator ends each image, every human turn and every reply (paper, sections 2.1.2-2.1.3; a
    token of its own here). Images' slots are none of the tokens: `pictures` says before which token
    each image stands, in ascending order. What begins a text (`TextCodec.begin_of_text`) stands
    first, before an image too, and is a target in a text alone.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    pictures: tuple[int, ...] = ()


class Turn(NamedTuple):
    """A question and its reply, and the system text that stands before the question ("": none).

    `pictures` are the places of its pictures: how many characters of `question` stand before each,
    in ascending order. Those at 0 stand before the whole turn, its system text too. `learnt`:
    whether the reply is a target.
    """

    question: str
    reply: str
    system: str = ""
    pictures: tuple[int, ...] = ()
    learnt: bool = True

    @property
    def asked(self) -> str:
        """All that stands before the separator in front of the reply."""
        return (f"{self.system}\n" if self.system else "") + f"In: {self.question}\nOut:"


class TextCodec:
    """A tokenizer with an end of text and Midstream's separator; may be sent to other processes.

    End of text is the tokenizer's own (`<|endoftext|>`, `<|end_of_text|>` or `</s>`), else
    `<|endoftext|>` is added, as the separator is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        end_of_text = add_own_tokens(tokenizer)
        # A file may carry its model's own cut and padding; examples are whole and as they are.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Merges left out at random would make other ids of a text each time.
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
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
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        if self._fast is not None:
            return [self._fast(text) for text in texts]
        found = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [list(item.ids) for item in found]

    @cached_property
    def _fast(self) -> Callable[[str], list[int]] | None:
        # Made when it is first used: a codec that only decodes needs none.
        return fast_encoder(self.tokenizer)

    @cached_property
    def _plain(self) -> Tokenizer:
        return without_special(self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def without_special(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, or one of the same ids that finds no special token in a text.

    Where a model takes whole pieces of its vocabulary (Unigram, words, BPE that ignores merges) and
    that holds the special tokens too, it finds them whatever `encode_special_tokens` says.
    """
    model = tokenizer.model
    if isinstance(model, models.BPE) and not model.ignore_merges:
        return tokenizer
    parts = json.loads(tokenizer.to_str())
    listed = parts["model"]["vocab"]
    pieces = [piece for piece, _ in listed] if isinstance(listed, list) else list(listed)
    unknown = _unknown_of(parts["model"])
    formed = {"".join(merge) for merge in parts["model"].get("merges", [])}
    added = {one["content"] for one in parts["added_tokens"] if one["special"]}
    # Their new names hold what is no character, so that no text has it.
    hidden = {
        piece: f"\U0010ffff{number}\U0010ffff"
        for number, piece in enumerate(pieces)
        if piece in added - formed - {unknown}
    }
    if not hidden:
        return tokenizer
    if isinstance(listed, list):
        parts["model"]["vocab"] = [[hidden.get(piece, piece), score] for piece, score in listed]
    else:
        parts["model"]["vocab"] = {hidden.get(piece, piece): n for piece, n in listed.items()}
    for one in parts["added_tokens"]:
        one["content"] = hidden.get(one["content"], one["content"])
    found = Tokenizer.from_str(json.dumps(parts | {"post_processor": None}))
    found.encode_special_tokens = tokenizer.encode_special_tokens
    return found


def _unknown_of(model: Mapping[str, Any]) -> str | None:
    """The token that stands for what a model, as its JSON has it, does not know."""
    number = model.get("unk_id")
    return model.get("unk_token") if number is None else str(model["vocab"][number][0])


def not_known(tokenizer: Tokenizer) -> str:
    """A sentence on which of a few characters a tokenizer has no token for; "" where it has all."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    token = _unknown_of(json.loads(tokenizer.to_str())["model"])
    unknown = None if token is None else tokenizer.token_to_id(token)
    found = {one: ids(f"a{one}a") for one in _SOME_CHARACTERS}
    nothing = (ids("aa"), ids("a a"))
    lost = [one for one in found if unknown in found[one] or found[one] in nothing]
    becomes = "nothing" if unknown is None else repr(token)
    listed = f"the tokenizer has no token for {' '.join(lost)} and the like; {becomes} is stored"
    return listed if lost else ""


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
    return Example(tokens, supervised, (len(codec.begin_ids),))


def document_example(codec: TextCodec, parts: Sequence[list[int] | None]) -> Example:
    """A document of texts, given as ids, and pictures (None), each in its place."""
    tokens, pictures = list(codec.begin_ids), list[int]()
    supervised = [0] * len(tokens)
    for part in parts:
        if part is None:
            pictures.append(len(tokens))
        tokens += [codec.separator] if part is None else part
        supervised += [0] if part is None else [1] * len(part)
    return Example(
        np.array([*tokens, codec.end_of_text], dtype=np.int64),
        np.array([*supervised, 1], dtype=np.uint8),
        tuple(pictures),
    )


def question_ids(codec: TextCodec, question: str, *, has_image: bool) -> list[int]:
    """What stands before a reply, of an image what is behind it; training and evaluation share it.

    Before the image stands `codec.begin_of_text`.
    """
    asked = _asked(codec, Turn(question, ""))[0]
    return ([codec.separator] if has_image else codec.begin_ids) + asked


def without_marks(question: str) -> tuple[str, tuple[int, ...]]:
    """A question without its image marks and outer white space, and where the marks stood, as
    `Turn.pictures` says it."""
    texts, places, length = question.strip().split(IMAGE_MARK), list[int](), 0
    for text in texts[:-1]:
        length += len(text)
        places.append(length)
    whole = "".join(texts)
    outer, text = len(whole) - len(whole.lstrip()), whole.strip()
    return text, tuple(min(max(place - outer, 0), len(text)) for place in places)


def asked_example(
    codec: TextCodec, turn: Turn, earlier: Sequence[Turn] = ()
) -> tuple[Example, Example]:
    """What stands before the reply to a turn (which has none yet): the earlier turns, and this one.

    One behind the other they are the head of `conversation_example` of all these turns. What
    begins a text stands in the first of them that holds anything.
    """
    ids, places = _asked(codec, turn)
    head = conversation_example(codec, earlier)
    if not earlier:
        shift = len(head.input_ids)
        ids, places = [*head.input_ids.tolist(), *ids], [shift + place for place in places]
        head = Example(head.input_ids[:0], head.supervised[:0])
    asked = np.array(ids, dtype=np.int64)
    return head, Example(asked, np.zeros(len(ids), dtype=np.uint8), tuple(places))


def document_prompt(codec: TextCodec, turn: Turn, earlier: Sequence[Turn] = ()) -> Example:
    """The same as one document: each turn's pictures, its question and its reply in lines of text,
    and the last question's, whose reply goes on with it."""
    tokens, pictures = list(codec.begin_ids), list[int]()
    for one in (*earlier, turn):
        ids, places = _asked(codec, one)
        pictures += [len(tokens) + place for place in places]
        # Here a separator ends a picture alone.
        tokens += ids[:-1]
        if one is not turn:
            tokens += codec.encode(f" {one.reply.strip()}\n")
    return Example(
        np.array(tokens, dtype=np.int64), np.zeros(len(tokens), dtype=np.uint8), tuple(pictures)
    )


def conversation_example(codec: TextCodec, turns: Sequence[tuple[str, str] | Turn]) -> Example:
    """A conversation's tokens; only replies that are learnt, and the separators behind them, are
    targets."""
    tokens, pictures = list(codec.begin_ids), list[int]()
    supervised = [0] * len(tokens)
    for turn in (Turn(*turn) for turn in turns):
        human, shown = _asked(codec, turn)
        pictures += [len(tokens) + place for place in shown]
        answer = [*codec.encode(f" {turn.reply.strip()}"), codec.separator]
        tokens += human + answer
        supervised += [0] * len(human) + [int(turn.learnt)] * len(answer)
    return Example(
        np.array(tokens, dtype=np.int64), np.array(supervised, dtype=np.uint8), tuple(pictures)
    )


def _asked(codec: TextCodec, turn: Turn) -> tuple[list[int], list[int]]:
    """What stands before a reply, and before which of its tokens pictures do."""
    first = sum(place == 0 for place in turn.pictures)
    ids, shown = [codec.separator] * first, list(range(first))
    # Where in the whole text the others stand.
    behind = len(turn.asked) - len(f"{turn.question}\nOut:")
    cuts = [behind + place for place in turn.pictures[first:]]
    for low, high in pairwise([0, *cuts, len(turn.asked)]):
        ids += codec.encode(turn.asked[low:high])
        if high < len(turn.asked):
            shown.append(len(ids))
            ids.append(codec.separator)
    return [*ids, codec.separator], shown


class Run(NamedTuple):
    """What stands side by side in a piece of an example, from the piece's `column` on: its tokens
    `low` to `high`, or its picture of this number. `before_picture`: a picture follows these."""

    column: int
    low: int
    high: int
    picture: int | None = None
    before_picture: bool = False


def runs_of(places: Sequence[int], start: int, size: int, num_patches: int) -> list[Run]:
    """The runs of `size` positions of an example, from its position `start` on.

    Each picture takes `num_patches` positions before the token of `places`; no piece begins or ends
    in one.
    """
    if not places or not num_patches:
        return [Run(0, start, start + size)]
    found, end, at = list[Run](), start + size, 0
    for number, place in enumerate(places):
        # Of the tokens up to this picture those of the piece; they stand so far behind their own.
        shift = number * num_patches
        low, high = max(at, start - shift), min(place, end - shift)
        if high > low:
            found.append(Run(low + shift - start, low, high, before_picture=high == place))
        if start <= place + shift < end:
            found.append(Run(place + shift - start, place, place, number))
        at = place
    shift = len(places) * num_patches
    if end - shift > (low := max(at, start - shift)):
        found.append(Run(low + shift - start, low, end - shift))
    return found
