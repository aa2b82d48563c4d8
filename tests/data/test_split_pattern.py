"""Split patterns: read alike by both engines, or refused."""

from typing import Any

import pytest
import tiktoken
from made_tokenizers import plain_ids, split, with_split
from tokenizers import Regex

from midstream.data.tiktoken_core import GPT2_PATTERN, Agreement, read_pattern
from midstream.data.tokenise import fast_encoder


def test_a_split_that_removes_gaps_drops_them_in_both() -> None:
    tokenizer = with_split(split(Regex(r"\p{L}+|\s+"), "removed", invert=True))
    encoder = fast_encoder(tokenizer)
    assert encoder is not None
    text = "the captain, 12 ships; naïve!"
    assert encoder(text) == plain_ids(tokenizer, text)
    assert tokenizer.decode(encoder(text)).replace("Ġ", " ").count(",") == 0


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"a*?", r"a++", r"a?+", r"\w+$", r"^a", r".", r"\bthe", r"(?<=a)b", r"(?!\S)a", r"\1a"),
        *(r"[a&&b]", r"\h+", r"[a-z]", r"(a)", r"(?x:a b)", r"a{0,3}", r"(?:a(?:b))", r"a|", r"a?"),
        *(r"(?:a|)", r"\x41", r"(?i)a", r"[[:alpha:]]", r"\p{Greek}", "", r"a\s+(?!\S)"),
    ],
)
def test_a_pattern_that_engines_may_read_otherwise_is_refused(pattern: str) -> None:
    assert read_pattern(pattern) is None


def test_characters_on_which_the_engines_differ_are_noticed() -> None:
    def older(name: str, pat_str: str, **others: Any) -> tiktoken.Encoding:
        """An engine whose tables lack Cyrillic."""
        return tiktoken.Encoding(
            name, pat_str=pat_str.replace(r"\p{L}", r"[\p{L}--\p{Cyrillic}]"), **others
        )

    for gaps in ("kept", "dropped"):
        pattern = read_pattern(GPT2_PATTERN, gaps)
        assert pattern is not None
        agreement = Agreement(pattern, older, changing=None)
        assert agreement("plain text, naïve, Ελληνικά, 日本語")
        assert agreement.is_usual("the same again 日本")
        assert not agreement("plain text and русский")
        assert not agreement.is_usual("plain text and русский")
        assert not agreement("half a pair \ud800")
