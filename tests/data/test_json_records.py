"""JSON records: the entries of a list one at a time, and what is no object."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.data.formats import records
from midstream.data.formats.records import json_object, list_entries, unicode_problem
from midstream.data.source_writer import Reject

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
        patch.setattr(records, "_PIECE_BYTES", piece)
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
        (b"[1]".decode().encode("utf-16"), "begins with"),
        (b"\x1f\x8b\x08\x00", "begins with"),
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
    monkeypatch.setattr(records, "MAX_ENTRY_BYTES", 10_000)
    monkeypatch.setattr(records, "_PIECE_BYTES", 100)
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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": 1', "not a JSON object"),
        (b'{"a": 1} {"b": 2}', "not a JSON object"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "not a JSON object"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"a": "é"}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_what_is_no_object_says_why(data: bytes, reason: str) -> None:
    found = json_object(data, "a.jsonl, line 7")
    assert isinstance(found, Reject)
    assert (found.where, found.reason) == ("a.jsonl, line 7", reason)


def test_an_object_is_read_and_half_a_surrogate_pair_is_noticed() -> None:
    assert json_object(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n', "here") == {"a": "é"}
    for text, whole in (("\ud800", False), ("a\udfffb", False), ("\U00010000", True), ("", True)):
        found = json_object(json.dumps({"a": text}).encode(), "here")
        assert found == {"a": text}
        assert (unicode_problem(text) == "") is whole
