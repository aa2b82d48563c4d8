"""Token budgets -> the global order of examples, a pure function of (plan, seed).

Nothing is shuffled in place: each source is read through a keyed permutation of its indices, so
the example at any position is found by arithmetic.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from midstream.config import Epochs, Mixture
from midstream.tokens import apportion

ROUNDS = 6


@dataclass(frozen=True)
class Supply:
    """What a source offers to a plan: lengths in tokens of its pieces, image patches included.

    Documents longer than a row are cut into pieces of a row's length; piece k of `pieces` starts
    at token `starts[k]` of example `examples[k]`. Image examples are one piece each.
    """

    name: str
    examples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Order:
    """The planned pieces in global order, and each source's planned and realised tokens.

    source: index into `names`; piece: index into that source's supply.
    """

    names: tuple[str, ...]
    source: np.ndarray
    piece: np.ndarray
    planned_tokens: dict[str, int | None]
    realised_tokens: dict[str, int]


def supply(name: str, tokens: np.ndarray, patches: np.ndarray, row_length: int) -> Supply:
    """Cut examples (int64 arrays: text tokens and patches of each) into pieces for rows.

    Raises ValueError with the position of the first image example that is longer than a row.
    """
    total = tokens + patches
    too_long = np.flatnonzero((patches > 0) & (total > row_length))
    if len(too_long):
        raise LongExampleError(name, int(too_long[0]), int(total[too_long[0]]), row_length)
    num_pieces = np.maximum(1, -(-total // row_length))
    examples = np.repeat(np.arange(len(tokens)), num_pieces)
    first = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    starts = (np.arange(len(examples)) - first) * row_length
    lengths = np.minimum(row_length, total[examples] - starts)
    return Supply(name, examples, starts, lengths)


class LongExampleError(ValueError):
    """An example that must stay whole does not fit into a row."""

    def __init__(self, source: str, example: int, length: int, row_length: int) -> None:
        super().__init__(
            f"source {source!r}, example {example}: {length} positions with its image do not fit "
            f"into a row of {row_length}; raise row_length or shorten the example"
        )
        self.example, self.length = example, length


def plan_order(supplies: Sequence[Supply], budget: Mixture | Epochs, seed: int) -> Order:
    """Choose pieces until each budget is met within one piece, and spread them evenly.

    Every source's k-th piece lies at the share of the plan at which its tokens fall due, so each
    prefix of the plan has the whole plan's shares. Raises ValueError for an unknown source or a
    budget that the source cannot meet in `max_epochs`, with both numbers.
    """
    by_name = {item.name: item for item in supplies}
    wanted = budget.sources if isinstance(budget, Epochs) else [s.source for s in budget.shares]
    for name in wanted:
        if name not in by_name:
            raise ValueError(f"no source {name!r} in the data; it holds {sorted(by_name)}")
    parts: dict[str, int | None]
    if isinstance(budget, Mixture):
        shares = {share.source: share.share for share in budget.shares}
        parts = {**apportion(budget.total_tokens, shares)}
        chosen = {
            name: _within(by_name[name], tokens or 0, budget.max_epochs, seed)
            for name, tokens in parts.items()
        }
    else:
        parts = dict.fromkeys(wanted)
        chosen = {
            name: np.concatenate(
                [_epoch(by_name[name], epoch, seed) for epoch in range(budget.epochs)]
            )
            for name in wanted
        }
    names = tuple(name for name in chosen if len(chosen[name]))
    if not names:
        raise ValueError(
            f"the plan holds no example: budgets {parts} are less than half of the first examples; "
            f"raise total_tokens"
        )
    due = [_due(by_name[name].lengths[chosen[name]]) for name in names]
    order = np.argsort(np.concatenate(due), kind="stable")
    source = np.repeat(np.arange(len(names)), [len(chosen[name]) for name in names])
    piece = np.concatenate([chosen[name] for name in names])
    realised = {name: int(by_name[name].lengths[chosen[name]].sum()) for name in chosen}
    return Order(names, source[order], piece[order], parts, realised)


def permuted(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a keyed permutation of `range(size)` sends `indices` (int64, any shape).

    A Feistel network on the smallest even number of bits that covers `size`; results outside are
    sent through it again until they fall inside. Random access, no memory.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    seed = hashlib.sha256(key.encode()).digest()
    keys = np.frombuffer(seed + hashlib.sha256(seed).digest(), dtype=np.uint64)[:ROUNDS]
    shift = np.uint64(half)

    def network(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        mixed: np.ndarray = (left << shift) | right
        return mixed

    result = network(indices.astype(np.uint64).reshape(-1))
    outside = result >= size
    while outside.any():
        result[outside] = network(result[outside])
        outside = result >= size
    return result.astype(np.int64).reshape(indices.shape)


def _mix(values: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64: every input bit reaches every output bit.
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _epoch(supply: Supply, epoch: int, seed: int) -> np.ndarray:
    size = len(supply.lengths)
    return permuted(np.arange(size), size, f"{seed}/{supply.name}/epoch {epoch}")


def _within(supply: Supply, tokens: int, max_epochs: int, seed: int) -> np.ndarray:
    have = int(supply.lengths.sum())
    if tokens > have * max_epochs:
        raise ValueError(
            f"source {supply.name!r} holds {have:,} tokens, the plan needs {tokens:,}; "
            f"raise max_epochs above {max_epochs} or lower the budget"
        )
    epochs = [_epoch(supply, epoch, seed) for epoch in range(-(-tokens // max(have, 1)))]
    pieces = np.concatenate([np.zeros(0, np.int64), *epochs])
    ends = np.cumsum(supply.lengths[pieces])
    count = int(np.searchsorted(ends, tokens))
    # The piece that crosses the budget is in if more than half of it is.
    if count < len(ends):
        before = int(ends[count - 1]) if count else 0
        count += int(tokens - before) * 2 > int(ends[count]) - before
    return pieces[:count]


def _due(lengths: np.ndarray) -> np.ndarray:
    ends = np.cumsum(lengths, dtype=np.float64)
    due: np.ndarray = (ends - lengths / 2) / max(float(ends[-1]), 1.0)
    return due
