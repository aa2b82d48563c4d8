"""Preparing a user's folder: what is indexed, what is kept, and sources prepared before."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import supervised
from made_inputs import as_parquet, run, times
from made_world import (
    CAPTIONS,
    TALKS,
    TEXTS,
    TRAINED,
    jpeg,
    prepared,
    world_of,
    write_talks,
    write_world,
)

from inputs import png
from midstream.config import PocketWorld, TokenizerFile, TrainedTokenizer
from midstream.core.identity import file_sha256, folder_fingerprint, world_fingerprint
from midstream.core.storage import verify
from midstream.data.examples import END_OF_TEXT, TextCodec
from midstream.data.formats.records import Section
from midstream.data.prepare import open_codec, prepare_world
from midstream.data.sources import Source
from preparing import open_sources, prepare

SECTIONS: dict[str, Section] = {
    "text/web": "text",
    "captions/pics": "captions",
    "instruct/talks": "conversations",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny world."""
    write_world(tmp_path / "my data")
    return tmp_path / "my data"


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared sources, and what was said of them."""

    out: Path
    results: dict[str, Any]

    @property
    def codec(self) -> TextCodec:
        return open_codec(self.out)

    @property
    def tokenizer(self) -> TokenizerFile:
        return tokenizer_of(self.out)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The same world, prepared elsewhere; it is only read."""
    base = tmp_path_factory.mktemp("first")
    write_world(base / "my data")
    return Prepared(base / "out", prepared(base / "my data", base / "out"))


@pytest.fixture
def begins(first: Prepared, tmp_path: Path) -> Path:
    """The file of its tokenizer with a rule of its own of what begins a text."""
    first.codec.beginning_with(END_OF_TEXT).tokenizer.save(str(tmp_path / "begins.json"))
    return tmp_path / "begins.json"


def tokenizer_of(out: Path) -> TokenizerFile:
    path = out / "tokenizer.json"
    return TokenizerFile(path=path, sha256=file_sha256(path))


