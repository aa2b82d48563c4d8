"""What cannot be used is counted and named, and too much of it ends a preparation."""

import json
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import supervised
from made_inputs import run, texts_of, times, tokenizer_file, write_pictures, write_texts
from made_world import TALKS, jpeg, samples, write_tar

from inputs import png
from midstream.data import shard_workers as prepare_workers
from midstream.data.examples import TextCodec
from midstream.data.images import decode
from midstream.data.sources import Source

UNDECODED = "picture cannot be decoded"


def listed(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def huge_png(side: int) -> bytes:
    """A whole picture of side x side white pixels in a few bytes a row."""
    rows = zlib.compress(b"".join(b"\0" + b"\xff" * (side // 8) for _ in range(side)), 9)
    found = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        found += struct.pack(">I", len(data)) + name + data
        found += struct.pack(">I", zlib.crc32(name + data))
    return found


def bad_pictures() -> list[tuple[bytes, str]]:
    """What is none, and why."""
    return [
        (b"", "zero-byte picture"),
        (b"<html>404</html>" * 9, UNDECODED),
        # A JPEG cut in its header, and in its pixels; a PNG cut in its pixels; 80 megapixels.
        (jpeg(1)[:100], UNDECODED),
        (jpeg(1)[:-60], UNDECODED),
        (png(1, (64, 64))[:5000], UNDECODED),
        (huge_png(8960), UNDECODED),
    ]


@pytest.mark.parametrize("section", ["captions", "conversations"])
def test_pictures_that_are_none_are_counted_and_named(tmp_path: Path, section: Any) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    bad, reasons = zip(*bad_pictures(), strict=True)
    if section == "captions":
        members = samples(0, [f"picture {n}" for n in range(len(bad))])
        for number, data in enumerate(bad):
            members |= {f"{number:05d}x.jpg": data, f"{number:05d}x.txt": b"bad"}
        write_tar(source / "a.tar", dict(sorted(members.items())))
        places = [f"in/a.tar, sample {number:05d}x" for number in range(len(bad))]
    else:
        source.mkdir()
        for number, data in enumerate(x for pair in enumerate(bad) for x in pair):
            (source / f"{number}.png").write_bytes(png(data) if isinstance(data, int) else data)
        records = [TALKS[0] | {"id": n, "image": f"{n}.png"} for n in range(2 * len(bad))]
        (source / "llava.json").write_text(json.dumps(records))
        places = [f"in/llava.json, record {n} ('{n}')" for n in range(1, 2 * len(bad), 2)]
    found = run(section, source, out, max_reject_fraction=0.5)
    assert (found["records"], found["rejects"]) == (2 * len(bad), Counter(reasons))
    told = list(zip(places, reasons, strict=True))
    assert [(item["where"], item["reason"]) for item in listed(out)] == told
    prepared = Source("s", out)
    for example in range(len(bad)):
        decode(prepared.image_bytes(example), "here")
    with pytest.raises(ValueError, match=r"(?s)6 of 12 records") as caught:
        run(section, source, out)
    for place, reason in told[:4]:
        assert f"    {place}: {reason}" in str(caught.value)
    # Three of each reason.
    assert not any(place in str(caught.value) for place, _ in told[4:])
    for reason, number in Counter(reasons).items():
        assert f"{number} x {reason}: fetch them again" in str(caught.value)


def test_a_picture_that_comes_or_is_mended_later_is_taken_by_the_next_run(tmp_path: Path) -> None:
    source, out = write_pictures(tmp_path / "in", 6), tmp_path / "out"
    (source / "1.png").unlink()
    (source / "3.png").write_bytes(b"not yet")
    (source / "4.png").write_bytes(b"")
    limit = {"max_reject_fraction": 0.9}
    first = run("captions", source, out, **limit)
    assert first["rejects"] == {"missing picture": 1, UNDECODED: 1, "zero-byte picture": 1}
    assert run("captions", source, out, **limit)["shards"] == {"kept": 1, "new": 0}
    for done, number in enumerate((1, 3, 4), start=1):
        (source / f"{number}.png").write_bytes(png(number))
        found = run("captions", source, out, **limit)
        assert found["shards"] == {"kept": 0, "new": 1}
        assert found["records"] - sum(found["rejects"].values()) == 3 + done
    assert listed(out) == []


def test_a_jpeg_with_other_bytes_that_still_decodes_is_named_when_it_is_read_again(
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(jpeg(number))
    lines = [{"file_name": f"{n}.jpg", "text": f"picture {n}"} for n in range(3)]
    (source / "metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    run("captions", source, out)
    prepared = Source("pics", out)
    path = source / "1.jpg"
    whole = path.read_bytes()
    for place in range(len(whole) - 40, len(whole) - 2):
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(bytes(data))
        try:
            decode(bytes(data), "here")
        except ValueError:
            continue
        with pytest.raises(ValueError, match=r"'pics', in/metadata\.jsonl.*in/1\.jpg changed"):
            prepared.image_bytes(1)
    # What the message asks for: preparing again sees the other picture.
    found = run("captions", source, out)
    assert found["shards"] == {"kept": 0, "new": 1}
    assert Source("pics", out).image_bytes(1) == path.read_bytes() != whole


@pytest.mark.parametrize(
    ("bad", "limit"),
    [(0, 0.0), (1, 0.0), (1, 0.05), (3, 0.05), (3, 0.15), (20, 0.15), (3, 1.0), (20, 1.0)],
)
def test_the_limit_is_a_share_of_the_records_and_going_over_it_ends_with_the_list(
    tmp_path: Path, bad: int, limit: float
) -> None:
    source = write_texts(tmp_path / "in", 2, 10, bad=range(bad))
    out = tmp_path / "out"
    if bad <= limit * 20 and bad < 20:
        found = run("text", source, out, max_reject_fraction=limit)
        assert found["records"] == 20
        assert found["rejects"] == ({"no text": bad} if bad else {})
        assert len(texts_of(Source("s", out))) == 20 - bad
    else:
        with pytest.raises(ValueError, match=f"{bad} of 20 records") as caught:
            run("text", source, out, max_reject_fraction=limit)
        text = str(caught.value)
        assert f"the limit is {limit:.3%}, {int(20 * limit)} records" in text
        assert f"{bad} x no text" in text
        for number in range(bad):
            named = (
                f"in/part-{number // 10}.jsonl, line {number % 10 + 1}: no text (its keys are"
                in text
            )
            assert named == (number < 3)
        assert str(out / "rejects.jsonl") in text
        assert not (out / "source.json").exists()
    # All of them, whatever the message leaves out.
    assert [item["where"] for item in listed(out)] == [
        f"in/part-{number // 10}.jsonl, line {number % 10 + 1}" for number in range(bad)
    ]


@pytest.mark.parametrize("by_command", [True, False])
def test_rejects_are_listed_by_reason_with_the_remedy_of_each(
    tmp_path: Path, by_command: bool
) -> None:
    source = write_pictures(tmp_path / "in", 9)
    for number in range(5):
        (source / f"{number}.png").unlink()
    (source / "7.png").write_bytes(b"")
    notice = {"notice": print} if by_command else {}
    with pytest.raises(ValueError, match="6 of 9 records") as caught:
        run("captions", source, tmp_path / "out", **notice)
    lines = str(caught.value).splitlines()
    assert [line[:18] for line in lines[1:7]] == [
        "  5 x missing pict",
        *["    in/metadata.js"] * 3,
        "  1 x zero-byte pi",
        "    in/metadata.js",
    ]
    assert ("--images" in lines[1]) == ("--max-rejects" in lines[-1]) == by_command
    assert "--" not in lines[5]
    assert ("max_reject_fraction of the world" in lines[-1]) == (not by_command)
    assert len(lines) == 9


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_far_too_many_rejects_end_it_before_all_is_read(tmp_path: Path, workers: int) -> None:
    source, out = write_texts(tmp_path / "in", 1, 2000), tmp_path / "out"
    for number in range(1, 5):
        bad = f'{{"body": "no text {number}"}}\n' * 40_000
        (source / f"part-{number}.jsonl").write_text(bad)
    with pytest.raises(ValueError, match="are rejects") as caught:
        run("text", source, out, max_reject_fraction=0.01, workers=workers)
    words = str(caught.value).split()
    num_rejects, num_records = (int(words[place].replace(",", "")) for place in (0, 2))
    assert prepare_workers.EARLY_REJECTS < num_rejects == len(listed(out))
    assert num_rejects < num_records < 162_000
    assert [path.name for path in out.rglob(".*")] == []


def test_a_few_rejects_at_the_start_do_not_end_it_early(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in", 1, 6000, bad=range(900))
    found = run("text", source, tmp_path / "out", max_reject_fraction=0.2)
    assert found["rejects"] == {"no text": 900}


def test_broken_files_are_all_named_after_the_others_are_done(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for number in range(6):
        write_tar(source / f"{number}.tar", samples(2 * number, ["one", "two"]))
    whole = {number: (source / f"{number}.tar").read_bytes() for number in (2, 5)}
    for number in whole:
        (source / f"{number}.tar").write_bytes(whole[number][:2500])
    with pytest.raises(ValueError, match=r"2 of 6 inputs .* cannot be read") as caught:
        run("captions", source, out)
    for number in range(6):
        assert (f"{number}.tar is not a whole tar" in str(caught.value)) == (number in whole)
    assert not (out / "source.json").exists()
    before = times(out)
    (source / "2.tar").write_bytes(whole[2])
    with pytest.raises(ValueError, match="1 of 6 inputs"):
        run("captions", source, out)
    (source / "5.tar").write_bytes(whole[5])
    found = run("captions", source, out)
    assert found["shards"] == {"kept": 5, "new": 1}
    assert {name: when for name, when in times(out).items() if name in before} == before
    run("captions", source, tmp_path / "fresh")
    assert found["fingerprint"] == Source("s", tmp_path / "fresh").index["fingerprint"]


def test_tokenised_chunks_are_taken_as_they_are_and_foreign_ids_are_named(tmp_path: Path) -> None:
    size = TextCodec.from_file(tokenizer_file()).size
    random = np.random.default_rng(0)
    chunks = [random.integers(0, size, 33).tolist() for _ in range(6)]
    chunks[2][5], chunks[4][0] = size, 50_431
    (tmp_path / "in").mkdir()
    members = {f"{n:03d}.txt": json.dumps(chunk).encode() for n, chunk in enumerate(chunks)}
    write_tar(tmp_path / "in/shard_0.tar", members)
    manifest = {"shard": "shard_0", "num_sequences": 6}
    (tmp_path / "in/manifest.jsonl").write_text(json.dumps(manifest) + "\n")
    out = tmp_path / "out"
    found = run("text", tmp_path / "in", out, max_reject_fraction=0.4)
    assert found["rejects"] == {"token id outside the vocabulary": 2}
    assert [item["detail"] for item in listed(out)] == [
        f"{wrong}, the tokenizer has ids 0 to {size - 1}" for wrong in (size, 50_431)
    ]
    source = Source("s", out)
    kept = [chunks[n] for n in (0, 1, 3, 5)]
    assert [source.input_ids(n).tolist() for n in range(len(source))] == kept
    assert supervised(source, 0) is None


@pytest.mark.parametrize("length", [1, 1000, 100_000])
def test_captions_of_any_length_are_whole_or_refused_by_name(tmp_path: Path, length: int) -> None:
    found = samples(0, ["short", "x" * length])
    write_tar(tmp_path / "in/a.tar", found)
    done = run("captions", tmp_path / "in", tmp_path / "out")
    source = Source("s", tmp_path / "out")
    assert len(source.input_ids(1)) == length + 2
    assert done["longest"]["image"]["tokens"] == max(length, 5) + 2
    assert ("sample 00001" in done["longest"]["image"]["where"]) == (length > 5)


def test_a_bad_picture_that_records_share_and_one_at_an_address_are_rejects_of_each(
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.png").write_bytes(png(1)[:40])
    (tmp_path / "in/2.png").write_bytes(png(2))
    records = [TALKS[0] | {"id": n, "image": f"{1 + n % 2}.png"} for n in range(10)]
    # Nothing is asked for it.
    records.append(TALKS[0] | {"image": "https://nowhere.example/a b.png"})
    (tmp_path / "in/llava.json").write_text(json.dumps(records))
    found = run("conversations", tmp_path / "in", tmp_path / "out", max_reject_fraction=0.6)
    assert found["rejects"] == {UNDECODED: 5, "missing picture": 1}
    assert found["train"]["images"] == 5
