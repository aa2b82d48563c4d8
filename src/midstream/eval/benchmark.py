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
from midstream.eval.continuous import (
    Outcomes,
    Target,
    summary,
    target,
    text_outcomes,
    visual_outcomes,
)
from midstream.eval.few_shot import Shots, read_shots, up_to_stop
from midstream.eval.find_task import (
    VisualTask,
    in_another_order,
    in_the_square,
    other_pictures,
    read_choice_task,
    read_visual_task,
)
from midstream.eval.scoring import averages, cleaned, mean, suites
from midstream.eval.tasks import Ask, Reply
from midstream.eval.text import TextResult, TextTask, loaded_tasks
from midstream.study.results import OUTCOMES

_IMPOSSIBLE = "its {} is no finite number: the model finds a text impossible"
_TEXTS = ("example_id", "split", "prompt", "prediction", "gold")
_COLUMNS = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [("score", pa.float64()), ("blind_prediction", pa.string()), ("blind_score", pa.float64())]
    + [("text_prediction", pa.string()), ("swapped_prediction", pa.string())]
    + [("image", pa.string()), ("more", pa.list_(pa.string()))]
    + [(name, pa.float64()) for name in OUTCOMES]
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
    shots = {task.name: read_shots(world, task, evaluation, digest) for task in visual}
    about = (evaluation, weights, digest)
    keys = {
        task.name: visual_key(task, _prompts(task, evaluation), *about, shots[task.name])
        for task in visual
    } | {task.name: text_key(task, evaluation.limit, weights, digest) for task in text}
    earlier = {name: done[key] for name, key in keys.items() if key in done} if done else {}
    rows = {name: dict(one.row) for name, one in earlier.items()}
    tasks: dict[str, dict[str, Any]] = answers.ranks.gather(rows)[0]
    others = {task.name: other_pictures(task) for task in visual} if evaluation.blind else {}
    writes = out if answers.ranks.rank == 0 else None
    if writes is not None:
        images = {task.name: [example.pictures for example in task.examples] for task in visual}
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
            own = others.get(task.name), shots[task.name]
            tasks[task.name] = _run_visual(answers, evaluation, task, *own, writes, share)
        answers.progress = _part(progress, sum(sizes), total, in_text, text="text tasks: ")
        found = ask(answers)
    for choice in text:
        result = found[choice.name]
        sizes = answers.num_tokens([row.continuation for row in result.answers])
        weighed = [text_outcomes(*pair) for pair in zip(result.answers, sizes, strict=True)]
        tasks[choice.name] = _report_text(choice, result, weighed, writes)
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
    others: Sequence[tuple[Path, ...]] | None,
    shots: Shots | None,
    out: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    wording = evaluation.wordings.get(task.name, evaluation.prompts)
    prompts = _prompts(task, evaluation)
    passes = _passes(task, evaluation)
    targets = [
        target(task.format, example, evaluation.letters, spelt_as_gold=not passes[0][1])
        for example in task.examples
    ]
    replies: dict[str, list[Reply]] = {}
    said: dict[str, list[str]] = {}
    for index, (how, chooses) in enumerate(passes):
        pictures = _pictures(task, how, others)
        before = [()] * len(prompts) if shots is None else shots.before
        rows = zip(task.examples, pictures, before, strict=True)
        few = evaluation.few_shot
        layout = {
            "shared": few is None or few.draw == "once",
            "document": few is not None and few.layout == "document",
        }
        seen = [example.showing(own, earlier, **layout) for example, own, earlier in rows]
        title = f"{task.name} {how}: " if how else f"{task.name}: "
        answers.progress = _part(progress, index, len(passes), text=title)
        own = [Target()] * len(prompts) if how == "as text" else targets
        found = answers.reply(
            [
                Ask(prompt, image, one.options, one.gold, not (chooses and one.options))
                for prompt, image, one in zip(prompts, seen, own, strict=True)
            ]
        )
        if shots is not None:
            found = [reply._replace(text=up_to_stop(reply.text)) for reply in found]
        replies[how], pairs = found, zip(own, found, strict=True)
        said[how] = [_said(*pair, chooses=chooses) for pair in pairs]
    blind, spoken = said.get("blind"), said.get("as text")
    strangers: Sequence[Reply | None] = replies.get("blind") or [None] * len(prompts)
    weighed = [
        visual_outcomes(example, text, (about, reply, other))
        for example, text, about, reply, other in zip(
            task.examples, said[""], targets, replies[""], strangers, strict=True
        )
    ]
    swapped = said.get("order swapped")
    row = score_visual(task, said[""], blind, spoken, weighed, swapped)
    if shots is not None:
        told = {"shots": len(shots.before[0]), "pool": shots.pool, "excluded": shots.excluded}
        row["details"] |= {f"few_shot.{key}": float(value) for key, value in told.items()}
        behind = f"behind {len(shots.before[0])} shots"
        row["shortened"] = ", ".join(filter(None, (row["shortened"], behind)))
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
            swapped_prediction=swapped,
            image=[str(example.image) for example in task.examples],
            more=[list(map(str, example.more)) or None for example in task.examples],
            **_columns(weighed),
        )
    return row


def _said(about: Target, reply: Reply, *, chooses: bool) -> str:
    """The answer as the scorer reads it: the likeliest of the options, or what was written."""
    if not (chooses and about.options):
        return cleaned(reply.text)
    return about.answers[reply.choices.index(max(reply.choices))]


def _columns(weighed: Sequence[Outcomes]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in weighed] for name in OUTCOMES}


