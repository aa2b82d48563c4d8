"""Files by local path and by URL: what a name stands for, what leads out, lines, and copies."""

import bz2
import gzip
import io
import lzma
import os
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Barrier
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inputs import OPTIONS, Put, as_lines, as_parquet, run

from inputs import png, tar
from midstream.data.formats import copies
from midstream.data.formats import files as files_module
from midstream.data.formats.copies import refuse_twins
from midstream.data.formats.files import (
    base_name,
    exists,
    find_files,
    folder_of,
    full_name,
    inside,
    is_folder,
    join,
    open_binary,
    read_head,
    read_lines,
    read_range,
    shown_files,
    size_of,
)
from midstream.data.formats.read_captions import caption_units
from midstream.data.remote import kind_of
from midstream.data.shard_state import unread_files

NAMES = ("a.jsonl", "b/c.jsonl.gz", "b/d/e.jsonl", "b/notes.md", "z.txt")


@pytest.fixture
def base(put: Put) -> str:
    """A folder, local or of a URL, that holds files with their names as bytes."""
    for name in NAMES:
        put(name, name.encode())
    return put("", b"")


def short(found: list[str], base: str) -> list[str]:
    root = base.removeprefix("memory://").strip("/")
    return [name.partition(root)[2].lstrip("/") for name in found]


def test_a_folder_is_all_files_under_it_with_such_names_in_order(base: str) -> None:
    found = find_files(base, (".jsonl", ".gz"))
    assert short(found, base) == ["a.jsonl", "b/c.jsonl.gz", "b/d/e.jsonl"]
    assert find_files(f"{base}/", (".jsonl", ".gz"))[0].endswith("a.jsonl")
    assert [read_range(name, 0, 99).decode() for name in found] == short(found, base)


def test_a_file_is_itself_whatever_its_name(base: str) -> None:
    assert find_files(f"{base}/b/notes.md", (".jsonl",)) == [f"{base}/b/notes.md"]


def test_a_pattern_is_the_files_that_match_and_those_in_folders_that_match(base: str) -> None:
    patterns = {
        "*.jsonl": ["a.jsonl"],
        "**/*.jsonl": ["a.jsonl", "b/d/e.jsonl"],
        "b/*": ["b/c.jsonl.gz", "b/d/e.jsonl"],
        "[ab].jsonl": ["a.jsonl"],
    }
    for pattern, expected in patterns.items():
        assert short(find_files(f"{base}/{pattern}", (".jsonl", ".gz")), base) == expected


def test_a_name_that_stands_for_nothing_is_refused_with_what_was_looked_for(base: str) -> None:
    for name in ("", "/b/d", "/nowhere", "/*.tar", "/b/notes.tar"):
        with pytest.raises(FileNotFoundError) as caught:
            find_files(f"{base}{name}", (".tar", ".parquet"))
        assert f"{base}{name}" in str(caught.value)
        assert "*.tar, *.parquet" in str(caught.value)


