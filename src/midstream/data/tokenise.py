"""Tokenizers: opening one, and encoding with tiktoken's core where it gives the same ids.

That is for known splits, of characters that both class alike, and for merges in order of rank.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import Split

from midstream.config import read_tokenizer

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

# Every pattern ends like this and matches any one character.
_TAIL = r"|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _UPPER, _LOWER = r"\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}", r"\p{Ll}"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _TAIL
LLAMA3_PATTERN = (
    _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + _TAIL
)
QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
GPT4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_LETTERS}]*[{_LOWER}{_LETTERS}]+{_SUFFIXES}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_LETTERS}]+[{_LOWER}{_LETTERS}]*{_SUFFIXES}?|"
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    + _TAIL
)
# The splits that both engines read alike, given equal tables of characters.
PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN, GPT4O_PATTERN)
_BLOCK_BITS = 10
_SURROGATES = range(0xD800 >> _BLOCK_BITS, 0xE000 >> _BLOCK_BITS)
# Bytes that no UTF-8 text holds; a tokenizer need not know them.
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}


def open_tokenizer(name_or_file: str) -> Tokenizer:
    """A tokenizer from its JSON file, a folder that holds `tokenizer.json`, or a hub name.

    Raises FileNotFoundError that lists what was tried if it is found nowhere, ValueError if the
    file is not one of `tokenizers`.
    """
    path = Path(name_or_file).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file() and file.suffix != ".model":
        return read_tokenizer(file)
    if path.is_dir() or file.suffix == ".model":
        raise FileNotFoundError(
            f"tokenizer {name_or_file!r} has no tokenizer.json; transformers makes one of "
            "sentencepiece's tokenizer.model, or of vocab.json and merges.txt: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
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
    pattern = _pattern_of(parts["pre_tokenizer"])
    is_plain = parts["truncation"] is None and parts["padding"] is None
    if not is_plain or pattern is None or not _is_byte_level(parts["model"]):
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
    # tiktoken tries alternatives beside a look-ahead one by one, a group without one at once.
    grouped = f"(?:{pattern.removesuffix(_TAIL)}){_TAIL}"
    core = Encoding(
        "fast", pat_str=grouped, mergeable_ranks=ranks.ranks, special_tokens={}
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
    agreement: "Agreement"
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
    kept = [{token for token, number in found.items() if number is not None} for found in ids]
    raw, composed = (
        AddedTokens(
            ids=found,
            pattern=re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))),
            shortest=tuple(x for x in held if not any(y in x for y in held - {x})),
        )
        for found, held in zip(ids, kept, strict=True)
    )
    return raw, composed


def _is_equal(encoder: FastEncoder, parts: dict[str, Any]) -> bool:
    """Whether generated texts get the same ids both ways: a guard for what the rules overlook."""
    draw = random.Random(0)
    letters = _byte_letters()
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


def _pattern_of(part: dict[str, Any] | None) -> str | None:
    """The one of `PATTERNS` at which a byte-level pre-tokenizer cuts, as its JSON has it."""
    steps = [] if part is None else part.get("pretokenizers", [part])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    uses_own = steps[-1].get("use_regex", True)
    if len(steps) == 1 and uses_own:
        return GPT2_PATTERN
    if len(steps) != 2 or steps[0]["type"] != "Split" or uses_own:
        return None
    # Removing what lies between the matches is the same: nothing does.
    cuts = (steps[0]["behavior"], steps[0]["invert"]) in (("Isolated", False), ("Removed", True))
    text = steps[0]["pattern"].get("Regex")
    return text if cuts and text in PATTERNS else None


class Agreement:
    """Whether both engines cut a text alike at one of `PATTERNS`: a call with the text says so.

    Blocks of 1,024 characters are compared when a text first holds one of theirs. `encoding` makes
    tiktoken's engine; `changing` matches what a normaliser may change.
    """

    def __init__(
        self, pattern: str, encoding: Callable[..., Any], *, changing: re.Pattern[str] | None
    ) -> None:
        letters = {bytes([number]): number for number in range(256)}
        self._folds = "(?i:" in pattern
        self._changing = changing
        classes = {r"\s", *re.findall(r"\\p\{\w+\}", pattern)}
        if self._folds:
            classes |= {f"(?i:{letter})" for letter in "delmrstv"}
        self._engines = [
            (
                Split(Regex(f"(?:{one})+"), "removed"),
                encoding("class", pat_str=one, mergeable_ranks=letters, special_tokens={}),
            )
            for one in sorted(classes)
        ]
        self._compared: set[int] = set()
        # The insides of character classes: what both cut alike, and what of it nothing changes.
        self._agreed = self._fixed = ""
        self._unknown = self._unusual = re.compile("")
        self._compare(0)

    def is_usual(self, text: str) -> bool:
        """Whether the text is known to be cut alike, and no normaliser can change it."""
        return self._unusual.search(text) is None

    def __call__(self, text: str) -> bool:
        start = 0
        while found := self._unknown.search(text, start):
            block = ord(found[0]) >> _BLOCK_BITS
            if block in self._compared or block in _SURROGATES:
                return False
            self._compare(block)
            start = found.start()
        return True

    def _compare(self, block: int) -> None:
        """Add the block's characters that both sides put into the same classes."""
        first = block << _BLOCK_BITS
        characters = [chr(code) for code in range(first, first + (1 << _BLOCK_BITS))]
        joined = "".join(characters)
        strange: set[str] = set()
        for split, encoding in self._engines:
            rest = "".join(piece for piece, _ in split.pre_tokenize_str(joined))
            mine = set(characters) - set(rest)
            strange |= mine ^ set(bytes(encoding.encode_ordinary(joined)).decode())
        if self._folds:
            # Characters that fold to several letters may match a row of letters.
            strange |= {letter for letter in characters if len(letter.casefold()) > 1}
        agreed = [c for c in characters if c not in strange]
        self._agreed += _ranges(agreed)
        self._fixed += _ranges(
            [c for c in agreed if not (self._changing and self._changing.match(c))]
        )
        self._unknown, self._unusual = _but(self._agreed), _but(self._fixed)
        self._compared.add(block)


