"""How far a running stage is: what its process leaves in the folder, and how others read it."""

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from midstream.core.storage import read_json, write_json

PROGRESS = "progress.json"
# A stage that is shorter than this leaves no note.
NOTE_SECONDS = 3.0
# In a process's environment: the file that what it prints goes to.
LOG = "MIDSTREAM_LOG"
# Steps that the speed of a training stage is taken over.
SPEED_STEPS = 32
_TAIL_BYTES = 2**16
_MARK = re.compile(rb"^--- (\S+) starts, ")


@dataclass(frozen=True)
class Sign:
    """What a stage last said of itself; `done` is a share, None where it said nothing.

    `tokens_per_second` is 0 and `seconds_left` None where they are not known yet. `seen` is when it
    said so (ISO).
    """

    done: float | None = None
    tokens_seen: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    note: str = ""
    seconds_left: float | None = None
    seen: str | None = None


class ProgressFile:
    """Keeps a stage's last progress in `progress.json`, written anew every NOTE_SECONDS.

    Where that fails, standard error says so once and the stage goes on: nothing depends on it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS
        self._last = time.monotonic()
        self._begun: dict[str, Any] | None = None
        self._fails = False
        self.remove()

    def note(self, values: Mapping[str, Any]) -> None:
        """Keep a progress event of a worker (`launch/workers.py`) if the last one is old."""
        if self._begun is None:
            self._begun = {"begun_at": now(), "begun_done": values["done"]}
        if self._fails or time.monotonic() - self._last < NOTE_SECONDS:
            return
        self._last = time.monotonic()
        try:
            write_json(self._path, {**values, "at": now(), **self._begun})
        except OSError as error:
            self._fails = True
            print(f"{error}; the stage goes on, its progress is not shown", file=sys.stderr)

    def remove(self) -> None:
        """Take it away, if it is there."""
        if self._path.exists():
            self._path.unlink()


def read_sign(folder: Path, total_tokens: int | None) -> Sign:
    """What the stage in `folder` last said, its steps' lines before its notes.

    `total_tokens`: what it sees in all, where it has not said so itself.
    """
    noted = _noted(folder)
    lines = metrics_tail(folder, SPEED_STEPS)
    total = int(noted.get("total_tokens") or total_tokens or 0)
    if not lines or not total or int(noted.get("tokens_seen") or 0) > lines[-1]["tokens_seen"]:
        return Sign(
            done=noted.get("done"),
            tokens_seen=int(noted.get("tokens_seen") or 0),
            loss=noted.get("loss"),
            tokens_per_second=float(noted.get("tokens_per_second") or 0.0),
            note=str(noted.get("note") or ""),
            seconds_left=_left(noted),
            seen=noted.get("at"),
        )
    last = lines[-1]
    seconds = sum(line["seconds"] for line in lines[1:])
    speed = (last["tokens_seen"] - lines[0]["tokens_seen"]) / seconds if seconds else 0.0
    left = max(total - last["tokens_seen"], 0)
    written = (folder / "metrics.jsonl").stat().st_mtime
    return Sign(
        done=min(last["tokens_seen"] / total, 1.0),
        tokens_seen=last["tokens_seen"],
        loss=last["loss"],
        tokens_per_second=speed,
        note=str(noted.get("note") or ""),
        seconds_left=left / speed if speed else None,
        seen=datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
    )


def metrics_tail(folder: Path, number: int) -> list[dict[str, Any]]:
    """The last lines of `metrics.jsonl`; one that is still being written is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(size - _TAIL_BYTES, 0))
        whole, _, _ = stream.read().rpartition(b"\n")
    lines = whole.splitlines()
    if size > _TAIL_BYTES:
        lines = lines[1:]  # most likely cut in the middle
    return [json.loads(line) for line in lines[-number:]]


def log_here(store: Path, name: str) -> dict[str, Any]:
    """Where this process prints to, and where in it the stage `name` begins; marks the place.

    `log` is relative to the store where it lies there, and None where nobody said where it is.
    """
    given = os.environ.get(LOG)
    if not given:
        return {"log": None, "log_start": 0}
    path = Path(given)
    sys.stderr.flush()
    start = path.stat().st_size if path.is_file() else 0
    print(f"--- {name} starts, {now()}, process {os.getpid()}", file=sys.stderr, flush=True)
    inside = path.absolute().is_relative_to(store.absolute())
    place = path.absolute().relative_to(store.absolute()) if inside else path.absolute()
    return {"log": place.as_posix(), "log_start": start}


def own_part(lines: bytes, name: str, *, begun: bool = False) -> tuple[bytes, bool]:
    """What of a log's lines, from a stage's mark on, is the stage's; whether it has ended there.

    It ends where another stage's mark stands, or its own once more. `begun`: its mark stands before
    these lines.
    """
    kept: list[bytes] = []
    for line in lines.splitlines(keepends=True):
        found = _MARK.match(line)
        if found and (begun or found[1].decode(errors="replace") != name):
            return b"".join(kept), True
        begun = begun or found is not None
        kept.append(line)
    return b"".join(kept), False


def now() -> str:
    """The time, as every file of the store gives it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _noted(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(folder / PROGRESS)
    except FileNotFoundError:  # it has not been written, or the stage has just ended
        return {}
    return found


def _left(noted: Mapping[str, Any]) -> float | None:
    """From the speed since this process began; a resumed stage began behind 0."""
    if not noted:
        return None
    gone = noted["done"] - noted["begun_done"]
    if gone <= 0:
        return None
    passed = datetime.fromisoformat(noted["at"]) - datetime.fromisoformat(noted["begun_at"])
    return float(passed.total_seconds() * (1 - noted["done"]) / gone)
