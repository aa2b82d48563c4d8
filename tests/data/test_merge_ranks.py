"""Ranks: the tokens that merges form, in whatever order they and their ids come."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import plain_ids, trained
from tokenizers import Tokenizer, models, pre_tokenizers

from midstream.data.tiktoken_core import ranks_of
from midstream.data.tokenise import fast_encoder


@given(seed=st.integers(0, 10**9))
@settings(max_examples=30, deadline=None)
def test_any_ordered_merges_are_expressed(seed: int) -> None:
    """Merges drawn at random hold many tokens that no text leads to."""
    draw = random.Random(seed)
    words, merges = list("abc"), list[tuple[str, str]]()
    while len(merges) < 25:
        left, right = draw.choice(words), draw.choice(words)
        if left + right not in words:
            merges.append((left, right))
            words.append(left + right)
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set("abc"))
    order = [*letters, *words]
    if seed % 2:
        draw.shuffle(order)
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(order)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder = fast_encoder(tokenizer)
    assert encoder is not None
    for _ in range(100):
        text = "".join(draw.choices("abc", k=draw.randrange(1, 25)))
        assert encoder(text) == plain_ids(tokenizer, text)


def test_several_merges_of_one_token_are_expressed_where_they_stand_together() -> None:
    vocab = {x: n for n, x in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for word in ("ab", "bc", "abc", "abcd"):
        vocab[word] = len(vocab)
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("abc", "d")]
    apart = [("a", "b"), ("b", "c"), ("a", "bc"), ("abc", "d"), ("ab", "c")]
    for order, expressed in ((merges, True), (apart, False)):
        tokenizer = Tokenizer(models.BPE(vocab, order))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoder = fast_encoder(tokenizer)
        assert (encoder is not None) == expressed
        if encoder is not None:
            assert encoder("abcdbcabc") == plain_ids(tokenizer, "abcdbcabc")


def test_a_word_taken_whole_that_two_tokens_would_form_is_not_expressed() -> None:
    model = json.loads(trained().to_str())["model"] | {"ignore_merges": True}
    ranks = ranks_of(model)
    assert ranks is not None
    for word, expressed in (("~@", False), ("~@^", True), ("~@^`", True)):
        found = ranks_of(model | {"vocab": model["vocab"] | {word: len(model["vocab"])}})
        assert (found is not None) == expressed
        if found is not None:
            assert found.ranks.keys() - ranks.ranks.keys() == {word.encode()}
