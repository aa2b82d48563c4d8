"""Predictions of others: the forms they come in, whose answer is whose, and what is refused."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from inputs import write_lines
from midstream.eval.find_task import read_visual_task
from midstream.eval.prediction_files import read_predictions
from midstream.eval.predictions import score_predictions

GOLD = {"random": "yn" * 3, "popular": "yy" + "nn" * 2, "adversarial": "ny" * 3}
WORDS = {"y": "yes", "n": "no"}


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """Three splits of six questions each, whose ids repeat; no picture anywhere."""
    folder = tmp_path / "pope"
    folder.mkdir()
    for split, golds in GOLD.items():
        rows = [
            {
                "question_id": number,
                "image": f"{split}.jpg",
                "text": f"Is there a {split} thing {number} in the image?",
                "label": WORDS[gold],
            }
            for number, gold in enumerate(golds, start=1)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(text)
    return folder


def score(folder: Path, rows: list[Any], file: str = "answers.jsonl", **how: Any) -> dict[str, Any]:
    """The score of lines on the benchmark that a folder is called by."""
    return score_predictions(folder, folder.name, write_lines(folder.parent / file, rows), **how)


def llava(split: str, said: str, first: int = 1) -> list[dict[str, Any]]:
    """As LLaVA writes answers: the question under prompt, the answer under text."""
    return [
        {
            "question_id": first + number,
            "prompt": f"Is there a {split} thing {number + 1} in the image?\nAnswer the question "
            "using a single word or phrase.",
            "text": f"{'Yes' if one == 'y' else 'No'}",
            "answer_id": "x",
            "model_id": "m",
        }
        for number, one in enumerate(said)
    ]


def test_answers_with_ids_and_words_find_their_split(pope: Path) -> None:
    row = score(pope, llava("popular", "yynnny"))
    assert row["score"] == pytest.approx(5 / 6)
    assert row["num_examples"] == 6
    assert "scored on split popular alone" in row["notes"]
    assert row["details"]["popular.recall"] == 1.0
    assert row["details"]["yes_rate"] == 0.5


def test_a_file_of_all_splits_is_matched_by_its_words_in_any_order(pope: Path) -> None:
    rows = llava("adversarial", GOLD["adversarial"]) + llava("random", "y" * 6, 1_000_001)
    rows += llava("popular", GOLD["popular"], 2_000_001)
    row = score(pope, rows)
    assert row["splits"] == {"random": 0.5, "popular": 1.0, "adversarial": 1.0}
    assert row["score"] == pytest.approx(2.5 / 3)


def test_the_official_form_has_no_ids_and_a_name_or_an_option_says_the_split(pope: Path) -> None:
    rows = [{"answer": "No, it is not."}] * 6
    assert score(pope, rows, "coco_random_answers.json")["score"] == 0.5
    assert score(pope, rows, split="popular")["score"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("more", [{}, {"image": "popular.jpg"}])
def test_the_official_form_of_one_split_is_known_by_its_words(
    pope: Path, more: dict[str, str]
) -> None:
    asked = [f"Is there a popular thing {i + 1} in the image?" for i in range(6)]
    row = score(pope, [{"question": one, "answer": "yes, there is", **more} for one in asked])
    assert "scored on split popular alone" in row["notes"]
    assert row["score"] == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="nothing says which is whose"):
        score(pope, [{"answer": "yes"}] * 18)


def test_predictions_of_a_larger_set_can_be_cut_to_what_is_here(gqa: Path) -> None:
    rows = [{"question_id": str(100 + i), "answer": "red"} for i in range(5)]
    with pytest.raises(ValueError, match="--ignore-unknown"):
        score(gqa, rows)
    row = score(gqa, rows, ignore_unknown=True)
    assert row["score"] == pytest.approx(1 / 3)
    assert row["notes"] == ["2 predictions of no question here were left out"]
    assert row["shortened"] == "3 of 12,578 examples"


def test_a_prediction_goes_before_an_answer_that_is_the_gold_one(pope: Path) -> None:
    rows = [
        {"question_id": i + 1, "text": f"Is there a random thing {i + 1} in the image?"}
        for i in range(6)
    ]
    golds = [WORDS[gold] for gold in GOLD["random"]]
    never = [{**row, "label": g, "answer": "no"} for row, g in zip(rows, golds, strict=True)]
    row = score(pope, never)
    assert (row["score"], row["details"]["yes_rate"]) == (0.5, 0.0)
    both = [{**row, "answer": g, "response": "no"} for row, g in zip(rows, golds, strict=True)]
    row = score(pope, both, split="random")
    assert row["details"]["yes_rate"] == 0.0


def test_splits_that_cannot_be_told_apart_are_asked_for(pope: Path) -> None:
    rows = [{"question_id": i, "answer": "yes"} for i in range(1, 7)]
    with pytest.raises(ValueError, match=r"fit each of the splits random, popular.*--split"):
        score(pope, rows)
    with pytest.raises(ValueError, match="no split 'easy'; it has random, popular"):
        score(pope, rows, split="easy")


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    folder = tmp_path / "gqa"
    folder.mkdir()
    types = [("query", "attr"), ("verify", "obj"), ("query", "rel")]
    questions = {
        str(100 + number): {
            "imageId": f"n{number}",
            "question": f"What is {number}?",
            "answer": answer,
            "types": {"structural": types[number][0], "semantic": types[number][1]},
        }
        for number, answer in enumerate(("red", "yes", "t-shirt"))
    }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return folder


def test_official_files_have_the_official_score_and_its_parts(gqa: Path, tmp_path: Path) -> None:
    said = {"100": "red", "101": "no", "102": "t-shirt"}
    rows = [{"questionId": key, "prediction": text} for key, text in said.items()]
    (tmp_path / "predictions").write_text(json.dumps(rows, indent=1))
    row = score_predictions(gqa, "gqa", tmp_path / "predictions")
    assert row["score"] == pytest.approx(2 / 3)
    assert row["details"]["form=open"] == 1.0
    assert row["details"]["form=binary"] == 0.0
    assert row["details"]["semantic=rel"] == 1.0
    # The Prismatic authors strip the hyphen of the prediction alone.
    assert row["details"]["vlm-evaluation"] == pytest.approx(1 / 3)


def test_keys_are_read_in_any_spelling_and_answers_alone_are_told_to_be_in_order(gqa: Path) -> None:
    said = {"102": "t-shirt", "100": "red", "101": "no"}
    rows = [{"Question-ID": key, "Prediction": text, "note": ""} for key, text in said.items()]
    assert score(gqa, rows)["score"] == pytest.approx(2 / 3)
    rows = [{"key": key, "answer": text} for key, text in sorted(said.items())]
    row = score(gqa, rows)
    told = "nothing names the questions of these answers: matched by their order"
    assert (row["score"], row["notes"]) == (pytest.approx(2 / 3), [told])


def test_questions_without_a_prediction_are_refused_or_counted(gqa: Path) -> None:
    rows = [{"question_id": "100", "answer": "red"}]
    with pytest.raises(ValueError, match=r"1 of 3 questions of gqa; without an answer are 10"):
        score(gqa, rows)
    row = score(gqa, rows, missing_as_wrong=True)
    assert (row["score"], row["num_missing"]) == (pytest.approx(1 / 3), 2)
    assert any("2 questions without a prediction count as wrong" in note for note in row["notes"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": "100", "answer": "a"}] * 2, r"line 2 answers question 100 a second time"),
        (
            [{"question_id": "100", "answer": "a"}, {"question_id": "7", "answer": "a"}],
            r"line 2 answers question 7, which gqa does not have \(1 of 2",
        ),
        ([{"question_id": "7", "answer": "a"}], r"has id 7, a question here is called 10"),
        ([{"question_id": "100"}], r"line 1 has no answer, only question_id"),
        (["red"], "line 1 is a str, not an object"),
        ([{"id": "100", "question": "?", "answer": "a", "text": "b"}], "both an 'answer' and a"),
    ],
)
def test_what_is_wrong_with_a_predictions_file_is_said_with_its_line(
    gqa: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(gqa, rows)


def test_prompts_about_other_questions_are_refused_though_their_ids_match(pope: Path) -> None:
    rows = llava("popular", "yynnnn")[:2] + llava("adversarial", "nynyny")[2:]
    message = (
        r"popular\.jsonl: 4 of 6 prompts are about other questions than those of pope, split "
        r"popular: .* line 3 asks 'Is there a adversarial thing 3 .*', question 3 here is "
        r"'Is there a popular thing 3 in the image\?'"
    )
    for split in ("popular", None):
        with pytest.raises(ValueError, match=message):
            score(pope, rows, "answers-popular.jsonl", split=split)
    # Prompts that not every line repeats are looked at where they are.
    for row in rows[:5]:
        row.pop("prompt")
    with pytest.raises(ValueError, match="1 of 1 prompts are about other questions"):
        score(pope, rows, split="popular")


@pytest.mark.parametrize("key", ["question_id", "id_of_no_use"])
def test_prompts_in_another_case_and_spacing_ask_the_same(pope: Path, key: str) -> None:
    rows = [
        {key: row.pop("question_id"), **row}
        | {"prompt": "USER:  " + row["prompt"].upper().replace(" ", "  ")}
        for row in llava("popular", "yynnny")
    ]
    assert score(pope, rows, split="popular")["score"] == pytest.approx(5 / 6)


@pytest.fixture
def tallyqa(tmp_path: Path) -> Path:
    """Counts of 0 to 5, the even ones simple."""
    folder = tmp_path / "tallyqa"
    folder.mkdir()
    rows = [
        {"question_id": 10 + i, "image": "a.jpg", "question": "How many?", "answer": i}
        | {"issimple": i % 2 == 0}
        for i in range(6)
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def test_ids_of_one_split_alone_say_so(tallyqa: Path) -> None:
    rows = [{"question_id": 10 + i, "answer": i} for i in (5, 1, 3)]
    row = score(tallyqa, rows, "simpler_answers.jsonl")
    assert (row["score"], row["num_examples"]) == (1.0, 3)
    assert "scored on split complex alone" in row["notes"]
    all_of_it = score(tallyqa, rows, missing_as_wrong=True)
    assert (all_of_it["score"], all_of_it["num_examples"]) == (0.5, 6)
    # What a file is called counts for less.
    assert score(tallyqa, rows, "simple_answers.jsonl")["notes"] == row["notes"][:1]
    row = score(tallyqa, rows[:2], "tallyqa_complex.jsonl", missing_as_wrong=True)
    assert row["num_examples"] == 3
    with pytest.raises(ValueError, match="answers 2 of 6 questions"):
        score(tallyqa, rows[:2])


def test_answers_that_cannot_be_read_are_shown_and_refused_where_none_can(tallyqa: Path) -> None:
    said: list[Any] = [0, "B", "two", "(D) 3", "four dogs", "Answer: F"]
    row = score(tallyqa, [{"id": 10 + i, "answer": text} for i, text in enumerate(said)])
    assert (row["unparsable"], row["score"]) == (1, pytest.approx((2 / 3 + 1) / 2))
    assert any(
        re.match(
            r"1 of 6 answers cannot be read and .*line 5 has 'four dogs'; an answer is an op", note
        )
        for note in row["notes"]
    )
    with pytest.raises(ValueError, match=r"none of its 6 answers can be read: .*line 1 has 'many'"):
        score(tallyqa, [{"id": 10 + i, "answer": "many"} for i in range(6)])


@pytest.mark.parametrize("first", [0, 1])
def test_ids_that_number_the_predictions_are_their_order(gqa: Path, first: int) -> None:
    said = enumerate(("red", "yes", "x"))
    rows: list[dict[str, Any]] = [{"id": first + i, "answer": text} for i, text in said]
    row = score(gqa, rows[::-1])
    assert row["score"] == pytest.approx(2 / 3)
    assert "no question has these ids, which number them: matched by their order" in row["notes"]
    rows[0]["id"] += 5
    with pytest.raises(ValueError, match="nothing says which is whose"):
        score(gqa, rows)


def test_ids_of_which_some_name_questions_are_no_order(tallyqa: Path) -> None:
    records = json.loads((tallyqa / "test.json").read_text())
    for record, name in zip(records, (3, 1, 4, 2, 6, 5), strict=True):
        record["question_id"] = name
    (tallyqa / "test.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"question '?0"):
        score(tallyqa, [{"id": i, "answer": i} for i in range(6)])


def test_of_several_ids_that_counts_which_names_questions(gqa: Path) -> None:
    said = (("102", "t-shirt"), ("101", "yes"), ("100", "red"))
    row = score(gqa, [{"id": i, "idx": n, "answer": t} for i, (n, t) in enumerate(said)])
    assert row["score"] == 1.0
    assert not any("their order" in note for note in row["notes"])


def karpathy(folder: Path, told: dict[str, str]) -> Path:
    """COCO's captions by the pictures' files, whose numbers are other names of theirs."""
    folder.mkdir()
    images = [
        {"filename": name, "split": "test", "sentences": [{"raw": f"A dog sees the {what}."}]}
        | {"cocoid": int(name[-16:-4]) if "_" in name else name.removesuffix(".jpg")}
        for name, what in told.items()
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder


def test_ids_that_differ_by_zeros_alone_are_each_their_own(tmp_path: Path) -> None:
    folder = karpathy(tmp_path / "coco_captions", {"001.jpg": "moon", "1.jpg": "sun"})
    rows = [{"id": i, "answer": f"a dog sees the {w}"} for i, w in (("1", "sun"), ("001", "moon"))]
    assert score(folder, rows)["score"] == score(folder, rows[::-1])["score"] > 1


def test_zeros_before_an_id_and_a_pictures_number_name_the_same(tmp_path: Path) -> None:
    told = {f"COCO_val2014_{i:012d}.jpg": f"number {i}" for i in (42, 43)}
    folder = karpathy(tmp_path / "coco_captions", told)
    rows: list[dict[str, Any]] = [
        {"image_id": i, "caption": f"a dog sees the number {i}"} for i in (43, 42)
    ]
    best = score(folder, rows)["score"]
    padded = [{"id": f"{row['image_id']:012d}", "answer": row["caption"]} for row in rows]
    assert score(folder, padded)["score"] == best
    swapped = [{**row, "image_id": 85 - row["image_id"]} for row in rows]
    assert score(folder, swapped)["score"] < best


def test_boxes_of_the_padded_square_are_scored_where_one_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "ocid_ref"
    folder.mkdir()
    record = {"scene_path": "a.png", "bbox": "[0, 0, 320, 48]", "sentence": "the cup"}
    (folder / "val_expressions.json").write_text(json.dumps({"1": record}))
    rows = [{"id": 1, "answer": "[0.0, 0.12, 0.5, 0.2]"}]  # 640 by 480 pixels: y' = .75 y + .125
    assert score(folder, rows)["score"] == 0
    row = score(folder, rows, box_frame="square")
    assert (row["score"], row["details"]["mean_iou"]) == (1.0, pytest.approx(1.0))


def test_boxes_of_the_padded_square_are_of_tasks_with_boxes(tallyqa: Path) -> None:
    with pytest.raises(ValueError, match="tallyqa asks for no boxes; leave --box-frame out"):
        score(tallyqa, [{"id": 10, "answer": 0}], box_frame="square")


@pytest.mark.parametrize(
    ("said", "right", "told"),
    [
        (("red", " ", ""), 1, "2 of 3 answers are empty"),
        (("red</s>", "yes<|im_end|>", "x"), 0, "2 of 3 answers hold a chat template's marks"),
    ],
)
def test_empty_answers_and_those_with_a_templates_marks_are_wrong_and_told(
    gqa: Path, said: tuple[str, ...], right: int, told: str
) -> None:
    row = score(gqa, [{"id": 100 + i, "answer": text} for i, text in enumerate(said)])
    assert row["score"] == pytest.approx(right / 3)
    assert [note for note in row["notes"] if note.startswith(told)] == row["notes"]


@pytest.mark.parametrize("around", ["The answer is {}.", "USER: ? ASSISTANT: {}", "{}\n\nUSER: ?"])
def test_right_answers_among_other_words_score_nothing_and_are_told(gqa: Path, around: str) -> None:
    golds = ("red", "yes", "t-shirt")
    row = score(gqa, [{"id": 100 + i, "answer": around.format(t)} for i, t in enumerate(golds)])
    assert row["score"] == 0
    assert any("3 of 3 wrong answers hold a right one" in note for note in row["notes"])
    row = score(
        gqa, [{"id": 100 + i, "answer": t} for i, t in enumerate(("red", "yesterday", "x"))]
    )
    assert not row["notes"]


def test_answers_that_are_the_gold_ones_beside_other_texts_are_told(gqa: Path) -> None:
    golds = ("red", "yes", "t-shirt")
    rows = [{"id": 100 + i, "answer": t, "llava-1.5": "no"} for i, t in enumerate(golds)]
    row = score(gqa, rows)
    assert row["score"] == 1
    assert any("line 1 has other texts under llava-1.5" in note for note in row["notes"])


def test_pictures_do_not_say_the_order_of_answers(gqa: Path) -> None:
    rows = [{"image_id": 7 - n, "answer": text} for n, text in enumerate(("t-shirt", "yes", "red"))]
    with pytest.raises(ValueError, match=r"nothing says which is whose.* has id 7"):
        score(gqa, rows)


def test_a_part_of_a_word_is_not_the_question(gqa: Path) -> None:
    path = gqa / "testdev_balanced_questions.json"
    path.write_text(re.sub(r"What is (\d)\?", r"the cat \1", path.read_text()))
    rows = [{"question_id": str(100 + n), "prompt": f"the cat {n}1", "text": "x"} for n in range(3)]
    with pytest.raises(ValueError, match="3 of 3 prompts"):
        score(gqa, rows)


def test_recognised_words_are_found_by_questions_in_another_case(tmp_path: Path) -> None:
    folder = tmp_path / "textvqa_ocr"
    folder.mkdir()
    asked = [("what Brand?", "a"), (" What brand? ", "b"), ("what size?", "c")]
    data = [
        {"question_id": 7 + i, "image_id": "a1", "question": question, "answers": [answer] * 10}
        for i, (question, answer) in enumerate(asked)
    ]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    words = "{}\nReference OCR token: {}\nAnswer the question using a single word or phrase."
    listed = [("What brand?", "NOKIA"), ("What size?", "XL")]
    rows = [{"question_id": "a1", "text": words.format(*pair)} for pair in listed]
    write_lines(folder / "textvqa_val_v051_ocr.jsonl", rows)
    examples = read_visual_task(folder, "textvqa_ocr", pictures=False, shuffled=False).examples
    assert [example.question.split(": ")[-1] for example in examples] == ["NOKIA", "NOKIA", "XL"]
    answers = [{"question_id": "a1", "prompt": q.lower(), "text": a} for q, a in asked]
    assert score(folder, answers)["score"] == 1.0


@pytest.mark.parametrize("nothing", [float("nan"), None])
def test_null_and_nan_are_no_answers_and_wrong_only_where_one_says_so(
    gqa: Path, nothing: float | None
) -> None:
    rows = [{"question_id": 100 + i, "prediction": "red", "answer": "yes"} for i in range(3)]
    rows[1]["prediction"] = nothing  # and the right answer beside it is not taken for it
    message = (
        r"answers 2 of 3 .* without an answer are 101 \(.*line 2 is null or NaN\); .*missing-as"
    )
    with pytest.raises(ValueError, match=message):
        score(gqa, rows)
    # In their order, too.
    for said in (rows, [{"answer": row["prediction"]} for row in rows]):
        row = score(gqa, said, missing_as_wrong=True)
        assert (row["score"], row["num_missing"]) == (pytest.approx(1 / 3), 1)


def test_one_text_for_every_question_is_none(gqa: Path) -> None:
    rows = [{"id": key, "question": "x", "model_output": said} for key, said in SAID.items()]
    row = score(gqa, rows)
    assert row["score"] == pytest.approx(2 / 3)


SAID = {"100": "red", "101": 'no, "not"\nat all', "102": "t-shirt"}


def test_a_table_is_read_whose_answer_column_is_the_right_one(gqa: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["index", "question", "answer", "prediction"])
        for number, (key, said) in enumerate(SAID.items()):
            writer.writerow([key, f"What is {number}?", "gold", said])
    assert [one.answer for one in read_predictions(path)] == list(SAID.values())
    assert score_predictions(gqa, "gqa", path)["score"] == pytest.approx(2 / 3)
    path.write_text(path.read_text().replace("prediction", "words"))
    with pytest.raises(ValueError, match=r"row 2 has no answer, .* VLMEvalKit's .*add prediction$"):
        read_predictions(path)
    path.write_text("index,prediction\n1\n")
    with pytest.raises(ValueError, match="row 2 has 1 cells, the first row names 2 columns"):
        read_predictions(path)


def test_samples_of_lmms_eval_without_ids_come_in_their_documents_order(
    gqa: Path, tmp_path: Path
) -> None:
    said = ["red", "no", "t-shirt"]
    rows = [
        {"doc_id": i, "target": "gold", "resps": [[text]], "filtered_resps": [text]}
        for i, text in enumerate(said)
    ]
    file = write_lines(tmp_path / "samples.jsonl", rows[::-1])
    assert [one.answer for one in read_predictions(file)] == said
    assert score(gqa, rows[::-1])["score"] == pytest.approx(2 / 3)
    scored = [{**row, "filtered_resps": [[-1.5, False], [-2.0, True]]} for row in rows]
    with pytest.raises(ValueError, match="which is no answer"):
        read_predictions(write_lines(tmp_path / "choices.jsonl", scored))
