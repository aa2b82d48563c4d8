"""The official files in miniature, sound and broken; and real ones where they are at hand."""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from midstream.eval.readers import choices, questions
from midstream.eval.scoring import box_accuracy, gqa_accuracy, textvqa_accuracy, vqa_accuracy
from midstream.eval.tasks import VISUAL_FORMATS, VisualExample

SHARED = Path(__file__).parents[3] / "shared" / "data"


def picture(path: Path, size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def put(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def vqav2(folder: Path) -> None:
    answers = [{"answer": "red", "answer_id": i, "answer_confidence": "yes"} for i in range(10)]
    question = {"image_id": 42, "question": "What colour?", "question_id": 42000}
    put(folder / questions.VQAV2_QUESTIONS, {"questions": [question]})
    annotation = {"question_id": 42000, "image_id": 42, "answers": answers}
    put(folder / questions.VQAV2_ANNOTATIONS, {"annotations": [annotation]})
    picture(folder / "val2014/COCO_val2014_000000000042.jpg")


def gqa(folder: Path) -> None:
    record = {"imageId": "n1", "question": "Is it red?", "answer": "yes", "semantic": []}
    put(folder / questions.GQA_QUESTIONS, {"201": record})
    picture(folder / "images/n1.jpg")


def textvqa(folder: Path) -> None:
    record = {"question_id": 7, "image_id": "a1", "question": "brand?", "answers": ["nokia"] * 10}
    put(folder / questions.TEXTVQA_QUESTIONS, {"data": [record]})
    picture(folder / "train_images/a1.jpg")


def pope(folder: Path) -> None:
    lines = [
        {"question_id": index, "image": "x.jpg", "text": "Is there a dog?", "label": label}
        for index, label in ((1, "yes"), (2, "no"))
    ]
    for split in questions.POPE_SPLITS:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"coco_pope_{split}.json").write_text(text)
    picture(folder / "val2014/x.jpg")


def ref(split: str, ref_id: int, *sentences: str) -> dict[str, Any]:
    return {
        "ref_id": ref_id,
        "ann_id": 11,
        "image_id": 5,
        "split": split,
        "file_name": "COCO_train2014_000000000005_1.jpg",
        "sentences": [
            {"sent_id": 10 * ref_id + at, "sent": sent, "raw": sent, "tokens": sent.split()}
            for at, sent in enumerate(sentences)
        ],
    }


def refcoco(folder: Path) -> None:
    refs = [ref("train", 1, "not this"), ref("val", 2, "left dog", "dog"), ref("testA", 3, "nor")]
    # Protocol 0 is what Python 2 wrote.
    (folder / choices.REFCOCO_REFS).write_bytes(pickle.dumps(refs, protocol=0))
    name = "COCO_train2014_000000000005.jpg"
    instances = {
        "images": [{"id": 5, "file_name": name, "width": 640, "height": 480}],
        "annotations": [{"id": 11, "image_id": 5, "bbox": [64.0, 48.0, 100.5, 240.0]}],
    }
    put(folder / choices.REFCOCO_INSTANCES, instances)
    picture(folder / "train2014" / name)


def ocid_ref(folder: Path) -> None:
    record = {
        "scene_path": "ARID20/table/seq1/rgb/one.png",
        "bbox": "[64, 120, 128, 479]",
        "sentence": "the red mug",
        "take_id": 3,
    }
    put(folder / choices.OCID_EXPRESSIONS, {"9": record})
    picture(folder / "OCID-dataset" / record["scene_path"], (640, 480))


MAKERS: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "pope": pope,
    "refcoco": refcoco,
    "ocid_ref": ocid_ref,
}


def read(name: str, folder: Path) -> list[VisualExample]:
    return VISUAL_FORMATS[name].read(folder)


