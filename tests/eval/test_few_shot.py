"""Shots before questions: where they come from, which are left out, how they are asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from answerers import Fake, ignore, kept
from midstream.config import Evaluation
from midstream.config.training import FewShot
from midstream.eval.benchmark import evaluate
from midstream.eval.benchmark_records import Shot, Shown
from midstream.eval.few_shot import read_pool, read_shots, up_to_stop
from midstream.eval.find_task import read_visual_task

BRIEFLY = "\nAnswer the question using a single word or phrase."


def vqa(folder: Path, subset: str, questions: list[tuple[int, int, str, str]]) -> None:
    """VQA v2's files of (question's id, picture's number, question, answer); shade is number."""
    (folder / subset).mkdir(parents=True)
    for number in {number for _, number, _, _ in questions}:
        name = f"COCO_{subset}_{number:012d}.jpg"
        Image.new("L", (4, 4), number).save(folder / subset / name, format="PNG")
    asked = [
        {"question_id": key, "image_id": number, "question": text}
        for key, number, text, _ in questions
    ]
    told = [
        {"question_id": key, "answers": [{"answer": answer}] * 10}
        for key, _, _, answer in questions
    ]
    about = {"data_subtype": subset}
    (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(
        json.dumps(about | {"questions": asked})
    )
    (folder / f"v2_mscoco_{subset}_annotations.json").write_text(
        json.dumps(about | {"annotations": told})
    )


ASKED = [(n, n, f"Which {n}?", "one") for n in range(1, 5)]
TRAIN = [(100 + n, 100 + n, f"What {n}?", f"word {n}") for n in range(8)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    vqa(tmp_path / "vqav2", "val2014", ASKED)
    vqa(tmp_path / "vqav2_train", "train2014", TRAIN)
    return tmp_path


def shots_of(data: Path, **few: Any) -> list[tuple[Shot, ...]]:
    task = read_visual_task(data, "vqav2")
    evaluation = Evaluation(visual_tasks=("vqav2",), few_shot=FewShot(**few))
    found = read_shots(data, task, evaluation, lambda path: path.read_bytes().hex())
    assert found is not None
    return list(found.before)


def row_of(data: Path, fake: Fake, **options: Any) -> dict[str, Any]:
    evaluation = Evaluation.model_validate({"visual_tasks": ("vqav2",), "blind": False, **options})
    row: dict[str, Any] = evaluate(kept(fake), evaluation, data, data / "out", ignore)
    return row["tasks"]["vqav2"]


def test_each_question_has_shots_of_the_training_split_with_their_pictures(data: Path) -> None:
    found = shots_of(data, num_shots=4)
    texts = {f"What {n}?{BRIEFLY}": f"word {n}" for n in range(8)}
    for own in found:
        assert len({shot.question for shot in own}) == 4
        for shot in own:
            assert texts[shot.question] == shot.reply
            (picture,) = shot.pictures
            assert picture.parent == data / "vqav2_train/train2014"
    assert len({tuple(shot.question for shot in own) for own in found}) > 1
    assert found == shots_of(data, num_shots=4)
    assert found != shots_of(data, num_shots=4, seed=1)
    # A question's shots do not depend on which others are asked.
    task = read_visual_task(data, "vqav2", 2)
    few = Evaluation(visual_tasks=("vqav2",), few_shot=FewShot(num_shots=4))
    fewer = read_shots(data, task, few, lambda path: path.read_bytes().hex())
    assert fewer is not None
    assert list(fewer.before) == found[:2]


def test_shots_drawn_once_are_the_same_before_all_and_a_prefix_of_more(data: Path) -> None:
    four, six = (shots_of(data, num_shots=n, draw="once") for n in (4, 6))
    assert len(set(four)) == len(set(six)) == 1
    assert six[0][:4] == four[0]


def test_zero_shots_are_two_questions_without_their_pictures(data: Path) -> None:
    for own in shots_of(data, num_shots=0):
        assert [shot.pictures for shot in own] == [(), ()]
        assert all(shot.question.startswith("What ") for shot in own)


def test_a_training_question_that_is_asked_or_shows_what_is_asked_about_is_left_out(
    data: Path, tmp_path: Path
) -> None:
    # The same picture under another name, and the same question with another picture.
    own = [(1, 50, "which  1?", "x"), (201, 2, "Another?", "y"), *TRAIN]
    vqa(tmp_path / "more/vqav2_train", "train2014", own)
    vqa(tmp_path / "more/vqav2", "val2014", ASKED)
    fake = Fake(lambda *_: "one")
    row = row_of(tmp_path / "more", fake, few_shot={"num_shots": 8})
    assert row["details"]["few_shot.excluded"] == 2
    assert row["details"]["few_shot.pool"] == 8
    with pytest.raises(ValueError, match=r"8 training questions are left, 9 are wanted \(2 of 10"):
        row_of(tmp_path / "more", fake, few_shot={"num_shots": 9, "draw": "once"})
    # Where none else are left they stand before other questions, where these have their own draw.
    row = row_of(tmp_path / "more", fake, few_shot={"num_shots": 9})
    assert (row["details"]["few_shot.excluded"], row["details"]["few_shot.pool"]) == (2, 9)
    examples = read_visual_task(tmp_path / "more", "vqav2").examples
    shots = zip(examples, shots_of(tmp_path / "more", num_shots=9), strict=True)
    before = {e.example_id: " ".join(shot.question for shot in own) for e, own in shots}
    assert "which  1?" not in before["1"]
    assert "Another?" not in before["2"]
    assert "Another?" in before["3"] or "which  1?" in before["3"]
    with pytest.raises(ValueError, match=r"9 training questions are left, 10 are wanted"):
        shots_of(tmp_path / "more", num_shots=10)


def test_shots_are_asked_as_earlier_turns_and_answers_end_at_stop_words(data: Path) -> None:
    fake = Fake(lambda *_: "one\nIn: What next?")
    row = row_of(data, fake, few_shot={"num_shots": 4, "draw": "once"})
    assert (row["score"], row["shortened"]) == (1.0, "4 of 214,354 examples, behind 4 shots")
    assert row["details"]["few_shot.shots"] == 4
    for prompt, shown, *_ in fake.asked:
        assert isinstance(shown, Shown)
        assert prompt.startswith("Which ")
        assert (len(shown.shots), len(shown.pictures)) == (4, 1)
    paged = row_of(
        data, page := Fake(lambda *_: "one"), few_shot={"num_shots": 4, "layout": "document"}
    )
    assert all(isinstance(one[1], Shown) and one[1].document for one in page.asked)
    drawn = row_of(data, Fake(lambda *_: "one"), few_shot={"num_shots": 4})
    assert paged["key"] != drawn["key"]
    # Without shots nothing is read of the pool, and the key is another one.
    plain = row_of(data, Fake(lambda *_: "one\nIn: What next?"))
    assert (plain["score"], plain["shortened"]) == (0.0, "4 of 214,354 examples")
    assert plain["key"] != row["key"]
    assert [key for key in plain["details"] if "shot" in key] == []
    assert up_to_stop("red") == "red"


def test_a_benchmark_without_a_training_split_is_named(data: Path) -> None:
    (data / "vqav2_train").rename(data / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"shots for vqav2: .*vqav2_train does not"):
        row_of(data, Fake(), few_shot={"num_shots": 4})
    world = {"visual_tasks": {"vqav2": {"format": "vqav2", "chance": 0}}, "text_tasks": {}}
    (data / "world.json").write_text(json.dumps(world))
    with pytest.raises(FileNotFoundError, match=r"shots for vqav2: .* lists no task 'vqav2_train'"):
        read_pool(data, "vqav2")
