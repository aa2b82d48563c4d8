"""Preparing a user's folder: what is indexed, and one clear error for everything that is wrong."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from made import png
from PIL import Image

from midstream.config import PublicFolder, TokenizerFile, TrainedTokenizer
from midstream.data.prepare import open_codec, open_sources, prepare
from midstream.data.readers import read_captions, read_texts
from midstream.identity import file_sha256, folder_fingerprint
from midstream.storage import read_json, verify

TEXTS = [f"Document {n} says: the river is {'very ' * (n % 4)}wide.\nCafé {n}." for n in range(12)]
CAPTIONS = [f"a {color} boat on the water" for color in ("red", "blue", "grey", "white", "black")]
TALKS: list[dict[str, Any]] = [
    {
        "id": "t1",
        "image": "photos/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A boat."},
            {"from": "human", "value": "Which color?"},
            {"from": "gpt", "value": "It is red."},
        ],
    },
    {
        "id": "t2",
        "conversations": [
            {"from": "human", "value": "Say hello."},
            {"from": "gpt", "value": "Hello."},
        ],
    },
    {
        "id": 3,
        "image": "photos/1.png",
        "conversations": [
            {"from": "human", "value": "Is it wide?\n<image>"},
            {"from": "gpt", "value": "No."},
        ],
    },
]
TRAINED = TrainedTokenizer(vocab_size=300)


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png(number, (24, 16)))).save(stream, "JPEG")
    return stream.getvalue()


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts).encode()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def samples(first: int, captions: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, caption in enumerate(captions, start=first):
        found[f"{number:05d}.jpg"] = jpeg(number)
        found[f"{number:05d}.json"] = b"{}"
        found[f"{number:05d}.txt"] = f" {caption}\n".encode()
    return found


def write_talks(root: Path, records: Any) -> None:
    (root / "instruct/talks/llava.json").write_text(json.dumps(records))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny world: two text files, two shards, three conversations."""
    found = tmp_path / "my data"
    (found / "text/web").mkdir(parents=True)
    (found / "text/web/a.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor().compress(lines(TEXTS[:8]))
    )
    (found / "text/web/b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(TEXTS[8:]))
    write_tar(found / "captions/pics/000.tar", samples(0, CAPTIONS[:3]))
    write_tar(found / "captions/pics/001.tar", samples(3, CAPTIONS[3:]))
    (found / "instruct/talks/photos").mkdir(parents=True)
    (found / "instruct/talks/photos/1.png").write_bytes(png(1))
    write_talks(found, TALKS)
    return found


def world_of(root: Path) -> PublicFolder:
    return PublicFolder(root=root, fingerprint=folder_fingerprint(root))


def prepared(root: Path, out: Path, tokenizer: Any = TRAINED) -> dict[str, Any]:
    return prepare(world_of(root), tokenizer, out, lambda done, what: None)


def test_a_folder_is_indexed_from_end_to_end(root: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    before = folder_fingerprint(root)
    results = prepare(world_of(root), TRAINED, out, lambda done, what: notes.append((done, what)))
    verify(out / "prepared")
    assert folder_fingerprint(root) == before
    assert [path.name for path in out.iterdir()] == ["prepared"]
    assert notes == sorted(notes, key=lambda note: note[0])
    assert {"indexing web", "indexing pics", "indexing talks"} <= {what for _, what in notes}

    codec, sources = open_codec(out), open_sources(world_of(root), out)
    assert results["tokenizer_sha256"] == file_sha256(out / "prepared/tokenizer.json")
    assert results["vocab_size"] == codec.size <= 300
    assert list(sources) == ["pics", "talks", "web"]
    for name, kind, examples, images in [
        ("web", "text", 12, 0),
        ("pics", "caption", 5, 5),
        ("talks", "instruct", 3, 2),
    ]:
        summary = results["sources"][name]
        assert (summary["kind"], summary["num_examples"]) == (kind, examples)
        assert (summary["num_images"], summary["dropped"]) == (images, {})
        assert summary["num_tokens"] == len(sources[name].tokens)
        assert len(sources[name]) == examples

    def ids(name: str, example: int) -> np.ndarray:
        source = sources[name]
        return source.tokens[source.offsets[example] : source.offsets[example + 1]]

    for example, text in enumerate(TEXTS):
        assert codec.decode(ids("web", example).tolist()) == text
        assert ids("web", example)[-1] == codec.end_of_text
    for example, caption in enumerate(CAPTIONS):
        assert codec.decode(ids("pics", example).tolist()) == caption
        assert ids("pics", example)[0] == codec.separator
        assert sources["pics"].image_bytes(example) == jpeg(example)
        shard, sample = divmod(example, 3)
        described = sources["pics"].describe(example)
        assert described.endswith(f"captions/pics/00{shard}.tar, sample {3 * shard + sample:05d}")
    talks = sources["talks"]
    assert talks.supervised is not None
    assert talks.has_images.tolist() == [True, False, True]
    assert talks.image_bytes(0) == talks.image_bytes(2) == png(1)
    for example, replies in enumerate([" A boat. It is red.", " Hello.", " No."]):
        low, high = talks.offsets[example : example + 2]
        targets = talks.tokens[low:high][np.asarray(talks.supervised[low:high]) == 1]
        assert codec.decode(targets.tolist()) == replies
        assert "<image>" not in codec.decode(ids("talks", example).tolist())


def test_preparing_twice_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    one, two = (prepared(root, tmp_path / name) for name in ("one", "two"))
    assert one == two
    manifests = [read_json(tmp_path / n / "prepared/manifest.json") for n in ("one", "two")]
    # Names hold the world's path, which is the same; everything is.
    assert manifests[0] == manifests[1]


def test_a_named_tokenizer_file_is_used_and_kept(root: Path, tmp_path: Path) -> None:
    one = prepared(root, tmp_path / "one")
    path = tmp_path / "mine.json"
    shutil.copy(tmp_path / "one/prepared/tokenizer.json", path)
    two = prepared(root, tmp_path / "two", TokenizerFile(path=path, sha256=file_sha256(path)))
    path.unlink()
    assert two["sources"] == one["sources"]
    assert open_codec(tmp_path / "two").encode(TEXTS[3]) == open_codec(tmp_path / "one").encode(
        TEXTS[3]
    )


@pytest.mark.parametrize("lost", ["captions", "instruct", "text"])
def test_a_folder_may_lack_a_kind_of_source(root: Path, tmp_path: Path, lost: str) -> None:
    shutil.rmtree(root / lost)
    assert len(prepared(root, tmp_path / "out")["sources"]) == 2


def test_shards_with_folders_in_their_names_and_other_pictures_are_read(root: Path) -> None:
    path = root / "captions/pics/000.tar"
    named = {f"./part.1/{name}": data for name, data in samples(0, CAPTIONS[:3]).items()}
    named["./part.1/00007.png"], named["./part.1/00007.txt"] = png(7), b"seven"
    write_tar(path, named)
    found = [r for r in read_captions(root / "captions/pics") if r[2][0] == path]
    assert [caption for _, caption, _ in found] == [*CAPTIONS[:3], "seven"]
    assert found[0][0] == f"{path}, sample ./part.1/00000"
    assert [data for _, _, (_, _, data) in found] == [jpeg(0), jpeg(1), jpeg(2), png(7)]


def test_a_zstd_file_of_several_frames_is_read_to_its_end(root: Path) -> None:
    frames = [zstandard.ZstdCompressor().compress(lines([text])) for text in TEXTS[:8]]
    (root / "text/web/a.jsonl.zst").write_bytes(b"".join(frames))
    assert [text for _, text in read_texts(root / "text/web")] == TEXTS


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
    refused = 0
    for size in [*range(0, len(whole), 128), len(whole) - 1]:
        path.write_bytes(whole[:size])
        try:
            found = [caption for _, caption, _ in read_captions(root / "captions/pics")]
        except ValueError as error:
            assert "001.tar is not a whole tar file" in str(error)
            refused += 1
        else:
            # Some of the zeros at the end may be missing.
            assert size > members
            assert found == CAPTIONS
    assert refused > members // 128


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


def shard(members: dict[str, bytes]) -> Callable[[Path], None]:
    """The second shard holds these members beside a good sample."""
    return lambda root: write_tar(
        root / "captions/pics/001.tar", samples(3, CAPTIONS[3:4]) | members
    )


def talks(*records: Any) -> Callable[[Path], None]:
    return lambda root: write_talks(root, [TALKS[0], *records])


def copied(source: str, target: str) -> Callable[[Path], None]:
    return lambda root: shutil.copytree(root / source, root / target) and None


def emptied(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in (root / name).iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        (root / name / "readme.md").write_text("nothing")

    return change


def outside(root: Path) -> None:
    shutil.copy(root / "instruct/talks/photos/1.png", root.parent / "secret.png")
    write_talks(root, [TALKS[1], TALKS[0] | {"image": "../../../secret.png"}])


def linked(root: Path) -> None:
    shutil.copy(root / "instruct/talks/photos/1.png", root.parent / "secret.png")
    (root / "instruct/talks/photos/1.png").unlink()
    (root / "instruct/talks/photos/1.png").symlink_to(root.parent / "secret.png")


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
        lambda root: (root / "text/web/b.jsonl").write_bytes(lines(TEXTS[:2]) + b"17\n") and None,
        ValueError,
        f"{TEXT}, line 3: not a JSON object",
    ),
    "empty text": (
        lambda root: (root / "text/web/b.jsonl").write_bytes(lines(["a", ""])) and None,
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
        lambda root: (
            [p.write_bytes(zstandard.compress(b"")) for p in root.glob("text/web/*.zst")]
            and (root / "text/web/b.jsonl").unlink()
        ),
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
        lambda root: os.truncate(root / "captions/pics/001.tar", 2000),
        ValueError,
        r"captions/pics/001\.tar is not a whole tar file",
    ),
    "tar without its end": (
        lambda root: os.truncate(root / "captions/pics/001.tar", 3 * 1024),
        ValueError,
        r"captions/pics/001\.tar is not a whole tar file",
    ),
    "no tar": (
        lambda root: (root / "captions/pics/001.tar").write_text("<html>" * 300) and None,
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
        lambda root: (root / "instruct/talks/llava.json").write_text("[{]") and None,
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
        lambda root: (root / "instruct/talks/photos/1.png").write_bytes(png(1)[:60]) and None,
        ValueError,
        f"{LLAVA}, record 't1', .*photos/1.png: the picture cannot be decoded",
    ),
    "picture outside the folder": (
        outside,
        ValueError,
        f"{LLAVA}, record 't1': image '../../../secret.png' lies outside",
    ),
    "picture linked to the outside": (linked, ValueError, f"{LLAVA}, record 't1': .* lies outside"),
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
        lambda root: (
            [shutil.rmtree(root / x) for x in ("text", "captions", "instruct")]
            and (root / "a.txt").write_text("a")
            and None
        ),
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
