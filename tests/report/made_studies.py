"""Studies with made-up scores: a line for each place and seed, evaluated on two small tasks."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import tiny
from midstream.config import Evaluation
from midstream.core.storage import write_json
from midstream.report.gather import gather
from midstream.report.line_rows import Group, group_rows, line_rows
from midstream.report.page import write_facts
from midstream.study.stages import Evaluate, Stage
from midstream.study.store import SUCCESS, Ledger
from midstream.study.studies import Figure, Line, Study

Scores = Mapping[Any, Sequence[float]]
ASKED = Evaluation(visual_tasks=("gqa", "pope"), text_tasks=("pocket_facts",))
CHANCES = {"gqa": 0.0, "pope": 0.0, "pocket_facts": 0.25}
NUM_EXAMPLES = 60


def result(place: tuple[Any, ...], seed: int) -> Evaluate:
    """An evaluation of its own for each place and seed."""
    number = random.Random(f"{place} {seed}").randrange(1 << 30)
    training = tiny.CHAT.training.model_copy(update={"seed": number})
    return Evaluate(of=tiny.CHAT.model_copy(update={"training": training}), evaluation=ASKED)


def study(scores: Scores, *, axes: tuple[str, ...] = ("x",), **fields: Any) -> Study:
    """A study over the first axis; by the second where there is one."""
    lines = tuple(
        Line(
            name=f"{', '.join(map(str, place))}, seed {seed}",
            axes=dict(zip(axes, place, strict=True)) | {"seed": seed},
            result=result(place, seed),
        )
        for place, values in scores.items()
        for seed in range(len(values))
    )
    figure = Figure(x=axes[0], x_label=axes[0], by=axes[1] if len(axes) > 1 else None)
    known = {"name": "made", "question": "Which?", "figure": figure}
    return Study(**{**known, "lines": lines, **fields})


def fill(
    ledger: Ledger,
    about: Study,
    scores: Scores,
    *,
    axes: tuple[str, ...] = ("x",),
    examples: bool = True,
    pictures: bool = False,
) -> None:
    """Results of every line that has a score; text scores are half of the visual ones.

    `pictures`: of two examples each, in a folder that is not there.
    """
    for line in about.lines:
        place = tuple(line.axes[axis] for axis in axes)
        values, seed = scores.get(place, ()), int(line.axes["seed"])
        if seed < len(values):
            finish(ledger, line.result, results(values[seed]))
            for task in (*ASKED.visual_tasks, *ASKED.text_tasks):
                path = ledger.folder(line.result) / "predictions" / f"{task}.parquet"
                keys = (
                    range(NUM_EXAMPLES)
                    if examples
                    else [random.Random(f"{place} {seed}").randrange(10**6)]
                )
                write_answers(path, task, keys, values[seed], pictures=pictures)


def results(stable: float) -> dict[str, Any]:
    """What an evaluation found whose visual tasks score the same."""
    common = {"metric": "accuracy", "stderr": 0.02, "num_examples": NUM_EXAMPLES}
    tasks = {
        task: common | {"kind": "vision", "score": stable, "chance": CHANCES[task], "blind": 0.05}
        for task in ASKED.visual_tasks
    }
    text = {"kind": "text", "score": 0.25 + stable / 2, "chance": 0.25, "blind": None}
    stables = {"vision": stable, "vision_blind": 0.05, "text": stable / 2}
    return {"tasks": tasks | {"pocket_facts": common | text}, "stable": stables}


def write_answers(
    path: Path, task: str, keys: Sequence[int], right: float, *, pictures: bool = False
) -> None:
    """Answers that are right where an example is easier than `right`."""
    rows = [
        {
            "example_id": f"{task} {key}",
            "split": "",
            "prompt": f"Question {key}?",
            "prediction": "red",
            "gold": '"red"',
            "score": float(random.Random(f"{task} {key}").random() < right),
            "blind_prediction": None,
            "blind_score": None,
            "image": f"{path.parent}/bench/{task}/{key // 2}.png" if pictures else None,
        }
        for key in keys
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def finish(ledger: Ledger, stage: Stage, found: dict[str, Any]) -> None:
    """Mark a stage done with these results."""
    folder = ledger.folder(stage)
    write_json(folder / "results.json", {**found, "seconds": 1.0, "peak_memory_bytes": 1})
    write_json(folder / "stage.json", stage.model_dump(mode="json"))
    when = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:00:01+00:00"}
    write_json(folder / "status.json", {"state": "done", "error": None, **when})
    (folder / SUCCESS).write_text(stage.identity)


def flat_rows(about: Study, ledger: Ledger) -> list[dict[str, Any]]:
    """The rows of the study's results.csv."""
    return [row.flat() for row in line_rows(about, ledger)]


def groups_of(about: Study, ledger: Ledger) -> list[Group]:
    """The study's groups as its store has them."""
    return group_rows(about, line_rows(about, ledger))


def write_report(about: Study, ledger: Ledger) -> Path:
    """The page of a study, written from its store."""
    return write_facts(gather(about, ledger))
