"""Preparing a user's folder: one clear error for all that is wrong, and nothing half done."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from made_inputs import run, texts_of, times, write_texts
from made_world import (
    CAPTIONS,
    TALKS,
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

from inputs import png
from midstream.config import TokenizerFile
from midstream.core.identity import file_sha256
from midstream.core.storage import read_json, verify
from midstream.data.sources import Source
from preparing import prepare


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny world."""
    write_world(tmp_path / "my data")
    return tmp_path / "my data"


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


WEB, LLAVA = r"text/web/b\.jsonl", r"instruct/talks/llava\.json"
SAMPLE = r"captions/pics/001\.tar, sample 00009"
UNDECODED = f"{SAMPLE}: picture cannot be decoded"
Broken = tuple[Callable[[Path], None], type[Exception], str]
# One bad record of a few is over the default limit: its place and reason are listed.
REJECTED: dict[str, Broken] = {
    name: (change, ValueError, f"(?s)1 of .* records read for .* are rejects.*\n    {message}")
    for name, (change, message) in {
        "bad JSON line": (
            replace("text/web/b.jsonl", b'{"text": "Document 9', b'"text": "Document 9'),
            f"{WEB}, line 2: not a JSON object",
        ),
        "corrupt JPEG in a shard": (
            shard({"00009.jpg": jpeg(9)[:200], "00009.txt": b"nine"}),
            UNDECODED,
        ),
        "sample without picture": (shard({"00009.txt": b"nine"}), f"{SAMPLE}: no picture"),
        "record without turns": (talks({"id": "t9"}), f"{LLAVA}, record 1 .'t9'.: "),
        "picture outside the folder": (
            outside,
            f"{LLAVA}, record 1 .'t1'.: picture outside the folder",
        ),
    }.items()
}
REFUSED: dict[str, Broken] = {
    "no text file": (emptied("text/web"), FileNotFoundError, "text/web is no file, folder"),
    "cut zstd file": (
        cut("text/web/a.jsonl.zst", 50),
        ValueError,
        r"text/web/a\.jsonl\.zst is cut short or damaged",
    ),
    "no document": (without_documents, ValueError, r"no record in .*text/web/a\.jsonl\.zst"),
    "cut tar": (
        cut("captions/pics/001.tar", 2000),
        ValueError,
        r"captions/pics/001\.tar is not a whole tar file",
    ),
    "no llava.json": (
        lambda root: (root / "instruct/talks/llava.json").unlink(),
        FileNotFoundError,
        "instruct/talks is no file, folder",
    ),
    "llava.json that is no JSON": (written("instruct/talks/llava.json", b"[{]"), ValueError, LLAVA),
    "corrupt picture that all share": (
        written("instruct/talks/photos/1.png", png(1)[:60]),
        ValueError,
        f"(?s)2 of 3 records .*{LLAVA}, record 0 .'t1'.: picture cannot be decoded",
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
BROKEN = REJECTED | REFUSED


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_one_error_that_names_file_and_record_and_leaves_nothing_half_done(
    root: Path, tmp_path: Path, name: str
) -> None:
    breaks, kind, message = BROKEN[name]
    breaks(root)
    out = tmp_path / "out"
    with pytest.raises(kind, match=message):
        prepared(root, out)
    assert [path.name for path in out.rglob(".*")] == []
    for path in out.glob("sources/*/source/shards/*"):
        verify(path)
    # What is finished are sources without fault; at least one lacks its index.
    for path in out.glob("sources/*/source/source.json"):
        assert read_json(path)["rejects"] == {}
    assert len(list(out.glob("sources/*/source/source.json"))) < 3
    if name in REJECTED:
        check_counted(root, out, message)


def check_counted(root: Path, out: Path, message: str) -> None:
    """Under the limit the bad record is counted and the others are there."""
    results = prepare(world_of(root, max_reject_fraction=0.5), TRAINED, out)
    assert sorted(sum(x["rejects"].values()) for x in results["sources"].values()) == [0, 0, 1]
    for source, summary in results["sources"].items():
        assert summary["num_examples"] == summary["records"] - sum(summary["rejects"].values())
        listed = (out / "sources" / source / "source/rejects.jsonl").read_text()
        if summary["rejects"]:
            reject = json.loads(listed)
            place, reason = message.rpartition("\n    ")[2].split(": ", 1)
            assert re.match(place, reject["where"])
            assert list(summary["rejects"]) == [reject["reason"]]
            assert re.match(reason, f"{reject['reason']} ({reject['detail']})")
        else:
            assert listed == ""


def test_data_that_changed_since_the_plan_is_refused_with_both_fingerprints(
    root: Path, tmp_path: Path
) -> None:
    world, b = world_of(root), root / "text/web/b.jsonl"
    assert world.fingerprint is not None
    whole = b.read_bytes()
    for change in ("other bytes", "a file more", "a file less"):
        more = root / "text/web/c.jsonl"
        b.unlink()
        if change != "a file less":
            b.write_bytes(whole.replace(b"Document 9", b"Document 8"))
        if change == "a file more":
            b.write_bytes(whole)
            more.write_bytes(lines(["more"]))
        with pytest.raises(ValueError, match="my data") as caught:
            prepare(world, TRAINED, tmp_path / "out")
        assert world.fingerprint.sources["web"].digest in str(caught.value)
        assert world_of(root).fingerprint.sources["web"].digest in str(caught.value)
        more.unlink(missing_ok=True)
        b.write_bytes(whole)
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError, match="my data"):
        prepare(world, TRAINED, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_tokenizer_file_that_is_not_the_planned_one_is_refused_by_name(
    root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    tokenizer = TokenizerFile(path=path, sha256=file_sha256(path))
    for text, error in (("{}", ValueError), ("{ }", ValueError), (None, FileNotFoundError)):
        path.unlink()
        if text is not None:
            path.write_text(text)
        with pytest.raises(error, match=r"mine\.json"):
            prepared(root, tmp_path / "out", tokenizer)
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_failed_preparation_leaves_the_sources_that_did_not_change(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepared(root, out)
    tokenizer = out / "tokenizer.json"
    path = tmp_path / "same.json"
    shutil.copy(tokenizer, path)
    named = TokenizerFile(path=path, sha256=file_sha256(path))
    (root / "instruct/talks/llava.json").write_bytes(b"gone")
    before = times(out / "sources/web")
    with pytest.raises(ValueError, match=r"llava\.json"):
        prepared(root, out, named)
    assert times(out / "sources/web") == before
    write_talks(root, TALKS)
    prepared(root, out, named)
    assert times(out / "sources/web") == before


# One source.


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path / "in", 1, 3), tmp_path / "out"
    (out / "shards/mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="mine is no shard of a prepared source"):
        run("text", source, out)
    assert (out / "shards/mine").is_dir()


def test_preparing_into_the_input_and_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in", 1, 3)
    for place in ("in", "in/deeper/out", "in/shards"):
        with pytest.raises(ValueError, match="lies inside its own input"):
            run("text", source, tmp_path / place)
    assert sorted(path.name for path in source.iterdir()) == ["part-0.jsonl"]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"workers": 0}, "0 workers"),
        ({"max_reject_fraction": 1.5}, "limit of rejects is a fraction, 0 to 1, not 1.5"),
        ({"validation_fraction": 1.0}, "below 1, not 1.0"),
        ({"validation_fraction": -0.1}, "0 or more, below 1, not -0.1"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            run("text", source, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_memory_urls_are_read_by_one_process_and_refused_to_several(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for number in range(3):
        line = json.dumps({"text": f"far {number}"}) + "\n"
        files.pipe(f"/prepared/{number}.jsonl", line.encode())
    source = ["memory://prepared"]
    first = run("text", source, tmp_path / "out")
    assert (first["records"], first["shards"]["new"]) == (3, 3)
    assert run("text", source, tmp_path / "out")["shards"] == {"kept": 3, "new": 0}
    files.pipe("/prepared/1.jsonl", b'{"text": "nearer"}\n')
    assert run("text", source, tmp_path / "out")["shards"] == {"kept": 2, "new": 1}
    assert texts_of(Source("s", tmp_path / "out")) == ["far 0", "nearer", "far 2"]
    with pytest.raises(ValueError, match="memory://prepared lies in this process alone"):
        run("text", source, tmp_path / "other", workers=2)
