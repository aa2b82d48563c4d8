"""Examples side by side in rows as full as they get, block by block.

The blocks have about BLOCK_ROWS rows; their sizes are fixed when the plan is made.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import cached_property
from math import isqrt
from typing import Any

import numpy as np

from midstream.data.kept import Kept
from midstream.data.mixture import Quota
from midstream.data.placement import BLOCK_ROWS, KEPT_BLOCKS, Items, Placement, without_cache
from midstream.data.stream import permuted

# How full packed rows are made, in thousandths: what is left lets nearly every text stay whole.
FILL = 997
# Plans of up to this many blocks know each block's rows; larger ones give all blocks the same
# number: that of the fullest of this many and spare ones.
CHECKED_BLOCKS = 512
# Blocks that were not looked at differ by chance; a million of them stay within this.
SPARE_DEVIATIONS = 6


class Filled:
    """Examples side by side, kept apart by segments, each row as full as its block allows.

    Whole examples go first, each into the fullest row that it fits; texts follow likewise, and
    those that fit nowhere are cut to fill what is left.
    """

    def __init__(self, quotas: Sequence[Quota], row_length: int, key: str) -> None:
        self.quotas, self.row_length, self.key = tuple(quotas), row_length, key
        tokens = sum(quota.tokens for quota in quotas)
        alone = sum(q.examples for q in quotas if q.by_count and not q.divisible)
        expected = max(1000 * tokens // (FILL * row_length), alone)
        self.num_blocks = max(1, round(expected / BLOCK_ROWS))
        checked = min(self.num_blocks, CHECKED_BLOCKS)
        blocks = [number * self.num_blocks // checked for number in range(checked)]
        needed = [len(self._pack(block, None)) for block in blocks]
        if checked == self.num_blocks:
            self.first_rows, self.block_rows = np.cumsum([0, *needed]), 0
        else:
            self.first_rows, self.block_rows = np.zeros(0), _rows_for_all(needed)

    def __getstate__(self) -> dict[str, Any]:
        return without_cache(self)

    def __len__(self) -> int:
        return self.num_blocks * self.block_rows or int(self.first_rows[-1])

    def sees_all(self, index: int) -> bool:
        """Whether the documents of the row see each other."""
        return False

    def row(self, index: int) -> list[Placement]:
        """What stands in a row."""
        if self.block_rows:
            block, inside = divmod(index, self.block_rows)
        else:
            block = int(np.searchsorted(self.first_rows, index, side="right")) - 1
            inside = index - int(self.first_rows[block])
        return list(map(Placement._make, self._kept[block][inside]))

    @cached_property
    def _kept(self) -> Kept[int, list[Items]]:
        return Kept(self._shuffled, KEPT_BLOCKS)

    def _shuffled(self, block: int) -> list[Items]:
        packed = self._pack(block, self.block_rows or None)
        # Packing sorts by length; the seeded order keeps every part of the block alike.
        order = permuted(np.arange(len(packed)), len(packed), f"{self.key}/block {block}")
        return [with_columns(packed[row]) for row in order.tolist()]

    def _pack(self, block: int, num_rows: int | None) -> list[Items]:
        whole, text = self._items(block)
        packer = Packer(self.row_length)
        for item in whole[np.argsort(-whole[:, 3], kind="stable")].tolist():
            packer.add(item)
        tokens = int(whole[:, 3].sum() + text[:, 3].sum())
        room = num_rows or max(len(packer.rows), -(-1000 * tokens // (FILL * self.row_length)), 1)
        if len(packer.rows) > room or tokens > room * self.row_length:
            raise ValueError(
                f"block {block} of the plan needs {len(packer.rows):,} rows and {tokens:,} tokens, "
                f"it has {room:,} rows of {self.row_length}; choose another seed"
            )
        left = []
        for item in text[np.argsort(-text[:, 3], kind="stable")].tolist():
            if not packer.add(item, max_rows=room):
                left.append(item)
        packer.pour(left)
        if num_rows:
            packer.spread(num_rows)
        return packer.rows

    def _items(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """[items, 5] of source, example, start, length, caption: whole examples, and text cut to
        rows."""
        parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
        for number, quota in enumerate(self.quotas):
            found = quota.block(block, self.num_blocks)
            examples, starts, lengths = found.examples, found.starts, found.lengths
            captions = found.captions
            if quota.divisible:
                pieces = -(-lengths // self.row_length)
                examples = np.repeat(examples, pieces)
                inside = np.arange(len(examples)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
                lengths = np.minimum(
                    self.row_length, np.repeat(lengths, pieces) - inside * self.row_length
                )
                starts = np.repeat(starts, pieces) + inside * self.row_length
                captions = np.zeros_like(examples)
            source = np.full_like(examples, number)
            columns = [source, examples, starts, lengths, captions]
            parts[quota.divisible].append(np.stack(columns, axis=1))
        empty = np.zeros((0, 5), dtype=np.int64)
        return np.concatenate([empty, *parts[False]]), np.concatenate([empty, *parts[True]])


class Packer:
    """Rows that items (source, example, start, length, caption) are put into."""

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self.rows: list[Items] = []
        # (positions left, row) of the rows that are not full, in ascending order.
        self._room: list[tuple[int, int]] = []

    def add(self, item: list[int], max_rows: int | None = None) -> bool:
        """Put an item into the fullest row that it fits, or a new one; False if there is none."""
        size = item[3]
        at = bisect_left(self._room, (size, -1))
        if at < len(self._room):
            left, row = self._room.pop(at)
            self.rows[row].append(item)
        elif max_rows is None or len(self.rows) < max_rows:
            left, row = self.row_length, len(self.rows)
            self.rows.append([item])
        else:
            return False
        if left > size:
            insort(self._room, (left - size, row))
        return True

    def pour(self, items: list[list[int]]) -> None:
        """Cut items to fill the emptiest rows."""
        for source, example, start, length, caption in items:
            while length:
                left, row = self._room.pop()
                size = min(left, length)
                self.rows[row].append([source, example, start, size, caption])
                start, length = start + size, length - size
                if left > size:
                    insort(self._room, (left - size, row))

    def spread(self, num_rows: int) -> None:
        """Bring the rows to their fixed number: from those with the most items, one each."""
        while len(self.rows) < num_rows:
            fullest = max(range(len(self.rows)), key=lambda row: len(self.rows[row]))
            many = len(self.rows[fullest]) > 1
            self.rows.append([self.rows[fullest].pop()] if many else [])


def _rows_for_all(needed: Sequence[int]) -> int:
    """Rows that a block needs at most, from what some blocks need; in whole numbers, so that
    every machine plans alike."""
    count, total = len(needed), sum(needed)
    spread = count * sum(rows * rows for rows in needed) - total * total
    likely = -(-total // count) + isqrt(SPARE_DEVIATIONS**2 * spread) // count + 1
    return max(likely, max(needed) + 2 + max(needed) // 500)


def with_columns(items: Items) -> Items:
    """Items side by side: each with the column where it begins."""
    found, column = [], 0
    for item in items:
        found.append([*item, column])
        column += item[3]
    return found
