"""Frozen-encoder outputs, kept once for every run that uses the encoder.

A file `<folder>/<source>.npy` holds float32 [pictures, patches, width]; pictures that several
examples share are there once. The folder's name stands for encoder weights and data, so a stored
feature is never stale.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor

from midstream.config import EncoderConfig
from midstream.data.images import decode, to_pixels
from midstream.data.sources import Source
from midstream.storage import write_bytes

# The shape of a batch decides the last bits of its results; every fill uses this one.
FILL_BATCH = 64

Encode = Callable[[Float[Tensor, "images 3 size size"]], Float[Tensor, "images patches width"]]


def load_pixels(source: Source, example: int, config: EncoderConfig) -> np.ndarray:
    """Pixels of an example's picture as the encoder takes them, float32 [3, size, size]."""
    picture = decode(source.image_bytes(example), source.describe(example))
    return to_pixels(picture, size=config.image_size, resize=config.resize)


class FeatureStore:
    """Features of the sources of one preparation under one encoder."""

    def __init__(self, folder: Path, config: EncoderConfig) -> None:
        self.folder, self.config = folder, config
        self._arrays: dict[str, np.ndarray] = {}
        self._index: dict[str, np.ndarray] = {}

    def fill(self, source: Source, encode: Encode, progress: Callable[[float, str], None]) -> None:
        """Compute and store what is missing; other processes wait and then find it done."""
        path = self.folder / f"{source.name}.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(path) + ".lock"):
            if path.exists():
                return
            examples, _ = _distinct(source)
            parts = []
            for low in range(0, len(examples), FILL_BATCH):
                progress(low / len(examples), f"features of {source.name}")
                chosen = examples[low : low + FILL_BATCH]
                pixels = np.stack([load_pixels(source, int(e), self.config) for e in chosen])
                parts.append(encode_fixed(encode, pixels))
            stream = io.BytesIO()
            np.save(stream, np.concatenate(parts))
            write_bytes(path, stream.getvalue())

    def read(self, source: Source, example: int) -> np.ndarray:
        """float32 [patches, width] of one example's picture."""
        if source.name not in self._arrays:
            self._arrays[source.name] = np.load(self.folder / f"{source.name}.npy", mmap_mode="r")
            self._index[source.name] = _distinct(source)[1]
        found: np.ndarray = self._arrays[source.name][self._index[source.name][example]]
        return found


def encode_fixed(encode: Encode, pixels: np.ndarray) -> np.ndarray:
    """Features of up to `FILL_BATCH` pictures, independent of how many there are."""
    padded = np.zeros((FILL_BATCH, *pixels.shape[1:]), dtype=np.float32)
    padded[: len(pixels)] = pixels
    with torch.no_grad():
        features = encode(torch.from_numpy(padded))
    found: np.ndarray = features[: len(pixels)].float().cpu().numpy()
    return found


def gather(
    store: FeatureStore, sources: Mapping[str, Source], names: tuple[str, ...], images: np.ndarray
) -> Float[Tensor, "images patches width"]:
    """Features of (source number, example) pairs, in their order."""
    found = [store.read(sources[names[int(s)]], int(e)) for s, e in images]
    if not found:
        return torch.zeros((0, store.config.num_patches, store.config.hidden_size))
    return torch.from_numpy(np.stack(found))


def _distinct(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """First example of each distinct picture, and each example's place in that list."""
    assert source.images is not None
    images = np.asarray(source.images)
    shown = np.flatnonzero(images[:, 0] >= 0)
    _, first, inverse = np.unique(images[shown], axis=0, return_index=True, return_inverse=True)
    places = np.full(len(images), -1, dtype=np.int64)
    places[shown] = inverse.reshape(-1)
    return shown[first], places