def _ranges(characters: list[str]) -> str:
    """The inside of a character class of `re` that holds these, which are in order."""
    codes = [ord(character) for character in characters]
    starts = [c for before, c in zip([-2, *codes], codes, strict=False) if c != before + 1]
    ends = [c for c, after in zip(codes, [*codes[1:], -2], strict=False) if after != c + 1]
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(starts, ends, strict=True))


def _but(ranges: str) -> re.Pattern[str]:
    """Matches any one character but these."""
    return re.compile(f"[^{ranges}]" if ranges else "(?s:.)")


@dataclass(frozen=True)
class Ranks:
    """Bytes -> rank; `ids[rank]` is the token's id, or the ranks are the ids if it is None."""

    ranks: dict[bytes, int]
    ids: list[int] | None


def _is_byte_level(model: dict[str, Any]) -> bool:
    """Whether it is BPE whose merges depend on nothing but the text."""
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model["type"] == "BPE" and not any(model.get(name) for name in others)


def _byte_letters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def ranks_of(model: dict[str, Any]) -> Ranks | None:
    """Ranks with which tiktoken forms the model's tokens; None if there are none."""
    vocab: dict[str, int] = model["vocab"]
    letters = {letter: byte for letter, byte in _byte_letters().items() if letter in vocab}
    if set(letters.values()) | _NEVER != set(range(256)) or len(set(vocab.values())) < len(vocab):
        return None
    formed = _formed(model["merges"], letters)
    if formed is None:
        return None
    words = [word for word in vocab if len(word) > 1 and set(word) <= letters.keys()]
    lengths = _lengths_alone(model, words)
    chosen = [word for word in formed if lengths[word] == 1]
    if model.get("ignore_merges"):
        # A word of the vocabulary is one token even where no merge leads to it; as part of a
        # longer word it is not, and tiktoken would form it there from two tokens.
        if 2 in lengths.values():
            return None
        chosen += [word for word in words if lengths[word] > 2]
    order = [*letters, *chosen]
    ids = [vocab[word] for word in order]
    in_order = all(
        a < b for a, b in zip(ids[len(letters) :], ids[len(letters) + 1 :], strict=False)
    )
    numbers = ids if in_order else range(len(ids))
    ranks = {
        bytes(letters[letter] for letter in word): number
        for word, number in zip(order, numbers, strict=True)
    }
    return Ranks(ranks, None if in_order else ids)


def _formed(merges: list[Any], letters: dict[str, int]) -> list[str] | None:
    """The tokens that merges form, in order; None if one uses a later one or comes back."""
    formed: dict[str, None] = {}
    last = ""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        word = left + right
        known = all(part in formed or part in letters for part in (left, right))
        if not known or (word in formed and word != last):
            return None
        formed[word] = None
        last = word
    return list(formed)


def _lengths_alone(model: dict[str, Any], words: list[str]) -> dict[str, int]:
    """How many tokens merges alone make of each word."""
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    alone = Tokenizer(models.BPE(model["vocab"], merges))
    encoded = alone.encode(words, is_pretokenized=True)
    counts = Counter(encoded.word_ids)
    return {word: counts[number] for number, word in enumerate(words)}
