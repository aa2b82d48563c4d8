"""JSON lines of a stage, one a step; cut back to a checkpoint on resume."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to `metrics.jsonl`; `position` is its length in bytes, kept in checkpoints."""

    def __init__(self, path: Path, position: int) -> None:
        path.touch()
        # Lines behind the checkpoint belong to steps that are about to be taken again.
        os.truncate(path, position)
        self._stream = path.open("a", encoding="utf-8")

    @property
    def position(self) -> int:
        """Bytes written so far."""
        self._stream.flush()
        return self._stream.tell()

    def write(self, **values: Any) -> None:
        """One line; NaN is refused."""
        self._stream.write(json.dumps(values, allow_nan=False) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()
