"""Prepared sources: what is written is read back, split and in shards, and damage is noticed."""

import gc
import json
import multiprocessing
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import hash_of, make_source, supervised

import tiny
from inputs import png
from midstream.config import Epochs, Rows
from midstream.core.storage import read_json
from midstream.data import archives, columns, source_writer, sources
from midstream.data.examples import Example
from midstream.data.images import load_pixels
from midstream.data.rows import plan_rows
from midstream.data.source_writer import (
    MAX_TEXT_TOKENS,
    REJECTS,
    Image,
    Reject,
    ShardWriter,
    finish_source,
)
from midstream.data.sources import Kind, Source, Split, content_hash


@dataclass(frozen=True)
class Written:
    """One example as it went in."""

    ids: list[int]
    mask: list[int]
    name: str
    content: bytes
    image: Image | None


IDS = st.lists(st.integers(0, 65535), min_size=1, max_size=9)
EXAMPLES = st.lists(st.tuples(IDS, st.text(max_size=6)), min_size=0, max_size=8)


def write(
    folder: Path,
    kind: Kind,
    dtype: str,
    shards: list[list[tuple[list[int], str]]],
    validation: float,
    seed: int,
) -> list[list[Written]]:
    """A source of these shards, all pictures in one archive `a.bin` beside it."""
    random, archive, written = np.random.default_rng(seed), b"", []
    for number, examples in enumerate(shards):
        path = folder / "s/shards" / f"{number:06d}"
        writer = ShardWriter(
            path, kind=kind, dtype=dtype, input_name=f"in-{number}", validation_fraction=validation
        )
        mine = []
        for place, (ids, name) in enumerate(examples):
            mask = [1] * len(ids) if kind == "text" else random.integers(0, 2, len(ids)).tolist()
            content = random.bytes(int(random.integers(1, 40)))
            image = None
            if kind != "text" and place % 3 != 1:
                image = Image("a.bin", len(archive), len(content))
                archive += content
            mine.append(Written(ids, mask, name, content, image))
            writer.add(np.array(ids), np.array(mask), name=name, content=content, image=image)
        writer.reject(Reject(f"in-{number}, line 3", "too small", "3 of 5"))
        writer.close()
        written.append(mine)
    (folder / "a.bin").write_bytes(archive)
    finish_source(folder / "s", tokenizer_digest="t", vocab_size=65536, root=str(folder))
    return written


