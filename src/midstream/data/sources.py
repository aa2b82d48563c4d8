"""A prepared source: examples with lengths known up front, tokens and pictures by random access.

`docs/data.md` describes its files; all columns are memory-mapped, and nothing is read whole.
"""

import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from midstream.config import Caption, check_caption
from midstream.core.identity import Kind
from midstream.core.storage import read_json
from midstream.data.archives import Archive, Archives, Opened, open_archives
from midstream.data.columns import (
    COLUMNS,
    FILES,
    OWN_PICTURES,
    SHARDS,
    Part,
    Shard,
    StoredPicture,
)

Split = Literal["train", "validation"]
FORMAT = 3
# The format before kept one caption a picture; its other kinds are as they are now.
OLDER, OLDER_KINDS = 2, ("text", "instruct")
INDEX = "source.json"
# Files that a shard maps: all six of its columns, or its tokens and what of them are targets.
_OWN_MAPS, _JOINED_MAPS = 6, 2


# An example, and which of its pictures.
Which = tuple[int, int]


class Pictures(NamedTuple):
    """Pictures of examples: `which`, int64 [n, 2], are (example, number among its pictures), and
    `hashes`, uint8 [n, 16], their `content_hash`."""

    which: np.ndarray
    hashes: np.ndarray


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
        """Pictures of all examples, each as often as it is shown."""
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
        return {"original": len(self) - lack, "synthetic": sum(part["pictures"] for part in made)}

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
        """Text tokens of the longest example without ("plain"), with a picture ("image"), and with
        each higher number of them (`shown_name`), in either split, as seen with this caption."""
        seen = self.index if caption == "original" else self.index["seen"][caption]
        return {shown: int(found["tokens"]) for shown, found in seen["longest"].items()}

    @property
    def mean_tokens(self) -> int:
        """Text tokens of all examples, of each the mean of its synthetic captions; rounded."""
        return sum(
            int(shard["synthetic"][self.split]["mean_tokens"]) for shard in self._synthetic_shards
        )

    @cached_property
    def _shards(self) -> Opened[int, Shard]:
        return Opened()

    @cached_property
    def _names(self) -> Opened[int, tuple[str, ...]]:
        return Opened()

    @cached_property
    def _archives(self) -> Archives:
        return Archives(len(self.index["shards"]))

    @cached_property
    def _joined(self) -> Shard | None:
        joined = self.index.get("joined_columns")
        return Shard(self.folder / COLUMNS, self.index) if joined else None

    @cached_property
    def _joined_parts(self) -> list[Part]:
        # By shard: its examples of both splits.
        assert self._joined is not None
        shards, held = self.index["shards"], ("train", "validation")
        examples, shown = (
            [0, *accumulate(sum(shard[split][what] for split in held) for shard in shards)]
            for what in ("examples", "images")
        )
        return [
            Part(self._joined, number, slice(*examples[number : number + 2]), shown[number])
            for number in range(len(shards))
        ]

    @cached_property
    def _first_rows(self) -> "array[int]":
        # By shard, where its examples start in the joined columns.
        return array("q", (part.examples.start for part in self._joined_parts))

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            maps = _OWN_MAPS if self._joined is None else _JOINED_MAPS
            shard = SHARDS.add(self._shards, number, maps, self._open_shard(number))
        return shard

    def _open_shard(self, number: int) -> Shard:
        folder = self.folder / "shards" / self.index["shards"][number]["name"]
        if self._joined is None:
            return Shard(folder, self.index)
        return Shard(folder, self.index, self._joined_parts[number])

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps are opened anew in a worker process; pickled, they would be copied whole.
        own = ("name", "folder", "world", "split")
        return {name: self.__dict__[name] for name in own}

    def _first(self, shard: int) -> int:
        # Where this split's examples start: training first, then validation.
        index = self.index["shards"][shard]
        return 0 if self.split == "train" else int(index["train"]["examples"])

    @cached_property
    def _starts(self) -> tuple["array[int]", "array[int]"]:
        # By shard: the number of its first example, and what to add for its place in the shard.
        # Arrays, since lists have each number somewhere else in memory.
        first = array("q", self._before[:-1, 0].tolist())
        return first, array("q", (self._first(k) - start for k, start in enumerate(first)))

    @cached_property
    def _guide(self) -> tuple[int, "array[int]"]:
        # A number of bits, and the shard of each example whose last so many bits are 0: between two
        # of them are few shards, unless these are of very different sizes.
        first = self._before[:-1, 0]
        bits = max(0, (self._num_examples // len(first)).bit_length() - 1)
        examples = np.arange((self._num_examples >> bits) + 2) << bits
        return bits, array("q", (np.searchsorted(first, examples, side="right") - 1).tolist())

    def _place(self, example: int) -> tuple[int, int]:
        if not 0 <= example < self._num_examples:
            raise IndexError(f"source {self.name!r} holds {len(self):,} examples, not {example:,}")
        (first, shift), (bits, guide) = self._starts, self._guide
        near = example >> bits
        number = bisect_right(first, example, guide[near], guide[near + 1] + 1) - 1
        return number, example + shift[number]

    def locate(self, example: int) -> tuple[Shard, int]:
        """The shard that holds an example, and its number there."""
        number, local = self._place(example)
        return self._shard(number), local

    def before(self, examples: np.ndarray, caption: int = 0) -> np.ndarray:
        """int64 [n, 2]: text tokens and pictures in the examples before each (0 to len).

        Above 0, `caption` counts the tokens of the `caption`-th synthetic caption of each.
        """
        examples = np.asarray(examples, dtype=np.int64)
        tokens = self._tokens_before(caption)
        found = np.zeros((len(examples), 2), dtype=np.int64)
        for number, mine, local in self._by_shard(examples):
            first, shard = self._first(number), self._shard(number)
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
        order = np.argsort(numbers, kind="stable")
        shards, starts = np.unique(numbers[order], return_index=True)
        for number, mine in zip(shards.tolist(), np.split(order, starts[1:]), strict=False):
            yield number, mine, examples[mine] + self._starts[1][number]

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
            shard = self._shard(number)
            for caption in range(1, shard.num_synthetic + 1):
                offsets = shard.offsets_of(caption)
                found[mine] += offsets[local + 1] > offsets[local]
        return found

    def sizes_of(self, examples: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: text tokens of one caption of each example, and its pictures."""
        found = np.zeros((len(examples), 2), dtype=np.int64)
        for number, mine, local in self._by_shard(examples):
            shard = self._shard(number)
            for caption in np.unique(captions[mine]).tolist():
                chosen = mine[captions[mine] == caption]
                at, offsets = local[captions[mine] == caption], shard.offsets_of(caption)
                found[chosen, 0] = offsets[at + 1] - offsets[at]
            if shard.num_images is not None:
                found[mine, 1] = shard.num_images[local + 1] - shard.num_images[local]
        return found

    def longer_shards(
        self, row_length: int, num_patches: int, caption: int
    ) -> Iterator[tuple[int, Shard, slice]]:
        """Shards that may hold such a caption that is longer than a row beside its pictures: the
        number of their first example, and which of their examples are this split's."""
        for number, about in enumerate(self.index["shards"]):
            # Older sources do not say it by shard; not every shard has as many captions.
            longest = about.get("longest", sys.maxsize)
            if caption:
                made = about.get("synthetic", {self.split: {"tokens": ()}, "longest": 0})
                longest = made["longest"] if caption <= len(made[self.split]["tokens"]) else 0
            most = about.get("most_images", int(self.num_images > 0))
            if longest > row_length - num_patches * most and about[self.split]["examples"]:
                first = self._first(number)
                mine = slice(first, first + int(about[self.split]["examples"]))
                yield int(self._before[number, 0]), self._shard(number), mine

    def input_ids(self, example: int, caption: int = 0) -> np.ndarray:
        """The text tokens of the example, or of its `caption`-th synthetic one."""
        number, local = self._place(example)
        shard = self._shard(number)
        if self._joined is None:
            start, end = shard.offsets_of(caption)[local : local + 2].tolist()
        else:
            row = self._first_rows[number] + number + local
            start, end = self._joined.caption_offsets[row : row + 2, caption].tolist()
        return shard.tokens[start:end]

    def places_of(self, example: int) -> list[int]:
        """Before which of its tokens each picture of an example stands."""
        shard, local = self.locate(example)
        return shard.places_of(local)

    def pictures_of(self, examples: np.ndarray) -> Pictures:
        """The pictures of these examples, in the examples' order."""
        numbers, parts = np.zeros(len(examples), dtype=np.int64), list[np.ndarray]()
        order = [np.zeros(0, dtype=np.int64)]
        for number, mine, local in self._by_shard(examples):
            numbers[mine], hashes = self._shard(number).hashes_of(local)
            parts.append(hashes)
            order.append(np.repeat(mine, numbers[mine]))
        # They were found shard by shard.
        back = np.argsort(np.concatenate(order), kind="stable")
        inside = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        hashes = np.concatenate([np.zeros((0, 16), np.uint8), *parts])[back]
        return Pictures(np.stack([np.repeat(examples, numbers), inside], axis=1), hashes)

    def image_bytes(self, example: int, picture: int = 0) -> bytes:
        """One of the encoded pictures of an example.

        Raises ValueError that names the record if its bytes are others than when it was prepared.
        """
        number, local = self._place(example)
        file, offset, size, hashed = self._stored(number, local, picture)
        try:
            if file == 0 and (descriptor := self._archives.first[number]) >= 0:
                data = os.pread(descriptor, size, offset)
            else:
                data = self._archive(number, file, offset).read(offset, size)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.describe(example)}: its picture {self._path(number, file)} is gone; put it "
                "back, or prepare the source again from where its pictures are now (`midstream "
                "prepare`; `midstream run` for a source of a study's world)"
            ) from None
        if content_hash(data) != hashed:
            raise ValueError(
                f"{self.describe(example)}: the picture in {self._files(number)[file]} changed "
                "since it was prepared (its bytes have another hash); restore the file or prepare "
                "the data again"
            )
        return data

    def _archive(self, number: int, file: int, offset: int) -> Archive:
        key = number << 32 | file
        archive = self._archives.get(key)
        if archive is None:
            path = self._path(number, file)
            stamped = offset and "://" in path
            archive = Archive(path, self._shard(number).stamp_of(path) if stamped else None)
            # A picture of its own, most likely, is not kept open.
            if offset:
                open_archives().add(self._archives, key, 1, archive)
        return archive

    def _stored(self, number: int, local: int, picture: int) -> StoredPicture:
        if self._joined is None or self._joined.pictures is not None:
            return self._shard(number).picture(local, picture)
        # Not from the shard's own view of them, which is one more place in memory a shard.
        row = self._first_rows[number] + local
        assert self._joined.images is not None
        file, offset, size = self._joined.images[row].tolist()
        return StoredPicture(file, offset, size, self._joined.hashes[row].tobytes())

    def _files(self, number: int) -> tuple[str, ...]:
        files = self._names.get(number)
        if files is None:
            files = self._shard(number).read_files()
            FILES.add(self._names, number, len(files), files)
        return files

    def _path(self, number: int, file: int) -> str:
        name = self._files(number)[file]
        if name == OWN_PICTURES:
            return str(self._shard(number).folder / name)
        root = str(self.world) if self.world is not None else self.index["root"]
        return name if "://" in name or name.startswith("/") else f"{root}/{name}"

    def describe(self, example: int, caption: int = 0) -> str:
        """Where an example comes from, and which synthetic caption of it is meant, for messages."""
        shard, local = self.locate(example)
        which = f", synthetic caption {caption}" if caption else ""
        return f"source {self.name!r}, {shard.name_of(local)}{which}"
