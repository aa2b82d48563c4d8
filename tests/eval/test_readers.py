"""The official files as docs/evaluation.md shows them, sound and broken; real ones where here."""

import gzip
import json
import os
import pickle
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from midstream.eval.find_task import read_visual_task
from midstream.eval.readers import POPE_SPLITS
from midstream.eval.scoring import BENCHMARKS, gqa_accuracy, textvqa_accuracy, vqa_accuracy
from midstream.eval.tasks import VISUAL_FORMATS, VisualExample, _format
from midstream.eval.text import read_text_task

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
BLOCKS: dict[str, dict[str, str]] = defaultdict(dict)
for place, text in re.findall(r"```json (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
    BLOCKS[place.split("/")[0]][place.split("/", 1)[1]] = text
# Formats whose files another one's block shows.
SHOWN_AS = {"refcoco_plus": "refcoco", "refcocog": "refcoco"}
REFS, OCID, POPE = "refs(unc).p", "val_expressions.json", "coco_pope_random.json"
VQA_QUESTIONS, VQA_ANSWERS = BLOCKS["vqav2"]
CAPTION = "Provide a one-sentence caption for the provided image."
BRIEFLY = "\nAnswer the question using a single word or phrase."
BOX = 'Please provide the bounding box coordinate of the region this sentence describes: "{}"'
LETTER = "\nAnswer with the option's letter from the given choices directly."

RED = re.split(", ", "red, red, dark red, red, maroon, red, red, red, red, brown")
NOKIA = [*["nokia"] * 4, "Nokia", "nokia", "toshiba", *["nokia"] * 3]
SOUP = re.split(", ", "soup, soup, can, soup, soup can, soup, soup, unsuitable, soup, soup")
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
STATED = 'Based on the {}, is this statement "True" or "False"? {}\n'
STATED += 'Respond with "True" or "False" directly.'
# 10/640, 20/480, 110/640 = .172, 220/480
SHARES = [0.02, 0.04, 0.17, 0.46]
ON_THE_LEFT = (2, "1-0", SHARES, BOX.format("the man on the left"))
COUNTS, ROOT = [str(count) for count in range(16)], ["A", "B", "C", "D"]
LETTERED = "\n".join(f"{'ABCDEFGHIJKLMNOP'[n]}. {n}" for n in range(16))
# Of each format: how many examples, the first one's id, gold and official prompt.
READ: dict[str, tuple[int, str, Any, str]] = {
    "vqav2": (1, "1", RED, "What colour is the car?" + BRIEFLY),
    "okvqa": (1, "7", [*["surfing"] * 6, *["surf"] * 4], "What sport is it?" + BRIEFLY),
    "gqa": (3, "201", "no", "Is it overcast?" + BRIEFLY),
    "textvqa": (1, "34602", NOKIA, "what brand is it?" + BRIEFLY),
    "textvqa_ocr": (
        *(1, "34602", NOKIA),
        "What brand is it?\nReference OCR token: NOKIA, 8MP" + BRIEFLY,
    ),
    "vizwiz": (
        *(1, "VizWiz_val_00000000.jpg", {"answers": SOUP, "answerable": True}),
        "Can you tell me what this is?" + UNSURE + BRIEFLY,
    ),
    "pope": (3, "random-1", "yes", "Is there a snowboard in the image?" + BRIEFLY),
    **dict.fromkeys(("refcoco", "refcoco_plus", "refcocog"), ON_THE_LEFT),
    "ocid_ref": (3, "1", SHARES, BOX.format("the blue cup")),
    "vsr": (3, "0", "True", STATED.format("image", "The cat is on the bench.")),
    "tallyqa": (*(3, "1", {"index": 2, "choices": COUNTS}), f"How many dogs?\n{LETTERED}" + LETTER),
    "ai2d": (
        *(1, "0.png-0", {"index": 2, "choices": ROOT}),
        "Which letter is the root?\nA. A\nB. B\nC. C\nD. D" + LETTER,
    ),
    "qa": (3, "1", ["a cup", "cup"], "What is on the table?" + BRIEFLY),
    "coco_captions": (1, "COCO_val2014_000000000042.jpg", ["A dog.", "The dog sits."], CAPTION),
    "flickr30k": (1, "7.jpg", ["A dog runs ."], CAPTION),
    "nlvr2": (2, "test1-0-1-0", "True", STATED.format("images", "Both show a dog.")),
}


def read(name: str, folder: Path, **options: Any) -> list[VisualExample]:
    return VISUAL_FORMATS[name].read(folder, **options)


def picture(path: Path, size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, format="PNG")


def lay_out(folder: Path, name: str) -> None:
    for file, text in BLOCKS[name].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        # Protocol 0 is what Python 2 wrote.
        pickled = path.suffix == ".p"
        path.write_bytes(pickle.dumps(json.loads(text), protocol=0) if pickled else text.encode())


def official(folder: Path, name: str) -> list[VisualExample]:
    """The files of a format, and its pictures where it looks for them first."""
    lay_out(folder, SHOWN_AS.get(name, name))
    if name == "textvqa_ocr":
        lay_out(folder, "textvqa")
    if name == "refcocog":
        shutil.move(folder / REFS, folder / "refs(umd).p")
    examples = read(name, folder, pictures=False)
    for path, size in {(path, e.size) for e in examples for path in e.pictures}:
        picture(path, size or (20, 10))
    return examples


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit a JSON file, a file of JSON lines or a pickle."""
    if path.suffix == ".p":
        value = pickle.loads(path.read_bytes())
        edit(value)
        path.write_bytes(pickle.dumps(value))
        return
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError:
        value = [json.loads(line) for line in path.read_text().splitlines()]
        edit(value)
        path.write_text("".join(json.dumps(one) + "\n" for one in value))
    else:
        edit(value)
        path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", READ)
def test_official_files_become_examples(name: str, tmp_path: Path) -> None:
    without = official(tmp_path, name)
    examples = read(name, tmp_path)
    assert examples == without
    count, key, gold, prompt = READ[name]
    assert (len(examples), examples[0].example_id, examples[0].gold) == (count, key, gold)
    assert VISUAL_FORMATS[name].prompt(examples[0].question, "official") == prompt
    image = examples[0].image
    image.unlink()
    with pytest.raises(FileNotFoundError, match=rf"(record|line|question).*{image.name}, which"):
        read(name, tmp_path)


def test_a_missing_file_is_named_with_what_the_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "leftover.txt").touch()
    told = r"does not exist; the folder holds leftover\.txt"
    for name in VISUAL_FORMATS:
        with pytest.raises(FileNotFoundError, match=told):
            read(name, tmp_path)


def test_the_page_shows_no_format_that_does_not_exist_and_a_text_task(tmp_path: Path) -> None:
    assert set(BLOCKS) - {"text_tasks"} <= set(VISUAL_FORMATS)
    # The others are tables (test_several.py).
    assert set(VISUAL_FORMATS) - set(READ) == {"blink", "muirbench", "mantis_eval"}
    lay_out(tmp_path, "text_tasks")
    assert [item["gold"] for item in read_text_task(tmp_path / "colours.jsonl")] == [0, 1, 1]


def test_a_new_format_without_a_chance_level_is_refused_by_name() -> None:
    with pytest.raises(AssertionError, match=r"give mine a level under \[chance\.visual\]"):
        _format("mine", BENCHMARKS["visual"]["gqa"])


def test_splits_kinds_and_other_ids_are_read(tmp_path: Path) -> None:
    examples = {}
    for name in ("tallyqa", "ai2d", "gqa", "ocid_ref", "textvqa", "vizwiz", "qa"):
        (tmp_path / name).mkdir()
        examples[name] = official(tmp_path / name, name)
    assert [example.split for example in examples["tallyqa"]] == ["simple", "complex", "simple"]
    (tmp_path / "ai2d/ai2d_test_ids.csv").write_text("1\n")
    assert (examples["ai2d"][0].split, read("ai2d", tmp_path / "ai2d")[0].split) == ("test", "val")
    kinds = {"structural": "verify", "semantic": "global", "form": "binary"}
    assert examples["gqa"][0].kinds == kinds
    clutter = [example.kinds["clutter"] for example in examples["ocid_ref"][:2]]
    assert clutter == ["free", "touching"]
    assert (examples["textvqa"][0].other_id, examples["vizwiz"][0].other_id) == ("003a8ae2", "0")
    assert [e.example_id for e in examples["qa"]] == ["1", "2", "door"]
    assert [e.split for e in examples["qa"]] == ["", "counts", ""]
    assert examples["qa"][2].choices == ("yes", "no")


def test_pope_reads_the_splits_that_are_there_whose_question_ids_repeat(tmp_path: Path) -> None:
    official(tmp_path, "pope")
    for split in POPE_SPLITS[1:]:
        shutil.copy(tmp_path / POPE, tmp_path / f"coco_pope_{split}.json")
    examples = read("pope", tmp_path)
    assert [example.split for example in examples] == [s for s in POPE_SPLITS for _ in range(3)]
    assert len({example.example_id for example in examples}) == 9
    shutil.copy(tmp_path / POPE, (tmp_path / POPE).with_suffix(".jsonl"))
    with pytest.raises(ValueError, match=r"holds coco_pope_random\.jsonl in another form, too"):
        read("pope", tmp_path)


def test_each_of_karpathys_lists_is_its_own_benchmarks_where_all_lie_together(
    tmp_path: Path,
) -> None:
    for name in ("coco_captions", "flickr30k"):
        lay_out(tmp_path, name)
    shutil.copy(tmp_path / "dataset_coco.json", tmp_path / "dataset_flickr8k.json")
    for name in ("coco_captions", "flickr30k"):
        (example,) = read(name, tmp_path, pictures=False)
        assert example.example_id == READ[name][1]


def test_pictures_may_lie_in_images_under_the_names_that_coco_gave_them(tmp_path: Path) -> None:
    for example in official(tmp_path, "vsr"):
        example.image.unlink(missing_ok=True)
    picture(tmp_path / "images/COCO_train2014_000000085637.jpg")
    picture(tmp_path / "000000038332.jpg")
    first, second, third = read("vsr", tmp_path)
    assert first.image == second.image == tmp_path / "images/COCO_train2014_000000085637.jpg"
    assert third.image.is_file()


def test_refcoco_reads_the_validation_split_alone(tmp_path: Path) -> None:
    official(tmp_path, "refcoco")
    change(tmp_path / REFS, lambda refs: refs.append({**refs[0], "ref_id": 2, "split": "testA"}))
    assert len(read("refcoco", tmp_path)) == 2
    change(tmp_path / REFS, lambda refs: refs.pop(0))
    with pytest.raises(ValueError, match="holds no expression of split 'val'"):
        read("refcoco", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "training"),
    [
        ("nlvr2", "test1.json", "train.json"),
        ("vizwiz", "val.json", "train.json"),
        ("vsr", "test.jsonl", "train.jsonl"),
        ("textvqa", "TextVQA_0.5.1_val.json", "TextVQA_0.5.1_train.json"),
        ("ocid_ref", OCID, "train_expressions.json"),
        ("tallyqa", "test.json", "train.json"),
    ],
)
def test_shots_are_read_from_the_training_files(
    name: str, file: str, training: str, tmp_path: Path
) -> None:
    pool = tmp_path / f"{name}_train"
    lay_out(pool, name)
    with pytest.raises(FileNotFoundError, match=f"{training} does not exist"):
        read(name, pool, pictures=False)
    (pool / file).rename(pool / training)
    assert len(read(name, pool, pictures=False)) == READ[name][0]


def test_training_questions_of_tallyqa_need_not_be_simple_or_complex(tmp_path: Path) -> None:
    pool = tmp_path / "tallyqa_train"
    lay_out(pool, "tallyqa")
    (pool / "test.json").rename(pool / "train.json")
    change(pool / "train.json", lambda v: [record.pop("issimple") for record in v[:2]])
    splits = [example.split for example in read("tallyqa", pool, pictures=False)]
    assert splits == ["train", "train", "simple"]


def test_shots_of_boxes_and_diagrams_are_none_of_those_asked_about(tmp_path: Path) -> None:
    boxes, diagrams = tmp_path / "refcoco_train", tmp_path / "ai2d_train"
    lay_out(boxes, "refcoco")
    with pytest.raises(ValueError, match="holds no expression of split 'train'"):
        read("refcoco", boxes, pictures=False)
    change(boxes / REFS, lambda refs: refs[0].update(split="train"))
    assert {e.split for e in read("refcoco", boxes, pictures=False)} == {"train"}
    lay_out(diagrams, "ai2d")
    (diagrams / "ai2d_test_ids.csv").write_text("0\n")
    assert read("ai2d", diagrams, pictures=False) == []
    (diagrams / "ai2d_test_ids.csv").write_text("1\n")
    assert [e.split for e in read("ai2d", diagrams, pictures=False)] == ["val"]


def test_ocid_ref_divides_pixels_by_the_size_of_the_picture_file(tmp_path: Path) -> None:
    picture(official(tmp_path, "ocid_ref")[0].image, (1000, 400))
    assert read("ocid_ref", tmp_path)[0].gold == [0.01, 0.05, 0.11, 0.55]


@pytest.mark.parametrize(
    ("name", "file", "edit", "message"),
    [
        ("vqav2", VQA_QUESTIONS, lambda v: v["questions"][0].update(question_id=9), r"0: .*tion 9"),
        ("vqav2", VQA_QUESTIONS, lambda v: v["questions"].append(v["questions"][0]), "1: id 1 st"),
        ("vqav2", VQA_QUESTIONS, lambda v: v.update(data_subtype="test2015"), "is of test2015, "),
        (
            "vqav2",
            VQA_ANSWERS,
            lambda v: v["annotations"].append(v["annotations"][0] | {"question_id": 5}),
            r"2 annotations for 1 questions.*question 5",
        ),
        (
            "textvqa",
            "TextVQA_0.5.1_val.json",
            lambda v: v["data"][0].update(answers=["nokia"]),
            r"data record 0: it has 1 answers, the metric compares 10.*format qa",
        ),
        (
            "textvqa_ocr",
            "TextVQA_0.5.1_val.json",
            lambda v: v["data"][0].update(question="year?"),
            r"has no question 'year\?' about picture 003a8ae2",
        ),
        ("vizwiz", "val.json", lambda v: v[0]["answers"].pop(), "9 answers"),
        ("vizwiz", "val.json", lambda v: v.append(v[0]), "stands there twice"),
        ("tallyqa", "test.json", lambda v: v[0].update(answer=16), "answer 16 is none of 16"),
        ("tallyqa", "test.json", lambda v: v[0].update(issimple=1), "'issimple' is 1"),
        (
            "ai2d",
            "questions/0.png.json",
            lambda v: v["questions"]["Which letter is the root?"].update(correctAnswer=4),
            "correctAnswer 4 is none of 4",
        ),
        (
            "refcoco",
            "instances.json",
            lambda v: v["annotations"][0].update(bbox=[4, 5, 640, 10]),
            "leaves the picture of 640 by 480",
        ),
        (
            "refcoco",
            "instances.json",
            lambda v: v["annotations"][0].update(id=12),
            r"record 0: annotation 11 is not in .*instances\.json",
        ),
        *(
            ("ocid_ref", OCID, lambda v, box=box: v["2"].update(bbox=box), "record '2': its bbox")
            for box in ("64, 120", "[1, 2, 3]", "[5, 5, 5, 9]", '["1", 2, 3, 4]', "null")
        ),
        ("pope", POPE, lambda v: v[2].update(label="maybe"), "line 3.*'maybe'"),
        ("pope", POPE, lambda v: v[2].pop("text"), "line 3: it has no 'text'"),
        ("pope", POPE, lambda v: v[2].update(question_id=1), "random-1.* twice"),
        ("pope", POPE, lambda v: v.append(["no"]), "line 4: it is a list"),
        ("pope", POPE, lambda v: v[2].update(image="../x.jpg"), "line 3: picture .* leads out of"),
    ],
)
def test_a_broken_record_is_named(
    tmp_path: Path, name: str, file: str, edit: Callable[[Any], Any], message: str
) -> None:
    official(tmp_path, name)
    change(tmp_path / file, edit)
    with pytest.raises(ValueError, match=message):
        read(name, tmp_path)


def test_a_key_that_stands_twice_and_a_line_that_is_no_json_are_refused(tmp_path: Path) -> None:
    official(tmp_path, "gqa")
    path = tmp_path / "testdev_balanced_questions.json"
    one = path.read_text().strip()[1:-1]
    path.write_text(f"{{{one}, {one}}}")
    with pytest.raises(ValueError, match="key '201' twice"):
        read("gqa", tmp_path)
    official(tmp_path, "pope")
    with (tmp_path / POPE).open("a") as stream:
        stream.write('{"question_id": 3')
    with pytest.raises(ValueError, match="line 4 is not JSON"):
        read("pope", tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "a"}, "it has no 'question'"),
        ({"question": "q"}, "it has no 'answer'"),
        ({"question": "q", "answer": "a", "answers": ["a"]}, "keep one of them"),
        ({"question": "q", "answers": []}, "empty list"),
        ({"question": "q", "answer": True}, "its 'answer' is True"),
        ({"question": "q", "answers": ["a", True]}, "neither a text nor a number"),
        ({"question": "q", "answer": "c", "choices": ["a1", "b1"]}, "none of its choices"),
        ({"question": "q", "answer": "A dog", "choices": ["A dog", "the dog"]}, "are equal"),
        ({"question": "q", "answer": "b1", "choices": ["b1"]}, "two or more"),
        ({"question": "<image> or <image>?", "answer": "a"}, "2 <image> marks, 1 pictures"),
    ],
)
def test_a_record_of_ones_own_that_cannot_be_scored_is_named(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    picture(tmp_path / "a.png")
    rows = [{"question": "q", "answer": "a", "image": "a.png"}, {"image": "a.png", **record}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"mine\.jsonl line 2: .*{message}"):
        read("qa", tmp_path)


def test_the_mark_of_a_single_picture_is_taken_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    one = {"question": "<image>\nWhich?", "answer": "a", "image": "a.png"}
    two = {"question": "<image> or <image>?", "answer": "a", "image": ["a.png", "a.png"]}
    (tmp_path / "questions.jsonl").write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    assert [e.question for e in read("qa", tmp_path)] == ["Which?", "<image> or <image>?"]


def test_several_files_that_could_be_meant_are_refused(tmp_path: Path) -> None:
    for part in ("valid", "test"):
        (tmp_path / f"vqa_questions_{part}.gzip").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match="several files like"):
        read("vqav2", tmp_path)


def test_of_both_subsets_as_downloaded_the_one_that_is_asked_is_read(tmp_path: Path) -> None:
    for folder in (tmp_path / "okvqa", tmp_path / "okvqa_train"):
        lay_out(folder, "okvqa")
        for file in BLOCKS["okvqa"]:
            text = (folder / file).read_text().replace("What sport", "Which sport")
            (folder / file.replace("val2014", "train2014")).write_text(text)
        (example,) = read("okvqa", folder, pictures=False)
        assert example.question.split()[0] == ("What" if folder.name == "okvqa" else "Which")


def test_an_unknown_benchmark_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no visual benchmark is called 'refcoc'; did you mean"):
        read_visual_task(tmp_path, "refcoc")
    for name, near in (("POPE", "pope"), ("RefCOCO+", ".*refcoco_plus"), ("VQAv2", "vqav2")):
        with pytest.raises(ValueError, match=rf"did you mean {near}.*\?"):
            read_visual_task(tmp_path, name)
    with pytest.raises(ValueError, match="it is a text task"):
        read_visual_task(tmp_path, "arc_easy")
    with pytest.raises(ValueError, match=r"there are vqav2, .*; another one's .* in format qa"):
        read_visual_task(tmp_path, "mmstar_v9")


class Attack:
    """Pickles as a call of os.system."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.trace}",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_names_code_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    official(tmp_path, "refcoco")
    trace = tmp_path / "attacked"
    attack = pickle.dumps([Attack(trace)], protocol=protocol)
    (tmp_path / REFS).write_bytes(attack)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is refused: it names .*system"):
        read("refcoco", tmp_path)
    assert not trace.exists()
    pickle.loads(attack)  # the attack is a real one
    assert trace.exists()
    (tmp_path / REFS).write_bytes(attack[: len(attack) // 2])
    with pytest.raises(ValueError, match="is refused"):
        read("refcoco", tmp_path)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return path


def test_pope_reads_the_real_question_files() -> None:
    examples = read("pope", shared("pope_questions"), pictures=False)
    assert len(examples) == 9000
    assert sum(example.gold == "yes" for example in examples) == 4500
    assert len({example.image for example in examples}) == 500


def test_vqav2_and_vsr_read_real_cuts_as_they_are(tmp_path: Path) -> None:
    coco, text = shared("coco_mini"), shared("vqa_v2_text")
    assert len(read("vqav2", coco)) == 73
    statements = read("vsr", coco)
    assert len(statements) == 24
    assert {example.gold for example in statements} == {"True", "False"}
    for part in ("questions", "annotatons"):
        (tmp_path / f"{part}.gzip").symlink_to(text / f"vqa_{part}_test.gzip")
    examples = read("vqav2", tmp_path, pictures=False)
    assert len(examples) == 2962
    scores = [vqa_accuracy(max(e.gold, key=e.gold.count), e.gold) for e in examples]
    assert 0.8 < sum(scores) / len(scores) < 1.0  # people disagree, and 1 is out of reach


def test_gqa_and_textvqa_read_real_samples(tmp_path: Path) -> None:
    folder = shared("vqa_official_samples")
    questions = folder / "allennlp_fixtures/gqa/questions.json"
    (tmp_path / "testdev_balanced_questions.json").symlink_to(questions)
    (tmp_path / "images").symlink_to(folder / "allennlp_fixtures/images/gqa")
    asked = read("gqa", tmp_path)
    assert [gqa_accuracy(f"{str(e.gold).title()}.", e.gold) for e in asked] == [1.0]
    sample = folder / "first100_items/textvqa/TextVQA_0.5.1_val.json_samples.json"
    (tmp_path / "TextVQA_0.5.1_val.json").symlink_to(sample)
    examples = read("textvqa", tmp_path, pictures=False)
    assert len(examples) == 100
    scores = [textvqa_accuracy(max(e.gold, key=e.gold.count), e.gold) for e in examples]
    assert 0.6 < sum(scores) / len(scores) < 1.0
