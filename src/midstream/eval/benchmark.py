"""One model on benchmarks: answers, scores, predictions, the stable score."""

import difflib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from midstream.config import Evaluation
from midstream.eval.aggregate import stable_score, suites
from midstream.eval.kept_answers import KeptAnswers
from midstream.eval.local_tasks import HARNESS_TASKS, find_local
from midstream.eval.readers.choices import LETTERS
from midstream.eval.scoring import to_square
from midstream.eval.task import VISUAL_FORMATS, VisualExample, VisualFormat
from midstream.eval.text import (
    TextResult,
    TextTask,
    harness_task,
    own_task,
    read_text_task,
    run_text_tasks,
)
from midstream.storage import read_json, write_bytes
from midstream.uncertainty import bootstrap, mean_by_split, split_means

# The order of examples and the wrong pictures are part of the benchmark, not of a run.
_SEED = 0
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
# Of each split of a slim task, as the paper's evaluator has them.
SLIM_EXAMPLES = 1024
Progress = Callable[[float, str], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class VisualTask:
    """A benchmark, read: its format, what guessing scores, the examples that are asked, of how
    many."""

    name: str
    format: VisualFormat
    chance: float
    examples: tuple[VisualExample, ...]
    num_all: int


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
    return {"tasks": tasks, "stable": _stable(tasks), "suites": suites(tasks)}


def read_visual_task(
    world: Path,
    name: str,
    limit: int | None = None,
    *,
    slim: bool = False,
    pictures: bool = True,
    shuffled: bool = True,
) -> VisualTask:
    """A visual benchmark and the first `limit` examples of its seeded order; not `shuffled`, of
    the files' own order.

    `world` is a world whose world.json lists the task, or a folder with the official files under
    the benchmark's own name (`<world>/gqa` or `<world>/bench/gqa`), or of nothing else. Without
    `pictures` they may be missing.
    """
    kind, chance, folder = _visual_folder(world, name)
    examples = VISUAL_FORMATS[kind].read(folder, pictures=pictures)
    splits = [example.split for example in examples]
    chosen = (in_seeded_order(examples, splits, name) if shuffled else examples)[:limit]
    num_splits = len(set(splits))
    if slim:
        chosen = chosen[: SLIM_EXAMPLES * num_splits]
    if limit is not None and limit < num_splits:
        raise ValueError(f"limit {limit} cannot cover the {num_splits} splits of {name}; raise it")
    return VisualTask(name, VISUAL_FORMATS[kind], chance, tuple(chosen), len(examples))


def read_choice_task(world: Path, name: str, limit: int | None = None) -> TextTask:
    """A text benchmark and the first `limit` records of its seeded order: one that world.json
    lists, or one of the harness by its name."""
    path = world / "world.json"
    listed = read_json(path).get("text_tasks", {}) if path.is_file() else {}
    if name in listed:
        entry = _declared(world, "text_tasks", name)
        task = own_task(
            read_text_task(world / "text_tasks" / f"{name}.jsonl"),
            name,
            _chance(world, name, entry),
        )
    elif path.is_file() and (name not in HARNESS_TASKS or find_local(world, name) is None):
        _declared(world, "text_tasks", name)  # which says what there is
        raise AssertionError(name)
    else:
        task = harness_task(name, world)
    if task.docs is None:
        return task
    chosen = in_seeded_order(task.docs, [""] * len(task.docs), name)[:limit]
    return replace(task, docs=tuple(chosen))


def in_the_square(task: VisualTask) -> VisualTask:
    """The same with boxes as shares of the square that a picture is padded to."""
    changed = []
    for example in task.examples:
        if example.size is None:
            return task
        box = [round(side, 2) for side in to_square(example.gold, *example.size)]
        changed.append(replace(example, gold=box))
    return replace(task, examples=tuple(changed))


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


def write_predictions(path: Path, **columns: list[Any] | None) -> None:
    """One row an example (docs/store.md)."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_COLUMNS), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def _visual_folder(world: Path, name: str) -> tuple[str, float, Path]:
    """A task's format, its chance, and where its files lie."""
    if (world / "world.json").is_file():
        entry = _declared(world, "visual_tasks", name)
        kind = entry.get("format")
        if kind not in VISUAL_FORMATS:
            known = ", ".join(VISUAL_FORMATS)
            raise ValueError(
                f"{world / 'world.json'}: task {name!r} has format {kind!r}; use {known}"
            )
        folder = world / "bench" / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"benchmark folder {folder} does not exist; there: {_folders(folder.parent)}"
            )
        return str(kind), _chance(world, name, entry), folder
    if name not in VISUAL_FORMATS:
        near = difflib.get_close_matches(name, [*VISUAL_FORMATS, *HARNESS_TASKS], 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(VISUAL_FORMATS)}"
        raise ValueError(f"no visual benchmark is called {name!r}{hint}")
    if not world.is_dir():
        raise FileNotFoundError(f"{world} does not exist; give the folder of the official files")
    places = [world / "bench" / name, world / name, world]
    return name, VISUAL_FORMATS[name].chance, next(path for path in places if path.is_dir())


def _declared(world: Path, kind: str, name: str) -> dict[str, Any]:
    path = world / "world.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it names the world's tasks (docs/data.md)")
    tasks = read_json(path).get(kind, {})
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FileNotFoundError(
            f"{path} has no task {name!r} under {kind!r}{hint}; there: "
            f"{', '.join(sorted(tasks)) or '-'}"
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
