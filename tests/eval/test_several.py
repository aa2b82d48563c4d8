"""Benchmarks of several pictures: official tables, scores, blind and order-swapped answers."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from answerers import Fake, ignore, kept
from midstream.config import Evaluation
from midstream.eval.benchmark import evaluate
from midstream.eval.benchmark_records import UNPACKED, Shown, VisualExample, all_pictures, places
from midstream.eval.find_task import VisualTask, other_pictures
from midstream.eval.scoring import mantis_accuracy, nlvr2_numbers
from midstream.eval.tasks import VISUAL_FORMATS


def cell(shade: int) -> dict[str, Any]:
    """A picture as a table holds it."""
    stream = io.BytesIO()
    Image.new("L", (4, 4), shade).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def shades(example: VisualExample) -> list[int]:
    return [shade_of(path) for path in example.pictures]


def shade_of(path: Path) -> int:
    with Image.open(path) as picture:
        return int(picture.getpixel((0, 0)))  # type: ignore[arg-type]


BLINK = {
    "idx": "val_Counting_1",
    "sub_task": "Counting",
    "question": "How many?",
    "image_1": cell(1),
    "image_2": cell(2),
    "image_3": None,
    "image_4": None,
    "choices": ["two", "three"],
    "answer": "(B)",
    "prompt": "How many?\nSelect from the following choices.\n(A) two\n(B) three",
}
MUIRBENCH = {
    "idx": "0",
    "task": "Visual Retrieval",
    "image_relation": "Cropped/Zoomed",
    "image_type": "Photography",
    "question": "Which shows <image> whole?",
    "options": ["<image>", "<image>", "None of them"],
    "answer": "B",
    "image_list": [cell(1), cell(2), cell(3)],
    "counterpart_idx": "1",
}
MANTIS = {
    "id": "mantis_eval_0",
    "question_type": "multi-choice",
    "question": "<image> <image> Which is darker?",
    "images": [cell(1), cell(2)],
    "options": ["(A) the first", "the second"],
    "answer": "A",
    "data_source": "web",
    "category": "compare",
}
FREE = MANTIS | {
    "id": "mantis_eval_1",
    "question_type": "short-answer",
    "options": [],
    "answer": "Yes",
}
TABLES = {
    "blink": ("Counting/val-00000-of-00001.parquet", [BLINK]),
    "muirbench": ("data/test-00000-of-00001.parquet", [MUIRBENCH]),
    "mantis_eval": ("mantis_eval/test-00000-of-00001.parquet", [MANTIS, FREE]),
}


def write(folder: Path, name: str, edit: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    file, rows = TABLES[name]
    rows = [dict(row) for row in rows]
    edit(rows[0])
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / file)


READ = {
    "blink": (1, [1, 2], {"index": 1, "choices": ["two", "three"]}, BLINK["prompt"]),
    "muirbench": (
        1,
        [1, 2, 3],
        {"index": 1, "choices": ["<image>", "<image>", "None of them"]},
        "Question: Which shows <image> whole?\nChoices:\n(A) <image>\n(B) <image>\n"
        "(C) None of them\nHint: Please provide the correct option letter, such as A, B, C, D, "
        "directly.\nAnswer:",
    ),
    "mantis_eval": (
        2,
        [1, 2],
        {"index": 0, "choices": ["the first", "the second"]},
        "<image> <image> Which is darker?\n (A) the first\n (B) the second\n"
        "Answer with the option's letter from the given choices directly.",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_official_tables_become_examples_whose_pictures_are_files(
    name: str, tmp_path: Path
) -> None:
    write(tmp_path, name)
    how = VISUAL_FORMATS[name]
    bare = how.read(tmp_path, pictures=False)
    assert not (tmp_path / UNPACKED).exists()
    examples = how.read(tmp_path)
    assert examples == bare == how.read(tmp_path)
    count, shown, gold, prompt = READ[name]
    first = examples[0]
    assert (len(examples), shades(first), first.gold) == (count, shown, gold)
    assert how.prompt(first.question, "official") == prompt
    assert how.score("AB"[gold["index"]], gold) == 1
    # Two records show the same two pictures.
    assert len(list((tmp_path / UNPACKED).iterdir())) == len(shown)


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        ("blink", lambda row: row.update(answer="(C)"), r"row 0: its answer '\(C\)' names none"),
        ("blink", lambda row: row.update(answer="hidden"), "names none of its 2 options"),
        ("blink", lambda row: row.update(image_1={"bytes": b"", "path": None}), "no bytes"),
        ("muirbench", lambda row: row.update(image_list=[cell(1)]), "3 <image> marks, 1 pictures"),
        ("muirbench", lambda row: row.pop("image_list"), "has no column 'image_list'"),
        ("mantis_eval", lambda row: row.update(options=["x"] * 17), "17 options, there are 16"),
        ("mantis_eval", lambda row: row.update(question_type="essay"), "not multi-choice or short"),
        ("mantis_eval", lambda row: row.update(images=[], question="?"), "it has no pictures"),
    ],
)
def test_a_broken_row_is_named(
    name: str, edit: Callable[[dict[str, Any]], Any], told: str, tmp_path: Path
) -> None:
    write(tmp_path, name, edit)
    with pytest.raises(ValueError, match=told):
        VISUAL_FORMATS[name].read(tmp_path)


def test_marks_become_places_and_pictures_without_one_stand_first() -> None:
    assert places("Which?", 2) == ("Which?", (0, 0))
    assert places("<image> <image>\nWhich?", 2) == ("Which?", (0, 0))
    assert places("Is <image> like <image>?", 3) == ("Is  like ?", (0, 3, 9))
    assert places(" a <image>\n", 1) == ("a", (1,))
    with pytest.raises(ValueError, match="2 <image> marks and 1 pictures"):
        places("<image><image>", 1)


def test_mantis_eval_reads_options_as_its_own_code_does() -> None:
    gold = {"index": 1, "choices": ["11", "22"]}
    # Without a letter the option's own text counts; the first letter of "the second" is T.
    for text in ("B", "(b)", "I think ... Final Answer: B", "Answer: B", "22"):
        assert mantis_accuracy(text, gold) == 1, text
    for text in ("A", "the second", ""):
        assert mantis_accuracy(text, gold) == 0, text


def test_mantis_eval_compares_free_answers_lowered() -> None:
    assert mantis_accuracy("So. Final answer: yes", {"answers": ["Yes"]}) == 1
    assert mantis_accuracy("yes.", {"answers": ["Yes"]}) == 0


def pair(key: str, gold: str, left: str, right: str) -> VisualExample:
    return VisualExample(key, "?", Path(left), gold, choices=("True", "False"), more=(Path(right),))


def test_nlvr2_is_consistent_where_all_pairs_of_a_sentence_are_right() -> None:
    keys = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0"]
    examples = [pair(key, "True", f"{key}l", f"{key}r") for key in keys]
    said = ["True", "false", "true.", "True"]
    assert nlvr2_numbers(said, examples) == {"consistency": pytest.approx(2 / 3)}


def test_blind_pictures_are_those_of_another_question_as_many_as_its_own() -> None:
    examples = tuple(
        VisualExample(str(n), "?", Path(f"{n}-0"), "", more=tuple(Path(f"{n}-{k}") for k in more))
        for n, more in enumerate([(), (1,), (1,), (1, 2), ()])
    )
    task = VisualTask("some", VISUAL_FORMATS["blink"], 0.0, examples, 5)
    found = other_pictures(task)
    assert [len(own) for own in found] == [1, 2, 2, 3, 1]
    for example, other in zip(examples, found, strict=True):
        assert not {str(path)[0] for path in other} & {example.example_id}
    assert sorted(own[0] for own in found) == sorted(e.image for e in examples)


def test_a_blind_picture_is_none_of_the_questions_own_where_questions_share_some() -> None:
    def task_of(*pairs: str) -> VisualTask:
        examples = tuple(pair(str(n), "True", *own) for n, own in enumerate(pairs))
        return VisualTask("some", VISUAL_FORMATS["nlvr2"], 0.0, examples, len(pairs))

    for pairs in (("ab", "bc", "cd", "da"), ("ab", "bc", "cd", "de", "ef", "fa")):
        task = task_of(*pairs)
        for example, other in zip(task.examples, other_pictures(task), strict=True):
            assert not {*example.pictures} & {*other}
    with pytest.raises(ValueError, match="share so many pictures"):
        other_pictures(task_of("ab", "ac", "ad", "ae"))


def nlvr2(folder: Path) -> None:
    folder.mkdir()
    lines = []
    for number in range(6):
        key, label = f"test1-{number}-0", "True" if number % 2 else "False"
        for side in (0, 1):
            Image.new("L", (4, 4), 10 * number + side).save(folder / f"{key}-img{side}.png")
        record = {"identifier": f"{key}-0", "sentence": f"The left is {number}.", "label": label}
        lines.append(json.dumps(record))
    (folder / "test1.json").write_text("\n".join(lines))


def row_of(folder: Path, fake: Fake) -> dict[str, Any]:
    evaluation = Evaluation(visual_tasks=("nlvr2",), fixed_answers="text")
    row: dict[str, Any] = evaluate(kept(fake), evaluation, folder, folder / "out", ignore)
    return row["tasks"]["nlvr2"]


def test_a_model_that_ignores_places_is_seen_by_the_order_swapped_score(tmp_path: Path) -> None:
    """One looks at the left picture, the other at both whatever their order."""
    nlvr2(tmp_path / "nlvr2")

    def by_left(_: str, image: Any) -> str:
        left = shade_of(image.pictures[0])
        return str(left % 10 == 0 and left // 10 % 2 == 1)

    def by_both(_: str, image: Any) -> str:
        return str(sum(map(shade_of, image.pictures)) // 20 % 2 == 1)

    ordered, blind = Fake(by_left, weights="left"), Fake(by_both, weights="both")
    one = row_of(tmp_path, ordered)
    table = pq.read_table(tmp_path / "out/predictions/nlvr2.parquet")
    assert set(table["swapped_prediction"].to_pylist()) == {"False"}
    two = row_of(tmp_path, blind)
    assert (one["score"], two["score"]) == (1.0, 1.0)
    assert one["details"]["order_swapped.score"] == 0.5
    assert two["details"]["order_swapped.score"] == two["details"]["order_swapped.before"] == 1.0
    shown = [request[1] for request in ordered.asked]
    assert all(isinstance(image, Shown) and len(all_pictures(image)) == 2 for image in shown)
    # As they are, another question's, the other way round.
    assert len(shown) == 18
