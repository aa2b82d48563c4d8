"""Files of other people's predictions: which layouts are read, and what counts as an answer."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from midstream.eval.readers.records import lines, read_text
from midstream.eval.scoring import cleaned

# Keys that people use, in the order in which they are looked for.
_IDS = ("question_id", "questionId", "example_id", "qid", "id", "index", "image")
_ANSWERS = ("prediction", "pred", "response", "output", "model_output", "answer", "text")
_QUESTIONS = ("prompt", "question", "query")
_LINES = "give JSON lines of question_id and answer, or a table whose first line names its columns"
_LAYOUTS = {
    "JSON of answers": ("question_id", "answer"),
    "GQA's JSON list": ("questionId", "prediction"),
    "LLaVA's JSON lines": ("question_id", "prompt", "text"),
    "vlm-evaluation's full-results.json": ("question_id", "question", "model_output"),
    "lmms-eval's samples": ("doc_id", "doc", "filtered_resps"),
    "VLMEvalKit's table": ("index", "question", "prediction"),
}


@dataclass(frozen=True)
class Prediction:
    """An answer of a predictions file, None where the file says that there is none.

    `question` may be a whole prompt around it; `place` is its number in the order of the questions.
    """

    where: str
    answer: str | None
    name: str | None = None
    question: str | None = None
    place: int | None = None


def read_predictions(path: Path) -> list[Prediction]:
    """JSON lines, a JSON list, a JSON object of answers or records by question id, or a table whose
    first line names its columns (tabs, commas, .xlsx), in the order of the questions where it says.

    Raises ValueError with the line or the record that holds no answer, and the nearest layout.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of predictions")
    found = [_prediction(record, where) for where, record in _records(path)]
    if not found:
        raise ValueError(f"{path} is empty; give a file of predictions")
    if all(one.place is not None for one in found):
        found.sort(key=lambda one: one.place or 0)
    if len(found) > 1 and len({one.question for one in found}) == 1:
        # One text for all of them is an instruction or a stand-in, and no question.
        found = [replace(one, question=None) for one in found]
    return found


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """What a file holds of each answer, and where it stands."""
    if path.suffix == ".xlsx":
        yield from _table(path, _excel_rows(path))
        return
    text = read_text(path).lstrip("\n\r")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict) and not _is_record(value):
        for key, answer in value.items():
            record = answer if isinstance(answer, dict) else {"answer": answer}
            yield f"{path} key {key!r}", {"question_id": key, **record}
    elif isinstance(value, list):
        yield from ((f"{path} record {i}", one) for i, one in enumerate(value))
    elif value is not None:
        yield f"{path} line 1", value
    elif _is_record(dict.fromkeys(re.split("[\t,]", text.split("\n")[0].strip()))):
        tabs = "\t" in text.split("\n")[0]
        cells = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")
        yield from _table(path, cells)
    else:
        yield from ((one.where, one.value) for one in lines(path, _LINES))


def _table(path: Path, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """A table's rows as records. An empty cell and NaN say nothing; a column of whole numbers that
    is written 2.0 throughout (pandas, where one is missing) is one of whole numbers."""
    head, *body = rows
    for number, row in enumerate(body, start=2):
        if len(row) != len(head):
            raise ValueError(
                f"{path} row {number} has {len(row)} cells, the first row names {len(head)} "
                "columns; put texts that hold line breaks or separators into quotes"
            )
    columns = [
        [None if cell in ("", "nan", "NaN") else cell for cell in c]
        for c in zip(*body, strict=True)
    ]
    for column in columns:
        if all(cell is None or re.fullmatch(r"-?\d+\.0", str(cell)) for cell in column):
            column[:] = [None if cell is None else str(cell)[:-2] for cell in column]
    for number, cells in enumerate(zip(*columns, strict=True), start=2):
        record = dict(zip(map(str, head), cells, strict=True))
        if "index" in record:  # a table of VLMEvalKit's, whose answer is the right one
            record.pop("answer", None)
        yield f"{path} row {number}", record


def _excel_rows(path: Path) -> list[Sequence[Any]]:
    try:
        import openpyxl
    except ImportError:
        raise ValueError(
            f"{path} is an Excel table, which openpyxl reads; install that, or save it as .tsv"
        ) from None
    sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).active
    return list(sheet.iter_rows(values_only=True))


def _is_record(value: dict[str, Any]) -> bool:
    return any(key in value for key in (*_IDS, *_ANSWERS, "doc_id"))


def _prediction(value: Any, where: str) -> Prediction:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, not an object with an answer")
    place = value.get("doc_id")
    if "filtered_resps" in value:
        # lmms-eval: what the filters made of the replies; the question's record is under "doc".
        doc = value["doc"] if isinstance(value.get("doc"), dict) else {}
        said = value["filtered_resps"]
        asked = {key: doc[key] for key in (*_IDS, *_QUESTIONS) if key in doc}
        value = asked | {"prediction": said[0] if isinstance(said, list) and said else said}
    keys = [key for key in _ANSWERS if key in value]
    # LLaVA's files hold the question under "prompt" and the answer under "text"; a question file
    # with answers in it the question under "text" and the answer under "answer".
    if keys == ["answer", "text"] and any(key in value for key in _QUESTIONS):
        raise ValueError(
            f"{where} has both an 'answer' and a 'text' beside its question, and one of them may "
            "be the gold answer; put the prediction under 'prediction'"
        )
    if not keys:
        raise ValueError(f"{where} has no answer, only {', '.join(value)}; {_nearest(value)}")
    name = next((_answer(value[key]) for key in _IDS if _is_id(value.get(key))), None)
    asked_under = _QUESTIONS if keys[0] != "answer" else (*_QUESTIONS, "text")
    question = next((value[key] for key in asked_under if isinstance(value.get(key), str)), None)
    try:
        answer = _answer(value[keys[0]])
    except ValueError:
        raise ValueError(
            f"{where} has {value[keys[0]]!r} under {keys[0]!r}, which is no answer; give one text, "
            "one number, or the four numbers of a box"
        ) from None
    return Prediction(where, answer, name, question, place if isinstance(place, int) else None)


def _nearest(value: dict[str, Any]) -> str:
    """The known layout that a record is most like, and what it lacks of that."""
    lacks = {name: [key for key in keys if key not in value] for name, keys in _LAYOUTS.items()}
    name = min(_LAYOUTS, key=lambda name: len(lacks[name]) / len(_LAYOUTS[name]))
    return f"nearest is {name} ({', '.join(_LAYOUTS[name])}): add {' and '.join(lacks[name])}"


def _is_id(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (number and math.isfinite(value))


def _answer(value: Any) -> str | None:
    """An answer's text as scorers get it, None for null and NaN. A list of one answer is that
    answer, a longer one of numbers a box, and 2.0 is the count 2. Raises ValueError for the rest.
    """
    if isinstance(value, list) and len(value) == 1:
        return _answer(value[0])
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    parts = value if isinstance(value, list) and value else [value]
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in parts)
    if isinstance(value, str):
        return cleaned(value)
    if not numbers or value in (math.inf, -math.inf):
        raise ValueError("neither a text nor numbers")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
