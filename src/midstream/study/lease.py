"""One writer a folder: a lock, and beside it a heartbeat for disks on which nodes see no locks.

Ages are differences of times that the disk gave: the clocks of two hosts are never compared.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from midstream.study.progress import now

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
            with self._path.open("x") as stream:
                json.dump(asdict(self._mine), stream)
        except FileExistsError:
            return False
        return True

    def _make_room(self) -> None:
        """Take away the heartbeat of a process that has ended; Busy for any other."""
        holder = _holder(self._path)
        if not _is_gone(holder):
            try:
                age = _age(self._path)
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
    """Seconds since a heartbeat by the disk's clock; FileNotFoundError if it is not there."""
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
