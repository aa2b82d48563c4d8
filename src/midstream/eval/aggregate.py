"""From scores of tasks to the stable score, and the sets of tasks that papers average over."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What is known of each benchmark; the file says what its tables are.
BENCHMARKS: dict[str, Any] = tomllib.loads(
    Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8")
)
# What guessing scores, by task (0 to 1), and where the number stands.
VISUAL_CHANCE: dict[str, tuple[float, str]] = BENCHMARKS["chance"]["visual"]
TEXT_CHANCE: dict[str, tuple[float, str]] = BENCHMARKS["chance"]["text"]
# Named sets, and the metric where a task's own default is not what was averaged.
SUITES: dict[str, list[str]] = BENCHMARKS["suites"]
SUITE_METRICS: dict[str, dict[str, str]] = BENCHMARKS["suite_metrics"]
# Shown, and in no average: the paper leaves VizWiz out, whose prompt small models misunderstand.
NEVER_AVERAGED = frozenset({"vizwiz"})


def stable_score(scores: Mapping[str, float], chances: Mapping[str, float]) -> float:
    """The mean over tasks of score minus chance, without rescaling (paper, section 2.2).

    Raises ValueError unless both name the same tasks, at least one.
    """
    if not scores or set(scores) != set(chances):
        raise ValueError(
            f"the stable score needs the same tasks on both sides, at least one; scores without "
            f"chance: {sorted(set(scores) - set(chances))}, chances without score: "
            f"{sorted(set(chances) - set(scores))}"
        )
    return math.fsum(scores[task] - chances[task] for task in scores) / len(scores)


def averages(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The stable scores of all tasks that were asked: of vision, vision blind, and text.

    None where nothing was asked, or where a task has no score. A task without a chance level has no
    share of right answers (a perplexity) and is passed over.
    """

    def mean_over_chance(kind: str, column: str) -> float | None:
        rows = {
            name: row
            for name, row in tasks.items()
            if row["kind"] == kind and name not in NEVER_AVERAGED and row["chance"] is not None
        }
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


def suites(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stable score of every named set that some of the tasks belong to.

    `score` is None unless every task is there and whole: `missing` and `shortened` name those that
    keep it from being known. Chances are those of the published averages.
    """
    found = {}
    for name, members in SUITES.items():
        here = [task for task in members if task in tasks]
        if not here:
            continue
        scores = {task: _suite_score(name, task, tasks[task]) for task in here}
        missing = [task for task in members if scores.get(task) is None]
        shortened = [task for task in here if tasks[task].get("shortened")]
        chances = {**VISUAL_CHANCE, **TEXT_CHANCE}
        whole = {task: score for task, score in scores.items() if score is not None}
        value = None
        if not missing and not shortened:
            value = stable_score(whole, {task: chances[task][0] for task in members})
        found[name] = {"score": value, "missing": missing, "shortened": shortened}
    return found


def _suite_score(suite: str, task: str, row: Mapping[str, Any]) -> float | None:
    """By the metric that the set takes; None where the task has it not."""
    metric = SUITE_METRICS.get(suite, {}).get(task)
    score: float | None = row["score"] if metric is None else row.get("details", {}).get(metric)
    return score
