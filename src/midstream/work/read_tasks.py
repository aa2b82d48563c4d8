"""Reads benchmarks before a study runs, as a process of its own: `launch/checks.py` starts it.

`python -m midstream.work.read_tasks` takes a JSON list on standard input, of objects with "world",
"task", "kind" (visual | text), "limit" and, where pictures are asked about, "slim" and "blind". It
answers each with a line of JSON, {"error": what is wrong, or null}.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from midstream.eval.find_task import other_images, read_choice_task, read_visual_task, require_share

# Of a task's pictures all are looked for, and so many decoded: always the same ones.
NUM_DECODED = 64


def read(request: dict[str, Any]) -> None:
    """Read a task to its last line as an evaluation does, and decode some of its pictures.

    Raises FileNotFoundError or ValueError for what is missing or malformed.
    """
    world, name, limit = Path(request["world"]), request["task"], request["limit"]
    if request["kind"] == "text":
        require_share(read_choice_task(world, name, limit))
        return
    task = read_visual_task(world, name, limit, slim=request["slim"])
    if request["blind"]:
        other_images(task)
    decode_some({example.image for example in task.examples}, name)


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


def main() -> None:
    """Answer every request of standard input."""
    # The channel is ours alone: whatever a library prints goes to stderr.
    channel, sys.stdout = sys.stdout, sys.stderr
    for request in json.load(sys.stdin):
        error = None
        try:
            read(request)
        except (ValueError, OSError) as reason:
            error = str(reason)
        channel.write(json.dumps({"error": error}) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
