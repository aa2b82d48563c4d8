"""The places that metrics can go to: TensorBoard's event files, Weights & Biases, Trackio.

TensorBoard's file is cut back to the step that a stage goes on from. The other two only take more:
which step was sent last stands in `tracking.json`, written before it is sent, and none is sent
twice; a process that is killed between the two leaves a gap of some seconds.
"""

import importlib
import os
import socket
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from midstream.config import Machine
from midstream.storage import read_json, write_json
from midstream.train.tracking import TrackedRow, Tracker, Tracking

NOTES = "tracking.json"
# A record of an event file: length, its checksum, the bytes, their checksum.
_LENGTH, _CHECK_BYTES = struct.Struct("<Q"), 4


def tracking_of(
    machine: Machine, folder: Path, name: str, kind: str, about: dict[str, Any]
) -> Tracking | None:
    """The trackers that the machine names, for the stage in `folder`; None where it names none.

    `about` is shown beside the run where a tracker can.
    """
    if not machine.tracking:
        return None
    project = machine.tracking_project
    place = (folder, project, name, kind, about)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": partial(TensorBoard, folder / "tensorboard"),
        "wandb": partial(Wandb, *place),
        "trackio": partial(Trackio, *place),
    }
    return Tracking({name: makers[name] for name in machine.tracking})


class TensorBoard:
    """One event file in `folder`, a record a step, written with TensorBoard's own writer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._records = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._writer: Any = None

    def begin(self, step: int) -> int:
        """Cut the file back to `step`; the last step that is left in it, -1 for none."""
        self._folder.mkdir(exist_ok=True)
        # TensorBoard asks for "tfevents" and a time in the name, and reads in their order.
        host, stamp = socket.gethostname(), f"{int(time.time()):010d}"
        found = sorted(self._folder.glob("events.out.tfevents.*"))
        path = found[0] if found else self._folder / f"events.out.tfevents.{stamp}.{host}.0.0"
        last, end = self._read(path, step) if found else (-1, 0)
        if found:
            os.truncate(path, end)
        self._writer = self._records.RecordWriter(path.open("ab"))
        if end == 0:
            self._write(file_version="brain.Event:2", wall_time=time.time())
        return last

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """A record a row, and the file flushed."""
        for row in rows:
            values = [{"tag": tag, "simple_value": value} for tag, value in row.values.items()]
            self._write(wall_time=row.at, step=row.step, summary={"value": values})
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **values: Any) -> None:
        self._writer.write(self._events.Event(**values).SerializeToString())

    def _read(self, path: Path, step: int) -> tuple[int, int]:
        """The last step up to `step`, and where its record ends; a torn record ends the file."""
        data, at, last = path.read_bytes(), 0, -1
        while at + _LENGTH.size <= len(data):
            (size,) = _LENGTH.unpack_from(data, at)
            start = at + _LENGTH.size + _CHECK_BYTES
            if start + size + _CHECK_BYTES > len(data):
                break
            event = self._events.Event.FromString(data[start : start + size])
            if event.HasField("summary"):
                if event.step > step:
                    break
                last = event.step
            at = start + size + _CHECK_BYTES
        return last, at


class _Service:
    """A tracker that only takes more; its run and last step are kept in `tracking.json`."""

    NAME = ""

    def __init__(
        self, folder: Path, project: str, name: str, kind: str, about: dict[str, Any]
    ) -> None:
        self._folder, self._project, self._kind, self._about = folder, project, kind, about
        notes = self._notes().get(self.NAME)
        # A stage whose folder was deleted is another run.
        self._kept = notes or {"run": f"{name}-{uuid.uuid4().hex[:6]}", "step": -1}
        self._run: Any = None

    def begin(self, step: int) -> int:
        """Open the run, or go on with it; the last step that was sent, before or behind `step`."""
        self._keep(int(self._kept["step"]))
        self._run = self._open(str(self._kept["run"]))
        return int(self._kept["step"])

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """Note the last step, then send."""
        self._keep(rows[-1].step)
        for row in rows:
            self._run.log(dict(row.values), step=row.step)

    def _open(self, run: str) -> Any:
        raise NotImplementedError

    def _notes(self) -> dict[str, Any]:
        path = self._folder / NOTES
        found: dict[str, Any] = read_json(path) if path.is_file() else {}
        return found

    def _keep(self, step: int) -> None:
        self._kept = {**self._kept, "step": step}
        write_json(self._folder / NOTES, self._notes() | {self.NAME: self._kept})


class Wandb(_Service):
    """Weights & Biases, as its environment variables say (WANDB_MODE, WANDB_ENTITY, ...)."""

    NAME = "wandb"

    def _open(self, run: str) -> Any:
        wandb = importlib.import_module("wandb")
        # It must neither take over what this process prints nor look at its files.
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        return wandb.init(
            project=self._project,
            id=run,
            name=run,
            job_type=self._kind,
            config=self._about,
            dir=str(self._folder),
            resume="allow",
            settings=quiet,
        )

    def finish(self, failed: bool) -> None:
        """End the run; a later start of the stage goes on with it."""
        self._run.finish(exit_code=int(failed))


class Trackio(_Service):
    """Trackio, as its environment variables say (TRACKIO_DIR, TRACKIO_SPACE_ID, ...)."""

    NAME = "trackio"

    def _open(self, run: str) -> Any:
        trackio = importlib.import_module("trackio")
        return trackio.init(
            project=self._project,
            name=run,
            group=self._kind,
            config=self._about,
            resume="allow",
            embed=False,
        )

    def finish(self, failed: bool) -> None:
        """End the run; a later start of the stage goes on with it."""
        self._run.finish()
