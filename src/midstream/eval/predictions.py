"""Other people's predictions, matched to questions and scored without a model."""

import itertools
import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

from midstream.eval.benchmark import score_visual
from midstream.eval.benchmark_records import plain_words
from midstream.eval.find_task import VisualTask, in_the_square, read_visual_task
from midstream.eval.prediction_files import Prediction, read_predictions
from midstream.eval.tasks import VisualExample

# What a chat template, or a model that thinks, leaves in an answer.
_MARKUP = re.compile(r"</think>|</s>\s*$|<\|\w+\|>\s*$|<end_of_\w+>\s*$")
_SHOWN = 3


def score_predictions(
    data: Path,
    name: str,
    path: Path,
    *,
    split: str | None = None,
    missing_as_wrong: bool = False,
    ignore_unknown: bool = False,
    box_frame: str = "picture",
) -> dict[str, Any]:
    """Score a file of predictions on a benchmark whose official files are under `data`.

    The row of results.json that a model's answers would give, with `num_missing` and `notes`.
    Predictions belong to questions by id where ids name questions, else by their order; either way
    they are checked against the questions' words where the file has them. split: they answer this
    split alone. box_frame: as in `config.Evaluation`. With `ignore_unknown` those whose id no
    question has are left out and counted. Pictures may be absent. Raises ValueError for questions
    without a prediction (with `missing_as_wrong` they count as wrong), for predictions of no
    question or whose prompts ask something else, for two of one question, where it is not clear
    which split is meant, and where none of the answers can be read.
    """
    task = read_visual_task(data, name, pictures=False, shuffled=False)
    if box_frame == "square":
        squared = in_the_square(task)
        if squared is task:
            raise ValueError(f"{task.name} asks for no boxes; leave --box-frame out")
        task = squared
    predictions, notes = _named(task, read_predictions(path)), []
    if ignore_unknown:
        known = _names(task)
        kept = [one for one in predictions if one.name is None or _plain(one.name) in known]
        notes = [f"{len(predictions) - len(kept):,} predictions of no question here were left out"]
        predictions = kept
    splits = _splits(task)
    if split is not None and split not in splits:
        raise ValueError(
            f"{task.name} has no split {split!r}; it has {', '.join(splits) or 'none'}"
        )
    if split is None and len(splits) > 1:
        split = _likely_split(task, predictions, path, notes, whole=missing_as_wrong)
    if split is not None:
        task = replace(task, examples=tuple(splits[split]), num_all=len(splits[split]))
        notes.append(f"scored on split {split} alone")
    found = _by_id(task, predictions)
    if found is None:
        found = _in_order(task, predictions)
        if found is None:
            _no_match(task, predictions, path)
        if _places(task, predictions) is not None:
            notes.append("no question has these ids, which number them: matched by their order")
        elif any(one.question is None for one in predictions):
            notes.append("nothing names the questions of these answers: matched by their order")
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
    empty = sum(not text for text in said.values())
    if empty:
        notes.append(f"{empty:,} of {len(said):,} answers are empty")
    notes += _unread(task, [pair for pair in pairs if pair[0].answer is not None], path)
    row = score_visual(task, [said.get(example.example_id, "") for example in task.examples])
    return row | {"num_missing": len(missing), "notes": notes}


def _unread(
    task: VisualTask, pairs: Sequence[tuple[Prediction, VisualExample]], path: Path
) -> list[str]:
    """What is to be said of answers that the scorer cannot read, or not as they are meant;
    ValueError where it can read none of several."""
    notes = []
    parse = task.format.parse
    unread = [one for one, e in pairs if parse(one.answer or "", e) is None]
    if unread:
        told = f"{unread[0].where} has {_short(unread[0].answer or '')}; {task.format.reads}"
        if len(unread) == len(pairs) > 1:
            note = task.format.note
            hint = (
                note([one.answer or "" for one, _ in pairs], [e for _, e in pairs]) if note else ""
            )
            told += f"; {hint}" if hint else ""
            raise ValueError(f"{path}: none of its {len(pairs):,} answers can be read: {told}")
        notes.append(
            f"{len(unread):,} of {len(pairs):,} answers cannot be read and count as wrong: {told}"
        )
    bare = [pair for pair in pairs if not _MARKUP.search(pair[0].answer or "")]
    marked = [one for one, _ in pairs if _MARKUP.search(one.answer or "")]
    if marked:
        notes.append(
            f"{len(marked):,} of {len(pairs):,} answers hold a chat template's marks or a model's "
            f"thoughts, and are scored so: {marked[0].where} has "
            f"{_short(marked[0].answer or '')}; cut these off"
        )
    return notes + _odd(task, bare)


def _odd(task: VisualTask, pairs: Sequence[tuple[Prediction, VisualExample]]) -> list[str]:
    """What is odd about free answers: right ones inside of wrong ones, or nothing but golds."""
    if task.format.reads or task.format.corpus is not None:
        return []
    wrong = [(one, e) for one, e in pairs if not task.format.score(one.answer or "", e.gold)]
    golds = [(one, e) for one, e in pairs if one.beside and one.answer in _golds(e)]
    notes = []
    if len(golds) == len(pairs) > 1:
        one = golds[0][0]
        notes.append(
            f"every answer is the gold one letter by letter, and {one.where} has other texts under "
            f"{', '.join(one.beside)}: if these are the predictions, call that key 'prediction'"
        )
    inside = [one for one, e in wrong if any(_holds(one.answer, gold) for gold in _golds(e))]
    if 3 * len(inside) > len(wrong):
        notes.append(
            f"{len(inside):,} of {len(wrong):,} wrong answers hold a right one among other words: "
            f"{inside[0].where} has {_short(inside[0].answer or '')}; whole answers are compared, "
            "so cut off what is not the answer (the prompt, a sentence around it)"
        )
    return notes


