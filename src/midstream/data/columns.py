"""The columns of a prepared source's shards, mapped into memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from midstream.core.storage import new_folder, read_json
from midstream.data.archives import Kept
from midstream.data.remote import Stamp

SHARD_INDEX = "shard.json"
# Beside a shard's index: what it was made from, and the other files of its pictures then.
MADE_FROM, PICTURES = "made_from.json", "pictures"
# The pictures that a shard keeps itself, since no file holds their bytes as they are. No name of a
# file begins with a dot and a slash.
OWN_PICTURES = "./pictures.bin"
# The folder of a source's joined columns.
COLUMNS = "columns"
# A source of more shards has joined columns.
MOST_SEPARATE = 256
# Linux maps 65,530 files into one process, unless it was told otherwise.
MOST_MAPS = 45_000
# So many names of picture files are some hundred megabytes.
MOST_NAMES = 2_000_000


class StoredPicture(NamedTuple):
    """Where a picture's bytes lie, by the number of its file, and their `content_hash`."""

    file: int
    offset: int
    size: int
    hash: bytes


# Columns of `Shard.pictures`.
PLACE, HASH = 3, slice(4, 6)


def map_file(path: Path) -> np.ndarray:
    """uint8: the bytes of a file, mapped; an empty file too.

    Unlike NumPy's and Python's own maps it keeps no file open.
    """
    if not path.stat().st_size:
        return np.zeros(0, np.uint8)
    with pyarrow.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), np.uint8)


def map_array(path: Path) -> np.ndarray:
    """The array of a `.npy` file, mapped as `map_file` does.

    Raises ValueError that names the file if it is cut short.
    """
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
    data, size = map_file(path), dtype.itemsize * int(np.prod(shape))
    if len(data) != start + size:
        raise ValueError(
            f"{path} holds {len(data):,} bytes, its header needs {start + size:,}; prepare the "
            "data again"
        )
    return data[start:].view(dtype).reshape(shape, order="F" if by_columns else "C")


@dataclass(frozen=True)
class Part:
    """Which examples of a source's joined columns a shard has, and how many shards and pictures are
    before it.

    `columns` are those of all shards, each in one file in the order of the shards, as of one shard
    with an offset and a number of pictures more for each; its `caption_offsets` are transposed. A
    source of many shards has them beside its shards', since each mapped file counts.
    """

    columns: "Shard"
    shards_before: int
    examples: slice
    pictures_before: int

    @property
    def ends(self) -> slice:
        """The same in columns with one entry more than examples."""
        first, last = self.examples.start, self.examples.stop
        return slice(first + self.shards_before, last + self.shards_before + 1)


