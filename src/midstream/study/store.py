"""The store (`docs/store.md`): one folder a stage, its results, and its part of a log."""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from midstream.core.storage import (
    read_json,
    remove_leftovers,
    require_folder,
    require_writable,
    write_bytes,
    write_json,
)
from midstream.study.label import label
from midstream.study.lease import (
    MARK,
    ProgressFile,
    is_held,
    lease,
    lock_of_the_dead,
    log_here,
    now,
)
from midstream.study.results import R, checked
from midstream.study.stages import Stage, stage_from_json
from midstream.study.studies import AnyStudy, study_from_json

SUCCESS = "SUCCESS"
# What status.json says of the process that ran a stage; `docs/store.md`.
ABOUT = ("host", "pid", "ranks", "started", "log", "log_start")

State = Literal["done", "running", "failed", "stopped", "new"]


class Stopped(Exception):  # noqa: N818 - it ends a stage without being an error
    """Ends a stage that was asked to stop and has kept a checkpoint to resume from."""


class OpenStage:
    """A stage that this process runs: its folder, and the way to hand in its results."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self.folder = folder
        self.results: dict[str, Any] | None = None
        self.progress = ProgressFile(folder)

    def finish(self, results: dict[str, Any]) -> None:
        """Hand in what becomes `results.json` when the block ends well."""
        self.results = results


class Ledger:
    """The store at `store`, read and written by stage; NotADirectoryError for what is no folder."""

    def __init__(self, store: Path) -> None:
        require_folder(store, "give another --store")
        self.store = store

    @property
    def digests(self) -> Path:
        """Where the digests of data files are kept, so that each is read once."""
        return self.store / "digests.sqlite"

    def folder(self, stage: Stage) -> Path:
        """Where the stage lives, whether or not it exists yet."""
        return self.store / stage.name

    def is_done(self, stage: Stage) -> bool:
        """Whether the success mark is there."""
        return (self.folder(stage) / SUCCESS).is_file()

    def state(self, stage: Stage) -> State:
        """done, running (`is_held` of its lock), failed, stopped (or killed), or new."""
        folder = self.folder(stage)
        if self.is_done(stage):
            return "done"
        if not (folder / "status.json").is_file():
            return "new"
        state = read_json(folder / "status.json")["state"]
        if state == "done":
            # Killed between the status and the success mark: without the mark it is unfinished.
            return "stopped"
        if state == "running" and not is_held(folder / "lock"):
            return "stopped"
        return cast(State, state)

    def status(self, stage: Stage) -> dict[str, Any]:
        """`status.json` with the true state (see `state`); only the state for a new stage."""
        path = self.folder(stage) / "status.json"
        stored = read_json(path) if path.is_file() else {}
        return {**stored, "state": self.state(stage)}

    def result(self, stage: Stage, kind: type[R]) -> R:
        """What the stage found, as `study/results.py` types it.

        FileNotFoundError names stage, state and folder if it is not done; ValueError the file, for
        one that is no `kind`.
        """
        return checked(kind, self.results(stage), self.folder(stage) / "results.json")

    def results(self, stage: Stage) -> dict[str, Any]:
        """`results.json` as it stands; FileNotFoundError as for `result`."""
        if not self.is_done(stage):
            raise FileNotFoundError(
                f"{label(stage)} is {self.state(stage)}, not done, in {self.folder(stage)}; "
                f"run it first"
            )
        path = self.folder(stage) / "results.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing though {label(stage)} is done, as in a store that was not "
                f"copied whole; copy the folder again, or delete {path.parent} and run the study"
            )
        return cast(dict[str, Any], read_json(path))

    def metrics(self, stage: Stage) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a last line that is still being written is left out."""
        path = self.folder(stage) / "metrics.jsonl"
        if not path.is_file():
            return []
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        entries = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        return entries

    def predictions(self, stage: Stage, task: str) -> Path:
        """The parquet file of one task; FileNotFoundError lists the tasks there are."""
        folder = self.folder(stage) / "predictions"
        path = folder / f"{task}.parquet"
        if not path.is_file():
            known = ", ".join(sorted(item.stem for item in folder.glob("*.parquet"))) or "none"
            raise FileNotFoundError(
                f"{label(stage)} kept no predictions of {task!r} in {folder}; it has {known}"
            )
        return path

    @contextmanager
    def open_stage(self, stage: Stage) -> Iterator[OpenStage]:
        """Run a stage: its lock is held and its status kept while the block runs.

        The block hands in its results with `finish`; then results, status and, last, the success
        mark are written. `Stopped` (or Ctrl-C) leaves the stage stopped, any other exception
        failed, with its text; all of them go on to the caller. Raises ValueError, with nothing
        changed, if another process runs the stage, if it is done already or if the folder holds
        another stage.
        """
        folder = self.folder(stage)
        folder.mkdir(parents=True, exist_ok=True)
        require_writable(folder)
        with lease(folder / "lock", _in_use(folder)):
            if self.is_done(stage):
                raise ValueError(f"{folder} is done already; delete the folder to run it again")
            _refuse_another(folder, stage)
            write_json(folder / "stage.json", stage.model_dump(mode="json"))
            subfolders = [item for item in folder.iterdir() if item.is_dir()]
            for place in (*subfolders, folder):
                remove_leftovers(place)
            about = _about(self.store, stage)
            self._write_status(stage, "running", about)
            work = OpenStage(stage, folder)
            try:
                yield work
                if work.results is None:
                    raise RuntimeError(f"{label(stage)} ended without handing in its results")
                write_json(folder / "results.json", work.results)
            except (Stopped, KeyboardInterrupt) as reason:
                self._write_status(stage, "stopped", about, error=str(reason) or None)
                raise
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
                self._write_status(stage, "failed", about, error=text)
                raise
            work.progress.remove()
            self._write_status(stage, "done", about)
            write_bytes(folder / SUCCESS, f"{stage.identity}\n".encode())

    def mark_failed(self, stage: Stage, error: str) -> None:
        """Note for a process that can no longer do it why its stage failed.

        The caller knows that it has ended: its heartbeat counts no more. Raises ValueError if the
        stage's lock is held, since then its process lives.
        """
        folder = self.folder(stage)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "status.json"
        before = read_json(path) if path.is_file() else {}
        about = _about(None, stage) | {key: before[key] for key in ABOUT if key in before}
        with lock_of_the_dead(folder / "lock", _in_use(folder)):
            self._write_status(stage, "failed", about, error=error)

    def save_study(self, study: AnyStudy) -> Path:
        """Keep the study as last run in `studies/`; returns the file."""
        path = self.store / "studies" / f"{study.name}.json"
        write_json(path, study.model_dump(mode="json"))
        return path

    def load_study(self, name: str) -> AnyStudy:
        """The study last run under this name.

        Raises FileNotFoundError that lists those there are, ValueError for one of another version.
        """
        path = self.store / "studies" / f"{name}.json"
        if not path.is_file():
            known = ", ".join(self.study_names()) or "none"
            raise FileNotFoundError(f"no study {name!r} in {path.parent}; it has {known}")
        try:
            return study_from_json(path.read_bytes())
        except ValidationError:
            raise ValueError(
                f"{path} is of another version of Midstream, whose studies and stages this one "
                "does not read; run the study again, or give another --store"
            ) from None

    def study_names(self) -> list[str]:
        """The studies that were run in this store, in the order of the alphabet."""
        return sorted(path.stem for path in (self.store / "studies").glob("[!.]*.json"))

    def _write_status(
        self, stage: Stage, state: State, about: Mapping[str, Any], *, error: str | None = None
    ) -> None:
        ended = None if state == "running" else now()
        value = {"state": state, "error": error, **about, "ended": ended}
        write_json(self.folder(stage) / "status.json", value)


