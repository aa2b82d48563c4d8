"""How long a prepared source's examples are and how much of them is learnt: what plans count with.

Examples are counted in classes by their text tokens, four classes to a doubling, so that the sum of
their squared lengths in rows of any length follows within a few in a thousand.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from midstream.data.columns import Shard

CLASSES_PER_DOUBLING = 4


def length_facts(shards: Iterable[Shard]) -> dict[str, Any]:
    """Of the training split: `num_targets`, and `lengths` of examples without and with a picture.

    A target is a token with a loss that has another one before it in its example. Each class of
    `lengths["plain"]` and `lengths["image"]` is [examples, tokens, sum of squared tokens].
    """
    found = _Facts()
    for shard in shards:
        found.add(shard, 0, 1)
    return found.summary()


def caption_facts(shards: Sequence[Shard]) -> dict[str, Any]:
    """Of the training split: `captions`, how many examples have each kind.

    Where some have synthetic ones, `seen` is what plans count with: `num_tokens`, `num_targets` and
    `lengths` for "synthetic" (the first of each) and "random" (the mean of all), and the `longest`.
    """
    number = sum(int(shard.index["train"]["examples"]) for shard in shards)
    held = [shard for shard in shards if "synthetic" in shard.index]
    parts = [shard.index["synthetic"]["train"] for shard in held]
    lack = sum(part["examples"] - part["originals"] for part in parts)
    pictures = sum(part["pictures"] for part in parts)
    captions = {"original": number - lack, "synthetic": pictures}
    if not pictures:
        return {"captions": captions}
    first, drawn = _Facts(), _Facts()
    for shard in held:
        first.add(shard, 1, 1)
        numbers = _numbers(shard)
        for caption in range(1, shard.num_synthetic + 1):
            drawn.add(shard, caption, 1 / np.maximum(numbers, 1))
    seen = {"synthetic": first.summary(), "random": drawn.summary()}
    seen["synthetic"]["num_tokens"] = sum(part["tokens"][0] for part in parts)
    seen["random"]["num_tokens"] = sum(part["mean_tokens"] for part in parts)
    seen["synthetic"]["longest"] = {"image": _longest(held, 1)}
    most = max(shard.num_synthetic for shard in held)
    every = [_longest(held, caption) for caption in range(1, 1 + most)]
    seen["random"]["longest"] = {"image": max(every, key=lambda found: int(found["tokens"]))}
    return {"captions": captions, "seen": seen}


class _Facts:
    """Sums over examples, each counted by its weight; whole numbers where all weights are 1."""

    def __init__(self) -> None:
        self.targets: float = 0
        self.classes: dict[str, dict[int, np.ndarray]] = {"plain": {}, "image": {}}

    def add(self, shard: Shard, caption: int, weight: int | np.ndarray) -> None:
        """The training examples of a shard that have this caption."""
        number = int(shard.index["train"]["examples"])
        offsets = np.asarray(shard.offsets_of(caption)[: number + 1])
        lengths = np.diff(offsets)
        held = lengths > 0
        weights = np.broadcast_to(weight, lengths.shape)
        self.targets += _targets(shard, offsets, lengths, weights)
        shown = np.zeros(number, dtype=bool)
        if shard.images is not None:
            shown = np.asarray(shard.images[:number, 0]) >= 0
        for name, chosen in (("plain", held & ~shown), ("image", held & shown)):
            _add(self.classes[name], lengths[chosen], weights[chosen])

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        lengths = {
            name: [found[key].tolist() for key in sorted(found)]
            for name, found in self.classes.items()
        }
        return {"num_targets": round(self.targets), "lengths": lengths}


def _longest(shards: Sequence[Shard], caption: int) -> dict[str, Any]:
    """Tokens and place of the longest of these captions, over both splits."""
    best: tuple[int, Shard, int] = (0, shards[0], 0)
    for shard in shards:
        if caption <= shard.num_synthetic:
            lengths = np.diff(shard.offsets_of(caption))
            example = int(lengths.argmax())
            best = max(best, (int(lengths[example]), shard, example), key=lambda found: found[0])
    tokens, shard, example = best
    return {"tokens": tokens, "where": f"{shard.name_of(example)}, synthetic caption {caption}"}


def _numbers(shard: Shard) -> np.ndarray:
    """How many synthetic captions each training example has."""
    number = int(shard.index["train"]["examples"])
    rows = [shard.offsets_of(n)[: number + 1] for n in range(1, shard.num_synthetic + 1)]
    found: np.ndarray = np.count_nonzero(np.diff(rows, axis=1), axis=0)
    return found


def _targets(shard: Shard, offsets: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> float:
    held = lengths > 0
    if shard.supervised is None:
        return float(lengths.sum() - np.count_nonzero(held))
    column = shard.supervised[int(offsets[0]) : int(offsets[-1])]
    starts = (offsets[:-1] - offsets[0])[held]
    if not len(starts):
        return 0.0
    marked = np.add.reduceat((column > 0).astype(np.int64), starts) - (column[starts] > 0)
    return float((marked * weights[held]).sum())


def _add(found: dict[int, np.ndarray], lengths: np.ndarray, weights: np.ndarray) -> None:
    if not len(lengths):
        return
    keys = np.ceil(CLASSES_PER_DOUBLING * np.log2(np.maximum(lengths, 1))).astype(np.int64)
    for key in np.unique(keys).tolist():
        mine, weight = lengths[keys == key], weights[keys == key]
        sums = np.array([weight.sum(), (weight * mine).sum(), (weight * mine * mine).sum()])
        found[key] = found.get(key, 0) + sums
