"""A benchmark by its name, a world's, a folder's, lm-evaluation-harness's own: what is asked of it,
in which order."""

import difflib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from midstream.core.identity import (
    GROUPS_FILE,
    hub_folder,
    listed_tasks,
    own_text_file,
    published_files,
    visual_folder,
)
from midstream.core.storage import read_json
from midstream.cost.questions import published_size
from midstream.eval.harness_data import called, data_set_folder, members, require_hub, split_files
from midstream.eval.scoring import TEXT_CHANCE, to_square
from midstream.eval.tasks import HARNESS_TASKS, VISUAL_FORMATS, VisualExample, VisualFormat
from midstream.eval.text import SHARES, TextTask, manager, own_task, read_text_task


def harness_task(name: str, folder: Path) -> TextTask:
    """A task of the harness from what lies under `folder`: its published files, wherever they are,
    or a folder of the task's name, or its data set's, with the files as a hub has them; else from
    the hub.

    Raises ValueError for a name that the harness does not have, with the nearest, and for a group
    without a number of its own, with its tasks; FileNotFoundError where nothing is there and the
    hub is not asked or does not answer.
    """
    paths = published_files(folder, name)
    if paths:
        return _published(name, paths)
    entry = _entry(name, folder)
    # The paper's tasks are asked without examples in the prompt, others as they are described.
    settings = {"num_fewshot": 0} if name in HARNESS_TASKS else {}
    chance = TEXT_CHANCE[name][0] if name in TEXT_CHANCE else None
    own = hub_folder(folder, name) or data_set_folder(entry, folder)
    if own is not None and entry.kind.name == "TASK":
        return _from_files(name, own, entry, chance)
    require_hub(entry, folder)
    return TextTask(name, chance, settings, None)


def require_share(task: TextTask) -> None:
    """Raise ValueError for a task of the harness that has no share of right answers: a study's
    scores, figures and tables are such shares."""
    entry = manager().task_index.get(task.name) if task.docs is None else None
    described = entry.cfg or {} if entry is not None else {}
    stated = described.get("aggregate_metric_list") or described.get("metric_list") or []
    stated = [stated] if isinstance(stated, dict) else stated
    listed = [str(one.get("metric")) for one in stated]
    if listed and not set(listed) & set(SHARES):
        raise ValueError(
            f"text task {task.name} has the metrics {', '.join(listed)}, no share of right answers "
            f"({', '.join(SHARES)}) as a study needs it; ask it with midstream eval"
        )


def _from_files(name: str, own: Path, entry: Any, chance: float | None) -> TextTask:
    # Without examples in its prompts, which are of a split that need not be here.
    described = dict(entry.cfg)
    split = str(described.get("test_split") or described.get("validation_split")).split("[")[0]
    kind, files = split_files(own, split, described.get("dataset_name"), name)
    settings = {"include": str(entry.yaml_path), "num_fewshot": 0}
    settings |= {"dataset_path": kind, "fewshot_split": None}
    shots = described.get("num_fewshot")
    departs = f"without the {shots} examples in its prompts" if shots else None
    return TextTask(name, chance, settings, None, split, departs=departs, files=files)


def _published(name: str, paths: tuple[Path, ...]) -> TextTask:
    import lm_eval.tasks

    known = HARNESS_TASKS[name]
    local = known.read(*paths)
    settings = known.settings
    if known.yaml is not None:
        settings = {"include": str(Path(lm_eval.tasks.__file__).parent / known.yaml)}
    cut = len(local.docs) < known.num_docs
    departs = local.departs or (
        f"{len(local.docs):,} of {known.num_docs:,} records" if cut else None
    )
    chance = local.chance if local.chance is not None else TEXT_CHANCE[name][0]
    settings = {**settings, **local.settings, "num_fewshot": 0}
    return TextTask(name, chance, settings, local.docs, known.split, known.num_docs, departs)


