"""The files that tools leave their answers in."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import write_lines
from midstream.eval.prediction_files import read_predictions

READ = [("7", "red"), ("8", "2")]
RECORDS = [{"question_id": 7, "answer": "red"}, {"question_id": 8, "answer": "2"}]


def read(path: Path, content: Any) -> list[tuple[str | None, str | None]]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [(one.name, one.answer) for one in read_predictions(path)]


@pytest.mark.parametrize("key", ["results", "predictions", "logs"])
def test_one_list_of_records_in_an_object_about_the_run_is_read(tmp_path: Path, key: str) -> None:
    about = {"args": {"model": "m"}, "time": "now", "tasks": ["vqav2"]}
    assert read(tmp_path / "p.json", {**about, key: RECORDS}) == READ


@pytest.mark.parametrize(
    "records",
    [
        [{"prompt": f"<image>{id}", "predict": text, "label": "x", "id": id} for id, text in READ],
        [{"identifier": id, "prediction": text} for id, text in READ],
        [{"doc": {"idx": id}, "filtered_resps": [text]} for id, text in READ],
        [{"image_id": int(id), "caption": text} for id, text in READ],
    ],
)
def test_ids_and_answers_stand_under_the_keys_of_other_tools(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    assert read(tmp_path / "p.json", records) == READ


@pytest.mark.parametrize("key", ["llava_answer", "model_pred", "result", "reply", "decoded"])
def test_what_a_model_said_is_not_told_from_a_gold_answer_by_guessing(
    tmp_path: Path, key: str
) -> None:
    assert read(tmp_path / "p.json", [{"question_id": 7, key: "red"}]) == READ[:1]
    with pytest.raises(ValueError, match=f"has 'answer' beside '{key}'"):
        read(tmp_path / "p.json", [{"question_id": 7, "answer": "gold", key: "red"}])
    gold = [{"question_id": 7, "answer": "red", "gold_answer": "x", "correct_answers": "x"}]
    assert read(tmp_path / "p.json", gold) == READ[:1]


@pytest.mark.parametrize(
    "table",
    [
        "question_id;answer\n7;red\n8;2\n",
        '"question_id","answer"\n"7","red"\n"8","2"\n',
        "question_id, answer\r\n7,red\r\n8,2\r\n\r\n",
        ",index,answer\n0,7,red\n1,8,2\n,,\n",
        f"index\timage\tquestion\tanswer\tprediction\n7\t{'A' * 200_000}\t?\tgold\tred\n"
        f"8\t{'B' * 200_000}\t?\tgold\t2\n",
    ],
)
def test_tables_have_their_own_separators_quotes_and_empty_rows(tmp_path: Path, table: str) -> None:
    assert read(tmp_path / "p.csv", table) == READ


def test_a_parquet_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"example_id": [7, 8, 9], "prediction": ["red", "2", None]}), path)
    assert [(one.name, one.answer) for one in read_predictions(path)] == [*READ, ("9", None)]
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"p\.parquet is no whole Parquet table"):
        read_predictions(path)


def test_a_broken_workbook_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_workbook(*_: Any, **__: Any) -> None:
        raise KeyError("no item named '[Content_Types].xml'")

    stand_in = SimpleNamespace(load_workbook=load_workbook)
    monkeypatch.setitem(sys.modules, "openpyxl", stand_in)
    (tmp_path / "p.XLSX").touch()
    with pytest.raises(ValueError, match=r"p\.XLSX is no whole Excel table .*save it anew"):
        read_predictions(tmp_path / "p.XLSX")


def test_a_first_line_longer_than_a_tables_cell_is_read(tmp_path: Path) -> None:
    rows = [{"id": i, "doc": "x" * 200_000, "answer": "red"} for i in (7, 8)]
    assert read(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == [
        ("7", "red"),
        ("8", "red"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"7": "red", "8": "2", "7": "blue"}', "holds key '7' twice"),
        (json.dumps(RECORDS, indent=1)[:-9], r"is not JSON \(line 8: .*was it written whole"),
        ('[{"question_id": 7, "answ', r"is not JSON \(line 1: .*was it written whole"),
        ([{"id": 7, "response": {"choices": [0] * 999}}], r"\[\.\.\.\] under 'response'"),
        ("question_id,answer\n", "is empty"),
        ({"questions": [{"id": 7}], "answers": [{"id": 7}]}, r"\('questions', 'answers'\); give"),
    ],
)
def test_a_file_that_is_cut_or_says_two_things_is_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path / "p.json", content)
    assert len(str(raised.value)) < 500 + len(str(tmp_path))


def test_a_folder_of_parts_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; give one file"):
        read_predictions(tmp_path)


def test_an_absent_an_empty_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"p\.jsonl does not exist"):
        read_predictions(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"p\.jsonl is empty"):
        read_predictions(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"id": 1, "answer": "a"}\n{"id": 2, "ans')
    with pytest.raises(ValueError, match=r"p\.jsonl line 2 is not JSON"):
        read_predictions(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (["yes"], "yes"),
        ([["yes"]], "yes"),
        (" yes\n", "yes"),
        ([" yes\n"], "yes"),
        (2, "2"),
        (2.0, "2"),
        (2.5, "2.5"),
        ("2.0", "2.0"),
        ([0.1, 0.2, 0.3, 0.4], "[0.1, 0.2, 0.3, 0.4]"),
        (float("nan"), None),
        ([float("nan")], None),
        (None, None),
    ],
)
def test_an_answer_is_cleaned_in_the_same_way_in_every_layout(
    tmp_path: Path, answer: Any, read: str | None
) -> None:
    record = {"question_id": 1, "answer": answer}
    layouts: dict[str, Any] = {
        "line": record,
        "list": [record],
        "pretty": record,
        "map": {"1": answer},
        "vlm-evaluation": {"1": {"question_id": 1, "model_output": answer}},
        "lmms-eval": {"doc_id": 0, "doc": {"question_id": 1}, "filtered_resps": [answer]},
    }
    for name, value in layouts.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(value, indent=2 if name == "pretty" else None))
        assert [(one.name, one.answer) for one in read_predictions(path)] == [("1", read)], name


def test_a_text_in_utf_16_is_read_and_another_encoding_told(tmp_path: Path) -> None:
    file = tmp_path / "answers.csv"
    file.write_text("question_id,answer\n1,rouge foncé\n", encoding="utf-16")
    assert read_predictions(file)[0].answer == "rouge foncé"
    file.write_text("question_id,answer\n1,rouge foncé\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"no whole text file .*; save it as UTF-8, or fetch"):
        read_predictions(file)


def test_what_a_model_said_is_read_under_other_names_but_not_beside_an_answer(
    tmp_path: Path,
) -> None:
    said = {"question_id": 1, "model_response": "red", "response_id": "a7", "pred_score": 0.5}
    (one,) = read_predictions(write_lines(tmp_path / "a.jsonl", [said]))
    assert (one.name, one.answer) == ("1", "red")
    file = write_lines(tmp_path / "b.jsonl", [said | {"answer": "blue"}])
    with pytest.raises(ValueError, match="'answer' beside 'model_response', and one may"):
        read_predictions(file)
    file = write_lines(tmp_path / "c.jsonl", [said | {"answer": "blue", "prediction": "green"}])
    assert read_predictions(file)[0].answer == "green"


def test_what_speaks_of_a_run_is_no_answer(tmp_path: Path) -> None:
    about = {"output_dir": "/x/y", "generated_by": "llava", "completion_tokens": "12"}
    file = write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "label": "yes"} | about])
    with pytest.raises(ValueError, match="has no answer, only"):
        read_predictions(file)
    file = write_lines(tmp_path / "b.jsonl", [{"question_id": 1, "answer": "yes"} | about])
    assert read_predictions(file)[0].answer == "yes"


@pytest.mark.parametrize("answer", [["yes", "no"], [], True, {}, float("inf"), [["a", 1]]])
def test_what_is_no_answer_is_refused(tmp_path: Path, answer: Any) -> None:
    file = write_lines(tmp_path / "answers.jsonl", [{"id": 1, "answer": answer}])
    with pytest.raises(ValueError, match=r"line 1 has .* under 'answer', which is no answer; gi"):
        read_predictions(file)


def test_a_tables_whole_numbers_are_no_fractions_and_its_empty_cells_no_answers(
    tmp_path: Path,
) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("question_id,prediction\n1.0,2.0\n2.0,\n3.0,NaN\n4.0,-3.0\n")
    read = [(one.name, one.answer) for one in read_predictions(path)]
    assert read == [("1", "2"), ("2", None), ("3", None), ("4", "-3")]
    path.write_text("question_id,prediction\n1,2.0\n2,None\n")
    assert [one.answer for one in read_predictions(path)] == ["2.0", "None"]


def test_an_excel_table_is_read_where_openpyxl_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "MODEL_GQA.xlsx"
    path.touch()
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"which openpyxl reads; install that, or save it as"):
        read_predictions(path)
    rows = [("index", "answer", "prediction"), (100, "gold", "red"), (101, "gold", None)]
    sheet = SimpleNamespace(iter_rows=lambda values_only: iter(rows))
    stand_in = SimpleNamespace(load_workbook=lambda *_, **__: SimpleNamespace(active=sheet))
    monkeypatch.setitem(sys.modules, "openpyxl", stand_in)
    read = [(one.name, one.answer) for one in read_predictions(path)]
    assert read == [("100", "red"), ("101", None)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"doc_id": 0, "doc": {}, "resps": [["a"]]}, "lmms-eval's samples .*: add filtered_resps"),
        ({"question_id": 1, "prompt": "?", "answer_id": 3}, r"LLaVA's JSON lines .*: add text"),
        ({"question_id": 1, "question": "?"}, "vlm-evaluation's .*: add model_output"),
        ({"questionId": 1}, "GQA's JSON list .*: add prediction"),
    ],
)
def test_a_record_without_an_answer_is_told_the_nearest_layout(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"has no answer, only .*; nearest is {message}"):
        read_predictions(write_lines(tmp_path / "p.jsonl", [record] * 2))


@pytest.mark.parametrize("spelt", ["['two dogs']", '["two dogs"]', "[ 'two dogs ']"])
def test_lists_of_one_text_that_a_table_spells_are_that_text_where_all_are(
    tmp_path: Path, spelt: str
) -> None:
    rows: list[dict[str, Any]] = [{"id": 1, "answer": spelt}, {"id": 2, "answer": ""}]
    assert [said for _, said in read(tmp_path / "a.jsonl", rows)] == ["two dogs", ""]
    rows.append({"id": 3, "answer": "[0.1, 0.2, 0.3, 0.4]"})
    assert next(said for _, said in read(tmp_path / "a.jsonl", rows)) == spelt
