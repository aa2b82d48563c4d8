"""Documents of texts and pictures: OBELICS, MMC4, MINT-1T, NeMo Curator; what is lost of them."""

import base64
import gzip
import io
import json
import os
import zipfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from made_inputs import OPTIONS, Put, as_json, as_lines, as_parquet
from PIL import Image

from inputs import png, tar
from midstream.data.formats.document_parts import document_of
from midstream.data.formats.picture_files import INDEX, PicturesByUrl, index_urls
from midstream.data.formats.read_documents import document_units, read_documents
from midstream.data.formats.records import DocumentRecord, Picture, ReadOptions
from midstream.data.images import decode
from midstream.data.shard_state import unread_files
from midstream.data.source_writer import Reject, or_reject

MARK = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
A, B, C = "https://a.example/a.jpg", "https://b.example/b.png?x=1", "https://c.example/c.png"


def read(*sources: str, options: ReadOptions = OPTIONS) -> list[Any]:
    units = document_units(sources, options)
    return [item for unit in units for item in read_documents(unit, options)]


def shown(item: Any) -> Any:
    """A document's texts and the number of each picture's bytes in its place, or its reason."""
    if isinstance(item, Reject):
        return f"- {item.reason}"
    return [part if isinstance(part, str) else numbered(part.data) for part in item.joined]


def numbered(data: bytes) -> int | bytes:
    return next((n for n in range(9) if png(n) == data), data)


def obelics(*places: Any, **others: Any) -> dict[str, Any]:
    """A row of OBELICS: a text or, as a tuple, a picture's address at each place."""
    images = [place[0] if isinstance(place, tuple) else None for place in places]
    texts = [None if isinstance(place, tuple) else place for place in places]
    told = [None if x is None else {"src": x, "document_url": "d", "alt_text": "t"} for x in images]
    general = {"url": "https://d.example", "warc_filename": "w", "warc_record_offset": 3}
    row = {"images": images, "metadata": json.dumps(told), "texts": texts}
    return row | {"general_metadata": json.dumps(general)} | others


def img2dataset(folder: Path, pictures: dict[str, int], name: str = "00000.tar") -> str:
    """A folder as img2dataset leaves it: a tar of .jpg, .json and .txt; C was not fetched."""
    members = {}
    for number, (url, picture) in enumerate(pictures.items()):
        key = f"{number:09d}"
        members[f"{key}.jpg"] = png(picture)
        members[f"{key}.json"] = json.dumps({"url": url, "key": key, "status": "success"}).encode()
        members[f"{key}.txt"] = b"alt"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(tar(members))
    (folder / "00000.parquet").write_bytes(as_parquet([{"url": C, "status": "failed_to_download"}]))
    (folder / "00000_stats.json").write_text("{}")
    return str(folder)


# OBELICS, and pictures by their addresses.


def test_obelics_is_read_with_the_pictures_that_img2dataset_fetched(
    put: Put, tmp_path: Path
) -> None:
    rows = [
        obelics("One.", (A,), "Two.", "Three.", (B,)),
        obelics((A,), "Twice.", (A,)),
        obelics((C,), "Gone.", (B,), "Left.", metadata="[{broken", general_metadata="no JSON"),
        obelics((C,), "All gone."),
    ]
    source = put("data/train-00000-of-00001.parquet", as_parquet(rows))
    images = img2dataset(tmp_path / "fetched", {A: 0, B: 1})
    found = read(source, options=replace(OPTIONS, images=images))
    assert [shown(item) for item in found] == [
        ["One.", 0, "Two.\n\nThree.", 1],
        [0, "Twice.", 0],
        ["Gone.", 1, "Left."],
        "- missing picture",
    ]
    assert found[0].where == f"{source}, row 0"
    assert [item.left_out for item in found[:3]] == [(), (), ("missing picture",)]
    # What is stamped, so that the shard is made anew when more is fetched, is named first, also
    # where no picture is there yet.
    assert found[3].detail.startswith(f"{images}/{INDEX} has no {C}")
    (tmp_path / "empty").mkdir()
    none = read(source, options=replace(OPTIONS, images=str(tmp_path / "empty")))
    assert none[3].detail.startswith(f"{tmp_path}/empty/{INDEX} has no {C}")
    assert found[2].lost == (replace(found[3], where=found[2].where),)
    for picture in found[0].pictures:
        held = Path(picture.file).read_bytes()
        assert held[picture.offset : picture.offset + len(picture.data)] == picture.data
    assert "--images" in read(source)[0].detail