def test_a_folder_is_indexed_from_end_to_end(root: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    before = times(root)
    results = prepare(world_of(root), TRAINED, out, lambda done, what: notes.append((done, what)))
    assert times(root) == before
    assert sorted(path.name for path in out.iterdir()) == ["sources", "tokenizer.json"]
    shards = list(out.glob("sources/*/source/shards/*"))
    assert len(shards) == 5
    for shard in shards:
        verify(shard)
    assert len([done for done, _ in notes if done == 1.0]) >= 3

    codec, sources = open_codec(out), open_sources(world_of(root), out)
    assert results["tokenizer_sha256"] == file_sha256(out / "tokenizer.json")
    assert results["vocab_size"] == codec.size <= 300
    assert list(sources) == ["pics", "talks", "web"]
    for name, kind, examples, images in [
        ("web", "text", 12, 0),
        ("pics", "caption", 5, 5),
        ("talks", "instruct", 3, 2),
    ]:
        summary = results["sources"][name]
        assert (summary["kind"], summary["num_examples"]) == (kind, examples)
        assert (summary["num_images"], summary["rejects"]) == (images, {})
        assert summary["num_tokens"] == sources[name].num_tokens
        assert summary["records"] == len(sources[name]) == examples
        assert summary["validation"] == {"examples": 0, "tokens": 0, "images": 0}
        assert summary["fingerprint"] == sources[name].index["fingerprint"]

    for example, text in enumerate(TEXTS):
        ids = sources["web"].input_ids(example).tolist()
        assert codec.decode(ids) == text
        assert ids[-1] == codec.end_of_text
    for example, caption in enumerate(CAPTIONS):
        ids = sources["pics"].input_ids(example).tolist()
        assert codec.decode(ids) == caption
        assert ids[0] == codec.separator
        assert sources["pics"].image_bytes(example) == jpeg(example)
        shard, sample = divmod(example, 3)
        described = sources["pics"].describe(example)
        assert described.endswith(f" captions/pics/00{shard}.tar, sample {3 * shard + sample:05d}")
    talks = sources["talks"]
    assert [bool(talks.places_of(example)) for example in range(3)] == [True, False, True]
    assert talks.image_bytes(0) == talks.image_bytes(2) == png(1)
    for example, replies in enumerate([" A boat. It is red.", " Hello.", " No."]):
        ids, mask = talks.input_ids(example), supervised(talks, example)
        assert mask is not None
        assert codec.decode(ids[np.asarray(mask) == 1].tolist()) == replies
        assert "<image>" not in codec.decode(ids.tolist())


def test_preparing_twice_elsewhere_gives_the_same_results_with_a_named_tokenizer_file_too(
    root: Path, tmp_path: Path, first: Prepared
) -> None:
    assert prepared(root, tmp_path / "again") == first.results
    path = tmp_path / "mine.json"
    shutil.copy(first.out / "tokenizer.json", path)
    named = prepared(root, tmp_path / "named", TokenizerFile(path=path, sha256=file_sha256(path)))
    path.unlink()
    assert named == first.results
    assert open_codec(tmp_path / "named").encode(TEXTS[3]) == first.codec.encode(TEXTS[3])


def test_examples_begin_as_the_study_says_whatever_the_tokenizers_own_rule(
    root: Path, tmp_path: Path, first: Prepared, begins: Path
) -> None:
    silent = TokenizerFile(path=begins, sha256=file_sha256(begins))
    with pytest.raises(
        ValueError, match=r"begins each text with '<\|endoftext\|>' by its own rule"
    ):
        prepared(root, tmp_path / "silent", silent)
    one = prepared(root, tmp_path / "one", TokenizerFile.read(begins))
    none = prepared(root, tmp_path / "none", TokenizerFile.read(begins, "none"))
    end_of_text = first.codec.end_of_text
    for name, counts in first.results["sources"].items():
        assert none["sources"][name]["num_tokens"] == counts["num_tokens"]
        more = one["sources"][name]["num_tokens"] - counts["num_tokens"]
        assert more == counts["num_examples"]
        begun, plain, without = (
            open_sources(world_of(root), out)[name]
            for out in (tmp_path / "one", first.out, tmp_path / "none")
        )
        assert begun.input_ids(0).tolist() == [end_of_text, *plain.input_ids(0)]
        assert without.input_ids(0).tolist() == plain.input_ids(0).tolist()
        assert (begun.begin_of_text, without.begin_of_text) == (end_of_text, None)
    assert open_codec(tmp_path / "one").begin_of_text == end_of_text
    assert open_codec(tmp_path / "none").begin_of_text is None


def test_each_text_source_is_read_from_the_column_that_the_world_names(
    root: Path, tmp_path: Path
) -> None:
    codes = {"a.py": "def one(): pass", "b.py": "two = 2"}
    (root / "text/code").mkdir()
    table = as_parquet([{"content": code, "path": path} for path, code in codes.items()])
    (root / "text/code/0.parquet").write_bytes(table)
    with pytest.raises(ValueError, match=r"no column 'text'; .*, one of \['content', 'path'\]"):
        prepared(root, tmp_path / "none")
    said = {"text": {"code": {"column": "content"}}}
    (root / "world.json").write_text(json.dumps(said))
    results = prepared(root, tmp_path / "out")
    assert results["sources"]["code"]["num_examples"] == 2
    assert results["sources"]["web"]["num_examples"] == len(TEXTS)
    source, codec = (
        open_sources(world_of(root), tmp_path / "out")["code"],
        open_codec(tmp_path / "out"),
    )
    assert codec.decode(source.input_ids(0).tolist()) == "def one(): pass"
    (root / "world.json").write_text(json.dumps({"text": {"code": {"column": "body"}}}))
    with pytest.raises(ValueError, match=r"no column 'body'; .*, one of \['content', 'path'\]"):
        prepared(root, tmp_path / "body")


def test_what_is_left_out_and_not_read_stands_in_the_results(root: Path, tmp_path: Path) -> None:
    left = {"conversations": [*TALKS[1]["conversations"], {"from": "human", "value": "And?"}]}
    write_talks(root, [*TALKS, left])
    (root / "text/web/c.jsonl.rar").write_bytes(b"xz")
    found = prepared(root, tmp_path / "out")["sources"]
    assert found["talks"]["num_examples"] == 4
    assert found["talks"]["dropped_turns"] == {"question without a reply": 1}
    assert found["web"]["unread"] == {"files": 1, "first": ["text/web/c.jsonl.rar"]}


@pytest.mark.parametrize("lost", ["captions", "instruct", "text"])
def test_a_folder_may_lack_a_kind_of_source(root: Path, tmp_path: Path, lost: str) -> None:
    shutil.rmtree(root / lost)
    assert len(prepared(root, tmp_path / "out")["sources"]) == 2


def test_a_share_of_every_source_may_be_held_out(
    root: Path, tmp_path: Path, first: Prepared
) -> None:
    whole = first.results["sources"]["web"]
    world = world_of(root, validation_fraction=0.4)
    results = prepare(world, TRAINED, tmp_path / "out")
    web = results["sources"]["web"]
    assert 0 < web["validation"]["examples"] < 12
    assert web["num_examples"] + web["validation"]["examples"] == whole["num_examples"]
    assert web["num_tokens"] + web["validation"]["tokens"] == whole["num_tokens"]


def test_a_generated_world_is_written_anew_where_another_lies(tmp_path: Path) -> None:
    sizes = dict.fromkeys(["num_documents", "num_captions", "num_conversations"], 20)
    worlds = [PocketWorld(seed=n, **sizes, num_questions=6, num_text_items=6) for n in (1, 2)]
    for world in worlds:
        assert prepare_world(world, tmp_path / "out")["holds"] == ["pictures", "talks", "web"]
    prepare_world(worlds[1], tmp_path / "fresh")
    assert folder_fingerprint(tmp_path / "out/world") == folder_fingerprint(
        tmp_path / "fresh/world"
    )


def test_a_generated_source_follows_from_its_own_part_of_the_world(tmp_path: Path) -> None:
    numbers = {**PocketWorld.SOURCES, "bench": "num_questions", "text": "num_text_items"}
    one = PocketWorld(**dict.fromkeys(numbers.values(), 12))
    prepare_world(one, tmp_path / "one")
    for source in ("web", "pictures", "talks", "alt_texts"):
        others = {name: 13 for key, name in numbers.items() if key != source}
        two = one.model_copy(update=others)
        assert one.source_part(source) == two.source_part(source)
        prepare_world(two, tmp_path / source)
        section = {"web": "text", "talks": "instruct"}.get(source, "captions")
        folders = [tmp_path / out / "world" / section / source for out in ("one", source)]
        assert folder_fingerprint(folders[0]) == folder_fingerprint(folders[1])


def replace_by_prepared(root: Path, tmp_path: Path, names: list[str], tokenizer: Path) -> None:
    """Prepare sources of the world with the command's engine, and put that in their place."""
    for name in names:
        moved = tmp_path / "raw" / name
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / name, moved)
        run(SECTIONS[name], moved, root / name, tokenizer_file=tokenizer)


