"""A prepared source: examples with lengths known up front, tokens and pictures by random access.

`docs/data.md` describes its files; all columns are memory-mapped, and nothing is read whole.
"""

import mmap
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import xxhash

from midstream.config import Caption, check_caption
from midstream.core.storage import read_json

SHARD_INDEX = "shard.json"
# The pictures that a shard keeps itself, since no file holds their bytes as they are. No name of a
# file begins with a dot and a slash.
OWN_PICTURES = "./pictures.bin"


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


Kind = Literal["text", "caption", "instruct"]
Split = Literal["train", "validation"]
FORMAT = 3
# The format before kept one caption a picture; its other kinds are as they are now.
OLDER, OLDER_KINDS = 2, ("text", "instruct")
INDEX = "source.json"
# Shards and archives that stay mapped in one process; each takes a few file handles.
OPEN_SHARDS, OPEN_FILES = 64, 64


def content_hash(data: bytes) -> bytes:
    """Sixteen bytes that stand for a picture's or a text's bytes (XXH3, 128 bits)."""
    return xxhash.xxh3_128_digest(data)


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
        if found.get("format") == OLDER and found.get("kind") in OLDER_KINDS:
            return found
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

    @property
    def begin_of_text(self) -> int | None:
        """The token that begins each example, before its picture; None where none does."""
        begin: int | None = self.index.get("begin_of_text")
        return begin

    def __len__(self) -> int:
        return self._num_examples

    @cached_property
    def _num_examples(self) -> int:
        return int(self._before[-1, 0])

    @property
    def num_tokens(self) -> int:
        """Text tokens of all examples, of a picture those of its own caption."""
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
    def num_with(self) -> dict[str, int]:
        """Examples that have an "original" and a "synthetic" caption; a text is an original."""
        made = [shard["synthetic"][self.split] for shard in self._synthetic_shards]
        lack = sum(part["examples"] - part["originals"] for part in made)
        return {
            "original": len(self) - lack,
            "synthetic": sum(part["pictures"] for part in made),
        }

    def check_caption(self, caption: Caption) -> None:
        """Raises ValueError with both numbers if an example lacks this caption."""
        check_caption(self.name, self.kind, caption, self.num_with, len(self))

    @property
    def _synthetic_shards(self) -> list[dict[str, Any]]:
        return [shard for shard in self.index["shards"] if "synthetic" in shard]

    @cached_property
    def even_synthetic(self) -> int:
        """How many synthetic captions every picture has; 0 where they are not equally many."""
        held = [shard for shard in self.index["shards"] if shard[self.split]["examples"]]
        numbers = {shard.get("synthetic", {}).get("each", 0) for shard in held}
        return int(numbers.pop()) if len(numbers) == 1 else 0

    @cached_property
    def most_synthetic(self) -> int:
        """Synthetic captions of the picture that has the most."""
        parts = [shard["synthetic"][self.split] for shard in self._synthetic_shards]
        return max((len(part["tokens"]) for part in parts), default=0)

    def longest(self, caption: Caption) -> dict[str, int]:
        """Text tokens of the longest example without ("plain") and with a picture ("image"), in
        either split, as it is seen with this caption."""
        seen = self.index if caption == "original" else self.index["seen"][caption]
        return {shown: int(found["tokens"]) for shown, found in seen["longest"].items()}

    @property
    def mean_tokens(self) -> int:
        """Text tokens of all examples, of each the mean of its synthetic captions; rounded."""
        return sum(
            int(shard["synthetic"][self.split]["mean_tokens"]) for shard in self._synthetic_shards
        )

    @cached_property
    def _shards(self) -> "Callable[[int], Shard]":
        names = [shard["name"] for shard in self.index["shards"]]
        return lru_cache(OPEN_SHARDS)(lambda n: Shard(self.folder / "shards" / names[n]))

    @cached_property
    def _files(self) -> "Callable[[str], Archive]":
        return lru_cache(OPEN_FILES)(Archive)

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
        return self._shards(number), example + self._starts[number][1]

    def before(self, examples: np.ndarray, caption: int = 0) -> np.ndarray:
        """int64 [n, 2]: text tokens and pictures in the examples before each (0 to len).

        Above 0, `caption` counts the tokens of the `caption`-th synthetic caption of each.
        """
        examples = np.asarray(examples, dtype=np.int64)
        tokens = self._tokens_before(caption)
        found = np.zeros((len(examples), 2), dtype=np.int64)
        for number, mine, local in self._by_shard(examples):
            first, shard = self._first(number), self._shards(number)
            found[mine, 0] = tokens[number]
            if caption <= shard.num_synthetic:
                offsets = shard.offsets_of(caption)
                found[mine, 0] += offsets[local] - offsets[first]
            if shard.num_images is not None:
                images = int(self._before[number, 2]) - shard.num_images[first]
                found[mine, 1] = images + shard.num_images[local]
        return found

    def _by_shard(self, examples: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Shards, which of the examples (0 to len) are theirs, and where those lie in them."""
        numbers = np.searchsorted(self._before[:-1, 0], examples, side="right") - 1
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            yield number, mine, examples[mine] + self._starts[number][1]

    def _tokens_before(self, caption: int) -> np.ndarray:
        # int64 [shards + 1]: tokens of one caption of each example in the shards before each.
        if not caption:
            return self._before[:, 1]
        if caption not in self._caption_sums:
            held = [
                shard.get("synthetic", {}).get(self.split, {}).get("tokens", [])
                for shard in self.index["shards"]
            ]
            counts = [part[caption - 1] if caption <= len(part) else 0 for part in held]
            self._caption_sums[caption] = np.cumsum([0, *counts], dtype=np.int64)
        return self._caption_sums[caption]

    @cached_property
    def _caption_sums(self) -> dict[int, np.ndarray]:
        return {}

    def num_synthetic(self, examples: np.ndarray) -> np.ndarray:
        """int64: how many synthetic captions each of these examples has."""
        if self.even_synthetic:
            return np.full(len(examples), self.even_synthetic)
        found = np.zeros(len(examples), dtype=np.int64)
        for number, mine, local in self._by_shard(examples):
            shard = self._shards(number)
            for caption in range(1, shard.num_synthetic + 1):
                offsets = shard.offsets_of(caption)
                found[mine] += offsets[local + 1] > offsets[local]
        return found

    def sizes_of(self, examples: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: text tokens of one caption of each example, and pictures (0 or 1)."""
        found = np.zeros((len(examples), 2), dtype=np.int64)
        for number, mine, local in self._by_shard(examples):
            shard = self._shards(number)
            for caption in np.unique(captions[mine]).tolist():
                chosen = np.flatnonzero(mine)[captions[mine] == caption]
                at, offsets = local[captions[mine] == caption], shard.offsets_of(caption)
                found[chosen, 0] = offsets[at + 1] - offsets[at]
            if shard.num_images is not None:
                found[mine, 1] = shard.num_images[local + 1] - shard.num_images[local]
        return found

    def longer_shards(self, longer_than: int, caption: int) -> Iterator[tuple[int, Shard, slice]]:
        """Shards that may hold such a caption of more text tokens: the number of their first
        example, and which of their examples are this split's."""
        for number, about in enumerate(self.index["shards"]):
            # Older sources do not say it by shard; not every shard has as many captions.
            longest = about.get("longest", sys.maxsize)
            if caption:
                made = about.get("synthetic", {self.split: {"tokens": ()}, "longest": 0})
                longest = made["longest"] if caption <= len(made[self.split]["tokens"]) else 0
            if longest > longer_than and about[self.split]["examples"]:
                first = self._first(number)
                mine = slice(first, first + int(about[self.split]["examples"]))
                yield int(self._before[number, 0]), self._shards(number), mine

    def input_ids(
        self, example: int, low: int = 0, high: int | None = None, caption: int = 0
    ) -> np.ndarray:
        """The text tokens `low` to `high` of the example, or of its `caption`-th synthetic one."""
        shard, local = self.locate(example)
        start, end = shard.offsets_of(caption)[local : local + 2].tolist()
        return shard.tokens[start:end][low:high]

    def has_image(self, example: int) -> bool:
        """Whether the example shows a picture."""
        shard, local = self.locate(example)
        return shard.images is not None and int(shard.images[local, 0]) >= 0

    def hashes_of(self, examples: np.ndarray) -> np.ndarray:
        """uint8 [n, 16]: `content_hash` of each one's picture, of its text where there is none."""
        found = np.zeros((len(examples), 16), dtype=np.uint8)
        for number, mine, local in self._by_shard(examples):
            found[mine] = self._shards(number).hashes[local]
        return found

    def image_bytes(self, example: int) -> bytes:
        """The encoded picture of an example.

        Raises ValueError that names the record if its bytes are others than when it was prepared.
        """
        shard, local = self.locate(example)
        assert shard.images is not None
        number, offset, size = (int(value) for value in shard.images[local])
        file = shard.index["files"][number]
        path = str(shard.folder / file) if file == OWN_PICTURES else self._path(file)
        try:
            data = self._files(path).read(offset, size)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.describe(example)}: its picture {path} is gone; put it back, or prepare "
                "the source again from where its pictures are now (`midstream prepare`; "
                "`midstream run` for a source of a study's world)"
            ) from None
        if content_hash(data) != bytes(shard.hashes[local]):
            raise ValueError(
                f"{self.describe(example)}: the picture in {file} changed since it was prepared "
                "(its bytes have another hash); restore the file or prepare the data again"
            )
        return data

    def _path(self, file: str) -> str:
        root = str(self.world) if self.world is not None else self.index["root"]
        return file if "://" in file or file.startswith("/") else f"{root}/{file}"

    def describe(self, example: int, caption: int = 0) -> str:
        """Where an example comes from, and which synthetic caption of it is meant, for messages."""
        shard, local = self.locate(example)
        which = f", synthetic caption {caption}" if caption else ""
        return f"source {self.name!r}, {shard.name_of(local)}{which}"
