"""Tar archives and JSON records: whole ones are read to the byte, damaged ones are refused."""

import io
import json
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inputs import Members, tar
from midstream.data.formats import record_files, records
from midstream.data.formats.record_files import json_object, list_entries, unicode_problem
from midstream.data.formats.records import TOO_LARGE, TWICE, UNSAFE, Member, samples_of, scan_tar
from midstream.data.source_writer import Reject, or_reject

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
ONE_OF_ALL = ["pax", *(pytest.param(form, marks=pytest.mark.faults) for form in ("gnu", "ustar"))]
LONG = "folder/" * 30 + "ünïcode-" * 20 + "0.jpg"


def gnu_tar(members: Members) -> bytes:
    return tar(members, tarfile.GNU_FORMAT)


def written(folder: Path, data: bytes) -> str:
    path = folder / "a.tar"
    path.write_bytes(data)
    return str(path)


def contents(path: str) -> list[tuple[str, bytes]]:
    return [(member.name, member.data) for member in scan_tar(path)]


def special(kind: bytes, name: str) -> bytes:
    """A header alone, followed by the archive's end."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info.tobuf(tarfile.GNU_FORMAT) + gnu_tar([])


NAMES = st.from_regex(r"[a-zé]{1,150}(/[a-z ]{1,60}){0,3}\.[a-z.]{1,9}", fullmatch=True)


@pytest.mark.parametrize("form", ["gnu", "pax"])
@settings(max_examples=40, deadline=None)
@given(members=st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=6))
def test_every_member_is_read_whole_and_lies_where_its_offset_says(
    tmp_path_factory: pytest.TempPathFactory, form: str, members: list[tuple[str, bytes]]
) -> None:
    whole = tar(members, FORMATS[form])
    found = list(scan_tar(written(tmp_path_factory.mktemp("tar"), whole)))
    assert [(member.name, member.data) for member in found] == members
    for member in found:
        assert whole[member.offset : member.offset + member.size] == member.data


@pytest.mark.parametrize("form", ONE_OF_ALL)
def test_a_tar_cut_at_any_byte_is_refused(tmp_path: Path, form: str) -> None:
    name = LONG if form != "ustar" else "folder/" * 20 + "0.jpg"
    members = [("a.txt", b"x" * 513), (name, b"y" * 100), ("empty.txt", b""), ("c.txt", b"z" * 512)]
    whole = tar(members, FORMATS[form])
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512 + 1024
    assert end < len(whole)
    # Every seventh byte, and all around the blocks' ends.
    edges = (block + by for block in range(0, end, 512) for by in (-1, 0, 1))
    for size in sorted({*range(0, end, 7), *edges} - {-1}):
        path = written(tmp_path, whole[:size])
        found: list[tuple[str, bytes]] = []
        with pytest.raises(ValueError, match=r"a\.tar is not a whole tar file .*fetch it again"):
            found.extend((member.name, member.data) for member in scan_tar(path))
        # What came before the error is whole.
        assert found == members[: len(found)]
    for size in (end, end + 512, len(whole)):
        assert contents(written(tmp_path, whole[:size])) == members


@pytest.mark.parametrize("form", ONE_OF_ALL)
def test_a_damaged_header_is_refused_wherever_it_is_damaged(tmp_path: Path, form: str) -> None:
    members = [("a.txt", b"x" * 10), ("b.txt", b"y" * 10), ("c.txt", b"z" * 10)]
    whole = tar(members, FORMATS[form])
    refused = 0
    for start in (0, 1024, 2048):
        for position in range(start, start + 512):
            damaged = bytearray(whole)
            damaged[position] ^= 0x15
            try:
                assert contents(written(tmp_path, bytes(damaged))) == members
            except ValueError:
                refused += 1
    # Only the two bytes that close the checksum's own field change nothing.
    assert refused >= 3 * 510


def test_anything_but_zeros_behind_the_end_is_refused(tmp_path: Path) -> None:
    one = gnu_tar([("a.txt", b"x")])
    for behind in (1, 511, 512, 1023, 1024, 5000, -1):
        whole = bytearray(one)
        whole[1024 + behind if behind >= 0 else -1] = 7
        with pytest.raises(ValueError, match=r"a\.tar"):
            contents(written(tmp_path, bytes(whole)))
    # A second archive, too.
    with pytest.raises(ValueError, match=rf"another one begins .* {len(one):,}\); give each as"):
        contents(written(tmp_path, one + one))
    with pytest.raises(ValueError, match=r"further data.*fetch it again"):
        contents(written(tmp_path, one + b"x" * len(one)))


def test_a_zip_in_place_of_an_archive_is_told(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", b"x" * 2000)
    with pytest.raises(ValueError, match=r"a\.tar is a zip, not a tar; unpack it"):
        contents(written(tmp_path, stream.getvalue()))


def test_zeros_are_padding_but_an_archive_of_nothing_else_is_damaged(tmp_path: Path) -> None:
    one = gnu_tar([("a.txt", b"x")])
    assert contents(written(tmp_path, one + bytes(2**20))) == [("a.txt", b"x")]
    assert contents(written(tmp_path, gnu_tar([]))) == []
    with pytest.raises(ValueError, match="all zero"):
        contents(written(tmp_path, bytes(2**20)))


@pytest.mark.parametrize("data", [b"", b"<html>" * 300, b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.tar is (not a whole tar|cut short|not .* a page)"):
        contents(written(tmp_path, data))


def test_a_name_that_leads_out_and_what_is_no_file_are_flagged_and_not_read(
    tmp_path: Path,
) -> None:
    for name in ("../a.jpg", "/etc/a.jpg", "a/../../b.jpg", "a/..", "..\\a.jpg", "\\a.jpg"):
        path = written(tmp_path, gnu_tar([(name, b"secret"), ("a..b/c..jpg", b"fine")]))
        first, second = scan_tar(path)
        assert (first.name, first.problem, first.data) == (name, UNSAFE, b"")
        assert (second.problem, second.data) == ("", b"fine")
    links = (tarfile.SYMTYPE, tarfile.LNKTYPE)
    for kind in (*links, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        path = written(tmp_path, special(kind, "a.jpg"))
        assert [(m.name, m.problem, m.data) for m in scan_tar(path)] == [("a.jpg", UNSAFE, b"")]


def test_folders_are_left_out(tmp_path: Path) -> None:
    assert contents(written(tmp_path, special(tarfile.DIRTYPE, "a"))) == []


def test_a_member_over_the_limit_is_flagged_unread_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LARGEST_BYTES", 100)
    path = written(tmp_path, gnu_tar([("a.jpg", b"x" * 101), ("b.jpg", b"y" * 100)]))
    large, fitting = scan_tar(path)
    assert (large.problem, large.size, large.data) == (TOO_LARGE, 101, b"")
    assert (fitting.problem, fitting.data) == ("", b"y" * 100)


def test_memory_holds_one_member_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path, gnu_tar([(f"{n}.jpg", bytes([n]) * 2**20) for n in range(1, 11)]))
    tracemalloc.start()
    try:
        count = sum(1 for member in scan_tar(path) if member.size == 2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10
    assert peak < 5 * 2**20


def test_the_number_of_members_does_not_raise_memory(tmp_path: Path) -> None:
    peaks = []
    for count in (200, 1500):
        path = written(tmp_path, gnu_tar([(f"{n}.jpg", b"x") for n in range(count)]))
        tracemalloc.start()
        try:
            assert sum(1 for _ in scan_tar(path)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**18


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def _pax(headers: dict[str, str]) -> bytes:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers, info.size = headers, 10
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(512)


@pytest.mark.parametrize(
    "head",
    [
        _header("a.jpg", -512),
        _header("a.jpg", 2**70),
        _header("a", -1024, tarfile.GNUTYPE_LONGNAME),
        _header("a", 2**21, tarfile.GNUTYPE_LONGNAME) + b"n" * 2**21 + _header("a.jpg", 0),
        _pax({"size": "-1024"}),
        _pax({"size": "99999999999999999999"}),
        _pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": "10"}),
        (_header("a", 512, tarfile.XHDTYPE) + bytes(512)) * 5000 + _header("a.jpg", 0),
    ],
    ids=["back", "huge", "long back", "long name", "pax back", "pax huge", "sparse", "nested"],
)
def test_headers_made_to_mislead_are_refused(tmp_path: Path, head: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.tar is not a whole tar file"):
        contents(written(tmp_path, head + gnu_tar([])))


def test_a_url_is_read_like_a_file(tmp_path: Path) -> None:
    whole = tar([(LONG, b"x" * 700), ("b.txt", b"y")])
    memory = fsspec.filesystem("memory")
    memory.pipe({"/tars/a.tar": whole, "/tars/cut.tar": whole[:-10]})
    assert list(scan_tar("memory://tars/a.tar")) == list(scan_tar(written(tmp_path, whole)))
    with pytest.raises(ValueError, match=r"memory://tars/cut\.tar"):
        list(scan_tar("memory://tars/cut.tar"))
    with pytest.raises(FileNotFoundError):
        list(scan_tar("memory://tars/none.tar"))


def keys(path: str) -> list[tuple[str, list[str], str]]:
    return [(s.key, sorted(s.members), s.problem) for s in samples_of(path)]


def test_samples_are_grouped_up_to_the_first_dot_of_the_file_name(tmp_path: Path) -> None:
    names = ["v1.2/0.jpg", "v1.2/0.syn.json", "v1.2/0.TXT", "v1.2/1.jpg", "README", ".hidden"]
    path = written(tmp_path, gnu_tar([(name, name.encode()) for name in names]))
    assert keys(path) == [("v1.2/0", ["jpg", "syn.json", "txt"], ""), ("v1.2/1", ["jpg"], "")]
    first = next(samples_of(path))
    assert first.members["txt"].data == b"v1.2/0.TXT"
    assert first.where == f"{path}, sample v1.2/0"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.jpg", "0.jpg", "0.txt", "1.jpg"], [("0", TWICE), ("1", "")]),
        (["0.jpg", "0.JPG"], [("0", TWICE)]),
        (["0.jpg", "1.jpg", "0.txt"], [("0", ""), ("1", ""), ("0", TWICE)]),
        (["0.jpg", "README", "0.txt"], [("0", "")]),
        (["../0.jpg", "../0.txt", "1.jpg"], [("../0", UNSAFE), ("1", "")]),
        (["/0", "1.jpg"], [("/0", UNSAFE), ("1", "")]),
    ],
)
def test_a_bad_sample_is_told_once_and_its_neighbours_stay(
    tmp_path: Path, names: list[str], expected: list[tuple[str, str]]
) -> None:
    path = written(tmp_path, gnu_tar([(name, b"x") for name in names]))
    found = list(samples_of(path))
    assert [(sample.key, sample.problem) for sample in found] == expected
    for sample in found:
        assert bool(sample.members) == (not sample.problem)


def test_a_sample_over_the_limit_is_told_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LARGEST_BYTES", 100)
    members = [("0.jpg", b"x" * 60), ("0.npz", b"x" * 60), ("1.jpg", b"y"), ("2.jpg", b"z" * 101)]
    found = keys(written(tmp_path, gnu_tar(members)))
    assert found == [("0", [], TOO_LARGE), ("1", ["jpg"], ""), ("2", [], TOO_LARGE)]


@settings(max_examples=100, deadline=None)
@given(
    names=st.sets(
        st.from_regex(r"[ab.]{1,5}(/[ab.]{1,5}){0,2}", fullmatch=True).filter(
            # Of hidden files in folders, WebDataset makes a sample named like the folder.
            lambda name: ".." not in name.split("/") and "/." not in name
        ),
        max_size=12,
    )
)
def test_keys_and_suffixes_are_those_of_webdataset(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    group_by_keys = pytest.importorskip("webdataset").tariterators.group_by_keys
    files = [{"fname": name, "data": name.encode(), "__url__": ""} for name in sorted(names)]
    theirs = [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in group_by_keys(iter(files))
    ]
    members = [(name, name.encode()) for name in sorted(names)]
    ours = list(samples_of(written(tmp_path_factory.mktemp("tar"), gnu_tar(members))))
    assert [sample.key for sample in ours] == [key for key, _ in theirs]
    for sample, (_, parts) in zip(ours, theirs, strict=True):
        if sample.problem != TWICE:
            assert {suffix: m.data for suffix, m in sample.members.items()} == parts


@pytest.mark.parametrize("whole", [(), (".json",)])
def test_what_macos_puts_beside_members_is_no_sample(
    tmp_path: Path, whole: tuple[str, ...]
) -> None:
    names = ["./._0.1.json", "./0.1.json", "a/._b.json", "a/b.json"]
    path = written(tmp_path, gnu_tar([(name, b"{}") for name in names]))
    keys = [sample.key for sample in samples_of(path, whole)]
    assert keys == ["./0.1" if whole else "./0", "a/b"]


def test_a_members_data_stays_out_of_messages() -> None:
    assert "secret" not in repr(Member("a.jpg", 0, 6, b"secret"))


# JSON.


TEXTS = st.lists(
    st.sampled_from(['"', "\\", "[", "]", "{", "}", ",", ":", "\n", "é", "\ud800", "a", '\\"']),
    max_size=8,
).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@given(
    values=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 1]),
    piece=st.sampled_from([1, 2, 3, 7, 50, 2**20]),
    escaped=st.booleans(),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
@settings(max_examples=100, deadline=None)
def test_a_list_gives_its_entries_at_any_size_of_the_pieces_read(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[Any],
    indent: int | None,
    piece: int,
    escaped: bool,
    bom: bytes,
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=escaped)
    path = tmp_path_factory.getbasetemp() / "entries.json"
    path.write_bytes((bom if piece > 3 else b"") + text.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_PIECE_BYTES", piece)
        found = list(list_entries(str(path)))
    assert [json.loads(entry.decode("utf-8", "surrogatepass")) for entry in found] == values


@given(values=st.lists(VALUES, min_size=1, max_size=3))
@settings(max_examples=8, deadline=None)
def test_a_list_that_is_cut_at_any_byte_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any]
) -> None:
    data = json.dumps(values).encode()
    path = tmp_path_factory.getbasetemp() / "cut.json"
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"cut\.json (ends inside|begins with)"):
            list(list_entries(str(path)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with"),
        (b" \n", "begins with"),
        (b'{"a": []}', "begins with"),
        (b'"[]"', "begins with"),
        (b"\x1f\x8b\x08\x00", "is cut short"),
        (b"[1] [2]", "goes on behind its list"),
        (b"[1]" + b" " * 3_000_000 + b"x", "goes on behind its list"),
        (b'["a]', "ends inside"),
        (b"[" * 200_000, "ends inside"),
    ],
)
def test_what_is_no_list_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.json {message}"):
        list(list_entries(str(path)))


def test_an_entry_that_is_too_long_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_files, "MAX_ENTRY_BYTES", 10_000)
    monkeypatch.setattr(record_files, "_PIECE_BYTES", 100)
    path = tmp_path / "long.json"
    # A quotation mark too few makes one string of the records behind it.
    path.write_text('[{"a": 1}, {"a": "x}' + ', {"b": 2}' * 5000 + "]")
    with pytest.raises(ValueError, match=r"long\.json: entry 1 is longer than 10,000 bytes"):
        list(list_entries(str(path)))
    path.write_text('[{"a": 1}, {"a": "' + "x" * 5000 + '"}' + ', {"b": 2}' * 5000 + "]")
    assert len(list(list_entries(str(path)))) == 5002


def test_a_list_is_read_from_a_url_too() -> None:
    fsspec.filesystem("memory").pipe("/lists/a.json", b'[{"a": 1}, [2, 3], "4,"]')
    assert list(list_entries("memory://lists/a.json")) == [b'{"a": 1}', b"[2, 3]", b'"4,"']


def test_what_is_no_object_says_why() -> None:
    no_object = [
        *(b"", b"[1]", b'"text"', b"null", b'{"a": 1', b'{"a": 1} {"b": 2}'),
        *(b'{"a": ' + b"[" * 100_000 + b"}", b'{"a": ' + b"9" * 10_000 + b"}"),
    ]
    no_utf8 = [b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', '{"a": "é"}'.encode("utf-16")]
    for bad, reason in ((no_object, "not a JSON object"), (no_utf8, "not UTF-8")):
        for data in bad:
            found = or_reject("a.jsonl, line 7", json_object, data)
            assert isinstance(found, Reject), data[:20]
            assert (found.where, found.reason) == ("a.jsonl, line 7", reason)


def test_an_object_is_read_and_half_a_surrogate_pair_is_noticed() -> None:
    assert json_object(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n') == {"a": "é"}
    for text, whole in (("\ud800", False), ("a\udfffb", False), ("\U00010000", True), ("", True)):
        found = json_object(json.dumps({"a": text}).encode())
        assert found == {"a": text}
        assert (unicode_problem(text) == "") is whole