@pytest.mark.parametrize("names", [["captions/pics", "instruct/talks"], [*SECTIONS]])
def test_sources_prepared_before_are_taken_as_they_are(
    root: Path, tmp_path: Path, first: Prepared, names: list[str]
) -> None:
    sources = open_sources(world_of(root), first.out)
    expected = {
        name: [source.input_ids(n).tolist() for n in range(len(source))]
        for name, source in sources.items()
    }
    replace_by_prepared(root, tmp_path, names, first.tokenizer.path)
    before = {name: times(root / name) for name in names}
    second = prepared(root, tmp_path / "second", first.tokenizer)
    assert before == {name: times(root / name) for name in names}
    for name, summary in first.results["sources"].items():
        for key in ("kind", "num_examples", "num_tokens", "num_images", "records", "rejects"):
            assert second["sources"][name][key] == summary[key]
    found = open_sources(world_of(root), tmp_path / "second")
    assert expected == {
        name: [source.input_ids(n).tolist() for n in range(len(source))]
        for name, source in found.items()
    }
    assert [found["pics"].image_bytes(n) for n in range(5)] == [jpeg(n) for n in range(5)]
    assert found["talks"].image_bytes(0) == png(1)
    own = {path.parent.name for path in (tmp_path / "second").glob("sources/*/source")}
    assert own == expected.keys() - {name.split("/")[1] for name in names}


