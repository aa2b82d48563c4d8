"""The ranks with which tiktoken's core forms the tokens of a byte-level BPE model.

tiktoken merges whatever pair forms the token of lowest rank; `tokenizers` merges listed pairs in
the order of the list. Both do the same if every part of a merge was formed before it, the merges
that form one token stand together, and each token, encoded by itself, is one token: a pair whose
bytes are a token's is then merged before anything of higher rank. Tokens that are not reached that
way are never formed by `tokenizers`, and are left out.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

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
