"""An imported decoder and the data of its study must speak the same tokens."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from midstream.config import DecoderConfig
from midstream.data.examples import TextCodec
from midstream.work.evaluate_stage import check_vocabulary

DECODER = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=300)


def codec(*words: str) -> TextCodec:
    """A byte-level tokenizer with the rule that GPT-2's has: it trims, and adds no token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({word: i for i, word in enumerate([*letters, *words])}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    return TextCodec(found)


@pytest.mark.parametrize("begin", ["a", "<|endoftext|>", "", None])
@pytest.mark.parametrize("rule", ["a", None])
def test_what_begins_a_text_is_no_other_tokenizer(
    tmp_path: Path, begin: str | None, rule: str | None
) -> None:
    codec().beginning_with(rule).tokenizer.save(str(tmp_path / "tokenizer.json"))
    check_vocabulary(codec().beginning_with(begin), DECODER, tmp_path)


def test_other_tokens_and_too_many_of_them_are_refused(tmp_path: Path) -> None:
    codec("ab").tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"another tokenizer than .*tokenizer\.json"):
        check_vocabulary(codec("cd"), DECODER, tmp_path)
    small = DECODER.model_copy(update={"vocab_size": 200})
    with pytest.raises(ValueError, match=r"ids up to 258, .* has 200 rows"):
        check_vocabulary(codec("ab"), small, tmp_path)
