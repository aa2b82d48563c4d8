"""What steps gave, written down one step later; a stage's meters, the lines of `metrics.jsonl`, and
the trackers that are given those beside it, never instead.

A tracker that fails or waits is counted; what it lacks of earlier steps is read from the file.
"""

import importlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from midstream.config import Machine
from midstream.core.batch import Batch
from midstream.core.storage import read_json, room_for, write_json
from midstream.core.tokens import TokenCount
from midstream.cost import gpu_of_device
from midstream.study.lease import progress_event
from midstream.train.checkpoint import Progress
from midstream.train.parallel import Clock
from midstream.train.step import NonFiniteError, StepResult, Taken

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


class Tracking:
    """The trackers of one stage, served by a thread from `begin` to `close`."""

    def __init__(self, trackers: Mapping[str, Callable[[], "Tracker"]]) -> None:
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
        self._thread = threading.Thread(target=self._serve, args=(kept,), daemon=True)
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
            self._try(name, self._start, name, make, step)
        self._send(before)
        ending = False
        while not ending:
            ending = self._closing.wait(SEND_SECONDS)
            rows = []
            while not self._rows.empty():
                rows.append(self._rows.get())
            self._send(rows)
        for name, tracker in self._open.items():
            self._try(name, tracker.finish, self._failed)

    def _start(self, name: str, make: Callable[[], "Tracker"], step: int) -> None:
        tracker = make()
        self._last[name] = tracker.begin(step)
        self._open[name] = tracker

    def _send(self, rows: Sequence[TrackedRow]) -> None:
        for name, tracker in self._open.items():
            new = [row for row in rows if row.step > self._last[name]]
            if new:
                self._last[name] = new[-1].step
                self._try(name, tracker.send, new)

    def _try(self, name: str, act: Callable[..., None], *given: Any) -> None:
        self._busy = name
        try:
            act(*given)
        except Exception as error:  # whatever somebody's library raises
            self._note(name, error)

    def _note(self, name: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if name not in self._failures:
            told = f"tracking by {name} failed: {text}; the stage goes on, metrics.jsonl is whole"
            print(told, file=sys.stderr)
        self._failures.setdefault(name, []).append(text)


def _row(values: Mapping[str, Any], prefix: str, at: float) -> TrackedRow:
    held_out = {f"held_out/{name}": one for name, one in values.get("held_out", {}).items()}
    numbers = {
        f"{group}/{key}": float(value)
        for group, held in ({prefix: values} | held_out).items()
        for key, value in held.items()
        if key != "step" and isinstance(value, int | float)
    }
    return TrackedRow(int(values["step"]), numbers, at)


class MetricsLog:
    """Appends to `metrics.jsonl`; `position` is its length in bytes, kept in checkpoints.

    Without a path (on all ranks but the first) nothing is written. `tracking` is begun here, and
    gets every line too. Raises ValueError for a file shorter than the position resumed from.
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
        self._path = path
        self._stream = path.open("a", encoding="utf-8")
        if tracking is not None:
            tracking.begin(path, position)

    @property
    def position(self) -> int:
        """Bytes written so far."""
        if self._stream is None:
            return 0
        with room_for(self._path):
            self._stream.flush()
        return self._stream.tell()

    def write(self, **values: Any) -> None:
        """One line; NaN is refused."""
        line = json.dumps(values, allow_nan=False) + "\n"
        if self._stream is not None:
            with room_for(self._path):
                self._stream.write(line)
            if self._tracking is not None:
                self._tracking.log(values)

    def sync(self) -> None:
        """Bring all lines to the disk: a checkpoint must not outlive the lines it counts."""
        if self._stream is not None:
            with room_for(self._path):
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self._stream is not None:
            with room_for(self._path):
                self._stream.close()


NOTES = "tracking.json"


def meters_of(
    *,
    counts: TokenCount,
    images: int,
    flops: float,
    seconds: float,
    parts: Mapping[str, float],
    device: str,
    num_devices: int,
    product_flops: float,
    memory: Mapping[str, Any],
) -> dict[str, Any]:
    """The meters of a stage for its `results.json`.

    Tokens are all positions, useful ones those that are no padding; `flops` are model FLOPs
    (`config/flops.py`). `model_flops_utilisation` is their share of the dense bfloat16 peak of
    `num_devices` such devices, as the maker states it (`cost/__init__.py`); None, and so is `gpu`,
    where that is not known. `product_share` is their share of `product_flops`, what the devices
    together reached in a large matrix product when the stage began. `time_shares` are those
    of `parts`, means over the ranks, in `seconds`; `memory` is `parallel.peak_memory`'s.
    """
    time_taken, gpu = max(seconds, 1e-9), gpu_of_device(device)
    speed = flops / time_taken
    vendor = None if gpu is None else num_devices * gpu.tflops * 1e12
    shares = {name: value / time_taken for name, value in parts.items()}
    return {
        "tokens_per_second": counts.total / time_taken,
        "useful_tokens_per_second": counts.seen / time_taken,
        "images_per_second": images / time_taken,
        "model_flops_per_second": speed,
        "device": device,
        "gpu": None if gpu is None else gpu.name,
        "vendor_flops_per_second": vendor,
        "model_flops_utilisation": speed / vendor if vendor else None,
        "product_flops_per_second": product_flops,
        "product_share": speed / product_flops if product_flops else None,
        "time_shares": shares | {"other": max(0.0, 1.0 - sum(shares.values()))},
        **memory,
    }


def tracking_of(
    machine: Machine, folder: Path, name: str, kind: str, about: dict[str, Any]
) -> Tracking | None:
    """The trackers that the machine names, for the stage in `folder`; None where it names none.

    `about` is shown beside the run where a tracker can.
    """
    makers: dict[str, type[Tracker]] = {m.NAME: m for m in (TensorBoard, Wandb, Trackio)}
    place = (folder, machine.tracking_project, name, kind, about)
    chosen = [(str(one), partial(makers[one], *place)) for one in machine.tracking]
    return Tracking(dict(chosen)) if chosen else None


class Tracker:
    """One place that metrics go to; its run, and the step that it was sent last, stand in
    `tracking.json`, written before the step is sent: none is sent twice."""

    NAME = ""

    def __init__(
        self, folder: Path, project: str, name: str, kind: str, about: dict[str, Any]
    ) -> None:
        self._folder, self._kind = folder, kind
        self._shown = {"project": project, "config": about, "resume": "allow"}
        # A stage whose folder was deleted is another run.
        known = {"run": f"{name}-{uuid.uuid4().hex[:6]}", "step": -1}
        self._kept: dict[str, Any] = self._notes().get(self.NAME, known)
        self._run: Any = None

    def begin(self, step: int) -> int:
        """Open the run, or go on with it behind `step`; the last step that it holds."""
        self._keep(int(self._kept["step"]))
        self._run = self._open(str(self._kept["run"]))
        return int(self._kept["step"])

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """Add rows, in the order of their steps."""
        self._keep(rows[-1].step)
        for row in rows:
            self._run.log(dict(row.values), step=row.step)

    def finish(self, failed: bool) -> None:
        """Bring away what is held, and end the run; a later start of the stage goes on with it."""
        self._run.finish()

    def _open(self, run: str) -> Any:
        raise NotImplementedError

    def _notes(self) -> dict[str, Any]:
        path = self._folder / NOTES
        found: dict[str, Any] = read_json(path) if path.is_file() else {}
        return found

    def _keep(self, step: int) -> None:
        self._kept = {**self._kept, "step": step}
        write_json(self._folder / NOTES, self._notes() | {self.NAME: self._kept})


class TensorBoard(Tracker):
    """Event files in `tensorboard/`, one a start of the stage.

    Steps are noted after they are written: what a start finds behind them is purged.
    """

    NAME = "tensorboard"

    def begin(self, step: int) -> int:
        """Go on behind `step`, or where the file is shorter behind that."""
        self._keep(min(step, int(self._kept["step"])))
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        last: int = self._kept["step"]
        self._run = writer(str(self._folder / "tensorboard"), purge_step=last + 1)
        return last

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """A record a value, and the file flushed."""
        for row in rows:
            for tag, value in row.values.items():
                self._run.add_scalar(tag, value, row.step, row.at)
        self._run.flush()
        self._keep(rows[-1].step)

    def finish(self, failed: bool) -> None:
        """Close the file."""
        self._run.close()


class Wandb(Tracker):
    """Weights & Biases, as its environment variables say (WANDB_MODE, WANDB_ENTITY, ...)."""

    NAME = "wandb"

    def _open(self, run: str) -> Any:
        wandb = importlib.import_module("wandb")
        # It must neither take over what this process prints nor look at its files.
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        names = {"id": run, "name": run, "job_type": self._kind}
        return wandb.init(**names, **self._shown, dir=str(self._folder), settings=quiet)

    def finish(self, failed: bool) -> None:
        """End the run, as one that failed where it has."""
        self._run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """Trackio, as its environment variables say (TRACKIO_DIR, TRACKIO_SPACE_ID, ...)."""

    NAME = "trackio"

    def _open(self, run: str) -> Any:
        trackio = importlib.import_module("trackio")
        return trackio.init(name=run, group=self._kind, **self._shown, embed=False)


Report = Callable[[dict[str, Any]], None]


class Record:
    """Writes down what steps gave. A step is held until the next one is on its way, or until
    somebody must know, so that no GPU waits for its host.

    A step takes the seconds since the one before has ended, those of `pause` left out. `rows` are
    those of a step and of the plan.
    """

    def __init__(
        self,
        log: MetricsLog,
        clock: Clock,
        report: Report,
        progress: Progress,
        *,
        rows: tuple[int, int],
    ) -> None:
        self._log, self._clock, self._report = log, clock, report
        self._progress, self._rows = progress, rows
        self._held: tuple[Taken, float | None] | None = None
        self._seconds, self._before, self._shown = progress.seconds, time.monotonic(), 0.0
        self._paused, self.has_begun = 0.0, False

    def next_rows(self, steps: Iterator[list[Batch]]) -> list[Batch] | None:
        """The micro-batches of the next step; None behind the last one."""
        with self.guard(), self._clock.part("data", on_device=True):
            return next(steps, None)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Where the block fails, the held step is written down first."""
        try:
            yield
        except Exception:
            self.write()
            raise

    def hold(self, progress: Progress, taken: Taken, rate: float | None) -> None:
        """A step that was taken at `rate`, and the counts of all up to it."""
        assert self._held is None, "the step before is to be written first"
        self._progress, self._held, self.has_begun = progress, (taken, rate), True

    def read(self) -> StepResult:
        """What the held step gave; raises NonFiniteError with its rows."""
        assert self._held is not None, "no step is held"
        try:
            return self._held[0].read()
        except NonFiniteError as error:
            (size, num_rows), step = self._rows, self._progress.step - 1
            high = min((step + 1) * size, num_rows) - 1
            raise NonFiniteError(
                f"step {step}, rows {step * size} to {high}: {error}; "
                "the weights are those before the step. Lower the rate or look at these rows"
            ) from None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs in the block belongs to no step."""
        before = time.monotonic()
        yield
        self._paused += time.monotonic() - before

    def write(self, held_out: Mapping[str, Any] | None = None) -> Progress:
        """The line of the held step, and the progress with it; the last one where none is held."""
        if self._held is None:
            return self._progress
        result, (taken, rate) = self.read(), self._held
        seconds, self._before = taken.ended - self._before, taken.ended + self._paused
        self._seconds, self._paused, self._held = self._seconds + seconds, 0.0, None
        reached = self._progress
        line = {
            "step": reached.step,
            "tokens_seen": reached.tokens_seen,
            "loss": result.loss,
            "rate": rate,
            "grad_norm": result.grad_norm,
            "num_targets": result.num_targets,
            "seconds": round(seconds, 6),
        }
        self._log.write(**line, **({"held_out": held_out} if held_out else {}))
        self._progress = replace(
            reached,
            loss=result.loss,
            seconds=self._seconds,
            parts=self._clock.read(),
            metrics_bytes=self._log.position,
        )
        if time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            told = reached.total_tokens, result.loss, self._seconds
            self._report(progress_event(reached.tokens_seen, *told))
        return self._progress
