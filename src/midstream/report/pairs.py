"""Lines against the best one on the same examples: what pairing shows that two means hide.

Both answered the same questions about the same pictures, so that what makes a question hard falls
out of the difference. Repetitions (seeds) are averaged per example first: the interval is over
examples, and says nothing about other seeds.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Any

import pyarrow.parquet as pq

from midstream.report.table import Group, best_group, tasks_of
from midstream.study.ledger import Ledger
from midstream.study.stage import Evaluate
from midstream.study.studies import Study
from midstream.uncertainty import CONFIDENCE, PairedDifference, paired_difference

Place = tuple[Any, Any]


def paired_rows(study: Study, groups: Sequence[Group], ledger: Ledger) -> list[dict[str, Any]]:
    """The best group of each curve less every other group of it, over the visual tasks.

    Each row: by, best, x, `tasks` (name to `PairedDifference`), and `mean`, `low`, `high`,
    `p_value` of the mean over tasks, by a normal approximation from the tasks' standard errors.
    Left out are groups that are not done, and tasks whose examples differ.
    """
    tasks = [name for name, kind in tasks_of(study) if kind == "vision"]
    known: dict[tuple[Place, str], dict[str, Any] | None] = {}

    def answers(group: Group, task: str) -> dict[str, Any] | None:
        place = (group.x, group.by)
        if (place, task) not in known:
            known[place, task] = _answers(_results(study, place), task, ledger)
        return known[place, task]

    rows = []
    for by in dict.fromkeys(group.by for group in groups):
        own = [group for group in groups if group.by == by]
        best = best_group(own, "stable.vision")
        for other in own:
            if best is None or other is best:
                continue
            found = {}
            for task in tasks:
                one, two = answers(best, task), answers(other, task)
                if one is not None and two is not None and one["keys"] == two["keys"]:
                    found[task] = paired_difference(
                        one["scores"], two["scores"], one["images"], one["splits"]
                    )
            if found:
                rows.append({"by": by, "best": best.x, "x": other.x, "tasks": found} | _all(found))
    return rows


def _results(study: Study, place: Place) -> list[Evaluate]:
    x, by = study.figure.x, study.figure.by
    return [
        line.result
        for line in study.lines
        if (line.axes[x], None if by is None else line.axes[by]) == place
    ]


def _answers(results: Sequence[Evaluate], task: str, ledger: Ledger) -> dict[str, Any] | None:
    """Each example's score, averaged over the repetitions; None where one is not done."""
    scores: dict[str, list[float]] = defaultdict(list)
    about: dict[str, tuple[str, str]] = {}
    for result in results:
        if not ledger.is_done(result) or task not in result.evaluation.visual_tasks:
            return None
        for row in pq.read_table(ledger.predictions(result, task)).to_pylist():
            scores[row["example_id"]].append(row["score"])
            # Worlds of different folders hold the same pictures.
            picture = (row["image"] or row["example_id"]).rsplit("/bench/", 1)[-1]
            about[row["example_id"]] = (picture, row.get("split") or "")
    keys = sorted(scores)
    if not keys or any(len(scores[key]) != len(results) for key in keys):
        return None
    return {
        "keys": keys,
        "scores": [fmean(scores[key]) for key in keys],
        "images": [about[key][0] for key in keys],
        "splits": [about[key][1] for key in keys],
    }


def _all(found: dict[str, PairedDifference]) -> dict[str, float | None]:
    mean = fmean(gap.mean for gap in found.values())
    errors = [gap.stderr for gap in found.values()]
    if any(error is None for error in errors):
        return {"mean": mean, "low": None, "high": None, "p_value": None}
    error = math.sqrt(math.fsum((e or 0.0) ** 2 for e in errors)) / len(errors)
    if error == 0:
        return {"mean": mean, "low": mean, "high": mean, "p_value": None}
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    p_value = 2 * NormalDist().cdf(-abs(mean) / error)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p_value": p_value}
