"""The files of a stage's jobs in the store, and the events that a job keeps there."""

import json
from pathlib import Path
from typing import Any

from midstream.study.workers import Event


class JobFiles:
    """Where a stage's jobs write: `slurm/STAGE/` in the store."""

    def __init__(self, store: Path, stage: str) -> None:
        self.folder = store.absolute() / "slurm" / stage

    @property
    def events(self) -> Path:
        """The worker's events, one a line, over all jobs of the stage."""
        return self.folder / "events.jsonl"

    @property
    def given(self) -> Path:
        """What the stage's job is given to do."""
        return self.folder / "given.json"

    def work(self, node: int) -> Path:
        """What the worker of a node works for."""
        return self.folder / f"worker-{node}.json"

    def log(self, node: int) -> Path:
        """What the worker of a node prints."""
        return self.folder / f"worker-{node}.log"


def events_since(path: Path, offset: int) -> tuple[list[Event], int]:
    """The whole lines behind `offset`, and where they end; a line that is no event is left out."""
    if not path.is_file():
        return [], offset
    with path.open("rb") as stream:
        stream.seek(offset)
        whole, newline, _ = stream.read().rpartition(b"\n")
    events = []
    for line in whole.splitlines():
        try:
            event: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events, offset + len(whole) + len(newline)
