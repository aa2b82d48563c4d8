"""Other people's predictions: their files, matched to questions and scored without a model."""

import csv
import io
import itertools
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from midstream.eval.benchmark import score_visual
from midstream.eval.benchmark_records import lines, plain_words, read_text
from midstream.eval.find_task import VisualTask, read_visual_task
from midstream.eval.scoring import cleaned
from midstream.eval.tasks import VisualExample

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
    """The answers of a file in any layout of docs/evaluation.md, in its order of the questions.

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
    """A table's rows as records; an empty cell and NaN say nothing."""
    head, *body = rows
    for number, row in enumerate(body, start=2):
        if len(row) != len(head):
            raise ValueError(
                f"{path} row {number} has {len(row)} cells, the first row names {len(head)} "
                "columns; put texts that hold line breaks or separators into quotes"
            )
    columns = [
        [None if cell in ("", "nan", "NaN") else cell for cell in own]
        for own in zip(*body, strict=True)
    ]
    for column in columns:
        # pandas writes whole numbers so where one of a column is missing.
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
        told = f"{path} is an Excel table, which openpyxl reads; install that, or save it as .tsv"
        raise ValueError(told) from None
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
    ids = [value[key] for key in _IDS if type(value.get(key)) in (str, int, float)]
    name = next((_answer(one) for one in ids if isinstance(one, str) or math.isfinite(one)), None)
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


_SHOWN = 3


def score_predictions(
    data: Path,
    name: str,
    path: Path,
    *,
    split: str | None = None,
    missing_as_wrong: bool = False,
    ignore_unknown: bool = False,
) -> dict[str, Any]:
    """Score a file of predictions on a benchmark whose official files are under `data`.

    The row of results.json that a model's answers would give, with `num_missing` and `notes`.
    Predictions belong to questions by id where ids name questions, else by their order; either way
    they are checked against the questions' words where the file has them. split: they answer this
    split alone. With `ignore_unknown` those whose id no question has are left out and counted.
    Pictures may be absent. Raises ValueError for questions without a prediction (with
    `missing_as_wrong` they count as wrong), for predictions of no question or whose prompts ask
    something else, for two of one question, and where it is not clear which split is meant.
    """
    task = read_visual_task(data, name, pictures=False, shuffled=False)
    predictions, notes = read_predictions(path), []
    if ignore_unknown:
        kept = [one for one in predictions if one.name is None or one.name in _names(task)]
        notes = [f"{len(predictions) - len(kept):,} predictions of no question here were left out"]
        predictions = kept
    splits = _splits(task)
    if split is not None and split not in splits:
        raise ValueError(
            f"{task.name} has no split {split!r}; it has {', '.join(splits) or 'none'}"
        )
    if split is None and len(splits) > 1:
        split = _likely_split(task, predictions, path, notes)
    if split is not None:
        task = replace(task, examples=tuple(splits[split]), num_all=len(splits[split]))
        notes.append(f"scored on split {split} alone")
    found = _by_id(task, predictions)
    found = found if found is not None else _in_order(task, predictions)
    if found is None:
        _no_match(task, predictions, path)
    pairs = [(found[e.example_id], e) for e in task.examples if e.example_id in found]
    _refuse_others(pairs, task, path)
    said = {name: one.answer for name, one in found.items() if one.answer is not None}
    missing = [e.example_id for e in task.examples if e.example_id not in said]
    if missing and not missing_as_wrong:
        told = [f" ({found[n].where} is null or NaN)" if n in found else "" for n in missing]
        names = ", ".join(map("".join, zip(missing[:_SHOWN], told, strict=False)))
        raise ValueError(
            f"{path} answers {len(said):,} of {len(task.examples):,} questions of {task.name}; "
            f"without an answer are {names}{' and others' if len(missing) > _SHOWN else ''}; "
            "complete the file, or count them as wrong with --missing-as-wrong"
        )
    if missing:
        notes.append(f"{len(missing):,} questions without a prediction count as wrong")
    row = score_visual(task, [said.get(example.example_id, "") for example in task.examples])
    return row | {"num_missing": len(missing), "notes": notes}


def _names(task: VisualTask) -> set[str | None]:
    return {name for e in task.examples for name in (e.example_id, e.other_id)}


def _refuse_others(
    pairs: Sequence[tuple[Prediction, VisualExample]], task: VisualTask, path: Path
) -> None:
    """Raise ValueError where prompts ask something else than the questions they are matched to."""
    pairs = [(one, example) for one, example in pairs if one.question is not None]
    others = [(one, example) for one, example in pairs if not _asks(one, example)]
    if not others:
        return
    one, example = others[0]
    raise ValueError(
        f"{path}: {len(others):,} of {len(pairs):,} prompts are about other questions than those "
        f"of {task.name}{f', split {example.split}' if example.split else ''}: {one.where} asks "
        f"{_short(one.question or '')}, question {example.other_id or example.example_id} here is "
        f"{_short(example.question)}; give the predictions of these questions (another --split?)"
    )


def _short(text: str) -> str:
    return repr(textwrap.shorten(text, 80, placeholder="..."))


