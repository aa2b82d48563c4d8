"""Tokenizers: opening one, and encoding with tiktoken's core where it gives the same ids."""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from midstream.data.tiktoken_core import Agreement, byte_letters, is_byte_level, ranks_of, split_of

# A text with a run of whitespace, or of anything else, that is twice as long goes the plain way:
# tiktoken overflows on the one, and its older releases are slow on the other.
LONG_RUN = 5000
_LONG_RUN = re.compile(rf"\s{{{LONG_RUN}}}|\S{{{LONG_RUN}}}")
NUM_CHECKS = 1500
# Whatever else a text of these scripts holds, composing (NFC) leaves it as it is.
COMPOSABLE = re.compile(
    "[^\x00-\u02ff\u0391-\u03c9\u0400-\u0482\u048a-\u052f\u2010-\u2027\u2030-\u205e\u2190-\u22ff"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff9d\U0001f300-\U0001faff]"
)


def open_tokenizer(name_or_file: str) -> Tokenizer:
    """A tokenizer from its JSON file, a folder that holds `tokenizer.json`, or a hub name.

    Raises FileNotFoundError that lists what was tried if it is found nowhere, ValueError if the
    file is not one of `tokenizers`.
    """
    path = Path(name_or_file).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:
            raise ValueError(f"{file} is not a tokenizer file of `tokenizers`: {error}") from None
    tried = f"no file {file}"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name_or_file) or file.suffix == ".json":
        raise FileNotFoundError(
            f"tokenizer {name_or_file!r}: {tried}, and it has not the form of a hub name "
            "(name or owner/name)"
        )
    try:
        return Tokenizer.from_pretrained(name_or_file)
    except Exception as error:
        raise FileNotFoundError(
            f"tokenizer {name_or_file!r}: {tried}, and the hub gave none of that name ({error}); "
            "give the path of its tokenizer.json"
        ) from None


def fast_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]] | None:
    """Ids of any text as `tokenizer.encode(text, add_special_tokens=False).ids` gives them, faster.

    Works on a copy: later changes of `tokenizer` do not reach it. None where tiktoken is not
    installed or the tokenizer is not one that its core can express: other models than byte-level
    BPE, dropout, byte fallback, prefixes and suffixes of words, truncation, padding, normalisers
    other than NFC, unusual splits, added tokens that look at their surroundings.
    """
    return _encoder_of(tokenizer.to_str(), tokenizer.encode_special_tokens)


# Opening costs some tenths of a second with a large vocabulary.
@lru_cache(maxsize=2)
def _encoder_of(text: str, special_is_text: bool) -> Callable[[str], list[int]] | None:
    try:
        from tiktoken import Encoding
    except ImportError:
        return None
    parts = json.loads(text)
    pattern = split_of(parts["pre_tokenizer"])
    is_plain = parts["truncation"] is None and parts["padding"] is None
    if not is_plain or pattern is None or not is_byte_level(parts["model"]):
        return None
    normalizer = parts["normalizer"]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = special_is_text
    compose = tokenizer.normalizer.normalize_str if normalizer else str
    added = _added_tokens(parts["added_tokens"], special_is_text, compose)
    ranks = ranks_of(parts["model"])
    if added is None or ranks is None:
        return None
    changing = COMPOSABLE if normalizer else None
    agreement = Agreement(pattern, Encoding, changing=changing)
    if not agreement("".join(map(chr, range(128)))):
        return None
    core = Encoding(
        "fast", pat_str=pattern.text, mergeable_ranks=ranks.ranks, special_tokens={}
    ).encode_ordinary
    ids = ranks.ids
    encoder = FastEncoder(
        plain=tokenizer,
        core=core if ids is None else lambda text: [ids[rank] for rank in core(text)],
        compose=compose,
        agreement=agreement,
        raw_tokens=added[0],
        composed_tokens=added[1],
    )
    return encoder if _is_equal(encoder, parts) else None


@dataclass(frozen=True)
class AddedTokens:
    """Added tokens that are looked for together: content -> id, None for those read as text."""

    ids: dict[str, int | None]
    pattern: re.Pattern[str]
    # The tokens that hold no other one: a text without these has no token of the set.
    shortest: tuple[str, ...]

    def cut(self, text: str) -> Iterator[str | int]:
        """The text in order: ids of tokens and the text between them, the longest token first."""
        start = 0
        for found in self.pattern.finditer(text):
            number = self.ids[found[0]]
            if number is not None:
                if start < found.start():
                    yield text[start : found.start()]
                yield number
                start = found.end()
        if start < len(text):
            yield text[start:]

    def are_in(self, text: str) -> bool:
        """Whether `cut` has anything to cut, or might have."""
        return any(token in text for token in self.shortest)


