"""Captions in the public layouts: what is read, what is left out and why, what is refused."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from made_captions import captions, outcome, picture, read, write
from made_inputs import OPTIONS, as_json, as_lines

from midstream.data.formats import picture_files as formats_pictures
from midstream.data.formats import read_captions
from midstream.data.formats.files import read_range
from midstream.data.formats.read_captions import caption_units
from midstream.data.formats.records import CaptionRecord, ReadOptions

# COCO.


def coco(num_images: int = 3, each: int = 5) -> dict[str, Any]:
    """The official layout; annotations of a picture do not stand together there."""
    images = [
        {"license": 3, "file_name": f"COCO_val2014_{n:012d}.jpg", "height": 3, "width": 4, "id": n}
        for n in range(num_images)
    ]
    annotations = [
        {"image_id": n, "id": 1000 + n * each + turn, "caption": f"picture {n}, caption {turn}\n"}
        for turn in range(each)
        for n in range(num_images)
    ]
    info = {"description": "COCO 2014 Dataset", "year": 2014}
    return {"info": info, "images": images, "licenses": [], "annotations": annotations}


def write_coco(root: Path, pictures: str, value: dict[str, Any] | None = None) -> str:
    value = coco() if value is None else value
    for number, image in enumerate(value["images"]):
        write(root / pictures / image["file_name"], picture(number))
    return write(root / "annotations" / "captions_val2014.json", as_json(value))


@pytest.mark.parametrize(
    "pictures",
    ["val2014", "images/val2014", "annotations/val2014", "annotations/images", "annotations"],
)
def test_coco_gives_five_captions_a_picture_wherever_the_pictures_lie(
    tmp_path: Path, pictures: str
) -> None:
    path = write_coco(tmp_path, pictures)
    write(tmp_path / "annotations" / "instances_val2014.json", b'{"annotations": [{}]}')
    for source in (path, str(tmp_path / "annotations")):
        records = read(source)
        assert captions(records) == [
            f"picture {n}, caption {t}" for t in range(5) for n in range(3)
        ]
        for number, record in enumerate(records):
            assert isinstance(record, CaptionRecord)
            assert record.where == f"{path}, record {number}"
            assert record.picture.data == picture(number % 3)
            assert Path(record.picture.file).read_bytes() == picture(number % 3)


def test_coco_finds_its_pictures_from_within_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(tmp_path, "val2014")
    monkeypatch.chdir(tmp_path / "annotations")
    assert len(captions(read("captions_val2014.json"))) == 15


def test_coco_takes_the_pictures_from_the_folder_that_is_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "elsewhere/val2014")
    assert set(outcome(read(path))) == {"- missing picture"}
    for folder in ("elsewhere", "elsewhere/val2014"):
        assert len(captions(read(path, ReadOptions(images=str(tmp_path / folder))))) == 15


def test_coco_names_say_in_which_folder_a_picture_lies(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", "images/val2014")
    for named in ("./", "val2014/", "./images/val2014/"):
        value = coco()
        for image in value["images"]:
            image["file_name"] = named + image["file_name"]
        write(Path(path), as_json(value))
        for images in ("", "coco", "coco/images", "coco/images/val2014"):
            options = ReadOptions(images=str(tmp_path / images) if images else None)
            records = read(path, options)
            assert len(captions(records)) == 15, (named, images)
            assert {record.picture.data for record in records} == {picture(n) for n in range(3)}


def test_the_order_of_cocos_lists_does_not_matter(tmp_path: Path) -> None:
    value = coco()
    path = write_coco(tmp_path, "val2014", value)
    before = read(path)
    write(Path(path), as_json(dict(reversed(value.items()))))
    assert read(path) == before
    write(Path(path), b"\xef\xbb\xbf" + as_json(value))
    assert read(path) == before


def test_a_coco_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = Path(write_coco(tmp_path, "val2014", coco(2, 1)))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"captions_val2014\.json"):
            caption_units([str(path)], OPTIONS)


def test_json_of_another_shape_is_refused(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}]
    for value in (
        [],
        {"images": [], "annotations": []},
        {"annotations": [{"image_id": 1, "caption": "a"}]},
        {"images": images, "annotations": {"a": 1}},
        {"images": images, "annotations": [{"bbox": []}]},
        {"images": images, "annotations": ["a"]},
    ):
        path = write(tmp_path / "captions_val2014.json", as_json(value))
        with pytest.raises(ValueError, match=r"captions_val2014\.json"):
            caption_units([path], OPTIONS)


def test_bad_annotations_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ({"image_id": 99, "caption": "a"}, "missing picture"),
        ({"caption": "a"}, "missing picture"),
        ({"image_id": [1], "caption": "a"}, "missing picture"),
        ({"image_id": 0}, "no caption"),
        ({"image_id": 0, "caption": []}, "no caption"),
        ({"image_id": 0, "caption": " \n"}, "empty caption"),
        ("a", "no caption"),
        ({"image_id": 7, "caption": "a"}, "no picture"),
        ({"image_id": 8, "caption": "a"}, "picture outside the folder"),
    ]
    value = coco(2, 1)
    path = write_coco(tmp_path, "val2014", value)
    value["annotations"][1:1] = [annotation for annotation, _ in bad]
    outside = {"id": 8, "file_name": "../annotations/captions_val2014.json"}
    value["images"] += [{"id": 7}, outside, 5]
    write(Path(path), as_json(value))
    reasons = [f"- {reason}" for _, reason in bad]
    assert outcome(read(path)) == ["picture 0, caption 0", *reasons, "picture 1, caption 0"]


# CSV and imagefolder.


def csv_bytes(rows: Sequence[Sequence[str]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    return stream.getvalue().encode()


ROWS = [
    ["0.jpg", "A dog, running"],
    ["0.jpg", 'A man says "hello"'],
    ["1.jpg", "two\nlines"],
    ["2.jpg", "café 日本"],
]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("captions.txt", "images"), ("captions.csv", "Images"), ("captions.csv", ".")],
)
def test_a_csv_gives_its_captions_with_the_pictures_beside_it(
    tmp_path: Path, name: str, folder: str
) -> None:
    for number in range(3):
        write(tmp_path / folder / f"{number}.jpg", picture(number))
    path = write(tmp_path / name, csv_bytes([["image", "caption"], *ROWS]))
    for source in (path, str(tmp_path)):
        records = read(source)
        assert captions(records) == [caption for _, caption in ROWS]
        for record, (shown, _) in zip(records, ROWS, strict=True):
            assert isinstance(record, CaptionRecord)
            assert record.picture.data == picture(int(shown[0]))
            assert record.picture.offset == 0
            assert Path(record.picture.file).samefile(tmp_path / folder / shown)
    assert [record.where for record in records] == [f"{path}, record {n}" for n in range(4)]


CSV_ROWS: list[tuple[bytes, list[str]]] = [
    (b"\xef\xbb\xbfimage,caption\r\n0.jpg,a\r\n\r\n0.jpg,b\r\n", ["a", "b"]),
    (b"id,caption,group,image\n7,a,g,0.jpg\n", ["a"]),
    (b'"image","caption"\n"0.jpg","a"', ["a"]),
    (b"image, caption\n0.jpg, a \n", ["a"]),
    (b"file_name,text\n0.jpg,a\n", ["a"]),
    (b'image,caption\n0.jpg,a 5" nail\n', ['a 5" nail']),
    (b"image,caption\n0.jpg,a\n0.jpg,\n0.jpg,b\n", ["a", "- empty caption", "b"]),
    (b"image,caption\n0.jpg,caf\xe9\n0.jpg,b\n", ["- caption not UTF-8", "b"]),
    (b"image,caption\n0.jpg,a, b\n0.jpg\n", ["- wrong number of columns"] * 2),
    (b"image,caption\n,a\n", ["- no picture"]),
    (b"image,caption\nnone.jpg,a\n", ["- missing picture"]),
    (b'image,caption\n0.jpg,"[""one"", ""two""]"\n', ["one", "two"]),
    (b'image\tcaption\n0.jpg\ta dog, "running"\n', ['a dog, "running"']),
    (b'image|caption\n0.jpg|a dog, "running"\n', ['a dog, "running"']),
    (b'image;caption\n0.jpg;a dog, "running"\n', ['a dog, "running"']),
    (b'image, caption\n0.jpg, "a dog, ""running"""\n', ['a dog, "running"']),
    (b'filepath\ttext\n0.jpg\ta dog, "running"\n', ['a dog, "running"']),
    (b"image,caption\r0.jpg,a\r0.jpg,b\r", ["a", "b"]),
    (b"Image,Caption\n0.jpg,a\n0.jpg,b\n", ["a", "b"]),
]


