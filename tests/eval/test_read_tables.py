"""Benchmarks in the tables that the hub has of them, and what a folder without a task's own files
is told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_several import cell

from midstream.eval.benchmark_records import UNPACKED, VisualExample
from midstream.eval.find_task import read_visual_task
from midstream.eval.tasks import VISUAL_FORMATS

Rows = list[dict[str, Any]]


TEN = [*["red"] * 9, "maroon"]
ASKED: dict[str, Any] = {"question": "What?", "image": cell(7)}
POPE = {**ASKED, "question_id": "1", "image_source": "COCO_val2014_000000000009", "answer": "yes"}
VQA = {**ASKED, "image_id": 9, "answers": [{"answer": text, "answer_id": 1} for text in TEN]}
GQA = {"id": "201", "imageId": "n1", "question": "What?", "answer": "no"}
CHOICES = {"options": ["a", "b", "c"], "answer": "1"}
# By task: its tables, and the examples (id, split, gold) that they are.
TABLES: dict[str, tuple[dict[str, Rows], list[tuple[str, str, Any]]]] = {
    "vqav2": (
        {
            "data/validation-0.parquet": [
                {**VQA, "question_id": number, "answer_type": "other"} for number in (90, 91)
            ],
            "data/test-0.parquet": [{"question_id": 5, "question": "Why?"}],
        },
        [("90", "", TEN), ("91", "", TEN)],
    ),
    "okvqa": (
        {"data/val2014-0.parquet": [{**ASKED, "question_id": "7", "answers": TEN}]},
        [("7", "", TEN)],
    ),
    "textvqa": (
        {"data/validation-0.parquet": [{**VQA, "question_id": 34602, "answers": TEN}]},
        [("34602", "", TEN)],
    ),
    "pope": (
        {
            "data/test-0.parquet": [
                {**POPE, "category": "random"},
                {**POPE, "answer": "no", "category": "popular"},
            ],
            "Full/random-0.parquet": [{**POPE, "category": "random"}],
        },
        [("random-1", "random", "yes"), ("popular-1", "popular", "no")],
    ),
    "gqa": (
        {
            "testdev_balanced_images/testdev-0.parquet": [{"id": "n1", "image": cell(7)}],
            "testdev_balanced_instructions/testdev-0.parquet": [
                {**GQA, "types": {"structural": "verify", "semantic": "global"}}
            ],
        },
        [("201", "", "no")],
    ),
    "ai2d": (
        {"data/test-0.parquet": [{**ASKED, **CHOICES}]},
        [("0", "test", {"index": 1, "choices": ["a", "b", "c"]})],
    ),
}


def lay_out(folder: Path, tables: dict[str, Rows]) -> Path:
    for name, rows in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    (folder / "README.md").write_text("about it")
    return folder


def read(folder: Path, **options: Any) -> list[VisualExample]:
    return VISUAL_FORMATS[folder.name].read(folder, **options)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_hub_are_the_same_benchmark(name: str, tmp_path: Path) -> None:
    tables, expected = TABLES[name]
    folder = lay_out(tmp_path / name, tables)
    without = read(folder, pictures=False)
    assert not (folder / UNPACKED).exists()
    examples = read(folder)
    for found in (without, examples):
        assert [(e.example_id, e.split, e.gold) for e in found] == expected
        assert len({e.image for e in found}) == 1
        assert {e.question.split("\n")[0] for e in found} == {"What?"}
    with Image.open(examples[0].image) as picture:
        assert picture.getpixel((0, 0)) == 7


def test_official_files_go_before_tables_and_tables_of_another_split_are_told(
    tmp_path: Path,
) -> None:
    tables, _ = TABLES["textvqa"]
    folder = lay_out(tmp_path / "textvqa", {"data/test-0.parquet": [{"question_id": 1}]})
    with pytest.raises(FileNotFoundError, match=r"data/test-0\.parquet and none of the split val"):
        read(folder, pictures=False)
    lay_out(folder, tables)
    assert len(read(folder, pictures=False)) == 1
    (folder / "TextVQA_0.5.1_val.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match=r"TextVQA_0\.5\.1_val\.json holds no list"):
        read(folder, pictures=False)


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        ("vqav2", {"answers": TEN[:3]}, "row 0: it has 3 answers, the metric compares 10"),
        ("vqav2", {"answers": None}, "row 0: its 'answers' is None, not a list"),
        ("pope", {"answer": "maybe"}, "row 0: its answer is 'maybe', not yes or no"),
        ("ai2d", {"answer": "3"}, "row 0: its answer 3 is none of 3 options"),
        ("ai2d", {"image": {"bytes": None, "path": "a.png"}}, "row 0: one of its pictures has no"),
    ],
)
def test_a_broken_row_of_a_table_is_named(
    name: str, edit: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (table, rows), *_ = TABLES[name][0].items()
    folder = lay_out(tmp_path / name, {table: [{**rows[0], **edit}]})
    with pytest.raises(ValueError, match=told):
        read(folder)


def test_a_question_without_its_picture_in_gqas_other_tables_is_named(tmp_path: Path) -> None:
    tables = dict(TABLES["gqa"][0])
    tables["testdev_balanced_images/testdev-0.parquet"] = [{"id": "n2", "image": cell(1)}]
    folder = lay_out(tmp_path / "gqa", tables)
    with pytest.raises(ValueError, match=r"row 0: its picture n1 is in no table of .*_images"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gqa", "train_balanced_questions.json"),
        ("textvqa", "TextVQA_0.5.1_train.json"),
        ("vqav2", "v2_OpenEnded_mscoco_train2014_questions.json"),
        ("vsr", "vsr_train.jsonl"),
    ],
)
def test_training_files_alone_are_not_asked(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"does not exist; the folder holds {file}"):
        VISUAL_FORMATS[name].read(tmp_path, pictures=False)


def test_files_in_a_folder_of_their_own_are_found(tmp_path: Path) -> None:
    """LLaVA's layout has POPE's in coco/, GQA's archive its questions in questions1.2/."""
    line = '{"question_id": 1, "image": "1.jpg", "text": "Is there a dog?", "label": "yes"}'
    pope, gqa = tmp_path / "pope/coco", tmp_path / "gqa/questions1.2"
    for folder in (pope, gqa, tmp_path / "pope/val2014"):
        folder.mkdir(parents=True)
    (pope / "coco_pope_random.json").write_text(line)
    Image.new("RGB", (4, 4)).save(tmp_path / "pope/val2014/1.jpg")
    (example,) = read(pope.parent)
    assert example.image == tmp_path / "pope/val2014/1.jpg"
    (gqa / "testdev_balanced_questions.json").write_text(
        '{"1": {"imageId": "n1", "question": "Is it?", "answer": "no"}}'
    )
    assert len(read(gqa.parent, pictures=False)) == 1


