"""What a prepared source lies in: the columns of a shard, and the files of its pictures."""

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from midstream.storage import read_json

SHARD_INDEX = "shard.json"


@dataclass(frozen=True)
class Shard:
    """The columns of one shard, mapped when first used; numbers are local to the shard."""

    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """Counts, input and picture files, as `ShardWriter` left them."""
        found: dict[str, Any] = read_json(self.folder / SHARD_INDEX)
        return found

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64, one more than examples: where each starts in the tokens."""
        return self.offsets_of(0)

    def offsets_of(self, caption: int) -> np.ndarray:
        """The same for the examples' `caption`-th synthetic caption (0: `offsets`)."""
        row: np.ndarray = self._offsets[caption]
        return row

    @property
    def num_synthetic(self) -> int:
        """Synthetic captions of the example that has the most."""
        return len(self._offsets) - 1

    @cached_property
    def _offsets(self) -> np.ndarray:
        found = self._column("offsets", None)
        return found if found.ndim == 2 else found[None]

    @cached_property
    def num_images(self) -> np.ndarray | None:
        """int64, one more than examples: pictures before each; None for text."""
        return None if self.index["kind"] == "text" else self._column("num_images", None)

    @cached_property
    def images(self) -> np.ndarray | None:
        """int64 [examples, 3]: file, offset, bytes of each picture; file -1 without one."""
        return None if self.index["kind"] == "text" else self._column("images", None)

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint8 [examples, 16]: `content_hash` of the picture, of the text where there is none."""
        return self._column("hashes", None)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All examples' text tokens."""
        return self._column("tokens", np.dtype(self.index["dtype"]))

    @cached_property
    def supervised(self) -> np.ndarray | None:
        """One byte a token, or None where all tokens are targets."""
        # By kind, not by what lies there: a lost file must not turn every token into a target.
        if self.index["kind"] == "text":
            return None
        return self._column("supervised", np.dtype(np.uint8))

    def name_of(self, example: int) -> str:
        """Where an example comes from."""
        names = self.folder / "names.txt"
        if not names.exists():
            return f"{self.index['input']}, document {example}"
        with names.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number == example:
                    return line.rstrip("\n")
        raise IndexError(example)

    def within(self, example: int, low: int, high: int | None, caption: int) -> slice:
        """Where the tokens `low` to `high` of an example, or of a caption of it, lie."""
        start, end = (int(offset) for offset in self.offsets_of(caption)[example : example + 2])
        return slice(min(start + low, end), end if high is None else min(start + high, end))

    def _column(self, name: str, dtype: np.dtype[Any] | None) -> np.ndarray:
        if dtype is None:
            # A plain view: NumPy's own class for maps makes every slice ten times slower.
            column: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            return column.view(np.ndarray)
        path, expected = self.folder / f"{name}.bin", int(self._offsets[-1, -1])
        if path.stat().st_size != expected * dtype.itemsize:
            raise ValueError(
                f"{path} holds {path.stat().st_size:,} bytes, its index needs "
                f"{expected * dtype.itemsize:,}; prepare the data again"
            )
        if not expected:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


class Archive:
    """A picture file or an archive of many, read at byte ranges; local paths and `fsspec` URLs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._mapped: mmap.mmap | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer where the file ends."""
        if "://" in self.path:
            system, path = fsspec.core.url_to_fs(self.path)
            data: bytes = system.cat_file(path, start=offset, end=offset + size)
            return data
        if self._mapped is None:
            with open(self.path, "rb") as stream:
                if not offset:
                    # A picture of its own, most likely: mapping it would not pay.
                    return stream.read(size)
                self._mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped[offset : offset + size]