def test_the_mark_of_a_documents_end_parts_it_wherever_it_stands(put: Put) -> None:
    for name in ("a.png", "b.png"):
        put(name, png(int(name == "b.png")))
    a, b = ("a.png",), ("b.png",)
    rows = [
        obelics("One.", a, f"Two.\n\n{MARK}\n\nThree.", b),
        obelics(a, f"End. {MARK}"),
        obelics(MARK, b, "Behind."),
        obelics(a, f"x{MARK}y{MARK}z", b),
    ]
    found = read(put("a.parquet", as_parquet(rows)))
    assert [shown(item) for item in found] == [
        *(["One.", 0, "Two."], ["Three.", 1]),
        [0, "End."],
        [1, "Behind."],
        *([0, "x"], "- no picture", ["z", 1]),
    ]
    places = [item.where.partition("row ")[2] for item in found]
    assert places[:3] == ["0, document 0", "0, document 1", "1"]
    # What is left out of a record is counted with its first document that is none of the rejects.
    (first, second) = read(put("a.parquet", as_parquet([obelics(" ", f"Text.{MARK}", a, "One.")])))
    assert (shown(first), shown(second)) == ("- no picture", [0, "One."])
    assert second.left_out == ("place without text or picture",)


def test_places_that_are_not_of_one_text_or_one_picture_are_named(put: Put) -> None:
    put("a.png", png(0))
    rows = [
        {"texts": ["a", None], "images": ["a.png"]},
        {"texts": ["a", "b"], "images": ["a.png", None]},
        {"texts": ["a", None, " ", None], "images": [None, None, None, "a.png"]},
        {"texts": [None, None], "images": ["a.png", "a.png"]},
        {"texts": ["alone"], "images": [None]},
        {"texts": [], "images": []},
        {"texts": [{"user": "What?"}], "images": ["a.png"]},
        {"texts": "a", "images": ["a.png"]},
        {"text": "a"},
        {"texts": ["half \ud83d", None], "images": [None, "a.png"]},
        {"texts": ["a", None], "images": [None, "../a.png"]},
        {"texts": ["a", None], "images": [None, 7]},
    ]
    found = read(put("a.jsonl", as_lines(rows)))
    assert [shown(item) for item in found] == [
        *["- texts and pictures disagree"] * 2,
        ["a", 0],
        "- pictures without a text",
        *["- no picture"] * 2,
        *["- not a document"] * 3,
        "- not Unicode",
        "- picture outside the folder",
        "- no picture",
    ]
    assert found[2].left_out == ("place without text or picture",) * 2
    assert found[1].detail == "a text and a picture at place 0"


def test_what_goes_with_a_lost_picture_is_as_it_is_asked_and_counted(put: Put) -> None:
    put("a.png", png(0))
    put("zero.png", b"")
    gone, zero, a = ("gone.png",), ("zero.png",), ("a.png",)
    rows = [
        obelics("1", a, "2", gone, "3", "4", a, "5"),
        obelics("1", gone, zero, "2", a, "3"),
        obelics("1", a, "2"),
        obelics("1", zero, "2"),
    ]
    path = put("a.parquet", as_parquet(rows))
    missing, empty = "missing picture", "zero-byte picture"
    beside = ("text beside a lost picture",) * 2
    expected: dict[Any, list[Any]] = {
        "picture": [
            (["1", 0, "2\n\n3\n\n4", 0, "5"], (missing,)),
            (["1\n\n2", 0, "3"], (missing, empty)),
        ],
        "text": [
            (["1", 0, "4", 0, "5"], (missing, *beside)),
            ([0, "3"], (missing, empty, *beside)),
        ],
        "document": [f"- {missing}", f"- {missing}"],
    }
    for lost, first in expected.items():
        found = read(path, options=replace(OPTIONS, lost=lost))
        told = [
            (shown(x), x.left_out) if isinstance(x, DocumentRecord) else shown(x) for x in found
        ]
        assert told == [*first, (["1", 0, "2"], ()), f"- {empty}"]