def _splits(task: VisualTask) -> dict[str, list[VisualExample]]:
    found = defaultdict(list)
    for example in task.examples:
        found[example.split].append(example)
    return found


def _by_id(task: VisualTask, predictions: Sequence[Prediction]) -> dict[str, Prediction] | None:
    """Predictions by example, None where the file's ids do not name this task's questions."""
    if not all(prediction.name is not None for prediction in predictions):
        return None
    by_name: dict[str | None, list[VisualExample]] = defaultdict(list)
    for example in task.examples:
        for name in {example.example_id, example.other_id}:
            by_name[name].append(example)
    if any(prediction.name not in by_name for prediction in predictions):
        return None
    found: dict[str, Prediction] = {}
    for prediction in predictions:
        own = by_name[prediction.name]
        if len(own) > 1:  # an id of a picture, or one that splits share
            own = [example for example in own if _asks(prediction, example)]
            own = [example for example in own if example.example_id not in found] or own
        if len(own) != 1 and not (own and len({e.question for e in own}) == 1):
            return None
        if own[0].example_id in found:
            raise ValueError(
                f"{prediction.where} answers question {prediction.name} a second time; keep one "
                "answer to each"
            )
        found[own[0].example_id] = prediction
    return found


def _in_order(task: VisualTask, predictions: Sequence[Prediction]) -> dict[str, Prediction] | None:
    """Predictions by example, of a file with a line a question; splits may follow in any order."""
    if len(predictions) != len(task.examples):
        return None
    named = any(prediction.name is not None for prediction in predictions)
    worded = all(prediction.question is not None for prediction in predictions)
    if named and not worded:
        return None
    splits = _splits(task).values()
    if not worded and len(splits) > 1:
        return None  # nothing says which split comes first
    for order in itertools.permutations(splits):
        examples = list(itertools.chain.from_iterable(order))
        pairs = list(zip(predictions, examples, strict=True))
        if not worded or all(_asks(prediction, example) for prediction, example in pairs):
            return {example.example_id: prediction for prediction, example in pairs}
    return None


def _likely_split(
    task: VisualTask, predictions: Sequence[Prediction], path: Path, notes: list[str]
) -> str | None:
    """The only split that the predictions can be of; None where they are of all."""
    by_split = _splits(task)
    if len(predictions) > max(len(own) for own in by_split.values()):
        return None
    named = [split for split in by_split if split in path.name]
    if len(named) == 1:
        notes.append(f"the file's name says {named[0]}")
        return named[0]
    if {prediction.name for prediction in predictions} & {e.example_id for e in task.examples}:
        return None
    possible = [split for split, own in by_split.items() if _fits(own, predictions)]
    if len(possible) == 1:
        return possible[0]
    if possible:
        raise ValueError(
            f"{path} has {len(predictions):,} predictions that fit each of the splits "
            f"{', '.join(possible)} of {task.name}; say which with --split"
        )
    return None


def _fits(examples: Sequence[VisualExample], predictions: Sequence[Prediction]) -> bool:
    """Whether predictions may be of these questions: by their ids, or by their order."""
    by_id = {example.other_id: example for example in examples}
    if all(one.name in by_id and _asks(one, by_id[one.name]) for one in predictions):
        return True
    worded = [one.question is not None for one in predictions]
    unnamed = all(one.name is None for one in predictions)
    if len(predictions) != len(examples) or not (unnamed or all(worded)):
        return False
    return all(_asks(one, example) for one, example in zip(predictions, examples, strict=True))


def _asks(prediction: Prediction, example: VisualExample) -> bool:
    """Whether a prediction's prompt holds the example's question, as far as it says."""
    if prediction.question is None:
        return True
    # People lay the lines behind it (options, recognised words) out in their own way.
    question = re.escape(plain_words(example.question.strip().split("\n")[0]))
    whole = re.compile(rf"(?<!\w){question}(?!\w)" if question[-1:].isalnum() else question)
    return whole.search(plain_words(prediction.question)) is not None


def _no_match(task: VisualTask, predictions: Sequence[Prediction], path: Path) -> NoReturn:
    unknown = [o for o in predictions if o.name is not None and o.name not in _names(task)]
    if unknown and len(unknown) < len(predictions):
        raise ValueError(
            f"{unknown[0].where} answers question {unknown[0].name}, which {task.name} does not "
            f"have ({len(unknown):,} of {len(predictions):,} predictions are of no question here); "
            "are they of another split, or the annotations of another release or a cut "
            "(--ignore-unknown)?"
        )
    if len(predictions) == len(task.examples) and all(one.question for one in predictions):
        _refuse_others(list(zip(predictions, task.examples, strict=True)), task, path)
    first, example = predictions[0], task.examples[0]
    raise ValueError(
        f"{path} has {len(predictions):,} predictions for {len(task.examples):,} questions of "
        f"{task.name}, and nothing says which is whose: {first.where} has "
        f"{'no id' if first.name is None else f'id {first.name}'}, a question here is called "
        f"{example.example_id}; give question_id and answer in each line"
    )
