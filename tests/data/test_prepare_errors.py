"""Preparing a user's folder: one clear error for everything that is wrong, and nothing left."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from made import png
from made_world import (
    CAPTIONS,
    TALKS,
    TEXTS,
    TRAINED,
    jpeg,
    lines,
    prepared,
    samples,
    world_of,
    write_talks,
    write_tar,
    write_world,
)

from midstream.config import TokenizerFile
from midstream.data.prepare import prepare
from midstream.data.readers import read_captions, read_texts
from midstream.identity import file_sha256, folder_fingerprint
from midstream.storage import verify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny world."""
    write_world(tmp_path / "my data")
    return tmp_path / "my data"


def test_a_zstd_file_cut_anywhere_is_refused_and_never_read_in_part(root: Path) -> None:
    path = root / "text/web/a.jsonl.zst"
    frames = [zstandard.ZstdCompressor().compress(lines(t)) for t in (TEXTS[:4], TEXTS[4:8])]
    whole = b"".join(frames)
    for size in range(len(whole)):
        if size == len(frames[0]):
            continue  # One frame is a whole file of its own.
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst is not a whole zstd file"):
            list(read_texts(root / "text/web"))


def test_a_tar_cut_anywhere_is_refused_and_never_read_in_part(root: Path) -> None:
    path = root / "captions/pics/001.tar"
    whole = path.read_bytes()
    members = len(whole.rstrip(b"\0"))
    # Zeros fill the file up to a multiple of 10,240 bytes; one block of 512 marks its end.
    end = -(-members // 512) * 512 + 512
    for size in [*range(0, end, 128), end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"001\.tar is not a whole tar file"):
            list(read_captions(root / "captions/pics"))
    for size in (end, end + 100, len(whole)):
        path.write_bytes(whole[:size])
        assert [c for _, c, _ in read_captions(root / "captions/pics")] == CAPTIONS


def test_a_tar_with_a_damaged_header_is_refused_and_not_read_up_to_it(root: Path) -> None:
    path = root / "captions/pics/001.tar"
    with tarfile.open(path) as shard:
        offsets = [member.offset for member in shard]
    whole = path.read_bytes()
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset + 150] ^= 0xFF  # in the header's checksum
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=r"001\.tar is not a whole tar file"):
            list(read_captions(root / "captions/pics"))