def test_a_document_is_made_again_without_what_cannot_be_decoded() -> None:
    parts = ["1", Picture("", 0, b"x"), "2", Reject("here", "picture cannot be decoded")]
    found = document_of("here", parts, OPTIONS, ("missing picture",))
    assert isinstance(found, DocumentRecord)
    assert found.texts == ("1", "2")
    assert found.left_out == ("missing picture", "picture cannot be decoded")


# MMC4.


def mmc4(texts: Sequence[str], *matched: tuple[str, int, float], **others: Any) -> dict[str, Any]:
    infos = [
        {
            **{"face_detections": None, "image_name": f"{url}.png", "raw_url": f"https://x/{url}"},
            **{"matched_sim": likeness, "matched_text_index": place},
        }
        for url, place, likeness in matched
    ]
    matrix = [[likeness] * len(texts) for _, _, likeness in matched]
    return {
        **{"image_info": infos, "similarity_matrix": matrix, "text_list": list(texts)},
        **{"url": "http://d.example", "could_have_url_duplicate": 0, **others},
    }


@pytest.mark.parametrize("packed", ["jsonl", "jsonl.gz", "jsonl.zip", "json"])
def test_mmc4_puts_pictures_before_the_texts_that_they_match(put: Put, packed: str) -> None:
    for number in range(3):
        put(f"{number}.png", png(number))
    records = [
        mmc4(["One.", "Two.", "Three."], ("1", 2, 0.3), ("0", 1, 0.2), ("2", 1, 0.25)),
        mmc4(["One.", "Two."], ("0", 0, 0.3), ("gone", 1, 0.3)),
        mmc4(["One."], ("0", 1, 0.3)),
        mmc4(["One."], ("0", None, 0.3)),  # type: ignore[arg-type]
        mmc4(["One."]),
    ]
    name, lines = f"docs_no_face_shard_0_v2.{packed}", as_lines(records)
    if packed == "jsonl.zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("docs_no_face_shard_0_v2.jsonl", lines)
        lines = stream.getvalue()
    data = {"jsonl.gz": gzip.compress(lines), "json": as_json(records)}.get(packed, lines)
    path = put(name, data)
    expected = [
        ["One.", 0, 2, "Two.", 1, "Three."],
        [0, "One. Two."],
        *["- texts and pictures disagree"] * 2,
        "- no picture",
    ]
    assert unread_files("documents", [put("", b"")], document_units([path], OPTIONS)) == []
    for source in (path, put("", b"")):
        assert [shown(item) for item in read(source)] == expected


def test_mmc4_takes_pictures_that_are_like_their_text_alone(put: Put, tmp_path: Path) -> None:
    put("in/0.png", png(0))
    put("in/1.png", png(1))
    records = [
        mmc4(["One.", "Two."], ("0", 0, 0.3), ("1", 1, 0.2)),
        mmc4(["One.", "Two."], ("0", 0, 0.1), ("1", 1, 0.2)),
        mmc4(["One.", "Two."], ("0", 0, None), ("1", 1, 0.3), similarity_matrix=[[0.4, 0]]),
        mmc4(["One."], ("0", 0, None), similarity_matrix="none"),
        mmc4(["One."], ("0", 0, 10**400)),
    ]
    path = put("in/a.jsonl", as_lines(records))
    found = read(path, options=replace(OPTIONS, similarity=0.25))
    assert [shown(item) for item in found] == [
        [0, "One. Two."],
        "- no picture",
        [0, "One.", 1, "Two."],
        *["- no picture"] * 2,
    ]
    assert found[0].left_out == ("similarity too low",)
    assert found[1].detail == "similarity too low"
    images = img2dataset(tmp_path / "fetched", {"https://x/0": 5, "https://x/1": 6})
    by_url = read(path, options=replace(OPTIONS, images=images))
    assert shown(by_url[0]) == [5, "One.", 6, "Two."]


# MINT-1T.