def _passes(task: VisualTask, evaluation: Evaluation) -> list[tuple[str, bool]]:
    """How often a task is asked: what each time is called, and whether fixed answers are chosen."""
    fixed = task.format.fixed is not None and any(e.choices for e in task.examples)
    chooses = fixed and evaluation.fixed_answers != "text"
    passes = [("", chooses)]
    if evaluation.blind:
        passes.append(("blind", chooses))
    if evaluation.blind and any(e.more for e in task.examples):
        passes.append(("order swapped", chooses))
    if chooses and evaluation.fixed_answers == "both":
        passes.append(("as text", False))
    return passes


def _pictures(
    task: VisualTask, how: str, others: Sequence[tuple[Path, ...]] | None
) -> Sequence[tuple[Path, ...]]:
    """What each example shows in a pass."""
    if how == "blind" and others is not None:
        return others
    if how == "order swapped":
        return [in_another_order(example) for example in task.examples]
    return [example.pictures for example in task.examples]


def score_visual(
    task: VisualTask,
    predictions: Sequence[str],
    blind: Sequence[str] | None = None,
    spoken: Sequence[str] | None = None,
    weighed: Sequence[Outcomes] | None = None,
    swapped: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A task's row of results from its answers; `spoken` are the answers' texts beside them,
    `weighed` their outcomes, of which the answers alone tell few, `swapped` the answers with the
    pictures in another order."""
    examples = task.examples
    if weighed is None:
        weighed = [visual_outcomes(*pair) for pair in zip(examples, predictions, strict=True)]
    pictures = [str(example.image) for example in examples]
    scores = _scores(task, predictions)
    splits = [example.split for example in examples]
    sure = bootstrap(scores, pictures, splits)
    details = task.format.details(predictions, examples)
    if spoken is not None:
        more = task.format.details(spoken, examples)
        more["score"] = mean_by_split(_scores(task, spoken), splits)
        details |= {f"text.{key}": value for key, value in more.items()}
    if swapped is not None:
        # Of those that have an order.
        pairs = zip(_scores(task, swapped), scores, examples, strict=True)
        several = [(one, two) for one, two, e in pairs if e.more]
        details["order_swapped.score"] = mean([one for one, _ in several])
        details["order_swapped.before"] = mean([two for _, two in several])
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
        "unparsable": sum(one is None for one in map(task.format.parse, predictions, examples)),
        "splits": split_means(scores, splits) if len(set(splits)) > 1 else {},
        "details": details,
        "continuous": summary(weighed, pictures, splits),
        "note": None if task.format.note is None else task.format.note(predictions, examples),
    }


def _scores(task: VisualTask, texts: Sequence[str]) -> list[float]:
    return task.format.scores(texts, [example.gold for example in task.examples])


def _report_text(
    task: TextTask, result: TextResult, weighed: Sequence[Outcomes], out: Path | None
) -> dict[str, Any]:
    rows = result.answers
    if out is not None:
        write_predictions(
            _predictions_of(out, task.name),
            example_id=[row.name for row in rows],
            split=[row.split for row in rows],
            prompt=[row.prompt for row in rows],
            prediction=["" if r.chosen is None else r.choices[r.chosen] for r in rows],
            gold=[json.dumps(None if r.gold is None else r.choices[r.gold]) for r in rows],
            score=[row.score for row in rows],
            **_columns(weighed),
        )
    splits, value = [row.split for row in rows], result.metrics[result.metric]
    sure = _sure([row.score for row in rows], splits, value)
    num_all = task.num_docs if task.num_docs is not None else result.num_docs
    return {
        "kind": "text",
        "metric": "accuracy" if result.metric == "acc" else result.metric,
        "score": value,
        "higher_is_better": result.higher_is_better,
        "stderr": sure and sure.stderr,
        "low": sure and sure.low,
        "high": sure and sure.high,
        "chance": result.chance,
        "blind": None,
        "num_examples": len(rows),
        "shortened": _shortened(len(rows), num_all) or task.departs,
        "unparsable": 0,
        "splits": {name: result.metrics[f"{name}.{result.metric}"] for name in splits if name},
        "details": result.metrics,
        "continuous": summary(weighed, None, splits),
        "note": None if value is not None else _IMPOSSIBLE.format(result.metric),
    }


def _sure(scores: Sequence[float], splits: Sequence[str], value: float | None) -> Estimate | None:
    """How sure a task's value is; None where it is no mean over examples or a group's tasks."""
    if value is None or not all(map(math.isfinite, scores)):
        return None
    means = (bootstrap(scores, None, parts) for parts in (None, splits))
    equal = (one for one in means if math.isclose(one.mean, value, rel_tol=1e-6, abs_tol=1e-9))
    return next(equal, None)


def _shortened(asked: int, num_all: int) -> str | None:
    """Why a task is not whole, None where it is."""
    if asked > num_all:
        return f"{asked:,} examples where {num_all:,} are published"
    return None if asked == num_all else f"{asked:,} of {num_all:,} examples"


def write_predictions(path: Path, **columns: list[Any] | None) -> None:
    """One row an example; null in a column that is not given."""
    nothing = [None] * len(columns["example_id"] or ())
    held = [columns.get(name) or nothing for name in _COLUMNS.names]
    write_table(path, pa.table(held, schema=_COLUMNS))


def _part(progress: Progress, index: int, total: int, span: int = 1, text: str = "") -> Progress:
    """The `span` parts from `index` of `total` equal ones of a progress."""
    return lambda fraction, note: progress((index + fraction * span) / total, text + note)
