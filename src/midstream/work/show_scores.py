"""What `midstream eval` and `midstream score` print: tasks, scores, examples, differences."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from midstream.core.identity import (
    TEXT_FILES,
    hub_folders,
    listed_tasks,
    own_text_file,
    published_files,
)
from midstream.core.stats import paired_difference
from midstream.eval.benchmark_records import UNPACKED
from midstream.eval.predictions import score_predictions
from midstream.eval.scoring import SUITES, TEXT_CHANCE, VISUAL_CHANCE
from midstream.eval.tasks import HARNESS_TASKS, VISUAL_FORMATS
from midstream.eval.text import read_text_task
from midstream.launch.terminal import out
from midstream.work.protocol import Channel, Request, print_line

# A score from which an example counts as right, where a person is shown which.
RIGHT = 0.5


class ListTasksRequest(Request):
    """Where the benchmarks lie, if anywhere."""

    data: Path | None


class ShowRequest(Request):
    """Folders of results, tasks of them (none: all), and how many examples of each."""

    folders: tuple[Path, ...]
    tasks: tuple[str, ...]
    count: int
    wrong: bool = False


class ScoreRequest(Request):
    """The arguments of `midstream score`."""

    task: str
    predictions: Path
    data: Path
    split: str | None
    missing_as_wrong: bool
    ignore_unknown: bool
    box_frame: Literal["picture", "square"]
    as_json: bool


def list_tasks(request: ListTasksRequest, channel: Channel) -> None:
    """Every task that is known: what is on disk, what is missing, and who published it."""
    data, console = request.data, out()
    # Without a folder nothing was looked for.
    lacking = "needs" if data is None else "missing"
    table = Table(box=None, pad_edge=False)
    for title in ("task", "chance", "on disk", "published by", "licence"):
        table.add_column(title, overflow="fold")
    if data is not None:
        _list_own(data, table)
    for name, row in VISUAL_FORMATS.items():
        place = None if data is None else find_place(data, name)
        there = f"{lacking}: {', '.join(row.files)}"
        there = there if place is None else _visual_files(place, name)
        table.add_row(name, _percent(row.chance), there, row.published, row.licence)
    for name, task in HARNESS_TASKS.items():
        found = () if data is None else published_files(data, name)
        files = " or ".join(" and ".join(paths) for paths in TEXT_FILES[name])
        there = f"yes, in {found[0].parent}" if found else f"{lacking}: {files}"
        table.add_row(name, _percent(TEXT_CHANCE[name][0]), there, task.published, task.licence)
    console.print(table)
    for suite, members in SUITES.items():
        console.print(f"{suite}: mean of score minus chance over {', '.join(members)}")
    console.print("Chance levels, and where they stand:")
    for name, (_, source) in {**VISUAL_CHANCE, **TEXT_CHANCE}.items():
        console.print(f"  {name}: {source}")


def _list_own(data: Path, table: Table) -> None:
    """A row for each task of world.json or in a folder of its own: what is there, or wrong."""
    visual, text = (listed_tasks(data, kind) for kind in ("visual_tasks", "text_tasks"))
    told = "this world" if visual or text else ""
    for name, entry in visual.items():
        kind = entry.get("format") if isinstance(entry, dict) else None
        if kind in VISUAL_FORMATS:
            there = _visual_files(data / "bench" / name, kind)
        else:
            there = f"not whole: its format is {kind!r}; use {', '.join(VISUAL_FORMATS)}"
        table.add_row(name, _chance(entry), f"{there} (format {kind})", told, "")
    for name, entry in text.items():
        path = own_text_file(data, name)
        try:
            there = f"{len(read_text_task(path)):,} items in {path}"
        except (ValueError, OSError) as error:
            there = f"not whole: {error}"
        table.add_row(name, _chance(entry), there, told, "")
    for name in hub_folders(data):
        chance = _percent(TEXT_CHANCE[name][0]) if name in TEXT_CHANCE else "-"
        there = f"a data set's own files in {data / 'text_tasks' / name}"
        table.add_row(name, chance, there, "lm-evaluation-harness", "")


def _chance(entry: Any) -> str:
    chance = entry.get("chance") if isinstance(entry, dict) else None
    return _percent(float(chance)) if isinstance(chance, int | float) else "none given"


def _visual_files(place: Path, name: str) -> str:
    """What a folder holds of a format: questions, and pictures that are missing."""
    try:
        examples = VISUAL_FORMATS[name].read(place, pictures=False)
    except (ValueError, OSError) as error:
        return f"not whole: {error}"
    shown = {path for example in examples for path in example.pictures}
    # Those that tables hold are unpacked when they are asked about.
    absent = sum(not path.is_file() and path.parent.name != UNPACKED for path in shown)
    pictures = f"; {absent:,} pictures are missing" if absent else ""
    return f"{len(examples):,} questions in {place}{pictures}"


def find_place(data: Path, name: str) -> Path | None:
    """Where a benchmark's files would be looked for and its folder is."""
    for path in (data / "bench" / name, data / name):
        if path.is_dir():
            return path
    first = VISUAL_FORMATS[name].files[0]
    return data if (data / first).exists() else None