def replace(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        data = (root / name).read_bytes()
        assert old in data
        (root / name).write_bytes(data.replace(old, new, 1))

    return change


def written(name: str, data: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_bytes(data)

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, size)


def shard(members: dict[str, bytes]) -> Callable[[Path], None]:
    """The second shard holds these members beside a good sample."""
    return lambda root: write_tar(
        root / "captions/pics/001.tar", samples(3, CAPTIONS[3:4]) | members
    )


def talks(*records: Any) -> Callable[[Path], None]:
    return lambda root: write_talks(root, [TALKS[0], *records])


def copied(source: str, target: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        shutil.copytree(root / source, root / target)

    return change


def emptied(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in (root / name).iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        (root / name / "readme.md").write_text("nothing")

    return change


def outside(root: Path) -> None:
    shutil.copy(root / "instruct/talks/photos/1.png", root.parent / "secret.png")
    write_talks(root, [TALKS[1], TALKS[0] | {"image": "../../../secret.png"}])


def without_documents(root: Path) -> None:
    (root / "text/web/a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b""))
    (root / "text/web/b.jsonl").unlink()


def without_sources(root: Path) -> None:
    for name in ("text", "captions", "instruct"):
        shutil.rmtree(root / name)
    (root / "a.txt").write_text("a")


TEXT, LLAVA = r"text/web/b\.jsonl", r"instruct/talks/llava\.json"
SAMPLE = r"captions/pics/001\.tar, sample 00009"
BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "bad JSON line": (
        replace("text/web/b.jsonl", b'{"text": "Document 9', b'"text": "Document 9'),
        ValueError,
        f"{TEXT}, line 2: not a JSON object",
    ),
    "line without text": (
        replace("text/web/b.jsonl", b'{"text": "Document 9', b'{"body": "Document 9'),
        ValueError,
        f"{TEXT}, line 2: not a JSON object with the key 'text'",
    ),
    "line that is a number": (
        written("text/web/b.jsonl", lines(TEXTS[:2]) + b"17\n"),
        ValueError,
        f"{TEXT}, line 3: not a JSON object",
    ),
    "empty text": (
        written("text/web/b.jsonl", lines(["a", ""])),
        ValueError,
        f"{TEXT}, line 2: 'text' is empty",
    ),
    "text that is no UTF-8": (
        replace("text/web/b.jsonl", b"Document 10", b"Document \xff"),
        ValueError,
        f"{TEXT}, line 3: .*UTF-8",
    ),
    "half a surrogate pair": (
        replace("text/web/b.jsonl", b"Document 10", b"Document \\ud83d"),
        ValueError,
        f"{TEXT}, line 3: .*no valid Unicode",
    ),
    "no text file": (emptied("text/web"), FileNotFoundError, r"text/web holds no \.jsonl"),
    "no document": (
        without_documents,
        ValueError,
        "text/web holds no example",
    ),
    "corrupt JPEG in a shard": (
        shard({"00009.jpg": jpeg(9)[:200], "00009.txt": b"nine"}),
        ValueError,
        f"{SAMPLE}: the picture cannot be decoded",
    ),
    "HTML as a JPEG": (
        shard({"00009.jpg": b"<html>404</html>", "00009.txt": b"nine"}),
        ValueError,
        f"{SAMPLE}: the picture cannot be decoded",
    ),
    "cut tar": (
        cut("captions/pics/001.tar", 2000),
        ValueError,
        r"captions/pics/001\.tar is not a whole tar file",
    ),
    "tar without its end": (
        cut("captions/pics/001.tar", 3 * 1024),
        ValueError,
        r"captions/pics/001\.tar is not a whole tar file",
    ),
    "no tar": (
        written("captions/pics/001.tar", b"<html>" * 300),
        ValueError,
        r"captions/pics/001\.tar is not a whole tar file",
    ),
    "sample without caption": (
        shard({"00009.jpg": jpeg(9)}),
        ValueError,
        f"{SAMPLE}: needs one picture and one .txt, has .*jpg",
    ),
    "sample without picture": (
        shard({"00009.txt": b"nine"}),
        ValueError,
        f"{SAMPLE}: needs one picture",
    ),
    "sample of two pictures": (
        shard({"00009.jpg": jpeg(9), "00009.png": png(9), "00009.txt": b"nine"}),
        ValueError,
        f"{SAMPLE}: needs one picture",
    ),
    "empty caption": (
        shard({"00009.jpg": jpeg(9), "00009.txt": b" \n"}),
        ValueError,
        f"{SAMPLE}: the caption is empty",
    ),
    "caption that is no UTF-8": (
        shard({"00009.jpg": jpeg(9), "00009.txt": b"caf\xe9"}),
        ValueError,
        f"{SAMPLE}: the caption is no UTF-8",
    ),
    "no shard": (emptied("captions/pics"), FileNotFoundError, r"captions/pics holds no \.tar"),
    "no llava.json": (
        lambda root: (root / "instruct/talks/llava.json").unlink(),
        FileNotFoundError,
        f"{LLAVA} does not exist",
    ),
    "llava.json that is no JSON": (
        written("instruct/talks/llava.json", b"[{]"),
        ValueError,
        f"{LLAVA} is not JSON",
    ),
    "llava.json that is no list": (
        lambda root: write_talks(root, TALKS[0]),
        ValueError,
        f"{LLAVA} must hold a list",
    ),
    "record that is no object": (talks("hello"), ValueError, f"{LLAVA}, record 1: not a JSON obj"),
    "record without turns": (talks({"id": "t9"}), ValueError, f"{LLAVA}, record 't9': 'conversat"),
    "roles that do not alternate": (
        talks({"id": 9, "conversations": TALKS[1]["conversations"][::-1]}),
        ValueError,
        f"{LLAVA}, record 9: roles",
    ),
    "mark without a picture": (
        talks({"id": "t9", "conversations": TALKS[0]["conversations"]}),
        ValueError,
        f"{LLAVA}, record 't9': <image>",
    ),
    "turn with half a surrogate pair": (
        replace("instruct/talks/llava.json", b"Hello.", b"\\ud83d"),
        ValueError,
        f"{LLAVA}, record 't2': .*no valid Unicode",
    ),
    "missing picture": (
        talks(TALKS[0] | {"id": "t9", "image": "photos/9.png"}),
        FileNotFoundError,
        f"{LLAVA}, record 't9': picture .*photos/9.png is missing",
    ),
    "corrupt picture": (
        written("instruct/talks/photos/1.png", png(1)[:60]),
        ValueError,
        f"{LLAVA}, record 't1', .*photos/1.png: the picture cannot be decoded",
    ),
    "picture outside the folder": (
        outside,
        ValueError,
        f"{LLAVA}, record 't1': image '../../../secret.png' lies outside",
    ),
    "picture by absolute path": (
        talks(TALKS[0] | {"id": "t9", "image": "/etc/hostname"}),
        ValueError,
        f"{LLAVA}, record 't9': .* lies outside",
    ),
    "duplicate source names": (
        copied("text/web", "captions/web"),
        ValueError,
        "text/web: the name 'web' is used by another source|captions/web: the name 'web'",
    ),
    "no source": (
        without_sources,
        FileNotFoundError,
        "my data holds no source under text, captions, instruct",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_one_error_that_names_file_and_record_and_leaves_nothing(
    root: Path, tmp_path: Path, name: str
) -> None:
    breaks, kind, message = BROKEN[name]
    breaks(root)
    with pytest.raises(kind, match=message):
        prepared(root, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*")) == []


@pytest.mark.parametrize("change", ["other bytes", "a file more", "a file less", "no folder"])
def test_data_that_changed_since_the_plan_is_refused_with_both_fingerprints(
    root: Path, tmp_path: Path, change: str
) -> None:
    world = world_of(root)
    if change == "other bytes":
        replace("text/web/b.jsonl", b"Document 9", b"Document 8")(root)
    elif change == "a file more":
        (root / "text/web/c.jsonl").write_bytes(lines(["more"]))
    elif change == "a file less":
        (root / "text/web/b.jsonl").unlink()
    else:
        shutil.rmtree(root)
    error = FileNotFoundError if change == "no folder" else ValueError
    with pytest.raises(error, match="my data") as caught:
        prepare(world, TRAINED, tmp_path / "out", lambda done, what: None)
    if change != "no folder":
        assert world.fingerprint in str(caught.value)
        assert folder_fingerprint(root) in str(caught.value)
    assert list((tmp_path / "out").rglob("*")) == []


@pytest.mark.parametrize("change", ["missing", "other bytes", "no tokenizer"])
def test_a_tokenizer_file_that_is_not_the_planned_one_is_refused_by_name(
    root: Path, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    tokenizer = TokenizerFile(path=path, sha256=file_sha256(path))
    if change == "missing":
        path.unlink()
    elif change == "other bytes":
        path.write_text("{ }")
    error = FileNotFoundError if change == "missing" else ValueError
    with pytest.raises(error, match=r"mine\.json"):
        prepared(root, tmp_path / "out", tokenizer)
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_failed_preparation_leaves_an_earlier_one_as_it_was(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared(root, out)
    (root / "captions/pics/000.tar").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"000\.tar"):
        prepared(root, out)
    verify(out / "prepared")
    assert [path.name for path in out.iterdir()] == ["prepared"]
