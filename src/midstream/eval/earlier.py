"""Results of tasks that were asked before: under which key they are found, and how they are taken.

A key stands for everything that a task's result depends on: the model (its `weights_digest`), what
is asked (questions, pictures, answers, order), how it is asked, and how it is scored. Where files
lie is no part of it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from midstream.config import Evaluation
from midstream.eval.find_task import VisualTask
from midstream.eval.kept_answers import ANSWERS_VERSION
from midstream.eval.text import TextTask
from midstream.storage import read_json, write_bytes

# Raise it when a scorer, or what a row of results holds, changes: tasks are asked again.
SCORES_VERSION = 2


@dataclass(frozen=True)
class EarlierTask:
    """A task's row of a results.json, and the file of its predictions, whose time is that of the
    asking wherever it is taken."""

    row: dict[str, Any]
    predictions: Path


def earlier_tasks(folders: Iterable[Path]) -> dict[str, EarlierTask]:
    """Every task with a key and predictions in the results.json of `folders`, by its key.

    A folder without a results.json holds nothing that is done.
    """
    found: dict[str, EarlierTask] = {}
    for folder in folders:
        path = folder / "results.json"
        value = read_json(path) if path.is_file() else {}
        # Other programs' folders may lie beside ours, and have files of this name.
        tasks = value.get("tasks") if isinstance(value, dict) else None
        for name, row in tasks.items() if isinstance(tasks, dict) else ():
            predictions = folder / "predictions" / f"{name}.parquet"
            if isinstance(row, dict) and "key" in row and predictions.is_file():
                found[row["key"]] = EarlierTask(row, predictions)
    return found


def take_predictions(earlier: EarlierTask, path: Path, images: Sequence[Path] | None) -> None:
    """The same predictions as a file of their own, with the pictures where they lie now."""
    if earlier.predictions.resolve() == path.resolve():
        return
    asked = earlier.predictions.stat()
    table = pq.read_table(earlier.predictions)
    if images is not None:
        column = table.schema.get_field_index("image")
        table = table.set_column(column, "image", pa.array([str(image) for image in images]))
    write_table(path, table)
    os.utime(path, ns=(asked.st_atime_ns, asked.st_mtime_ns))


def write_table(path: Path, table: pa.Table) -> None:
    """A table as a parquet file, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def visual_key(
    task: VisualTask,
    prompts: Sequence[str],
    evaluation: Evaluation,
    weights_digest: str,
    file_digest: Callable[[Path], str],
) -> str:
    """The key of a visual task's result."""
    fixed = task.format.fixed
    # Wrong pictures are drawn by which examples share one.
    order = {image: number for number, image in enumerate(e.image for e in task.examples)}
    return _digest(
        weights_digest,
        [task.name, task.format.name, task.chance, task.num_all],
        [evaluation.wordings.get(task.name, evaluation.prompts), evaluation.blind],
        evaluation.max_new_tokens,
        evaluation.fixed_answers if fixed is not None else None,
        evaluation.letters if fixed == "letters" else None,
        [
            [
                [e.example_id, prompt, e.gold, e.split, e.kinds, e.choices, e.size],
                [order[e.image], file_digest(e.image)],
            ]
            for e, prompt in zip(task.examples, prompts, strict=True)
        ],
    )


def text_key(
    task: TextTask,
    limit: int | None,
    weights_digest: str,
    file_digest: Callable[[Path], str],
) -> str:
    """The key of a text task's result; where lm-evaluation-harness fetches the data itself, its
    version stands for them."""
    settings = dict(task.settings)
    if "include" in settings:  # the harness's own description, wherever it is installed
        settings["include"] = "/".join(Path(settings["include"]).parts[-3:])
    return _digest(
        weights_digest,
        [task.name, task.chance, task.split, task.num_docs, task.departs],
        [settings, version("lm_eval")],
        task.docs if task.docs is not None else [limit, *map(file_digest, task.files)],
    )


def _digest(*parts: Any) -> str:
    text = json.dumps([SCORES_VERSION, ANSWERS_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
