"""A prepared source: examples with lengths known up front, tokens and pictures by random access.

Its files are described in `docs/data.md`. A source is a list of shards, one for each unit of work
of the preparation; all its columns are memory-mapped, and nothing of it is read whole.
"""

import mmap
import sys
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import xxhash

from midstream.data.kept import Kept
from midstream.storage import read_json

Kind = Literal["text", "caption", "instruct"]
Split = Literal["train", "validation"]
FORMAT = 2
INDEX, SHARD_INDEX = "source.json", "shard.json"
# Shards and archives that stay mapped in one process; each takes a few file handles.
OPEN_SHARDS, OPEN_FILES = 64, 64


def content_hash(data: bytes) -> bytes:
    """Sixteen bytes that stand for a picture's or a text's bytes (XXH3, 128 bits)."""
    return xxhash.xxh3_128_digest(data)


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
        return self._column("offsets", None)

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

    def _column(self, name: str, dtype: np.dtype[Any] | None) -> np.ndarray:
        if dtype is None:
            # A plain view: NumPy's own class for maps makes every slice ten times slower.
            column: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            return column.view(np.ndarray)
        path, expected = self.folder / f"{name}.bin", int(self.offsets[-1])
        if path.stat().st_size != expected * dtype.itemsize:
            raise ValueError(
                f"{path} holds {path.stat().st_size:,} bytes, its index needs "
                f"{expected * dtype.itemsize:,}; prepare the data again"
            )
        if not expected:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


