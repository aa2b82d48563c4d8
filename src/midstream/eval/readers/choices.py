"""Fixed answers (VSR, TallyQA, AI2D) and boxes (RefCOCO, RefCOCO+, RefCOCOg, OCID-Ref)."""

import json
from pathlib import Path
from typing import Any

from midstream.eval.readers.benchmark_records import (
    Pictures,
    Record,
    VisualExample,
    add,
    coco_names,
    entries,
    find_file,
    lines,
    load_plain_pickle,
    missing,
    picture_size,
    read_json_file,
    read_text,
    records,
)
from midstream.eval.scoring import LETTERS

NUM_COUNTS = 16
AI2D_TEST_IDS = "ai2d_test_ids.csv"


def read_vsr(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """VSR's zero-shot test statements; gold is "True" or "False"."""
    look = Pictures(folder, ("train2017", "val2017"), needed=pictures)
    examples: dict[str, VisualExample] = {}
    path = find_file(folder, "test.jsonl", "*vsr*.jsonl", "*test*.jsonl")
    for number, record in enumerate(lines(path)):
        name = record.text("image")
        stem = name.removesuffix(".jpg")
        others = coco_names("train2014", int(stem)) if stem.isdecimal() else ()
        label = record.identifier("label")
        if label not in ("0", "1"):
            record.refuse(f"its label is {label}, not 0 or 1")
        example = VisualExample(
            str(number),
            record.text("caption"),
            look.find(record, name, *others),
            "True" if label == "1" else "False",
            kinds=record.kinds("relation"),
            choices=("True", "False"),
        )
        add(examples, example.example_id, example, record)
    return list(examples.values())


def read_tallyqa(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """TallyQA's test questions, simple and complex, as a choice of sixteen counts.

    gold: {"index", "choices"}; a count above fifteen is refused.
    """
    look = Pictures(folder, (".",), needed=pictures)
    counts = tuple(str(count) for count in range(NUM_COUNTS))
    examples: dict[str, VisualExample] = {}
    for record in records(find_file(folder, "test.json", "*test*.json")):
        count = record.get("answer", int)
        if not 0 <= count < NUM_COUNTS:
            record.refuse(f"its answer is {count}, not one of 0 to {NUM_COUNTS - 1}")
        key, simple = record.identifier("question_id"), record.value.get("issimple")
        if not isinstance(simple, bool):
            record.refuse(f"its 'issimple' is {simple!r}, neither true nor false")
        example = VisualExample(
            key,
            with_options(record.text("question"), counts),
            look.find(record, record.text("image")),
            {"index": count, "choices": list(counts)},
            "simple" if simple else "complex",
            choices=counts,
        )
        add(examples, key, example, record)
    return list(examples.values())


def read_ai2d(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """AI2D's questions about diagrams, the test pictures and the others as two splits."""
    listed = folder / AI2D_TEST_IDS
    if not listed.is_file():
        missing(listed)
    test = {line.strip() for line in read_text(listed).splitlines() if line.strip()}
    paths = sorted((folder / "questions").glob("*.json"))
    if not paths:
        missing(folder / "questions" / "0.json")
    look = Pictures(folder, ("images",), needed=pictures)
    examples: dict[str, VisualExample] = {}
    for path in paths:
        page = Record(str(path), read_json_file(path))
        picture = page.text("imageName")
        for text, value in page.get("questions", dict).items():
            record = Record(f"{path} question {text!r}", value)
            options = record.texts("answerTexts", least=2)
            index = record.index("correctAnswer", len(options))
            key = record.identifier("questionId")
            example = VisualExample(
                key,
                with_options(text, options),
                look.find(record, picture),
                {"index": index, "choices": options},
                "test" if picture.split(".")[0] in test else "val",
                choices=tuple(options),
            )
            add(examples, key, example, record)
    return list(examples.values())


def with_options(question: str, options: tuple[str, ...] | list[str]) -> str:
    """The question and a lettered line for each option."""
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join((question, *listed))


REFCOCO_REFS = "refs(unc).p"
REFCOCOG_REFS = "refs(umd).p"
REFCOCO_INSTANCES = "instances.json"
OCID_EXPRESSIONS = "val_expressions.json"
# Every picture of OCID is of this size, in pixels.
_OCID_SIZE = (640, 480)
# OCID-Ref's clutter by take: up to so many objects on the table.
_CLUTTER = ((9, "free"), (16, "touching"), (20, "stacked"))


def read_refcoco(
    folder: Path, *, pictures: bool = True, refs: str = REFCOCO_REFS
) -> list[VisualExample]:
    """RefCOCO or RefCOCO+ validation, one example a sentence.

    gold is the box [x1, y1, x2, y2] as a share of the picture, with two decimals. Raises ValueError
    for a box that leaves its picture by more than a pixel.
    """
    instances_path, refs_path = folder / REFCOCO_INSTANCES, folder / refs
    images: dict[str, Record] = {}
    boxes: dict[str, Record] = {}
    for table, key in ((images, "images"), (boxes, "annotations")):
        for record in records(instances_path, key):
            add(table, record.identifier("id"), record, record)
    look = Pictures(folder, ("train2014",), needed=pictures)
    examples: dict[str, VisualExample] = {}
    for index, value in enumerate(load_plain_pickle(refs_path)):
        ref = Record(f"{refs_path} record {index}", value)
        if ref.text("split") != "val":
            continue
        annotation, picture = ref.identifier("ann_id"), ref.identifier("image_id")
        if annotation not in boxes:
            ref.refuse(f"annotation {annotation} is not in {instances_path}")
        if picture not in images:
            ref.refuse(f"image {picture} is not in {instances_path}")
        size = _size(images[picture])
        gold = _coco_box(boxes[annotation], size)
        image = look.find(ref, images[picture].text("file_name"))
        for sentence in ref.records("sentences"):
            number = sentence.identifier("sent_id")
            key = f"{ref.identifier('ref_id')}-{number}"
            example = VisualExample(
                key, sentence.text("sent"), image, gold, "val", size=size, other_id=number
            )
            add(examples, key, example, sentence)
    if not examples:
        raise ValueError(f"{refs_path} holds no expression of split 'val'; give the official file")
    return list(examples.values())


def read_refcocog(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """RefCOCOg validation in the UMD split, as `read_refcoco`."""
    return read_refcoco(folder, pictures=pictures, refs=REFCOCOG_REFS)


def read_ocid_ref(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """OCID-Ref validation; gold is a box as in `read_refcoco`, by the size of the picture file."""
    look = Pictures(folder, ("OCID-dataset",), needed=pictures)
    examples = []
    for key, record in entries(folder / OCID_EXPRESSIONS):
        image = look.find(record, record.text("scene_path"))
        box = _four_numbers(_corners(record.text("bbox")), record)
        if box[0] >= box[2] or box[1] >= box[3]:
            record.refuse(f"its bbox {box} is empty; [x1, y1, x2, y2] needs x1 < x2, y1 < y2")
        size = picture_size(image) if image.is_file() else _OCID_SIZE
        _inside(box, size, record)
        gold, asked, kinds = _rounded(box, size), record.text("sentence"), _clutter(record)
        examples.append(VisualExample(key, asked, image, gold, "val", kinds=kinds, size=size))
    return examples


def _clutter(record: Record) -> dict[str, str]:
    take = record.value.get("take_id")
    if isinstance(take, bool) or not isinstance(take, int):
        return {}
    return {"clutter": next((name for most, name in _CLUTTER if take <= most), "stacked")}


def _size(picture: Record) -> tuple[int, int]:
    width, height = picture.get("width", int), picture.get("height", int)
    if min(width, height) <= 0:
        picture.refuse(f"its size is {width} by {height} pixels")
    return width, height


def _coco_box(annotation: Record, size: tuple[int, int]) -> list[float]:
    x, y, width, height = _four_numbers(annotation.get("bbox", list), annotation)
    if width <= 0 or height <= 0:
        annotation.refuse(
            f"its bbox is {width} by {height} pixels; [x, y, width, height] needs both"
        )
    corners = [x, y, x + width, y + height]
    _inside(corners, size, annotation)
    return _rounded(corners, size)


def _inside(corners: list[float], size: tuple[int, int], record: Record) -> None:
    """Boxes may end a pixel outside, as COCO's do by rounding."""
    width, height = size
    if min(corners) < -1 or corners[2] > width + 1 or corners[3] > height + 1:
        record.refuse(f"its box {corners} leaves the picture of {width} by {height} pixels")


def _corners(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _four_numbers(value: Any, record: Record) -> list[float]:
    if not isinstance(value, list) or len(value) != 4 or {*map(type, value)} - {int, float}:
        record.refuse(f"its bbox {record.value['bbox']!r} is no list of four numbers")
    return [float(item) for item in value]


def _rounded(corners: list[float], size: tuple[int, int]) -> list[float]:
    return [round(corner / side, 2) for corner, side in zip(corners, size * 2, strict=True)]
