"""Picture files and archives that are read in ranges: how many are open, and what is kept of those
at addresses.

Nothing that is open has a place of its own in a file, so that processes that are forked from one
another read side by side.
"""

import errno
import hashlib
import os
import resource
import shutil
import weakref
from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from midstream.data.remote import Stamp, fetch_whole, refuse_changed

# The folder that blocks are kept in; without it, none are.
FOLDER = "MIDSTREAM_BLOCK_CACHE"
# Most pictures of a tar lie in one or two: what is read beside them is little.
BLOCK_BYTES = 2**16
# What is left of the disk for others; below it nothing is added.
_FREE_FRACTION = 0.1
_HASH_BYTES = 8
_MOST_FILES = 2**16
_FILE = 2**32 - 1
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class BlockCache:
    """The blocks of one version of a file of `size` bytes in `folder`, fetched with `fetch`.

    They lie in a file with holes, beside what each block's bytes hash to: a block that is not
    there, or was written in part, is none. So processes share a folder without locks, and whatever
    ends one of them leaves nothing that would be taken for data.
    """

    folder: Path
    url: str
    stamp: Stamp
    size: int
    fetch: Callable[[str, int, int], bytes]

    @property
    def blocks(self) -> Path:
        """The file with holes."""
        name = hashlib.sha256(repr([self.url, self.stamp]).encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.blocks"

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; those that lack are fetched in one go, and kept."""
        first, last = start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        held = self._held(first, last)
        lacking = [number for number, block in enumerate(held) if block is None]
        if lacking:
            low, high = lacking[0], lacking[-1] + 1
            at = (first + low) * BLOCK_BYTES
            data = self.fetch(self.url, at, min((first + high) * BLOCK_BYTES, self.size))
            held[low:high] = [data[x : x + BLOCK_BYTES] for x in range(0, len(data), BLOCK_BYTES)]
            self._keep(first + low, data)
        whole = b"".join(block or b"" for block in held)
        return whole[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _held(self, first: int, last: int) -> list[bytes | None]:
        """The blocks from `first` to before `last`, None for those that are not there whole."""
        found: list[bytes | None] = [None] * (last - first)
        try:
            data = _read(self.blocks, first * BLOCK_BYTES, (last - first) * BLOCK_BYTES)
            hashes = _read(self._hashes, first * _HASH_BYTES, (last - first) * _HASH_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return found
        told = np.frombuffer(hashes[: len(hashes) // _HASH_BYTES * _HASH_BYTES], np.uint64)
        for number, value in enumerate(told.tolist()):
            block = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            if value and value == _hash(block):
                found[number] = block
        return found

    def _keep(self, first: int, data: bytes) -> None:
        hashes = [_hash(data[x : x + BLOCK_BYTES]) for x in range(0, len(data), BLOCK_BYTES)]
        try:
            self.blocks.parent.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self.folder)
            if disk.free < _FREE_FRACTION * disk.total + len(data):
                return
            _write(self.blocks, first * BLOCK_BYTES, data)
            _write(self._hashes, first * _HASH_BYTES, np.array(hashes, np.uint64).tobytes())
        except OSError as error:
            # Somebody removed the folder, or took the rest of the disk: the bytes are at hand.
            if error.errno in (errno.ENOENT, errno.ENOSPC, errno.EDQUOT):
                return
            raise OSError(
                error.errno,
                f"{self.folder} keeps no blocks ({error.strerror}); set {FOLDER} to a folder that "
                "can be written, or to none",
            ) from error

    @property
    def _hashes(self) -> Path:
        return self.blocks.with_suffix(".hashes")


def _hash(block: bytes) -> int:
    # 0 stands for a block that was never written.
    return xxhash.xxh3_64_intdigest(block) or 1


def _read(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _write(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


class Opened(dict[Key, Value]):
    """What one source has open."""


class Kept(Generic[Key, Value]):
    """Bounds what all sources of this process have open together.

    Where it becomes too much, something gives way by chance: whatever is read in the same order
    again and again would never find the oldest. And it does so for one newcomer of several alone:
    what is read once an epoch, each in its turn, would else push out what is still to come.
    """

    def __init__(self, most: int) -> None:
        self._most, self._cost, self._random = most, 0, Random(0)
        # A source that is gone leaves its entries behind, and no file.
        self._entries: list[tuple[weakref.ref[Opened[Key, Value]], Key, int]] = []

    def add(self, opened: Opened[Key, Value], key: Key, cost: int, value: Value) -> Value:
        """Keep a value, most likely, which counts `cost` towards the most, and return it."""
        if self._entries and self._cost + cost > self._most and self._random.randrange(8):
            return value
        while self._entries and self._cost + cost > self._most:
            chosen = self._random.randrange(len(self._entries))
            held, old, freed = self._entries[chosen]
            self._entries[chosen] = self._entries[-1]
            self._entries.pop()
            self._cost -= freed
            if (source := held()) is not None:
                source.pop(old, None)
        self._entries.append((weakref.ref(opened), key, cost))
        self._cost += cost
        opened[key] = value
        return value


class Archive:
    """A picture file or an archive of many, read at byte ranges; local paths and `fsspec` URLs.

    Of a URL the `stamp` says what it was when it was indexed. Raises ChangedError if it is another.
    """

    def __init__(self, path: str, stamp: Stamp | None = None) -> None:
        self.path = path
        self._blocks: BlockCache | None = None
        # -1 for a URL.
        self.descriptor = -1 if "://" in path else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if self.descriptor < 0 and stamp is not None:
            remedy = "put back what was there, or prepare the source again (`midstream prepare`)"
            refuse_changed(path, stamp, "the source was prepared", remedy)
            if folder := os.environ.get(FOLDER):
                size = int(stamp[0] or 0)
                self._blocks = BlockCache(Path(folder), path, stamp, size, fetch_whole)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; of a local file fewer where it ends."""
        if self.descriptor >= 0:
            return os.pread(self.descriptor, size, offset)
        if self._blocks is not None:
            return self._blocks.read(offset, offset + size)
        return fetch_whole(self.path, offset, offset + size)

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)


def _most_files() -> int:
    # As many as this process may be given; what is left is for whatever else it opens.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most // 2, most - 1024)


class Archives(Opened[int, Archive]):
    """What a source of `num_shards` shards has open, by `shard << 32 | file`.

    `first` has the descriptor of each shard's first file, -1 where it is not open: objects of
    thousands of archives lie all over memory, and reading from many would cost twice the read.
    """

    def __init__(self, num_shards: int) -> None:
        super().__init__()
        self.first = array("i", [-1]) * num_shards

    def __setitem__(self, key: int, archive: Archive) -> None:
        super().__setitem__(key, archive)
        if not key & _FILE:
            self.first[key >> 32] = archive.descriptor

    def pop(self, key: int, default: Any = None) -> Any:
        """As a dict's."""
        if not key & _FILE:
            self.first[key >> 32] = -1
        return super().pop(key, default)


@cache
def open_archives() -> Kept[int, Archive]:
    """The archives that are open; this process may open more files from the first call on."""
    return Kept(_most_files())