@dataclass(frozen=True)
class Shard:
    """The columns of one shard, mapped when first used; numbers are local to the shard.

    `about` has its "kind" and "dtype" where its source knows them, and what begins its examples;
    else its own index is read.
    """

    folder: Path
    about: Mapping[str, Any] | None = field(default=None, compare=False)
    part: Part | None = field(default=None, compare=False)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Counts, input and picture files, as `ShardWriter` left them."""
        found: dict[str, Any] = read_json(self.folder / SHARD_INDEX)
        return found

    @cached_property
    def kind(self) -> str:
        """What its text tokens count as."""
        kind: str = (self.about or self.index)["kind"]
        return kind

    def read_files(self) -> tuple[str, ...]:
        """The picture files that rows of `images` name by number."""
        return tuple(read_json(self.folder / SHARD_INDEX)["files"])

    def stamp_of(self, file: str) -> Stamp | None:
        """What a picture file was when the shard was made; None where that is not known."""
        made_from = self.folder / MADE_FROM
        if not made_from.exists():
            return None
        told = read_json(made_from)
        stamps: dict[str, Stamp] = dict(zip(told["unit"]["files"], told["stamps"], strict=True))
        stamps |= told[PICTURES]
        return stamps.get(file)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64, one more than examples: where each starts in the tokens."""
        return self.offsets_of(0)

    def offsets_of(self, caption: int) -> np.ndarray:
        """The same for the examples' `caption`-th synthetic caption (0: `offsets`)."""
        row: np.ndarray = self.caption_offsets[caption]
        return row

    @property
    def num_synthetic(self) -> int:
        """Synthetic captions of the example that has the most; with joined columns, of the source's
        one that does."""
        return len(self.caption_offsets) - 1

    @cached_property
    def caption_offsets(self) -> np.ndarray:
        """int64 [1 + captions, examples + 1]: `offsets_of` of all captions."""
        if self.part:
            return self.part.columns.caption_offsets[self.part.ends].T
        found = map_array(self.folder / "offsets.npy")
        return found if found.ndim == 2 else found[None]

    def _column(self, name: str, *, ends: bool = False) -> np.ndarray:
        if self.part is None:
            return map_array(self.folder / f"{name}.npy")
        whole: np.ndarray = getattr(self.part.columns, name)
        return whole[self.part.ends if ends else self.part.examples]

    @cached_property
    def num_images(self) -> np.ndarray | None:
        """int64, one more than examples: pictures before each; None for text."""
        return None if self.kind == "text" else self._column("num_images", ends=True)

    @cached_property
    def images(self) -> np.ndarray | None:
        """int64 [examples, 3]: file, offset, bytes of each picture; file -1 without one. None for
        text, and where `pictures` has them."""
        lacks = self.kind == "text" or self.pictures is not None
        return None if lacks else self._column("images")

    @cached_property
    def pictures(self) -> np.ndarray | None:
        """int64 [pictures, 6], of shards whose examples show other than one picture at most, behind
        what begins them: file, offset, bytes, the token it stands before, and the hash in two
        numbers. None for text, and where `images` has them, one row an example."""
        if self.kind == "text":
            return None
        if self.part is None:
            path = self.folder / "pictures.npy"
            return map_array(path) if path.exists() else None
        assert self.num_images is not None
        low, number = self.part.pictures_before, int(self.num_images[-1])
        joined = self.part.columns.pictures
        return None if joined is None else joined[low : low + number]

    def places_of(self, example: int) -> list[int]:
        """Before which of its tokens each picture of an example stands."""
        if self.num_images is None:
            return []
        low, high = self.num_images[example : example + 2].tolist()
        if self.pictures is None:
            # It stands behind what begins the example.
            assert self.about is not None
            return [int(self.about.get("begin_of_text") is not None)] * (high - low)
        places: list[int] = self.pictures[low:high, PLACE].tolist()
        return places

    def picture(self, example: int, number: int) -> StoredPicture:
        """Where the bytes of an example's picture lie, and their hash."""
        if self.images is not None:
            file, offset, size = self.images[example].tolist()
            return StoredPicture(file, offset, size, self.hashes[example].tobytes())
        assert self.pictures is not None, "texts show no picture"
        assert self.num_images is not None
        row = self.pictures[int(self.num_images[example]) + number]
        file, offset, size = row[:PLACE].tolist()
        return StoredPicture(file, offset, size, row[HASH].tobytes())

    def picture_rows(self, head: int) -> np.ndarray:
        """`pictures`, also where `images` has them: each behind the `head` of its example."""
        if self.images is None:
            assert self.pictures is not None
            return self.pictures
        shown = np.flatnonzero(self.images[:, 0] >= 0)
        places = np.full((len(shown), 1), head)
        hashes = np.ascontiguousarray(self.hashes[shown]).view(np.int64)
        return np.concatenate([self.images[shown], places, hashes], axis=1)

    def hashes_of(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many pictures each of these examples shows, and the hashes of all, uint8 [n, 16]."""
        if self.num_images is None:
            return np.zeros(len(examples), np.int64), np.zeros((0, 16), np.uint8)
        first = np.asarray(self.num_images[examples])
        numbers = self.num_images[examples + 1] - first
        if self.pictures is None:
            return numbers, self.hashes[examples[numbers > 0]]
        rows = np.repeat(first - (np.cumsum(numbers) - numbers), numbers) + np.arange(numbers.sum())
        return numbers, np.ascontiguousarray(self.pictures[rows, HASH]).view(np.uint8)

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint8 [examples, 16]: `content_hash` of the picture, of the text where there is none."""
        return self._column("hashes")

    @cached_property
    def tokens(self) -> np.ndarray:
        """All examples' text tokens."""
        return self._by_token("tokens", np.dtype((self.about or self.index)["dtype"]))

    @cached_property
    def supervised(self) -> np.ndarray | None:
        """One byte a token, or None where all tokens are targets."""
        # By kind, not by what lies there: a lost file must not turn every token into a target.
        if self.kind == "text":
            return None
        return self._by_token("supervised", np.dtype(np.uint8))

    def _by_token(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        data, expected = map_file(path), int(self.caption_offsets[-1, -1]) * dtype.itemsize
        if len(data) != expected:
            raise ValueError(
                f"{path} holds {len(data):,} bytes, its index needs {expected:,}; prepare the data "
                "again"
            )
        return data.view(dtype)

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


def join_columns(folder: Path, shards: Sequence[Mapping[str, Any]], head: int) -> None:
    """Write the joined columns of a source's shards, given as `source.json` lists them; `head`
    tokens begin each example."""
    examples = [shard["train"]["examples"] + shard["validation"]["examples"] for shard in shards]
    made = [shard["synthetic"]["train"]["tokens"] for shard in shards if "synthetic" in shard]
    num, width = sum(examples), 1 + max(map(len, made), default=0)
    first_shard = Shard(folder / "shards" / shards[0]["name"])
    kind, several = first_shard.kind, any("most_images" in shard for shard in shards)
    shown = [shard["train"]["images"] + shard["validation"]["images"] for shard in shards]
    pictures_before = [0, *accumulate(shown)]
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "offsets": ((num + len(shards), width), np.int64),
        "hashes": ((num, 16), np.uint8),
    }
    if kind != "text":
        shapes["num_images"] = ((num + len(shards),), np.int64)
        found = {"pictures": ((sum(shown), 6), np.int64)}
        shapes |= found if several else {"images": ((num, 3), np.int64)}
    with new_folder(folder / COLUMNS) as temporary:
        columns = {
            name: np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", dtype, shape)
            for name, (shape, dtype) in shapes.items()
        }
        first = 0
        for number, (about, mine) in enumerate(zip(shards, examples, strict=True)):
            shard = Shard(folder / "shards" / about["name"])
            examples_here = slice(first, first + mine)
            part = Part(Shard(temporary), number, examples_here, pictures_before[number])
            first += mine
            offsets = shard.caption_offsets.T
            columns["offsets"][part.ends] = offsets[-1, -1]  # of no length, where it has none
            columns["offsets"][part.ends, : offsets.shape[1]] = offsets
            columns["hashes"][part.examples] = shard.hashes
            if kind != "text":
                columns["num_images"][part.ends] = shard.num_images
                if not several:
                    columns["images"][part.examples] = shard.images
                    continue
                low, high = pictures_before[number : number + 2]
                columns["pictures"][low:high] = shard.picture_rows(head)
        for column in columns.values():
            column.flush()


SHARDS = Kept[int, Shard](MOST_MAPS)
FILES = Kept[int, tuple[str, ...]](MOST_NAMES)
