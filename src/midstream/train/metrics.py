"""JSON lines of a stage, one a step; cut back to a checkpoint on resume."""

import json
import os
from pathlib import Path
from typing import Any

from midstream.train.tracking import Tracking


class MetricsLog:
    """Appends to `metrics.jsonl`; `position` is its length in bytes, kept in checkpoints.

    Without a path (on all ranks but the first) nothing is written. `tracking` gets every line too,
    and is begun here: it knows then which lines are kept. Raises ValueError if the file
    is shorter than the position that a stage resumes from.
    """

    def __init__(self, path: Path | None, position: int, tracking: Tracking | None = None) -> None:
        self._stream = None
        self._tracking = tracking
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
        if tracking is not None:
            tracking.begin(path, position)

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
            if self._tracking is not None:
                self._tracking.log(values)

    def sync(self) -> None:
        """Bring all lines to the disk: a checkpoint must not outlive the lines it counts."""
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self._stream is not None:
            self._stream.close()
