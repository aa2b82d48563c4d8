"""JSON lines of a stage, one a step; cut back to a checkpoint on resume."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to `metrics.jsonl`; `position` is its length in bytes, kept in checkpoints.

    Without a path (on all ranks but the first) nothing is written. Raises ValueError if the file
    is shorter than the position that a stage resumes from.
    """

    def __init__(self, path: Path | None, position: int) -> None:
        self._stream = None
        if path is None:
            return
        path.touch()
        if (size := path.stat().st_size) < position:
            raise ValueError(
                f"{path} holds {size:,} bytes, its checkpoint was made at {position:,}; "
                f"delete {path.parent} to run the stage again"
            )
        # Lines behind the checkpoint belong to steps that are about to be taken again.
        os.truncate(path, position)
        self._stream = path.open("a", encoding="utf-8")

    @property
    def position(self) -> int:
        """Bytes written so far."""
        if self._stream is None:
            return 0
        self._stream.flush()
        return self._stream.tell()

    def write(self, **values: Any) -> None:
        """One line; NaN is refused."""
        line = json.dumps(values, allow_nan=False) + "\n"
        if self._stream is not None:
            self._stream.write(line)

    def sync(self) -> None:
        """Bring all lines to the disk: a checkpoint must not outlive the lines it counts."""
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self._stream is not None:
            self._stream.close()
