"""Tokenizers of the kinds that public models use, and texts that are hard to tokenise."""

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis import strategies as st
from made_inputs import shared
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from midstream.data.examples import END_OF_TEXT, SEPARATOR
from midstream.data.tokenise import (
    GPT2_PATTERN,
    GPT4O_PATTERN,
    QWEN_PATTERN,
    FastEncoder,
    fast_encoder,
    open_tokenizer,
)
from midstream.data.tokenise import LLAMA3_PATTERN as LLAMA

LANGUAGE = [
    "The captain's daughter said she'll go, and they've seen 12345 ships in 1892.",
    "It wasn't the harbour; I'm sure it's   the   other one...\n\n\tDON'T you'd say so?",
    "naïve café, Ünïcödé, Ελληνικά, русский язык, 日本語のテキスト, 한국어, 🙂🎉👩‍👩‍👧 e\u0301",
    "for (int i = 0; i < 10; ++i) {\r\n    sum += values[i] * 0.25;\r\n}\n\n\n",
] * 3


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def trained(pattern: str | None = None, vocab_size: int = 700) -> Tokenizer:
    """A byte-level BPE of the language above, with the split given or GPT-2's own."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        found.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found.train_from_iterator(LANGUAGE, trainer)
    return found


def changed(tokenizer: Tokenizer, **model: Any) -> Tokenizer:
    """The same tokenizer but for these fields of its model."""
    parts = json.loads(tokenizer.to_str())
    parts["model"] |= model
    return Tokenizer.from_str(json.dumps(parts))


def with_shuffled_ids() -> Tokenizer:
    vocab = trained().get_vocab(with_added_tokens=False)
    ids = random.Random(1).sample(range(len(vocab)), len(vocab))
    return changed(trained(), vocab=dict(zip(vocab, ids, strict=True)), added_tokens=[])


def with_added_tokens() -> Tokenizer:
    """Runs of spaces as GPT-NeoX has them, tokens that overlap, and raw ones beside composed."""
    found = trained()
    found.normalizer = normalizers.NFC()
    found.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 9)])
    found.add_tokens([AddedToken(x, normalized=True) for x in ("the", "they", "e\u0301", "\n\n")])
    found.add_tokens([AddedToken(x, normalized=False) for x in ("[x]", "x]y", "a\u0301", "|>")])
    found.add_special_tokens(["<|im  start|>", "[x][x]"])
    return found


def with_a_prefix_behind() -> Tokenizer:
    found = trained(LLAMA)
    found.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return found


def ignoring_merges() -> Tokenizer:
    """Words of the vocabulary that no merge forms, which such a tokenizer takes whole."""
    vocab = trained(LLAMA).get_vocab(with_added_tokens=False)
    extra = {word: len(vocab) + n for n, word in enumerate(["zqxj", "Ġqzqz", "ĊĊĊĊĊ", "zzzz"])}
    return changed(trained(LLAMA), vocab=vocab | extra, ignore_merges=True)


MADE: dict[str, Callable[[], Tokenizer]] = {
    "as prepare trains it": trained,
    "as Llama 3 splits": lambda: trained(LLAMA),
    "as Qwen splits": lambda: trained(QWEN_PATTERN),
    "as GPT-4o splits": lambda: trained(GPT4O_PATTERN),
    "gaps removed": lambda: with_split(split(Regex(LLAMA), "removed", invert=True)),
    "GPT-2's split in words": lambda: trained(GPT2_PATTERN),
    "ids in another order": with_shuffled_ids,
    "added tokens": with_added_tokens,
    "a template": with_a_prefix_behind,
    "merges ignored": ignoring_merges,
}


@cache
def pair(name: str) -> tuple[Tokenizer, FastEncoder]:
    """A tokenizer of `MADE` or GPT-NeoX's, as TextCodec sets it, and its fast encoder."""
    neox = "gpt_neox_tokenizer/20B_tokenizer.json"
    tokenizer = open_tokenizer(shared(neox)) if name == "neox" else MADE[name]()
    tokenizer.encode_special_tokens = True
    encoder = fast_encoder(tokenizer)
    assert isinstance(encoder, FastEncoder), name
    return tokenizer, encoder


MARKS = [
    *("<|endoftext|>", "<|padding|>", SEPARATOR, "<|im  start|>", "[x]", "[x]y", "[x][x]", "|>"),
    *(" ", "  ", " " * 7, " " * 30, "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", " \n ", "\u3000"),
    *("\x85", "\u2028", "\u200d", "\ufeff", "\x00", "\x1c", "\x1f ", "\u180e", "\u00a0"),
    *("'s", "'S", "'ll", "'LL", "'ſ", "'\u212a", "’s", "''", "'", "ß", "ﬀ", "İ", "Ǆ", "ǅ"),
    *("the", "they", " they", "captain", "DON'T", "12345", "٣٤٥", "½", "Ⅷ"),
    *("zqxj", " qzqz", "zzzz", "e\u0301", "é", "a\u0301", "\u0301", "\u0345\u0334"),
    *("\u1100\u1161\u11a8", "\u0958", "\u212b", "🙂", "👩‍👩‍👧", "🇩🇪", "日本語", "한국어"),
    *("\U0001f1e6", "\U000e0041", "\U00011938", "\U000105d2"),
]
TEXTS = st.lists(
    st.sampled_from(MARKS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=12,
).map("".join)


def with_split(split: Any) -> Tokenizer:
    found = trained()
    found.pre_tokenizer = split
    return found


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def split(pattern: Any, behavior: str, *, invert: bool = False) -> Any:
    step = pre_tokenizers.Split(pattern, behavior, invert)
    return pre_tokenizers.Sequence([step, byte_level(use_regex=False)])
