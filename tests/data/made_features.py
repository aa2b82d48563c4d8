"""A small encoder, the store's callers, and what a store holds."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from midstream.config import EncoderConfig
from midstream.data.feature_store import FeatureStore
from midstream.data.images import FILL_BATCH, encode_fixed, load_pixels
from midstream.data.sources import Source

CONFIG = EncoderConfig(
    image_size=8, patch_size=4, hidden_size=6, num_layers=2, num_heads=1, intermediate_size=8
)
CODED = CONFIG.model_copy(update={"feature_dtype": "int8"})
WHOLE = CONFIG.model_copy(update={"feature_dtype": "float32"})
# More pictures than two batches, and examples that share them.
NUM_PICTURES = 2 * FILL_BATCH + 3


class Encode:
    """A small encoder: a fixed matrix over the pixels of each patch.

    As in a real one the batch's shape has a say in the numbers. It writes a line to `log` for each
    call, and at call `dies_at` its process is killed.
    """

    def __init__(self, log: Path | None = None, dies_at: int | None = None) -> None:
        self.calls, self.sizes = 0, set[int]()
        self.log, self.dies_at = log, dies_at
        self.weights = torch.from_numpy(
            np.random.default_rng(3).normal(size=(48, 6)).astype(np.float32)
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.add(len(pixels))
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write("batch\n")
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        return patches.reshape(len(pixels), 4, 48) @ self.weights * (1 + len(pixels) / 64)


def quiet(done: float, note: str) -> None:
    """Checks what a bar needs: a share and words."""
    assert 0 <= done <= 1
    assert note.startswith("features of ")


def pixels_of(source: Source, examples: Iterable[int], config: EncoderConfig) -> Tensor:
    """Their pictures in one tensor."""
    return torch.from_numpy(np.stack([load_pixels(source, n, config) for n in examples]))


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def stored_pictures(folder: Path) -> int:
    return sum(len(np.load(part / "hashes.npy")) for part in parts(folder))


def check_all(store: FeatureStore, source: Source, shown: list[int | None]) -> None:
    """Every stored feature is what encoding the picture alone gives, bit by bit."""
    for example, picture in enumerate(shown):
        if picture is not None:
            pixels = pixels_of(source, [example], store.config)
            live = encode_fixed(Encode(), pixels, store.config)[0]
            stored = store.read_many([(source, example, 0)])[0]
            # Half the bytes on their way to a GPU; the model widens them.
            narrow = store.config.feature_dtype == "bfloat16"
            assert stored.dtype == (torch.bfloat16 if narrow else torch.float32)
            assert torch.equal(stored.float(), live)


def features_of(folder: Path) -> dict[bytes, bytes]:
    """The stored bytes of every picture, by its hash."""
    found = {}
    for part in parts(folder):
        hashes = np.load(part / "hashes.npy")
        rows = np.fromfile(part / "features.bin", np.uint8).reshape(len(hashes), -1)
        found |= {key.tobytes(): row.tobytes() for key, row in zip(hashes, rows, strict=True)}
    return found
