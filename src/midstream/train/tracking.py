"""Metrics to TensorBoard, Weights & Biases and Trackio, beside `metrics.jsonl` and never instead.

A thread of its own reads what training hands over: a tracker that fails, or waits for a network,
is counted and training goes on as it would without. What a tracker lacks of the steps before a
start is read from `metrics.jsonl`, so that a series is whole and no step stands in it twice.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, runtime_checkable

# Rows are handed to the trackers this often.
SEND_SECONDS = 5.0
# How long the trackers may take, once the stage has ended, to bring away what they hold.
CLOSE_SECONDS = 60.0


@dataclass(frozen=True)
class TrackedRow:
    """The values of one step, and when they came (seconds since the epoch)."""

    step: int
    values: Mapping[str, float]
    at: float


@runtime_checkable
class Tracker(Protocol):
    """One place that metrics go to."""

    def begin(self, step: int) -> int:
        """Open the series, cut it back to `step` where that can be; the last step it holds."""
        ...

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """Add rows, in the order of their steps."""
        ...

    def finish(self, failed: bool) -> None:
        """Bring away what is held, and close."""
        ...


class Tracking:
    """The trackers of one stage, served by a thread from `begin` to `close`."""

    def __init__(self, trackers: Mapping[str, Callable[[], Tracker]]) -> None:
        self._make = dict(trackers)
        self._open: dict[str, Tracker] = {}
        self._last: dict[str, int] = {}
        self._failures: dict[str, list[str]] = {}
        self._rows: SimpleQueue[TrackedRow] = SimpleQueue()
        self._closing = threading.Event()
        self._failed = False
        self._busy = ""
        self._thread: threading.Thread | None = None

    def begin(self, metrics: Path | None = None, position: int = 0) -> None:
        """Start, behind the steps in the first `position` bytes of `metrics`."""
        kept = b"" if metrics is None else metrics.read_bytes()[:position]
        self._thread = threading.Thread(
            target=self._serve, args=(kept,), name="tracking", daemon=True
        )
        self._thread.start()

    def log(self, values: Mapping[str, Any], prefix: str = "train") -> None:
        """Hand over a line with its `step`; returns at once."""
        self._rows.put(_row(values, prefix, time.time()))

    def close(self, failed: bool = False) -> dict[str, Any]:
        """End within CLOSE_SECONDS; by tracker that failed: how often, and the first reason."""
        if self._thread is None:
            return {}
        self._failed = failed
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._note(self._busy, TimeoutError(f"it was not done within {CLOSE_SECONDS:g} s"))
        return {
            name: {"failures": len(texts), "first": texts[0]}
            for name, texts in self._failures.items()
        }

    def _serve(self, kept: bytes) -> None:
        before = [_row(json.loads(line), "train", time.time()) for line in kept.splitlines()]
        step = before[-1].step if before else -1
        for name, make in self._make.items():
            self._try(name, lambda name=name, make=make: self._start(name, make(), step))  # type: ignore[misc]
        self._send(before)
        ending = False
        while not ending:
            ending = self._closing.wait(SEND_SECONDS)
            rows = []
            while not self._rows.empty():
                rows.append(self._rows.get())
            self._send(rows)
        for name, tracker in self._open.items():
            self._try(name, lambda tracker=tracker: tracker.finish(self._failed))  # type: ignore[misc]

    def _start(self, name: str, tracker: Tracker, step: int) -> None:
        self._last[name] = tracker.begin(step)
        self._open[name] = tracker

    def _send(self, rows: Sequence[TrackedRow]) -> None:
        for name, tracker in self._open.items():
            new = [row for row in rows if row.step > self._last[name]]
            if new:
                self._last[name] = new[-1].step
                self._try(name, lambda tracker=tracker, new=new: tracker.send(new))  # type: ignore[misc]

    def _try(self, name: str, act: Callable[[], None]) -> None:
        self._busy = name
        try:
            act()
        except Exception as error:  # whatever somebody's library raises
            self._note(name, error)

    def _note(self, name: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if name not in self._failures:
            print(
                f"tracking by {name} failed: {text}; the stage goes on, metrics.jsonl is whole",
                file=sys.stderr,
            )
        self._failures.setdefault(name, []).append(text)


def _row(values: Mapping[str, Any], prefix: str, at: float) -> TrackedRow:
    """All numbers of a line but its step."""
    numbers = {
        f"{prefix}/{key}": float(value)
        for key, value in values.items()
        if key != "step" and isinstance(value, int | float)
    }
    return TrackedRow(int(values["step"]), numbers, at)
