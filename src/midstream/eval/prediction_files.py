"""Files of other people's predictions, in the layouts that tools write them -> answers."""

import ast
import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from midstream.eval.benchmark_records import lines, no_key_twice, read_text
from midstream.eval.scoring import cleaned

# Keys that people use, in the order in which they are looked for, in any case and with or without
# what parts their words.
_IDS = (
    *("question_id", "example_id", "qid", "identifier", "id", "index", "idx", "sample_id"),
    *("data_id", "uid", "image"),
)
_ANSWERS = (
    *("prediction", "pred", "predict", "response", "output", "model_output", "generated_text"),
    *("answer", "text"),
)
_QUESTIONS = ("prompt", "question", "query")
_KEYS = {
    key.replace("_", ""): key
    for key in (*_IDS, *_ANSWERS, *_QUESTIONS, "doc_id", "filtered_resps", "image_id", "caption")
}
# Other names of what a model said: pred_answer, llava_answer, model_response, outputs.
_SAID = re.compile(
    r"(model|llm|vlm|raw|full|final|parsed|generated)(response|output)s?"
    r"|(response|output)s|\w*pred\w*|repl(y|ies)|results?|decoded"
    r"|(?!gold|gt|true|correct|right|ref|label|target|ground|human|expect|standard|direct|multiple)"
    r"\w+answers?|generat(ed|ion)s?|hypothesis|completion"
)
_KNOWN = {*_KEYS.values()}
_SEPARATORS = "\t,;"
_EITHER = "and one may be the gold answer; put the prediction under 'prediction'"
_LINES = "give JSON lines of question_id and answer, or a table whose first line names its columns"
_LAYOUTS = {
    "JSON of answers": ("question_id", "answer"),
    "GQA's JSON list": ("questionId", "prediction"),
    "LLaVA's JSON lines": ("question_id", "prompt", "text"),
    "vlm-evaluation's full-results.json": ("question_id", "question", "model_output"),
    "lmms-eval's samples": ("doc_id", "doc", "filtered_resps"),
    "VLMEvalKit's table": ("index", "question", "prediction"),
    "LLaMA-Factory's lines": ("prompt", "predict", "label"),
    "COCO's captions": ("image_id", "caption"),
}


@dataclass(frozen=True)
class Prediction:
    """An answer of a predictions file, None where the file says that there is none.

    `ids` are what it is called by, under each key; `name` is one of them. `question` may be a whole
    prompt around it; `place` is its number in the order of the questions. `beside` are other keys
    with texts, where its own may also be that of the gold answer.
    """

    where: str
    answer: str | None
    name: str | None = None
    question: str | None = None
    place: int | None = None
    ids: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


def read_predictions(path: Path) -> list[Prediction]:
    """The answers of a file in any layout of docs/evaluation.md, in its order of the questions.

    Raises ValueError with the line or the record that holds no answer, and the nearest layout.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one file with all predictions")
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
    said = {one.where: _unlisted(one.answer) for one in found if one.answer}
    if None not in said.values():  # tables hold lists of one answer as texts
        found = [replace(one, answer=said.get(one.where, one.answer)) for one in found]
    return found


def _unlisted(text: str) -> str | None:
    """The text in a list of one, as Python or JSON spell it; None of anything else."""
    try:
        value = ast.literal_eval(text) if text.startswith("[") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    only = value[0] if isinstance(value, list) and len(value) == 1 else None
    return cleaned(only) if isinstance(only, str) else None


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """What a file holds of each answer, and where it stands."""
    kind = path.suffix.lower()
    if kind in (".xlsx", ".parquet"):
        yield from _table(path, _excel_rows(path) if kind == ".xlsx" else _parquet_rows(path))
        return
    text = read_text(path).lstrip("\n\r")
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: no_key_twice(pairs, path))
    except json.JSONDecodeError as error:
        if text.startswith(("[", "{\n", "{\r")):
            told = f"{path} is not JSON (line {error.lineno}: {error.msg}); was it written whole?"
            raise ValueError(told) from None
        value = None
    if isinstance(value, dict) and not _is_record(value):
        lists = [one for one in value.values() if isinstance(one, list) and one]
        lists = [one for one in lists if all(isinstance(record, dict) for record in one)]
        if len(lists) == 1:  # what else stands there is about the run
            value = lists[0]
        elif lists:
            named = ", ".join(repr(key) for key, one in value.items() if one in lists)
            raise ValueError(f"{path} holds several lists ({named}); give the one of answers alone")
    if isinstance(value, dict) and not _is_record(value):
        for key, answer in value.items():
            record = answer if isinstance(answer, dict) else {"answer": answer}
            yield f"{path} key {key!r}", {"question_id": key, **record}
    elif isinstance(value, list):
        yield from ((f"{path} record {i}", one) for i, one in enumerate(value))
    elif value is not None:
        yield f"{path} line 1", value
    elif separator := _separator(text.split("\n")[0].strip()):
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        yield from _table(path, cells)
    else:
        yield from ((one.where, one.value) for one in lines(path, _LINES))


def _separator(line: str) -> str | None:
    """What parts a table's columns, by its first line; None where that names none."""
    csv.field_size_limit(2**31 - 1)  # a table may hold pictures as text
    for separator in "" if line.startswith("{") else _SEPARATORS:
        cells = [cell.strip() for row in csv.reader([line], delimiter=separator) for cell in row]
        if _is_record(dict.fromkeys(cells)):
            return separator
    return None


