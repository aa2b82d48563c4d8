"""The only place that writes: temporary name, fsync, manifest, rename."""

import errno
import json
import os
import pwd
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from midstream.core.digests import read_sha256

MANIFEST = "manifest.json"
# What ends the name of a file or folder that is being written, or is on its way out.
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(tmp|old)\Z")


def num_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those that it may run on (taskset, a job), no more than its
    container's `limit` gives it the time of."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # "max" is no limit
        quota, period = map(int, limit.read_text().split())
        cores = min(cores, max(1, -(-quota // period)))
    return cores


# Files that are read, hashed or written at once; `hashlib` leaves the interpreter to others.
THREADS = min(8, num_cores())

Result = TypeVar("Result")


class CorruptError(ValueError):
    """A stored file is missing or differs from its manifest."""


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` completely or not at all; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with room_for(path), temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_file(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Put `value` as indented JSON at `path` completely or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # Halves of surrogate pairs (names that are no UTF-8) are escaped as JSON does.
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError names the file and the line if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with a manifest, when the block ends well.

    Every file gets its size and sha256 in `manifest.json`. An existing `path` is replaced only
    then. If the block raises, nothing is left behind.
    """
    temporary = start_folder(path)
    try:
        with room_for(path):
            yield temporary
            files = sorted(item for item in temporary.rglob("*") if item.is_file())
            names = [item.relative_to(temporary).as_posix() for item in files]
            finish_folder(temporary, path, seal(temporary, names))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def start_folder(path: Path) -> Path:
    """An empty temporary folder beside `path`, for `seal` and `finish_folder`.

    These three are `new_folder` for several processes that write one folder: one starts and
    finishes it, each seals what it has written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    return temporary


def seal(temporary: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Bring files to the disk; returns their entries in the manifest."""
    entries = {}
    for name in names:
        _sync_file(temporary / name)
        entries[name] = _entry(temporary / name)
    return entries


def finish_folder(temporary: Path, path: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Give a temporary folder its manifest and its name; an existing `path` is replaced."""
    write_json(temporary / MANIFEST, dict(sorted(entries.items())))
    if path.exists():
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
        path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old)
    else:
        temporary.replace(path)
    _sync_file(path.parent)


def publish_folder(temporary: Path, path: Path, entries: Mapping[str, dict[str, Any]]) -> bool:
    """As `finish_folder`, but a `path` that is there stays and the temporary folder goes.

    Returns whether it became `path`: of several processes that publish it, the first one's did.
    """
    write_json(temporary / MANIFEST, dict(sorted(entries.items())))
    try:
        # A folder takes the place of none that holds a file.
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(temporary)
        return False
    _sync_file(path.parent)
    return True


def remove_folder(path: Path) -> None:
    """Delete a folder so that a process killed meanwhile leaves nothing that looks whole."""
    if path.is_dir():
        shutil.rmtree(path.replace(path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")))


def require_folder(path: Path, remedy: str) -> None:
    """Raises NotADirectoryError with the remedy for a file, or a link to nowhere, in place of a
    folder; there need not be one yet."""
    if path.is_symlink() and not path.exists():
        raise NotADirectoryError(
            f"{path} is a link to {path.readlink()}, which is not there; {remedy}"
        )
    there = next((one for one in (path, *path.absolute().parents) if one.exists()), path)
    if there.exists() and not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, not a folder; {remedy}")


def can_write(folder: Path) -> bool:
    """Whether files may be made in a folder; one that is not there is nobody else's."""
    return not folder.is_dir() or os.access(folder, os.W_OK | os.X_OK)


def require_writable(folder: Path) -> None:
    """Raises PermissionError, with both users and the remedy, for a folder that is not ours."""
    if can_write(folder):
        return
    owner, me = (_user(number) for number in (folder.stat().st_uid, os.geteuid()))
    raise PermissionError(
        f"{folder} belongs to {owner}, and {me} may not write there; give another folder, or have "
        f"{owner} run: chmod -R a+rwX {folder}"
    )


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn a full disk into an OSError that names `path`, what is free, and the remedy."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        near = next(place for place in path.parents if place.exists())
        free = shutil.disk_usage(near).free
        why = os.strerror(number)
        raise OSError(
            number,
            f"no room to write {path} ({why}; {free / 2**20:,.0f} MiB are free on its "
            "disk); make room and run the same command again: what was written before is whole",
        ) from None


def in_threads(work: Callable[[str], Result], items: Collection[str]) -> list[Result]:
    """The results of `work`, in the order of the items; the first one's error is raised."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(THREADS, len(items))) as pool:
        return list(pool.map(work, items))


def verify(
    path: Path,
    *,
    only: Callable[[str], bool] = lambda name: True,
    share: tuple[int, int] = (0, 1),
    alone: bool = False,
) -> None:
    """Check a folder made by `new_folder` against its manifest: all its files are there, and the
    bytes of each are those that were written, hashed once and several files at a time.

    `only`: whose bytes are read. With `share` (k, n) every n-th of them from the k-th on: n
    processes check all between them. `alone`: no other file may lie there. Raises CorruptError with
    the first file that is missing, has other bytes or, alone, is not listed.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CorruptError(f"{path} has no {MANIFEST}: it was never finished")
    entries = read_json(manifest)
    if not isinstance(entries, dict) or not entries:
        raise CorruptError(f"{manifest} lists no file; delete {path} and run again")
    for name in sorted(entries):
        if not (path / name).is_file():
            raise CorruptError(f"{path / name} is missing though the manifest lists it")
    chosen = [name for name in sorted(entries) if only(name)]
    if not chosen:
        raise CorruptError(f"{manifest} does not list what is needed of {path}")

    def check(name: str) -> None:
        if _entry(path / name) != entries[name]:
            raise CorruptError(
                f"{path / name} differs from its manifest; delete {path} and run again"
            )

    first, step = share
    in_threads(check, chosen[first::step])
    if not alone:
        return
    held = {item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()}
    if foreign := sorted(held - entries.keys() - {MANIFEST}):
        raise CorruptError(f"{path} holds {foreign[0]}, which its manifest does not list")


def remove_leftovers(folder: Path, prefix: str = "") -> int:
    """Delete what writers of `prefix*` killed in the middle left in `folder`; returns how many."""
    left = [item for item in folder.glob(f".{prefix}*") if _LEFTOVER.search(item.name)]
    for item in left:
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    return len(left)


def append_line(path: Path) -> Callable[[dict[str, Any]], None]:
    """A function that adds one JSON object as a line to `path` and flushes it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def add(value: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

    return add


def _error_number(error: Exception) -> int | None:
    """The system's number of an error; libraries in Rust put it into their text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": read_sha256(path)}


def _sync_file(path: Path) -> None:
    # Or a folder, whose names are brought to the disk.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
