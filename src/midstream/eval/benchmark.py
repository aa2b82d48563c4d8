"""One model on a world's benchmarks: answers, scores, predictions, the stable score."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from midstream.config import Evaluation
from midstream.eval.aggregate import mean_by_split, split_means, stable_score, standard_error
from midstream.eval.task import VISUAL_FORMATS, Answerer, VisualExample, VisualFormat
from midstream.eval.text import TextItem, TextResult, read_text_task, run_text_tasks
from midstream.storage import read_json, write_bytes

# The order of examples and the wrong pictures are part of the benchmark, not of a run.
_SEED = 0
# Batches handed to the model at a time: it may sort within them, and progress is told between.
_BATCHES_AT_ONCE = 8
_COLUMNS = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt", pa.string()),
        ("prediction", pa.string()),
        ("gold", pa.string()),
        ("score", pa.float64()),
        ("blind_prediction", pa.string()),
        ("blind_score", pa.float64()),
        ("image", pa.string()),
    ]
)
Progress = Callable[[float, str], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class VisualTask:
    """A folder under a world's bench/, read: its format, what guessing scores, its examples."""

    name: str
    format: VisualFormat
    chance: float
    examples: tuple[VisualExample, ...]


@dataclass(frozen=True)
class TextTask:
    """A file of a world's text_tasks/, read."""

    name: str
    chance: float
    items: tuple[TextItem, ...]


def evaluate(
    answerer: Answerer, evaluation: Evaluation, world: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """Run the benchmarks; the `tasks` and `stable` parts of results.json (docs/store.md).

    Every task is read before the first answer, so that a missing file costs nothing. Writes
    out/predictions/<task>.parquet. `progress` gets a fraction and a text.
    Raises FileNotFoundError or ValueError for files that are missing or malformed.
    """
    names = [*evaluation.visual_tasks, *evaluation.text_tasks]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"tasks are asked for twice: {', '.join(twice)}; name each of them once")
    if not names:
        raise ValueError("the evaluation names no task; set visual_tasks or text_tasks")
    visual = [read_visual_task(world, name, evaluation.limit) for name in evaluation.visual_tasks]
    text = [read_choice_task(world, name, evaluation.limit) for name in evaluation.text_tasks]
    blind_images = {task.name: other_images(task) for task in visual} if evaluation.blind else {}
    tasks: dict[str, dict[str, Any]] = {}
    for index, task in enumerate(visual):
        share = _part(progress, index, len(names))
        blind = blind_images.get(task.name)
        tasks[task.name] = _run_visual(answerer, evaluation, task, blind, out, share)
    share = _part(progress, len(visual), len(names), len(text))
    found = run_text_tasks(answerer, {task.name: list(task.items) for task in text}, share)
    for choice in text:
        tasks[choice.name] = _report_text(choice, found[choice.name], out)
    return {"tasks": tasks, "stable": _stable(tasks)}


def read_visual_task(world: Path, name: str, limit: int | None = None) -> VisualTask:
    """A world's visual benchmark and the first `limit` examples of its seeded order."""
    entry = _declared(world, "visual_tasks", name)
    kind = entry.get("format")
    if kind not in VISUAL_FORMATS:
        known = ", ".join(VISUAL_FORMATS)
        raise ValueError(f"{world / 'world.json'}: task {name!r} has format {kind!r}; use {known}")
    folder = world / "bench" / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"benchmark folder {folder} does not exist; there: {_folders(folder.parent)}"
        )
    examples = VISUAL_FORMATS[kind].read(folder)
    chosen = in_seeded_order(examples, [example.split for example in examples], name)[:limit]
    num_splits = len({example.split for example in examples})
    if limit is not None and limit < num_splits:
        raise ValueError(f"limit {limit} cannot cover the {num_splits} splits of {name}; raise it")
    chance = _chance(world, name, entry)
    return VisualTask(name, VISUAL_FORMATS[kind], chance, tuple(chosen))


def read_choice_task(world: Path, name: str, limit: int | None = None) -> TextTask:
    """A world's text benchmark and the first `limit` items of its seeded order."""
    entry = _declared(world, "text_tasks", name)
    items = read_text_task(world / "text_tasks" / f"{name}.jsonl")
    chosen = in_seeded_order(items, [""] * len(items), name)[:limit]
    return TextTask(name, _chance(world, name, entry), tuple(chosen))


def in_seeded_order(items: Sequence[Item], splits: Sequence[str], key: str) -> list[Item]:
    """The items shuffled, the splits taking turns, so that any first part is balanced.

    A pure function of its arguments: the same in every process.
    """
    by_split: dict[str, list[Item]] = defaultdict(list)
    for item, split in zip(items, splits, strict=True):
        by_split[split].append(item)
    for split, members in by_split.items():
        random.Random(f"{_SEED} order {key} {split}").shuffle(members)
    longest = max((len(members) for members in by_split.values()), default=0)
    return [m[turn] for turn in range(longest) for m in by_split.values() if turn < len(m)]


