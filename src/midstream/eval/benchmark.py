"""One model on benchmarks: answers, scores, predictions, the stable score."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from midstream.config import Evaluation
from midstream.core.stats import Estimate, bootstrap, mean_by_split, split_means
from midstream.eval.answers import (
    EarlierTask,
    KeptAnswers,
    Progress,
    take_predictions,
    text_key,
    visual_key,
    write_table,
)
from midstream.eval.find_task import (
    VisualTask,
    in_the_square,
    other_images,
    read_choice_task,
    read_visual_task,
)
from midstream.eval.scoring import LETTERS, averages, cleaned, suites
from midstream.eval.text import TextResult, TextTask, loaded_tasks

_TEXTS = ("example_id", "split", "prompt", "prediction", "gold")
_COLUMNS = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [("score", pa.float64()), ("blind_prediction", pa.string()), ("blind_score", pa.float64())]
    + [("text_prediction", pa.string()), ("image", pa.string())]
)


def evaluate(
    answers: KeptAnswers,
    evaluation: Evaluation,
    world: Path,
    out: Path,
    progress: Progress,
    *,
    done: Mapping[str, EarlierTask] | None = None,
) -> dict[str, Any]:
    """Run the benchmarks; the `tasks`, `stable` and `suites` parts of results.json (docs/store.md).

    Every task is read before the first answer, so that a missing file costs nothing. Writes
    out/predictions/<task>.parquet. `progress` gets a fraction and a text. A task whose key is in
    `done` (`earlier_tasks`) is taken from there and not asked. Of several ranks all make the same
    call, and the first one writes and says what is done.
    Raises FileNotFoundError or ValueError for files that are missing or malformed.
    """
    visual, text = _read_tasks(evaluation, world)
    weights, digest = answers.weights_digest, answers.file_digest
    keys = {
        task.name: visual_key(task, _prompts(task, evaluation), evaluation, weights, digest)
        for task in visual
    } | {task.name: text_key(task, evaluation.limit, weights, digest) for task in text}
    earlier = {name: done[key] for name, key in keys.items() if key in done} if done else {}
    rows = {name: dict(one.row) for name, one in earlier.items()}
    tasks: dict[str, dict[str, Any]] = answers.ranks.gather(rows)[0]
    blind_images = {task.name: other_images(task) for task in visual} if evaluation.blind else {}
    writes = out if answers.ranks.rank == 0 else None
    if writes is not None:
        images = {task.name: [example.image for example in task.examples] for task in visual}
        for name, one in earlier.items():
            take_predictions(one, _predictions_of(out, name), images.get(name))
    visual = [task for task in visual if task.name not in tasks]
    text = [task for task in text if task.name not in tasks]
    # Shares of the whole are of questions, those of every pass.
    sizes = [len(task.examples) * len(_passes(task, evaluation)) for task in visual]
    in_text = sum(len(t.docs) if t.docs is not None else evaluation.limit or 1000 for t in text)
    total = sum(sizes) + in_text
    with loaded_tasks(text, evaluation.limit) as ask:
        for index, task in enumerate(visual):
            share = _part(progress, sum(sizes[:index]), total, sizes[index])
            blind = blind_images.get(task.name)
            tasks[task.name] = _run_visual(answers, evaluation, task, blind, writes, share)
        answers.progress = _part(progress, sum(sizes), total, in_text, text="text tasks: ")
        found = ask(answers)
    for choice in text:
        tasks[choice.name] = _report_text(choice, found[choice.name], writes)
    tasks = {name: {**tasks[name], "key": key} for name, key in keys.items()}
    return {"tasks": tasks, "stable": averages(tasks), "suites": suites(tasks)}


def _read_tasks(evaluation: Evaluation, world: Path) -> tuple[list[VisualTask], list[TextTask]]:
    names = [*evaluation.visual_tasks, *evaluation.text_tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tasks are asked for twice: {', '.join(twice)}; name each of them once")
    if not names:
        raise ValueError("the evaluation names no task; set visual_tasks or text_tasks")
    visual = [
        read_visual_task(world, name, evaluation.limit, slim=evaluation.slim)
        for name in evaluation.visual_tasks
    ]
    if evaluation.box_frame == "square":
        visual = [in_the_square(task) for task in visual]
    return visual, [read_choice_task(world, n, evaluation.limit) for n in evaluation.text_tasks]


def _prompts(task: VisualTask, evaluation: Evaluation) -> list[str]:
    wording = evaluation.wordings.get(task.name, evaluation.prompts)
    return [task.format.prompt(example.question, wording) for example in task.examples]


def _predictions_of(out: Path, name: str) -> Path:
    return out / "predictions" / f"{name}.parquet"


def _run_visual(
    answers: KeptAnswers,
    evaluation: Evaluation,
    task: VisualTask,
    blind_images: Sequence[Path] | None,
    out: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    wording = evaluation.wordings.get(task.name, evaluation.prompts)
    prompts = _prompts(task, evaluation)
    images = [example.image for example in task.examples]
    passes = _passes(task, evaluation)
    said: dict[str, list[str]] = {}
    for index, (how, chooses) in enumerate(passes):
        seen = blind_images if how == "blind" and blind_images is not None else images
        title = f"{task.name} {how}: " if how else f"{task.name}: "
        answers.progress = _part(progress, index, len(passes), text=title)
        said[how] = _ask(answers, task, prompts, seen, evaluation.letters if chooses else None)
    blind, spoken = said.get("blind"), said.get("as text")
    row = score_visual(task, said[""], blind, spoken)
    row |= {"wording": wording, "answered": "probability" if passes[0][1] else "text"}
    if out is not None:
        write_predictions(
            _predictions_of(out, task.name),
            example_id=[example.example_id for example in task.examples],
            split=[example.split for example in task.examples],
            prompt=prompts,
            prediction=said[""],
            gold=[json.dumps(example.gold, ensure_ascii=False) for example in task.examples],
            score=_scores(task, said[""]),
            blind_prediction=blind,
            blind_score=None if blind is None else _scores(task, blind),
            text_prediction=spoken,
            image=[str(example.image) for example in task.examples],
        )
    return row


def _passes(task: VisualTask, evaluation: Evaluation) -> list[tuple[str, bool]]:
    """How often a task is asked: what each time is called, and whether fixed answers are chosen."""
    fixed = task.format.fixed is not None and any(e.choices for e in task.examples)
    chooses = fixed and evaluation.fixed_answers != "text"
    passes = [("", chooses)]
    if evaluation.blind:
        passes.append(("blind", chooses))
    if chooses and evaluation.fixed_answers == "both":
        passes.append(("as text", False))
    return passes


def _ask(
    answers: KeptAnswers,
    task: VisualTask,
    prompts: Sequence[str],
    images: Sequence[Path],
    letters: str | None,
) -> list[str]:
    """An answer to each example as the scorer reads it, with `letters` a fixed one where it may."""
    said = [""] * len(prompts)
    chosen = [i for i, e in enumerate(task.examples) if e.choices and letters is not None]
    free = sorted({*range(len(prompts))} - {*chosen})
    if free:
        told = answers.generate([prompts[i] for i in free], [images[i] for i in free])
        for i, text in zip(free, told, strict=True):
            said[i] = cleaned(text)
    if chosen:
        lettered = task.format.fixed == "letters"
        own = [task.examples[i].choices for i in chosen]
        options = [
            list(LETTERS[: len(choices)] if lettered and letters == "letter" else choices)
            for choices in own
        ]
        found = answers.choose([prompts[i] for i in chosen], [images[i] for i in chosen], options)
        for i, choices, values in zip(chosen, own, found, strict=True):
            likeliest = values.index(max(values))
            said[i] = LETTERS[likeliest] if lettered else choices[likeliest]
    return said


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
        "unparsable": sum(task.format.parse(text) is None for text in predictions),
        "splits": split_means(scores, splits) if len(set(splits)) > 1 else {},
        "details": details,
        "note": None if task.format.note is None else task.format.note(predictions, examples),
    }


def _scores(task: VisualTask, texts: Sequence[str]) -> list[float]:
    return [task.format.score(text, e.gold) for text, e in zip(texts, task.examples, strict=True)]


def _report_text(task: TextTask, result: TextResult, out: Path | None) -> dict[str, Any]:
    rows = result.answers
    if out is not None:
        write_predictions(
            _predictions_of(out, task.name),
            example_id=[str(number) for number in range(1, len(rows) + 1)],
            split=[row.split for row in rows],
            prompt=[row.prompt for row in rows],
            prediction=["" if r.chosen is None else r.choices[r.chosen] for r in rows],
            gold=[json.dumps(None if r.gold is None else r.choices[r.gold]) for r in rows],
            score=[row.score for row in rows],
        )
    splits, value = [row.split for row in rows], result.metrics[result.metric]
    # A metric may be a mean over examples or over a group's tasks; of any other nothing is said.
    means = [bootstrap([row.score for row in rows], None, parts) for parts in (None, splits)]
    equal = [one for one in means if math.isclose(one.mean, value, rel_tol=1e-6, abs_tol=1e-9)]
    sure = equal[0] if equal else Estimate(value, None, None, None)
    num_all = task.num_docs if task.num_docs is not None else result.num_docs
    return {
        "kind": "text",
        "metric": "accuracy" if result.metric == "acc" else result.metric,
        "score": value,
        "higher_is_better": result.higher_is_better,
        "stderr": sure.stderr,
        "low": sure.low,
        "high": sure.high,
        "chance": result.chance,
        "blind": None,
        "num_examples": len(rows),
        "shortened": _shortened(len(rows), num_all) or task.departs,
        "unparsable": 0,
        "splits": {name: result.metrics[f"{name}.{result.metric}"] for name in splits if name},
        "details": result.metrics,
    }


def _shortened(asked: int, num_all: int) -> str | None:
    """Why a task is not whole, None where it is."""
    return None if asked == num_all else f"{asked:,} of {num_all:,} examples"


def write_predictions(path: Path, **columns: list[Any] | None) -> None:
    """One row an example; null in a column that is not given."""
    nothing = [None] * len(columns["example_id"] or ())
    held = [columns.get(name) or nothing for name in _COLUMNS.names]
    write_table(path, pa.table(held, schema=_COLUMNS))


def _part(progress: Progress, index: int, total: int, span: int = 1, text: str = "") -> Progress:
    """The `span` parts from `index` of `total` equal ones of a progress."""
    return lambda fraction, note: progress((index + fraction * span) / total, text + note)