def test_linked_folders_are_entered_once_and_a_link_to_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/x.txt").write_text("x")
    (tmp_path / "near").mkdir()
    (tmp_path / "near/link").symlink_to(tmp_path / "far")
    (tmp_path / "near/loop").symlink_to(tmp_path / "near")
    (tmp_path / "near/gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_files(str(tmp_path / "near"), (".txt",))
    assert [Path(name).name for name in found] == ["gone.txt", "x.txt"]
    with pytest.raises(FileNotFoundError):
        open_binary(found[0])


def test_files_in_an_archive_behind_a_url_are_found_and_read() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("q/a.jsonl", "one\ntwo\n")
        archive.writestr("q/b.txt", "b")
    fsspec.filesystem("memory").pipe("/chain/z.zip", packed.getvalue())
    chain = "::memory://chain/z.zip"
    assert find_files(f"zip://q{chain}", (".jsonl",)) == [f"zip://q/a.jsonl{chain}"]
    assert list(read_lines(f"zip://q/a.jsonl{chain}")) == [b"one\n", b"two\n"]
    assert folder_of(f"zip://q/a.jsonl{chain}") == f"zip://q{chain}"
    assert join(f"zip://q{chain}", "b.txt", "here") == f"zip://q/b.txt{chain}"
    assert base_name(f"zip://q/a.jsonl{chain}") == "a.jsonl"


def test_bytes_are_read_at_any_place_and_the_size_is_known(base: str) -> None:
    path, data = f"{base}/b/d/e.jsonl", b"b/d/e.jsonl"
    assert size_of(path) == len(data)
    for offset in range(len(data) + 2):
        for size in (0, 1, 4, 2**40):
            assert read_range(path, offset, size) == data[offset : offset + size]
    with open_binary(path) as stream:
        stream.seek(4)
        assert stream.read() == data[4:]
    assert exists(path)
    assert not exists(f"{base}/b")
    assert is_folder(f"{base}/b")
    assert not is_folder(path)
    for read in (open_binary, size_of):
        with pytest.raises(FileNotFoundError):
            read(f"{base}/nothing")


def test_a_file_lies_in_its_folder() -> None:
    folders = {"/a/b.txt": "/a", "b.txt": ".", "/b.txt": "/", "a/b/c": "a/b"}
    folders |= {"s3://a/b/c.txt": "s3://a/b", "memory://c.txt": "memory://"}
    folders |= {"memory:///d/c.txt": "memory:///d"}
    assert {name: folder_of(name) for name in folders} == folders


OUTWARDS = ("", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "s3://b/x", "file:///x")


@pytest.mark.parametrize("root", ["folder", "memory://folder"])
def test_a_name_that_leads_out_is_refused_by_its_record(root: str) -> None:
    told = r"^list\.json, record 3: .*(inside|in none of) .*folder"
    for name in (*OUTWARDS, "a\0b", "..\\x"):
        with pytest.raises(ValueError, match=told):
            join(root, name, "list.json, record 3")
        with pytest.raises(ValueError, match=told):
            inside([root], name, "list.json, record 3")


def test_a_url_has_further_ways_out_that_are_refused() -> None:
    for name in ("%2e%2e/x", "a/%2E%2E/x", "..%2fx", "x::file", "a::/etc/x"):
        with pytest.raises(ValueError, match=r"^here: "):
            join("https://host/folder", name, "here")


@given(parts=st.lists(st.sampled_from(["..", ".", "", "a", "a..", "..a", "é", " "]), max_size=5))
@settings(max_examples=200, deadline=None)
def test_no_name_reaches_outside_its_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        found = inside(["/some/root"], name, "here")
    except ValueError:
        assert ".." in parts or name[:1] in ("", "/")
        return
    assert f"{os.path.normpath(found)}/".startswith("/some/root/")


def test_links_lead_wherever_they_lead_and_names_do_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub/a.png").write_bytes(b"a")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/b.png").write_bytes(b"b")
    (root / "in").symlink_to(root / "sub")
    (root / "out").symlink_to(tmp_path / "disk")
    (root / "b.png").symlink_to(tmp_path / "disk/b.png")
    (tmp_path / "linked").symlink_to(root)
    (tmp_path / "again").symlink_to("linked")
    for folder in (root, tmp_path / "linked"):
        names = ["in/a.png", "out/b.png", "b.png", f"{root}/in/a.png", f"file://{root}/b.png"]
        names += [f"{root}//in/./a.png", f"file:{root}/b.png", f"file://localhost{root}/b.png"]
        names += [f"{tmp_path}/again/out/b.png", f"{tmp_path}/again/in/a.png"]
        read = [Path(inside([str(folder)], name, "here")).read_bytes() for name in names]
        assert read == [b"a", b"b", b"b", b"a", b"b", b"a", b"b", b"b", b"b", b"a"]
        for name in ("../disk/b.png", f"{root}/../disk/b.png", "in/../../disk/b.png"):
            with pytest.raises(ValueError, match=r"^here: .* is no name of a file inside"):
                inside([str(folder)], name, "here")
        with pytest.raises(ValueError, match=r"^here: .* lies in none of .*root|linked"):
            inside([str(folder)], str(tmp_path / "disk/b.png"), "here")
    both = [str(tmp_path / "disk"), str(root)]
    assert inside(both, f"{root}/b.png", "here") == f"{root}/b.png"


