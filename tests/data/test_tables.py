"""Tables of texts, captions and conversations with pictures inside, lists of them, and splits."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from made_captions import outcome
from made_inputs import Put, as_json, as_lines, as_parquet, read_all, run
from pyarrow import ipc

from inputs import png
from midstream.data.formats.records import ReadOptions, Section
from midstream.data.sources import Source


def in_groups(table: pyarrow.Table) -> bytes:
    return as_parquet(table, row_group_size=3)


def as_stream(table: pyarrow.Table) -> bytes:
    """As `datasets` saves to disk."""
    stream = io.BytesIO()
    with ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return stream.getvalue()


def as_file(table: pyarrow.Table) -> bytes:
    stream = io.BytesIO()
    with ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return stream.getvalue()


WRITERS = [(in_groups, "parquet"), (as_stream, "arrow"), (as_file, "arrow")]
TEXTS = pyarrow.table({"text": [f"text {n}" for n in range(7)], "n": range(7)})


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_pictures_in_a_table_are_read_in_every_form(
    put: Put, write: Callable[[pyarrow.Table], bytes], suffix: str
) -> None:
    put("0.png", png(0))
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    held = [{"bytes": png(1), "path": "gone.png"}, {"bytes": None, "path": "0.png"}, None]
    column = pyarrow.array(held, struct)
    cells = {
        "image": column,
        "images": pyarrow.array([[item] for item in held], pyarrow.list_(struct)),
        "jpg": pyarrow.array([png(1), png(0), None], pyarrow.binary()),
    }
    for name, pictures in cells.items():
        table = pyarrow.table({name: pictures, "caption": ["one", "none", "lost"]})
        found = read_all("captions", put(f"{name}.{suffix}", write(table)))
        assert outcome(found) == ["one", "none", "- no picture"]
        assert [item.picture.data for item in found[:2]] == [png(1), png(0)]
        assert [bool(item.picture.file) for item in found[:2]] == [False, name != "jpg"]
    two = pyarrow.array([[held[0], held[0]], [], [held[0]]], pyarrow.list_(struct))
    captions = pyarrow.array([["a"], ["b"], ["c", "", "d"]])
    table = pyarrow.table({"images": two, "text": captions, "file_name": ["x", "y", "z"]})
    found = read_all("captions", put(f"lists.{suffix}", write(table)))
    expected = ["- more than one picture", "- no picture", "c", "- empty caption", "d"]
    assert outcome(found) == expected
    with pytest.raises(ValueError, match=r"has the columns \['images', 'text', 'file_name'\]; it"):
        read_all("captions", put(f"lists.{suffix}", write(table)), options=ReadOptions("words"))
    with pytest.raises(ValueError, match=r"lists\.\w+ is no whole (parquet|Arrow) file"):
        read_all("captions", put(f"lists.{suffix}", write(table)[:-40][:90]))


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_conversations_of_a_table_are_read_with_their_pictures(
    put: Put, write: Callable[[pyarrow.Table], bytes], suffix: str
) -> None:
    pairs = [{"user": "What?", "assistant": "A cat.", "source": "s"}]
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    picture = {"bytes": png(1), "path": None}
    rows = {
        "fine": {"images": [picture], "texts": pairs},
        "plain": {"image": picture, "conversations": turns, "id": "7", "unknown": 3},
    }
    for name, row in rows.items():
        table = pyarrow.Table.from_pylist([row, row])
        found = read_all("conversations", put(f"{name}.{suffix}", write(table)))
        assert [(x.turns[0][:2], x.picture.data) for x in found] == [
            (("What?", "A cat."), png(1))
        ] * 2
    rated = {"images": [picture, picture], "texts": pairs * 2, "formatting_ratings": [2, 4]}
    path = put(f"rated.{suffix}", write(pyarrow.Table.from_pylist([rated])))
    for rating, left_out in ((None, ()), (3, ("rated too low",))):
        (item,) = read_all("conversations", path, options=ReadOptions(rating=rating))
        assert item.left_out == left_out
        assert [turn.pictures for turn in item.turns] == [(0, 0), ()][: 2 - len(left_out)]
    with pytest.raises(ValueError, match=r"has the columns \['text', 'n'\]; a conversation needs"):
        read_all("conversations", put(f"x.{suffix}", write(TEXTS)))


def test_a_source_of_a_table_trains_without_the_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shown = [{"bytes": png(n % 3), "path": None} for n in range(9)]
    rows = [{"image": one, "text": f"picture {n}"} for n, one in enumerate(shown)]
    (tmp_path / "in/a.parquet").write_bytes(as_parquet(rows, row_group_size=4))
    run("captions", tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a.parquet").unlink()
    source = Source("s", tmp_path / "out")
    assert [source.image_bytes(n) for n in range(9)] == [png(n % 3) for n in range(9)]


def test_folders_that_datasets_saves_are_read_and_their_notes_are_not(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "data-00000-of-00001.arrow").write_bytes(as_stream(TEXTS))
    (saved / "cache-0123.arrow").write_bytes(b"x")
    for name in ("dataset_info.json", "state.json"):
        (saved / name).write_text("{}")
    found = read_all("text", str(saved))
    assert [item.text for item in found] == TEXTS["text"].to_pylist()
    whole = tmp_path / "dict"
    for split in ("train", "held_out"):
        (whole / split).mkdir(parents=True)
        (whole / split / "data-00000-of-00001.arrow").write_bytes(as_stream(TEXTS))
    (whole / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "held_out"]}))
    with pytest.raises(
        ValueError, match=r"the splits held_out, train, .*dict/held_out or .*/train"
    ):
        read_all("text", str(whole))
    assert len(read_all("text", str(whole / "train"))) == 7


def test_which_split_of_a_table_is_meant_is_asked(put: Put) -> None:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    row = {"text": "a", "image": {"bytes": png(1), "path": "x"}}
    root = put("", b"").rstrip("/")
    rows: dict[Section, Any] = {"text": row, "captions": row}
    rows["conversations"] = {"conversations": turns}
    for section, held in rows.items():
        for split in ("train", "validation", "test"):
            put(f"{section}/data/{split}-00000-of-00001.parquet", as_parquet([held]))
        put(f"{section}/README.md", b"about")
        put(f"{section}/dataset_infos.json", b"{}")
        told = r"splits test, train, validation.*/train-\*\.parquet"
        for source in (f"{section}", f"{section}/data", f"{section}/data/*.parquet"):
            with pytest.raises(ValueError, match=told):
                read_all(section, f"{root}/{source}")
        assert len(read_all(section, f"{root}/{section}/data/train-*.parquet")) == 1


def test_lists_and_lines_of_images_and_captions_are_read(put: Put) -> None:
    for number in range(3):
        put(f"pics/{number}.png", png(number))
    rows = [{"image": f"pics/{n}.png", "caption": f"box {n}", "image_id": n} for n in range(2)]
    rows.append({"image": "pics/2.png", "caption": ["one", "two"]})
    for name, write in (("train.json", as_json), ("train.jsonl", as_lines)):
        path = put(name, write(rows))
        found = read_all("captions", path)
        assert outcome(found) == ["box 0", "box 1", "one", "two"]
        places = ["record 0", "record 1", "record 2, caption 0", "record 2, caption 1"]
        assert [item.where for item in found] == [f"{path}, {place}" for place in places]


def test_pictures_and_their_texts_beside_each_other_are_samples(tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / f"in/{number % 2:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:09d}.png").write_bytes(png(number))
        (folder / f"{number:09d}.txt").write_text(f"caption {number}")
        (folder / f"{number:09d}.json").write_text(json.dumps({"caption": "other"}))
    (tmp_path / "in/00000/alone.png").write_bytes(png(9))
    (tmp_path / "in/00000_stats.json").write_text("{}")
    found = read_all("captions", str(tmp_path / "in"))
    assert outcome(found) == ["caption 0", "caption 2", "- no caption", "caption 1"]
    # img2dataset's table of what it fetched has no pictures inside.
    row = {"url": "a", "caption": "b", "key": "0", "status": "success"}
    (tmp_path / "in/00000.parquet").write_bytes(as_parquet([row]))
    assert outcome(read_all("captions", str(tmp_path / "in"))) == outcome(found)
    (tmp_path / "in/00000.parquet").unlink()
    done = run("captions", tmp_path / "in", tmp_path / "out", max_reject_fraction=0.3)
    assert done["unread"]["first"] == ["in/00000_stats.json"]
    source = Source("s", tmp_path / "out", tmp_path)
    assert [source.image_bytes(n) for n in range(3)] == [png(n) for n in (0, 2, 1)]


SPLIT_FILES = [
    *(
        ((f"{folder.format('train')}/0.parquet", f"{folder.format('test')}/0.parquet"), "test, tr")
        for folder in ("split={}", "partial-{}", "{}2017")
    ),
    (("gsm8k_train.parquet", "gsm8k_test.parquet"), "gsm8k_test.parquet or .*gsm8k_train"),
    (("TRAIN.PARQUET", "TEST.PARQUET"), "TEST.PARQUET or .*TRAIN.PARQUET"),
    (("train.pq", "test"), r"/test or .*/train\.pq"),
    (
        ("train_00000.parquet", "train_00001.parquet", "test_00000.parquet"),
        r"test_\*.parquet or .*train_\*.parquet",
    ),
    (
        ("en/train-0.parquet", "fr/train-0.parquet", "fr/test-0.parquet"),
        r"en/train-\*.parquet with .*fr/train-\*.parquet",
    ),
]


def test_a_split_is_told_wherever_its_word_stands_in_the_name(tmp_path: Path) -> None:
    for number, (names, patterns) in enumerate(SPLIT_FILES):
        for document, name in enumerate(names):
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(as_parquet([{"text": f"document {document}"}]))
        with pytest.raises(ValueError, match=patterns):
            read_all("text", str(tmp_path / str(number)))
    assert len(read_all("text", f"{tmp_path}/0/split=train")) == 1


def test_a_stream_of_arrow_that_does_not_end_or_goes_on_is_refused(put: Put) -> None:
    whole = as_stream(TEXTS)
    for end in range(0, len(whole), 8):
        with pytest.raises(ValueError, match=r"a\.arrow is no whole Arrow file"):
            read_all("text", put("a.arrow", whole[:end]))
    with pytest.raises(ValueError, match=rf"goes on behind .*, at byte {len(whole):,}; give each"):
        read_all("text", put("b.arrow", whole + whole))
    assert len(read_all("text", put("c.arrow", whole))) == len(TEXTS)
    # As versions before 2019 wrote it, without an end too.
    options, old = ipc.IpcWriteOptions(use_legacy_format=True), io.BytesIO()
    with ipc.new_stream(old, TEXTS.schema, options=options) as writer:
        writer.write_table(TEXTS)
        size = old.tell()
    for name, data in (("d.arrow", old.getvalue()), ("e.arrow", old.getvalue()[:size])):
        assert len(read_all("text", put(name, data))) == len(TEXTS)