def _entry(name: str, folder: Path) -> Any:
    index = manager().task_index
    entry = index.get(name)
    if entry is None:
        hint = _nearest(name.lower(), [*VISUAL_FORMATS, *HARNESS_TASKS, *index])
        mine = own_text_file(folder, name).is_file() or hub_folder(folder, name)
        if mine or name.endswith(".yaml"):
            hint = (
                "; tasks of your own are text_tasks/<name>.jsonl (lines of query, choices and "
                "gold) or bench/<name>/questions.jsonl, which the data's world.json lists "
                "(docs/evaluation.md)"
            )
        raise ValueError(f"no text task is called {name!r}{hint}")
    kind, described = entry.kind.name, entry.cfg or {}
    if kind == "TAG" or (kind == "GROUP" and not described.get("aggregate_metric_list")):
        listed = ", ".join(called(one) for one in (members(entry) or [])[:20])
        raise ValueError(
            f"{name} is a {kind.lower()} of the harness, without a number of its own; name its "
            f"tasks: {listed}"
        )
    return entry


# The order of examples and the wrong pictures are part of the benchmark, not of a run.
_SEED = 0
# Of each split of a slim task, as the paper's evaluator has them.
SLIM_EXAMPLES = 1024
Item = TypeVar("Item")


@dataclass(frozen=True)
class VisualTask:
    """A benchmark, read: its format, what guessing scores, the examples that are asked, of how
    many (of official files as many as were published)."""

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
    `pictures` they may be missing. Scores are told apart by the groups of a groups.json beside the
    official files; ValueError where it leaves out an example.
    """
    kind, chance, folder = _visual_folder(world, name)
    examples = _grouped(VISUAL_FORMATS[kind].read(folder, pictures=pictures), folder / GROUPS_FILE)
    splits = [example.split for example in examples]
    num_splits = len(set(splits))
    chosen = (in_seeded_order(examples, splits, name) if shuffled else examples)[:limit]
    chosen = chosen[: SLIM_EXAMPLES * num_splits] if slim else chosen
    if limit is not None and limit < num_splits:
        raise ValueError(f"limit {limit} cannot cover the {num_splits} splits of {name}; raise it")
    own = (world / "world.json").is_file()
    num_all = len(examples) if own else published_size(name, len(examples))
    return VisualTask(name, VISUAL_FORMATS[kind], chance, tuple(chosen), num_all)


def _grouped(examples: list[VisualExample], path: Path) -> list[VisualExample]:
    if not path.is_file():
        return examples
    groups = read_json(path)
    if not isinstance(groups, dict):
        raise ValueError(f"{path} is no object of groups by an example's id (docs/evaluation.md)")
    if missing := next((e.example_id for e in examples if e.example_id not in groups), None):
        raise ValueError(
            f"{path} names no group for example {missing!r}; give each one, or delete the file"
        )
    return [
        replace(example, kinds={**example.kinds, "group": str(groups[example.example_id])})
        for example in examples
    ]


def read_choice_task(world: Path, name: str, limit: int | None = None) -> TextTask:
    """A text benchmark and the first `limit` records of its seeded order: one that world.json
    lists, or one of the harness by its name."""
    declared = name in listed_tasks(world, "text_tasks")
    known = declared or name in HARNESS_TASKS or not (world / "world.json").is_file()
    if declared or not (known or name in manager().task_index):
        chance = _declared(world, "text_tasks", name)["chance"]
        task = own_task(read_text_task(own_text_file(world, name)), name, chance)
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
    for split, own in by_split.items():
        random.Random(f"{_SEED} order {key} {split}").shuffle(own)
    longest = max((len(own) for own in by_split.values()), default=0)
    return [m[turn] for turn in range(longest) for m in by_split.values() if turn < len(m)]


def other_pictures(task: VisualTask) -> list[tuple[Path, ...]]:
    """For each example the pictures of another one, none of which is its own. Where the other has
    fewer they are repeated, where it has more the first ones are taken.

    Raises ValueError if pictures belong to more than half of the examples, and where they share so
    many that no other pictures are left for one.
    """
    members: dict[tuple[Path, ...], list[int]] = defaultdict(list)
    for index, example in enumerate(task.examples):
        members[example.pictures].append(index)
    commonest = max(members, key=lambda image: len(members[image]))
    step, count = len(members[commonest]), len(task.examples)
    if 2 * step > count:
        raise ValueError(
            f"{task.name}: {step} of {count} examples share picture {commonest[0]}, so that a "
            "blind score has no other for each; raise the limit or set blind=False"
        )
    groups = list(members.values())
    random.Random(f"{_SEED} blind {task.name}").shuffle(groups)
    # Most get as many pictures as they have; a stable order, of single pictures the drawn one.
    groups.sort(key=lambda group: len(task.examples[group[0]].pictures))
    # Examples of the same pictures stand together and no group is longer than `step`, so that
    # moving all on by `step` takes them out of their group.
    order = [index for group in groups for index in group]
    own = [task.examples[index].pictures for index in order]
    others = own[step:] + own[:step]
    for at, mine in enumerate(own):
        if _apart(mine, others[at]):
            continue
        # Of several pictures one may be another example's too: it changes with the next that can.
        for place in (*range(at + 1, count), *range(at)):
            if _apart(mine, others[place]) and _apart(own[place], others[at]):
                others[at], others[place] = others[place], others[at]
                break
        else:
            raise ValueError(
                f"{task.name}: its examples share so many pictures that a blind score has no "
                f"other for {mine[0]}; raise the limit or set blind=False"
            )
    shown = {index: _as_many(*pair) for index, *pair in zip(order, own, others, strict=True)}
    return [shown[index] for index in range(count)]


def _as_many(mine: tuple[Path, ...], other: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(islice(cycle(other), len(mine)))


def _apart(mine: tuple[Path, ...], other: tuple[Path, ...]) -> bool:
    return set(mine).isdisjoint(_as_many(mine, other))


def in_another_order(example: VisualExample) -> tuple[Path, ...]:
    """An example's pictures, each in the place of the one before it."""
    return example.pictures[1:] + example.pictures[:1]