def test_rows_of_a_csv(tmp_path: Path) -> None:
    write(tmp_path / "0.jpg", picture(0))
    for data, expected in CSV_ROWS:
        assert outcome(read(write(tmp_path / "captions.csv", data))) == expected, data
    # The folder of the pictures may be named, or not.
    write(tmp_path / "named/images/1.jpg", picture(1))
    data = b"image,caption\nimages/1.jpg,named\n1.jpg,bare\n"
    assert outcome(read(write(tmp_path / "named/captions.csv", data))) == ["named", "bare"]


def test_a_csv_of_any_name_in_a_folder_is_told_by_its_columns(tmp_path: Path) -> None:
    write(tmp_path / "0.jpg", picture(0))
    write(tmp_path / "notes.csv", b"who,what\nme,nothing\n")
    with pytest.raises(
        ValueError, match=r"holds no captions; if one of .*notes\.csv has them, name"
    ):
        read(str(tmp_path))
    labels = write(tmp_path / "labels.csv", b"filename,caption\n0.jpg,a\n")
    assert captions(read(str(tmp_path))) == ["a"]
    write(tmp_path / "labels.csv", b"filename,said\n0.jpg,a\n")
    with pytest.raises(ValueError, match=rf"{labels} has the columns .*'said'.*--text-key names"):
        read(str(tmp_path))


