"""One model on benchmarks: answers, scores, predictions, the stable score."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from midstream.config import Evaluation
from midstream.eval.aggregate import averages, suites
from midstream.eval.find_task import (
    VisualTask,
    in_the_square,
    other_images,
    read_choice_task,
    read_visual_task,
)
from midstream.eval.kept_answers import KeptAnswers
from midstream.eval.readers.choices import LETTERS
from midstream.eval.text import TextResult, TextTask, run_text_tasks
from midstream.storage import write_bytes
from midstream.uncertainty import bootstrap, mean_by_split, split_means

_COLUMNS = pa.schema(
    [
        ("example_id", pa.string()),
        ("split", pa.string()),
        ("prompt", pa.string()),
        ("prediction", pa.string()),
        ("gold", pa.string()),
        ("score", pa.float64()),
        ("blind_prediction", pa.string()),
        ("blind_score", pa.float64()),
        ("text_prediction", pa.string()),
        ("image", pa.string()),
    ]
)
Progress = Callable[[float, str], None]


def evaluate(
    answers: KeptAnswers, evaluation: Evaluation, world: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """Run the benchmarks; the `tasks`, `stable` and `suites` parts of results.json (docs/store.md).

    Every task is read before the first answer, so that a missing file costs nothing. Writes
    out/predictions/<task>.parquet. `progress` gets a fraction and a text. Of several ranks all
    make the same call, and the first one writes.
    Raises FileNotFoundError or ValueError for files that are missing or malformed.
    """
    names = [*evaluation.visual_tasks, *evaluation.text_tasks]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"tasks are asked for twice: {', '.join(twice)}; name each of them once")
    if not names:
        raise ValueError("the evaluation names no task; set visual_tasks or text_tasks")
    visual = [
        read_visual_task(world, name, evaluation.limit, slim=evaluation.slim)
        for name in evaluation.visual_tasks
    ]
    if evaluation.box_frame == "square":
        visual = [in_the_square(task) for task in visual]
    text = [read_choice_task(world, name, evaluation.limit) for name in evaluation.text_tasks]
    blind_images = {task.name: other_images(task) for task in visual} if evaluation.blind else {}
    tasks: dict[str, dict[str, Any]] = {}
    writes = out if answers.ranks.rank == 0 else None
    for index, task in enumerate(visual):
        share = _part(progress, index, len(names))
        blind = blind_images.get(task.name)
        tasks[task.name] = _run_visual(answers, evaluation, task, blind, writes, share)
    share = _part(progress, len(visual), len(names), len(text))
    answers.progress = share
    found = run_text_tasks(answers, text, evaluation.limit)
    for choice in text:
        tasks[choice.name] = _report_text(choice, found[choice.name], writes, evaluation.limit)
    return {"tasks": tasks, "stable": averages(tasks), "suites": suites(tasks)}


def _run_visual(
    answers: KeptAnswers,
    evaluation: Evaluation,
    task: VisualTask,
    blind_images: Sequence[Path] | None,
    out: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    wording = evaluation.wordings.get(task.name, evaluation.prompts)
    prompts = [task.format.prompt(example.question, wording) for example in task.examples]
    by_chance = task.format.fixed is not None and evaluation.fixed_answers != "text"
    also_text = by_chance and evaluation.fixed_answers == "both"
    passes = [([example.image for example in task.examples], by_chance, "")]
    if blind_images is not None:
        passes.append((list(blind_images), by_chance, " blind"))
    if also_text:
        passes.append((passes[0][0], False, " as text"))
    said = []
    for index, (images, chooses, how) in enumerate(passes):
        answers.progress = _part(progress, index, len(passes), text=f"{task.name}{how}: ")
        said.append(
            _choose(answers, task, prompts, images, evaluation.letters)
            if chooses
            else [text.strip() for text in answers.generate(prompts, images)]
        )
    blind = said[1] if blind_images is not None else None
    spoken = said[-1] if also_text else None
    row = score_visual(task, said[0], blind, spoken)
    row |= {"wording": wording, "answered": "probability" if by_chance else "text"}
    if out is not None:
        scores, blind_scores = (
            None if texts is None else _scores(task, texts) for texts in (said[0], blind)
        )
        nothing = [None] * len(prompts)
        write_predictions(
            out / "predictions" / f"{task.name}.parquet",
            example_id=[example.example_id for example in task.examples],
            split=[example.split for example in task.examples],
            prompt=prompts,
            prediction=said[0],
            gold=[json.dumps(example.gold, ensure_ascii=False) for example in task.examples],
            score=scores,
            blind_prediction=nothing if blind is None else blind,
            blind_score=nothing if blind_scores is None else blind_scores,
            text_prediction=nothing if spoken is None else spoken,
            image=[str(example.image) for example in task.examples],
        )
    return row


def _choose(
    answers: KeptAnswers,
    task: VisualTask,
    prompts: Sequence[str],
    images: Sequence[Path],
    letters: str,
) -> list[str]:
    """The likeliest of each example's fixed answers, as the scorer reads it."""
    lettered = task.format.fixed == "letters"
    options = [
        LETTERS[: len(example.choices)] if lettered and letters == "letter" else example.choices
        for example in task.examples
    ]
    found = answers.choose(prompts, images, [list(own) for own in options])
    likeliest = [values.index(max(values)) for values in found]
    return [
        LETTERS[at] if lettered else example.choices[at]
        for at, example in zip(likeliest, task.examples, strict=True)
    ]


