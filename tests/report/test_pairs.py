"""Differences on the same examples, from the predictions of two lines."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_studies import groups_of, write_report

import tiny
from midstream.config import Evaluation
from midstream.core.storage import read_json, write_json
from midstream.report.pairs import paired_rows
from midstream.study.stages import Evaluate
from midstream.study.store import SUCCESS, Ledger
from midstream.study.studies import Figure, Line, Study

ASKED = Evaluation(visual_tasks=("gqa", "pope"))
NUM = 80


def result(x: float, seed: int) -> Evaluate:
    chat = tiny.CHAT.model_copy(
        update={"training": tiny.CHAT.training.model_copy(update={"seed": int(10 * x) + seed})}
    )
    return Evaluate(of=chat, evaluation=ASKED)


def study() -> Study:
    lines = tuple(
        Line(name=f"{x:g}, {seed}", axes={"x": x, "seed": seed}, result=result(x, seed))
        for x in (0.0, 50.0, 100.0)
        for seed in (0, 1)
    )
    return Study(name="pairs", question="?", lines=lines, figure=Figure(x="x", x_label="x"))


def fill(ledger: Ledger, x: float, seed: int, right: float, *, tasks: dict[str, int]) -> None:
    """Answers that are right where an example is easier than `right`, with a little luck."""
    stage = result(x, seed)
    folder = ledger.folder(stage)
    rows: dict[str, Any] = {}
    for task, count in tasks.items():
        hard, luck = random.Random(task), random.Random(f"{task} {x} {seed}")
        scores = [float(hard.random() + luck.uniform(-0.05, 0.05) < right) for _ in range(count)]
        rows[task] = {"kind": "vision", "score": sum(scores) / count, "chance": 0.0}
        rows[task] |= {"metric": "m", "blind": None, "stderr": 0.0, "num_examples": count}
        table = [
            {
                "example_id": str(index),
                "split": "",
                "prompt": f"Question {index}?",
                "prediction": "red",
                "gold": '"red"',
                "blind_prediction": None,
                "blind_score": None,
                "score": score,
                "image": f"/somewhere/{x}/bench/{task}/{index // 2}.png",
            }
            for index, score in enumerate(scores)
        ]
        path = folder / "predictions" / f"{task}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), path)
    stable = sum(row["score"] for row in rows.values()) / len(rows)
    results = {"tasks": rows, "stable": {"vision": stable, "vision_blind": None, "text": None}}
    write_json(folder / "results.json", {**results, "seconds": 1.0, "peak_memory_bytes": 1})
    write_json(folder / "stage.json", json.loads(stage.model_dump_json()))
    when = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:00:01+00:00"}
    write_json(folder / "status.json", {"state": "done", "error": None, **when})
    (folder / SUCCESS).write_text(stage.identity)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    store = Ledger(tmp_path)
    for seed in (0, 1):
        fill(store, 0.0, seed, 0.4, tasks={"gqa": NUM, "pope": NUM})
        fill(store, 50.0, seed, 0.7, tasks={"gqa": NUM, "pope": NUM})
        fill(store, 100.0, seed, 0.69, tasks={"gqa": NUM, "pope": NUM})
    return store


def test_the_best_place_is_compared_with_every_other_example_by_example(ledger: Ledger) -> None:
    rows = paired_rows(study(), groups_of(study(), ledger), ledger)
    by_x = {row.x: row for row in rows}
    best = rows[0].best
    assert set(by_x) == {0.0, 50.0, 100.0} - {best}
    worst = by_x[0.0]
    means = {
        place: sum(ledger.results(result(place, seed))["stable"]["vision"] for seed in (0, 1)) / 2
        for place in (best, 0.0)
    }
    whole = worst.whole
    assert whole.mean == pytest.approx(means[best] - means[0.0])
    assert whole.low is not None
    assert whole.low > 0
    assert whole.p_value is not None
    assert whole.p_value < 0.001
    assert set(worst.tasks) == {"gqa", "pope"}
    assert worst.tasks["gqa"].num_clusters == NUM // 2
    near = by_x[next(x for x in by_x if x)].whole
    assert near.low is not None
    assert near.high is not None
    assert near.low <= 0 <= near.high


def test_what_is_not_done_or_was_asked_otherwise_is_left_out(ledger: Ledger) -> None:
    (ledger.folder(result(0.0, 1)) / SUCCESS).unlink()
    rows = paired_rows(study(), groups_of(study(), ledger), ledger)
    assert all(row.x != 0.0 for row in rows)
    for seed in (0, 1):
        fill(ledger, 0.0, seed, 0.4, tasks={"gqa": NUM, "pope": NUM - 2})
    rows = paired_rows(study(), groups_of(study(), ledger), ledger)
    (worst,) = (row for row in rows if row.x == 0.0)
    assert set(worst.tasks) == {"gqa"}


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_which_tasks_are_not_whole(ledger: Ledger) -> None:
    page = write_report(study(), ledger).read_text()
    assert "Not whole" not in page
    assert "On the same examples" in page
    path = ledger.folder(result(50.0, 0)) / "results.json"
    results = read_json(path)
    results["tasks"]["gqa"]["shortened"] = "80 of 12,578 examples"
    write_json(path, results)
    assert "gqa (80 of 12,578 examples)" in write_report(study(), ledger).read_text()
