"""Preparing a user's folder: what is indexed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from made import png
from made_world import (
    CAPTIONS,
    TEXTS,
    TRAINED,
    jpeg,
    lines,
    prepared,
    samples,
    world_of,
    write_tar,
    write_world,
)

from midstream.config import TokenizerFile
from midstream.data.prepare import open_codec, open_sources, prepare
from midstream.data.readers import read_captions, read_texts
from midstream.identity import file_sha256, folder_fingerprint
from midstream.storage import read_json, verify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny world."""
    write_world(tmp_path / "my data")
    return tmp_path / "my data"


def test_a_folder_is_indexed_from_end_to_end(root: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    before = folder_fingerprint(root)
    results = prepare(world_of(root), TRAINED, out, lambda done, what: notes.append((done, what)))
    verify(out / "prepared")
    assert folder_fingerprint(root) == before
    assert [path.name for path in out.iterdir()] == ["prepared"]
    assert notes == sorted(notes, key=lambda note: note[0])
    assert {"indexing web", "indexing pics", "indexing talks"} <= {what for _, what in notes}

    codec, sources = open_codec(out), open_sources(world_of(root), out)
    assert results["tokenizer_sha256"] == file_sha256(out / "prepared/tokenizer.json")
    assert results["vocab_size"] == codec.size <= 300
    assert list(sources) == ["pics", "talks", "web"]
    for name, kind, examples, images in [
        ("web", "text", 12, 0),
        ("pics", "caption", 5, 5),
        ("talks", "instruct", 3, 2),
    ]:
        summary = results["sources"][name]
        assert (summary["kind"], summary["num_examples"]) == (kind, examples)
        assert (summary["num_images"], summary["dropped"]) == (images, {})
        assert summary["num_tokens"] == len(sources[name].tokens)
        assert len(sources[name]) == examples

    def ids(name: str, example: int) -> np.ndarray:
        source = sources[name]
        return source.tokens[source.offsets[example] : source.offsets[example + 1]]

    for example, text in enumerate(TEXTS):
        assert codec.decode(ids("web", example).tolist()) == text
        assert ids("web", example)[-1] == codec.end_of_text
    for example, caption in enumerate(CAPTIONS):
        assert codec.decode(ids("pics", example).tolist()) == caption
        assert ids("pics", example)[0] == codec.separator
        assert sources["pics"].image_bytes(example) == jpeg(example)
        shard, sample = divmod(example, 3)
        described = sources["pics"].describe(example)
        assert described.endswith(f"captions/pics/00{shard}.tar, sample {3 * shard + sample:05d}")
    talks = sources["talks"]
    assert talks.supervised is not None
    assert talks.has_images.tolist() == [True, False, True]
    assert talks.image_bytes(0) == talks.image_bytes(2) == png(1)
    for example, replies in enumerate([" A boat. It is red.", " Hello.", " No."]):
        low, high = talks.offsets[example : example + 2]
        targets = talks.tokens[low:high][np.asarray(talks.supervised[low:high]) == 1]
        assert codec.decode(targets.tolist()) == replies
        assert "<image>" not in codec.decode(ids("talks", example).tolist())


def test_preparing_twice_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    one, two = (prepared(root, tmp_path / name) for name in ("one", "two"))
    assert one == two
    manifests = [read_json(tmp_path / n / "prepared/manifest.json") for n in ("one", "two")]
    # Names hold the world's path, which is the same; everything is.
    assert manifests[0] == manifests[1]


def test_a_named_tokenizer_file_is_used_and_kept(root: Path, tmp_path: Path) -> None:
    one = prepared(root, tmp_path / "one")
    path = tmp_path / "mine.json"
    shutil.copy(tmp_path / "one/prepared/tokenizer.json", path)
    two = prepared(root, tmp_path / "two", TokenizerFile(path=path, sha256=file_sha256(path)))
    path.unlink()
    assert two["sources"] == one["sources"]
    assert open_codec(tmp_path / "two").encode(TEXTS[3]) == open_codec(tmp_path / "one").encode(
        TEXTS[3]
    )


@pytest.mark.parametrize("lost", ["captions", "instruct", "text"])
def test_a_folder_may_lack_a_kind_of_source(root: Path, tmp_path: Path, lost: str) -> None:
    shutil.rmtree(root / lost)
    assert len(prepared(root, tmp_path / "out")["sources"]) == 2


def test_shards_with_folders_in_their_names_and_other_pictures_are_read(root: Path) -> None:
    path = root / "captions/pics/000.tar"
    named = {f"./part.1/{name}": data for name, data in samples(0, CAPTIONS[:3]).items()}
    named["./part.1/00007.png"], named["./part.1/00007.txt"] = png(7), b"seven"
    write_tar(path, named)
    found = [r for r in read_captions(root / "captions/pics") if r[2][0] == path]
    assert [caption for _, caption, _ in found] == [*CAPTIONS[:3], "seven"]
    assert found[0][0] == f"{path}, sample ./part.1/00000"
    assert [data for _, _, (_, _, data) in found] == [jpeg(0), jpeg(1), jpeg(2), png(7)]


def test_a_zstd_file_of_several_frames_is_read_to_its_end(root: Path) -> None:
    frames = [zstandard.ZstdCompressor().compress(lines([text])) for text in TEXTS[:8]]
    (root / "text/web/a.jsonl.zst").write_bytes(b"".join(frames))
    assert [text for _, text in read_texts(root / "text/web")] == TEXTS
