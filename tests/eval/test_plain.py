"""Format qa: questions, answers and pictures in JSON lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from midstream.eval.benchmark import score_visual
from midstream.eval.find_task import VisualTask, read_visual_task
from midstream.eval.scoring import qa_accuracy
from midstream.eval.tasks import VISUAL_FORMATS, VisualExample


def write(folder: Path, *records: dict[str, Any], name: str = "questions.jsonl") -> None:
    for record in records:
        path = folder / record.get("image", "a.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3)).save(path, format="PNG")
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def read(folder: Path) -> list[VisualExample]:
    return VISUAL_FORMATS["qa"].read(folder)


def test_every_field_is_read_and_pictures_have_any_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"question": "How many?", "answer": 2, "image": "Ein Bild (1).PNG"},
        {"question": "Who?", "answers": ["Ann", "her"], "image": "deep/b.jpeg", "split": "hard"},
        {"question": "Is it?", "answer": "no", "choices": ["yes", "no"], "image": "c", "id": "x"},
    )
    one, two, three = read(tmp_path)
    assert (one.example_id, one.gold, one.image) == ("1", ["2"], tmp_path / "Ein Bild (1).PNG")
    assert (two.example_id, two.gold, two.split) == ("2", ["Ann", "her"], "hard")
    assert (three.example_id, three.gold, three.choices) == ("x", ["no"], ("yes", "no"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "a"}, "it has no 'question'"),
        ({"question": "q"}, "it has no 'answer'"),
        ({"question": "q", "answer": "a", "answers": ["a"]}, "keep one of them"),
        ({"question": "q", "answers": []}, "empty list"),
        ({"question": "q", "answer": True}, "neither a text nor a number"),
        ({"question": "q", "answer": "c", "choices": ["a1", "b1"]}, "none of its choices"),
        ({"question": "q", "answer": "A dog", "choices": ["A dog", "the dog"]}, "are equal"),
        ({"question": "q", "answer": "b1", "choices": ["b1"]}, "two or more"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    good = {"question": "q", "answer": "a", "image": "a.png"}
    write(tmp_path, good, {"image": "a.png", **record})
    with pytest.raises(ValueError, match=rf"questions\.jsonl line 2: .*{message}"):
        read(tmp_path)


def test_an_id_that_stands_twice_and_two_files_are_refused(tmp_path: Path) -> None:
    record = {"question": "q", "answer": "a", "image": "a.png", "id": 7}
    write(tmp_path, record, record, name="one.jsonl")
    with pytest.raises(ValueError, match="id 7 stands there twice"):
        read(tmp_path)
    write(tmp_path, record, name="two.jsonl")
    with pytest.raises(ValueError, match="several files"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("No", ["no"], 1.0),
        (" the two dogs.\n", ["2 dogs"], 1.0),
        ("A", ["a"], 1.0),
        ("B", ["A"], 0.0),
        ("An", ["a"], 0.0),
        ("1,000", ["1000"], 1.0),
        ("dont know", ["Don't know!"], 1.0),
        ("red", ["blue", "Red"], 1.0),
        ("reddish", ["red"], 0.0),
        ("", ["no"], 0.0),
        ("?", ["!"], 0.0),
    ],
)
def test_answers_are_compared_normalised_though_there_is_one(
    prediction: str, answers: list[str], score: float
) -> None:
    assert qa_accuracy(prediction, answers) == score


def test_a_world_says_what_guessing_scores(tmp_path: Path) -> None:
    write(tmp_path / "bench/mine", {"question": "q", "answer": "a", "image": "a.png"})
    entry = {"visual_tasks": {"mine": {"format": "qa", "chance": 0.3}}}
    (tmp_path / "world.json").write_text(json.dumps(entry))
    assert read_visual_task(tmp_path, "mine").chance == 0.3


@pytest.mark.parametrize(
    ("golds", "said", "noted"),
    [
        (["no"], "No", True),
        (["no"], "no", False),
        (["no", "nope"], "No", False),
    ],
)
def test_ten_equal_answers_are_pointed_to_qa_where_normalising_changes_the_score(
    golds: list[str], said: str, noted: bool
) -> None:
    answers = (golds * 10)[:10]
    example = VisualExample("1", "Is it?", Path("a.jpg"), answers)
    task = VisualTask("mine", VISUAL_FORMATS["vqav2"], 0.0, (example,), 1)
    note = score_visual(task, [said])["note"]
    assert (note is not None) == noted
    if note is not None:
        assert "here 0.00; normalised 100.00" in note
        assert "format qa" in note
