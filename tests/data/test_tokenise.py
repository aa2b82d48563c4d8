"""Fast tokenising: the ids of `tokenizers`, whatever the text; nothing where that cannot be had."""

import gzip
import json
import pickle
import random
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inputs import shared
from made_tokenizers import (
    LANGUAGE,
    LLAMA,
    MADE,
    TEXTS,
    byte_level,
    changed,
    pair,
    plain_ids,
    split,
    trained,
    with_split,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from midstream.data.examples import END_OF_TEXT, SEPARATOR, TextCodec
from midstream.data.tokenise import (
    COMPOSABLE,
    GPT2_PATTERN,
    LONG_RUN,
    Agreement,
    fast_encoder,
    open_tokenizer,
    ranks_of,
)

# Characters of a folder's first text that the quick test looks at.
NUM_HEAD = 20_000
FOLDERS = [
    *("text_novels", "text_wikitext2", "text_web_wiki", "text_math", "bench_text", "coco_mini"),
    *("caption_flickr8k", "caption_noto_emoji", "vqa_v2_text", "vqa_easy", "vqa_daquar"),
    *("pope_questions", "instruct_samples", "refcoco_style", "vqa_official_samples"),
    "text_in_image",
]


@pytest.mark.parametrize("name", ["neox", *MADE])
@given(text=TEXTS)
@settings(max_examples=30, deadline=None)
def test_any_text_gets_the_ids_of_tokenizers(name: str, text: str) -> None:
    tokenizer, encoder = pair(name)
    assert encoder(text) == plain_ids(tokenizer, text)


def check_characters(name: str, codes: Iterable[int]) -> None:
    tokenizer, encoder = pair(name)
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 64):
        part = characters[start : start + 64]
        text = "".join(f"a{c}A{c}1{c}!{c} {c}\n{c}{c}e\u0301" for c in part)
        assert encoder(text) == plain_ids(tokenizer, text), f"U+{ord(part[0]):04X} and on"


@pytest.mark.parametrize("name", ["as GPT-4o splits", "added tokens"])
def test_characters_of_many_scripts_get_the_ids_of_tokenizers(name: str) -> None:
    rare = [*range(0xE0000, 0xE0200, 7), 0x30000, 0xF0000, 0x10FFFF]
    check_characters(name, [*range(0x600), *range(0x600, 0x3100, 9), *range(0xA000, 0x20000, 499)])
    check_characters(name, rare)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["as GPT-4o splits", "added tokens"])
@pytest.mark.parametrize("plane", [0, 1, 2, 3, 14])
def test_every_character_gets_the_ids_of_tokenizers(name: str, plane: int) -> None:
    check_characters(name, range(plane << 16, (plane + 1) << 16, 1 if plane < 2 else 5))


def texts_of(folder: str, *, ends: bool = False) -> list[str]:
    """The text files of a folder of real data, or the first and the last of them: as they are, in
    pieces; strings of JSON alone."""
    read = {".txt", ".tex", ".md", ".json", ".jsonl", ".csv", ".tsv", ".gzip"}
    paths = [path for path in sorted(Path(shared(folder)).rglob("*")) if path.suffix in read]
    found: list[str] = []
    for path in sorted({*paths[:1], *paths[-1:]}) if ends else paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gzip" else path.read_bytes()
        text = data.decode(errors="replace")
        found += [text[at : at + 30_000] for at in range(0, len(text), 30_000)]
        if path.suffix in {".json", ".jsonl"}:
            found += list(strings_of(records_of(text)))
    assert found, folder
    return found


def records_of(text: str) -> Any:
    """One value, or one a line whatever the file is called."""
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_of(inner)


@pytest.mark.parametrize("folder", FOLDERS)
def test_some_of_the_real_text_gets_the_ids_of_tokenizers(folder: str) -> None:
    tokenizer, encoder = pair("neox")
    texts = texts_of(folder, ends=True)
    texts = [texts[0][:NUM_HEAD], *texts[-100:]]
    while sum(map(len, texts)) > 5 * NUM_HEAD and len(texts) > 2:
        texts.pop()
    for text in texts:
        assert encoder(text) == plain_ids(tokenizer, text)


@pytest.mark.faults
@pytest.mark.parametrize("folder", FOLDERS)
def test_all_real_text_gets_the_ids_of_tokenizers(folder: str) -> None:
    tokenizer, _ = pair("neox")
    codec, texts = TextCodec(Tokenizer.from_str(tokenizer.to_str())), texts_of(folder)
    for start in range(0, len(texts), 500):
        part = texts[start : start + 500]
        expected = tokenizer.encode_batch(part, add_special_tokens=False)
        assert codec.encode_many(part) == [list(item.ids) for item in expected]


RUNS = ["a", "aé", "的", " ", "\n\t", "\u3000", "!", "1", "/\n", "x "]


