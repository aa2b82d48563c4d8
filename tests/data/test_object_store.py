"""A bucket on a server of S3's interface that runs here, and what goes wrong with one."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from made_inputs import captioned, contents, run, texts_of

from inputs import png
from midstream.data import remote
from midstream.data.formats.files import find_files, open_binary, read_range
from midstream.data.remote import PIECE_BYTES, ChangedError, RemoteError, fetch_whole
from midstream.data.sources import Source

s3fs = pytest.importorskip("s3fs", reason="no s3fs: pip install 'midstream[objects]'")
moto_server = pytest.importorskip("moto.server", reason="no moto", exc_type=ImportError)
serving = pytest.importorskip("werkzeug.serving", reason="no werkzeug")

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass
class Bucket:
    """A bucket, how many reads of objects fail with which answer, and how many there were."""

    files: Any
    faults: list[tuple[str, bytes]] = field(default_factory=list)
    # Of reads of objects: after how many bytes the connection ends.
    cuts: list[int] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    def put(self, name: str, data: bytes) -> str:
        self.files.pipe(f"bucket/{name}", data)
        return f"s3://bucket/{name}"

    def answers(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The server, with faults before and after it."""

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] != "GET" or "HTTP_RANGE" not in environ:
                return app(environ, start)
            self.ranges.append(environ["HTTP_RANGE"])
            if self.faults:
                status, body = self.faults.pop(0)
                headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
                start(status, headers)
                return [body]
            whole = b"".join(app(environ, start))
            return [whole[: self.cuts.pop(0)] if self.cuts else whole]

        return answer


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    found = Bucket(None)
    app = moto_server.DomainDispatcherApplication(moto_server.create_backend_app)
    server = serving.make_server("127.0.0.1", 0, found.answers(app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    settings = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    settings |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", **KEYS}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    s3fs.S3FileSystem.clear_instance_cache()
    found.files = s3fs.S3FileSystem(skip_instance_cache=True)
    found.files.mkdir("bucket")
    try:
        yield found
    finally:
        found.files.rm("bucket", recursive=True)
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_folder_and_a_pattern_of_a_bucket_are_prepared_as_local_files_are(
    bucket: Bucket, tmp_path: Path
) -> None:
    local = tmp_path / "set"
    local.mkdir()
    for shard in range(2):
        (local / f"part-{shard}.tar").write_bytes(captioned(10 * shard))
        bucket.put(f"set/part-{shard}.tar", captioned(10 * shard))
    bucket.put("set/notes.md", b"not read")
    run("captions", local, tmp_path / "near")
    here = contents(tmp_path / "near")
    for number, place in enumerate(("s3://bucket/set", "s3://bucket/*/part-*.tar")):
        out = tmp_path / str(number)
        run("captions", [place], out)
        there = contents(out)
        columns = [name for name in here if name.endswith((".bin", ".npy"))]
        assert {name: there[name] for name in columns} == {name: here[name] for name in columns}
        source = Source("s", out)
        assert [source.image_bytes(n) for n in (0, 6)] == [png(0), png(12)]
        assert texts_of(source) == [f"caption {n}" for n in (*range(4), *range(10, 14))]


def test_throttling_and_broken_connections_in_a_range_are_got_over(bucket: Bucket) -> None:
    data = bytes(n % 249 for n in range(2 * PIECE_BYTES + 99))
    url = bucket.put("a.tar", data)
    bucket.faults = [("503 Slow Down", SLOW_DOWN)] * 2
    bucket.cuts = [1000]
    assert fetch_whole(url, 3, len(data)) == data[3:]
    assert len(bucket.ranges) == 6
    bucket.cuts = [PIECE_BYTES, 5]
    with open_binary(url) as stream:
        assert stream.read() == data


def test_a_shard_of_a_bucket_that_changed_is_refused_by_name(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put("set/part-0.tar", captioned(0))
    run("captions", ["s3://bucket/set"], tmp_path / "out")
    bucket.put("set/part-0.tar", captioned(50))
    with pytest.raises(ChangedError, match=r"s3://bucket/set/part-0\.tar changed since the source"):
        Source("s", tmp_path / "out").image_bytes(0)
    assert run("captions", ["s3://bucket/set"], tmp_path / "out")["shards"]["new"] == 1
    assert Source("s", tmp_path / "out").image_bytes(0) == png(50)


def test_a_bucket_and_a_key_that_are_not_there_are_named(bucket: Bucket) -> None:
    for address, message in (
        ("s3://bucket/none/part-0.tar", r"part-0\.tar is no file, folder or pattern"),
        ("s3://bucket/none/part-*.tar", r"part-\*\.tar is no file, folder or pattern"),
        ("s3://none/part-0.tar", "there is no bucket s3://none; correct its name"),
        ("s3://none/part-*.tar", r"part-\*\.tar does not exist .*bucket does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_files(address, (".tar",))


def test_credentials_that_lack_or_are_refused_are_named_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put("a.jsonl", b"{}")
    bucket.faults = [("403 Forbidden", DENIED)]
    with pytest.raises(RemoteError, match=f"{url} may not be read .*Access Denied.*AWS_PROFILE"):
        read_range(url, 0, 2)
    assert len(bucket.ranges) == 1
    for name in KEYS:
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RemoteError, match=f"{url} may not be read .*AWS_ACCESS_KEY_ID"):
        find_files(url, (".jsonl",))
