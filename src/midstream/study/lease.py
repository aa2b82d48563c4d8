"""Who works in a stage's folder, and how far it is, as others read it.

One writer: a lock, and beside it a heartbeat for disks on which nodes see no locks.

Ages are differences of times that the disk gave: the clocks of two hosts are never compared.
"""

import errno
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from midstream.core.storage import read_json, room_for, write_json

PROGRESS = "progress.json"
# A stage that is shorter than this leaves no note.
NOTE_SECONDS = 3.0
# In a process's environment: the file that what it prints goes to.
LOG = "MIDSTREAM_LOG"
# Steps that the speed of a training stage is taken over.
SPEED_STEPS = 32
_TAIL_BYTES = 2**16
# What `log_here` prints where a stage begins in a log.
MARK = re.compile(rb"^--- (\S+) starts, ")


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


def progress_event(
    tokens_seen: int, total_tokens: int, loss: float | None, seconds: float
) -> dict[str, Any]:
    """What a stage reports of itself while it runs; of none that trains tokens are 0 of 0."""
    return {
        "done": tokens_seen / max(total_tokens, 1),
        "tokens_seen": tokens_seen,
        "total_tokens": total_tokens,
        "loss": loss,
        "tokens_per_second": tokens_seen / max(seconds, 1e-9),
        "note": "",
    }


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
    noted: dict[str, Any] = {}
    with suppress(FileNotFoundError):  # it has not been written, or the stage has just ended
        noted = read_json(folder / PROGRESS)
    sign = Sign(
        done=noted.get("done"),
        tokens_seen=int(noted.get("tokens_seen") or 0),
        loss=noted.get("loss"),
        tokens_per_second=float(noted.get("tokens_per_second") or 0.0),
        note=str(noted.get("note") or ""),
        seconds_left=_left(noted),
        seen=noted.get("at"),
    )
    lines = metrics_tail(folder, SPEED_STEPS)
    total = int(noted.get("total_tokens") or total_tokens or 0)
    if not lines or not total or sign.tokens_seen > lines[-1]["tokens_seen"]:
        return sign
    last = lines[-1]
    seconds = sum(line["seconds"] for line in lines[1:])
    speed = (last["tokens_seen"] - lines[0]["tokens_seen"]) / seconds if seconds else 0.0
    left = max(total - last["tokens_seen"], 0)
    written = (folder / "metrics.jsonl").stat().st_mtime
    return replace(
        sign,
        done=min(last["tokens_seen"] / total, 1.0),
        tokens_seen=last["tokens_seen"],
        loss=last["loss"],
        tokens_per_second=speed,
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


def now() -> str:
    """The time, as every file of the store gives it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _left(noted: Mapping[str, Any]) -> float | None:
    """From the speed since this process began; a resumed stage began behind 0."""
    if "begun_done" not in noted:
        return None
    gone = noted["done"] - noted["begun_done"]
    if gone <= 0:
        return None
    passed = datetime.fromisoformat(noted["at"]) - datetime.fromisoformat(noted["begun_at"])
    return float(passed.total_seconds() * (1 - noted["done"]) / gone)


# A reader asks whether a lock is held by taking it for an instant; who means to keep the lock
# tries again for this long, so that a glance at the store never fails a stage.
GLANCE_SECONDS = 0.5
# A heartbeat is renewed this often, and its holder is taken for dead after so long without one.
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


class Busy(Exception):  # noqa: N818 - the text is whose it is; `lease` says what is refused
    """Another process gives signs of life."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder; `born` tells processes apart that had one number after the other."""

    token: str
    host: str
    pid: int
    born: str | None
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def lease(lock: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    """Hold the lock file `lock` and the heartbeat beside it while the block runs.

    A heartbeat whose process has ended, or that is older than STALE_SECONDS, is taken over; for one
    of a process that may still live standard error says so. Raises ValueError with the `refusal`
    of the holder, and nothing changed, if another process holds either. A process whose heartbeat
    was taken over ends at once.
    """
    with _locked(lock, refusal):
        try:
            beat = _Heartbeat(heartbeat_of(lock))
        except Busy as holder:
            raise ValueError(refusal(str(holder))) from None
        try:
            yield
        finally:
            beat.stop()


@contextmanager
def lock_of_the_dead(lock: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    """Hold the lock for a process that is known to have ended; its heartbeat is removed.

    Raises ValueError with the `refusal` if the lock is held all the same.
    """
    with _locked(lock, refusal):
        heartbeat_of(lock).unlink(missing_ok=True)
        yield


@contextmanager
def _locked(lock: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    guard = FileLock(lock, timeout=GLANCE_SECONDS)
    try:
        guard.acquire()
    except Timeout:
        holder = _holder(heartbeat_of(lock))
        raise ValueError(refusal(str(holder or "an unknown process"))) from None
    try:
        yield
    finally:
        guard.release()


def heartbeat_of(lock: Path) -> Path:
    """The heartbeat's file beside a lock file."""
    return lock.with_suffix(".heartbeat")


def is_held(lock: Path) -> bool:
    """Whether some process holds the lock file, or gives signs of life beside it.

    Reading rights are enough to ask.
    """
    if _is_locked(lock):
        return True
    path = heartbeat_of(lock)
    with suppress(FileNotFoundError):
        return not _is_gone(_holder(path)) and _age(path) < STALE_SECONDS
    return False


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            # What `FileLock` holds is exclusive; closing the file gives this one back.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno == errno.ENOSYS:
            # Without flock `FileLock` goes by the file, which is there while the lock is held.
            return True
        if error.errno in (errno.ENOENT, errno.ENOLCK, errno.EOPNOTSUPP):
            return False
        raise
    return False


class _Heartbeat:
    """This process's heartbeat at `path`, renewed by a thread until `stop`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mine = Holder(uuid4().hex, socket.gethostname(), os.getpid(), _born(), now())
        while not self._create():
            self._make_room()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give it up."""
        self._over.set()
        self._thread.join()
        if _holder(self._path) == self._mine:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            # The one that makes the file has it, whatever the others see.
            stream = self._path.open("x")
        except FileExistsError:
            return False
        try:
            with room_for(self._path), stream:
                json.dump(asdict(self._mine), stream)
        except OSError:  # an empty file would stand for a process that is not known
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _make_room(self) -> None:
        """Take away the heartbeat of a process that has ended; Busy for any other."""
        holder = _holder(self._path)
        if not _is_gone(holder):
            try:
                age = _age(self._path)
                if age < -BEAT_SECONDS:
                    # Who lives touches it by the clock of now.
                    time.sleep(2 * BEAT_SECONDS)
                    age = again if (again := _age(self._path)) >= 0 else STALE_SECONDS
            except FileNotFoundError:  # just given up
                return
            who = holder or "an unknown process"
            if age < STALE_SECONDS:
                raise Busy(
                    f"{who}, whose last sign of life is {age:.0f} s old (it is taken for dead "
                    f"after {STALE_SECONDS:.0f} s)"
                )
            print(
                f"{self._path.parent}: {who} has given no sign of life for {age:.0f} s; "
                "this process takes over",
                file=sys.stderr,
            )
        aside = self._path.with_name(f".{self._path.name}.{uuid4().hex}.tmp")
        with suppress(FileNotFoundError):
            self._path.replace(aside)
            moved = _holder(aside)
            if moved == holder:
                aside.unlink()
            else:  # another one took over meanwhile: it keeps what is its own
                aside.replace(self._path)
                raise Busy(str(moved or "an unknown process"))

    def _run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that is away for a moment
                holder = _holder(self._path)
                if holder is not None and holder != self._mine:
                    _leave(f"{self._path.parent}: {holder} has taken over; this process ends")
                    return
                if holder is None and not self._path.exists():
                    self._create()
                os.utime(self._path)


def _leave(why: str) -> None:
    """Write nothing more: the folder is another process's."""
    print(why, file=sys.stderr, flush=True)
    os._exit(1)


def _holder(path: Path) -> Holder | None:
    """Who a heartbeat is of; None where there is none, or it is being written."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_gone(holder: Holder | None) -> bool:
    """Whether it was a process of this host that has ended."""
    if holder is None or holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _born(holder.pid) != holder.born


def _born(pid: int | None = None) -> str | None:
    """When a process was started, in the kernel's ticks; None where it is not said, or it is over.

    Source: proc(5), fields 3 and 22 of /proc/PID/stat.
    """
    try:
        stat = Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _age(path: Path) -> float:
    """Seconds since a heartbeat by the disk's clock, less than none where that was set back or the
    file came from another machine; FileNotFoundError if it is not there."""
    # An open file's times are asked of the server anew, those of a name may be remembered.
    with path.open("rb") as stream:
        last = os.fstat(stream.fileno()).st_mtime
    probe = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with probe.open("x") as stream_now:
            return os.fstat(stream_now.fileno()).st_mtime - last
    except OSError:
        if os.access(path.parent, os.W_OK):
            raise
        # Who may only look goes by the host's clock.
        return time.time() - last
    finally:
        with suppress(OSError):
            probe.unlink()
