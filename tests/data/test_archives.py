"""Blocks on a local disk: whatever becomes of them, the bytes are those of the file."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.data import archives
from midstream.data.archives import BLOCK_BYTES, BlockCache

SIZE = 5 * BLOCK_BYTES + 1234
PLACES = np.arange(SIZE)
DATA = ((PLACES * PLACES + PLACES // 251) % 256).astype(np.uint8).tobytes()


class Server:
    """What is asked of it, and whether it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.broken = False

    def fetch(self, url: str, start: int, end: int) -> bytes:
        assert url == "s3://bucket/a.tar"
        self.asked.append((start, end))
        if self.broken:
            raise ConnectionError("cut")
        return DATA[start:end]

    def cache(self, folder: Path, version: str = "1") -> BlockCache:
        return BlockCache(folder, "s3://bucket/a.tar", [SIZE, version], SIZE, self.fetch)


RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, 3 * BLOCK_BYTES)).map(
    lambda x: (x[0], min(x[0] + x[1], SIZE))
)


@settings(max_examples=60)
@given(st.lists(RANGES, max_size=12))
def test_any_ranges_are_the_files_and_no_block_is_asked_for_twice(
    ranges: list[tuple[int, int]],
) -> None:
    with TemporaryDirectory() as folder:
        server = Server()
        for start, end in ranges:
            # Another process each time.
            assert server.cache(Path(folder)).read(start, end) == DATA[start:end]
        server.asked.clear()
        for start, end in ranges:
            assert server.cache(Path(folder)).read(start, end) == DATA[start:end]
        assert server.asked == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "no blocks", "no hashes", "hashes cut"])
def test_a_damaged_block_is_fetched_again(tmp_path: Path, damage: str) -> None:
    server = Server()
    cache = server.cache(tmp_path)
    cache.read(0, SIZE)
    hashes = cache.blocks.with_suffix(".hashes")
    match damage:
        case "flipped":
            kept = bytearray(cache.blocks.read_bytes())
            kept[2 * BLOCK_BYTES + 5] ^= 1
            cache.blocks.write_bytes(kept)
        case "cut":
            cache.blocks.write_bytes(cache.blocks.read_bytes()[: 2 * BLOCK_BYTES + 5])
        case "no blocks":
            cache.blocks.unlink()
        case "no hashes":
            hashes.unlink()
        case _:
            hashes.write_bytes(hashes.read_bytes()[:20])
    server.asked.clear()
    assert cache.read(0, SIZE) == DATA
    first = 0 if damage.startswith("no ") else 2 * BLOCK_BYTES
    last = 3 * BLOCK_BYTES if damage == "flipped" else SIZE
    assert server.asked == [(first, last)]
    assert cache.read(0, SIZE) == DATA
    assert len(server.asked) == 1


def test_a_fetch_that_fails_leaves_no_block(tmp_path: Path) -> None:
    server = Server()
    server.broken = True
    with pytest.raises(ConnectionError):
        server.cache(tmp_path).read(10, 20)
    server.broken = False
    assert server.cache(tmp_path).read(10, 20) == DATA[10:20]


def test_blocks_of_another_version_are_others(tmp_path: Path) -> None:
    server = Server()
    server.cache(tmp_path).read(0, 9)
    server.cache(tmp_path, "2").read(0, 9)
    assert server.asked == [(0, BLOCK_BYTES)] * 2


def test_a_disk_that_is_nearly_full_is_filled_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_FREE_FRACTION", 1.0)
    server = Server()
    for _ in range(2):
        assert server.cache(tmp_path).read(3, 9) == DATA[3:9]
    assert len(server.asked) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_is_removed_in_between_costs_its_blocks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, write = Server(), archives._write

    def removed(path: Path, offset: int, data: bytes) -> None:
        shutil.rmtree(tmp_path, ignore_errors=True)
        write(path, offset, data)

    monkeypatch.setattr(archives, "_write", removed)
    assert server.cache(tmp_path).read(3, 9) == DATA[3:9]
    monkeypatch.setattr(archives, "_write", write)
    assert server.cache(tmp_path).read(3, 9) == DATA[3:9]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=f"{tmp_path}/file keeps no blocks.*{archives.FOLDER}"):
        Server().cache(tmp_path / "file").read(0, 1)
