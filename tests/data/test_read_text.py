"""Text formats: what comes out is what went in, and what cannot be used is named with a reason."""

import bz2
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inputs import OPTIONS, SHARED, Put, as_lines, as_parquet, read_all, shared

from inputs import tar
from midstream.data.formats import read_text as module
from midstream.data.formats.read_text import text_units
from midstream.data.formats.records import ReadOptions, TextRecord, TokenRecord
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
    column = pa.array(documents, kind or pa.string())
    return as_parquet(pa.table({"id": range(len(documents)), key: column}), **options)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": lambda data: data,
    "a.json": lambda data: data,
    "c4-train.00000-of-01024.json.gz": gzip.compress,
    "a.jsonl.gz": gzip.compress,
    "shard_00000000_processed.jsonl.zst": zstandard.ZstdCompressor().compress,
    "shard_00000001_processed.jsonl.zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize(
    ("name", "indent"), [("data00.json", None), ("data00.jsonl", 1), ("data00.JSON.bz2", 1)]
)
def test_a_list_where_lines_were_expected_is_read_as_lines_are(
    put: Put, name: str, indent: int | None
) -> None:
    data = json.dumps([{"text": text} for text in DOCUMENTS], indent=indent).encode()
    path = put(name, bz2.compress(data) if name.endswith("bz2") else data)
    found = read(path)
    assert texts(found) == texts(read(put("lines.jsonl", lines(DOCUMENTS))))
    assert found[1].where == f"{path}, record 1"
    # Lines that are lists themselves are bad lines, not one list.
    found = read_all("text", put("bad.jsonl", b'["a"]\n{"text": "b"}\n'))
    assert [getattr(item, "text", "") for item in found] == ["", "b"]


@pytest.mark.parametrize("name", PACK)
def test_json_lines_give_every_text_as_it_is(put: Put, name: str) -> None:
    path = put(name, PACK[name](lines(DOCUMENTS)))
    found = read(path)
    assert texts(found) == DOCUMENTS
    assert [item.where for item in found[:2]] == [f"{path}, line 1", f"{path}, line 2"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (pa.string(), {}),
        (pa.large_string(), {"row_group_size": 100}),
        (pa.dictionary(pa.int32(), "str"), {"compression": "zstd"}),
    ],
)
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
    column = pa.concat_arrays([broken, pa.array([None, "x"])])
    path = put("a.parquet", as_parquet(pa.table({"text": column})))
    found = read(path)
    utf8, empty = "not UTF-8", "empty text"
    assert reasons(found) == ["", utf8, empty, empty, utf8, "", "no text", ""]
    assert [item.where for item in found] == [f"{path}, row {number}" for number in range(8)]
    assert [x.text for x in found if isinstance(x, TextRecord)] == ["good", "café", "x"]


def test_a_bad_plain_text_file_is_rejected(put: Put) -> None:
    bad = [
        (b"", "empty text"),
        (b"\xef\xbb\xbf", "empty text"),
        (b"\r\n \n", "empty text"),
        (b"caf\xe9", "not UTF-8"),
        # Without its mark it is UTF-8 all the same, with a zero behind each letter.
        ("text of some words".encode("utf-16-le"), "not UTF-8"),
        ("text of some words".encode("utf-32-be"), "not UTF-8"),
    ]
    for data, reason in bad:
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
    table = as_parquet(pa.table({"data": [{"text": "in"}, None, {"text": None}]}))
    found = read(put("a.parquet", table), options)
    assert reasons(found) == ["", "no text", "no text"]
    assert found[0].text == "in"
    with pytest.raises(ValueError, match=r"no column 'data.body'; .*, one of \['text'\]"):
        read(put("b.parquet", table), ReadOptions(text_key="data.body"))


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


@pytest.mark.parametrize("texts", [["a", "b"], {"0": "a", "1": "b"}])
def test_a_file_of_columns_is_refused(put: Put, texts: Any) -> None:
    path = put("a.json", json.dumps({"id": [1, 2], "text": texts}).encode())
    with pytest.raises(ValueError, match=r"a\.json is one object with 2 texts under 'text'"):
        read(path)


def test_zeros_at_a_files_end_are_no_other_unicode(put: Put) -> None:
    path = put("a.jsonl", b'{"text": "a"}\n' + b"\0" * 90)
    assert [getattr(one, "text", one.where) for one in read(path)] == ["a", f"{path}, line 2"]