@dataclass(frozen=True)
class Source:
    """The examples of one split of a prepared source, numbered from 0 through its shards.

    `world` is where its pictures lie; without it, where they lay when it was prepared.
    """

    name: str
    folder: Path
    world: Path | None = None
    split: Split = "train"

    @cached_property
    def index(self) -> dict[str, Any]:
        """Counts, tokenizer, shards and rejects, as `finish_source` left them."""
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"source {self.name!r} has no {path}; prepare the data again")
        found: dict[str, Any] = read_json(path)
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {found.get('format')}, this version reads {FORMAT}; "
                "prepare the data again"
            )
        return found

    @cached_property
    def kind(self) -> Kind:
        """What its text tokens count as."""
        kind: Kind = self.index["kind"]
        return kind

    def __len__(self) -> int:
        return self._num_examples

    @cached_property
    def _num_examples(self) -> int:
        return int(self._before[-1, 0])

    @property
    def num_tokens(self) -> int:
        """Text tokens of all examples."""
        return int(self._before[-1, 1])

    @property
    def num_images(self) -> int:
        """Examples with a picture."""
        return int(self._before[-1, 2])

    @cached_property
    def _before(self) -> np.ndarray:
        # int64 [shards + 1, 3]: examples, tokens and images in the shards before each.
        counts = [
            [shard[self.split][key] for key in ("examples", "tokens", "images")]
            for shard in self.index["shards"]
        ]
        sums = np.cumsum(np.array(counts, dtype=np.int64).reshape(-1, 3), axis=0)
        return np.concatenate([np.zeros((1, 3), np.int64), sums])

    @cached_property
    def _shards(self) -> "Kept[int, Shard]":
        names = [shard["name"] for shard in self.index["shards"]]
        return Kept(lambda n: Shard(self.folder / "shards" / names[n]), OPEN_SHARDS)

    @cached_property
    def _files(self) -> "Kept[str, Archive]":
        return Kept(Archive, OPEN_FILES)

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps are opened anew in a worker process; pickled, they would be copied whole.
        own = ("name", "folder", "world", "split")
        return {name: self.__dict__[name] for name in own}

    def _first(self, shard: int) -> int:
        # Where this split's examples start: training first, then validation.
        index = self.index["shards"][shard]
        return 0 if self.split == "train" else int(index["train"]["examples"])

    @cached_property
    def _starts(self) -> list[tuple[int, int]]:
        # By shard: the number of its first example, and what to add for its place in the shard.
        first = self._before[:-1, 0].tolist()
        return [(start, self._first(number) - start) for number, start in enumerate(first)]

    def locate(self, example: int) -> tuple[Shard, int]:
        """The shard that holds an example, and its number there."""
        if not 0 <= example < self._num_examples:
            raise IndexError(f"source {self.name!r} holds {len(self):,} examples, not {example:,}")
        number = bisect_right(self._starts, (example, sys.maxsize)) - 1
        return self._shards[number], example + self._starts[number][1]

    def before(self, examples: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: text tokens and pictures in the examples before each (0 to len)."""
        examples = np.asarray(examples, dtype=np.int64)
        numbers = np.searchsorted(self._before[:-1, 0], examples, side="right") - 1
        found = np.zeros((len(examples), 2), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            mine, first = numbers == number, self._first(number)
            shard, base = self._shards[number], self._before[number]
            local = examples[mine] - base[0] + first
            found[mine, 0] = base[1] + shard.offsets[local] - shard.offsets[first]
            if shard.num_images is not None:
                found[mine, 1] = base[2] + shard.num_images[local] - shard.num_images[first]
        return found

    def sizes(self, low: int, high: int) -> np.ndarray:
        """int64 [high - low, 2]: text tokens and pictures (0 or 1) of consecutive examples."""
        return np.diff(self.before(np.arange(low, high + 1)), axis=0)

    def input_ids(self, example: int, low: int = 0, high: int | None = None) -> np.ndarray:
        """The example's text tokens `low` to `high`."""
        shard, local = self.locate(example)
        return shard.tokens[_within(shard, local, low, high)]

    def supervised(self, example: int, low: int = 0, high: int | None = None) -> np.ndarray | None:
        """Which of these tokens are targets (uint8), or None where all are."""
        shard, local = self.locate(example)
        column = shard.supervised
        return None if column is None else column[_within(shard, local, low, high)]

    def has_image(self, example: int) -> bool:
        """Whether the example shows a picture."""
        shard, local = self.locate(example)
        return shard.images is not None and int(shard.images[local, 0]) >= 0

    def image_hashes(self, low: int, high: int) -> np.ndarray:
        """uint8 [pictures, 16]: `content_hash` of the pictures of consecutive examples."""
        found = [np.zeros((0, 16), np.uint8)]
        while low < high:
            number = int(np.searchsorted(self._before[:, 0], low, side="right")) - 1
            end = min(high, int(self._before[number + 1, 0]))
            shard, first = self._shards[number], self._first(number)
            local = slice(*(x - int(self._before[number, 0]) + first for x in (low, end)))
            if shard.images is not None:
                found.append(np.asarray(shard.hashes[local])[shard.images[local, 0] >= 0])
            low = end
        return np.concatenate(found)

    def hash_of(self, example: int) -> bytes:
        """`content_hash` of the example's picture, of its text where there is none."""
        shard, local = self.locate(example)
        return bytes(shard.hashes[local])

    def image_bytes(self, example: int) -> bytes:
        """The encoded picture of an example.

        Raises ValueError that names the record if its bytes are others than when it was prepared.
        """
        shard, local = self.locate(example)
        assert shard.images is not None
        number, offset, size = (int(value) for value in shard.images[local])
        file = shard.index["files"][number]
        data = self._files[self._path(file)].read(offset, size)
        if content_hash(data) != bytes(shard.hashes[local]):
            raise ValueError(
                f"{self.describe(example)}: the picture in {file} changed since it was prepared "
                "(its bytes have another hash); restore the file or prepare the data again"
            )
        return data

    def _path(self, file: str) -> str:
        root = str(self.world) if self.world is not None else self.index["root"]
        return file if "://" in file or file.startswith("/") else f"{root}/{file}"

    def describe(self, example: int) -> str:
        """Where an example comes from, for messages."""
        shard, local = self.locate(example)
        return f"source {self.name!r}, {shard.name_of(local)}"


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


def _within(shard: Shard, local: int, low: int, high: int | None) -> slice:
    start, end = int(shard.offsets[local]), int(shard.offsets[local + 1])
    return slice(min(start + low, end), end if high is None else min(start + high, end))
