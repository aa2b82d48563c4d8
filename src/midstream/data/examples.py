"""Example -> tokens, and which of them are targets: separators, masks, conversation turns.

One separator token ends the image, every human turn and every reply (paper, sections 2.1.2-2.1.3);
its identity is unknown in the paper, here it is a token of its own. Image slots are not part of an
example's tokens: the packer puts them before the first token.

    text          tokens <eot>                                     all are targets
    caption       [image] <sep> caption <eot>                      caption and <eot> are targets
    conversation  [image] <sep> In: question\\nOut: <sep> reply <sep> In: ...   replies and their
                                                                   <sep> are targets
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

END_OF_TEXT = "<|endoftext|>"
SEPARATOR = "<|separator|>"
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Example:
    """Token ids and, for each, whether it is a target when it is the next token."""

    input_ids: np.ndarray
    supervised: np.ndarray


class TextCodec:
    """A tokenizer with Midstream's two special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.add_special_tokens(
            [AddedToken(END_OF_TEXT, special=True), AddedToken(SEPARATOR, special=True)]
        )
        # A file may carry its model's own cut and padding; examples are whole and as they are.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Marks of special tokens inside data are read as plain text, never as the tokens.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.end_of_text = int(tokenizer.token_to_id(END_OF_TEXT) or 0)
        self.separator = int(tokenizer.token_to_id(SEPARATOR) or 0)

    @classmethod
    def from_file(cls, path: Path) -> "TextCodec":
        """Read a `tokenizers` JSON file; ValueError names it if it is none."""
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:
            raise ValueError(f"{path} is not a tokenizer file of `tokenizers`: {error}") from None

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any special token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(item.ids) for item in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def text_example(codec: TextCodec, ids: list[int]) -> Example:
    """A document and the end-of-text behind it."""
    tokens = np.array([*ids, codec.end_of_text], dtype=np.int64)
    return Example(tokens, np.ones(len(tokens), dtype=np.uint8))


def caption_example(codec: TextCodec, ids: list[int]) -> Example:
    """The separator behind the image, the caption, end-of-text."""
    tokens = np.array([codec.separator, *ids, codec.end_of_text], dtype=np.int64)
    supervised = np.ones(len(tokens), dtype=np.uint8)
    supervised[0] = 0
    return Example(tokens, supervised)


def question_ids(codec: TextCodec, question: str, *, has_image: bool) -> list[int]:
    """What stands before a reply: training and evaluation share it."""
    head = [codec.separator] if has_image else []
    return head + _human_turn(codec, question)


def conversation_example(
    codec: TextCodec, turns: Sequence[tuple[str, str]], *, has_image: bool
) -> Example:
    """Question and reply pairs; only replies and the separators behind them are targets."""
    tokens: list[int] = [codec.separator] if has_image else []
    supervised = [0] * len(tokens)
    for question, reply in turns:
        human = _human_turn(codec, question)
        answer = [*codec.encode(f" {reply.strip()}"), codec.separator]
        tokens += human + answer
        supervised += [0] * len(human) + [1] * len(answer)
    return Example(np.array(tokens, dtype=np.int64), np.array(supervised, dtype=np.uint8))


def conversation_turns(record: dict[str, Any], where: str) -> tuple[list[tuple[str, str]], bool]:
    """Question and reply pairs of a LLaVA record, and whether it shows a picture.

    The image mark is taken out of the first question. Raises ValueError that names `where` if
    roles do not alternate from human to gpt, a text is missing or empty, or mark and picture
    disagree.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError(f"{where}: 'conversations' must hold pairs of human and gpt turns")
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise ValueError(f"{where}: every turn must be an object with a text under 'value'")
    roles = [turn.get("from") for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"{where}: roles must alternate human, gpt; found {roles}")
    texts = [turn["value"] for turn in turns]
    marks = [text.count(IMAGE_MARK) for text in texts]
    has_image = "image" in record
    if has_image and not isinstance(record["image"], str):
        raise ValueError(f"{where}: 'image' must be a file name, found {record['image']!r}")
    if marks != [int(has_image)] + [0] * (len(texts) - 1):
        raise ValueError(
            f"{where}: {IMAGE_MARK} must stand once, in the first human turn, exactly when the "
            f"record names an image (image: {record.get('image')!r})"
        )
    texts[0] = texts[0].replace(IMAGE_MARK, "", 1)
    texts = [text.strip() for text in texts]
    if not all(texts):
        raise ValueError(f"{where}: a turn is empty")
    return list(zip(texts[::2], texts[1::2], strict=True)), has_image


def _human_turn(codec: TextCodec, question: str) -> list[int]:
    return [*codec.encode(f"In: {question}\nOut:"), codec.separator]