def tiff(numbers: Sequence[int]) -> bytes:
    frames = [Image.open(io.BytesIO(png(number))).convert("RGB") for number in numbers]
    stream = io.BytesIO()
    frames[0].save(stream, "TIFF", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    return stream.getvalue()


def broken_frame(data: bytes, number: int) -> bytes:
    """The same with the compressed pixels of one frame spoilt."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.seek(number)
        first, size = picture.tag_v2[273][0], picture.tag_v2[279][0]  # type: ignore[attr-defined]
    return data[:first] + b"\xff" * size + data[first + size :]


def pdf(*places: Any) -> bytes:
    images = [f"page_{n}_image_{n}" if place is None else None for n, place in enumerate(places)]
    told = [{"page": 0, "width": 1, "height": 1, "xref": 8, "sha256": "0"} for x in images if x]
    return json.dumps(
        {"pdf_name": "a.pdf", "url": "u", "texts": list(places), "images": images}
        | {"image_metadata": told, "language_id_whole_page_fasttext": {"en": 0.9}}
    ).encode()


def pixels(picture: Picture) -> bytes:
    return decode(picture.data, "here").tobytes()


def test_mint_gives_the_frames_of_a_tiff_in_their_places(put: Put) -> None:
    thirty = tiff([n % 9 for n in range(30)])
    many = [x for n in range(30) for x in (f"Text {n}.", None)]
    members = {
        **{"a.json": pdf("One.", None, "Two.", None), "a.tiff": tiff([3, 4])},
        **{"b.json": pdf(None, "Alone."), "b.tiff": tiff([5])},
        **{"c.json": pdf(*many), "c.tiff": broken_frame(thirty, 17)},
        **{"d.json": pdf("One.", None), "d.tiff": tiff([1, 2])},
        **{"e.json": pdf("One.", None, None), "e.tiff": tiff([1])},
        **{"f.json": pdf("One.", None), "f.tiff": thirty[:100]},
        **{"g.tiff": tiff([1]), "h.json": b"[1]"},
    }
    path = put("CC-MAIN-20230527-00000.tar", tar(members))
    found = read(path)
    assert [type(item) for item in found[:3]] == [DocumentRecord] * 3
    assert [pixels(x) for x in found[0].pictures] == [
        pixels(Picture("", 0, png(n))) for n in (3, 4)
    ]
    assert [isinstance(part, str) for part in found[0].joined] == [True, False, True, False]
    # A picture alone in its TIFF stays where it is.
    assert (found[1].pictures[0].file, found[1].pictures[0].data) == (path, tiff([5]))
    assert len(found[2].pictures) == 29
    assert found[2].left_out == ("picture cannot be decoded",)
    expected = [png(n % 9) for n in range(30) if n != 17]
    assert [pixels(x) for x in found[2].pictures] == [pixels(Picture("", 0, x)) for x in expected]
    assert "Text 17.\n\nText 18." in found[2].texts
    assert shown(found[3]) == "- texts and pictures disagree"
    assert (len(found[4].pictures), found[4].left_out) == (1, ("picture cannot be decoded",))
    reasons = ["- picture cannot be decoded", "- not a document", "- not a JSON object"]
    assert [shown(item) for item in found[5:]] == reasons
    assert "frame 0" in found[5].detail


def test_members_of_a_sample_are_its_pictures_by_their_names(put: Put) -> None:
    record = {"texts": ["One.", None, None], "images": [None, "a.1.png", "0.png"]}
    held = base64.b64encode(png(6)).decode()
    infos = [{"matched_text_index": 0, "image_base64": held}]
    infos += [{"matched_text_index": 0, "image_name": "b.jpg"}]
    other = {"text_list": ["One."], "image_info": infos}
    members = {"a.json": json.dumps(record).encode(), "a.0.png": png(4), "a.1.png": png(5)}
    members |= {"b.json": json.dumps(other).encode(), "b.jpg": png(7)}
    path = put("a.tar", tar(members))
    one, two = read(path)
    assert shown(one) == ["One.", 5, 4]
    assert {picture.file for picture in one.pictures} == {path}
    assert shown(two) == [6, 7, "One."]


def test_pictures_in_a_table_stand_among_its_texts(put: Put) -> None:
    images = [{"bytes": png(1), "path": None}, {"bytes": None, "path": None}, None]
    rows = [{"texts": [None, "One.", "Two."], "images": images}]
    (found,) = read(put("a.parquet", as_parquet(rows)))
    assert shown(found) == [1, "One.\n\nTwo."]
    assert found.left_out == ()


# NeMo Curator.


def rows_of(sample: str, *parts: Any) -> list[dict[str, Any]]:
    rows = [{"position": -1, "modality": "metadata", "content_type": "application/json"}]
    for number, part in enumerate(parts):
        row: dict[str, Any] = {"position": number, "modality": "text", "text_content": part}
        if isinstance(part, bytes):
            row = {"position": number, "modality": "image", "binary_content": part}
        elif isinstance(part, dict):
            row = {"position": number, "modality": "image", "source_ref": json.dumps(part)}
        rows.append(row | {"content_type": "text/plain"})
    return [{"sample_id": sample, **row} for row in rows]


def table_of_rows(rows: Sequence[dict[str, Any]]) -> bytes:
    columns = ("sample_id", "position", "modality", "content_type", "text_content")
    columns += ("binary_content", "source_ref", "materialize_error")
    return as_parquet([{key: row.get(key) for key in columns} for row in rows])


def reference(path: str, *place: Any) -> dict[str, Any]:
    keys = ("member", "byte_offset", "byte_size", "frame_index")
    return {"path": path} | dict(zip(keys, (*place, *[None] * 4), strict=False))


def test_the_rows_of_nemo_curator_are_put_in_their_order(put: Put) -> None:
    put("b.png", png(1))
    archive = tar({"x.png": png(2), "x.tiff": tiff([3, 4])})
    first, frames = archive.index(png(2)), archive.index(tiff([3, 4]))
    put("x.tar", archive)
    in_range = reference("x.tar", "x.png", first, len(png(2)))
    frame = reference("x.tar", "x.tiff", frames, len(tiff([3, 4])), 1)
    rows = [
        *reversed(rows_of("a", "One.", png(0), reference("b.png"), "Two.", in_range, frame)),
        *rows_of("b", "One.", {"member": "x"}, png(0), reference("x.tar", "x.png")),
        *rows_of("c", "One.", reference("gone.png"), reference("/etc/passwd"), png(0)),
        *rows_of("d", "One."),
        *(row | {"position": min(row["position"], 0)} for row in rows_of("e", "One.", png(0))),
        *rows_of("f", "One.", " ", png(0)),
        {"sample_id": "f", "position": 9, "modality": "audio"},
        *rows_of("a", "One.", png(0)),
    ]
    path = put("rows.parquet", table_of_rows(rows))
    found = read(path)
    assert shown(found[0])[:5] == ["One.", 0, 1, "Two.", 2]
    assert pixels(found[0].pictures[-1]) == pixels(Picture("", 0, png(4)))
    assert found[0].where == f"{path}, sample a"
    assert (shown(found[1]), found[1].left_out) == (["One.", 0], ("missing picture",) * 2)
    outside = "picture outside the folder"
    assert (shown(found[2]), found[2].left_out) == (["One.", 0], ("missing picture", outside))
    assert [shown(item) for item in found[3:]] == [
        "- no picture",
        "- texts and pictures disagree",
        ["One.", 0],
        "- sample in two places",
    ]
    assert found[5].left_out == ("place without text or picture", "other modality")


def test_rows_of_the_wrong_types_and_places_are_rejects_one_by_one(put: Put) -> None:
    put("folder/a.png", png(0))
    places = [
        *(reference(name, None, 0, 4) for name in ("folder", "folder/a.png/b", "n" * 5000)),
        *(reference("folder/a.png", None, first, 4) for first in (-4, 2**70)),
    ]
    rows = [
        *(row for n, place in enumerate(places) for row in rows_of(f"{n}", "One.", place)),
        *rows_of("last", "One.", reference("folder/a.png", None, 0, len(png(0)))),
    ]
    path = put("rows.parquet", table_of_rows(rows))
    assert [shown(item) for item in read(path)] == ["- missing picture"] * 5 + [["One.", 0]]
    # Texts that are numbers, pictures that are lists, and names of samples that are no UTF-8.
    rows = [
        {"sample_id": key, "position": n, "modality": kind, "binary_content": None}
        for key in ("a", "b")
        for n, kind in enumerate(("text", "image"))
    ]
    numbers = [row | {"text_content": 5} for row in rows]
    lists = [row | {"text_content": "One.", "binary_content": [1]} for row in rows]
    for held, reason in ((numbers, "not a document"), (lists, "no picture")):
        found = read(put("rows.parquet", as_parquet(held)))
        assert [shown(item) for item in found] == [f"- {reason}"] * 2
    names = pyarrow.array([b"\xff", b"\xff", b"b", b"b"]).view(pyarrow.string())
    held = [row | {"text_content": "One.", "binary_content": png(0)} for row in rows]
    columns = pyarrow.Table.from_pylist(held).set_column(0, "sample_id", names)
    found = read(put("rows.parquet", as_parquet(columns)))
    assert [shown(item) for item in found] == ["- not UTF-8", ["One.", 0]]
    assert found[0].where == f"{path}, sample \\xff"


# Files, and the index of addresses.


def test_files_of_no_document_are_refused_by_name(put: Put) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet has the columns \['text'\].*OBELICS.*MMC4"):
        read(put("a.parquet", as_parquet([{"text": "a"}])))
    with pytest.raises(ValueError, match=r"a\.csv is of no known format of documents"):
        read(put("a.csv", b"a,b"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(f"{put('', b'')}/nothing")


def looked_up(folder: Path, *urls: str) -> list[Any]:
    """The number of the picture of each address, or why there is none."""
    index_urls(str(folder))
    with closing(PicturesByUrl(str(folder))) as pictures:
        found = [or_reject("here", pictures.load, url, "here") for url in urls]
    return [numbered(x.data) if isinstance(x, Picture) else x.reason for x in found]


def test_the_index_of_addresses_is_written_once_and_anew_for_other_tars(tmp_path: Path) -> None:
    folder, missing = tmp_path / "fetched", "missing picture"
    img2dataset(folder, {A: 0, B: 1})
    index_urls(str(folder))
    written = (folder / INDEX).stat()
    index_urls(str(folder))
    assert (folder / INDEX).stat().st_mtime_ns == written.st_mtime_ns
    # The first of two pictures of one address stands.
    img2dataset(folder, {C: 2, A: 3}, "00001.tar")
    assert looked_up(folder, A, B, C, f"{A}x") == [0, 1, 2, missing]
    assert sorted(os.listdir(folder))[0] == INDEX
    # The layout without tars, a picture and its .json in files.
    (folder / "00003").mkdir()
    others = [f"https://files.example/{number}" for number in (4, 5, 6)]
    for name, number in (("00003/0", 4), ("1.b", 5)):
        (folder / f"{name}.jpg").write_bytes(png(number))
        (folder / f"{name}.json").write_text(json.dumps({"url": others[number - 4]}))
    index_urls(str(folder))
    written = (folder / INDEX).stat()
    assert looked_up(folder, *others, A) == [4, 5, missing, 0]
    assert (folder / INDEX).stat().st_ino == written.st_ino
    # Fetched anew under the same names, each of as many bytes.
    (folder / "00003/0.json").write_text(json.dumps({"url": others[2]}))
    os.utime(folder / "00003/0.json", ns=(1, 1))
    assert looked_up(folder, *others) == [missing, 5, 4]
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == []


def fetched_table(folder: Path, addresses: Sequence[str], name: str = "00002.parquet") -> Path:
    """img2dataset's Parquet output, three rows a group: a picture of each address, but for one
    that was not fetched."""
    rows = [
        {"key": str(n), "status": "success", "url": url, "jpg": png(n)}
        for n, url in enumerate(addresses)
    ]
    rows.insert(1, {"key": "x", "status": "failed_to_download", "url": f"{A}gone", "jpg": None})
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(as_parquet(rows, row_group_size=3))
    return folder / name


def test_pictures_are_found_in_the_tables_of_img2dataset_by_their_addresses(
    put: Put, tmp_path: Path
) -> None:
    folder = tmp_path / "fetched"
    path = fetched_table(folder, [f"https://x/{n}" for n in range(6)])
    # What img2dataset writes beside a tar tells of no further picture.
    img2dataset(folder, {A: 7}, "00001.tar")
    (folder / "00001.parquet").write_bytes(as_parquet([{"url": B, "jpg": png(8)}]))
    asked = [f"https://x/{n}" for n in (5, 0, 1, 3)] + [A, B, f"{A}gone"]
    texts = {"texts": ["One.", *[None] * len(asked)], "images": [None, *asked]}
    options = replace(OPTIONS, images=str(folder))
    (found,) = read(put("a.jsonl", json.dumps(texts).encode()), options=options)
    assert shown(found) == ["One.", 5, 0, 1, 3, 7]
    assert found.left_out == ("missing picture",) * 2
    # No range of the table's file holds them as they are.
    assert {picture.file for picture in found.pictures} == {"", str(folder / "00001.tar")}
    fetched_table(folder, ["https://x/0"])
    shorter = pytest.raises(ValueError, match=r"00002\.parquet is shorter than when it was indexed")
    with closing(PicturesByUrl(str(folder))) as pictures, shorter:
        pictures.load("https://x/5", "here")
    path.write_bytes(b"PAR1 and nothing else")
    assert looked_up(folder, A) == [7]
    with pytest.raises(ValueError, match="may be in a damaged"):
        looked_up(folder, "https://x/5")


def test_the_index_of_a_folder_that_cannot_be_written_to_lies_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, caches = tmp_path / "fetched", tmp_path / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    img2dataset(folder, {A: 4})
    with monkeypatch.context() as locked:
        locked.setattr(os, "access", lambda *_: False)
        index_urls(str(folder))
        (place,) = (caches / "midstream").iterdir()
        first = place.stat()
        index_urls(str(folder))
        assert place.stat().st_ino == first.st_ino
        assert looked_up(folder, A) == [4]
    assert not (folder / INDEX).exists()
    # Once the folder can be written to its own index stands alone.
    assert looked_up(folder, A) == [4]
    assert not place.exists()
    with closing(PicturesByUrl(str(folder))) as pictures:
        assert pictures.file == folder / INDEX


def test_documents_of_arxiv_are_told_apart_by_their_whole_names(put: Put) -> None:
    members = {
        f"0704.000{n}.{end}": data
        for n in (1, 2)
        for end, data in (("json", pdf(f"Text {n}.", None, None)), ("tiff", tiff([n, n + 1])))
    }
    found = read(put("arXiv_src_0001_001_wds.tar", tar(members)))
    assert [[pixels(x) for x in item.pictures] for item in found] == [
        [pixels(Picture("", 0, png(n + more))) for more in (0, 1)] for n in (1, 2)
    ]
    assert [item.texts for item in found] == [("Text 1.",), ("Text 2.",)]


def test_a_damaged_tar_among_pictures_is_named_by_the_first_address_that_is_not_found(
    put: Put, tmp_path: Path
) -> None:
    folder = tmp_path / "fetched"
    img2dataset(folder, {A: 0})
    whole = (folder / "00000.tar").read_bytes()
    img2dataset(folder, {B: 1}, "00001.tar")
    put("a.png", png(2))
    options = replace(OPTIONS, images=str(folder))
    rows = [obelics("One.", (A,)), obelics("Two.", (B,)), obelics("Three.", (C,))]
    tables = [put(f"{number}.parquet", as_parquet([row])) for number, row in enumerate(rows)]
    # Cut inside a header, compressed.
    for data in (whole[: whole.index(b"000000000.json") + 100], gzip.compress(whole)):
        (folder / "00000.tar").write_bytes(data)
        assert shown(read(tables[1], options=options)[0]) == ["Two.", 1]
        for asked in (tables[0], tables[2]):
            with pytest.raises(ValueError, match=r"00000\.tar is not a whole tar file"):
                read(asked, options=options)
    (folder / "00000.tar").write_bytes(whole)
    found = read(*tables, options=options)
    assert [shown(x) for x in found] == [["One.", 0], ["Two.", 1], "- missing picture"]


def test_a_text_with_marks_shows_its_pictures_where_they_stand(put: Put) -> None:
    for number in (1, 2):
        put(f"{number}.png", png(number))
    rows = [
        {"text": "One. <image>\n<image> Two.", "images": ["1.png", "2.png"]},
        {"text": "<image>One.", "images": ["1.png", "2.png"]},
        {"text": ["One."], "images": ["1.png"]},
    ]
    expected = [["One.", 1, 2, "Two."], "- texts and pictures disagree", "- not a document"]
    assert [shown(x) for x in read(put("a.jsonl", as_lines(rows)))] == expected
    assert [shown(x) for x in read(put("b.parquet", as_parquet(rows[:2])))] == expected[:2]


def test_nan_is_nothing_and_places_may_be_whole_floats(put: Put) -> None:
    put("1.png", png(1))
    nan = float("nan")
    rows: list[dict[str, Any]] = [{"texts": [nan, "One."], "images": ["1.png", nan]}]
    for place in (1.0, 1.5):
        info = [{"image_name": "1.png", "matched_text_index": place}]
        rows.append({"text_list": ["One.", "Two."], "image_info": info})
    found = [shown(item) for item in read(put("a.jsonl", as_lines(rows)))]
    assert found == [[1, "One."], ["One.", 1, "Two."], "- texts and pictures disagree"]