def score_visual(
    task: VisualTask,
    predictions: Sequence[str],
    blind: Sequence[str] | None = None,
    spoken: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A task's row of results from its answers; `spoken` are the answers' texts beside them."""
    examples = task.examples
    scores = _scores(task, predictions)
    splits = [example.split for example in examples]
    sure = bootstrap(scores, [str(example.image) for example in examples], splits)
    details = task.format.details(predictions, examples)
    if spoken is not None:
        more = task.format.details(spoken, examples)
        more["score"] = mean_by_split(_scores(task, spoken), splits)
        details |= {f"text.{key}": value for key, value in more.items()}
    return {
        "kind": "vision",
        "format": task.format.name,
        "metric": task.format.metric,
        "score": sure.mean,
        "stderr": sure.stderr,
        "low": sure.low,
        "high": sure.high,
        "chance": task.chance,
        "blind": None if blind is None else mean_by_split(_scores(task, blind), splits),
        "num_examples": len(examples),
        "shortened": _shortened(len(examples), task.num_all),
        "unparsable": sum(not task.format.parses(text) for text in predictions),
        "splits": split_means(scores, splits) if len(set(splits)) > 1 else {},
        "details": details,
    }


def _scores(task: VisualTask, texts: Sequence[str]) -> list[float]:
    return [task.format.score(text, e.gold) for text, e in zip(texts, task.examples, strict=True)]


def _report_text(
    task: TextTask, result: TextResult, out: Path | None, limit: int | None
) -> dict[str, Any]:
    rows = result.answers
    if out is not None:
        nothing = [None] * len(rows)
        write_predictions(
            out / "predictions" / f"{task.name}.parquet",
            example_id=[str(number) for number in range(1, len(rows) + 1)],
            split=[""] * len(rows),
            prompt=[row.prompt for row in rows],
            prediction=["" if r.chosen is None else r.choices[r.chosen] for r in rows],
            gold=[json.dumps(None if r.gold is None else r.choices[r.gold]) for r in rows],
            score=[row.score for row in rows],
            blind_prediction=nothing,
            blind_score=nothing,
            text_prediction=nothing,
            image=nothing,
        )
    sure = bootstrap([row.score for row in rows])
    # What the harness fetched itself is whole unless a limit was set.
    num_all = task.num_docs
    if num_all is None:
        num_all = len(rows) + (limit is not None)
    return {
        "kind": "text",
        "metric": "accuracy",
        "score": result.metrics["acc"],
        "stderr": sure.stderr,
        "low": sure.low,
        "high": sure.high,
        "chance": task.chance,
        "blind": None,
        "num_examples": len(rows),
        "shortened": _shortened(len(rows), num_all) or task.departs,
        "unparsable": 0,
        "details": result.metrics,
    }


def _shortened(asked: int, num_all: int) -> str | None:
    """Why a task is not whole, None where it is."""
    return None if asked == num_all else f"{asked:,} of {num_all:,} examples"


def write_predictions(path: Path, **columns: list[Any] | None) -> None:
    """One row an example (docs/store.md)."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_COLUMNS), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def _part(progress: Progress, index: int, total: int, span: int = 1, text: str = "") -> Progress:
    """The `span` parts from `index` of `total` equal ones of a progress."""
    return lambda fraction, note: progress((index + fraction * span) / total, text + note)
