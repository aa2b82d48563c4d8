"""What the readers of public formats hand to the preparation, and how the work is cut."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from midstream.data.examples import Turn

Section = Literal["text", "captions", "conversations"]


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time and one shard of the prepared source holds.

    `format` is the reader's name, `files` are local paths or `fsspec` URLs. `first` and `last`
    (exclusive; None: to the end) number the records of the file where one file makes many units.
    """

    format: str
    files: tuple[str, ...]
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What a user says about the records.

    text_key: the field or column of the text. require: a picture without this kind of caption is
    left out. images: the folder or URL that relative picture names start from, where it is not the
    file's own folder. max_tokens: captions and conversations of more tokens are left out.
    """

    text_key: str = "text"
    require: Literal["original", "synthetic"] | None = None
    images: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Picture:
    """An encoded picture: its bytes, and where they lie (file, byte offset)."""

    file: str
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class TextRecord:
    """A document; `where` names it in messages."""

    where: str
    text: str


@dataclass(frozen=True)
class TokenRecord:
    """A chunk that is tokenised already, taken as it is."""

    where: str
    input_ids: np.ndarray


@dataclass(frozen=True)
class CaptionRecord:
    """A picture and its captions: its own, "" for none, and synthetic ones.

    `left_out` counts those of its captions that cannot be used.
    """

    where: str
    caption: str
    picture: Picture
    synthetic: tuple[str, ...] = ()
    left_out: int = 0

    @property
    def captions(self) -> tuple[str, ...]:
        """All that there are, its own first."""
        return (self.caption, *self.synthetic) if self.caption else self.synthetic


@dataclass(frozen=True)
class ConversationRecord:
    """Questions and replies, the picture that the first one shows, and why others are left out."""

    where: str
    turns: tuple[Turn, ...]
    picture: Picture | None
    left_out: tuple[str, ...] = ()


Record = TextRecord | TokenRecord | CaptionRecord | ConversationRecord
