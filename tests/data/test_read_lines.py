"""Lines of plain and packed files: whole, or refused by name."""

import gzip
import random
from pathlib import Path

import fsspec
import pytest
import zstandard

from midstream.data.formats import files
from midstream.data.formats.files import read_lines

LINES = [b"one\n", b"\n", b"\xff\xfe no text\n", b"three\r\n", b"last, without an end"]
RANDOM = random.Random(3)
NOISE = [RANDOM.randbytes(30).hex().encode() + b"\n" for _ in range(3000)]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def zstd_stream(data: bytes) -> bytes:
    """Without the length of the data in its head, as from a pipe."""
    packer = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return packer.compress(data) + packer.flush()


PACKED = {
    "a.jsonl": lambda data: data,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": zstd,
    "a.jsonl.zstd": zstd_stream,
}


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("lines", [LINES, NOISE, [b"x" * 3_000_000 + b"\n", b"y\n"]])
def test_lines_come_out_as_they_went_in(
    tmp_path: Path, name: str, lines: list[bytes], where: str
) -> None:
    data = b"".join(lines)
    half = len(lines[0])
    # In one piece, and in two that stand behind each other.
    pieces = [PACKED[name](data), PACKED[name](data[:half]) + PACKED[name](data[half:])]
    for packed in pieces:
        if where == "local":
            path = str(tmp_path / name)
            Path(path).write_bytes(packed)
        else:
            path = f"memory://lines/{name}"
            fsspec.filesystem("memory").pipe(f"/lines/{name}", packed)
        assert list(read_lines(path)) == lines


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("name", list(PACKED)[1:])
@pytest.mark.parametrize("lines", [LINES, NOISE])
def test_a_packed_file_that_is_cut_at_any_byte_is_refused_by_name(
    tmp_path: Path, name: str, lines: list[bytes], where: str
) -> None:
    packed = PACKED[name](b"".join(lines))
    ends = {*range(20), *range(len(packed) - 20, len(packed)), *range(0, len(packed), 997)}
    for end in sorted(ends & set(range(len(packed)))):
        if where == "local":
            path = str(tmp_path / name)
            Path(path).write_bytes(packed[:end])
        else:
            path = f"memory://cut/{name}"
            fsspec.filesystem("memory").pipe(f"/cut/{name}", packed[:end])
        with pytest.raises(ValueError, match=f"^{path} is .*fetch it again$"):
            list(read_lines(path))


@pytest.mark.parametrize("name", list(PACKED)[1:])
def test_a_second_piece_that_is_cut_is_noticed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    first, second = PACKED[name](b"a\n"), PACKED[name](b"b\n")
    for end in range(1, len(second)):
        path.write_bytes(first + second[:end])
        with pytest.raises(ValueError, match=name):
            list(read_lines(str(path)))


@pytest.mark.parametrize("name", list(PACKED)[1:])
def test_what_is_not_packed_as_its_name_says_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "plain"}\n' * 10)
    with pytest.raises(ValueError, match=name):
        list(read_lines(str(path)))


def test_an_empty_plain_file_has_no_lines_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert list(read_lines(str(tmp_path / "a.jsonl"))) == []
    for name in ("b.jsonl", "b.jsonl.gz", "b.jsonl.zst"):
        with pytest.raises(FileNotFoundError, match=name):
            list(read_lines(str(tmp_path / name)))


@pytest.mark.parametrize("name", PACKED)
def test_a_line_that_is_too_long_is_refused_and_one_at_the_limit_is_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / name
    lines = [b"a\n", b"b" * 999 + b"\n", b"c" * 1000]
    path.write_bytes(PACKED[name](b"".join(lines)))
    assert list(read_lines(str(path))) == lines
    path.write_bytes(PACKED[name](b"a\n" + b"b" * 1000 + b"\n"))
    with pytest.raises(ValueError, match="line 2 is longer than 1,000 bytes"):
        list(read_lines(str(path)))
