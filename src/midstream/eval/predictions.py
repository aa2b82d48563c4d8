"""Other people's predictions, matched to a benchmark's questions and scored without a model."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from midstream.eval.benchmark import score_visual
from midstream.eval.find_task import VisualTask, read_visual_task
from midstream.eval.prediction_files import Prediction, read_predictions
from midstream.eval.readers.examples import plain_words
from midstream.eval.task import VisualExample

_SHOWN = 3


@dataclass(frozen=True)
class Matched:
    """A benchmark and an answer to each of its questions; how they were matched is in `notes`."""

    task: VisualTask
    answers: tuple[str, ...]
    num_missing: int
    notes: tuple[str, ...]


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
    With `ignore_unknown` predictions whose id no question has are left out and counted (the
    annotations are a cut of what was answered). Pictures may be absent. Raises ValueError or
    FileNotFoundError as `match_predictions` and the readers do.
    """
    task = read_visual_task(data, name, pictures=False, shuffled=False)
    predictions, notes = read_predictions(path), []
    if ignore_unknown:
        known = {name for e in task.examples for name in (e.example_id, e.other_id)}
        kept = [one for one in predictions if one.name is None or one.name in known]
        notes = [f"{len(predictions) - len(kept):,} predictions of no question here were left out"]
        predictions = kept
    matched = match_predictions(
        task, predictions, path, split=split, missing_as_wrong=missing_as_wrong
    )
    row = score_visual(matched.task, matched.answers)
    return row | {"num_missing": matched.num_missing, "notes": [*notes, *matched.notes]}


def match_predictions(
    task: VisualTask,
    predictions: Sequence[Prediction],
    path: Path,
    *,
    split: str | None = None,
    missing_as_wrong: bool = False,
) -> Matched:
    """An answer to every question: by id where ids name questions, else by their order; either way
    checked against the questions' words where the file has them.

    split: the predictions answer this split alone. Raises ValueError for questions without a
    prediction (with `missing_as_wrong` they count as wrong), for predictions of no question or
    whose prompts ask something else, for two of one question, and where it is not clear which split
    is meant.
    """
    notes: list[str] = []
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
    if found is None:
        found = _in_order(task, predictions)
    if found is None:
        _no_match(task, predictions, path)
    _refuse_others(
        [(found[e.example_id], e) for e in task.examples if e.example_id in found], task, path
    )
    said = {name: one.answer for name, one in found.items() if one.answer is not None}
    missing = [e.example_id for e in task.examples if e.example_id not in said]
    if missing and not missing_as_wrong:
        names = ", ".join(
            f"{name} ({found[name].where} is null or NaN)" if name in found else name
            for name in missing[:_SHOWN]
        )
        raise ValueError(
            f"{path} answers {len(said):,} of {len(task.examples):,} questions of {task.name}; "
            f"without an answer are {names}"
            f"{' and others' if len(missing) > _SHOWN else ''}; complete the file, or count them "
            "as wrong with --missing-as-wrong"
        )
    if missing:
        notes.append(f"{len(missing):,} questions without a prediction count as wrong")
    answers = tuple(said.get(example.example_id, "") for example in task.examples)
    return Matched(task, answers, len(missing), tuple(notes))


def _refuse_others(
    pairs: Sequence[tuple[Prediction, VisualExample]], task: VisualTask, path: Path
) -> None:
    """Raise ValueError where prompts that the file repeats ask something else than the questions
    that they are matched to."""
    pairs = [(one, example) for one, example in pairs if one.question is not None]
    others = [(one, example) for one, example in pairs if not _asks(one, example)]
    if not others:
        return
    one, example = others[0]
    raise ValueError(
        f"{path}: {len(others):,} of {len(pairs):,} prompts are about other questions than those "
        f"of {task.name}{f', split {example.split}' if example.split else ''}: {one.where} asks "
        f"{_short(one.question or '')}, question {example.other_id or example.example_id} here is "
        f"{_short(example.question)}; give the predictions of these questions (another --split?), "
        "or the annotations of those"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else line[:77] + "...")


def _splits(task: VisualTask) -> dict[str, list[VisualExample]]:
    found: dict[str, list[VisualExample]] = {}
    for example in task.examples:
        found.setdefault(example.split, []).append(example)
    return found


def _by_id(task: VisualTask, predictions: Sequence[Prediction]) -> dict[str, Prediction] | None:
    """Predictions by example, None where the file's ids do not name this task's questions."""
    if not all(prediction.name is not None for prediction in predictions):
        return None
    by_name: dict[str, list[VisualExample]] = {}
    for example in task.examples:
        for name in dict.fromkeys((example.example_id, example.other_id)):
            if name is not None:
                by_name.setdefault(name, []).append(example)
    if any(prediction.name not in by_name for prediction in predictions):
        return None
    found: dict[str, Prediction] = {}
    for prediction in predictions:
        own = by_name[prediction.name or ""]
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
    """Predictions by example where the file has as many lines as there are questions, whose words
    it repeats (a file without ids may leave them out); splits may follow in any order."""
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
    """Whether a prediction's prompt holds the example's question, as far as it says.

    Of a question with lines behind it (options, recognised words) the first line has to be there:
    people lay the others out in their own way.
    """
    if prediction.question is None:
        return True
    question = re.escape(plain_words(example.question.strip().split("\n")[0]))
    whole = re.compile(rf"(?<!\w){question}(?!\w)" if question[-1:].isalnum() else question)
    return whole.search(plain_words(prediction.question)) is not None


def _no_match(task: VisualTask, predictions: Sequence[Prediction], path: Path) -> NoReturn:
    known = {name for e in task.examples for name in (e.example_id, e.other_id)}
    unknown = [one for one in predictions if one.name is not None and one.name not in known]
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
