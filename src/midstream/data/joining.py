"""Rows that follow by arithmetic: documents joined and cut, and whole examples padded."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from midstream.data.kept import Kept
from midstream.data.mixture import Quota, interleaved
from midstream.data.placement import BLOCK_ROWS, KEPT_BLOCKS, Items, Placement, without_cache
from midstream.data.stream import permuted


class Joined:
    """Documents one behind the other, cut at the row length, seeing each other (OpenLM's rows).

    The rows are shuffled in windows of BLOCK_ROWS.
    """

    def __init__(
        self, quotas: Sequence[Quota], numbers: Sequence[int], row_length: int, key: str
    ) -> None:
        self.quotas = [quotas[number] for number in numbers]
        self.numbers, self.row_length, self.key = list(numbers), row_length, key
        self.tokens = sum(quota.tokens for quota in self.quotas)
        self.num_blocks = max(1, self.tokens // (BLOCK_ROWS * row_length))

    def __getstate__(self) -> dict[str, Any]:
        return without_cache(self)

    def __len__(self) -> int:
        return -(-self.tokens // self.row_length)

    def sees_all(self, index: int) -> bool:
        """Whether the documents of the row see each other."""
        return True

    def row(self, index: int) -> list[Placement]:
        """What stands in a row."""
        window, inside = divmod(index, BLOCK_ROWS)
        low = (window * BLOCK_ROWS + self._orders[window][inside]) * self.row_length
        high = min(low + self.row_length, self.tokens)
        block = low * self.num_blocks // self.tokens
        kept = self._kept[block]
        while not kept.before <= low < kept.after:
            block += 1 if kept.before <= low else -1
            kept = self._kept[block]
        found: list[Placement] = []
        kept.place(low, high, found)
        while kept.after < high:
            block += 1
            kept = self._kept[block]
            kept.place(low, high, found)
        return found

    @cached_property
    def _orders(self) -> Kept[int, list[int]]:
        # Rows of one long document would come one after the other.
        def order(window: int) -> list[int]:
            size = min(BLOCK_ROWS, len(self) - window * BLOCK_ROWS)
            found: list[int] = permuted(np.arange(size), size, f"{self.key}/rows {window}").tolist()
            return found

        return Kept(order, KEPT_BLOCKS)

    @cached_property
    def _kept(self) -> Kept[int, "JoinedBlock"]:
        return Kept(self._load, KEPT_BLOCKS)

    def _before(self, block: int) -> int:
        return sum(quota.before(block, self.num_blocks) for quota in self.quotas)

    def _load(self, block: int) -> "JoinedBlock":
        stretches = [quota.block(block, self.num_blocks) for quota in self.quotas]
        number, place = interleaved(stretches)
        first = np.cumsum([0, *(len(stretch.examples) for stretch in stretches)])[:-1]
        at = first[number] + place
        example, start, length = (
            np.concatenate([getattr(stretch, name) for stretch in stretches])[at]
            for name in ("examples", "starts", "lengths")
        )
        items = np.stack([np.array(self.numbers)[number], example, start], axis=1)
        before = self._before(block)
        ends = (before + np.cumsum(length)).tolist()
        return JoinedBlock(before, self._before(block + 1), items.tolist(), ends)


@dataclass(frozen=True)
class JoinedBlock:
    """Tokens `before` to `after` of a plan: source, example and start of each piece, its end."""

    before: int
    after: int
    items: Items
    ends: list[int]

    def place(self, low: int, high: int, found: list[Placement]) -> None:
        """Add what stands between two tokens to a row that begins at `low`."""
        item = bisect_right(self.ends, low)
        begin = self.ends[item - 1] if item else self.before
        while begin < high and item < len(self.ends):
            source, example, start = self.items[item]
            end, first = self.ends[item], max(begin, low)
            size = min(end, high) - first
            found.append(Placement(source, example, start + first - begin, size, 0, first - low))
            begin, item = end, item + 1


class Padded:
    """One whole example a row and padding behind it (the paper); text in joined rows between."""

    def __init__(self, quotas: Sequence[Quota], row_length: int, key: str) -> None:
        self.row_length, self.key = row_length, key
        text = [number for number, quota in enumerate(quotas) if quota.divisible]
        self.numbers = [number for number in range(len(quotas)) if number not in text]
        self.whole = [replace(quotas[number], by_count=True) for number in self.numbers]
        self.text = Joined(quotas, text, row_length, key)
        self.num_rows = len(self.text) + sum(quota.examples for quota in self.whole)
        self.num_blocks = max(1, self.num_rows // BLOCK_ROWS)

    def __len__(self) -> int:
        return self.num_rows

    def sees_all(self, index: int) -> bool:
        """Whether the documents of the row see each other."""
        return self._find(index)[0] == len(self.whole)

    def row(self, index: int) -> list[Placement]:
        """What stands in a row."""
        number, place = self._find(index)
        if number == len(self.whole):
            return self.text.row(place)
        found = self.whole[number].stream.places(place, place + 1)
        example, length, caption = (
            int(values[0]) for values in (found.examples, found.lengths, found.captions)
        )
        return [Placement(self.numbers[number], example, 0, length, caption, 0)]

    def _bounds(self, block: int) -> list[int]:
        # Examples of each source, and rows of text, before a block.
        whole = [quota.before(block, self.num_blocks) for quota in self.whole]
        return [*whole, len(self.text) * block // self.num_blocks]

    def _find(self, index: int) -> tuple[int, int]:
        """Which source a row is of (behind the last one: text), and its place there."""
        block = index * self.num_blocks // self.num_rows
        while sum(self._bounds(block + 1)) <= index:
            block += 1
        while sum(self._bounds(block)) > index:
            block -= 1
        low, high = self._bounds(block), self._bounds(block + 1)
        size = sum(high) - sum(low)
        inside = np.array([index - sum(low)])
        slot = int(permuted(inside, size, f"{self.key}/block {block}")[0])
        for number, (first, last) in enumerate(zip(low, high, strict=True)):
            if slot < last - first:
                return number, first + slot
            slot -= last - first
        raise AssertionError("the slots of a block are those of its sources")
