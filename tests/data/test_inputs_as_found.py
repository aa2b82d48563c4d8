"""Inputs as people have them: doubled folders, patterns, parts without a suffix, base64, splits."""

import base64
import gzip
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from made_captions import outcome, write
from made_inputs import Put, as_json, as_lines, as_parquet, read_all, run

from inputs import png, tar
from midstream.core.digests import is_text
from midstream.data.formats.records import ReadOptions

ROWS = [{"image": f"{n}.png", "caption": f"box {n}"} for n in range(3)]
LINES = [{"file_name": row["image"], "text": row["caption"]} for row in ROWS]
BOXES = ["box 0", "box 1", "box 2"]
PLAIN = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
BASE64 = base64.b64encode(png(1)).decode()


def write_samples(folder: Path, numbers: range, caption: str = "cap") -> None:
    for n in numbers:
        write(folder / f"{n}.png", png(n))
        write(folder / f"{n}.txt", f"{caption} {n}".encode())


def write_pictures(folder: Path) -> None:
    for n in range(3):
        write(folder / f"{n}.png", png(n))


# Samples of files beside each other.


@pytest.mark.parametrize("how", ["link", "copy", "links", "renamed links"])
def test_a_folder_of_samples_is_not_read_twice(tmp_path: Path, how: str) -> None:
    write_samples(tmp_path / "in/a", range(3))
    if how == "link":
        (tmp_path / "in/b").symlink_to("a")
    elif how == "copy":
        shutil.copytree(tmp_path / "in/a", tmp_path / "in/b")
    else:
        (tmp_path / "in/b").mkdir()
        for end in ("png", "txt"):
            name = f"0.{end}" if how == "links" else f"other.{end}"
            (tmp_path / "in/b" / name).symlink_to(tmp_path / f"in/a/0.{end}")
    with pytest.raises(ValueError, match=r"in/a/0\.png and .*in/b/.*\.png .*would count twice"):
        run("captions", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_splits_of_samples_beside_each_other_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    for number, split in enumerate(("train", "test")):
        write_samples(tmp_path / "in" / split, range(number, number + 1))
    run("captions", tmp_path / "in", tmp_path / "out", notice=told.append)
    assert ["files of the splits test, train are read" in line for line in told] == [True]


def test_samples_with_one_picture_or_one_caption_are_samples(tmp_path: Path) -> None:
    write_samples(tmp_path / "in/a", range(3))
    write_samples(tmp_path / "in/b", range(3), "other")
    write_samples(tmp_path / "in/c", range(3, 5))
    write(tmp_path / "in/c/3.txt", b"cap 0")
    write(tmp_path / "in/c/9.txt", b"cap 0 again")
    os.symlink(tmp_path / "in/a/0.png", tmp_path / "in/c/9.png")
    assert run("captions", tmp_path / "in", tmp_path / "out")["train"]["examples"] == 9


def test_a_pattern_of_folders_reads_each_as_a_folder(put: Put) -> None:
    for part in range(2):
        for n in range(2):
            put(f"part-{part}/{part}{n}.png", png(n))
            put(f"part-{part}/{part}{n}.txt", b"cap %d%d" % (part, n))
        put(f"tars-{part}/{part}.tar", tar({"a.png": png(part), "a.txt": b"tar %d" % part}))
        put(f"tars-{part}/{part}.parquet", as_parquet([{"url": "a", "caption": "b"}]))
        put(f"tars-{part}/{part}_stats.json", b"{}")
    root = put("", b"").rstrip("/")
    for pattern in ("part-*", "part-*/*"):
        found = read_all("captions", f"{root}/{pattern}")
        assert outcome(found) == ["cap 00", "cap 01", "cap 10", "cap 11"]
    for pattern in ("tars-*", "tars-*/*", "tars-*/*.tar"):
        assert outcome(read_all("captions", f"{root}/{pattern}")) == ["tar 0", "tar 1"]


# Lists.


LISTS = [
    ("x.jsonl", as_json(ROWS)),
    ("x.jsonl", json.dumps(ROWS).encode()),
    ("x.json", as_lines(ROWS)),
    ("x.json", b"\xef\xbb\xbf" + as_lines(ROWS)),
    ("metadata.jsonl", as_json(LINES)),
    ("metadata.json", as_lines(LINES)),
    ("metadata.json", as_json(LINES)),
    ("train", as_lines(ROWS)),
    ("part-00000", as_json(ROWS)),
    ("x.ndjson", as_lines(ROWS)),
]


def test_lists_and_lines_of_captions_are_told_by_their_content(tmp_path: Path) -> None:
    for number, (name, data) in enumerate(LISTS):
        folder = tmp_path / str(number)
        write_pictures(folder)
        path = write(folder / name, data)
        for source in (path, str(folder), f"{folder}/*"):
            assert outcome(read_all("captions", source)) == BOXES, name


def test_a_line_that_is_long_is_a_line(tmp_path: Path) -> None:
    rows = [{"image": BASE64, "caption": "a", "more": "x" * 2**17}]
    assert (
        outcome(read_all("captions", write(tmp_path / "x.json", as_lines(rows * 2)))) == ["a"] * 2
    )
    coco = {
        "images": [{"id": 1, "file_name": "0.png", "more": "x" * 2**17}],
        "annotations": [{"image_id": 1, "caption": "a"}],
    }
    write_pictures(tmp_path)
    path = write(tmp_path / "captions_x.json", json.dumps(coco).encode())
    assert outcome(read_all("captions", path)) == ["a"]


@pytest.mark.parametrize(
    "names",
    [
        ("captions.csv", "captions.txt"),
        ("captions.csv", "captions.tsv"),
        ("captions.csv", "metadata.csv"),
        ("captions_de.csv", "captions_en.csv"),
        ("blip.json", "filtered.jsonl"),
    ],
)
def test_which_of_two_lists_of_the_same_pictures_is_meant_is_asked(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    write_pictures(tmp_path)
    for name in names:
        rows = [{"image": f"{n}.png", "caption": f"{name}, {n}"} for n in range(3)]
        comma = "\t" if name.endswith("tsv") else ","
        table = "".join(f'{row["image"]}{comma}"{row["caption"]}"\n' for row in rows)
        data = f"image{comma}caption\n{table}".encode()
        if ".json" in name:
            data = as_json(rows) if name.endswith("json") else as_lines(rows[1:])
        write(tmp_path / name, data)
    with pytest.raises(ValueError, match=r"both have captions of [01]\.png; remove the one"):
        read_all("captions", str(tmp_path))
    for name in names:
        assert len(read_all("captions", str(tmp_path / name))) >= 2


def test_lists_of_different_pictures_are_read_together(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    write(tmp_path / "captions_a.csv", b"image,caption\n0.png,a\n")
    write(tmp_path / "captions_b.csv", b"image,caption\n1.png,b\n")
    assert outcome(read_all("captions", str(tmp_path))) == ["a", "b"]


# Files by their content.


def test_parts_without_a_suffix_are_read_by_their_content(put: Put) -> None:
    texts = [as_lines([{"text": f"text {n}"}]) for n in range(3)]
    put("in/part-00000", texts[0])
    put("in/part-00001.gz", gzip.compress(texts[1]))
    put("in/part-00002", as_parquet([{"text": "text 2"}]))
    put("in/data.00003", as_json([{"text": "text 3"}]))
    for name, data in (("_SUCCESS", b""), ("Makefile", b"all:\n"), ("a2.bz2", b"x")):
        put(f"in/{name}", data)
    root = put("", b"").rstrip("/")
    for source in (f"{root}/in", f"{root}/in/*"):
        found = sorted(item.text for item in read_all("text", source))
        assert found == [f"text {n}" for n in range(4)]
    assert [item.text for item in read_all("text", f"{root}/in/part-00000")] == ["text 0"]
    for name, data in (("list", as_json), ("lines", as_lines)):
        put(f"talks/{name}/train", data([{"conversations": PLAIN}]))
        (found,) = read_all("conversations", f"{root}/talks/{name}")
        assert found.turns[0].reply == "A cat."
    put("tars/00000", tar({"a.png": png(1), "a.txt": b"a"}))
    assert outcome(read_all("captions", f"{root}/tars")) == ["a"]
    put("plain/part-00000", b"Plain text.\n")
    with pytest.raises(ValueError, match=r"part-00000 is of no known format of texts, by"):
        read_all("text", f"{root}/plain/part-00000")


def test_a_part_that_is_linked_by_its_own_name_is_read_once(tmp_path: Path) -> None:
    blob = tmp_path / "hub/blobs/0123abcd"
    write(blob, as_lines([{"text": "a"}]))
    (tmp_path / "hub/snapshots").mkdir()
    (tmp_path / "hub/snapshots/train.jsonl").symlink_to(blob)
    assert run("text", tmp_path / "hub", tmp_path / "out")["train"]["examples"] == 1


def test_files_that_may_be_read_by_their_content_are_in_the_digest_of_their_source() -> None:
    for name in ("part-00000", "x.ndjson", "data.00003.gz", "a.jsonl", "b.PARQUET"):
        assert is_text(name)
    for name in ("_SUCCESS", "LICENSE", "x.pdf", "a.jsonl.bak"):
        assert not is_text(name)


@pytest.mark.parametrize("name", ["a.PARQUET", "a.Parquet", "a.parquet.gz", "A.PARQUET.GZ", "a.pq"])
def test_names_of_tables_are_read_in_any_case_and_compressed(put: Put, name: str) -> None:
    data = as_parquet([{"text": "one", "conversations": PLAIN}, {"text": "two"}])
    put(f"in/{name}", gzip.compress(data) if name.lower().endswith("gz") else data)
    root = put("", b"").rstrip("/")
    for source in (f"{root}/in", f"{root}/in/*", f"{root}/in/{name}"):
        assert [item.text for item in read_all("text", source)] == ["one", "two"]
        assert len(read_all("conversations", source)) == 2
    put(f"in/train-0{name[1:]}", data)
    put(f"in/test-0{name[1:]}", data)
    if not name.endswith("pq"):
        with pytest.raises(ValueError, match="holds the splits test, train"):
            read_all("text", f"{root}/in")


def test_a_pointer_of_git_lfs_is_no_file(put: Put) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    for section, name in (
        ("text", "a.jsonl"),
        ("text", "b.txt"),
        ("text", "c.parquet"),
        ("captions", "d.tar"),
        ("conversations", "e.json"),
    ):
        with pytest.raises(ValueError, match=rf"{name} is not the file but a pointer of Git LFS"):
            read_all(section, put(f"{section}/{name}", pointer))  # type: ignore[arg-type]


# Pictures in base64, and lists as text.


def test_pictures_in_base64_are_read_with_and_without_a_head(tmp_path: Path) -> None:
    safe = BASE64.replace("+", "-").replace("/", "_")
    shown: list[Any] = [
        BASE64,
        safe,
        f"data:image/png;base64,{BASE64}",
        BASE64.rstrip("="),
        [BASE64],
        str(BASE64.encode()),
    ]
    shown += [{"bytes": BASE64, "path": None}, {"base64": BASE64}, json.dumps([BASE64])]
    rows = [{"image": one, "caption": "a"} for one in shown]
    bad = [{"image": BASE64[:99] + "@" + BASE64[99:], "caption": "a"}]
    bad += [{"image": "n" * 9000, "caption": "a"}]
    found = read_all("captions", write(tmp_path / "a.jsonl", as_lines(rows + bad)))
    assert outcome(found) == ["a"] * len(rows) + ["- no picture", "- missing picture"]
    assert {item.picture.data for item in found[: len(rows)]} == {png(1)}
    assert found[-2].detail == "its base64 is damaged"
    assert len(found[-1].detail) < 400


def test_turns_in_a_column_of_text_are_read_as_json(tmp_path: Path) -> None:
    rows = [{"conversations": json.dumps(PLAIN)}, {"conversations": str(PLAIN)}]
    good, bad = read_all("conversations", write(tmp_path / "a.parquet", as_parquet(rows)))
    assert good.turns[0][:2] == ("What?", "A cat.")
    assert bad.reason == "no conversation"
    assert bad.detail.endswith("what is there is text but no JSON")


# COCO.


def split(*names: str, folder: str = "train2014") -> bytes:
    images = [
        {"filename": f"{n}.png", "split": name, "sentences": [{"raw": f"a {n}"}, {"raw": f"b {n}"}]}
        for n, name in enumerate(names)
    ]
    images = [{**image, "filepath": folder} if folder else image for image in images]
    return json.dumps({"images": images, "dataset": "coco"}).encode()


def test_karpathys_split_is_read_and_which_of_several_is_asked(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train2014")
    path = write(tmp_path / "dataset_coco.json", split("train", "restval", "test"))
    with pytest.raises(ValueError, match=r"the splits restval, test, train, .*--split train\+rest"):
        read_all("captions", path)
    with pytest.raises(ValueError, match=r"has no split dev; it has restval, test, train"):
        read_all("captions", path, options=ReadOptions(split="dev"))
    both = ReadOptions(split="train+restval")
    for source in (path, str(tmp_path)):
        found = read_all("captions", source, options=both)
        assert outcome(found) == ["a 0", "b 0", "a 1", "b 1"]
        assert found[0].where == f"{path}, record 0, caption 0"
    images = ReadOptions(images=str(tmp_path / "train2014"), split="test")
    assert outcome(read_all("captions", path, options=images)) == ["a 2", "b 2"]


@pytest.mark.parametrize("folder", ["images", "."])
def test_a_split_without_folders_finds_its_pictures_beside_it(tmp_path: Path, folder: str) -> None:
    write_pictures(tmp_path / folder)
    path = write(tmp_path / "dataset_flickr8k.json", split("train", "train", folder=""))
    whole = json.loads(Path(path).read_text())
    whole["images"] += [{"filename": "2.png", "split": "train", "sentences": []}, 5]
    write(Path(path), as_json(whole))
    expected = ["a 0", "b 0", "a 1", "b 1", "- no caption", "- no caption"]
    assert outcome(read_all("captions", path)) == expected


def test_captions_of_two_years_of_coco_are_not_read_as_one(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
    for year in (2014, 2017):
        told = [{"image_id": n, "caption": f"box {n}"} for n in range(3)]
        whole = {"images": images, "annotations": told}
        write(tmp_path / f"captions_train{year}.json", as_json(whole))
    with pytest.raises(ValueError, match=r"_train2014\.json and .*_train2017\.json have captions"):
        read_all("captions", str(tmp_path))


def test_pictures_of_one_id_are_not_taken_for_each_other(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    images = [{"id": 0, "file_name": f"{n}.png"} for n in (0, 0, 2)]
    whole = {"images": images, "annotations": [{"image_id": 0, "caption": "a"}]}
    path = write(tmp_path / "captions_x.json", as_json(whole))
    with pytest.raises(ValueError, match=r"the images 0\.png and 2\.png have one id, 0; give each"):
        read_all("captions", path)
    whole["images"] = images[:2]
    assert outcome(read_all("captions", write(Path(path), as_json(whole)))) == ["a"]


# Members and files beside each other.


def test_each_picture_of_a_tar_is_a_record_or_a_reject(put: Put) -> None:
    members = {
        **{"a.gif": png(0), "a.txt": b"gif", "b.TIFF": png(1), "b.caption": b"tiff"},
        **{"c.bmp": png(2), "c.json": b'{"caption": "bmp"}', "d.avif": b"x", "e.v2.gif": b"x"},
        **{"f.jpg": png(3), "f.gif": png(4), "f.txt": b"two"},
    }
    found = read_all("captions", put("a.tar", tar(members)))
    two = "- more than one picture"
    dotted = "- picture with a further dot in its name"
    assert outcome(found) == ["gif", "tiff", "bmp", "- no caption", dotted, two, two]


def test_samples_are_found_by_the_names_that_people_give_them(tmp_path: Path) -> None:
    names = {"a.gif": "a.txt", "b.jpg": "b.jpg.txt", "c.png": "c.caption", "d.v2.png": "d.v2.json"}
    for number, (picture, text) in enumerate(names.items()):
        write(tmp_path / picture, png(number))
        data = f'{{"caption": "{picture}"}}' if text.endswith("json") else picture
        write(tmp_path / text, data.encode())
    assert outcome(read_all("captions", str(tmp_path))) == list(names)


def test_links_of_samples_that_lead_nowhere_are_rejects(tmp_path: Path) -> None:
    write_samples(tmp_path / "in", range(2))
    (tmp_path / "in/8.png").symlink_to("gone.png")
    write(tmp_path / "in/8.txt", b"a")
    write(tmp_path / "in/9.png", png(9))
    (tmp_path / "in/9.txt").symlink_to("gone.txt")
    found = read_all("captions", str(tmp_path / "in"))
    assert outcome(found) == ["cap 0", "cap 1", "- missing picture", "- no caption"]
    assert found[-1].detail.endswith("9.txt has no file behind it: it links to gone.txt")
    done = run("captions", tmp_path / "in", tmp_path / "out", max_reject_fraction=0.5)
    assert done["rejects"] == {"missing picture": 1, "no caption": 1}


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", as_lines([{"text": "a"}]))
    os.mkfifo(tmp_path / "pipe")
    assert len(read_all("text", str(tmp_path))) == 1


# Tables of text, and JSON in one piece.


@pytest.mark.parametrize("name", ["captions.csv", "Flickr8k.token.txt"])
def test_a_list_of_flickr8k_has_no_header(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path)
    path = write(tmp_path / name, b"0.png#0\ta\n1.png#1\tb\n")
    for source in (path, str(tmp_path)):
        assert outcome(read_all("captions", source)) == ["a", "b"]


def test_a_list_says_what_it_lacks(tmp_path: Path) -> None:
    path = write(tmp_path / "captions.csv", "image,caption,é\n0.png,a,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"its header is not UTF-8; write the file in UTF-8"):
        read_all("captions", path)
    path = write(tmp_path / "other.csv", b"photo,words\n0.png,a\n")
    with pytest.raises(
        ValueError, match=r"columns \['photo', 'words'\]; it needs image and text or"
    ):
        read_all("captions", path)
    path = write(tmp_path / "none.tsv", f"0\t{BASE64}\ta\n".encode())
    with pytest.raises(ValueError, match=r"columns \['0', '.{40}', 'a'\]; it needs image and"):
        read_all("captions", path)
    path = write(tmp_path / "a.jsonl", as_lines([{"image": "0.png", "blip_caption": "a"}]))
    (found,) = read_all("captions", path)
    assert str(found).endswith("no caption (its keys are ['image', 'blip_caption'])")
    path = write(tmp_path / "a.json", as_json({"data": ROWS}))
    with pytest.raises(ValueError, match=r"or write what is inside an object"):
        read_all("captions", path)
    with pytest.raises(ValueError, match=r"or write what is inside an object"):
        read_all("conversations", path)


def test_a_file_may_hold_one_object_over_several_lines(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    rows = {"text": {"text": "a"}, "conversations": {"conversations": PLAIN}, "captions": ROWS[0]}
    for section, row in rows.items():
        path = write(tmp_path / section / f"{section}.json", as_json(row))
        write_pictures(tmp_path / section)
        for source in (path, str(tmp_path / section)):
            (found,) = read_all(section, source)  # type: ignore[arg-type]
            assert found.where == f"{path}, record 0"
    # Lines of which the first is broken are lines.
    broken = b'{"text": "a\n' + as_lines([{"text": "b"}])
    first, second = read_all("text", write(tmp_path / "b.jsonl", broken))
    assert (first.reason, second.text) == ("not a JSON object", "b")


def test_files_in_a_zip_are_read_where_they_lie(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}\n')
    (found,) = read_all("text", f"zip://*.jsonl::{tmp_path}/a.zip")
    assert found.text == "a"
    with pytest.raises(ValueError, match=r"a\.zip is an archive that no reader opens; unpack it"):
        read_all("text", f"{tmp_path}/a.zip")


# Splits.


def test_records_that_say_their_split_are_never_read_as_one_source(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    rows = [{**row, "split": "train" if n else "test"} for n, row in enumerate(ROWS)]
    table = "".join(f'{row["image"]},"{row["caption"]}",{row["split"]}\n' for row in rows)
    files = {
        "a.parquet": as_parquet(rows),
        "a.csv": f"image,caption,split\n{table}".encode(),
        "a.json": as_json(rows),
        "a.jsonl": as_lines(rows),
    }
    for name, data in files.items():
        path = write(tmp_path / name, data)
        with pytest.raises(ValueError, match=r"holds the splits test, train, .*\(--split train"):
            read_all("captions", path)
        for asked, expected in (("train", BOXES[1:]), ("test", BOXES[:1]), ("train+test", BOXES)):
            found = read_all("captions", path, options=ReadOptions(split=asked))
            assert outcome(found) == expected
        with pytest.raises(ValueError, match=r"has no split dev; it has test, train"):
            read_all("captions", path, options=ReadOptions(split="dev"))
    one = write(tmp_path / "one.json", as_json([{**row, "split": "train"} for row in ROWS]))
    assert outcome(read_all("captions", one)) == BOXES


def test_a_split_that_nothing_says_is_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "in", range(2))
    train = ReadOptions(split="train")
    with pytest.raises(ValueError, match=r"0\.png says no split of its records; name no split"):
        read_all("captions", str(tmp_path / "in"), options=train)
    path = write(tmp_path / "in/captions.csv", b"image,caption\n0.png,a\n")
    with pytest.raises(ValueError, match=r"has no split train; it has none"):
        read_all("captions", path, options=train)
    with pytest.raises(ValueError, match=r"text say no split of their records; name the files"):
        read_all("text", path, options=train)


def test_an_option_of_another_kind_of_source_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", as_lines([{"text": "a"}]))
    others: list[tuple[Any, ReadOptions]] = [
        ("text", ReadOptions(images=".")),
        ("text", ReadOptions(max_tokens=9)),
        ("captions", ReadOptions(rating=3)),
        ("conversations", ReadOptions(text_key="content")),
        ("conversations", ReadOptions(require="synthetic")),
        ("conversations", ReadOptions(lost="text")),
        ("captions", ReadOptions(similarity=0.2)),
    ]
    for section, options in others:
        with pytest.raises(ValueError, match=rf"--[\w-]+ is of .*; for {section} leave it out"):
            read_all(section, path, options=options)


def test_splits_in_several_files_of_a_source_are_never_read_as_one(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    for name, split in (("a", "train"), ("b", "val")):
        row = {"file_name": "0.png", "text": f"a {name}", "split": split}
        write(tmp_path / f"{name}.jsonl", as_lines([row]))
    files = str(tmp_path / "*.jsonl")
    with pytest.raises(ValueError, match=r"holds the splits train, val, .*\(--split train"):
        read_all("captions", files)
    assert outcome(read_all("captions", files, options=ReadOptions(split="val"))) == ["a b"]


def test_a_caption_beside_another_of_its_picture_is_not_lost(tmp_path: Path) -> None:
    for name in ("0.jpg", "0.txt", "0.jpg.txt"):
        write(tmp_path / name, png(1))
    (found,) = read_all("captions", str(tmp_path))
    assert outcome([found]) == ["- member there twice"]
    assert {"0.jpg.txt", "0.txt"} <= {Path(name).name for name in found.detail.split()}


# What is no input, or half of one.


def test_a_file_beside_its_own_parts_is_refused(tmp_path: Path) -> None:
    parts = [
        {"all.jsonl": (0, 9), "all.jsonl.00": (0, 5), "all.jsonl.01": (5, 9)},
        {"all.jsonl": (0, 9), "xaa": (0, 5), "xab": (5, 9)},
        {"a/all.jsonl": (0, 9), "b/all.jsonl": (0, 5)},
    ]
    for number, files in enumerate(parts):
        folder = tmp_path / str(number)
        for name, numbers in files.items():
            write(folder / name, as_lines([{"text": f"text {n}"} for n in range(*numbers)]))
        whole, first, *_ = (folder / name for name in files)
        told = rf"{first} is what {whole} begins with, .* count twice"
        with pytest.raises(ValueError, match=told):
            run("text", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_that_was_cut_is_refused_and_files_that_begin_alike_are_not(tmp_path: Path) -> None:
    data = as_lines([{"text": f"text {n}"} for n in range(500)])
    write(tmp_path / "in/a.jsonl", data)
    write(tmp_path / "in/b.jsonl", data[:7_000] + b"\n" + data[:10] + b"\n")
    write(tmp_path / "in/one.jsonl", data[: data.index(b"\n") + 1])
    assert run("text", tmp_path / "in", tmp_path / "out", max_reject_fraction=0.01)["records"] > 800
    write(tmp_path / "in/a_other.jsonl", data[:9_500] + b"\n" + data[:10] + b"\n")
    write(tmp_path / "in/a (1).jsonl", data[:9_000])
    with pytest.raises(ValueError, match=r"a \(1\)\.jsonl is what .*/a\.jsonl begins with"):
        run("text", tmp_path / "in", tmp_path / "out")


def test_a_prepared_source_is_no_input_itself_nor_beside_texts(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", as_lines([{"text": "a"}, {"text": "b"}]))
    made = tmp_path / "made"
    run("text", tmp_path / "in", made)
    with pytest.raises(ValueError, match=r"/made is a prepared source already; give the files"):
        run("captions", made, tmp_path / "out")
    (made / "source.json").rename(tmp_path / "index")
    with pytest.raises(ValueError, match=r"/made is a source that is not prepared to its end; "):
        run("conversations", made, tmp_path / "out")
    # The remedy.
    run("text", tmp_path / "in", made)
    shutil.move(made, tmp_path / "in/made")
    with pytest.raises(ValueError, match=r"in/made is a prepared source already"):
        run("text", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.zst", "train.json"])
def test_a_page_in_place_of_a_file_is_told(put: Put, name: str) -> None:
    page = put(name, b'<!DOCTYPE html>\n<html class="">' + b" " * 100)
    with pytest.raises(ValueError, match=rf"{name} is not the file but a page .* /resolve/"):
        read_all("text", page)
    assert read_all("text", put("page.txt", b"<html></html>"))[0].text == "<html></html>"


def test_documents_beside_lines_are_told(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", as_lines([{"text": "a"}]))
    write(tmp_path / "in/urls.txt", b"https://example.org")
    notices: list[str] = []
    run("text", tmp_path / "in", tmp_path / "out", notice=notices.append)
    assert [note.partition(";")[0] for note in notices] == [
        "beside lines and rows, files are read as one document each: in/urls.txt"
    ]


def test_pictures_in_an_archive_are_asked_for_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", as_lines(LINES))
    write(tmp_path / "pictures.zip", b"PK")
    options = ReadOptions(images=str(tmp_path / "pictures.zip"))
    with pytest.raises(FileNotFoundError, match=r"pictures\.zip is no folder .*; unpack it"):
        run("captions", tmp_path / "a.jsonl", tmp_path / "out", options=options)


# Files that are not whole, and sets that lack some.


@pytest.mark.parametrize("section", ["text", "captions", "conversations", "documents"])
def test_lines_that_end_inside_a_record_are_told(put: Put, section: Any) -> None:
    record = {"image": "a.png", "text": "box <image>", "images": ["a.png"], "conversations": PLAIN}
    whole = as_lines([record] * 3)
    put("a.png", png(0))
    for cut in (2, 20):
        path = put("a.jsonl", whole[:-cut])
        with pytest.raises(ValueError, match=r"a\.jsonl ends inside line 3; fetch it again"):
            read_all(section, path)
    for end in (b"\0\0", b"\r\n", b""):
        assert len(read_all(section, put("b.jsonl", whole[:-1] + end))) == 3


@pytest.mark.parametrize("first", [0, 1])
def test_a_set_of_files_that_lacks_some_is_told(tmp_path: Path, first: int) -> None:
    told: list[str] = []
    for number in range(3):
        name = f"c4-train.{number + first:05d}-of-00003.jsonl"
        write(tmp_path / "in" / name, as_lines([{"text": f"text {number}"}]))
    run("text", tmp_path / "in", tmp_path / "out", notice=told.append)
    assert not told
    (tmp_path / f"in/c4-train.0000{1 + first}-of-00003.jsonl").unlink()
    run("text", tmp_path / "in", tmp_path / "out", notice=told.append)
    gap = f"in/c4-train.0000{1 + first}-of-00003.jsonl"
    assert told == [f"only 2 of a set of 3 files are read; {gap} is not"]