def _golds(example: VisualExample) -> list[str]:
    gold = example.gold
    answers = gold.get("answers") if isinstance(gold, dict) else gold
    answers = [answers] if isinstance(answers, str) else answers or []
    return [one for one in answers if isinstance(one, str) and one]


def _holds(answer: str | None, gold: str) -> bool:
    return f" {_only_words(gold)} " in f" {_only_words(answer or '')} "


def _only_words(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def _plain(name: str | None) -> str | None:
    """An id without regard to zeros before a number, which tables and integers lose."""
    return name.lstrip("0") or "0" if name is not None and name.isdecimal() else name


def _names(task: VisualTask) -> set[str | None]:
    return {_plain(name) for e in task.examples for name in (e.example_id, e.other_id)}


def _named(task: VisualTask, predictions: Sequence[Prediction]) -> list[Prediction]:
    """Predictions called by the id that names the most questions, of several the first."""
    known = _names(task)
    keys = dict.fromkeys(key for one in predictions for key in one.ids)
    hits = {key: sum(_plain(one.ids.get(key)) in known for one in predictions) for key in keys}
    best = max(hits, key=hits.__getitem__, default=None)
    if best is None or not hits[best]:
        return list(predictions)
    return [replace(one, name=one.ids.get(best, one.name)) for one in predictions]


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
    exact: dict[str | None, list[VisualExample]] = defaultdict(list)
    plain: dict[str | None, list[VisualExample]] = defaultdict(list)
    for example in task.examples:
        names = {example.example_id, example.other_id}
        for name in names:
            exact[name].append(example)
        for name in set(map(_plain, names)):
            plain[name].append(example)
    if any(_plain(prediction.name) not in plain for prediction in predictions):
        return None
    found: dict[str, Prediction] = {}
    for prediction in predictions:
        own = exact.get(prediction.name) or plain[_plain(prediction.name)]
        if len(own) > 1:  # an id of a picture, or one that splits share
            own = [example for example in own if _asks(prediction, example)]
            own = [example for example in own if example.example_id not in found] or own
        if len(own) != 1 and not (own and len({e.question for e in own}) == 1):
            return None
        if own[0].example_id in found:
            raise ValueError(
                f"{prediction.where} answers question {prediction.name} a second time; keep one"
            )
        found[own[0].example_id] = prediction
    return found


def _in_order(task: VisualTask, predictions: Sequence[Prediction]) -> dict[str, Prediction] | None:
    """Predictions by example, of a file with a line a question; splits may follow in any order."""
    if len(predictions) != len(task.examples):
        return None
    numbers = _places(task, predictions)
    if numbers is not None:
        predictions = [
            one for _, one in sorted(zip(numbers, predictions, strict=True), key=itemgetter(0))
        ]
    named = numbers is None and any(prediction.name is not None for prediction in predictions)
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


def _places(task: VisualTask, predictions: Sequence[Prediction]) -> list[int] | None:
    """The ids where they do nothing but number the predictions, from 0 or from 1: none is a
    question's, or those of the questions do nothing else either."""
    numbers = _numbers([one.name or "" for one in predictions])
    if numbers is None or not _names(task) & {_plain(one.name) for one in predictions}:
        return numbers
    own = _numbers([example.other_id or example.example_id for example in task.examples])
    return numbers if own is not None and own == sorted(own) else None


def _numbers(names: Sequence[str]) -> list[int] | None:
    """Names that count from 0 or from 1, in any order, as numbers."""
    if not all(name.isdecimal() for name in names):
        return None
    numbers = list(map(int, names))
    first = min(numbers, default=0)
    every = sorted(numbers) == list(range(first, first + len(numbers)))
    return numbers if first in (0, 1) and every else None


def _likely_split(
    task: VisualTask,
    predictions: Sequence[Prediction],
    path: Path,
    notes: list[str],
    *,
    whole: bool,
) -> str | None:
    """The only split that the predictions can be of; None where they are of all. `whole`: some may
    be missing, so that ids of one split alone do not say that they are of it."""
    by_split = _splits(task)
    if len(predictions) > max(len(own) for own in by_split.values()):
        return None
    names = {_plain(prediction.name) for prediction in predictions}
    ids = {split: {_plain(e.example_id) for e in own} for split, own in by_split.items()}
    hit = [split for split, own in ids.items() if own & names]
    named = [
        split
        for split in by_split
        if re.search(rf"(?<![a-z]){re.escape(split)}(?![a-z])", path.name)
    ]
    if len(named) == 1 and hit in ([], named):
        notes.append(f"the file's name says {named[0]}")
        return named[0]
    if hit:
        return hit[0] if not whole and ids[hit[0]] == names else None
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
    by_id = {_plain(example.other_id): example for example in examples}
    ids = [_plain(one.name) for one in predictions]
    if all(i in by_id and _asks(one, by_id[i]) for i, one in zip(ids, predictions, strict=True)):
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
    names = _names(task)
    unknown = [o for o in predictions if o.name is not None and _plain(o.name) not in names]
    if unknown and len(unknown) < len(predictions):
        raise ValueError(
            f"{unknown[0].where} answers question {unknown[0].name}, which {task.name} does not "
            f"have ({len(unknown):,} of {len(predictions):,} predictions are of no question here); "
            "are they of another split, release or cut (--ignore-unknown)?"
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