def print_scores(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """One column a model: score and standard error of each task, blind scores, stable scores."""
    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    for title in short_names(list(rows)):
        table.add_column(title, justify="right", overflow="fold")
    tasks = dict.fromkeys(task for row in rows.values() for task in row["tasks"])
    for task in tasks:
        table.add_row(task, *(_cell(row["tasks"].get(task)) for row in rows.values()))
    console.print(table)
    for name, row in rows.items():
        told = {f"stable {kind}": value for kind, value in row["stable"].items()}
        parts = [f"{kind} {_percent(v)}" for kind, v in told.items() if v is not None]
        parts += [f"{suite} {_suite(found)}" for suite, found in row["suites"].items()]
        if parts:
            print_line(console, f"{name}: {'; '.join(parts)}")
        for task, found in row["tasks"].items():
            if unread := found.get("unparsable"):
                told_unread = f"{unread:,} of {found['num_examples']:,} answers cannot be read"
                how = "and count as wrong (midstream eval FOLDER --show 5 --wrong shows them)"
                print_line(console, f"{task}: {told_unread} {how}")
            if found.get("note"):
                print_line(console, f"{task}: {found['note']}")
        if short := [f"{t} ({r['shortened']})" for t, r in row["tasks"].items() if r["shortened"]]:
            print_line(console, f"not whole: {', '.join(short)}")


def short_names(names: Sequence[str]) -> list[str]:
    """The end of each path or hub name, as long as it takes to tell it from the others."""
    parts = [Path(os.path.abspath(name)).parts[1:] for name in names]
    told = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        told.append("/".join(own[-length:]))
    return told


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["score"] is None:
        return f"{row['metric']} not finite"
    if row["chance"] is None:  # no share of right answers
        return f"{row['metric']} {row['score']:.4g}"
    error = "" if row["stderr"] is None else f" ±{100 * row['stderr']:.1f}"
    blind = "" if row["blind"] is None else f" (blind {100 * row['blind']:.1f})"
    return f"{100 * row['score']:.1f}{error}{blind}"


def _suite(found: dict[str, Any]) -> str:
    if found["score"] is not None:
        return _percent(found["score"])
    lacks = [*(f"no {task}" for task in found["missing"]), *found["shortened"]]
    return f"unknown ({', '.join(lacks)}{' not whole' if found['shortened'] else ''})"


def score_file(request: ScoreRequest, channel: Channel) -> None:
    """Print the score of a file of predictions; see `score_predictions` for the errors."""
    row = score_predictions(
        request.data,
        request.task,
        request.predictions,
        split=request.split,
        missing_as_wrong=request.missing_as_wrong,
        ignore_unknown=request.ignore_unknown,
        box_frame=request.box_frame,
    )
    if request.as_json:
        print(json.dumps(row, indent=2))
        return
    console, error = out(), ""
    if row["stderr"] is not None:
        low, high = 100 * row["low"], 100 * row["high"]
        error = f" ± {100 * row['stderr']:.2f}, 95 % interval {low:.2f} to {high:.2f}"
    told = f"{request.task}: {row['metric']} {100 * row['score']:.2f}{error}"
    asked = f"{row['num_examples']:,} questions, chance {100 * row['chance']:g}"
    print_line(console, f"{told} ({asked})")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in {**row["splits"], **row["details"]}.items():
        table.add_row(name, _percent(value))
    console.print(table)
    short = f"not whole: {row['shortened']}" if row["shortened"] else None
    for note in filter(None, [short, *row["notes"], row["note"]]):
        print_line(console, note)


def show_examples(request: ShowRequest, channel: Channel) -> None:
    """Examples of each task of a folder of results."""
    console = out()
    if not request.folders:
        raise ValueError("name folders of results, as midstream eval prints them, to show")
    for folder in request.folders:
        for path in _predictions(folder, request.tasks):
            rows = pq.read_table(path).to_pylist()
            if request.wrong:
                rows = [row for row in rows if row["score"] < RIGHT]
            console.rule(f"{path.stem} of {folder.name}: {len(rows):,} examples", align="left")
            for row in rows[: request.count]:
                _print_example(row, console)


def show_differences(request: ShowRequest, channel: Channel) -> None:
    """For each task that two folders share: the paired difference, and examples that differ."""
    console, (one, other) = out(), request.folders
    paths = {path.stem: path for path in _predictions(one, request.tasks)}
    shared = [path for path in _predictions(other, request.tasks) if path.stem in paths]
    if not shared:
        raise ValueError(f"{one} and {other} share no task; evaluate both on the same")
    for path in shared:
        first = {row["example_id"]: row for row in pq.read_table(paths[path.stem]).to_pylist()}
        second = {row["example_id"]: row for row in pq.read_table(path).to_pylist()}
        both = [key for key in first if key in second and _same(first[key], second[key])]
        left_out = len(first) + len(second) - 2 * len(both)
        if not both:
            raise ValueError(f"{path.stem}: {one} and {other} answered no example in common")
        found = paired_difference(
            [first[key]["score"] for key in both],
            [second[key]["score"] for key in both],
            [first[key]["image"] or key for key in both],
            [first[key]["split"] or "" for key in both],
        )
        console.rule(path.stem, align="left")
        spread = " (one cluster alone: nothing is known of its spread)"
        if found.low is not None and found.high is not None and found.p_value is not None:
            low, high = 100 * found.low, 100 * found.high
            spread = f" (95 % {low:+.2f} to {high:+.2f}, p = {found.p_value:.2g})"
        less = f"{one.name} less {other.name}: {100 * found.mean:+.2f} points{spread}"
        left = f"; {left_out:,} of one alone, or with other right answers, are left out"
        where = f"{len(both):,} examples in {found.num_clusters:,} clusters"
        print_line(console, f"{less} on {where}{left if left_out else ''}")
        differ = [key for key in both if first[key]["score"] != second[key]["score"]]
        for key in differ[: request.count]:
            _print_example(first[key] | {"other_prediction": second[key]["prediction"]}, console)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows of one id have the same right answer, as far as it is known."""
    golds = {one["gold"], other["gold"]} - {"null"}
    return len(golds) < 2


def _predictions(folder: Path, tasks: Sequence[str]) -> list[Path]:
    there = sorted((folder / "predictions").glob("*.parquet"))
    if not there:
        below = ", ".join(sorted(path.parent.name for path in folder.glob("*/predictions"))[:10])
        hint = f", one of those in it ({below})" if below else ""
        raise FileNotFoundError(f"{folder} holds no predictions; give a folder of results{hint}")
    names = {path.stem for path in there}
    lacking = [task for task in tasks if task not in names]
    if lacking:
        raise ValueError(f"{folder} has no {', '.join(lacking)}; it has {', '.join(sorted(names))}")
    return [path for path in there if not tasks or path.stem in tasks]


def _print_example(row: dict[str, Any], console: Console) -> None:
    fields = {
        "prompt": row["prompt"],
        "gold": row["gold"],
        "answer": f"{row['prediction']!r}, score {row['score']:g}",
    }
    if row.get("other_prediction") is not None:
        fields["other"] = repr(row["other_prediction"])
    if row["blind_prediction"] is not None:
        fields["blind"] = f"{row['blind_prediction']!r}, score {row['blind_score']:g}"
    if row["text_prediction"] is not None:
        fields["as text"] = repr(row["text_prediction"])
    if row["image"] is not None:
        fields["picture"] = ", ".join([row["image"], *(row.get("more") or [])])
    console.print(row["example_id"], markup=False, style="bold")
    for name, value in fields.items():
        print_line(console, f"  {name}: {value}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
