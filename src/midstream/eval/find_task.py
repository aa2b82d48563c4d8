"""A benchmark by its name: where its files lie, which of its examples are asked, in which order."""

import difflib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from midstream.benchmark_files import listed_tasks, own_text_file, visual_folder
from midstream.eval.harness_tasks import harness_task, in_harness
from midstream.eval.local_tasks import HARNESS_TASKS
from midstream.eval.scoring import to_square
from midstream.eval.task import VISUAL_FORMATS, VisualExample, VisualFormat
from midstream.eval.text import TextTask, own_task, read_text_task

# The order of examples and the wrong pictures are part of the benchmark, not of a run.
_SEED = 0
# Of each split of a slim task, as the paper's evaluator has them.
SLIM_EXAMPLES = 1024
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
    listed = name in listed_tasks(world, "text_tasks")
    if listed or ((world / "world.json").is_file() and not in_harness(name)):
        entry = _declared(world, "text_tasks", name)
        items = read_text_task(own_text_file(world, name))
        task = own_task(items, name, _chance(world, name, entry))
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
        folder = visual_folder(world, name)
        return str(kind), _chance(world, name, entry), folder
    if name not in VISUAL_FORMATS:
        near = difflib.get_close_matches(name, [*VISUAL_FORMATS, *HARNESS_TASKS], 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(VISUAL_FORMATS)}"
        raise ValueError(f"no visual benchmark is called {name!r}{hint}")
    return name, VISUAL_FORMATS[name].chance, visual_folder(world, name)


def _declared(world: Path, kind: str, name: str) -> dict[str, Any]:
    path = world / "world.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it names the world's tasks (docs/data.md)")
    tasks = listed_tasks(world, kind)
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