def test_another_column_is_read_where_it_is_named(tmp_path: Path) -> None:
    write(tmp_path / "0.jpg", picture(0))
    path = write(tmp_path / "captions.csv", b"image,caption,short\n0.jpg,long,brief\n")
    assert captions(read(path)) == ["long"]
    assert captions(read(path, ReadOptions(text_key="short"))) == ["brief"]
    with pytest.raises(ValueError, match=r"captions\.csv has the columns .* needs image and title"):
        read(path, ReadOptions(text_key="title"))


def test_an_imagefolder_is_read_from_metadata_jsonl_and_csv(tmp_path: Path) -> None:
    found = [{"file_name": f"train/{n}.png", "text": f"caption {n}", "n": n} for n in range(4)]
    for number in range(4):
        write(tmp_path / f"train/{number}.png", picture(number))
    # Names start at the metadata's own folder, even if there is one called images.
    write(tmp_path / "images" / "0.png", b"another")
    path = write(tmp_path / "metadata.jsonl", as_lines(found) + b"\n")
    expected = [(f"caption {n}", picture(n)) for n in range(4)]
    for source in (path, str(tmp_path)):
        records = [r for r in read(source) if isinstance(r, CaptionRecord)]
        assert [(r.caption, r.picture.data) for r in records] == expected
        assert records[3].where == f"{path}, record 3"
    Path(path).unlink()
    rows = [["file_name", "text"], *[[r["file_name"], r["text"]] for r in found]]
    write(tmp_path / "metadata.csv", csv_bytes(rows))
    records = [r for r in read(str(tmp_path)) if isinstance(r, CaptionRecord)]
    assert [(r.caption, r.picture.data) for r in records] == expected


