"""Captions as people have them: COCO's from tables, links, other programs' names and lists."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from made_captions import img2dataset, joined, outcome, picture, read, write, write_tar
from made_inputs import OPTIONS, as_json, as_lines, as_parquet, run

from inputs import png
from midstream.data.formats import read_captions
from midstream.data.formats.captions import synthetic_captions
from midstream.data.formats.read_captions import FORMATS, caption_units
from midstream.data.formats.records import ReadOptions, Sample
from midstream.data.source_writer import Reject


@pytest.mark.parametrize(
    ("folder", "named", "number"),
    [("", False, "{0}"), ("", True, "{0}.0"), ("train2017/", False, '"{0}"')],
)
def test_coco_as_tables_write_it(tmp_path: Path, folder: str, named: bool, number: str) -> None:
    images, annotations = [], []
    for n in range(3):
        write(tmp_path / f"train2017/{n}.png", picture(n))
        image = number.format(n)
        images.append(f'{{"id": {image}, "file_name": "{folder}{n}.png", "lat": NaN}}')
        annotations.append(f'{{"image_id": {n}, "caption": "box {n}", "score": -Infinity}}')
    listed = f'{{"annotations": [{", ".join(annotations)}], "images": [{", ".join(images)}]}}'
    path = write(tmp_path / "captions_train2017.json", listed.encode())
    options = ReadOptions(images=str(tmp_path)) if named else OPTIONS
    found = read(path, options)
    assert outcome(found) == ["box 0", "box 1", "box 2"]
    assert [item.picture.data for item in found] == [picture(n) for n in range(3)]
    write(tmp_path / "captions_train2017.json", listed[:-9].encode())
    with pytest.raises(ValueError, match=r"is not whole JSON in UTF-8 .*; fetch it again"):
        read(path, options)


def test_links_that_lead_nowhere_say_where_and_absolute_names_are_read(tmp_path: Path) -> None:
    write(tmp_path / "set/0.png", picture(0))
    write(tmp_path / "far/1.png", picture(1))
    for name, target in (("gone.png", "../far/none.png"), ("round.png", "round.png")):
        (tmp_path / "set" / name).symlink_to(target)
    names = [f"{tmp_path}/set/0.png", f"{tmp_path}/far/1.png", "gone.png", "round.png"]
    lines = [{"image": name, "caption": "a"} for name in names]
    table = "".join(f"{line['image']},a\n" for line in lines)
    path = write(tmp_path / "set/captions.csv", f"image,caption\n{table}".encode())
    found = read(path)
    assert outcome(found) == ["a", "- picture outside the folder", *["- missing picture"] * 2]
    assert [str(item).partition("png ")[2] for item in found[2:]] == [
        "has no file behind it: it links to ../far/none.png)",
        "has links that go round in a circle)",
    ]
    assert outcome(read(path, ReadOptions(images=f"{tmp_path}/far")))[:2] == ["a", "a"]


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path / "README.txt", b"nothing")
    write(tmp_path / "lines.jsonl", b'{"text": "a"}\n')
    for source in (".", "README.txt", "lines.jsonl"):
        with pytest.raises(ValueError, match="known are") as error:
            caption_units([str(tmp_path / source)], OPTIONS)
        assert all(name in str(error.value) for name in FORMATS)


def test_a_folder_with_captions_in_two_formats_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", img2dataset(0))
    write(tmp_path / "captions.csv", b"image,caption\n0.jpg,a\n")
    with pytest.raises(ValueError, match=r"a\.tar, .*captions\.csv.*name the files"):
        caption_units([str(tmp_path)], OPTIONS)
    sources = [str(tmp_path / "a.tar"), str(tmp_path / "captions.csv")]
    formats = [unit.format for unit in caption_units(sources, OPTIONS)]
    assert formats == ["webdataset", "csv"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        caption_units([str(tmp_path / "nowhere")], OPTIONS)


def write_table(path: Path, columns: dict[str, Any]) -> str:
    return write(path, as_parquet(pyarrow.table(columns)))


def test_names_written_on_windows_are_read(tmp_path: Path) -> None:
    write(tmp_path / "images/a/0.png", picture(0))
    row = {"image": "images\\a\\0.png", "caption": "box"}
    coco = {
        "images": [{"id": 0, "file_name": "a\\0.png"}],
        "annotations": [{"image_id": 0, "caption": "box"}],
    }
    names = ("images\\a\\0.png", ".\\images\\a\\0.png", "./images/a/0.png", "a\\0.png")
    absolute = read(write(tmp_path / "captions.csv", b"image,caption\n/images/a/0.png,box\n"))
    assert outcome(absolute) == ["- picture outside the folder"]
    table = "image,caption\n" + "".join(f"{name},box\n" for name in names)
    listed = {
        "a.json": as_json([row]),
        "captions_a.json": as_json(coco),
        "captions.csv": table.encode(),
    }
    for name, data in listed.items():
        found = read(write(tmp_path / name, data))
        assert {*outcome(found)} == {"box"}
        assert {item.picture.data for item in found} == {picture(0)}
    write(tmp_path / "a.json", as_json([row | {"image": "b\\0.png"}]))
    (found,) = read(f"{tmp_path}/a.json")
    assert str(found).endswith(f"missing picture ({tmp_path}/b/0.png)")


def test_names_in_another_form_of_unicode_are_read(tmp_path: Path) -> None:
    forms: tuple[Any, ...] = ("NFC", "NFD")
    for here in forms:
        write(tmp_path / here / unicodedata.normalize(here, "né.png"), picture(0))
        for form in forms:
            row = {"image": unicodedata.normalize(form, "né.png"), "caption": "box"}
            found = read(write(tmp_path / here / "a.json", as_json([row])))
            assert outcome(found) == ["box"]


def test_keys_are_those_of_imagefolder_in_any_case(tmp_path: Path) -> None:
    write(tmp_path / "0.png", picture(0))
    for key, text in (("image_file_name", "text"), ("file_names", "TEXT"), ("Image", "caption")):
        name: Any = ["0.png"] if key.endswith("s") else "0.png"
        row = {"file_name": None, key: name, "Text": None, text: "box"}
        assert outcome(read(write(tmp_path / "metadata.jsonl", as_lines([row])))) == ["box"]
    several = {"left_file_name": "0.png", "right_file_name": "0.png", "text": "box"}
    found = read(write(tmp_path / "metadata.jsonl", as_lines([several])))
    assert outcome(found) == ["- no picture"]


def test_which_of_several_names_of_a_picture_is_meant(tmp_path: Path) -> None:
    for n in range(2):
        write(tmp_path / f"{n}.png", picture(n))
    row = {"file_path": "1.png", "image_file": "1.png", "image_path": "0.png", "text": "box"}
    (found,) = read(write(tmp_path / "a.json", as_json([row])))
    assert found.picture.data == picture(0)
    table = b"file_name,image,text\n1.png,0.png,box\n"
    (found,) = read(write(tmp_path / "captions.csv", table))
    assert found.picture.data == picture(0)


IT = ["it's", "a 'box'"]
LISTED: dict[str, list[str]] = {
    "[\"it's\", 'a \\'box\\'']": IT,
    '["it\'s"\n "a \'box\'"]': IT,
    '["it\'s", "a \'box\'"]': IT,
    "[None, 'a']": ["- no caption", "a"],
    '["a", null]': ["a", "- no caption"],
    "['a' nan 'b']": ["a", "- no caption", "b"],
    "('a', 'b')": ["a", "b"],
    "('a',)": ["a"],
    "['a' 'None' ... 'b']": ["- no caption"],
    **{one: [one] for one in ("['a'] and [b]", "('a')", "[12]", "(None)", "...", "['\\x']")},
}


def test_lists_as_python_numpy_and_json_write_them_are_lists_and_gaps_no_captions(
    tmp_path: Path,
) -> None:
    write(tmp_path / "0.png", picture(0))
    for text, expected in LISTED.items():
        row = {"image": "0.png", "caption": text}
        assert outcome(read(write(tmp_path / "a.json", as_json([row])))) == expected


def test_a_caption_beside_its_picture_may_be_in_utf16(tmp_path: Path) -> None:
    for n, end in enumerate(("txt", "json", "txt")):
        write(tmp_path / f"{n}.png", picture(n))
        text = '{"caption": "née"}' if end == "json" else "née"
        write(tmp_path / f"{n}.{end}", text.encode("utf-16" if n < 2 else "utf-32"))
    assert outcome(read(str(tmp_path))) == ["née", "née", "- caption not UTF-8"]


def test_a_quoted_field_may_hold_a_tab_and_a_line_end(tmp_path: Path) -> None:
    write(tmp_path / "0.png", picture(0))
    (found,) = read(write(tmp_path / "a.tsv", b'image\ttext\n0.png\t"a\tbus\nand\tmore\n"\n'))
    assert found.caption == "a\tbus\nand\tmore"


def test_a_table_with_pictures_and_addresses_is_asked_for_its_caption(tmp_path: Path) -> None:
    columns = {"image": [png(0)], "url": ["http://host/0.jpg"], "description": ["a"]}
    with pytest.raises(ValueError, match=r"\(--text-key names another caption\)"):
        read(write_table(tmp_path / "a.parquet", columns))


def test_several_captions_in_a_sample_of_a_tar_are_several_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    five = {"0.jpg": picture(0), "0.json": as_json({"caption": ["a", " ", "b"]})}
    found = read(write_tar(tmp_path / "a.tar", five))
    assert outcome(found) == ["a", "- empty caption", "b"]
    assert str(found[1]).startswith(f"{tmp_path}/a.tar, sample 0, caption 1: ")
    assert {item.picture.data for item in (found[0], found[2])} == {picture(0)}
    both = joined("k") | {"k.json": as_json({"caption": ["a", "b"]})}
    del both["k.txt"]
    (found,) = read(write_tar(tmp_path / "b.tar", both))
    assert (found.caption, len(found.synthetic), found.left_out) == ("a", 5, 1)
    both["k.json"] = as_json({"caption": [" ", "b", "c"]})
    (found,) = read(write_tar(tmp_path / "b.tar", both))
    assert (found.caption, len(found.synthetic), found.left_out) == ("b", 5, 2)
    parsed: list[str] = []

    def count(sample: Sample) -> list[str | Reject]:
        parsed.append(sample.key)
        return synthetic_captions(sample)

    monkeypatch.setattr(read_captions, "synthetic_captions", count)
    read(f"{tmp_path}/a.tar")
    assert parsed == ["0"]
    broken = five | {"0.jpg": b""}
    assert outcome(read(write_tar(tmp_path / "c.tar", broken))) == ["- zero-byte picture"]


def test_a_tar_that_is_broken_from_the_start_is_told_after_the_others(tmp_path: Path) -> None:
    write(tmp_path / "in/0.tar", b"")
    write_tar(tmp_path / "in/1.tar", {"0.png": png(0), "0.txt": b"box", "0.syn.json": b"{}"})
    units = caption_units([f"{tmp_path}/in"], OPTIONS)
    assert [unit.format for unit in units] == ["datacompdr"] * 2
    with pytest.raises(ValueError, match=r"1 of 2 inputs .*\n.*/0\.tar is not a whole tar file"):
        run("captions", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/shards/000001").is_dir()


def test_what_img2dataset_did_not_get_is_told_and_no_bad_record(tmp_path: Path) -> None:
    columns = {
        "caption": [f"box {n}" for n in range(4)],
        "status": ["success", "failed_to_download", "failed_to_resize", "success"],
        "error_message": [None, "HTTP Error 404", None, None],
        "jpg": [png(0), None, None, png(3)],
    }
    write_table(tmp_path / "in/00000.parquet", columns)
    done = run("captions", tmp_path / "in", tmp_path / "out")
    assert done["rejects"] == {"not fetched": 2}
    assert done["train"]["examples"] == 2
    lines = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["detail"] == "failed_to_download, HTTP Error 404"
    # Others have a column of this name too.
    write_table(tmp_path / "b.parquet", columns | {"status": ["new", "", None, "ok"]})
    assert outcome(read(f"{tmp_path}/b.parquet")) == ["box 0", *["- no picture"] * 2, "box 3"]
    # A picture that img2dataset says it has is a bad record, and so is a source without any.
    for have, message in ((png(0), "1 of 4 records"), (None, "4 of 4 records")):
        write_table(tmp_path / "in/00000.parquet", columns | {"jpg": [have, None, None, None]})
        with pytest.raises(ValueError, match=rf"{message}(.*\n)+.* x no picture"):
            run("captions", tmp_path / "in", tmp_path / "out")


def test_pictures_of_a_table_come_before_their_names_of_any_type(tmp_path: Path) -> None:
    names = pyarrow.array(["gone.png"] * 2)
    for kind in (
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int8(), "str"),
    ):
        columns = {"file_name": names.cast(kind), "image": [png(0), png(1)], "text": ["a", "b"]}
        assert outcome(read(write_table(tmp_path / "a.parquet", columns))) == ["a", "b"]
    columns = {"image": [[[0, 9], [9, 0]]] * 2, "text": ["a", "b"]}
    found = read(write_table(tmp_path / "a.parquet", columns))
    assert str(found[0]).endswith("no picture (it is numbers, not a file in a picture format)")


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    columns = [pyarrow.array([png(0)]), pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = as_parquet(pyarrow.table(columns, names=["image", "text", "text"]))
    with pytest.raises(ValueError, match=r"a\.parquet has several columns text; give each"):
        read(write(tmp_path / "a.parquet", table))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tsv", b"a bus\thttp://host/0.jpg\n", "are addresses: fetch them with img2dataset"),
        ("a.csv", b"URL,TEXT\nhttp://host/0.jpg,a\n", "are addresses: fetch them with img2dataset"),
        (
            "a.json",
            b'[{"url": "http://host/0.jpg", "caption": "a"}]',
            "fetch them with img2dataset",
        ),
        ("a.csv", b"image,text,text\n0.png,a,b\n", "has several columns text; give each a name"),
        ("captions.txt", b"0.png\ta bus\n", "its first line is a record: write a header above it"),
        ("a.csv", b"0.png,a bus\n", "its first line is a record: write a header above it"),
        ("a.csv", b'image,caption,split\n0.png,"a" b,x\n', r"line 2: no CSV .*; quote fields"),
        ("a.tsv", b'image\tcaption\n0\t"a\n1\tb"\n2\tc\n', r"line 3: no CSV .*over lines and col"),
        ("a.csv", b'image,caption\n0.jpg,"never closed\n1.jpg,a\n', r"a\.csv"),
        ("a.csv", b"image,caption\n", r"a\.csv"),
        ("a.csv", b"image,group\n0.jpg,a\n", r"a\.csv"),
        ("a.csv", b"", r"a\.csv"),
        ("a.csv", b"\x00\xff" * 100, r"a\.csv"),
    ],
)
def test_a_list_that_is_no_list_of_pictures_says_what_to_do(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, data))


def test_a_caption_inside_another_field_is_named_with_dots(tmp_path: Path) -> None:
    options = ReadOptions(text_key="json.prompt")
    inner = [{"prompt": "a"}, {"prompt": ["b", "c"]}, {"other": "d"}]
    (tmp_path / "0.png").write_bytes(png(0))
    listed = tmp_path / "list.json"
    listed.write_bytes(as_json([{"image": "0.png", "json": one} for one in inner]))
    columns = {"jpg": [png(n) for n in range(3)], "json": [json.dumps(one) for one in inner]}
    texts = write_table(tmp_path / "texts.parquet", columns)
    for path in (texts, str(listed)):
        assert outcome(read(path, options)) == ["a", "b", "c", "- no caption"]
    columns = {"jpg": [png(0)], "json": inner[:1]}
    structs = write_table(tmp_path / "structs.parquet", columns)
    assert outcome(read(structs, options)) == ["a"]


def test_names_as_in_addresses_and_with_an_end_in_other_letters_are_read(tmp_path: Path) -> None:
    for n, name in enumerate(["my photo.JPG", "100%25.png", "b.png"]):
        write(tmp_path / name, picture(n))
    asked = ["my%20photo.JPG", "my photo.jpg", "100%25.png", "b.PNG", "b%2.png", "c/b.PNG"]
    rows = [{"image": name, "caption": "box"} for name in [*asked, "%2e%2e/b.png"]]
    found = read(write(tmp_path / "a.json", as_json(rows)))
    assert outcome(found) == ["box"] * 4 + ["- missing picture"] * 3
    shown = [picture(n) for n in (0, 0, 1, 2)]
    assert [item.picture.data for item in found[:4]] == shown


def test_a_file_of_the_same_name_with_another_end_is_told_and_not_read(tmp_path: Path) -> None:
    for name in ("7.gif", "8.txt"):
        write(tmp_path / name, picture(0))
    rows = [{"image": name, "caption": "box"} for name in ("7.jpg", "8.jpg", "7", "9.gif")]
    found = read(write(tmp_path / "a.json", as_json(rows)))
    assert outcome(found) == ["- missing picture"] * 4
    details = [item.detail.removeprefix(f"{tmp_path}/") for item in found]
    assert details == ["7.jpg has another end there, 7.gif; rename one", "8.jpg", "7", "9.gif"]