def test_a_record_of_records_says_which_list_is_meant(put: Put) -> None:
    record = {"type": "text_only", "tags": ["x"], "instances": [{"text": "a"}]}
    (found,) = read(put("a.json", as_lines([record])))
    assert found.detail == "it is a record of records: write the list under 'instances' alone"


# OpenLM's tokenised shards: ids as they are, promised counts kept, damage named.


LENGTH = 2049


def chunks(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    found: list[list[int]] = random.integers(0, 50_432, (count, LENGTH)).tolist()
    return found


def shard(found: Sequence[Any], suffix: str = "txt") -> bytes:
    """As OpenLM's tools write it: the list's text under a number of twelve digits."""
    pack = gzip.compress if suffix.endswith("gz") else bytes
    return tar([(f"{n:012d}.{suffix}", pack(str(ids).encode())) for n, ids in enumerate(found)])


def manifest(counts: dict[str, int], key: str = "num_sequences") -> bytes:
    return "".join(json.dumps({"shard": k, key: n}) + "\n" for k, n in counts.items()).encode()


def ids(items: Sequence[Any]) -> list[list[int]]:
    assert [item for item in items if not isinstance(item, TokenRecord)] == []
    assert {item.input_ids.dtype for item in items} <= {np.dtype(np.int64)}
    return [item.input_ids.tolist() for item in items]


@pytest.mark.parametrize(
    ("suffix", "key"), [("txt", "num_sequences"), ("json", "num_chunks"), ("json.gz", None)]
)
def test_shards_give_their_ids_as_they_are(put: Put, suffix: str, key: str | None) -> None:
    first, second = chunks(3), chunks(2, seed=1)
    path = put("00000001.tar", shard(first, suffix))
    put("00000002.tar", shard(second, suffix))
    if key is not None:
        put("manifest.jsonl", manifest({"00000001": 3, "00000002": 2}, key))
    root = put("", b"")
    units = text_units([root])
    assert [(unit.format, unit.last) for unit in units] == [
        ("tokens", None if key is None else 3),
        ("tokens", None if key is None else 2),
    ]
    found = read(root)
    assert ids(found) == first + second
    assert found[1].where.endswith(f"00000001.tar, member 000000000001.{suffix}")
    assert ids(read(path)) == first


def test_another_number_of_chunks_than_promised_names_both_numbers(put: Put) -> None:
    put("00000001.tar", shard(chunks(3)))
    for promised in (0, 2, 4):
        put("manifest.jsonl", manifest({"00000001": promised}))
        told = rf"00000001\.tar holds 3 chunks, .* says {promised};"
        with pytest.raises(ValueError, match=told):
            read(put("", b""))


def test_a_listed_shard_that_is_absent_and_one_not_listed_are_refused(put: Put) -> None:
    put("00000001.tar", shard(chunks(1)))
    listing = put("manifest.jsonl", manifest({"00000001": 1, "00000002": 1}))
    root = put("", b"")
    for source in (root, listing):
        with pytest.raises(FileNotFoundError, match=r"00000002\.tar does not exist"):
            text_units([source])
    put("00000002.tar", shard(chunks(1)))
    other = put("00000003.tar", shard(chunks(1)))
    for source in (root, other):
        with pytest.raises(ValueError, match=r"00000003\.tar is not in .*manifest\.jsonl"):
            text_units([source])
    # The manifest by itself reads what it lists.
    found = [unit.files[0].rpartition("/")[2] for unit in text_units([listing])]
    assert found == ["00000001.tar", "00000002.tar"]


def test_folders_of_shards_keep_their_own_manifests_beside_other_texts(put: Put) -> None:
    for folder, count in (("a", 1), ("b", 2)):
        put(f"{folder}/00000001.tar", shard(chunks(count)))
        put(f"{folder}/manifest.jsonl", manifest({"00000001": count}))
    put("c/manifest.jsonl", b'{"text": "a document"}\n')
    units = text_units([put("", b"")])
    assert [(unit.format, unit.last) for unit in units] == [
        ("tokens", 1),
        ("tokens", 2),
        ("jsonl", None),
    ]


BAD_LISTINGS = [
    b'{"shard": "00000001"}',
    b'{"shard": "00000001", "num_sequences": "1"}',
    b'{"shard": "00000001", "num_sequences": -1}',
    b'{"shard": "00000001", "num_sequences": true}',
    b'{"shard": 1, "num_sequences": 1}',
    b'{"shard": "../00000001", "num_sequences": 1}',
    b'{"shard": "/etc/00000001", "num_sequences": 1}',
    b'{"shard": "s3://b/00000001", "num_sequences": 1}',
    b'{"shard": "00000000", "num_sequences": 1}',
    b'{"num_sequences": 1}',
    b"[1]",
    b"\xff",
]


def test_a_bad_line_of_a_manifest_is_named(put: Put) -> None:
    put("00000000.tar", shard(chunks(1)))
    put("00000001.tar", shard(chunks(1)))
    for line in BAD_LISTINGS:
        put("manifest.jsonl", manifest({"00000000": 1}) + b"\n" + line + b"\n")
        with pytest.raises(ValueError, match=r"manifest\.jsonl, line 3: "):
            text_units([put("", b"")])


def test_bad_members_are_rejected_with_their_place_and_reason(put: Put) -> None:
    no_ids = "not a list of token ids"
    bad = [
        ("0.txt", b"", no_ids),
        ("1.txt", b"A caption.", no_ids),
        ("2.txt", b"[1, 2", no_ids),
        ("3.txt", b"[1, 2.0]", no_ids),
        ("4.txt", b"[1, -1]", no_ids),
        ("5.txt", b"[1, true]", no_ids),
        ("6.txt", b"[[1, 2]]", no_ids),
        ("7.txt", b'{"ids": [1]}', no_ids),
        ("8.txt", b'["1"]', no_ids),
        ("9.txt", f"[{2**63}]".encode(), no_ids),
        ("a.txt", b"[" * 50_000, no_ids),
        ("b.txt", b"\xff\xfe[", no_ids),
        ("c.json.gz", b"[1, 2]", no_ids),
        ("d.json.gz", gzip.compress(b"[1, 2]")[:-3], no_ids),
        ("e.npy", b"[1, 2]", no_ids),
        ("f.txt", b"[]", "empty text"),
        ("../g.txt", b"[1]", "unsafe member name"),
    ]
    path = put("a.tar", tar([("good.txt", b"[1, 2]"), *((name, data) for name, data, _ in bad)]))
    found = read(path)
    assert ids(found[:1]) == [[1, 2]]
    assert [(item.where, item.reason) for item in found[1:]] == [
        (f"{path}, member {name}", reason) for name, _, reason in bad
    ]
    # They count as members of the shard: nothing of it is missing.
    put("manifest.jsonl", manifest({"a": 1 + len(bad)}))
    assert len(read(put("", b""))) == 1 + len(bad)


def test_ids_at_the_edges_are_kept(put: Put) -> None:
    edges = [[number, 0] for number in (0, 50_256, 2**63 - 1)]
    assert ids(read(put("a.tar", shard(edges)))) == edges


def test_a_tar_of_something_else_is_refused_before_it_is_read(put: Put) -> None:
    path = put("pictures.tar", tar([("1.jpg", b"\xff\xd8"), ("1.txt", b"A cat.")]))
    for source in (path, put("", b"")):
        with pytest.raises(ValueError, match=r"pictures\.tar, member 1\.jpg: .*as captions"):
            text_units([source])


def test_a_shard_that_is_cut_at_any_byte_stops_the_reading(put: Put) -> None:
    # The archive's padding behind its end mark is no part of it.
    whole = shard([[1, 2], [3], [4, 5, 6]])
    used = 3 * 1024 + 1024
    ends = {*range(0, used, 31), *range(512, used, 512), *(n - 1 for n in range(512, used, 512))}
    put("manifest.jsonl", manifest({"a": 3}))
    for end in sorted(ends):
        path = put("a.tar", whole[:end])
        with pytest.raises(ValueError, match=r"a\.tar"):
            list(read(path))
    assert ids(read(put("a.tar", whole))) == [[1, 2], [3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("text_novels", "text", 18),
        ("text_web_wiki/c4_demo.jsonl", "text", 300),
        ("text_math/gsm8k/test.jsonl", "question", 1319),
    ],
)
def test_real_samples_are_read_whole(name: str, key: str, count: int) -> None:
    found = read(shared(name), ReadOptions(text_key=key))
    assert Counter(type(item) for item in found) == {TextRecord: count}
    if name.endswith("jsonl"):
        records = map(json.loads, (SHARED / name).read_text(encoding="utf-8").splitlines())
        assert texts(found) == [record[key] for record in records]