@given(
    shards=st.lists(EXAMPLES, min_size=1, max_size=4),
    kind=st.sampled_from(["text", "caption", "instruct"]),
    dtype=st.sampled_from(["<u2", "<u4"]),
    validation=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_source_reads_back_what_was_written_in_each_split(
    shards: list[list[tuple[list[int], str]]], kind: Kind, dtype: str, validation: float, seed: int
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        written = write(folder, kind, dtype, shards, validation, seed)
        seen = 0
        for split in ("train", "validation"):
            seen += check_split(folder, kind, split, written)
        total = sum(len(examples) for examples in written)
        assert seen == total
        if validation in (0.0, 1.0):
            assert len(Source("s", folder / "s", folder)) == (0 if validation else total)
        index = read_json(folder / "s/source.json")
        assert index["records"] == total + len(shards)
        assert index["rejects"] == {"too small": len(shards)}
        lines = (folder / "s/shards/000000" / REJECTS).read_text().splitlines()
        assert lines == ['{"where": "in-0, line 3", "reason": "too small", "detail": "3 of 5"}']


def check_split(folder: Path, kind: Kind, split: Split, written: list[list[Written]]) -> int:
    """Compare every example of a split with those that went in; returns how many it holds."""
    source = Source("s", folder / "s", folder, split)
    by_hash = {content_hash(w.content): (n, w) for n, shard in enumerate(written) for w in shard}
    expected_before, hashes, shown_hashes, last = [0, 0], [], [], -1
    for example in range(len(source)):
        number, item = by_hash[hash_of(source, example)]
        assert number >= last
        last = number
        assert source.before(np.array([example])).tolist() == [expected_before]
        shown = item.image is not None
        size = source.sizes_of(np.array([example]), np.array([0]))
        assert size.tolist() == [[len(item.ids), int(shown)]]
        expected_before = [expected_before[0] + len(item.ids), expected_before[1] + int(shown)]
        low, high = 1, max(2, len(item.ids) - 1)
        for cut in (slice(0, None), slice(low, high), slice(0, 99)):
            ids = source.input_ids(example)[cut]
            assert ids.tolist() == item.ids[cut]
        mask = supervised(source, example)
        assert mask is None if kind == "text" else mask.tolist() == item.mask
        assert source.places_of(example) == [0] * shown
        if shown:
            assert source.image_bytes(example) == item.content
            shown_hashes.append(list(content_hash(item.content)))
        hashes.append(content_hash(item.content))
        if kind != "text":
            flat = item.name.replace("\n", " ").replace("\r", " ")
            assert source.describe(example) == f"source 's', {flat}"
    assert [source.num_tokens, source.num_images] == expected_before
    assert [hash_of(source, example) for example in range(len(source))] == hashes
    assert source.pictures_of(np.arange(len(source))).hashes.tolist() == shown_hashes
    return len(source)


def test_equal_contents_go_to_one_split_and_the_share_is_kept(tmp_path: Path) -> None:
    share, count = 0.3, 1000
    for number in range(2):
        writer = ShardWriter(
            tmp_path / "shards" / str(number),
            kind="caption",
            dtype="<u2",
            input_name="x",
            validation_fraction=share,
        )
        for picture in range(count):
            ids = np.array([picture])
            writer.add(ids, ids, name="n", content=str(picture).encode())
        writer.close()
    finish_source(tmp_path, tokenizer_digest="t", vocab_size=9, root="")
    sources = [Source("s", tmp_path, None, split) for split in ("train", "validation")]
    train, held = ({int(one.input_ids(n)[0]) for n in range(len(one))} for one in sources)
    assert not train & held
    assert len(train | held) == count
    assert abs(len(held) / count - share) < 0.07


@pytest.mark.parametrize("extra", [0, 1, MAX_TEXT_TOKENS + 5])
def test_a_long_text_is_stored_in_parts_that_join_to_it(tmp_path: Path, extra: int) -> None:
    length = MAX_TEXT_TOKENS + extra
    source = make_source(tmp_path, "web", "text", [3, length, 2])
    found = np.concatenate([source.input_ids(example) for example in range(len(source))])
    assert np.array_equal(np.diff(found), np.ones(length + 4))
    assert len(source) == 2 + -(-length // MAX_TEXT_TOKENS)
    assert max(np.diff(source.before(np.arange(len(source) + 1))[:, 0])) <= MAX_TEXT_TOKENS
    assert source.index["records"] == 3


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_change_nothing_of_what_a_source_says(tmp_path: Path, shards: int) -> None:
    lengths = [5, 1, 7, 2, 9, 4, 3]
    shown = [0, None, 1, 1, None, 2, 0]
    one = make_source(tmp_path / "one", "talks", "instruct", lengths, pictures=shown)
    many = make_source(
        tmp_path / "many", "talks", "instruct", lengths, pictures=shown, shards=shards
    )
    assert len(many.index["shards"]) == shards
    assert (len(many), many.num_tokens, many.num_images) == (7, 31, 5)
    assert np.array_equal(one.before(np.arange(8)), many.before(np.arange(8)))
    for mine, theirs in zip(*(s.pictures_of(np.arange(7)) for s in (one, many)), strict=True):
        assert np.array_equal(mine, theirs)
    for example in range(7):
        assert np.array_equal(one.input_ids(example), many.input_ids(example))
        assert np.array_equal(supervised(one, example), supervised(many, example))
        assert one.describe(example) == many.describe(example)


@pytest.mark.parametrize("file", ["tokens.bin", "supervised.bin"])
def test_a_truncated_file_of_a_source_is_refused_with_both_sizes(tmp_path: Path, file: str) -> None:
    source = make_source(tmp_path, "pics", "caption", [5, 6], pictures=[0, 1])
    path = source.folder / "shards/000000" / file
    size = path.stat().st_size
    for lost in (1, 4, 7):
        os.truncate(path, size - lost)
        with pytest.raises(ValueError, match=f"{file} holds {size - lost} bytes.* needs {size}"):
            _ = source.input_ids(0) if file == "tokens.bin" else supervised(source, 0)


def test_a_picture_that_is_truncated_or_has_one_other_bit_is_refused_with_its_record(
    tmp_path: Path,
) -> None:
    source = make_source(tmp_path, "pics", "caption", [5, 6], pictures=[0, 1])
    for kept in (0, 1, 20):
        (tmp_path / "world/1.png").write_bytes(png(1)[:kept])
        with pytest.raises(ValueError, match=r"sample 1: the picture in 1\.png changed"):
            source.image_bytes(1)
    for place in (0, 30, -1):
        data = bytearray(png(1))
        data[place] ^= 1
        (tmp_path / "world/1.png").write_bytes(bytes(data))
        with pytest.raises(ValueError, match=r"sample 1: .*its bytes have another hash"):
            source.image_bytes(1)
    assert source.image_bytes(0) == png(0)


def test_a_source_of_another_format_or_without_a_file_is_refused_by_name(tmp_path: Path) -> None:
    source = make_source(tmp_path, "pics", "caption", [5], pictures=[0])
    index, shard = source.folder / "source.json", source.folder / "shards/000000"
    text = index.read_text()
    index.write_text(text.replace('"format": 3', '"format": 1'))
    with pytest.raises(ValueError, match=r"source\.json has format 1, this version reads 3"):
        _ = source.kind
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"source 'pics' has no .*source\.json; prepare"):
        _ = source.kind
    index.write_text(text)
    for file in ("supervised.bin", "images.npy", "shard.json"):
        (shard / file).rename(tmp_path / file)
        fresh = Source("pics", source.folder, tmp_path / "world")
        with pytest.raises(FileNotFoundError, match=file):
            _ = supervised(fresh, 0) if file == "supervised.bin" else fresh.image_bytes(0)
        (tmp_path / file).rename(shard / file)


@pytest.mark.parametrize("kind", ["text", "caption", "instruct"])
def test_of_the_format_before_all_but_captions_is_read(tmp_path: Path, kind: Kind) -> None:
    source = make_source(tmp_path, "old", kind, [3, 5])
    path = source.folder / "source.json"
    index = json.loads(path.read_text()) | {"format": 2}
    for name in ("captions", "seen"):
        index.pop(name, None)
    for shard in index["shards"]:
        del shard["longest"]
    path.write_text(json.dumps(index))
    if kind == "caption":
        with pytest.raises(ValueError, match=r"source\.json has format 2, this version reads 3"):
            _ = source.kind
    else:
        assert [len(source.input_ids(example)) for example in range(2)] == [3, 5]
        rows, budget = Rows(row_length=5, batch_rows=1), Epochs(sources=("old",), epochs=1)
        assert plan_rows({"old": source}, 0, budget, rows, 0).seen_tokens == 8


def test_a_source_travels_to_a_worker_without_its_tokens(tmp_path: Path) -> None:
    source = make_source(tmp_path, "pics", "caption", [5000] * 20, pictures=[0] * 20)
    ids, shown = np.array(source.input_ids(7)), source.image_bytes(7)
    parcel = pickle.dumps(source)
    assert len(parcel) < 1000
    copy = pickle.loads(parcel)
    assert copy == source
    assert np.array_equal(copy.input_ids(7), ids)
    assert copy.image_bytes(7) == shown


def test_a_source_may_move_with_its_world_and_finds_its_pictures_without_one(
    tmp_path: Path,
) -> None:
    source = make_source(tmp_path / "old", "pics", "caption", [4], pictures=[3])
    assert Source("pics", source.folder).image_bytes(0) == png(3)
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = Source("pics", tmp_path / "new" / "sources" / "pics", tmp_path / "new" / "world")
    assert moved.image_bytes(0) == png(3)


def test_pictures_are_read_at_urls(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/pictures/a.tar", b"xx" + png(1) + png(2))
    writer = ShardWriter(tmp_path / "shards/0", kind="caption", dtype="<u2", input_name="a.tar")
    offset = 2
    for number in (1, 2):
        data, ids = png(number), np.array([1])
        image = Image("memory://pictures/a.tar", offset, len(data))
        writer.add(ids, ids, name=str(number), content=data, image=image)
        offset += len(data)
    writer.close()
    finish_source(tmp_path, tokenizer_digest="t", vocab_size=9, root="")
    source = Source("s", tmp_path, tmp_path / "elsewhere")
    assert [source.image_bytes(example) for example in range(2)] == [png(1), png(2)]


@given(
    shards=st.lists(EXAMPLES, min_size=3, max_size=5),
    kind=st.sampled_from(["text", "caption", "instruct"]),
    validation=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=15, deadline=None)
def test_joined_columns_say_what_those_of_the_shards_do(
    shards: list[list[tuple[list[int], str]]], kind: Kind, validation: float
) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(source_writer, "MOST_SEPARATE", 2)
        written = write(folder, kind, "<u2", shards, validation, 0)
        assert read_json(folder / "s/source.json")["joined_columns"]
        for shard in (folder / "s/shards").iterdir():
            for column in shard.glob("*.npy"):
                column.unlink()
        seen = sum(check_split(folder, kind, split, written) for split in ("train", "validation"))
        assert seen == sum(len(examples) for examples in written)


def test_joined_columns_hold_captions_of_unequal_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, lengths in enumerate(([3, 1], [], [2])):
        writer = ShardWriter(
            tmp_path / f"s/shards/{number}", kind="caption", dtype="<u2", input_name="x"
        )
        made = [Example(np.arange(n), np.ones(n)) for n in lengths]
        writer.add(np.arange(4), np.ones(4), name="", content=b"x", synthetic=made)
        writer.close()
    apart = finish_source(tmp_path / "s", tokenizer_digest="t", vocab_size=9, root="")
    monkeypatch.setattr(source_writer, "MOST_SEPARATE", 2)
    joined = finish_source(tmp_path / "s", tokenizer_digest="t", vocab_size=9, root="")
    assert joined == apart | {"joined_columns": True}
    source, every = Source("s", tmp_path / "s"), np.arange(3)
    assert source.num_synthetic(every).tolist() == [2, 0, 1]
    sizes = [source.sizes_of(every, np.full(3, caption))[:, 0].tolist() for caption in range(3)]
    assert sizes == [[4, 4, 4], [3, 0, 2], [1, 0, 0]]
    assert source.before(np.arange(4), 1)[:, 0].tolist() == [0, 3, 3, 5]
    assert source.input_ids(2, caption=1).tolist() == [0, 1]


def many_archives(folder: Path, number: int) -> Source:
    """A source of so many shards, each with two pictures of an archive of its own."""
    for shard in range(number):
        (folder / f"{shard}.tar").write_bytes(b"head" + png(shard) + png(shard + 1))
        writer = ShardWriter(
            folder / f"s/shards/{shard:03d}", kind="caption", dtype="<u2", input_name="x"
        )
        offset = 4
        for data in (png(shard), png(shard + 1)):
            image = Image(f"{shard}.tar", offset, len(data))
            offset += len(data)
            writer.add(np.arange(3), np.ones(3), name=f"{shard}", content=data, image=image)
        writer.close()
    finish_source(folder / "s", tokenizer_digest="t", vocab_size=9, root=str(folder))
    return Source("s", folder / "s")


@pytest.mark.parametrize("joined", [False, True])
def test_what_is_open_is_bounded_however_many_shards_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    monkeypatch.setattr(source_writer, "MOST_SEPARATE", 1 if joined else 99)
    kept = archives.Kept(3)
    monkeypatch.setattr(sources, "open_archives", lambda: kept)
    monkeypatch.setattr(sources, "SHARDS", archives.Kept(12))
    source = many_archives(tmp_path, 20)
    before = len(os.listdir("/proc/self/fd"))
    for example in [*range(40), *range(39, -1, -1), *range(0, 40, 7)]:
        assert source.image_bytes(example) == png((example + 1) // 2)
        assert source.input_ids(example).tolist() == [0, 1, 2]
        assert len(os.listdir("/proc/self/fd")) <= before + 3
        maps = Path("/proc/self/maps").read_text().count(str(tmp_path / "s/shards"))
        assert maps <= 12
    del source
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_forked_processes_read_one_archive_side_by_side(tmp_path: Path) -> None:
    source = many_archives(tmp_path, 2)
    assert source.image_bytes(0) == png(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(source.image_bytes, [0, 1, 2, 3] * 50, chunksize=5)
    assert found == [png(0), png(1), png(1), png(2)] * 50


def test_a_name_is_looked_up_only_where_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path, "pics", "caption", [5], pictures=[0])
    whole = (tmp_path / "world/0.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(columns.Shard, "name_of", None)
        assert load_pixels(source, 0, tiny.ENCODER).shape[0] == 3
    writer = ShardWriter(tmp_path / "b/shards/0", kind="caption", dtype="<u2", input_name="x")
    (tmp_path / "cut.png").write_bytes(whole[:40])
    image = Image("cut.png", 0, 40)
    writer.add(np.arange(3), np.ones(3), name="the cut one", content=whole[:40], image=image)
    writer.close()
    finish_source(tmp_path / "b", tokenizer_digest="t", vocab_size=9, root=str(tmp_path))
    with pytest.raises(ValueError, match="source 'b', the cut one: the picture cannot be decoded"):
        load_pixels(Source("b", tmp_path / "b"), 0, tiny.ENCODER)
