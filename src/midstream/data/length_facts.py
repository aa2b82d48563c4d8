"""How long a prepared source's examples are and how much of them is learnt: what plans count with.

Examples are counted in classes by their text tokens, four classes to a doubling, so that the sum of
their squared lengths in rows of any length follows within a few in a thousand.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from midstream.data.sources import Shard

CLASSES_PER_DOUBLING = 4


def length_facts(shards: Iterable[Shard]) -> dict[str, Any]:
    """Of the training split: `num_targets`, and `lengths` of examples without and with a picture.

    A target is a token with a loss that has another one before it in its example. Each class of
    `lengths["plain"]` and `lengths["image"]` is [examples, tokens, sum of squared tokens].
    """
    targets = 0
    classes: dict[str, dict[int, np.ndarray]] = {"plain": {}, "image": {}}
    for shard in shards:
        number = int(shard.index["train"]["examples"])
        offsets = np.asarray(shard.offsets[: number + 1])
        lengths = np.diff(offsets)
        targets += _targets(shard, offsets, lengths)
        shown = np.zeros(number, dtype=bool)
        if shard.images is not None:
            shown = np.asarray(shard.images[:number, 0]) >= 0
        for name, chosen in (("plain", ~shown), ("image", shown)):
            _add(classes[name], lengths[chosen])
    return {
        "num_targets": targets,
        "lengths": {
            name: [found[key].tolist() for key in sorted(found)] for name, found in classes.items()
        },
    }


def _targets(shard: Shard, offsets: np.ndarray, lengths: np.ndarray) -> int:
    held = lengths > 0
    if shard.supervised is None:
        return int(lengths.sum() - np.count_nonzero(held))
    column = shard.supervised[: int(offsets[-1])]
    first = column[offsets[:-1][held]]
    return int(np.count_nonzero(column) - np.count_nonzero(first))


def _add(found: dict[int, np.ndarray], lengths: np.ndarray) -> None:
    if not len(lengths):
        return
    keys = np.ceil(CLASSES_PER_DOUBLING * np.log2(np.maximum(lengths, 1))).astype(np.int64)
    for key in np.unique(keys).tolist():
        mine = lengths[keys == key]
        sums = np.array([len(mine), mine.sum(), (mine * mine).sum()], dtype=np.int64)
        found[key] = found.get(key, 0) + sums
