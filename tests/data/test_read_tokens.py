"""OpenLM's tokenised shards: ids as they are, promised counts kept, damage named."""

import gzip
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from made_inputs import Put, read_all

from inputs import tar
from midstream.data.formats.read_text import text_units
from midstream.data.formats.records import TokenRecord

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


def read(path: str) -> list[Any]:
    return read_all("text", path)


def ids(items: Sequence[Any]) -> list[list[int]]:
    assert [item for item in items if not isinstance(item, TokenRecord)] == []
    assert {item.input_ids.dtype for item in items} <= {np.dtype(np.int64)}
    return [item.input_ids.tolist() for item in items]


@pytest.mark.parametrize("suffix", ["txt", "json", "json.gz"])
@pytest.mark.parametrize("key", ["num_sequences", "num_chunks", None])
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


@pytest.mark.parametrize("promised", [0, 2, 4])
def test_another_number_of_chunks_than_promised_names_both_numbers(put: Put, promised: int) -> None:
    put("00000001.tar", shard(chunks(3)))
    put("manifest.jsonl", manifest({"00000001": promised}))
    with pytest.raises(ValueError, match=rf"00000001\.tar holds 3 chunks, .* says {promised};"):
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


@pytest.mark.parametrize(
    "line",
    [
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
    ],
)
def test_a_bad_line_of_a_manifest_is_named(put: Put, line: bytes) -> None:
    put("00000000.tar", shard(chunks(1)))
    put("00000001.tar", shard(chunks(1)))
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


@pytest.mark.parametrize("number", [0, 50_256, 2**63 - 1])
def test_ids_at_the_edges_are_kept(put: Put, number: int) -> None:
    assert ids(read(put("a.tar", shard([[number, 0]])))) == [[number, 0]]


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