LINES: list[tuple[bytes, str]] = [
    (b'{"file_name": "0.png", "caption": " a "}', "a"),
    (b'{"file_name": "0.png", "text": "a", "caption": "b"}', "a"),
    (b'{"file_name": "0.png"}', "- no caption"),
    (b'{"file_name": "0.png", "text": {}}', "- no caption"),
    (b'{"file_name": "0.png", "text": ""}', "- empty caption"),
    (b'{"file_name": "0.png", "text": "caf\xe9"}', "- caption not UTF-8"),
    (b'{"file_name": "0.png", "text": "a", "owner": "caf\xe9"}', "a"),
    (b'{"file_name": "0.png", "text": "\\ud83d"}', "- caption not Unicode"),
    (b'{"file_name": "0.png", "text": "\\ud83d\\ude00"}', "\N{GRINNING FACE}"),
    (b'{"text": "a"}', "- no picture"),
    (b'{"file_name": 3, "text": "a"}', "- no picture"),
    (b'{"file_name": "none.png", "text": "a"}', "- missing picture"),
    (b'{"file_name": "zero.png", "text": "a"}', "- zero-byte picture"),
    (b'{"file_name": "large.png", "text": "a"}', "- picture too large"),
    (b'{"file_name": "folder", "text": "a"}', "- missing picture"),
    (b'{"file_name": "0.png/1.png", "text": "a"}', "- missing picture"),
    (b'{"file_name": "' + b"n" * 5000 + b'", "text": "a"}', "- missing picture"),
    (b'{"file_name": "../up.png", "text": "a"}', "- picture outside the folder"),
    (b'{"file_name": "a/../../up.png", "text": "a"}', "- picture outside the folder"),
    (b'{"file_name": "/etc/passwd", "text": "a"}', "- picture outside the folder"),
    (b'{"file_name": "link.png", "text": "a"}', "a"),
    (b'{"file_name": "round.png", "text": "a"}', "- missing picture"),
    (b'{"file_name": "file:///etc/passwd", "text": "a"}', "- picture outside the folder"),
    (b'{"file_name": "a\\u0000.png", "text": "a"}', "- picture outside the folder"),
    (b'{"file_name": "\\ud800.png", "text": "a"}', "- picture outside the folder"),
    (b'{"file_name": "0.png", "text": "a"', "- metadata not JSON"),
    (b'["0.png", "a"]', "- metadata not JSON"),
    (b"[" * 100_000, "- metadata not JSON"),
    (b'{"file_name": "0.png", "text": "fine"}', "fine"),
]


