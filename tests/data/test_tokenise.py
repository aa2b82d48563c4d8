"""Fast tokenising: the ids of `tokenizers`, whatever the text; nothing where that cannot be had."""

import gzip
import json
import pickle
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import LANGUAGE, LLAMA, MADE, SHARED, TEXTS, pair, plain_ids, trained
from tokenizers import Tokenizer, normalizers

from midstream.data.examples import END_OF_TEXT, SEPARATOR, TextCodec
from midstream.data.tokenise import COMPOSABLE, LONG_RUN, fast_encoder, open_tokenizer

# Characters of a folder's first text that the quick test looks at.
NUM_HEAD = 20_000
FOLDERS = [
    *("text_novels", "text_wikitext2", "text_web_wiki", "text_math", "bench_text", "coco_mini"),
    *("caption_flickr8k", "caption_noto_emoji", "vqa_v2_text", "vqa_easy", "vqa_daquar"),
    *(
        "pope_questions",
        "instruct_samples",
        "refcoco_style",
        "vqa_official_samples",
        "text_in_image",
    ),
]


@pytest.mark.parametrize("name", ["neox", *MADE])
@given(text=TEXTS)
@settings(max_examples=50, deadline=None)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["as GPT-4o splits", "added tokens"])
@pytest.mark.parametrize("plane", [0, 1, 2, 3, 14])
def test_every_character_gets_the_ids_of_tokenizers(name: str, plane: int) -> None:
    check_characters(name, range(plane << 16, (plane + 1) << 16, 1 if plane < 2 else 5))


@cache
def texts_of(folder: str) -> list[str]:
    """All text files of a folder of real data: as they are, in pieces; strings of JSON alone."""
    if not (SHARED / folder).is_dir():
        pytest.skip(f"the real data are not at {SHARED}; docs/real-data.md lists them")
    found: list[str] = []
    for path in sorted((SHARED / folder).rglob("*")):
        if path.suffix not in {".txt", ".tex", ".md", ".json", ".jsonl", ".csv", ".tsv", ".gzip"}:
            continue
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
    texts = texts_of(folder)
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
@pytest.mark.parametrize(
    ("run", "count"),
    [(run, count) for run in RUNS for count in (LONG_RUN - 1, 2 * LONG_RUN, 60_000)]
    + [(" ", 1_100_000)],
)
@pytest.mark.parametrize("name", ["as Llama 3 splits", "added tokens"])
def test_long_runs_get_the_ids_of_tokenizers(name: str, run: str, count: int) -> None:
    tokenizer, encoder = pair(name)
    text = "head " + run * (count // len(run)) + "tail"
    assert encoder(text) == plain_ids(tokenizer, text)


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
    with pytest.raises(FileNotFoundError, match=r"no file .*tokenizer\.json.*form of a hub name"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file absent\.json.*form of a hub name"):
        open_tokenizer("absent.json")
    with pytest.raises(FileNotFoundError, match=r"no file nobody/none.*the hub gave none.*path"):
        open_tokenizer("nobody/none")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer file"):
        open_tokenizer(str(tmp_path / "broken.json"))