# Lines.

LINES = [b"one\n", b"\n", b"\xff\xfe no text\n", b"three\r\n", b"last, without an end"]
RANDOM = random.Random(3)
NOISE = [RANDOM.randbytes(30).hex().encode() + b"\n" for _ in range(3000)]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def zstd_stream(data: bytes) -> bytes:
    """Without the length of the data in its head, as from a pipe."""
    packer = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return packer.compress(data) + packer.flush()


def lz4(data: bytes) -> bytes:
    return bytes(pa.compress(data, "lz4", asbytes=True))


PACKED = {
    "a.jsonl": lambda data: data,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress,
    "a.jsonl.lz4": lz4,
    "a.jsonl.zst": zstd,
    "a.jsonl.zstd": zstd_stream,
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("lines", [LINES, NOISE, [b"x" * 3_000_000 + b"\n", b"y\n"]])
def test_lines_come_out_as_they_went_in(put: Put, name: str, lines: list[bytes]) -> None:
    data = b"".join(lines)
    half = len(lines[0])
    # In one piece, and in two that stand behind each other.
    for packed in (PACKED[name](data), PACKED[name](data[:half]) + PACKED[name](data[half:])):
        assert list(read_lines(put(name, packed))) == lines


@pytest.mark.parametrize("name", list(PACKED)[1:])
@pytest.mark.parametrize("lines", [LINES, NOISE])
def test_a_packed_file_that_is_cut_at_any_byte_is_refused_by_name(
    put: Put, name: str, lines: list[bytes]
) -> None:
    packed = PACKED[name](b"".join(lines))
    ends = {*range(20), *range(len(packed) - 20, len(packed)), *range(0, len(packed), 4999)}
    for end in sorted(ends & set(range(len(packed)))):
        path = put(name, packed[:end])
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
def test_the_content_says_how_a_file_is_packed_and_not_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "plain"}\n' * 2)
    assert list(read_lines(str(path))) == [b'{"text": "plain"}\n'] * 2
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=name):
        list(read_lines(str(path)))
    for pack in PACKED.values():
        path.write_bytes(pack(b"".join(NOISE[:9])))
        assert list(read_lines(str(path))) == NOISE[:9]
        plain = tmp_path / "plain.jsonl"
        plain.write_bytes(pack(b"".join(LINES)))
        assert list(read_lines(str(plain))) == LINES
        assert read_head(str(plain), 6) == b"one\n\n\xff"


def test_what_is_packed_so_that_it_is_not_read_here_says_how_to_unpack_it(put: Put) -> None:
    text = b'{"text": "a"}\n'
    twice = put("a.jsonl.gz", gzip.compress(zstandard.compress(text)))
    with pytest.raises(ValueError, match="is compressed twice; unpack it once"):
        list(read_lines(twice))
    window = zstandard.ZstdCompressionParameters(window_log=30)
    packer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    long = put("b.jsonl.zst", packer.compress(text) + packer.flush())
    with pytest.raises(ValueError, match="has a long window; unpack it: zstd -d --long=31"):
        list(read_lines(long))


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
    monkeypatch.setattr(files_module, "MAX_LINE_BYTES", 1000)
    path = tmp_path / name
    lines = [b"a\n", b"b" * 999 + b"\n", b"c" * 1000]
    path.write_bytes(PACKED[name](b"".join(lines)))
    assert list(read_lines(str(path))) == lines
    path.write_bytes(PACKED[name](b"a\n" + b"b" * 1000 + b"\n"))
    with pytest.raises(ValueError, match="line 2 is longer than 1,000 bytes"):
        list(read_lines(str(path)))


# Copies.


def texts(*found: str) -> bytes:
    return as_lines([{"text": text} for text in found])


def check(put: Put, files: Iterable[tuple[str, bytes]]) -> None:
    refuse_twins({put(name, data): len(data) for name, data in files})


