"""Parts of files at addresses that were read before, kept on a local disk.

Of each file there are its blocks, in a file with holes, and what each block's bytes hash to: a
block that is not there, or was written in part, is none. So processes share a folder without locks,
and whatever ends one of them leaves nothing that would be taken for data.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from midstream.data.remote import Stamp

# The folder that blocks are kept in; without it, none are.
FOLDER = "MIDSTREAM_BLOCK_CACHE"
# Most pictures of a tar lie in one or two: what is read beside them is little.
BLOCK_BYTES = 2**16
# What is left of the disk for others; below it nothing is added.
_FREE_FRACTION = 0.1
_HASH_BYTES = 8


@dataclass(frozen=True)
class BlockCache:
    """The blocks of one version of a file of `size` bytes in `folder`, fetched with `fetch`."""

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


def cache_folder() -> Path | None:
    """The folder that blocks are kept in, if any."""
    named = os.environ.get(FOLDER, "")
    return Path(named) if named else None


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
