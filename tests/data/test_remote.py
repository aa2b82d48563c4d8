"""Data at addresses: found, read in ranges, and what servers do that they should not."""

import errno
import gzip
import json
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
from fsspec.registry import _registry, known_implementations
from made_inputs import (
    as_json,
    as_lines,
    as_parquet,
    captioned,
    changed_shards,
    contents,
    run,
    texts_of,
    times,
)
from object_server import Fault, Served, serving

from inputs import png, tar
from midstream.data import remote
from midstream.data.archives import FOLDER
from midstream.data.formats.files import (
    exists,
    find_files,
    is_folder,
    open_binary,
    read_lines,
    read_range,
    shown_files,
    size_of,
)
from midstream.data.formats.record_files import table_rows
from midstream.data.join_captions import join_captions
from midstream.data.remote import PIECE_BYTES, TRIES, ChangedError, RemoteError, fetch_whole
from midstream.data.source_writer import ShardWriter
from midstream.data.sources import Source


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.delenv(FOLDER, raising=False)
    with serving() as found:
        yield found


def put_shards(served: Served, count: int = 3) -> str:
    for shard in range(count):
        served.put(f"set/part-{shard}.tar", captioned(10 * shard, 4))
    return f"{served.address}/set"


def lines(*texts: str) -> bytes:
    return as_lines([{"text": text} for text in texts])


def test_a_page_that_lists_a_folder_is_none_of_its_files(served: Served) -> None:
    names = [served.put(f"my data/{name}", b"{}") for name in ("a b.jsonl", "c.txt")]
    found = [*shown_files(f"{served.address}/my data/"), *shown_files(f"{served.address}/my data")]
    assert found == names * 2


def test_files_of_a_web_server_are_found_by_name_by_folder_and_by_pattern(served: Served) -> None:
    for name in ("a/x.jsonl", "a/deep/y.jsonl", "a/z.txt", "b/w.jsonl"):
        served.put(name, name.encode())
    at = served.address
    assert find_files(f"{at}/a/z.txt", (".jsonl",)) == [f"{at}/a/z.txt"]
    both = [f"{at}/a/deep/y.jsonl", f"{at}/a/x.jsonl"]
    assert find_files(f"{at}/a", (".jsonl",)) == both == find_files(f"{at}/a/", (".jsonl",))
    assert find_files(f"{at}/*/?.jsonl", (".jsonl",)) == [f"{at}/a/x.jsonl", f"{at}/b/w.jsonl"]
    assert (exists(f"{at}/a/x.jsonl"), exists(f"{at}/a"), exists(f"{at}/none")) == (1, 0, 0)
    assert (is_folder(f"{at}/a"), is_folder(f"{at}/a/x.jsonl"), is_folder(f"{at}/no")) == (1, 0, 0)
    with pytest.raises(FileNotFoundError, match=f"{at}/none is no file"):
        find_files(f"{at}/none", (".jsonl",))