ONE, TWO, TABLE = texts("one", "first"), texts("two"), as_parquet([{"text": "one"}])
RIVER = texts(*(f"The river {n} is wide." for n in range(300)))


TWINS: list[tuple[dict[str, bytes], str]] = [
    ({"a.jsonl": ONE, "a.jsonl.gz": gzip.compress(ONE)}, "by their names"),
    ({"d/a.jsonl": ONE, "d/a.jsonl.zst": zstd(ONE)}, "by their names"),
    ({"a.json.gz": gzip.compress(ONE), "a.json.zstd": zstd(ONE)}, "by their names"),
    ({"a.json": ONE, "a.jsonl": TWO}, "by their names"),
    ({"a.parquet": TABLE, "a.jsonl.gz": gzip.compress(ONE)}, "by their names"),
    ({"a.tar": tar({"0": ONE}), "a.TGZ": gzip.compress(tar({"0": ONE}))}, "by their names"),
    ({"a.tar": tar({"0": ONE}), "b/a.tgz": gzip.compress(tar({"0": ONE}))}, "once compressed"),
    ({"a.jsonl": ONE, "backup/a.jsonl": ONE}, "the same 34 bytes"),
    ({"a.jsonl": ONE, "a (1).jsonl": ONE}, "the same 34 bytes"),
    ({"b/novel.txt": b"Call me", "c/old.txt": b"Call me"}, "the same 7 bytes"),
    ({"raw/a.jsonl": ONE, "a.jsonl.gz": gzip.compress(ONE)}, "once compressed"),
    ({"a.jsonl": RIVER, "packed/a.jsonl.zst": zstd(RIVER)}, "once compressed"),
    ({"a/a.jsonl.gz": gzip.compress(ONE), "b/a.jsonl.zst": zstd(ONE)}, "once compressed"),
    (
        {"a.jsonl.gz": gzip.compress(ONE), "b/a.jsonl.gz": gzip.compress(ONE, mtime=9)},
        "once compressed",
    ),
]


def test_two_files_that_are_one_are_refused_with_both_names(put: Put) -> None:
    others = {"x.jsonl": texts("x"), "y.jsonl": texts("y"), "z.txt": b"z"}
    check(put, others.items())
    for files, why in TWINS:
        with pytest.raises(ValueError, match="would count twice; remove one") as caught:
            check(put, {**others, **files}.items())
        assert why in str(caught.value), files.keys()
        assert all(put(name, data) in str(caught.value) for name, data in files.items())


def test_files_that_are_alike_and_differ_are_read(put: Put) -> None:
    big, changed = bytearray(b"x" * 400_000), bytearray(b"x" * 400_000)
    changed[200_000] = ord("y")
    check(
        put,
        {
            "a/part-0.jsonl": texts("one"),
            "b/part-0.jsonl": texts("two"),
            "c/part-0.jsonl.gz": gzip.compress(texts("six")),
            "c/part-1.jsonl.gz": gzip.compress(texts("ten")),
            "empty-0.jsonl": b"",
            "empty-1.jsonl": b"",
            "thesis.tex": b"tex",
            "thesis.txt": b"txt",
            "big.txt": bytes(big),
            "changed.txt": bytes(changed),
        }.items(),
    )


def test_a_link_and_what_it_leads_to_are_one_file_and_empty_ones_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl and .*b\.jsonl are one file"):
        refuse_twins({str(tmp_path / name): 0 for name in ("a.jsonl", "b.jsonl")})


def test_only_files_of_one_size_and_equal_ends_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    whole = copies.read_range

    def counted(path: str, offset: int, size: int) -> bytes:
        read.append((Path(path).name, size))
        return whole(path, offset, size)

    monkeypatch.setattr(copies, "read_range", counted)
    sizes = {}
    for number in range(20):
        path = tmp_path / f"{number:02d}.tar"
        path.write_bytes(number.to_bytes(2, "big") * (150_000 + number % 10))
        sizes[str(path)] = path.stat().st_size
    refuse_twins(sizes)
    assert {size for _, size in read} == {2**16}
    assert len(read) == 40
    read.clear()
    sizes.pop(str(tmp_path / "03.tar"))
    refuse_twins(sizes)
    assert "13.tar" not in {name for name, _ in read}


