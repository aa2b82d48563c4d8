"""Lines against others on the same examples: what pairing shows that two means hide.

Both answered the same questions about the same pictures, so that what makes a question hard falls
out of the difference. Repetitions (seeds) are averaged per example first: the interval is over
examples, and says nothing about other seeds. Standard errors are in closed form and intervals
normal, since a page makes hundreds of comparisons; `midstream score --diff` draws again instead.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

import pyarrow.parquet as pq

from midstream.report.spread import CONFIDENCE
from midstream.report.table import Group, best_group, tasks_of
from midstream.study.ledger import Ledger
from midstream.study.stage import Evaluate
from midstream.study.studies import Study
from midstream.uncertainty import mean_by_split, standard_error

Place = tuple[Any, Any]
Found = dict[str, tuple[float, str, str]]


@dataclass(frozen=True)
class Gap:
    """A mean difference on the same examples with its normal 95 % interval and two-sided p.

    The interval is None where nothing can be said (below two clusters), p also where it has no
    width.
    """

    mean: float
    stderr: float | None
    num_examples: int = 0
    num_clusters: int = 0

    @property
    def low(self) -> float | None:
        """The interval's lower end."""
        return None if self.stderr is None else self.mean - _HALF * self.stderr

    @property
    def high(self) -> float | None:
        """The interval's upper end."""
        return None if self.stderr is None else self.mean + _HALF * self.stderr

    @property
    def p_value(self) -> float | None:
        """By the normal distribution."""
        if not self.stderr:
            return None
        return 2 * NormalDist().cdf(-abs(self.mean) / self.stderr)


_HALF = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Examples:
    """The answers in a store, each file read once."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._read: dict[tuple[str, str], Found | None] = {}
        self._means: dict[tuple[tuple[str, ...], str], Found | None] = {}

    def gap(self, ones: Sequence[Evaluate], others: Sequence[Evaluate], task: str) -> Gap | None:
        """The mean of `ones` less that of `others`; None unless all answered the same examples."""
        first, second = self._mean(ones, task), self._mean(others, task)
        if first is None or second is None or first.keys() != second.keys():
            return None
        keys = sorted(first)
        gaps = [first[key][0] - second[key][0] for key in keys]
        images, splits = [first[key][1] for key in keys], [first[key][2] for key in keys]
        error = standard_error(gaps, images, splits)
        return Gap(mean_by_split(gaps, splits), error, len(keys), len(set(images)))

    def _mean(self, results: Sequence[Evaluate], task: str) -> Found | None:
        """Each example's score, averaged over repetitions, its picture and split."""
        place = (tuple(result.identity for result in results), task)
        if place not in self._means:
            self._means[place] = self._average([self._answers(r, task) for r in results])
        return self._means[place]

    @staticmethod
    def _average(read: Sequence[Found | None]) -> Found | None:
        scores: dict[str, list[float]] = defaultdict(list)
        about: Found = {}
        for found in read:
            if not found:
                return None
            for key, answer in found.items():
                scores[key].append(answer[0])
                about[key] = answer
        if any(len(values) != len(read) for values in scores.values()):
            return None
        return {key: (fmean(values), *about[key][1:]) for key, values in scores.items()} or None

    def _answers(self, result: Evaluate, task: str) -> Found | None:
        place = (result.identity, task)
        if place not in self._read:
            self._read[place] = self._load(result, task)
        return self._read[place]

    def _load(self, result: Evaluate, task: str) -> Found | None:
        asked = (*result.evaluation.visual_tasks, *result.evaluation.text_tasks)
        if task not in asked or not self._ledger.is_done(result):
            return None
        path = self._ledger.predictions(result, task)
        names = set(pq.read_schema(path).names) & {"example_id", "score", "image", "split"}
        table = pq.read_table(path, columns=sorted(names)).to_pydict()
        empty = [None] * len(table["score"])
        columns = (table["example_id"], table["score"], table["image"], table.get("split", empty))
        return {
            # Worlds of different folders hold the same pictures.
            name: (score, (image or name).rsplit("/bench/", 1)[-1], split or "")
            for name, score, image, split in zip(*columns, strict=True)
        }


def mean_gap(gaps: Sequence[Gap]) -> Gap:
    """The mean over tasks, whose errors are taken as independent."""
    mean, errors = fmean(gap.mean for gap in gaps), [gap.stderr for gap in gaps]
    if any(error is None for error in errors):
        return Gap(mean, None)
    return Gap(mean, math.sqrt(math.fsum((error or 0.0) ** 2 for error in errors)) / len(errors))


def paired_rows(
    study: Study, groups: Sequence[Group], ledger: Ledger, examples: Examples | None = None
) -> list[dict[str, Any]]:
    """The best group of each curve less every other group of it, over the visual tasks.

    Each row: by, best, x, `tasks` (name to `Gap`) and `all`, their mean. Left out are groups that
    are not done, and tasks whose examples differ.
    """
    tasks = [name for name, kind in tasks_of(study) if kind == "vision"]
    examples = examples or Examples(ledger)
    members = results_by_place(study)
    rows = []
    for by in dict.fromkeys(group.by for group in groups):
        own = [group for group in groups if group.by == by]
        best = best_group(own, "stable.vision")
        for other in own:
            if best is None or other is best:
                continue
            ones, others = members[best.x, by], members[other.x, by]
            asked = {task: examples.gap(ones, others, task) for task in tasks}
            found = {task: gap for task, gap in asked.items() if gap is not None}
            if found:
                whole = mean_gap(list(found.values()))
                rows.append({"by": by, "best": best.x, "x": other.x, "tasks": found, "all": whole})
    return rows


def results_by_place(study: Study) -> dict[Place, list[Evaluate]]:
    """The lines' evaluations by the figure's x and by."""
    x, by = study.figure.x, study.figure.by
    found: dict[Place, list[Evaluate]] = {}
    for line in study.lines:
        place = (line.axes[x], None if by is None else line.axes[by])
        found.setdefault(place, []).append(line.result)
    return found