def _visual_folder(world: Path, name: str) -> tuple[str, float, Path]:
    """A task's format, its chance, and where its files lie."""
    if (world / "world.json").is_file():
        entry = _declared(world, "visual_tasks", name)
        if (kind := entry.get("format")) not in VISUAL_FORMATS:
            known = ", ".join(VISUAL_FORMATS)
            raise ValueError(
                f"{world / 'world.json'}: task {name!r} has format {kind!r}; use {known}"
            )
        return str(kind), entry["chance"], visual_folder(world, name)
    if name not in VISUAL_FORMATS:
        hint = _nearest(name.lower(), [*VISUAL_FORMATS, *HARNESS_TASKS], most=3)
        if name in HARNESS_TASKS:
            hint = "; it is a text task, which models alone are asked (midstream eval)"
        raise ValueError(
            f"no visual benchmark is called {name!r}{hint}; there are {', '.join(VISUAL_FORMATS)}; "
            "another one's questions in format qa are listed in world.json (docs/evaluation.md)"
        )
    return name, VISUAL_FORMATS[name].chance, visual_folder(world, name)


def _nearest(name: str, known: Iterable[str], most: int = 1) -> str:
    near = difflib.get_close_matches(name, list(known), most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _declared(world: Path, kind: str, name: str) -> dict[str, Any]:
    """What world.json says of a task, its chance level at least."""
    path, tasks = world / "world.json", listed_tasks(world, kind)
    if name not in tasks:
        hint = _nearest(name, tasks)
        raise FileNotFoundError(
            f"{path} has no task {name!r} under {kind!r}{hint}; there: "
            f"{', '.join(sorted(tasks)) or '-'}"
        )
    entry: dict[str, Any] = dict(tasks[name])
    chance = entry.get("chance")
    if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
        raise ValueError(
            f"{path}: task {name!r} has chance {chance!r}; say what guessing scores, 0 to 1"
        )
    return entry | {"chance": float(chance)}
