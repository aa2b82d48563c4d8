"""Stored answers: two sides on the same examples, and samples to look at.

Repetitions are averaged per example; errors are in closed form, since there are hundreds.
"""

import base64
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, UnidentifiedImageError

from midstream.core.stats import CONFIDENCE, mean_by_split, standard_error
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger
from midstream.study.studies import Study

Place = tuple[Any, Any]
Found = dict[str, tuple[float, str, str]]


@dataclass(frozen=True)
class Gap:
    """A mean difference on the same examples with its normal 95 % interval, None below two
    clusters.
    """

    mean: float
    stderr: float | None

    @property
    def low(self) -> float | None:
        """The interval's lower end."""
        return None if self.stderr is None else self.mean - _HALF * self.stderr

    @property
    def high(self) -> float | None:
        """The interval's upper end."""
        return None if self.stderr is None else self.mean + _HALF * self.stderr


_HALF = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Examples:
    """The answers in a store, each file read once."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._read: dict[tuple[str, ...], Found | None] = {}

    def gap(self, ones: Sequence[Evaluate], others: Sequence[Evaluate], task: str) -> Gap | None:
        """The mean of `ones` less that of `others`; None unless all answered the same examples."""
        first, second = self._mean(ones, task), self._mean(others, task)
        if first is None or second is None or first.keys() != second.keys():
            return None
        keys = sorted(first)
        gaps = [first[key][0] - second[key][0] for key in keys]
        images, splits = [first[key][1] for key in keys], [first[key][2] for key in keys]
        error = standard_error(gaps, images, splits)
        return Gap(mean_by_split(gaps, splits), error)

    def _mean(self, results: Sequence[Evaluate], task: str) -> Found | None:
        """Each example's score, averaged over repetitions, its picture and split."""
        key = ("mean", *(result.identity for result in results), task)
        if key not in self._read:
            self._read[key] = self._average([self._answers(result, task) for result in results])
        return self._read[key]

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
        key = (result.identity, task)
        if key not in self._read:
            self._read[key] = self._load(result, task)
        return self._read[key]

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
    known = [error for error in errors if error is not None]
    whole = math.sqrt(math.fsum(error**2 for error in known)) / len(errors)
    return Gap(mean, whole if len(known) == len(errors) else None)


def results_by_place(study: Study) -> dict[Place, list[Evaluate]]:
    """The lines' evaluations by the figure's x and by."""
    x, by = study.figure.x, study.figure.by
    found: dict[Place, list[Evaluate]] = {}
    for line in study.lines:
        place = (line.axes[x], None if by is None else line.axes[by])
        found.setdefault(place, []).append(line.result)
    return found


NUM_SAMPLES = 3
PICTURE_SIZE = 256
# A score (0 to 1) from which an example counts as right.
RIGHT = 0.5
# Blue and orange are told apart with every common colour vision.
GOLD_COLOR, ANSWER_COLOR = "#0072b2", "#e69f00"

Box = tuple[float | int, float | int, float | int, float | int]


def samples(result: Evaluate, ledger: Ledger) -> list[dict[str, Any]]:
    """For each visual task the first right and the first wrong examples, in the stored order.

    `pictures` are those of an example, in order; one that cannot be read is named in `problem`.
    Boxes are drawn where gold is one.
    """
    shown = []
    # Where a generated world's benchmarks lie; those of a user's folder are where they were.
    written = [ledger.folder(stage) for stage in result.of.data.laid_out]
    for task in result.evaluation.visual_tasks:
        examples = pq.read_table(ledger.predictions(result, task)).to_pylist()
        right = [example for example in examples if example["score"] >= RIGHT]
        wrong = [example for example in examples if example["score"] < RIGHT]
        picked = [*right[:NUM_SAMPLES], *wrong[:NUM_SAMPLES]]
        shown.append(
            {
                "task": task,
                "num_right": len(right),
                "num_examples": len(examples),
                "examples": [_sample(example, written) for example in picked],
            }
        )
    return shown


def _sample(example: dict[str, Any], written: list[Path]) -> dict[str, Any]:
    gold = json.loads(example["gold"])
    shown: dict[str, Any] = {"right": example["score"] >= RIGHT, "pictures": [], "problem": None}
    boxes = {GOLD_COLOR: _gold_box(gold), ANSWER_COLOR: None}
    if boxes[GOLD_COLOR]:
        boxes[ANSWER_COLOR] = _answered_box(example["prediction"])
    first = [] if example["image"] is None else [example["image"]]
    for path in map(Path, [*first, *(example.get("more") or [])]):
        for folder in written:
            # The store may lie elsewhere than when the picture was shown.
            if folder.name in path.parts:
                path = folder.joinpath(*path.parts[path.parts.index(folder.name) + 1 :])
        try:
            shown["pictures"].append(_picture(path, boxes))
        except (OSError, UnidentifiedImageError) as error:
            shown["problem"] = str(error)
    return example | shown | {"gold": _gold_text(gold), "boxed": boxes[GOLD_COLOR] is not None}


def _gold_text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        counts = Counter(value).most_common()
        return ", ".join(item if count == 1 else f"{item} (×{count})" for item, count in counts)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _gold_box(value: Any) -> Box | None:
    """The gold answer of a box task: [x1, y1, x2, y2] in shares of the picture's sides."""
    if not (isinstance(value, list) and len(value) == 4):
        return None
    return tuple(value) if all(isinstance(item, int | float) for item in value) else None


def _answered_box(text: str) -> Box | None:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    if len(numbers) != 4:
        return None
    x1, y1, x2, y2 = (min(max(float(number), 0.0), 1.0) for number in numbers)
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None


def _picture(path: Path, boxes: dict[str, Box | None]) -> tuple[str, bool]:
    """A small copy as a data URI, and whether it is drawn with hard edges since it is tiny."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    tiny = max(small.size) <= PICTURE_SIZE // 2
    if any(boxes.values()):
        if tiny:
            scale = PICTURE_SIZE // max(small.size)
            small = small.resize(
                (small.width * scale, small.height * scale), Image.Resampling.NEAREST
            )
            tiny = False
        draw = ImageDraw.Draw(small)
        for color, box in boxes.items():
            if box is not None:
                sides = (small.width - 1, small.height - 1) * 2
                draw.rectangle(
                    [a * side for a, side in zip(box, sides, strict=True)], None, color, 3
                )
    stream = io.BytesIO()
    # PNG keeps the few colours of drawn worlds small and sharp, JPEG does photographs.
    flat = small.getcolors(256) is not None
    small.save(stream, format="PNG" if flat else "JPEG", optimize=True)
    kind = "image/png" if flat else "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", tiny
