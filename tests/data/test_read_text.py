"""Text formats: what comes out is what went in, and what cannot be used is named with a reason."""

import bz2
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inputs import OPTIONS, Put, as_lines, read_all

from midstream.data.formats import read_text as module
from midstream.data.formats.read_text import text_units
from midstream.data.formats.records import ReadOptions, TextRecord
from midstream.data.source_writer import Reject

WORDS = random.Random(1)
DOCUMENTS = [
    "Hello.",
    "two\nlines\r\nand \u00e9\u65e5\U0001f600 \x00 \u2028 end ",
    "x" * 150_000,
    "".join(WORDS.choices("abcdef \n", k=120_000)),
    "\ufeffmark",
    *(f"document {number}" for number in range(700)),
]


def read(path: str, options: ReadOptions = OPTIONS) -> list[Any]:
    return read_all("text", path, options=options)


def texts(items: Sequence[Any]) -> list[str]:
    assert [item for item in items if not isinstance(item, TextRecord)] == []
    return [item.text for item in items]


def reasons(items: Sequence[Any]) -> list[str]:
    return [item.reason if isinstance(item, Reject) else "" for item in items]


def lines(documents: Sequence[Any], key: str = "text") -> bytes:
    # As DCLM's own: the text among other fields.
    records = [
        {"bff_contained_ngram_count_before_dedupe": 0, key: text, "url": "https://a.example/b"}
        for text in documents
    ]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def parquet(documents: Sequence[Any], key: str = "text", kind: Any = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    column = pa.array(documents, kind or pa.string())
    table = pa.table({"id": pa.array(range(len(documents))), key: column})
    pq.write_table(table, stream, **options)
    return stream.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": lambda data: data,
    "a.json": lambda data: data,
    "c4-train.00000-of-01024.json.gz": gzip.compress,
    "a.jsonl.gz": gzip.compress,
    "shard_00000000_processed.jsonl.zst": zstandard.ZstdCompressor().compress,
    "shard_00000001_processed.jsonl.zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["data00.json", "data00.jsonl", "data00.JSON.bz2"])
def test_a_list_where_lines_were_expected_is_read_as_lines_are(
    put: Put, indent: int | None, name: str
) -> None:
    records = [{"text": text} for text in DOCUMENTS]
    data = json.dumps(records, indent=indent).encode()
    path = put(name, bz2.compress(data) if name.endswith("bz2") else data)
    as_lines = put("lines.jsonl", lines(DOCUMENTS))
    assert [getattr(item, "text", item) for item in read_all("text", path)] == [
        item.text for item in read_all("text", as_lines)
    ]
    assert read_all("text", path)[1].where == f"{path}, record 1"
    # Lines that are lists themselves are bad lines, not one list.
    found = read_all("text", put("bad.jsonl", b'["a"]\n{"text": "b"}\n'))
    assert [getattr(item, "text", "") for item in found] == ["", "b"]


@pytest.mark.parametrize("name", PACK)
def test_json_lines_give_every_text_as_it_is(put: Put, name: str) -> None:
    path = put(name, PACK[name](lines(DOCUMENTS)))
    found = read(path)
    assert texts(found) == DOCUMENTS
    assert [item.where for item in found[:2]] == [f"{path}, line 1", f"{path}, line 2"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
@pytest.mark.parametrize("options", [{}, {"row_group_size": 100}, {"compression": "zstd"}])
def test_parquet_gives_every_text_as_it_is(put: Put, kind: Any, options: dict[str, Any]) -> None:
    path = put("train-00000-of-00001.parquet", parquet(DOCUMENTS, kind=kind, **options))
    found = read(path)
    assert texts(found) == DOCUMENTS
    assert found[-1].where == f"{path}, row {len(DOCUMENTS) - 1}"


def test_a_plain_text_file_is_one_document_without_mark_and_carriage_returns(put: Put) -> None:
    text = "one\r\ntwo\r\n\r\n three \U0001f600\rfour"
    path = put("novel.txt", b"\xef\xbb\xbf" + text.encode())
    assert read(path) == [TextRecord(path, "one\ntwo\n\n three \U0001f600\rfour")]
    long = "a\n" * 200_000
    assert texts(read(put("long.txt", long.encode()))) == [long]


def test_lines_of_a_mark_alone_part_a_plain_text_file(put: Put) -> None:
    end = "<|endoftext|>"
    path = put("stories.txt", f"\nOne.\n\n{end}\r\nTwo {end} goes on.\n{end} \n".encode())
    found = read(path)
    assert texts(found) == ["One.", f"Two {end} goes on."]
    assert [item.where for item in found] == [f"{path}, document {n}" for n in (0, 1)]


def test_bad_lines_are_rejected_with_their_place_and_reason_and_good_ones_stay(put: Put) -> None:
    bad = [
        (b"{", "not a JSON object"),
        (b'["text"]', "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"text": ' + b"[" * 50_000, "not a JSON object"),
        (b'{"text": 1' + b"0" * 9_000 + b"}", "not a JSON object"),
        (b'{"body": "x"}', "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": 3}', "no text"),
        (b'{"text": ["x"]}', "no text"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n\\t"}', "empty text"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "a\\ud83d"}', "not Unicode"),
        (b'{"text": "\\udc00"}', "not Unicode"),
    ]
    for at_front in (True, False):
        data = [line for line, _ in bad]
        data = [*data, b'{"text": "good"}'] if at_front else [b'{"text": "good"}', *data]
        path = put("a.jsonl", b"\n".join(data))
        found = read(path)
        assert sorted(reasons(found)) == sorted(["", *(reason for _, reason in bad)])
        assert [x.where for x in found] == [f"{path}, line {n + 1}" for n in range(len(data))]
        assert [x.text for x in found if isinstance(x, TextRecord)] == ["good"]


def test_blank_lines_are_no_records_but_are_counted_in_places(put: Put) -> None:
    path = put("a.jsonl", b'\n{"text": "a"}\r\n \t \n\n{"text": "b"}\n\n')
    assert [(x.where, x.text) for x in read(path)] == [
        (f"{path}, line 2", "a"),
        (f"{path}, line 5", "b"),
    ]


def test_bad_rows_are_rejected_with_their_place_and_reason(put: Put) -> None:
    pieces = [b"good", b"\xff", b"", b" ", b"\xed\xa0\x80", b"caf\xc3\xa9"]
    ends = [sum(map(len, pieces[:n])) for n in range(len(pieces) + 1)]
    offsets = pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in ends))
    broken = pa.StringArray.from_buffers(len(pieces), offsets, pa.py_buffer(b"".join(pieces)))
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": pa.concat_arrays([broken, pa.array([None, "x"])])}), stream)
    path = put("a.parquet", stream.getvalue())
    found = read(path)
    utf8, empty = "not UTF-8", "empty text"
    assert reasons(found) == ["", utf8, empty, empty, utf8, "", "no text", ""]
    assert [item.where for item in found] == [f"{path}, row {number}" for number in range(8)]
    assert [x.text for x in found if isinstance(x, TextRecord)] == ["good", "café", "x"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty text"),
        (b"\xef\xbb\xbf", "empty text"),
        (b"\r\n \n", "empty text"),
        (b"caf\xe9", "not UTF-8"),
        # Without its mark it is UTF-8 all the same, with a zero behind each letter.
        ("text of some words".encode("utf-16-le"), "not UTF-8"),
        ("text of some words".encode("utf-32-be"), "not UTF-8"),
    ],
)
def test_a_bad_plain_text_file_is_rejected(put: Put, data: bytes, reason: str) -> None:
    path = put("a.txt", data)
    (found,) = read(path)
    assert (found.where, found.reason) == (path, reason)


def test_parquet_that_is_cut_at_any_byte_or_is_none_stops_the_reading(put: Put) -> None:
    data = parquet(["a", "b" * 50])
    for part in (*(data[:end] for end in range(0, len(data), 7)), b'{"text": "a"}\n', data[1:]):
        path = put("a.parquet", part)
        with pytest.raises(ValueError, match="is no whole parquet file") as caught:
            read(path)
        assert path in str(caught.value)


def test_parquet_without_such_a_column_of_text_names_those_it_has(put: Put) -> None:
    path = put("a.parquet", parquet(["a"], "content"))
    with pytest.raises(ValueError, match=r"has no column 'text'; .*, one of \['id', 'content'\]"):
        read(path)
    with pytest.raises(ValueError, match="column 'id' is int64, not text"):
        read(path, ReadOptions(text_key="id"))
    path = put("b.parquet", parquet([["a"]], kind=pa.list_(pa.string())))
    with pytest.raises(ValueError, match=r"column 'text' is .*, not text"):
        read(path)


def test_bytes_that_no_writer_called_text_are_read_as_utf8(put: Put) -> None:
    found = read(put("a.parquet", parquet(["café".encode(), b"\xff", None], kind=pa.binary())))
    assert reasons(found) == ["", "not UTF-8", "no text"]
    assert found[0].text == "café"
    # As pandas writes a column without a value.
    assert reasons(read(put("b.parquet", parquet([None, None], kind=pa.null())))) == ["no text"] * 2


def test_a_text_inside_another_field_is_named_with_dots(put: Put) -> None:
    options = ReadOptions(text_key="data.text")
    records = [{"data": {"text": "in"}}, {"data.text": "own"}, {"data": "x"}, {"data": {}}]
    found = read(put("a.jsonl", as_lines(records)), options)
    assert reasons(found) == ["", "", "no text", "no text"]
    assert [one.text for one in found[:2]] == ["in", "own"]
    stream = io.BytesIO()
    pq.write_table(pa.table({"data": [{"text": "in"}, None, {"text": None}]}), stream)
    found = read(put("a.parquet", stream.getvalue()), options)
    assert reasons(found) == ["", "no text", "no text"]
    assert found[0].text == "in"
    with pytest.raises(ValueError, match=r"no column 'data.body'; .*, one of \['text'\]"):
        read(put("b.parquet", stream.getvalue()), ReadOptions(text_key="data.body"))


def test_a_plain_text_file_that_is_too_large_is_refused(
    put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 10)
    assert texts(read(put("a.txt", b"x" * 10))) == ["x" * 10]
    with pytest.raises(ValueError, match=r"has 11 bytes, a document at most 10; .*\.jsonl"):
        read(put("b.txt", b"x" * 11))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_another_unicode_is_refused_with_the_way_out(put: Put, encoding: str) -> None:
    path = put("a.jsonl", '{"text": "a"}\n{"text": "b"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=f"{path} is UTF-16 or UTF-32; .* iconv") as caught:
        read(path)
    assert "\n" not in str(caught.value)


# Units.


def test_a_folder_is_one_unit_a_file_by_its_format_in_order(put: Put) -> None:
    names = ["b/a.jsonl.zst", "b/c.parquet", "d.txt", "a.jsonl"]
    for name in [*names, "README.md", "b/picture.jpg"]:
        put(name, b"")
    root = put("", b"")
    found = text_units([root])
    assert [(unit.format, unit.files[0].rpartition("put")[2]) for unit in found] == [
        (kind, f"{root}/{name}".rpartition("put")[2])
        for kind, name in (
            ("jsonl", "a.jsonl"),
            ("jsonl", "b/a.jsonl.zst"),
            ("parquet", "b/c.parquet"),
            ("txt", "d.txt"),
        )
    ]
    assert {(unit.first, unit.last) for unit in found} == {(0, None)}
    two = text_units([f"{root}/d.txt", f"{root}/b/*.parquet"])
    assert [unit.format for unit in two] == ["txt", "parquet"]


def test_what_is_not_there_unknown_or_given_twice_is_refused(put: Put) -> None:
    path, other = put("a.txt", b"a"), put("book.pdf", b"a")
    root = put("", b"")
    with pytest.raises(FileNotFoundError, match="nothing"):
        text_units([f"{root}/nothing"])
    with pytest.raises(ValueError, match=r"book\.pdf is of no known format .*parquet"):
        text_units([other])
    with pytest.raises(ValueError, match=r"a\.txt is given 2 times"):
        read_all("text", path, path)


@given(documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
@settings(max_examples=30, deadline=None)
def test_every_document_is_read_or_rejected_as_empty(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(lines(documents))
    found = read(str(path))
    assert [x.text for x in found if isinstance(x, TextRecord)] == [
        d for d in documents if d.strip()
    ]
    assert len(found) == len(documents)


def test_small_plain_texts_share_a_unit_and_all_that_are_damaged_are_told(
    put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNIT_FILES", 3)
    monkeypatch.setattr(module, "_UNIT_BYTES", 100)
    names = [*(f"{n}.txt" for n in range(4)), "4.jsonl", "5.txt", "6.txt", "7.tex"]
    for name in names:
        put(name, b'{"text": "4"}' if name == "4.jsonl" else name[:1].encode())
    put("6.txt", b"6" * 100)
    root = put("", b"")
    units = text_units([root])
    local = "://" not in root
    assert [len(unit.files) for unit in units] == ([3, 1, 1, 1, 1, 1] if local else [1] * 8)
    assert [text[0] for text in texts(read_all("text", root))] == list("01234567")
    whole = gzip.compress(b"1" * 99)
    damaged = [put(f"{name}.txt.gz", whole[:-name]) for name in (1, 2)]
    (unit, *others) = text_units([*damaged, put("3.txt", b"3")])
    assert len(others) == (0 if local else 2)
    told = r"1\.txt\.gz is cut" + (r"[^\n]*\n[^\n]*2\.txt\.gz is cut" if local else "")
    with pytest.raises(ValueError, match=told):
        list(module.read_text(unit, OPTIONS))


def test_a_record_of_records_says_which_list_is_meant(put: Put) -> None:
    record = {"type": "text_only", "tags": ["x"], "instances": [{"text": "a"}]}
    (found,) = read(put("a.json", as_lines([record])))
    assert found.detail == "it is a record of records: write the list under 'instances' alone"
