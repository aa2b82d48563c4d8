"""The files that tools leave their answers in."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"7": "red", "8": "2", "7": "blue"}', "holds key '7' twice"),
        (json.dumps(RECORDS, indent=1)[:-9], r"is not JSON \(line 8: .*was it written whole"),
        ('[{"question_id": 7, "answ', r"is not JSON \(line 1: .*was it written whole"),
        ([{"id": 7, "response": {"choices": [0] * 999}}], r"\[\.\.\.\] under 'response'"),
        ("question_id,answer\n", "is empty"),
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
