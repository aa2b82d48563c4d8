"""When tiktoken's core gives the ids of `tokenizers`: split patterns and ranks.

The two have regular expression engines of their own, with tables of character classes of their
own. A pattern is taken only if it is made of what both read the same way; its classes are then
compared on the characters that a text holds, so that a newer table on one side is noticed.

tiktoken merges whatever pair forms the token of lowest rank; `tokenizers` merges listed pairs in
the order of the list. Both do the same if every part of a merge was formed before it, the merges
that form one token stand together, and each token, encoded by itself, is one token: a pair whose
bytes are a token's is then merged before anything of higher rank. Tokens that are not reached that
way are never formed by `tokenizers`, and are left out.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
from tokenizers import Tokenizer

Gaps = Literal["kept", "dropped"]
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_ESCAPE = r"\\[pP]\{[A-Z][a-z]?\}|\\[sSdDrnt]"
_ATOM = rf"(?:{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\[\]\\^&-])+\]|[^\\\[\](){{}}.*+?|^$#&-])"
# A second sign behind a quantity would make it lazy or possessive; the engines differ there.
_QUANTITY = r"(?:[?*+]|\{[1-9]\d*(?:,\d*)?\})(?![?*+{])"
_ITEM = re.compile(
    rf"(?:(?P<atom>{_ATOM})|\(\?(?P<flag>i?):(?P<options>[^()]+)\))(?P<quantity>{_QUANTITY})?"
)
_OPTIONS = re.compile(rf"(?:{_ATOM})+(?:\|(?:{_ATOM})+)*")
_ALTERNATIVE = re.compile(r"(?:\([^()]*\)|\[(?:\\.|[^\]\\])*\]|\\.|[^|()\[\]\\])+")
# The one look-ahead that is taken: whitespace but for its last character.
_LOOK_AHEAD = r"\s+(?!\S)"

_BLOCK_BITS = 10
_SURROGATES = range(0xD800 >> _BLOCK_BITS, 0xE000 >> _BLOCK_BITS)


@dataclass(frozen=True)
class SplitPattern:
    """A pattern that both engines read alike, given equal tables.

    `text` matches what was asked for, faster. `atoms` are its character classes. `covers` are
    those of which any one character is a match by itself, whatever stands behind it. `folds` says
    that the case of some letters is ignored, `gaps` what becomes of text that nothing matches.
    """

    text: str
    atoms: frozenset[str]
    covers: frozenset[str]
    folds: bool
    gaps: Gaps


def split_of(part: dict[str, Any] | None) -> SplitPattern | None:
    """The split of a byte-level pre-tokenizer, as its JSON has it; None if it is beyond reach."""
    steps = [] if part is None else part.get("pretokenizers", [part])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    uses_own = steps[-1].get("use_regex", True)
    if len(steps) == 1 and uses_own:
        return read_pattern(GPT2_PATTERN)
    if len(steps) != 2 or steps[0]["type"] != "Split" or uses_own:
        return None
    kinds: dict[Any, Gaps] = {("Isolated", False): "kept", ("Removed", True): "dropped"}
    gaps = kinds.get((steps[0]["behavior"], steps[0]["invert"]))
    text = steps[0]["pattern"].get("Regex")
    return None if gaps is None or text is None else read_pattern(text, gaps)


def read_pattern(text: str, gaps: Gaps = "kept") -> SplitPattern | None:
    """The parts of a pattern; None if any is beyond what the engines surely read alike."""
    alternatives = _ALTERNATIVE.findall(text)
    if not alternatives or "|".join(alternatives) != text:
        return None
    atoms: set[str] = set()
    covers: set[str] = set()
    for alternative in alternatives:
        if alternative == _LOOK_AHEAD:
            atoms |= {r"\s", r"\S"}
            continue
        items = list(_ITEM.finditer(alternative))
        if "".join(item[0] for item in items) != alternative:
            return None
        needed = [item for item in items if item["quantity"] not in ("?", "*")]
        if not needed:
            return None
        for item in items:
            if item["options"] and not _OPTIONS.fullmatch(item["options"]):
                return None
            found = [item["atom"]] if item["atom"] else re.findall(_ATOM, item["options"])
            atoms |= {f"(?i:{atom})" if item["flag"] else atom for atom in found}
        quantity = needed[0]["quantity"] or "+"
        if len(needed) == 1 and needed[0]["atom"] and quantity.startswith(("+", "{1,")):
            covers.add(needed[0]["atom"])
    return SplitPattern(
        _grouped(alternatives), frozenset(atoms), frozenset(covers), "(?i:" in text, gaps
    )


def _grouped(alternatives: list[str]) -> str:
    """The same pattern with what stands before the look-ahead in one group.

    tiktoken's engine tries alternatives beside a look-ahead one by one, and a group without one
    at once.
    """
    if _LOOK_AHEAD not in alternatives[1:]:
        return "|".join(alternatives)
    at = alternatives.index(_LOOK_AHEAD)
    return "|".join([f"(?:{'|'.join(alternatives[:at])})", *alternatives[at:]])


class Agreement:
    """Whether both engines cut a text alike: a call with the text says so.

    Blocks of 1,024 characters are compared when a text first holds one of theirs. A character
    outside every match counts as a difference where gaps are kept, since tiktoken drops them.
    `encoding` makes tiktoken's engine; `changing` matches what a normaliser may change.
    """

    def __init__(
        self,
        pattern: SplitPattern,
        encoding: Callable[..., Any],
        *,
        changing: re.Pattern[str] | None,
    ) -> None:
        letters = {bytes([number]): number for number in range(256)}
        self._pattern = pattern
        self._changing = changing
        self._engines = {
            atom: (
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"(?:{atom})+"), "removed"),
                encoding("atom", pat_str=atom, mergeable_ranks=letters, special_tokens={}),
            )
            for atom in pattern.atoms | pattern.covers
        }
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
        outside = set(characters) if self._pattern.gaps == "kept" else set()
        for atom, (split, encoding) in self._engines.items():
            rest = "".join(piece for piece, _ in split.pre_tokenize_str(joined))
            mine = set(characters) - set(rest)
            strange |= mine ^ set(bytes(encoding.encode_ordinary(joined)).decode())
            if atom in self._pattern.covers:
                outside -= mine
        if self._pattern.folds:
            # Characters that fold to several letters may match a row of letters.
            strange |= {letter for letter in characters if len(letter.casefold()) > 1}
        agreed = [c for c in characters if c not in strange and c not in outside]
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


# Bytes that no UTF-8 text holds; a tokenizer need not know them.
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True)
class Ranks:
    """Bytes -> rank; `ids[rank]` is the token's id, or the ranks are the ids if it is None."""

    ranks: dict[bytes, int]
    ids: list[int] | None


def is_byte_level(model: dict[str, Any]) -> bool:
    """Whether it is BPE whose merges depend on nothing but the text."""
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model["type"] == "BPE" and not any(model.get(name) for name in others)


def byte_letters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def ranks_of(model: dict[str, Any]) -> Ranks | None:
    """Ranks with which tiktoken forms the model's tokens; None if there are none."""
    vocab: dict[str, int] = model["vocab"]
    letters = {letter: byte for letter, byte in byte_letters().items() if letter in vocab}
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
    alone = {**model, "ignore_merges": False}
    parts: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
    }
    parts |= {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    encoded = Tokenizer.from_str(json.dumps({**parts, "model": alone})).encode(
        words, is_pretokenized=True
    )
    counts = Counter(encoded.word_ids)
    return {word: counts[number] for number, word in enumerate(words)}
