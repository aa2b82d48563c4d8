"""Indexed sources: what is written is read back, and damage is noticed."""

import os
import pickle
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_source, png

from midstream.data.sources import Kind, Source, SourceWriter

EXAMPLES = st.lists(
    st.tuples(st.lists(st.integers(0, 65535), min_size=1, max_size=9), st.text(max_size=6)),
    min_size=1,
    max_size=8,
)


@given(
    examples=EXAMPLES,
    kind=st.sampled_from(["text", "caption", "instruct"]),
    dtype=st.sampled_from(["<u2", "<u4"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_source_reads_back_what_was_written(
    examples: list[tuple[list[int], str]], kind: Kind, dtype: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        base = Path(folder)
        blobs = [random.bytes(int(random.integers(1, 40))) for _ in examples]
        (base / "a.bin").write_bytes(b"".join(blobs))
        writer = SourceWriter(base / "s", kind=kind, dtype=dtype)
        masks, offset = [], 0
        for number, (ids, name) in enumerate(examples):
            masks.append(random.integers(0, 2, len(ids)))
            shown = kind != "text" and number % 3 != 1
            image = ("a.bin", offset, len(blobs[number])) if shown else None
            writer.add(np.array(ids), masks[-1], name=name, image=image)
            offset += len(blobs[number])
        writer.drop("too small")
        writer.drop("too small")
        summary = writer.close()
        source = Source("s", base / "s", base)

        assert len(source) == len(examples)
        assert source.kind == kind
        assert summary["num_tokens"] == sum(len(ids) for ids, _ in examples)
        assert summary["dropped"] == source.index["dropped"] == {"too small": 2}
        assert source.tokens.dtype == np.dtype(dtype)
        for number, (ids, name) in enumerate(examples):
            here = slice(int(source.offsets[number]), int(source.offsets[number + 1]))
            assert source.tokens[here].tolist() == ids
            if kind == "text":
                assert source.supervised is None
                assert source.images is None
                assert source.describe(number) == f"source 's', example {number}"
                continue
            assert source.supervised is not None
            assert source.supervised[here].tolist() == masks[number].tolist()
            assert source.has_images[number] == (number % 3 != 1)
            if number % 3 != 1:
                assert source.image_bytes(number) == blobs[number]
            flat = name.replace("\n", " ").replace("\r", " ")
            assert source.describe(number) == f"source 's', {flat.rstrip()}"
        assert source.has_images.sum() == summary["num_images"]


@pytest.mark.parametrize("file", ["tokens.bin", "supervised.bin"])
@pytest.mark.parametrize("lost", [1, 4, 7])
def test_a_truncated_file_of_a_source_is_refused_with_both_sizes(
    tmp_path: Path, file: str, lost: int
) -> None:
    source = make_source(tmp_path, "pics", "caption", [5, 6], pictures=[0, 1])
    path = source.folder / file
    size = path.stat().st_size
    os.truncate(path, size - lost)
    with pytest.raises(ValueError, match=f"{file} holds {size - lost} bytes.* needs {size}"):
        _ = source.tokens if file == "tokens.bin" else source.supervised


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_truncated_picture_is_refused_with_its_record_and_both_sizes(
    tmp_path: Path, kept: int
) -> None:
    source = make_source(tmp_path, "pics", "caption", [5, 6], pictures=[0, 1])
    size = len(png(1))
    os.truncate(tmp_path / "world" / "1.png", kept)
    assert source.image_bytes(0) == png(0)
    with pytest.raises(ValueError, match=f"sample 1: .* after {kept} of {size} bytes"):
        source.image_bytes(1)


def test_a_source_without_an_index_is_refused_by_name(tmp_path: Path) -> None:
    source = make_source(tmp_path, "web", "text", [3])
    (source.folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"source 'web' has no .*index\.json; prepare"):
        _ = source.kind


def test_a_source_travels_to_a_worker_without_its_tokens(tmp_path: Path) -> None:
    source = make_source(tmp_path, "pics", "caption", [5000] * 20, pictures=[0] * 20)
    expected = np.array(source.tokens), np.array(source.images), np.array(source.supervised)
    parcel = pickle.dumps(source)
    assert len(parcel) < 1000
    copy = pickle.loads(parcel)
    assert copy == source
    assert np.array_equal(copy.tokens, expected[0])
    assert np.array_equal(copy.images, expected[1])
    assert np.array_equal(copy.supervised, expected[2])


def test_a_source_may_move_with_its_world(tmp_path: Path) -> None:
    make_source(tmp_path / "old", "pics", "caption", [4], pictures=[3])
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = Source("pics", tmp_path / "new" / "sources" / "pics", tmp_path / "new" / "world")
    assert moved.image_bytes(0) == png(3)


@pytest.mark.parametrize("file", ["supervised.bin", "images.npy"])
def test_a_lost_file_of_a_source_is_an_error_and_not_a_source_without_it(
    tmp_path: Path, file: str
) -> None:
    source = make_source(tmp_path, "pics", "caption", [5], pictures=[0])
    (source.folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        _ = source.supervised if file == "supervised.bin" else source.images