@pytest.mark.parametrize("size", [290, 300])
def test_a_source_prepared_with_another_tokenizer_is_refused_with_both(
    root: Path, tmp_path: Path, first: Prepared, size: int
) -> None:
    one, other = first.tokenizer, tmp_path / "other"
    if size == 290:
        prepare(world_of(root), TrainedTokenizer(vocab_size=size), other)
    else:
        other.mkdir()
        # As many ids, two of them exchanged.
        found = json.loads(one.path.read_text())
        vocab = found["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (other / "tokenizer.json").write_text(json.dumps(found))
    two = tokenizer_of(other)
    replace_by_prepared(root, tmp_path, ["captions/pics"], one.path)
    message = rf"'pics' in .* {one.sha256} of 300 ids, the plan has \w+ of {size}; prepare it"
    with pytest.raises(ValueError, match=message) as caught:
        prepared(root, tmp_path / "out", two)
    assert (two.sha256 in str(caught.value)) == (size == 290)
    assert not (tmp_path / "out/sources/pics").exists()
    # The remedy that the message names.
    path = root / "captions/pics/tokenizer.json"
    prepared(root, tmp_path / "out", TokenizerFile(path=path, sha256=file_sha256(path)))


def test_a_source_whose_examples_begin_otherwise_is_refused_with_both_beginnings(
    root: Path, tmp_path: Path, begins: Path
) -> None:
    replace_by_prepared(root, tmp_path, ["captions/pics"], begins)
    prepared(root, tmp_path / "same", TokenizerFile.read(begins))
    # As a version that knew of no beginning left it.
    index = root / "captions/pics/source.json"
    found = json.loads(index.read_text())
    del found["begin_of_text"]
    index.write_text(json.dumps(found))
    message = r"source 'pics' in .* begin with no token, .* '<\|endoftext\|>'; prepare it again"
    with pytest.raises(ValueError, match=message):
        prepared(root, tmp_path / "other", TokenizerFile.read(begins))


def test_a_prepared_source_that_is_not_whole_or_lies_among_another_kind_is_refused(
    root: Path, tmp_path: Path, first: Prepared
) -> None:
    tokenizer = first.tokenizer
    replace_by_prepared(root, tmp_path, ["captions/pics"], tokenizer.path)
    shutil.move(root / "captions/pics", root / "text/pics")
    with pytest.raises(ValueError, match="text/pics is prepared as caption and lies among"):
        prepared(root, tmp_path / "out", tokenizer)
    shutil.move(root / "text/pics", root / "captions/pics")
    made = root / "captions/pics"
    tokens = made / "shards/000000/tokens.bin"
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"pics/shards/000000 is not whole, .*; copy the source"):
        prepared(root, tmp_path / "out", tokenizer)
    tokens.write_bytes(data)
    index = (made / "source.json").read_text()
    (made / "source.json").unlink()
    with pytest.raises(ValueError, match=r"pics is a source that is not prepared to its end; give"):
        world_of(root)
    (made / "source.json").write_text('{"url": "https://example.org"}')
    with pytest.raises(ValueError, match=r"pics/source\.json is none that `midstream prepare`"):
        world_of(root)
    (made / "source.json").write_text(index)
    prepared(root, tmp_path / "out", tokenizer)


def test_the_fingerprint_of_a_world_reads_no_byte_of_a_prepared_source(
    root: Path, tmp_path: Path, first: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_by_prepared(root, tmp_path, ["captions/pics"], first.tokenizer.path)
    read: list[Path] = []

    def note(path: str | Path) -> str:
        read.append(Path(path))
        return file_sha256(path)

    monkeypatch.setattr("midstream.core.identity.file_sha256", note)
    one = world_fingerprint(root)
    assert len(read) == 4
    assert not [path for path in read if "captions" in path.parts]
    index = root / "captions/pics/source.json"
    text = index.read_text()
    fingerprint = Source("pics", root / "captions/pics").index["fingerprint"]
    index.write_text(text.replace(fingerprint, "0" * 16))
    assert world_fingerprint(root) != one
    index.write_text(text)
    (root / "text/web/b.jsonl").write_text('{"text": "other"}\n')
    assert world_fingerprint(root) != one
    with pytest.raises(FileNotFoundError, match="nowhere"):
        world_fingerprint(root / "nowhere")
