"""Captions in tar archives: img2dataset's and DataCompDR's samples, whole or left out with why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_captions import (
    SYNTHETIC,
    apple,
    captions,
    img2dataset,
    joined,
    outcome,
    picture,
    read,
    write,
    write_tar,
)
from made_inputs import OPTIONS, as_json, shared

from inputs import tar
from midstream.data.formats import records as formats_records
from midstream.data.formats.files import read_range
from midstream.data.formats.read_captions import caption_units
from midstream.data.formats.records import CaptionRecord, ReadOptions, Unit
from midstream.data.source_writer import Reject


def test_an_img2dataset_tar_gives_each_caption_with_the_bytes_of_its_picture(
    tmp_path: Path,
) -> None:
    ends = ("jpg", "jpeg", "png", "webp", "JPG")
    samples = [img2dataset(number, suffix) for number, suffix in enumerate(ends)]
    path = write_tar(tmp_path / "00000.tar", {k: v for s in samples for k, v in s.items()})
    write(tmp_path / "00000_stats.json", b"{}")
    records = read(str(tmp_path))
    assert caption_units([str(tmp_path)], OPTIONS) == [Unit("webdataset", (path,))]
    assert outcome(records) == [f"caption {number}" for number in range(5)]
    for number, record in enumerate(records):
        assert isinstance(record, CaptionRecord)
        assert record.where == f"{path}, sample 00000{number:04d}"
        assert record.picture.data == picture(number)
        assert record.picture.file == path
        assert read_range(path, record.picture.offset, len(picture(number))) == picture(number)


def test_every_tar_of_a_source_is_a_unit_in_the_order_of_their_names(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n:05d}.tar", img2dataset(n)) for n in (2, 0, 1)]
    for source in (str(tmp_path), str(tmp_path / "*.tar")):
        units = caption_units([source], OPTIONS)
        assert [unit.files[0] for unit in units] == sorted(paths)
    units = caption_units(paths[:2], OPTIONS)
    assert [unit.files[0] for unit in units] == paths[:2]


def test_the_caption_in_the_json_stands_in_where_there_is_no_txt(tmp_path: Path) -> None:
    about = as_json({"caption": "in the JSON", "alt": "another"})
    both = {"0.jpg": picture(0), "0.json": about, "0.txt": b" in the text \n"}
    lone = {"1.jpg": picture(1), "1.json": about}
    path = write_tar(tmp_path / "a.tar", both | lone)
    assert captions(read(path)) == ["in the text", "in the JSON"]
    assert captions(read(path, ReadOptions(text_key="alt"))) == ["another", "another"]
    missing = read(path, ReadOptions(text_key="title"))
    assert outcome(missing) == ["- no caption", "- no caption"]


def synthetic_of(records: Sequence[CaptionRecord | Reject]) -> list[list[str]]:
    return [list(record.synthetic) for record in records if isinstance(record, CaptionRecord)]


def test_datacompdr_gives_the_original_and_all_synthetic_captions(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", joined("k0") | joined("k1", 1))
    assert caption_units([path], OPTIONS) == [Unit("datacompdr", (path,))]
    assert captions(read(path)) == ["original of k0", "original of k1"]
    made = [[f"{text} of {key}" for text in SYNTHETIC] for key in ("k0", "k1")]
    assert synthetic_of(read(path)) == made


def test_synthetic_captions_may_stand_in_the_samples_own_json(tmp_path: Path) -> None:
    about = as_json({"caption": "original", "syn_text": SYNTHETIC})
    path = write_tar(tmp_path / "a.tar", {"0.jpg": picture(0), "0.json": about})
    assert captions(read(path)) == ["original"]
    assert synthetic_of(read(path)) == [SYNTHETIC]


def test_a_picture_without_the_required_kind_of_caption_is_left_out(tmp_path: Path) -> None:
    made = SYNTHETIC[:2]
    only = {
        "a.jpg": picture(0),
        "a.syn.json": as_json({"syn_text": made}),
        "b.jpg": picture(1),
        "b.txt": b"its own",
    }
    path = write_tar(tmp_path / "a.tar", only)
    found: dict[Any, Any] = {
        "original": (["- no caption", "its own"], [[]]),
        "synthetic": (["", "- no synthetic caption"], [made]),
        None: (["", "its own"], [made, []]),
    }
    for require, expected in found.items():
        records = read(path, ReadOptions(require=require))
        assert (outcome(records), synthetic_of(records)) == expected


def test_datacompdr_without_pictures_says_what_to_join(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", apple("k0") | apple("k1"))
    for require in ("original", "synthetic", None):
        records = read(path, ReadOptions(require=require))  # type: ignore[arg-type]
        assert outcome(records) == ["- no picture"] * 2
        assert "join them by uid" in str(records[0])


ENDS = ["jpg", "png", "txt", "json", "0001.png", "0001.txt", "seg.PNG", "v2.jpeg", "webp", "gif"]


@given(
    groups=st.dictionaries(
        st.sampled_from(["a", "b", "c/a", "d.e/f"]),
        st.lists(st.sampled_from(ENDS), min_size=1, max_size=6),
        max_size=4,
    ),
    again=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_picture_of_a_tar_is_a_record_or_a_reject(
    tmp_path_factory: pytest.TempPathFactory, groups: dict[str, list[str]], again: bool
) -> None:
    members = [(f"{key}.{end}", b"{}") for key, ends in groups.items() for end in ends]
    packed = [*members, *(members[:1] if again else [])]
    path = tmp_path_factory.getbasetemp() / "counted.tar"
    items = read(write(path, tar(packed)))
    pictures = (".jpg", ".png", ".webp", ".jpeg", ".gif")
    # Samples without any picture are rejects of their own.
    runs = [list(group) for _, group in groupby(packed, lambda x: split_key(x[0]))]
    counts = [sum(name.lower().endswith(pictures) for name, _ in group) for group in runs]
    assert len(items) == sum(max(1, count) for count in counts)


def split_key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def test_pictures_that_only_end_like_one_are_named(tmp_path: Path) -> None:
    members = {"a.png": picture(0), "a.txt": b"a"}
    for number in range(3):
        members |= {f"a.{number:04d}.png": picture(number), f"a.{number:04d}.txt": b"b"}
    found = read(write_tar(tmp_path / "a.tar", members))
    assert outcome(found) == ["a", *["- picture with a further dot in its name"] * 3]
    assert [item.where for item in found[1:]] == [
        f"{tmp_path}/a.tar, member a.{number:04d}.png" for number in range(3)
    ]
    del members["a.png"], members["a.txt"]
    found = read(write_tar(tmp_path / "a.tar", members))
    assert outcome(found) == ["- picture with a further dot in its name"] * 3


def test_of_two_captions_beside_a_picture_one_is_named(tmp_path: Path) -> None:
    members = {"b.png": picture(0), "b.txt": b"x, y", "b.caption": b"An x."}
    path = write_tar(tmp_path / "a.tar", members)
    for key, caption in (("txt", "x, y"), ("caption", "An x.")):
        assert outcome(read(path, replace(OPTIONS, text_key=key))) == [caption]
    same = write_tar(tmp_path / "b.tar", members | {"b.caption": b"x, y\n"})
    assert outcome(read(same)) == ["x, y"]


BAD_SAMPLES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "partner missing": ([("b.txt", b"x")], "no picture"),
    "json alone": ([("b.json", b"{}")], "no picture"),
    "two pictures": ([("b.jpg", b"x"), ("b.png", b"y"), ("b.txt", b"z")], "more than one picture"),
    "picture alone": ([("b.jpg", b"x")], "no caption"),
    "json without it": ([("b.jpg", b"x"), ("b.json", b'{"url": "u"}')], "no caption"),
    "no text": ([("b.jpg", b"x"), ("b.json", b'{"caption": 3}')], "no caption"),
    "null": ([("b.jpg", b"x"), ("b.json", b'{"caption": null}')], "no caption"),
    "empty": ([("b.jpg", b"x"), ("b.txt", b"")], "empty caption"),
    "white": ([("b.jpg", b"x"), ("b.txt", b" \n\t")], "empty caption"),
    "absent": ([("b.jpg", b"x"), ("b.txt", b"nan")], "empty caption"),
    "two": ([("b.jpg", b"x"), ("b.txt", b"x, y"), ("b.caption", b"An x.")], "two captions"),
    "latin": ([("b.jpg", b"x"), ("b.txt", b"caf\xe9")], "caption not UTF-8"),
    "latin json": ([("b.jpg", b"x"), ("b.json", b'{"caption": "\xe9"}')], "caption not UTF-8"),
    "half": ([("b.jpg", b"x"), ("b.json", b'{"caption": "\\ud800"}')], "caption not Unicode"),
    "cut json": ([("b.jpg", b"x"), ("b.json", b'{"caption": "a')], "metadata not JSON"),
    "list json": ([("b.jpg", b"x"), ("b.json", b'["a"]')], "metadata not JSON"),
    "deep json": ([("b.jpg", b"x"), ("b.json", b"[" * 100_000)], "metadata not JSON"),
    "zero": ([("b.jpg", b""), ("b.txt", b"x")], "zero-byte picture"),
    "upward": ([("../b.jpg", b"x"), ("../b.txt", b"x")], "unsafe member name"),
    "absolute": ([("/b.jpg", b"x"), ("/b.txt", b"x")], "unsafe member name"),
    "twice": ([("b.jpg", b"x"), ("b.jpg", b"x"), ("b.txt", b"x")], "member there twice"),
    "large": ([("b.jpg", b"x" * 200_001), ("b.txt", b"x")], "picture too large"),
}


def test_a_bad_sample_is_left_out_with_its_reason_and_its_neighbours_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats_records, "LARGEST_BYTES", 200_000)
    around = [("a.jpg", picture(0)), ("a.txt", b"first")]
    behind = [("c.jpg", picture(1)), ("c.txt", b"last")]
    for name, (bad, reason) in BAD_SAMPLES.items():
        path = write_tar(tmp_path / "a.tar", [*around, *bad, *behind])
        records = read(path)
        # Of two pictures each is one.
        times = 2 if name in ("two pictures", "twice") else 1
        assert outcome(records) == ["first", *[f"- {reason}"] * times, "last"], name
        assert records[1].where.startswith(f"{path}, sample ")
        str(records[1]).encode()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({}, "no synthetic caption"),
        ({"syn.json": b'{"syn_text": []}'}, "no synthetic caption"),
        ({"syn.json": b'{"syn_text": "one"}'}, "no synthetic caption"),
        ({"json": b'{"caption": "a"}'}, "no synthetic caption"),
        ({"syn.json": b'{"syn_text": [7]}'}, "no caption"),
        ({"syn.json": b'{"syn_text": [" "]}'}, "empty caption"),
        ({"syn.json": b'{"syn_text": ["\\udfff"]}'}, "caption not Unicode"),
        ({"syn.json": b'{"syn_text": ['}, "metadata not JSON"),
    ],
)
def test_bad_synthetic_captions_cost_a_picture_that_needs_one_and_no_other(
    tmp_path: Path, parts: dict[str, bytes], reason: str
) -> None:
    sample = {"b.jpg": picture(0), "b.txt": b"original"}
    path = write_tar(tmp_path / "a.tar", sample | {f"b.{k}": v for k, v in parts.items()})
    assert outcome(read(path, ReadOptions(require="synthetic"))) == [f"- {reason}"]
    (record,) = read(path)
    assert isinstance(record, CaptionRecord)
    assert (record.caption, record.synthetic) == ("original", ())
    assert record.left_out == (reason != "no synthetic caption")


def test_captions_that_cannot_be_used_beside_others_are_counted(tmp_path: Path) -> None:
    made = as_json({"syn_text": ["one", " ", "two", None]})
    members = {"b.jpg": picture(0), "b.txt": b" ", "b.syn.json": made}
    (record,) = read(write_tar(tmp_path / "a.tar", members))
    assert isinstance(record, CaptionRecord)
    assert record.texts == ("one", "two")
    assert (record.caption, record.left_out) == ("", 3)


def test_flickr8k_is_read_whole() -> None:
    records = read(shared("caption_flickr8k"))
    assert len(captions(records)) == len(records) == 12_500
    files = {r.picture.file for r in records if isinstance(r, CaptionRecord)}
    assert len(files) == 2_500
    assert "A black dog and a spotted dog are fighting" in captions(records)


def test_noto_emoji_is_read_whole_with_its_folder_of_pictures() -> None:
    folder = shared("caption_noto_emoji")
    records = read(folder, ReadOptions(images=f"{folder}/72"))
    assert len(captions(records)) == len(records) > 1_600
    assert captions(records)[0] == "keycap #"
    groups = captions(read(folder, ReadOptions(images=f"{folder}/72", text_key="group")))
    assert groups[0] == "Symbols"


def test_a_cut_of_cocos_captions_without_its_pictures_is_counted_as_missing() -> None:
    records = read(shared("vqa_official_samples/first100_items/coco"))
    assert Counter(outcome(records)) == {"- missing picture": 100}