def change(path: Path, edit: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    put(path, value)


def test_vqav2_joins_questions_annotations_and_pictures(tmp_path: Path) -> None:
    vqav2(tmp_path)
    image = tmp_path / "val2014/COCO_val2014_000000000042.jpg"
    assert read("vqav2", tmp_path) == [
        VisualExample("42000", "What colour?", image, ["red"] * 10),
    ]


def test_gqa_reads_the_object_of_questions(tmp_path: Path) -> None:
    gqa(tmp_path)
    assert read("gqa", tmp_path) == [
        VisualExample("201", "Is it red?", tmp_path / "images/n1.jpg", "yes")
    ]


def test_textvqa_reads_the_list_of_questions(tmp_path: Path) -> None:
    textvqa(tmp_path)
    image = tmp_path / "train_images/a1.jpg"
    assert read("textvqa", tmp_path) == [
        VisualExample("7", "brand?", image, ["nokia"] * 10, other_id="a1")
    ]


def test_pope_reads_three_splits_whose_question_ids_repeat(tmp_path: Path) -> None:
    pope(tmp_path)
    examples = read("pope", tmp_path)
    assert [example.split for example in examples] == [
        s for s in questions.POPE_SPLITS for _ in "ab"
    ]
    assert [example.gold for example in examples] == ["yes", "no"] * 3
    assert len({example.example_id for example in examples}) == 6


def test_pope_is_content_with_one_split(tmp_path: Path) -> None:
    pope(tmp_path)
    (tmp_path / "coco_pope_random.json").unlink()
    (tmp_path / "coco_pope_adversarial.json").unlink()
    assert {example.split for example in read("pope", tmp_path)} == {"popular"}


def test_refcoco_gives_one_example_a_sentence_of_the_validation_split(tmp_path: Path) -> None:
    refcoco(tmp_path)
    examples = read("refcoco", tmp_path)
    assert [example.question for example in examples] == ["left dog", "dog"]
    # 64/640, 48/480, 164.5/640 = .257, 288/480
    assert [example.gold for example in examples] == [[0.1, 0.1, 0.26, 0.6]] * 2
    assert examples[0].image.name == "COCO_train2014_000000000005.jpg"


def test_ocid_ref_divides_pixels_by_the_size_of_the_picture_file(tmp_path: Path) -> None:
    ocid_ref(tmp_path)
    (example,) = read("ocid_ref", tmp_path)
    assert (example.question, example.gold) == ("the red mug", [0.1, 0.25, 0.2, 1.0])


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_picture_is_named_with_its_record(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    (image,) = [path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".png")]
    image.unlink()
    with pytest.raises(FileNotFoundError, match=rf"(record|line).*{image.name}"):
        read(name, tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_file_is_named_with_what_the_folder_holds(name: str, tmp_path: Path) -> None:
    (tmp_path / "leftover.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"does not exist; the folder holds leftover\.txt"):
        read(name, tmp_path)


def test_a_question_without_annotation_is_refused(tmp_path: Path) -> None:
    vqav2(tmp_path)
    path = tmp_path / questions.VQAV2_QUESTIONS
    change(path, lambda value: value["questions"][0].update(question_id=1))
    with pytest.raises(ValueError, match="questions record 0: question 1 has no annotation"):
        read("vqav2", tmp_path)


def test_an_annotation_without_question_is_refused(tmp_path: Path) -> None:
    vqav2(tmp_path)
    change(
        tmp_path / questions.VQAV2_ANNOTATIONS,
        lambda value: value["annotations"].append(value["annotations"][0] | {"question_id": 5}),
    )
    with pytest.raises(ValueError, match=r"2 annotations for 1 questions.*question 5"):
        read("vqav2", tmp_path)


def test_a_question_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    vqav2(tmp_path)
    path = tmp_path / questions.VQAV2_QUESTIONS
    change(path, lambda value: value["questions"].append(value["questions"][0]))
    with pytest.raises(ValueError, match="questions record 1: id 42000 stands there twice"):
        read("vqav2", tmp_path)


def test_a_key_that_stands_twice_in_an_object_is_refused(tmp_path: Path) -> None:
    gqa(tmp_path)
    path = tmp_path / questions.GQA_QUESTIONS
    one = path.read_text()[1:-1]
    path.write_text(f"{{{one}, {one}}}")
    with pytest.raises(ValueError, match="key '201' twice"):
        read("gqa", tmp_path)


def test_other_than_ten_answers_are_refused_with_the_way_out(tmp_path: Path) -> None:
    textvqa(tmp_path)
    path = tmp_path / questions.TEXTVQA_QUESTIONS
    change(path, lambda value: value["data"][0].update(answers=["nokia"]))
    with pytest.raises(
        ValueError, match=r"data record 0: it has 1 answers, the metric compares 10.*re"
    ):
        read("textvqa", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 3, "image": "x.jpg", "text": "?"', "line 3 is not JSON"),
        ('{"question_id": 3, "image": "x.jpg", "text": "?", "label": "maybe"}', "line 3.*'maybe'"),
        ('{"question_id": 3, "image": "x.jpg", "label": "no"}', "line 3: it has no 'text'"),
        ('{"question_id": 1, "image": "x.jpg", "text": "?", "label": "no"}', "random-1.* twice"),
        ('["no"]', "line 3: it is a list"),
        (
            '{"question_id": 3, "image": "../../x.jpg", "text": "?", "label": "no"}',
            "line 3: picture .* leads out of",
        ),
    ],
)
def test_a_malformed_pope_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    pope(tmp_path)
    with (tmp_path / "coco_pope_random.json").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read("pope", tmp_path)


class Attack:
    """Pickles as a call of os.system."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.trace}",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_names_code_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    refcoco(tmp_path)
    trace = tmp_path / "attacked"
    attack = pickle.dumps([Attack(trace)], protocol=protocol)
    (tmp_path / choices.REFCOCO_REFS).write_bytes(attack)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is refused: it names .*system"):
        read("refcoco", tmp_path)
    assert not trace.exists()
    pickle.loads(attack)  # the attack is a real one
    assert trace.exists()


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    refcoco(tmp_path)
    path = tmp_path / choices.REFCOCO_REFS
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="is refused"):
        read("refcoco", tmp_path)


def test_a_reference_to_an_absent_box_is_named(tmp_path: Path) -> None:
    refcoco(tmp_path)
    path = tmp_path / choices.REFCOCO_INSTANCES
    change(path, lambda value: value["annotations"][0].update(id=12))
    with pytest.raises(ValueError, match=r"record 1: annotation 11 is not in .*instances\.json"):
        read("refcoco", tmp_path)


@pytest.mark.parametrize("bbox", ["64, 120", "[1, 2, 3]", "[5, 5, 5, 9]", '["1", 2, 3, 4]', "null"])
def test_a_box_that_is_none_is_refused(bbox: str, tmp_path: Path) -> None:
    ocid_ref(tmp_path)
    change(tmp_path / choices.OCID_EXPRESSIONS, lambda value: value["9"].update(bbox=bbox))
    with pytest.raises(ValueError, match="record '9': its bbox"):
        read("ocid_ref", tmp_path)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return path


def test_pope_reads_the_real_question_files(tmp_path: Path) -> None:
    folder = shared("pope_questions")
    for split in questions.POPE_SPLITS:
        name = f"coco_pope_{split}.json"
        (tmp_path / name).symlink_to(folder / name)
        for line in (folder / name).read_text().splitlines():
            image = tmp_path / "val2014" / json.loads(line)["image"]
            image.parent.mkdir(exist_ok=True)
            image.touch()
    examples = read("pope", tmp_path)
    assert len(examples) == 9000
    assert sum(example.gold == "yes" for example in examples) == 4500
    assert len({example.image for example in examples}) == 500


@pytest.mark.slow
def test_vqav2_reads_real_questions_and_the_commonest_answer_scores_well(tmp_path: Path) -> None:
    folder = shared("vqa_v2_text")
    pairs = [
        ("vqa_questions_test.gzip", questions.VQAV2_QUESTIONS),
        ("vqa_annotatons_test.gzip", questions.VQAV2_ANNOTATIONS),
    ]
    for source, target in pairs:
        (tmp_path / target).write_bytes(gzip.decompress((folder / source).read_bytes()))
    (tmp_path / "val2014").mkdir()
    for question in json.loads((tmp_path / questions.VQAV2_QUESTIONS).read_text())["questions"]:
        (tmp_path / f"val2014/COCO_val2014_{question['image_id']:012d}.jpg").touch()
    examples = read("vqav2", tmp_path)
    assert len(examples) == 2962
    scores = [vqa_accuracy(max(e.gold, key=e.gold.count), e.gold) for e in examples]
    assert 0.8 < sum(scores) / len(scores) < 1.0  # people disagree, and 1 is out of reach


def test_gqa_and_textvqa_read_real_samples(tmp_path: Path) -> None:
    folder = shared("vqa_official_samples")
    (tmp_path / questions.GQA_QUESTIONS).symlink_to(folder / "allennlp_fixtures/gqa/questions.json")
    (tmp_path / "images").symlink_to(folder / "allennlp_fixtures/images/gqa")
    asked = read("gqa", tmp_path)
    assert [gqa_accuracy(f"{str(e.gold).title()}.", e.gold) for e in asked] == [1.0]
    sample = folder / "first100_items/textvqa/TextVQA_0.5.1_val.json_samples.json"
    (tmp_path / questions.TEXTVQA_QUESTIONS).symlink_to(sample)
    (tmp_path / "train_images").mkdir()
    for record in json.loads(sample.read_text())["data"]:
        (tmp_path / f"train_images/{record['image_id']}.jpg").touch()
    examples = read("textvqa", tmp_path)
    assert len(examples) == 100
    scores = [textvqa_accuracy(max(e.gold, key=e.gold.count), e.gold) for e in examples]
    assert 0.6 < sum(scores) / len(scores) < 1.0


def test_real_boxes_score_one_against_their_own_text(tmp_path: Path) -> None:
    records = json.loads((shared("refcoco_style") / "refcocos_test.json").read_text())
    records = [record for record in records if record["solution"]]  # some name nothing
    expressions = {}
    for index, record in enumerate(records):
        picture(tmp_path / "OCID-dataset" / record["image"], (record["width"], record["height"]))
        box = json.dumps(record["solution"])
        expressions[str(index)] = {
            "scene_path": record["image"],
            "bbox": box,
            "sentence": record["normal_caption"],
        }
    put(tmp_path / choices.OCID_EXPRESSIONS, expressions)
    examples = read("ocid_ref", tmp_path)
    assert len(examples) == len(records) > 100
    assert all(box_accuracy(str(e.gold), e.gold, threshold=0.99) == 1.0 for e in examples)
