"""The official files of the visual benchmarks, as downloaded -> examples (see docs/data.md)."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from midstream.eval.records import Record, add, entries, lines, load_plain_pickle, missing, records

VQAV2_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VQAV2_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
GQA_QUESTIONS = "testdev_balanced_questions.json"
TEXTVQA_QUESTIONS = "TextVQA_0.5.1_val.json"
POPE_SPLITS = ("random", "popular", "adversarial")
REFCOCO_REFS = "refs(unc).p"
REFCOCO_INSTANCES = "instances.json"
OCID_EXPRESSIONS = "val_expressions.json"
NUM_VQA_ANSWERS = 10


@dataclass(frozen=True)
class VisualExample:
    """A question about a picture; `gold` is JSON-able and what the format's scorer takes."""

    example_id: str
    question: str
    image: Path
    gold: Any
    split: str = ""


def read_vqav2(folder: Path) -> list[VisualExample]:
    """VQA v2 validation: every question with its ten answers, which are the gold."""
    questions_path, annotations_path = folder / VQAV2_QUESTIONS, folder / VQAV2_ANNOTATIONS
    annotations: dict[str, list[str]] = {}
    for record in records(annotations_path, "annotations"):
        answers = [
            Record(f"{record.where} answer {index}", answer).text("answer")
            for index, answer in enumerate(record.get("answers", list))
        ]
        add(annotations, record.identifier("question_id"), _ten(answers, record), record)
    examples: dict[str, VisualExample] = {}
    for record in records(questions_path, "questions"):
        key = record.identifier("question_id")
        if key not in annotations:
            record.refuse(f"question {key} has no annotation in {annotations_path}")
        name = f"val2014/COCO_val2014_{record.get('image_id', int):012d}.jpg"
        image = _picture(folder, name, record)
        example = VisualExample(key, record.text("question"), image, annotations[key])
        add(examples, key, example, record)
    if len(annotations) != len(examples):
        extra = next(key for key in annotations if key not in examples)
        raise ValueError(
            f"{annotations_path} holds {len(annotations):,} annotations for {len(examples):,} "
            f"questions in {questions_path}; question {extra} is missing there; "
            "give two files of the same release"
        )
    return list(examples.values())


def read_gqa(folder: Path) -> list[VisualExample]:
    """GQA's balanced test-dev questions; gold is the answer's text."""
    examples = []
    for key, record in entries(folder / GQA_QUESTIONS):
        image = _picture(folder, f"images/{record.identifier('imageId')}.jpg", record)
        answer = record.text("answer")
        examples.append(VisualExample(key, record.text("question"), image, answer))
    return examples


def read_textvqa(folder: Path) -> list[VisualExample]:
    """TextVQA 0.5.1 validation without OCR tokens; gold is the list of ten answers."""
    examples: dict[str, VisualExample] = {}
    for record in records(folder / TEXTVQA_QUESTIONS, "data"):
        key = record.identifier("question_id")
        image = _picture(folder, f"train_images/{record.identifier('image_id')}.jpg", record)
        answers = record.get("answers", list)
        if not all(isinstance(answer, str) for answer in answers):
            record.refuse("its answers are not all texts")
        example = VisualExample(key, record.text("question"), image, _ten(answers, record))
        add(examples, key, example, record)
    return list(examples.values())


def read_pope(folder: Path) -> list[VisualExample]:
    """POPE's splits that are there, at least one of three; gold is "yes" or "no"."""
    paths = {split: folder / f"coco_pope_{split}.json" for split in POPE_SPLITS}
    present = {split: path for split, path in paths.items() if path.is_file()}
    if not present:
        missing(next(iter(paths.values())))
    examples: dict[str, VisualExample] = {}
    for split, path in present.items():
        for record in lines(path):
            key = f"{split}-{record.identifier('question_id')}"
            label = record.text("label")
            if label not in ("yes", "no"):
                record.refuse(f"its label is {label!r}, not 'yes' or 'no'")
            image = _picture(folder, f"val2014/{record.text('image')}", record)
            example = VisualExample(key, record.text("text"), image, label, split)
            add(examples, key, example, record)
    return list(examples.values())


