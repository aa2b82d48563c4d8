"""The work of `launch/checks.py`: benchmarks, read before a study runs."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from PIL import Image

from midstream.config import Config
from midstream.eval.find_task import other_images, read_choice_task, read_visual_task, require_share
from midstream.work.protocol import Channel, Request

# Of a task's pictures all are looked for, and so many decoded: always the same ones.
NUM_DECODED = 64


class TaskRequest(Config):
    """A task as an evaluation reads it."""

    world: Path
    task: str
    kind: Literal["visual", "text"]
    limit: int | None
    slim: bool = False
    blind: bool = False


class ReadTasksRequest(Request):
    """Tasks, in the order in which they are answered."""

    tasks: tuple[TaskRequest, ...]


def read_tasks(request: ReadTasksRequest, channel: Channel) -> None:
    """Answer each task with {"event": "finished", "stage", "state", "error"}."""
    for task in request.tasks:
        state, error = "done", None
        try:
            read(task)
        except (ValueError, OSError) as reason:
            state, error = "failed", str(reason)
        channel.say("finished", stage=task.task, state=state, error=error)


def read(request: TaskRequest) -> None:
    """Read a task to its last line as an evaluation does, and decode some of its pictures.

    Raises FileNotFoundError or ValueError for what is missing or malformed.
    """
    if request.kind == "text":
        require_share(read_choice_task(request.world, request.task, request.limit))
        return
    task = read_visual_task(request.world, request.task, request.limit, slim=request.slim)
    if request.blind:
        other_images(task)
    decode_some({example.image for example in task.examples}, request.task)


def decode_some(pictures: Iterable[Path], name: str) -> None:
    """Decode a seeded sample of a task's pictures; ValueError names one that cannot be."""
    paths = sorted(pictures)
    for path in random.Random(f"0 decoded {name}").sample(paths, min(NUM_DECODED, len(paths))):
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, ValueError, SyntaxError) as reason:
            raise ValueError(
                f"task {name}: picture {path} cannot be decoded ({reason}); replace the file"
            ) from None