def test_lines_of_an_imagefolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_pictures, "LARGEST_BYTES", 10_000)
    folder = tmp_path / "set"
    write(tmp_path / "up.png", picture(1))
    write(folder / "0.png", picture(0))
    write(folder / "zero.png", b"")
    write(folder / "large.png", b"x" * 10_001)
    (folder / "folder").mkdir()
    (folder / "link.png").symlink_to(tmp_path / "up.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    write(folder / "metadata.jsonl", b"\n".join(line for line, _ in LINES))
    records = read(str(folder))
    assert outcome(records) == [expected for _, expected in LINES]
    places = [f"{folder}/metadata.jsonl, record {number}" for number in range(len(LINES))]
    assert [record.where for record in records] == places


# All formats.


def test_a_caption_of_200_000_characters_is_read_as_it_is(tmp_path: Path) -> None:
    # More than Python's csv takes for a field by itself.
    caption = ("ä word, " * 25_000)[:-1] + "."
    write(tmp_path / "0.jpg", picture(0))
    data = csv_bytes([["image", "caption"], ["0.jpg", caption]])
    assert captions(read(write(tmp_path / "captions.csv", data))) == [caption]


def many_coco(folder: Path, count: int) -> str:
    return write_coco(folder, "val2014", coco(count, 1))


def many_csv(folder: Path, count: int) -> str:
    for number in range(count):
        write(folder / f"{number}.jpg", picture(number))
    rows = [[f"{number}.jpg", f"line\n{number}"] for number in range(count)]
    return write(folder / "captions.csv", csv_bytes([["image", "caption"], *rows]))


def many_imagefolder(folder: Path, count: int) -> str:
    for number in range(count):
        write(folder / f"{number}.jpg", picture(number))
    records = [{"file_name": f"{n}.jpg", "text": f"caption {n}"} for n in range(count)]
    return write(folder / "metadata.jsonl", as_lines(records))


@pytest.mark.parametrize("count", [1, 7, 8, 21])
@pytest.mark.parametrize("make", [many_coco, many_csv, many_imagefolder])
def test_units_cut_a_file_into_its_records_without_loss_or_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, int], str], count: int
) -> None:
    path = make(tmp_path, count)
    whole = read(path)
    assert [record.where for record in whole] == [f"{path}, record {n}" for n in range(count)]
    assert len(captions(whole)) == count
    monkeypatch.setattr(read_captions, "NUM_UNIT_RECORDS", 7)
    units = caption_units([path], OPTIONS)
    assert len(units) == -(-count // 7)
    assert read(path) == whole
    sizes = [len(list(read_captions.read_captions(u, OPTIONS))) for u in units]
    assert max(sizes) <= 7


@pytest.fixture
def everything(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of the formats whose other tests are of local files, and a URL that holds them."""
    write_coco(tmp_path / "coco", "val2014")
    split = [{"filename": "0.png", "split": "train", "sentences": [{"raw": "a"}, {"raw": "b"}]}]
    write(tmp_path / "karpathy/dataset_flickr8k.json", as_json({"images": split}))
    write(tmp_path / "karpathy/images/0.png", picture(0))
    many_csv(tmp_path / "csv", 3)
    many_imagefolder(tmp_path / "imagefolder", 3)
    bad = as_lines(
        [{"file_name": n, "text": "a"} for n in ("none.jpg", "../csv/0.jpg", "zero.jpg")]
    )
    write(tmp_path / "bad/metadata.jsonl", bad)
    write(tmp_path / "bad/zero.jpg", b"")
    system = fsspec.filesystem("memory")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            name = f"/captions/{file.relative_to(tmp_path).as_posix()}"
            system.pipe_file(name, file.read_bytes())
    yield tmp_path, "memory://captions"
    system.rm("/captions", recursive=True)


def test_urls_are_read_like_folders(everything: tuple[Path, str]) -> None:
    folder, url = everything
    for source in ("coco/annotations", "karpathy", "csv", "imagefolder", "bad"):
        local, remote = read(f"{folder}/{source}"), read(f"{url}/{source}")
        assert outcome(remote) == outcome(local)
        places = [r.where.replace("memory:///", "memory://") for r in remote]
        assert places == [r.where.replace(str(folder), url) for r in local]
        for here, there in zip(local, remote, strict=True):
            if isinstance(here, CaptionRecord) and isinstance(there, CaptionRecord):
                shown = there.picture
                assert shown.data == here.picture.data
                assert read_range(shown.file, shown.offset, len(shown.data)) == shown.data
    bad = ["- missing picture", "- picture outside the folder", "- zero-byte picture"]
    assert outcome(read(f"{url}/bad")) == bad


def test_synthetic_captions_are_refused_where_the_format_has_none(tmp_path: Path) -> None:
    for make in (many_coco, many_csv, many_imagefolder):
        path = make(tmp_path / make.__name__, 1)
        with pytest.raises(ValueError, match="has no synthetic captions"):
            caption_units([path], ReadOptions(require="synthetic"))