def read_refcoco(folder: Path) -> list[VisualExample]:
    """RefCOCO validation, one example a sentence; gold is the box [x1, y1, x2, y2] as a share of
    the picture, with two decimals."""
    instances_path, refs_path = folder / REFCOCO_INSTANCES, folder / REFCOCO_REFS
    images: dict[str, Record] = {}
    for record in records(instances_path, "images"):
        add(images, record.identifier("id"), record, record)
    boxes: dict[str, Record] = {}
    for record in records(instances_path, "annotations"):
        add(boxes, record.identifier("id"), record, record)
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
        gold = _share_of_picture(boxes[annotation], images[picture])
        image = _picture(folder, f"train2014/{images[picture].text('file_name')}", ref)
        for at, sentence_value in enumerate(ref.get("sentences", list)):
            sentence = Record(f"{ref.where} sentence {at}", sentence_value)
            key = f"{ref.identifier('ref_id')}-{sentence.identifier('sent_id')}"
            example = VisualExample(key, sentence.text("sent"), image, gold, "val")
            add(examples, key, example, sentence)
    if not examples:
        raise ValueError(f"{refs_path} holds no expression of split 'val'; give the official file")
    return list(examples.values())


def read_ocid_ref(folder: Path) -> list[VisualExample]:
    """OCID-Ref validation; gold is a box as in `read_refcoco`, by the size of the picture file."""
    examples = []
    for key, record in entries(folder / OCID_EXPRESSIONS):
        image = _picture(folder, f"OCID-dataset/{record.text('scene_path')}", record)
        box = _four_numbers(_corners(record.text("bbox")), record)
        if box[0] >= box[2] or box[1] >= box[3]:
            record.refuse(f"its bbox {box} is empty; [x1, y1, x2, y2] needs x1 < x2, y1 < y2")
        gold = _rounded(box, *_picture_size(image))
        examples.append(VisualExample(key, record.text("sentence"), image, gold, "val"))
    return examples


def _ten(answers: list[str], record: Record) -> list[str]:
    if len(answers) != NUM_VQA_ANSWERS:
        record.refuse(
            f"it has {len(answers)} answers, the metric needs {NUM_VQA_ANSWERS} "
            "(repeat a single answer ten times)"
        )
    return answers


def _picture(folder: Path, name: str, record: Record) -> Path:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        record.refuse(f"picture {name!r} leads out of {folder}")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{record.where} asks for picture {path}, which does not exist; "
            "put the benchmark's pictures there (docs/data.md)"
        )
    return path


def _picture_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that Pillow can read; replace the file") from None


def _share_of_picture(annotation: Record, picture: Record) -> list[float]:
    x, y, width, height = _four_numbers(annotation.get("bbox", list), annotation)
    if width <= 0 or height <= 0:
        annotation.refuse(
            f"its bbox is {width} by {height} pixels; [x, y, width, height] needs both"
        )
    size = [picture.get(key, int) for key in ("width", "height")]
    if min(size) <= 0:
        picture.refuse(f"its size is {size[0]} by {size[1]} pixels")
    return _rounded([x, y, x + width, y + height], size[0], size[1])


def _corners(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _four_numbers(value: Any, record: Record) -> list[float]:
    numbers = isinstance(value, list) and all(
        isinstance(item, int | float) and not isinstance(item, bool) for item in value
    )
    if not numbers or len(value) != 4:
        record.refuse(f"its bbox {record.value['bbox']!r} is no list of four numbers")
    return [float(item) for item in value]


def _rounded(corners: list[float], width: int, height: int) -> list[float]:
    size = (width, height, width, height)
    return [round(corner / side, 2) for corner, side in zip(corners, size, strict=True)]
