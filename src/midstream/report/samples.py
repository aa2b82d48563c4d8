"""Sample predictions of one line: question, picture, answer, gold, and the answer given blind."""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, UnidentifiedImageError

from midstream.study.ledger import Ledger
from midstream.study.stage import Evaluate

NUM_SAMPLES = 3
PICTURE_SIZE = 256
# A score (0 to 1) from which an example counts as right.
RIGHT = 0.5
# Blue and orange are told apart with every common colour vision.
GOLD_COLOR, ANSWER_COLOR = "#0072b2", "#e69f00"

Box = tuple[float | int, float | int, float | int, float | int]


def samples(result: Evaluate, ledger: Ledger) -> list[dict[str, Any]]:
    """For each visual task the first right and the first wrong examples, in the stored order.

    A picture that cannot be read is named in `problem`; boxes are drawn where gold is one.
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
    shown = {"right": example["score"] >= RIGHT, "picture": None, "tiny": False, "problem": None}
    boxes = {GOLD_COLOR: _gold_box(gold), ANSWER_COLOR: None}
    if boxes[GOLD_COLOR]:
        boxes[ANSWER_COLOR] = _answered_box(example["prediction"])
    if example["image"] is not None:
        path = Path(example["image"])
        for folder in written:
            # The store may lie elsewhere than when the picture was shown.
            if folder.name in path.parts:
                path = folder.joinpath(*path.parts[path.parts.index(folder.name) + 1 :])
        try:
            shown["picture"], shown["tiny"] = _picture(path, boxes)
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
