"""Lists of captions as people have them: COCO's from tables, long fields, links, unknown files."""

from pathlib import Path

import pytest
from made_captions import img2dataset, outcome, picture, read, write, write_tar
from made_inputs import OPTIONS

from midstream.data.formats.read_captions import FORMATS, caption_units
from midstream.data.formats.records import ReadOptions


@pytest.mark.parametrize("folder", ["", "train2017/"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("number", ["{0}", "{0}.0", '"{0}"'])
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


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "captions.csv", b"image,caption\n0.jpg,a\n")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        caption_units([str(tmp_path / "nowhere")], OPTIONS)
    with pytest.raises(FileNotFoundError, match="photos is no folder of pictures"):
        read(path, ReadOptions(images=str(tmp_path / "photos")))