def _about(store: Path | None, stage: Stage) -> dict[str, Any]:
    """ABOUT of a stage that this process starts; without a store, of one that it never saw."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": 1 if store is None else int(os.environ.get("WORLD_SIZE", 1)),
        "started": None if store is None else now(),
        **({} if store is None else log_here(store, stage.name)),
    }


@contextmanager
def launch_lock(store: Path) -> Iterator[None]:
    """Hold the store for one launcher.

    Raises ValueError with the store, the holder's process id and the remedy if another launcher
    holds it; the store is then as it was.
    """
    store.mkdir(parents=True, exist_ok=True)
    require_writable(store)
    with lease(
        store / "launch.lock",
        lambda who: (
            f"store {store} is in use by another launcher ({who}); "
            f"wait until it ends, stop it, or give another --store"
        ),
    ):
        yield


def _in_use(folder: Path) -> Callable[[str], str]:
    return lambda who: f"{folder} is being run by {who}; wait until it ends or stop it"


def read_stage(path: Path, remedy: str) -> Stage:
    """The stage that a `stage.json` says; ValueError, with the remedy, if this version cannot read
    it."""
    try:
        return stage_from_json(path.read_bytes())
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"]
        raise ValueError(f"{path} is no stage of this version ({why}); {remedy}") from None


def _refuse_another(folder: Path, stage: Stage) -> None:
    path = folder / "stage.json"
    if not path.is_file():
        return
    found = read_stage(path, "move it away")
    if found.identity != stage.identity:
        raise ValueError(
            f"{path} holds a {found.kind} of identity {found.identity}, not {stage.identity}; "
            f"the folder was renamed or edited: move it away"
        )


class StageLog:
    """What the process that ran a stage last printed meanwhile, read on as it grows.

    A stage of an earlier version, or one that no launcher started, has no log of its own.
    """

    def __init__(self, ledger: Ledger, stage: Stage) -> None:
        status = ledger.status(stage)
        # An absolute path stays one.
        self.path = ledger.store / status["log"] if status.get("log") else None
        self._mark, self._at = stage.name.encode(), int(status.get("log_start") or 0)
        self._is_begun = self._has_ended = False

    def describe(self) -> str:
        """Where it lies, or why there is none."""
        if self.path is None:
            return "log: the stage's process had no log file of its own"
        if not self.path.is_file():
            return f"log: {self.path} is not there any more"
        return f"log: {self.path}, from byte {self._at:,}"

    def more(self) -> Iterator[str]:
        """The whole lines that came since the last call, up to the mark of the next stage, or to
        the stage's own once more."""
        if self.path is None or not self.path.is_file() or self._has_ended:
            return
        with self.path.open("rb") as stream:
            stream.seek(self._at)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                mark = MARK.match(line)
                if mark and (self._is_begun or mark[1] != self._mark):
                    self._has_ended = True
                    return
                self._is_begun |= mark is not None
                self._at += len(line)
                yield from line.decode(errors="replace").splitlines()