def other_images(task: VisualTask) -> list[Path]:
    """For each example the picture of another one: a permutation in which no picture stays.

    Raises ValueError if a picture belongs to more than half of the examples.
    """
    members: dict[Path, list[int]] = defaultdict(list)
    for index, example in enumerate(task.examples):
        members[example.image].append(index)
    commonest = max(members, key=lambda image: len(members[image]))
    step, count = len(members[commonest]), len(task.examples)
    if 2 * step > count:
        raise ValueError(
            f"{task.name}: {step} of {count} examples share picture {commonest}, so that a blind "
            "score cannot give each of them another; raise the limit or set blind=False"
        )
    groups = list(members.values())
    random.Random(f"{_SEED} blind {task.name}").shuffle(groups)
    # Examples of one picture stand together and no group is longer than `step`, so that moving
    # every picture on by `step` takes it out of its group.
    order = [index for group in groups for index in group]
    images = [task.examples[0].image] * count
    for position, index in enumerate(order):
        images[index] = task.examples[order[(position + step) % count]].image
    return images


def _run_visual(
    answerer: Answerer,
    evaluation: Evaluation,
    task: VisualTask,
    blind_images: Sequence[Path] | None,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    prompts = [task.format.prompt(e.question, evaluation.prompts) for e in task.examples]
    images = [example.image for example in task.examples]
    golds = [example.gold for example in task.examples]
    at_once = evaluation.batch_size * _BATCHES_AT_ONCE
    answers, scores = [], []
    passes = [images] if blind_images is None else [images, blind_images]
    for index, pictures in enumerate(passes):
        share = _part(progress, index, len(passes), text=f"{task.name}{' blind' * index}: ")
        texts = _ask(answerer, prompts, pictures, at_once, share)
        answers.append(texts)
        scores.append([task.format.score(t, gold) for t, gold in zip(texts, golds, strict=True)])
    asked_blind = blind_images is not None
    nothing = [None] * len(prompts)
    _write_predictions(
        out / "predictions" / f"{task.name}.parquet",
        example_id=[example.example_id for example in task.examples],
        prompt=prompts,
        prediction=answers[0],
        gold=[json.dumps(gold, ensure_ascii=False) for gold in golds],
        score=scores[0],
        blind_prediction=answers[1] if asked_blind else nothing,
        blind_score=scores[1] if asked_blind else nothing,
        image=[str(image) for image in images],
    )
    splits = [example.split for example in task.examples]
    return {
        "kind": "vision",
        "format": task.format.name,
        "metric": task.format.metric,
        "score": mean_by_split(scores[0], splits),
        "stderr": standard_error(scores[0], [str(image) for image in images], splits),
        "chance": task.chance,
        "blind": mean_by_split(scores[1], splits) if asked_blind else None,
        "num_examples": len(prompts),
        "unparsable": sum(not task.format.parses(text) for text in answers[0]),
        "splits": split_means(scores[0], splits) if len(set(splits)) > 1 else {},
    }


def _ask(
    answerer: Answerer,
    prompts: Sequence[str],
    images: Sequence[Path],
    at_once: int,
    progress: Progress,
) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        texts = answerer.generate(prompts[part], list(images[part]))
        assert len(texts) == len(prompts[part]), "the model left a prompt without an answer"
        answers += [text.strip() for text in texts]
        progress(len(answers) / len(prompts), f"{len(answers):,} of {len(prompts):,}")
    return answers


def _report_text(task: TextTask, result: TextResult, out: Path) -> dict[str, Any]:
    nothing = [None] * len(result.items)
    _write_predictions(
        out / "predictions" / f"{task.name}.parquet",
        example_id=[item.example_id for item in result.items],
        prompt=[item.query for item in result.items],
        prediction=[i.choices[at] for i, at in zip(result.items, result.chosen, strict=True)],
        gold=[json.dumps(item.choices[item.gold], ensure_ascii=False) for item in result.items],
        score=list(result.scores),
        blind_prediction=nothing,
        blind_score=nothing,
        image=nothing,
    )
    return {
        "kind": "text",
        "metric": "accuracy",
        "score": result.accuracy,
        "stderr": standard_error(result.scores),
        "chance": task.chance,
        "blind": None,
        "num_examples": len(result.items),
        "unparsable": 0,
    }


def _stable(tasks: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    def mean_over_chance(kind: str, column: str) -> float | None:
        rows = {name: row for name, row in tasks.items() if row["kind"] == kind}
        if not rows or any(row[column] is None for row in rows.values()):
            return None
        return stable_score(
            {name: row[column] for name, row in rows.items()},
            {name: row["chance"] for name, row in rows.items()},
        )

    return {
        "vision": mean_over_chance("vision", "score"),
        "vision_blind": mean_over_chance("vision", "blind"),
        "text": mean_over_chance("text", "score"),
    }


def _write_predictions(path: Path, **columns: list[Any]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_COLUMNS), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def _declared(world: Path, kind: str, name: str) -> dict[str, Any]:
    path = world / "world.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it names the world's tasks (docs/data.md)")
    tasks = read_json(path).get(kind, {})
    if name not in tasks:
        raise FileNotFoundError(
            f"{path} has no task {name!r} under {kind!r}; there: {', '.join(sorted(tasks)) or '-'}"
        )
    entry: dict[str, Any] = tasks[name]
    return entry


def _chance(world: Path, name: str, entry: dict[str, Any]) -> float:
    chance = entry.get("chance")
    if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
        raise ValueError(
            f"{world / 'world.json'}: task {name!r} has chance {chance!r}; "
            "say what guessing scores, 0 to 1"
        )
    return float(chance)


def _folders(folder: Path) -> str:
    return ", ".join(sorted(item.name for item in folder.glob("*") if item.is_dir())) or "nothing"


def _part(progress: Progress, index: int, total: int, span: int = 1, text: str = "") -> Progress:
    """The `span` parts from `index` of `total` equal ones of a progress."""
    return lambda fraction, note: progress((index + fraction * span) / total, text + note)
