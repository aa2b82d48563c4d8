"""VizWiz, VSR, TallyQA, AI2D, RefCOCOg, TextVQA with OCR: official files, sound and broken."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_benchmark import Fake, ignore

from midstream.config import Evaluation
from midstream.eval.answers import KeptAnswers
from midstream.eval.benchmark import evaluate
from midstream.eval.find_task import read_visual_task
from midstream.eval.tasks import VISUAL_FORMATS, VisualExample

SHARED = Path(__file__).parents[3] / "shared" / "data"


def picture(path: Path, size: tuple[int, int] = (40, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def read(name: str, folder: Path, **options: Any) -> list[VisualExample]:
    return VISUAL_FORMATS[name].read(folder, **options)


def vizwiz(folder: Path) -> None:
    rows = [
        {
            "image": f"VizWiz_val_{index}.jpg",
            "question": f"What is {index}?",
            "answers": [{"answer": text, "answer_confidence": "yes"}] * 10,
            "answer_type": kind,
            "answerable": int(kind != "unanswerable"),
        }
        for index, (text, kind) in enumerate((("soup", "other"), ("unanswerable", "unanswerable")))
    ]
    (folder / "val.json").write_text(json.dumps(rows))
    for row in rows:
        picture(folder / "val" / str(row["image"]))


def vsr(folder: Path) -> None:
    rows = [
        {"image": "000000000007.jpg", "caption": "The cat is under it.", "label": 1},
        {"image": "000000000008.jpg", "caption": "The dog is on it.", "label": 0},
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture(folder / "train2017/000000000007.jpg")
    picture(folder / "images/COCO_train2014_000000000008.jpg")


def tallyqa(folder: Path) -> None:
    rows = [
        {
            "image": f"VG_100K/{index}.jpg",
            "question": "How many?",
            "answer": index + 2,
            "question_id": 90 + index,
            "issimple": not index,
        }
        for index in range(2)
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    for row in rows:
        picture(folder / str(row["image"]))


def ai2d(folder: Path) -> None:
    (folder / "questions").mkdir()
    for number in (0, 1):
        page = {
            "imageName": f"{number}.png",
            "questions": {
                "What eats it?": {
                    "questionId": f"{number}.png-0",
                    "answerTexts": ["fox", "owl", "hen", "bee"],
                    "correctAnswer": number + 1,
                }
            },
        }
        (folder / f"questions/{number}.png.json").write_text(json.dumps(page))
        picture(folder / f"images/{number}.png")
    (folder / "ai2d_test_ids.csv").write_text("1\n")


def refcocog(folder: Path) -> None:
    sentence = {"sent_id": 3, "sent": "the left cup"}
    ref = {"ref_id": 1, "ann_id": 2, "image_id": 4, "split": "val", "sentences": [sentence]}
    (folder / "refs(umd).p").write_bytes(pickle.dumps([ref], protocol=0))
    image = {"id": 4, "file_name": "x.jpg", "width": 40, "height": 20}
    box = {"id": 2, "bbox": [4, 5, 10, 10]}
    (folder / "instances.json").write_text(json.dumps({"images": [image], "annotations": [box]}))
    picture(folder / "train2014/x.jpg")


def textvqa_ocr(folder: Path) -> None:
    record = {"question_id": 7, "image_id": "a1", "question": "brand?", "answers": ["nokia"] * 10}
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [record]}))
    text = (
        "brand?\nReference OCR token: NOKIA, 3310\n"
        "Answer the question using a single word or phrase."
    )
    (folder / "textvqa_val_v051_ocr.jsonl").write_text(
        json.dumps({"question_id": "a1", "image": "a1.jpg", "text": text}) + "\n"
    )
    picture(folder / "train_images/a1.jpg")


MADE: dict[str, Callable[[Path], None]] = {
    "vizwiz": vizwiz,
    "vsr": vsr,
    "tallyqa": tallyqa,
    "ai2d": ai2d,
    "refcocog": refcocog,
    "textvqa_ocr": textvqa_ocr,
}
PROMPTS = {
    "vizwiz": "What is 0?\nWhen the provided information is insufficient, respond with "
    "'Unanswerable'.\nAnswer the question using a single word or phrase.",
    "vsr": 'Based on the image, is this statement "True" or "False"? The cat is under it.\n'
    'Respond with "True" or "False" directly.',
    "ai2d": "What eats it?\nA. fox\nB. owl\nC. hen\nD. bee\n"
    "Answer with the option's letter from the given choices directly.",
    "textvqa_ocr": "brand?\nReference OCR token: NOKIA, 3310\n"
    "Answer the question using a single word or phrase.",
}
GOLD: dict[str, Any] = {
    "vizwiz": {"answers": ["soup"] * 10, "answerable": True},
    "vsr": "True",
    "tallyqa": {"index": 2, "choices": [str(count) for count in range(16)]},
    "ai2d": {"index": 1, "choices": ["fox", "owl", "hen", "bee"]},
    "refcocog": [0.1, 0.25, 0.35, 0.75],
    "textvqa_ocr": ["nokia"] * 10,
}


@pytest.mark.parametrize("name", MADE)
def test_official_files_become_examples(name: str, tmp_path: Path) -> None:
    MADE[name](tmp_path)
    examples = read(name, tmp_path)
    assert examples[0].gold == GOLD[name]
    assert all(example.image.is_file() for example in examples)
    if name in PROMPTS:
        assert VISUAL_FORMATS[name].prompt(examples[0].question, "official") == PROMPTS[name]
    if name == "tallyqa":
        assert examples[0].question.splitlines()[-1] == "P. 15"
        assert [example.split for example in examples] == ["simple", "complex"]
    if name == "ai2d":
        assert [example.split for example in examples] == ["val", "test"]


@pytest.mark.parametrize("name", MADE)
def test_a_missing_picture_is_named_and_none_is_needed_to_score(name: str, tmp_path: Path) -> None:
    MADE[name](tmp_path)
    image = read(name, tmp_path)[0].image
    image.unlink()
    with pytest.raises(FileNotFoundError, match=f"{image.name}, which does not exist"):
        read(name, tmp_path)
    assert read(name, tmp_path, pictures=False)[0].gold == GOLD[name]


@pytest.mark.parametrize("by", ["probability", "text", "both"])
@pytest.mark.parametrize("letters", ["letter", "likelihood"])
def test_fixed_answers_by_probability_and_by_text(tmp_path: Path, by: str, letters: str) -> None:
    """The model likes "owl", the letter B and "True", and writes so."""
    for name in ("vsr", "ai2d"):
        (tmp_path / name).mkdir()
        MADE[name](tmp_path / name)

    def say(prompt: str, _image: Path) -> str:
        if "statement" in prompt:
            return "True"
        return "owl" if letters == "likelihood" and by == "probability" else "B"

    evaluation = Evaluation.model_validate(
        {
            "visual_tasks": ("vsr", "ai2d"),
            "fixed_answers": by,
            "letters": letters if by == "probability" else "letter",
            "blind": False,
        }
    )
    answers = KeptAnswers(Fake(say, frozenset()), None, at_once=8)
    results = evaluate(answers, evaluation, tmp_path, tmp_path / "out", ignore)["tasks"]
    assert results["vsr"]["score"] == 0.5
    assert results["ai2d"]["splits"] == {"val": 1.0, "test": 0.0}
    assert results["ai2d"]["answered"] == ("text" if by == "text" else "probability")
    assert ("text.score" in results["vsr"]["details"]) is (by == "both")


def test_boxes_are_asked_for_in_the_frame_that_is_declared(tmp_path: Path) -> None:
    (tmp_path / "refcocog").mkdir()
    refcocog(tmp_path / "refcocog")
    # [.1, .25, .35, .75] of 40 by 20 pixels is this of the square of 40.
    square = "[0.1, 0.38, 0.35, 0.62]"
    found = {}
    for frame in ("picture", "square"):
        evaluation = Evaluation.model_validate(
            {"visual_tasks": ("refcocog",), "box_frame": frame, "blind": False}
        )
        fake = Fake(lambda *_: square, frozenset())
        answers = KeptAnswers(fake, None, at_once=8)
        row = evaluate(answers, evaluation, tmp_path, tmp_path / frame, ignore)["tasks"]["refcocog"]
        found[frame] = (row["score"], row["details"]["iou_0.25"])
    assert found == {"picture": (0.0, 1.0), "square": (1.0, 1.0)}


def test_a_wording_of_the_recipes_own_takes_the_place_of_the_official_one(tmp_path: Path) -> None:
    (tmp_path / "vizwiz").mkdir()
    vizwiz(tmp_path / "vizwiz")
    fake = Fake(lambda *_: "unanswerable", frozenset())
    evaluation = Evaluation(
        visual_tasks=("vizwiz",), wordings={"vizwiz": "Q: {question} A:"}, blind=False
    )
    answers = KeptAnswers(fake, None, at_once=8)
    row = evaluate(answers, evaluation, tmp_path, tmp_path / "out", ignore)["tasks"]["vizwiz"]
    assert sorted(fake.prompts) == ["Q: What is 0? A:", "Q: What is 1? A:"]
    assert row["details"]["unanswerable_f1"] == pytest.approx(2 / 3)
    assert row["details"]["answer_type=other"] == 0.0
    for wrong in ({"gqa": "{question}"}, {"vizwiz": "no place"}):
        with pytest.raises(ValueError, match=r"none of the visual tasks|goes where"):
            Evaluation(visual_tasks=("vizwiz",), wordings=wrong)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("vizwiz", "val.json", lambda rows: rows[0]["answers"].pop(), "9 answers"),
        ("vizwiz", "val.json", lambda rows: rows.append(rows[0]), "stands there twice"),
        ("tallyqa", "test.json", lambda rows: rows[0].update(answer=16), "answer is 16"),
        ("tallyqa", "test.json", lambda rows: rows[0].update(issimple=1), "'issimple' is 1"),
        (
            "refcocog",
            "instances.json",
            lambda value: value["annotations"][0].update(bbox=[4, 5, 40, 10]),
            r"leaves the picture of 40 by 20",
        ),
        (
            "ai2d",
            "questions/0.png.json",
            lambda page: page["questions"]["What eats it?"].update(correctAnswer=4),
            "correctAnswer 4 is none of 4",
        ),
        (
            "textvqa_ocr",
            "TextVQA_0.5.1_val.json",
            lambda value: value["data"][0].update(question="year?"),
            r"has no question 'year\?' about picture a1",
        ),
    ],
)
def test_a_broken_record_is_named(
    tmp_path: Path, name: str, file: str, change: Callable[[Any], Any], message: str
) -> None:
    MADE[name](tmp_path)
    value = json.loads((tmp_path / file).read_text())
    change(value)
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        read(name, tmp_path)


def test_questions_and_annotations_of_two_subsets_are_refused(tmp_path: Path) -> None:
    questions = {"data_subtype": "val2014", "questions": [{"question_id": 1}]}
    annotations = {"data_subtype": "train2014", "annotations": [{"question_id": 1}]}
    (tmp_path / "v2_a_questions.json").write_text(json.dumps(questions))
    (tmp_path / "v2_b_annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match=r"is of val2014, .* is of train2014"):
        read("vqav2", tmp_path)


def test_several_files_that_could_be_meant_are_refused(tmp_path: Path) -> None:
    for part in ("valid", "test"):
        (tmp_path / f"vqa_questions_{part}.gzip").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match="several files like"):
        read("vqav2", tmp_path)


def test_an_unknown_benchmark_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no visual benchmark is called 'refcoc'; did you mean"):
        read_visual_task(tmp_path, "refcoc")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
def test_real_cuts_are_read_as_they_are(tmp_path: Path) -> None:
    coco = SHARED / "coco_mini"
    assert len(read("vqav2", coco)) == 73
    statements = read("vsr", coco)
    assert len(statements) == 24
    assert {example.gold for example in statements} == {"True", "False"}
    text = SHARED / "vqa_v2_text"
    for part in ("questions", "annotatons"):
        (tmp_path / f"{part}.gzip").symlink_to(text / f"vqa_{part}_valid.gzip")
    assert len(read("vqav2", tmp_path, pictures=False)) == 8977