def _table(path: Path, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """A table's rows as records; an empty cell and NaN say nothing, nor does an empty row."""
    try:
        numbered = list(enumerate(rows, start=1))
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table ({error}); save it anew") from None
    numbered = [(n, row) for n, row in numbered if any(cell not in (None, "") for cell in row)]
    if not numbered:
        return
    head, body = [str(name).strip() for name in numbered[0][1]], numbered[1:]
    for number, row in body:
        if len(row) != len(head):
            raise ValueError(
                f"{path} row {number} has {len(row)} cells, the first row names {len(head)} "
                "columns; put texts that hold line breaks or separators into quotes"
            )
    columns = [
        [None if _is_nothing(cell) else cell for cell in own]
        for own in zip(*(row for _, row in body), strict=True)
    ]
    for column in columns:
        # pandas writes whole numbers so where one of a column is missing.
        if all(cell is None or re.fullmatch(r"-?\d+\.0", str(cell)) for cell in column):
            column[:] = [None if cell is None else str(cell)[:-2] for cell in column]
    for (number, _), cells in zip(body, zip(*columns, strict=True), strict=True):
        record = dict(zip(head, cells, strict=True))
        if "index" in record and "question" in record:
            record.pop("answer", None)  # a table of VLMEvalKit's, whose answer is the right one
        yield f"{path} row {number}", record


def _is_nothing(cell: Any) -> bool:
    return isinstance(cell, str) and cell in ("", "nan", "NaN")


def _excel_rows(path: Path) -> list[Sequence[Any]]:
    try:
        import openpyxl
    except ImportError:
        told = f"{path} is an Excel table, which openpyxl reads; install that, or save it as .tsv"
        raise ValueError(told) from None
    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).active
        return list(sheet.iter_rows(values_only=True))
    except Exception as error:  # a broken workbook raises anything
        raise ValueError(f"{path} is no whole Excel table ({error}); save it anew") from None


def _parquet_rows(path: Path) -> list[Sequence[Any]]:
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no whole Parquet table ({error}); write it anew") from None
    return [table.column_names, *zip(*(one.to_pylist() for one in table.columns), strict=True)]


def _renamed(value: dict[str, Any]) -> dict[str, Any]:
    """A record with known keys as `_KEYS` spells them; of two spellings the exact one."""
    names = {key: _KEYS.get(_plain_key(key), key) for key in value}
    return {key if name in value else name: value[key] for key, name in names.items()}


def _plain_key(key: Any) -> str:
    return re.sub(r"[\W_]", "", str(key)).lower()


def _is_record(value: dict[str, Any]) -> bool:
    value = _renamed(value)
    return any(key in value for key in (*_IDS, *_ANSWERS, "doc_id"))


def _prediction(value: Any, where: str) -> Prediction:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, not an object with an answer")
    given, value = value, _renamed(value)
    place = value.get("doc_id")
    if "filtered_resps" in value:
        # lmms-eval: what the filters made of the replies; the question's record is under "doc".
        doc = _renamed(value["doc"]) if isinstance(value.get("doc"), dict) else {}
        said = value["filtered_resps"]
        asked = {key: doc[key] for key in (*_IDS, *_QUESTIONS) if key in doc}
        value = asked | {"prediction": said[0] if isinstance(said, list) and said else said}
    keys = [key for key in _ANSWERS if key in value]
    if not keys and {"image_id", "caption"} <= value.keys():
        value, keys = {"id": value["image_id"], "text": value["caption"]}, ["text"]
    texts = [key for key, one in value.items() if isinstance(one, str) and key not in _KNOWN]
    others = [key for key in texts if _SAID.fullmatch(_plain_key(key))]
    if len(others) == 1 and not keys:
        keys = others
    elif others and keys and not set(keys) - {"answer", "text"}:
        raise ValueError(f"{where} has {keys[0]!r} beside {others[0]!r}, {_EITHER}")
    # LLaVA's files hold the question under "prompt" and the answer under "text"; a question file
    # with answers in it the question under "text" and the answer under "answer".
    if keys == ["answer", "text"] and any(key in value for key in _QUESTIONS):
        raise ValueError(
            f"{where} has both an 'answer' and a 'text' beside its question, {_EITHER}"
        )
    if not keys:
        raise ValueError(f"{where} has no answer, only {', '.join(given)}; {_nearest(given)}")
    held = {key: value[key] for key in _IDS if type(value.get(key)) in (str, int, float)}
    if not held and place is None and type(value.get("image_id")) in (str, int):
        held = {"image_id": value["image_id"]}
    ids = {
        key: str(_answer(one))
        for key, one in held.items()
        if isinstance(one, str) or math.isfinite(one)
    }
    name = next(iter(ids.values()), None)
    asked_under = _QUESTIONS if keys[0] != "answer" else (*_QUESTIONS, "text")
    question = next((value[key] for key in asked_under if isinstance(value.get(key), str)), None)
    try:
        answer = _answer(value[keys[0]])
    except ValueError:
        told = textwrap.shorten(repr(value[keys[0]]), 200)
        raise ValueError(
            f"{where} has {told} under {keys[0]!r}, which is no answer; give a text, number or box"
        ) from None
    place = place if isinstance(place, int) else None
    beside = tuple(texts) if keys[0] in ("answer", "text") else ()
    return Prediction(where, answer, name, question, place, ids, beside)


def _nearest(value: dict[str, Any]) -> str:
    """The known layout that a record is most like, and what it lacks of that."""
    lacks = {name: [key for key in keys if key not in value] for name, keys in _LAYOUTS.items()}
    name = min(_LAYOUTS, key=lambda name: len(lacks[name]) / len(_LAYOUTS[name]))
    return f"nearest is {name} ({', '.join(_LAYOUTS[name])}): add {' and '.join(lacks[name])}"


def _answer(value: Any) -> str | None:
    """An answer's text as scorers get it, None for null and NaN; ValueError for what is none."""
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