def test_bytes_of_a_file_are_those_that_the_server_has(served: Served) -> None:
    whole = bytes(n * 7 % 251 for n in range(256)) * (2 * PIECE_BYTES // 256 + 1)
    for size in (0, 1, PIECE_BYTES, 2 * PIECE_BYTES + 7):
        data = whole[:size]
        url = served.put(f"{size}.bin", data)
        assert size_of(url) == size
        with open_binary(url) as stream:
            assert stream.read() == data
            stream.seek(size // 2)
            assert stream.read(3) == data[size // 2 :][:3]
        for start in (0, size // 3, size):
            assert read_range(url, start, size + 1) == data[start:]


def test_compressed_lines_and_tables_are_read_as_local_ones_are(served: Served) -> None:
    rows = [f"{n}" * 50 for n in range(2000)]
    packed = served.put("a.jsonl.gz", gzip.compress(lines(*rows)))
    assert [json.loads(line)["text"] for line in read_lines(packed)] == rows
    table = served.put("a.parquet", as_parquet([{"text": row} for row in rows]))
    assert [value.as_py() for (value,) in table_rows(table, ["text"])] == rows


def test_a_source_by_reference_holds_no_pictures_and_is_equal_to_one_of_local_files(
    served: Served, tmp_path: Path
) -> None:
    url = put_shards(served)
    local = tmp_path / "set"
    local.mkdir()
    for name, data in served.files.items():
        (local / Path(name).name).write_bytes(data)
    far, near = tmp_path / "far", tmp_path / "near"
    run("captions", [url], far)
    run("captions", local, near)
    there, here = contents(far), contents(near)
    assert not [name for name in there if name.endswith("pictures.bin")]
    columns = [name for name in here if name.endswith((".bin", ".npy"))]
    assert len(columns) == 3 * 6
    assert all(there[name] == here[name] for name in columns)
    source = Source("far", far)
    assert texts_of(source) == texts_of(Source("near", near))
    assert [source.image_bytes(n) for n in (0, 5, 11)] == [png(0), png(11), png(23)]


def test_a_source_by_copy_needs_its_server_no_more(served: Served, tmp_path: Path) -> None:
    url, out = put_shards(served), tmp_path / "out"
    by_reference = run("captions", [url], out)
    assert run("captions", [url], out, copy_pictures=True)["shards"] == {"kept": 0, "new": 3}
    assert run("captions", [url], out, copy_pictures=True)["shards"] == {"kept": 3, "new": 0}
    served.files.clear()
    source = Source("s", out)
    assert len(source) == by_reference["train"]["examples"] == 12
    shown = [png(10 * shard + n) for shard in range(3) for n in range(4)]
    assert [source.image_bytes(n) for n in range(12)] == shown


def test_a_server_that_is_busy_is_asked_again(served: Served, tmp_path: Path) -> None:
    url = put_shards(served)
    served.faults = [Fault(status, times=2) for status in (429, 500, 503)]
    served.faults += [Fault(503, times=TRIES - 7), Fault(429, times=3, file="set/part-2.tar")]
    assert run("captions", [f"{url}/part-*.tar"], tmp_path / "out")["records"] == 12


def test_what_a_server_never_gives_is_one_error_and_the_other_shards_stay(
    served: Served, tmp_path: Path
) -> None:
    for shard in range(3):
        served.put(f"set/part-{shard}.jsonl", lines(f"text {shard}"))
    url, out = f"{served.address}/set", tmp_path / "out"
    run("text", [url], out)
    before = times(out)
    served.put("set/part-1.jsonl", lines("a new text", "and another"))

    # Asked after its state: what is read of it fails.
    class Busy(list[Fault]):
        def __iter__(self) -> Iterator[Fault]:
            busy = served.methods[-1] == "GET" and served.asked[-1][0] == "set/part-1.jsonl"
            return iter([Fault(503, times=99)] if busy else [])

    served.faults = Busy()
    with pytest.raises(ValueError, match=r"1 of 3 inputs .* cannot be read") as error:
        run("text", [url], out)
    assert f"set/part-1.jsonl: asked {TRIES} times in " in str(error.value)
    assert "the last answer was: 503" in str(error.value)
    assert not (out / "source.json").exists()
    assert sorted(path.name for path in (out / "shards").iterdir()) == ["000000", "000002"]
    served.faults = []
    run("text", [url], out)
    assert texts_of(Source("s", out)) == ["text 0", "a new text", "and another", "text 2"]
    assert changed_shards(before, times(out)) == {"000001"}


def test_a_range_whose_connection_breaks_goes_on_from_the_piece_that_broke(served: Served) -> None:
    data = bytes(n % 249 for n in range(3 * PIECE_BYTES))
    url = served.put("a.tar", data)
    served.faults = [Fault(cut_after=PIECE_BYTES), Fault(cut_after=PIECE_BYTES // 2, times=2)]
    assert fetch_whole(url, 5, len(data) - 5) == data[5:-5]
    starts = [start for _, start, _ in served.asked]
    # The first piece is whole before its connection ends.
    assert starts == [5, *[5 + PIECE_BYTES] * 3, 5 + 2 * PIECE_BYTES]


def test_a_refusal_is_not_asked_again(served: Served) -> None:
    for status in (401, 403):
        url = served.put("a.jsonl", lines("x"))
        served.asked.clear()
        served.faults = [Fault(status, times=99)]
        told = f"{url} may not be read with the credentials.*{status}"
        with pytest.raises(RemoteError, match=told):
            read_range(url, 0, 10)
        assert len(served.asked) == 1
        with pytest.raises(RemoteError, match=f"{url} may not be read"):
            find_files(url, (".jsonl",))


def test_a_server_that_is_not_there_is_named(served: Served) -> None:
    with serving() as other:
        url = other.put("a.jsonl", lines("x"))
    with pytest.raises(RemoteError, match=f"{url}: asked {TRIES} times"):
        find_files(url, (".jsonl",))


def test_a_server_without_ranges_is_refused_where_it_gives_others_than_asked_for(
    served: Served,
) -> None:
    url = served.put("a.bin", b"0123456789")
    assert fetch_whole(url, 4, 6) == b"45"
    served.ranges = False
    with pytest.raises(ValueError, match=r"a\.bin: its server gives no ranges.*copy it"):
        fetch_whole(url, 4, 6)


def test_lines_of_a_server_that_says_it_gives_no_ranges_are_read(served: Served) -> None:
    texts = [f"{n} " * 40 for n in range(5000)]
    url, served.ranges, served.tells = served.put("a.jsonl", lines(*texts)), False, True
    assert [json.loads(line)["text"] for line in read_lines(url)] == texts


# As huggingface_hub's own.
OFFLINE = type("OfflineModeIsEnabled", (ConnectionError,), {})("offline mode is enabled")


@pytest.mark.parametrize(
    ("error", "kind", "message", "asks"),
    [
        (OFFLINE, RemoteError, r"a\.tar is not asked for.*set HF_HUB_OFFLINE=0", 1),
        (OSError("Forbidden: b/bucket/o"), RemoteError, "may not be read", 1),
        (PermissionError("Access Denied"), RemoteError, "may not be read", 1),
        (OSError(errno.EBUSY, "Slow down"), RemoteError, f"asked {TRIES} times", TRIES),
        (TimeoutError(), RemoteError, f"asked {TRIES} times", TRIES),
        (FileNotFoundError("a.tar"), FileNotFoundError, "does not exist; correct", 1),
        (LookupError("no profile"), RemoteError, "is not read: LookupError, no profile", 1),
        (ValueError("of its own"), ValueError, "^of its own$", 1),
    ],
)
def test_errors_of_clients_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
    asks: int,
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    asked = []

    def question(system: object, path: str) -> None:
        asked.append(path)
        raise error

    with pytest.raises(kind, match=message):
        remote.ask("memory://bucket/a.tar", question)
    assert len(asked) == asks


def test_a_picture_that_is_missing_at_an_address_is_looked_for_again_and_no_more(
    served: Served, tmp_path: Path
) -> None:
    served.put("set/0.png", png(0))
    records = [{"image": f"{n}.png", "caption": f"caption {n}"} for n in range(2)]
    url, out = served.put("set/list.json", as_json(records)), tmp_path / "out"
    counts = run("captions", [url], out, max_reject_fraction=0.6)
    assert (counts["shards"], counts["records"]) == ({"kept": 0, "new": 1}, 2)
    assert run("captions", [url], out, max_reject_fraction=0.6)["shards"]["kept"] == 1
    served.put("set/1.png", png(1))
    assert run("captions", [url], out, max_reject_fraction=0.6)["shards"]["new"] == 1
    assert Source("s", out).num_images == 2


def test_a_stamp_with_a_time_behind_the_version_still_stands(served: Served) -> None:
    url = served.put("a.tar", captioned(0, 2))
    stamp = remote.stamp_of_url(url)
    remote.refuse_changed(url, [*stamp, "2026-01-01"], "it was indexed", "")
    with pytest.raises(ChangedError, match="changed since it was indexed"):
        remote.refuse_changed(url, [stamp[0], "other", "2026-01-01"], "it was indexed", "")


def test_a_shard_that_changed_since_it_was_indexed_is_refused_by_name(
    served: Served, tmp_path: Path
) -> None:
    url, out = put_shards(served), tmp_path / "out"
    run("captions", [url], out)
    name, other = "set/part-1.tar", captioned(50, 4)
    old = served.files[name]
    assert len(other) == len(old)
    changed = (ChangedError, rf"{url}/part-1\.tar changed since the source was prepared.*prepare")
    gone = (FileNotFoundError, rf"{url}/part-1\.tar is gone; put it back, or prepare")
    for data, (error, told) in ((other, changed), (old[:700], changed), (None, gone)):
        del served.files[name]
        if data is not None:
            served.files[name] = data
        source = Source("s", out)
        assert source.image_bytes(0) == png(0)
        with pytest.raises(error, match=told):
            source.image_bytes(5)
        served.files[name] = old
        assert source.image_bytes(5) == png(11)


def test_a_shard_that_changes_while_it_is_read_is_no_shard(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, out = put_shards(served, 2), tmp_path / "out"
    original = served.fault_of

    def changing(name: str) -> Fault | None:
        # When the last byte of the second one is asked for.
        if name == "set/part-1.tar" and served.methods.count("GET") > 3:
            served.files[name] = captioned(70, 4)
        return original(name)

    monkeypatch.setattr(served, "fault_of", changing)
    with pytest.raises(ValueError, match=r"part-1\.tar changed since.*run the same again"):
        run("captions", [url], out)
    assert [path.name for path in (out / "shards").iterdir()] == ["000000"]
    monkeypatch.setattr(served, "fault_of", original)
    assert run("captions", [url], out)["shards"] == {"kept": 1, "new": 1}
    assert Source("s", out).image_bytes(4) == png(70)


def test_a_shard_that_is_gone_once_it_was_read_costs_no_other(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, out, seal = put_shards(served, 2), tmp_path / "out", ShardWriter.close

    def gone(writer: ShardWriter) -> None:
        seal(writer)
        served.files.pop("set/part-0.tar", None)

    monkeypatch.setattr(ShardWriter, "close", gone)
    with pytest.raises(ValueError, match=r"part-0\.tar does not exist"):
        run("captions", [url], out)
    assert [path.name for path in (out / "shards").iterdir()] == ["000001"]


def test_a_package_that_lacks_and_an_address_of_no_known_kind_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(_registry, "s3", raising=False)
    lacking = {"class": "no_such_package.FileSystem", "err": "Install s3fs to access S3"}
    monkeypatch.setitem(known_implementations, "s3", lacking)
    with pytest.raises(ValueError, match=r"s3fs.*pip install 'midstream\[objects\]'"):
        find_files("s3://bucket/part-*.tar", (".tar",))
    with pytest.raises(ValueError, match="nowhere:// is no known kind of address"):
        find_files("nowhere://bucket/a.tar", (".tar",))


def test_blocks_that_were_read_before_are_not_asked_for_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, out = put_shards(served), tmp_path / "out"
    run("captions", [url], out)
    monkeypatch.setenv(FOLDER, str(tmp_path / "blocks"))
    pictures = [png(10 * shard + n) for shard in range(3) for n in range(4)]
    for asks in (3, 0):
        served.asked.clear()
        source = Source("s", out)
        assert [source.image_bytes(n) for n in range(12)] == pictures
        # A tar of these is less than a block.
        assert len(served.asked) == asks
    served.put("set/part-0.tar", captioned(90, 4))
    with pytest.raises(ChangedError, match="prepared"):
        Source("s", out).image_bytes(0)


def test_pictures_of_joined_tables_stay_where_they_are_and_are_known_by_version(
    served: Served, tmp_path: Path
) -> None:
    uids = [f"{n:032x}" for n in range(6)]
    shown, told = [], []
    for n, uid in enumerate(uids):
        shown += [(f"{n}.png", png(n)), (f"{n}.json", as_json({"uid": uid}))]
        told.append((f"{uid}.syn.json", as_json({"syn_text": [f"made {n}"]})))
    served.put("pictures/0.tar", tar(shown))
    served.put("captions/0.tar", tar(told))
    places = (f"{served.address}/pictures", f"{served.address}/captions")
    joined, out = tmp_path / "joined", tmp_path / "out"
    join_captions(*places, joined, workers=1, progress=lambda done, note: None)
    served.asked.clear()
    run("captions", joined, out)
    # The tar is read once, in one piece, however many pictures it has.
    assert [name for name, _, _ in served.asked] == ["pictures/0.tar"]
    source = Source("s", out)
    assert [source.image_bytes(n) for n in range(6)] == [png(n) for n in range(6)]
    assert run("captions", joined, out)["shards"] == {"kept": 1, "new": 0}
    served.put("pictures/0.tar", tar(shown + shown[:1]))
    with pytest.raises(
        ChangedError, match=r"pictures/0\.tar changed since the source was prepared"
    ):
        Source("s", out).image_bytes(0)
    assert run("captions", joined, out)["shards"] == {"kept": 0, "new": 1}
    assert Source("s", out).image_bytes(3) == png(3)


@pytest.mark.slow
def test_processes_that_are_forked_after_a_read_read_too(served: Served, tmp_path: Path) -> None:
    url, out = put_shards(served), tmp_path / "out"
    assert run("captions", [url], out, workers=2)["shards"] == {"kept": 0, "new": 3}
    source = Source("s", out)
    assert source.image_bytes(0) == png(0)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(source.image_bytes, range(8)) == [
            png(n) for n in (*range(4), *range(10, 14))
        ]
    assert source.image_bytes(1) == png(1)
