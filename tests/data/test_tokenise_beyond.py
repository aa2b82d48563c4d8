"""Tokenizers beyond tiktoken's core keep their own ids and have no fast encoder."""

from collections.abc import Callable

import pytest
from made_tokenizers import LLAMA, byte_level, changed, plain_ids, split, trained, with_split
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from midstream.data.examples import END_OF_TEXT, TextCodec
from midstream.data.tokenise import fast_encoder


def with_token(token: AddedToken) -> Tokenizer:
    found = trained()
    found.add_tokens([token])
    return found


def with_settings(how: str) -> Tokenizer:
    found = trained()
    if how == "truncation":
        found.enable_truncation(5)
    elif how == "padding":
        found.enable_padding(length=50)
    else:
        found.normalizer = {"nfkc": normalizers.NFKC(), "lower": normalizers.Lowercase()}[how]
    return found


def without_a_byte() -> Tokenizer:
    vocab = trained().get_vocab(with_added_tokens=False)
    kept = {word: number for word, number in vocab.items() if word != "~"}
    return changed(trained(), vocab=kept)


def taking_two_tokens_whole() -> Tokenizer:
    vocab = trained().get_vocab(with_added_tokens=False)
    word = next(x for x in ("~@", "@~", "~^") if x not in vocab)
    return changed(trained(), vocab=vocab | {word: len(vocab)}, ignore_merges=True)


BEYOND: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece": lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
    "Unigram": lambda: Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0, False)),
    "WordLevel": lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    "dropout": lambda: changed(trained(), dropout=0.1),
    "byte fallback": lambda: changed(trained(), byte_fallback=True),
    "a prefix inside words": lambda: changed(trained(), continuing_subword_prefix="##", merges=[]),
    "a suffix of words": lambda: changed(trained(), end_of_word_suffix="</w>"),
    "a byte missing": without_a_byte,
    "two tokens taken whole": taking_two_tokens_whole,
    "no split": lambda: with_split(None),
    "a prefix space": lambda: with_split(byte_level(add_prefix_space=True)),
    "whole texts": lambda: with_split(byte_level(use_regex=False)),
    "another split": lambda: with_split(pre_tokenizers.Whitespace()),
    "digits apart": lambda: with_split(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])
    ),
    "a split into merged parts": lambda: with_split(split(Regex(LLAMA), "merged_with_next")),
    "a split at a string": lambda: with_split(split(" ", "isolated")),
    "a split that keeps gaps": lambda: with_split(split(Regex(r"\p{L}+|\s+"), "isolated")),
    "a split with a look behind": lambda: with_split(split(Regex(r"(?<=a)b|[\s\S]"), "isolated")),
    "NFKC": lambda: with_settings("nfkc"),
    "lower case": lambda: with_settings("lower"),
    "truncation": lambda: with_settings("truncation"),
    "padding": lambda: with_settings("padding"),
    "a token that strips": lambda: with_token(AddedToken("the", lstrip=True)),
    "a token that is a word": lambda: with_token(AddedToken("the", single_word=True)),
}


@pytest.mark.parametrize("what", BEYOND)
def test_what_cannot_be_expressed_has_no_fast_encoder_and_its_own_ids(what: str) -> None:
    assert fast_encoder(BEYOND[what]()) is None
    if what not in {"dropout", "truncation", "padding"}:
        codec, tokenizer = TextCodec(BEYOND[what]()), TextCodec(BEYOND[what]()).tokenizer
        texts = [f"a the  ﬁrst {END_OF_TEXT} A 12\n", "a", ""]
        assert codec.encode_many(texts) == [plain_ids(tokenizer, text) for text in texts]