def test_what_is_named_alone_is_read_beside_its_copy(tmp_path: Path) -> None:
    for name in ("a.jsonl", "backup/a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ONE if name.endswith("l") else gzip.compress(ONE))
    found = run("text", tmp_path / "a.jsonl", tmp_path / "out")
    assert found["train"]["examples"] == 2


def test_braces_stand_for_each_of_their_names(put: Put) -> None:
    for name in ("08", "09", "9", "10", "11"):
        put(f"{name}.tar", b"tar")
    base = put("", b"")
    for pattern, names in (
        ("{08..10}.tar", ["08", "09", "10"]),
        ("{9..11}.tar", ["10", "11", "9"]),
        ("{9,1[01]}.tar", ["10", "11", "9"]),
    ):
        found = short(shown_files(f"{base}/{pattern}"), base)
        assert found == [f"{name}.tar" for name in names]
    with pytest.raises(FileNotFoundError, match=r"00\.tar is not there, which .*/\{0,1\}\{8,0"):
        shown_files(f"{base}/{{0,1}}{{8,0}}.tar")


def test_a_file_with_braces_in_its_name_is_itself(tmp_path: Path) -> None:
    (tmp_path / "{0,1}.tar").touch()
    assert shown_files(f"{tmp_path}/{{0,1}}.tar") == [f"{tmp_path}/{{0,1}}.tar"]


@pytest.mark.parametrize("order", ["le", "be"])
def test_text_in_utf_16_is_read_and_a_cut_one_is_named(put: Put, order: str) -> None:
    text = '{"text": "née 🦆"}\n' * 3
    data = ("\ufeff" + text).encode(f"utf-16-{order}")
    assert b"".join(read_lines(put("a.jsonl", data))) == text.encode()
    with pytest.raises(ValueError, match=r"a\.jsonl is cut short or damaged"):
        list(read_lines(put("a.jsonl", data[:-1])))


def test_utf_32_is_not_taken_for_utf_16(put: Put) -> None:
    data = "\ufeffa\n".encode("utf-32-le")
    assert b"".join(read_lines(put("a.txt", data))) == data


def test_names_in_braces_are_asked_for_at_once_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    system, folder = fsspec.filesystem("memory"), "/braces"
    for n in range(2):
        system.pipe_file(f"{folder}/{n}.tar", tar({"0.png": png(n), "0.txt": b"box"}))
    asked, together = Counter[str](), Barrier(2)

    def count(url: str) -> Any:
        asked[url] += 1
        together.wait(5)
        return kind_of(url)

    monkeypatch.setattr(files_module, "kind_of", count)
    source = f"memory:/{folder}/{{0..1}}.tar"
    units = caption_units([source], OPTIONS)
    assert unread_files("captions", [source], units) == []
    assert asked == {f"memory:/{folder}/{n}.tar": 1 for n in range(2)}
    system.rm(folder, recursive=True)


def test_what_is_asked_of_a_server_is_no_part_of_a_name() -> None:
    assert full_name("https://host/a.tar.gz?download=true") == "a.tar"
    assert full_name("https://host/a.parquet?X=b/c#d") == "a.parquet"


@pytest.mark.parametrize(("name", "pack"), [("a.xz", lzma.compress), ("a.bz2", bz2.compress)])
def test_what_follows_on_a_packed_stream_is_read_or_refused(
    put: Put, name: str, pack: Callable[[bytes], bytes]
) -> None:
    one, two = pack(b"one\n" * 9), pack(b"two\n")
    for padding in (b"", b"\0" * 8):
        path = put(name, one + padding + two + padding)
        assert list(read_lines(path)) == [b"one\n"] * 9 + [b"two\n"]
    for rest in (b"no stream at all", bytes([two[0] ^ 1]) + two[1:], two[:-1], two[:3]):
        with pytest.raises(ValueError, match=r"is cut short or damaged"):
            list(read_lines(put(name, one + rest)))