# Whitespace overflows tiktoken's engine beyond a million characters.
@pytest.mark.parametrize("name", ["as Llama 3 splits", "added tokens"])
def test_long_runs_get_the_ids_of_tokenizers(name: str) -> None:
    tokenizer, encoder = pair(name)
    counts = [(run, count) for run in RUNS for count in (LONG_RUN - 1, 2 * LONG_RUN, 30_000)]
    for run, count in [*counts, (" ", 1_100_000)]:
        text = "head " + run * (count // len(run)) + "tail"
        assert encoder(text) == plain_ids(tokenizer, text), (run, count)


def test_what_is_not_composable_stays_as_it_is_whatever_stands_beside_it() -> None:
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    fixed = [c for c in every if not COMPOSABLE.match(c)]
    assert len(fixed) > 30_000
    joined = "".join(fixed)
    assert normalizers.NFC().normalize_str(joined) == joined
    # Nothing is moved and nothing is drawn into what stands before it.
    assert not [c for c in fixed if unicodedata.combining(c)]
    parts = [unicodedata.normalize("NFD", c) for c in every]
    behind = {part for whole in parts for part in whole[1:]}
    assert not behind & set(fixed)


def test_special_tokens_are_text_or_tokens_as_the_tokenizer_says() -> None:
    text = f"the {END_OF_TEXT} the{SEPARATOR}"
    for as_text in (True, False):
        tokenizer = trained()
        tokenizer.encode_special_tokens = as_text
        encoder = fast_encoder(tokenizer)
        assert encoder is not None
        assert encoder(text) == plain_ids(tokenizer, text)
        assert (0 in encoder(text)) != as_text


def test_later_changes_of_a_tokenizer_do_not_reach_its_fast_encoder() -> None:
    tokenizer = trained()
    encoder = fast_encoder(tokenizer)
    assert encoder is not None
    before = plain_ids(tokenizer, "the captain " + "x" * 3 * LONG_RUN)
    tokenizer.add_tokens(["captain", "xxx"])
    assert encoder("the captain " + "x" * 3 * LONG_RUN) == before


def test_text_that_is_no_unicode_is_refused_as_tokenizers_refuses_it() -> None:
    for name in MADE:
        with pytest.raises(TypeError):
            pair(name)[1]("half a pair: \ud83d")


@given(texts=st.lists(TEXTS, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_codec_sent_to_another_process_gives_the_same_ids(texts: list[str]) -> None:
    codec = TextCodec(trained())
    expected = codec.encode_many(texts)
    sent = pickle.loads(pickle.dumps(codec))
    assert sent.encode_many(texts) == expected == [sent.encode(text) for text in texts]
    assert (sent.end_of_text, sent.separator) == (codec.end_of_text, codec.separator)


def test_without_tiktoken_the_ids_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TextCodec(trained(LLAMA, 650)).encode_many(LANGUAGE)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = trained(LLAMA, 649)
    assert fast_encoder(tokenizer) is None
    assert TextCodec(tokenizer).encode_many(["the"]) == [plain_ids(tokenizer, "the")]
    plain = trained(LLAMA, 650)
    assert [plain_ids(plain, text) for text in LANGUAGE] == expected


def test_a_tokenizer_is_opened_by_its_file_or_its_folder(tmp_path: Path) -> None:
    trained().save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert open_tokenizer(str(name)).to_str() == trained().to_str()


def test_a_tokenizer_that_is_nowhere_is_named_with_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    for name in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json.*save_pretrained"):
            open_tokenizer(str(name))
    with pytest.raises(FileNotFoundError, match=r"no file absent\.json.*form of a hub name"):
        open_tokenizer("absent.json")
    with pytest.raises(FileNotFoundError, match=r"no file nobody/none.*the hub gave none.*path"):
        open_tokenizer("nobody/none")
    (tmp_path / "pointer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"pointer\.json is not a tokenizer .*git lfs pull"):
        open_tokenizer(str(tmp_path / "pointer.json"))
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer file"):
        open_tokenizer(str(tmp_path / "broken.json"))


def test_characters_on_which_the_engines_differ_are_noticed() -> None:
    def older(name: str, pat_str: str, **others: Any) -> tiktoken.Encoding:
        """An engine whose tables lack Cyrillic."""
        return tiktoken.Encoding(
            name, pat_str=pat_str.replace(r"\p{L}", r"[\p{L}--\p{Cyrillic}]"), **others
        )

    agreement = Agreement(GPT2_PATTERN, older, changing=None)
    assert agreement("plain text, naïve, Ελληνικά, 日本語")
    assert agreement.is_usual("the same again 日本")
    assert not agreement("plain text and русский")
    assert not agreement.is_usual("plain text and русский")
    assert not agreement("half a pair \ud800")


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
    "a split of no public model": lambda: with_split(split(Regex(r"\p{L}+|\s+"), "isolated")),
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
