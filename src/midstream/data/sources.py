"""Indexed examples: lengths known up front, tokens and pictures by random access.

The files of a source are described in `docs/data.md`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from midstream.storage import read_json, write_json

Kind = Literal["text", "caption", "instruct"]


@dataclass(frozen=True)
class Source:
    """One prepared source, opened from its folder; `world` is where its pictures lie."""

    name: str
    folder: Path
    world: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """Counts, files and drops, as written by `SourceWriter`."""
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"source {self.name!r} has no {path}; prepare the data again")
        found: dict[str, Any] = read_json(path)
        return found

    @property
    def kind(self) -> Kind:
        """What its text tokens count as."""
        kind: Kind = self.index["kind"]
        return kind

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64, one more than examples: where each starts in the tokens."""
        offsets: np.ndarray = np.load(self.folder / "offsets.npy", mmap_mode="r")
        return offsets

    @cached_property
    def tokens(self) -> np.ndarray:
        """All examples' text tokens, memory-mapped."""
        return self._mapped("tokens.bin", np.dtype(self.index["dtype"]))

    @cached_property
    def supervised(self) -> np.ndarray | None:
        """One byte a token, or None where all tokens are targets."""
        # By kind, not by what lies there: a lost file must not turn every token into a target.
        if self.kind == "text":
            return None
        return self._mapped("supervised.bin", np.dtype(np.uint8))

    def _mapped(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        path, expected = self.folder / name, int(self.offsets[-1])
        if path.stat().st_size != expected * dtype.itemsize:
            raise ValueError(
                f"{path} holds {path.stat().st_size:,} bytes, its index needs "
                f"{expected * dtype.itemsize:,}; prepare the data again"
            )
        return np.memmap(path, dtype=dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps are opened anew in a worker process; pickled, they would be copied whole.
        return {"name": self.name, "folder": self.folder, "world": self.world}

    @cached_property
    def images(self) -> np.ndarray | None:
        """int64 [examples, 3]: file, offset, bytes of each picture; file -1 without one."""
        if self.kind == "text":
            return None
        images: np.ndarray = np.load(self.folder / "images.npy", mmap_mode="r")
        return images

    @property
    def has_images(self) -> np.ndarray:
        """bool [examples]."""
        if self.images is None:
            return np.zeros(len(self), dtype=bool)
        shown: np.ndarray = self.images[:, 0] >= 0
        return shown

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def image_bytes(self, example: int) -> bytes:
        """The encoded picture of an example."""
        assert self.images is not None
        file, offset, size = (int(value) for value in self.images[example])
        with (self.world / self.index["files"][file]).open("rb") as stream:
            stream.seek(offset)
            data: bytes = stream.read(size)
        if len(data) != size:
            raise ValueError(
                f"{self.describe(example)}: the file ends after {len(data)} of {size} bytes; "
                "the data changed since it was prepared, prepare it again"
            )
        return data

    def describe(self, example: int) -> str:
        """Where an example comes from, for messages."""
        names = self.folder / "names.txt"
        if not names.exists():
            return f"source {self.name!r}, example {example}"
        with names.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number == example:
                    return f"source {self.name!r}, {line.rstrip()}"
        raise IndexError(example)


class SourceWriter:
    """Collects examples of one source and writes its folder; `close` completes it."""

    def __init__(self, folder: Path, *, kind: Kind, dtype: str) -> None:
        folder.mkdir(parents=True)
        self.folder, self.kind, self.dtype = folder, kind, np.dtype(dtype)
        self.offsets = [0]
        self.images: list[tuple[int, int, int]] = []
        self.files: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self._tokens = (folder / "tokens.bin").open("wb")
        self._supervised = None if kind == "text" else (folder / "supervised.bin").open("wb")
        self._names = None if kind == "text" else _open_names(folder)

    def add(
        self,
        input_ids: np.ndarray,
        supervised: np.ndarray,
        *,
        name: str,
        image: tuple[str, int, int] | None = None,
    ) -> None:
        """One example; `image` is (file relative to the world, offset, bytes)."""
        self._tokens.write(input_ids.astype(self.dtype).tobytes())
        if self._supervised is not None:
            self._supervised.write(supervised.astype(np.uint8).tobytes())
        if self._names is not None:
            self._names.write(name.replace("\n", " ").replace("\r", " ") + "\n")
        self.offsets.append(self.offsets[-1] + len(input_ids))
        if image is None:
            self.images.append((-1, 0, 0))
        else:
            file = self.files.setdefault(image[0], len(self.files))
            self.images.append((file, image[1], image[2]))

    def drop(self, reason: str) -> None:
        """Count a record that is left out, by reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def close(self) -> dict[str, Any]:
        """Write the index; returns what `results.json` says of the source."""
        for stream in (self._tokens, self._supervised, self._names):
            if stream is not None:
                stream.close()
        np.save(self.folder / "offsets.npy", np.array(self.offsets, dtype=np.int64))
        if self.kind != "text":
            np.save(self.folder / "images.npy", np.array(self.images, np.int64).reshape(-1, 3))
        summary = {
            "kind": self.kind,
            "num_examples": len(self.offsets) - 1,
            "num_tokens": self.offsets[-1],
            "num_images": sum(file >= 0 for file, _, _ in self.images),
            "dropped": self.dropped,
        }
        write_json(
            self.folder / "index.json",
            summary | {"dtype": self.dtype.str, "files": list(self.files)},
        )
        return summary


def _open_names(folder: Path) -> TextIO:
    # Names in archives may be bytes that are no UTF-8.
    return (folder / "names.txt").open("w", encoding="utf-8", errors="backslashreplace")