@dataclass(frozen=True)
class FastEncoder:
    """Text -> ids: `core` does the work, `plain` what the core would do otherwise."""

    plain: Tokenizer
    core: Callable[[str], list[int]]
    compose: Callable[[str], str]
    agreement: Agreement
    raw_tokens: AddedTokens
    composed_tokens: AddedTokens

    def __call__(self, text: str) -> list[int]:
        """Ids of the text, without special tokens that the tokenizer would put around it."""
        ids = self._encode(text)
        if ids is None:
            return list(self.plain.encode(text, add_special_tokens=False).ids)
        return ids

    def _encode(self, text: str) -> list[int] | None:
        """The same; None for a text that must go the plain way."""
        if len(text) >= LONG_RUN and _has_long_run(text):
            return None
        if self.raw_tokens.are_in(text):
            return self._joined(self.raw_tokens.cut(text), self._encode_raw)
        return self._encode_raw(text)

    def _encode_raw(self, text: str) -> list[int] | None:
        composed = text
        if not text.isascii() and not self.agreement.is_usual(text):
            # The raw text comes first: only text that UTF-8 can hold can be composed.
            if not self.agreement(text):
                return None
            composed = self.compose(text)
            if not self.agreement(composed):
                return None
        if self.composed_tokens.are_in(composed):
            return self._joined(self.composed_tokens.cut(composed), self.core)
        return self.core(composed)

    def _joined(
        self, parts: Iterator[str | int], encode: Callable[[str], list[int] | None]
    ) -> list[int] | None:
        ids: list[int] = []
        for part in parts:
            found = [part] if isinstance(part, int) else encode(part)
            if found is None:
                return None
            ids += found
        return ids


def _has_long_run(text: str) -> bool:
    # A run of twice the length holds one of these positions with enough of the run behind it.
    return any(_LONG_RUN.match(text, at) for at in range(0, len(text), LONG_RUN))


def _added_tokens(
    tokens: list[dict[str, Any]], special_is_text: bool, compose: Callable[[str], str]
) -> tuple[AddedTokens, AddedTokens] | None:
    """Those looked for in the raw text and in the composed one; None if one is beyond `cut`."""
    ids: tuple[dict[str, int | None], dict[str, int | None]] = ({}, {})
    for token in filter(lambda token: token["content"], tokens):
        is_text = special_is_text and token["special"]
        if not is_text and (token["single_word"] or token["lstrip"] or token["rstrip"]):
            return None
        content = compose(token["content"]) if token["normalized"] else token["content"]
        ids[token["normalized"]][content] = None if is_text else token["id"]
    raw, composed = (
        AddedTokens(
            ids=found,
            pattern=re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))),
            shortest=_shortest([token for token, number in found.items() if number is not None]),
        )
        for found in ids
    )
    return raw, composed


def _shortest(tokens: list[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for token in sorted(tokens, key=len):
        if not any(other in token for other in kept):
            kept.append(token)
    return tuple(kept)


def _is_equal(encoder: FastEncoder, parts: dict[str, Any]) -> bool:
    """Whether generated texts get the same ids both ways: a guard for what the rules overlook."""
    draw = random.Random(0)
    letters = byte_letters()
    words = [
        bytes(letters[letter] for letter in word).decode(errors="ignore")
        for word in draw.choices(list(parts["model"]["vocab"]), k=NUM_CHECKS)
        if set(word) <= letters.keys()
    ]
    others = [" ", "  ", "\n", "\r\n", "\t ", " \n \n", "'s", "'LL", "’t", "12345", "--", "...!"]
    others += [token["content"] for token in parts["added_tokens"]]
    strange = "".join(map(chr, [*range(1, 0x500), *range(0x2000, 0x2400), *range(0xAC00, 0xAC10)]))
    for _ in range(NUM_CHECKS):
        text = "".join(
            draw.choice(draw.choice([words, words, others, strange]) or others)
            for _ in range(draw.randrange(1, 9))
        )
        if encoder(text) != list(encoder.plain.encode(text, add_special_tokens=False).ids):
            return False
    return True
