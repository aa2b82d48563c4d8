"""Tokens that come in, and the rows they get."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from midstream.data.examples import AGENT_STOP, SEPARATOR, TextCodec
from midstream.exchange.import_model import plan_vocabulary, resize, with_mean_rows


def words(number: int, *special: str) -> Tokenizer:
    """A tokenizer of `number` words, then special tokens."""
    tokenizer = Tokenizer(WordLevel({f"w{one}": one for one in range(number)}, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in special])
    return tokenizer


@given(
    words_held=st.integers(2, 200),
    spare=st.integers(0, 90),
    multiple=st.integers(1, 130),
    more=st.integers(0, 3),
)
def test_rows_never_shrink_cover_every_id_and_are_the_least_such_multiple(
    words_held: int, spare: int, multiple: int, more: int
) -> None:
    rows = words_held + spare
    added = [f"<|more{one}|>" for one in range(more)]
    found = plan_vocabulary(words(words_held), rows, add_tokens=added, multiple=multiple)
    assert found.codec is not None
    needed = max(rows, words_held + 2 + more)
    assert found.rows_after % multiple == 0
    assert needed <= found.rows_after < needed + multiple
    assert found.rows_before == rows
    assert found.codec.size == words_held + 2 + more


END, HELD = "<|endoftext|>", ("<|endoftext|>", SEPARATOR, AGENT_STOP)


@pytest.mark.parametrize(
    ("held", "rows", "asked", "multiple", "added", "after"),
    [
        ((), 10, [AGENT_STOP], 64, {END: 10, SEPARATOR: 11, AGENT_STOP: 12}, 64),
        # A tokenizer's own end of text is kept.
        *((((own,), 11, [], 1, {SEPARATOR: 11}, 12)) for own in (END, "<|end_of_text|>", "</s>")),
        # What is there already is not told as added; spare rows are used first.
        (HELD, 13, [AGENT_STOP], 1, {}, 13),
        ((END,), 28, [], 14, {SEPARATOR: 11}, 28),
    ],
)
def test_tokens_that_came_in_are_told_with_their_ids(
    held: tuple[str, ...],
    rows: int,
    asked: list[str],
    multiple: int,
    added: dict[str, int],
    after: int,
) -> None:
    found = plan_vocabulary(words(10, *held), rows, add_tokens=asked, multiple=multiple)
    named = [{"token": token, "id": number} for token, number in added.items()]
    assert found.as_json() == {"rows_before": rows, "rows_after": after, "added": named}
    assert found.codec is not None
    assert found.codec.end_of_text == 10
    # They survive the file.
    again = TextCodec(Tokenizer.from_str(found.codec.tokenizer.to_str()))
    assert again.stop_ids == found.codec.stop_ids >= set(added.values())
    assert again.size == found.codec.size


def test_a_rule_that_begins_texts_with_no_token_is_refused() -> None:
    tokenizer = words(20, END)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": END, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {END: {"id": END, "ids": [77], "tokens": [END]}},
    }
    with pytest.raises(ValueError, match="puts id 77 before each text, which is none of"):
        plan_vocabulary(Tokenizer.from_str(json.dumps(content)), 256, add_tokens=[], multiple=64)


def test_added_tokens_behind_the_rows_get_some_whether_special_or_not() -> None:
    tokenizer = words(256, END)
    tokenizer.add_tokens(["<tool>"])
    found = plan_vocabulary(tokenizer, 256, add_tokens=[], multiple=64)
    assert (found.behind, found.rows_after) == (("<tool>", END), 320)


def test_tokens_cannot_be_added_without_a_tokenizer_or_without_text() -> None:
    with pytest.raises(ValueError, match=r"no tokenizer to add <\|agent_stop\|> to.*--tokenizer"):
        plan_vocabulary(None, 256, add_tokens=[AGENT_STOP], multiple=64)
    with pytest.raises(ValueError, match="'  ' is no token"):
        plan_vocabulary(words(5), 256, add_tokens=["  "], multiple=64)
    assert plan_vocabulary(None, 250, add_tokens=[], multiple=64).rows_after == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_old_rows_are_bit_equal_and_new_ones_their_mean(dtype: torch.dtype) -> None:
    old = torch.randn(37, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    new = with_mean_rows(old, 64)
    assert new.dtype == dtype
    assert torch.equal(new[:37], old)
    mean = old.double().mean(dim=0).to(dtype)
    assert torch.equal(new[37:], mean.expand(27, 8))


def test_a_new_token_is_never_likelier_than_a_token_drawn_at_random() -> None:
    source = torch.Generator().manual_seed(1)
    output = with_mean_rows(torch.randn(50, 16, generator=source) - 0.3, 53)
    for scale in (0.1, 1.0, 10.0, 100.0):
        hidden = scale * torch.randn(200, 16, generator=source)
        likely = (hidden @ output.T).log_softmax(dim=-1)
        assert likely[:, 50:].max() <= -torch.log(torch.tensor(50.0)) + 1e-4


def test_moments_of_new_rows_are_zero_and_only_named_tensors_grow() -> None:
    tensors = {"embed": torch.rand(5, 2), "norm": torch.rand(2)}
    moments = {f"{key}.{name}": value + 1 for name, value in tensors.items()
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    moments |= {"step.embed": torch.tensor(7.0), "step.norm": torch.tensor(7.0)}
    grown, carried = resize(tensors, moments, {"embed": 8, "tied": 8})
    assert carried is not None
    assert grown.keys() == tensors.keys()
    assert grown["norm"] is tensors["norm"]
    assert grown["embed"].shape == (8, 2)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(carried[f"{key}.embed"][:5], moments[f"{key}.embed"])
        assert not carried[f"{key}.embed"][5:].any()
        assert torch.equal(carried[f"{key}.norm"], moments[f"{key}.norm"])
    assert carried["step.embed"] == 7.0
    assert resize(tensors, None, {"embed": 8})[1] is None