def test_a_benchmark_that_is_not_there_is_not_read_out_of_another_ones_folder(
    tmp_path: Path,
) -> None:
    for place in ("textvqa/data", "vqav2"):
        (tmp_path / place).mkdir(parents=True)
    pq.write_table(pa.table({"question_id": [1]}), tmp_path / "textvqa/data/validation-0.parquet")
    (tmp_path / "vqav2/OpenEnded_mscoco_val2014_questions.json").write_text('{"questions": []}')
    for name in ("vqav2", "okvqa", "pope", "gqa"):
        with pytest.raises(FileNotFoundError, match="does not exist; the folder holds textvqa"):
            VISUAL_FORMATS[name].read(tmp_path, pictures=False)


def test_cocos_pictures_are_found_under_their_names_since_2017(tmp_path: Path) -> None:
    line = {"question_id": 1, "image": "COCO_val2014_000000000009.jpg", "text": "Is it?"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps({**line, "label": "no"}))
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train2017/000000000009.jpg")
    (example,) = VISUAL_FORMATS["pope"].read(tmp_path)
    assert example.image == tmp_path / "train2017/000000000009.jpg"


def test_official_files_are_whole_by_the_number_that_was_published(tmp_path: Path) -> None:
    folder = tmp_path / "pope"
    folder.mkdir()
    line = '{{"question_id": {}, "image": "1.jpg", "text": "Is there a dog?", "label": "yes"}}\n'
    for split, count in (("random", 2910), ("popular", 3000), ("adversarial", 3000)):
        text = "".join(line.format(number) for number in range(count))
        (folder / f"coco_pope_{split}.json").write_text(text)
    assert read_visual_task(tmp_path, "pope", pictures=False).num_all == 8910
    with (folder / "coco_pope_random.json").open("a") as stream:
        stream.write("".join(line.format(number) for number in range(2910, 3000)))
    assert read_visual_task(tmp_path, "pope", pictures=False).num_all == 9000
    (folder / "coco_pope_random.json").unlink()
    task = read_visual_task(tmp_path, "pope", pictures=False)
    assert (len(task.examples), task.num_all) == (6000, 8910)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS to it",
        ),
        (b"<!DOCTYPE html><html>404</html>", "a page or an answer of a server"),
        (b"PK\x03\x04 and more", "is a zip archive; unpack it"),
        (b'{"1": {}}\n{"2": {}}', r"is not JSON \(line 2: Extra data\); give the official file"),
    ],
)
def test_what_stands_in_place_of_a_file_is_told(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "testdev_balanced_questions.json").write_bytes(content)
    (tmp_path / "refs(unc).p").write_bytes(content)
    (tmp_path / "instances.json").write_text('{"images": [{"id": 1}], "annotations": [{"id": 1}]}')
    with pytest.raises(ValueError, match=rf"questions\.json .*{told}"):
        VISUAL_FORMATS["gqa"].read(tmp_path, pictures=False)
    if b"git-lfs" in content:
        with pytest.raises(ValueError, match=rf"refs.*{told}"):
            VISUAL_FORMATS["refcoco"].read(tmp_path, pictures=False)


def test_an_archive_that_was_not_unpacked_is_named(tmp_path: Path) -> None:
    (tmp_path / "questions1.2.zip").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"\(unpack questions1\.2\.zip there\?\)"):
        VISUAL_FORMATS["gqa"].read(tmp_path, pictures=False)


@pytest.mark.parametrize(
    ("name", "file", "record", "gold"),
    [
        (
            "pope",
            "coco_pope_random.json",
            {"question_id": 1.0, "image": "1.jpg", "text": "Is it?", "label": "Yes"},
            "yes",
        ),
        ("vsr", "test.jsonl", {"image": "1.jpg", "caption": "It is.", "label": True}, "True"),
        ("vsr", "test.jsonl", {"image": "1.jpg", "caption": "It is.", "label": 0.0}, "False"),
        (
            "nlvr2",
            "test1.json",
            {"identifier": "test1-0-1-0", "sentence": "Both.", "label": False},
            "False",
        ),
    ],
)
def test_lines_may_be_a_list_and_labels_spelt_as_exports_spell_them(
    name: str, file: str, record: dict[str, Any], gold: str, tmp_path: Path
) -> None:
    for text in (json.dumps([record]), json.dumps(record)):
        (tmp_path / file).write_text(text)
        (example,) = VISUAL_FORMATS[name].read(tmp_path, pictures=False)
        assert example.gold == gold
        assert name != "pope" or example.example_id == "random-1"
