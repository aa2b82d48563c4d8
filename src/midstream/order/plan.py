"""A stage's row plan: row k by its number, in filled, joined or padded rows."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from math import isqrt
from typing import NamedTuple

import numpy as np

from midstream.config import Budget, Rows
from midstream.order.mixture import Quota, Supply, interleaved, quotas_of
from midstream.order.pack import Items, Packer
from midstream.order.stream import Kept, permuted, pieces_of

# Rows that are laid out at once.
BLOCK_ROWS = 1024
KEPT_BLOCKS = 4


class Placement(NamedTuple):
    """`length` positions of an example, from its position `start` on, at `column` of a row.

    `source` numbers the plan's `names`. A picture's patches stand before its separator.
    `caption` is 0 for the example's own text, n for its picture's n-th synthetic caption.
    """

    source: int
    example: int
    start: int
    length: int
    caption: int
    column: int


# How full packed rows are made, in thousandths: what is left lets nearly every text stay whole.
FILL = 997
# Documents are cut finer where rows would be less full than this, in thousandths.
LEAST_FULL = 990
# Plans of up to this many blocks know each block's rows; larger ones give all blocks the same
# number: that of the fullest of this many and spare ones.
CHECKED_BLOCKS = 512
# Placements are counted in this many blocks, and estimated from them in a plan of more.
COUNTED_BLOCKS = 64
# Raise it where rows of documents are laid out anew: a checkpoint is at one of them.
DOCUMENT_ROWS = 2
# Blocks that were not looked at differ by chance; a million of them stay within this.
SPARE_DEVIATIONS = 6


class Filled(Kept):
    """Examples side by side, kept apart by segments, each row as full as its block allows.

    A block has about BLOCK_ROWS rows, and their number is fixed when the plan is made. Whole
    examples go first, each into the fullest row that it fits, documents longer than a row in as few
    pieces as there may be (`pieces_of`), or in more of them where more than a hundredth would stay
    empty (`Packer.fill`); texts follow likewise, and those that fit nowhere are cut to fill what is
    left.
    """

    def __init__(self, quotas: Sequence[Quota], row_length: int, key: str) -> None:
        self.quotas, self.row_length, self.key = tuple(quotas), row_length, key
        tokens = sum(quota.tokens for quota in quotas)
        alone = sum(q.examples for q in quotas if q.by_count and not q.divisible)
        expected = max(1000 * tokens // (FILL * row_length), alone)
        self.num_blocks = max(1, round(expected / BLOCK_ROWS))
        checked = min(self.num_blocks, CHECKED_BLOCKS)
        blocks = [number * self.num_blocks // checked for number in range(checked)]
        self.first_rows, self.block_rows = [0], 0
        if checked == self.num_blocks:
            needed = (len(self._kept(block)) for block in blocks)
            self.first_rows = list(accumulate(needed, initial=0))
        else:
            self.block_rows = _rows_for_all([len(self._pack(block, None)) for block in blocks])

    def __len__(self) -> int:
        return self.num_blocks * self.block_rows or self.first_rows[-1]

    def sees_all(self, index: int) -> bool:
        """Whether the documents of the row see each other."""
        return False

    def num_placed(self, source: int) -> int:
        """The placements of a source in all rows, by COUNTED_BLOCKS of the blocks at most."""
        counted = min(self.num_blocks, COUNTED_BLOCKS)
        blocks = (number * self.num_blocks // counted for number in range(counted))
        rows = (row for block in blocks for row in self._kept(block))
        found = sum(item[0] == source for row in rows for item in row)
        return found * self.num_blocks // counted

    def row(self, index: int) -> list[Placement]:
        """The placements of a row, by column."""
        if self.block_rows:
            block, inside = divmod(index, self.block_rows)
        else:
            block = bisect_right(self.first_rows, index) - 1
            inside = index - self.first_rows[block]
        return list(map(Placement._make, self._kept(block)[inside]))

    @cached_property
    def _kept(self) -> Callable[[int], list[Items]]:
        return lru_cache(KEPT_BLOCKS)(self._shuffled)

    def _shuffled(self, block: int) -> list[Items]:
        packed = self._pack(block, self.block_rows or None)
        # Packing sorts by length; the seeded order keeps every part of the block alike.
        order = permuted(np.arange(len(packed)), len(packed), f"{self.key}/block {block}")
        return [packed[row] for row in order.tolist()]

    def _pack(self, block: int, num_rows: int | None) -> list[Items]:
        whole, text = self._items(block)
        tokens = int(whole[:, 3].sum() + text[:, 3].sum())
        packer = self._pack_whole(whole, tokens)
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

    def _pack_whole(self, whole: np.ndarray, tokens: int) -> Packer:
        """The rows of whole examples, in a block of so many tokens."""
        long = np.flatnonzero(whole[:, 3] > self.row_length)
        parts = [self.quotas[n].stream.lengths.parts(one) for n, one in whole[long, :2].tolist()]
        packer = Packer(self.row_length)
        packer.add_all(self._in_pieces(whole, long, parts))
        if len(long) and 1000 * tokens < LEAST_FULL * self.row_length * len(packer.rows):
            finer = Packer(self.row_length)
            finer.add_all(np.delete(whole, long, axis=0))
            finer.fill(whole[long].tolist(), parts)
            if len(finer.rows) < len(packer.rows):
                return finer
        return packer

    def _items(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """[items, 5] of Items' columns: whole examples, and text cut to rows."""
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

    def _in_pieces(
        self, items: np.ndarray, long: np.ndarray, parts: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Whole examples, the `long` ones in as few pieces of their parts as there may be."""
        pieces = [pieces_of(one, self.row_length) for one in parts]
        times = np.ones(len(items), dtype=np.int64)
        times[long] = list(map(len, pieces))
        found, first = np.repeat(items, times, axis=0), np.cumsum(times) - times
        for at, sizes in zip(first[long].tolist(), pieces, strict=True):
            here = slice(at, at + len(sizes))
            found[here, 3] = sizes
            found[here, 2] += np.cumsum([0, *sizes[:-1]])
        return found


def _rows_for_all(needed: Sequence[int]) -> int:
    """Rows that a block needs at most, from what some need, by whole numbers on every machine."""
    count, total = len(needed), sum(needed)
    spread = count * sum(rows * rows for rows in needed) - total * total
    likely = -(-total // count) + isqrt(SPARE_DEVIATIONS**2 * spread) // count + 1
    return max(likely, max(needed) + 2 + max(needed) // 500)


def rows_of_all(needed: Sequence[int], times: float) -> int:
    """Rows of a filled plan `times` as long as one whose blocks need so many."""
    rows = times * sum(needed)
    if round(rows / BLOCK_ROWS) > CHECKED_BLOCKS:
        rows *= _rows_for_all(needed) * len(needed) / sum(needed)
    return round(rows)


class Joined(Kept):
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

    def __len__(self) -> int:
        return -(-self.tokens // self.row_length)

    def sees_all(self, index: int) -> bool:
        """Whether the documents of the row see each other."""
        return True

    def row(self, index: int) -> list[Placement]:
        """The placements of a row, by column."""
        window, inside = divmod(index, BLOCK_ROWS)
        low = (window * BLOCK_ROWS + self._orders(window)[inside]) * self.row_length
        high = min(low + self.row_length, self.tokens)
        block = low * self.num_blocks // self.tokens
        kept = self._kept(block)
        while not kept.before <= low < kept.after:
            block += 1 if kept.before <= low else -1
            kept = self._kept(block)
        found: list[Placement] = []
        kept.place(low, high, found)
        while kept.after < high:
            block += 1
            kept = self._kept(block)
            kept.place(low, high, found)
        return found

    @cached_property
    def _orders(self) -> Callable[[int], list[int]]:
        # Rows of one long document would come one after the other.
        @lru_cache(KEPT_BLOCKS)
        def order(window: int) -> list[int]:
            size = min(BLOCK_ROWS, len(self) - window * BLOCK_ROWS)
            found: list[int] = permuted(np.arange(size), size, f"{self.key}/rows {window}").tolist()
            return found

        return order

    @cached_property
    def _kept(self) -> Callable[[int], "JoinedBlock"]:
        return lru_cache(KEPT_BLOCKS)(self._load)

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
        """Add the pieces between two tokens to a row that begins at `low`."""
        item = bisect_right(self.ends, low)
        begin = self.ends[item - 1] if item else self.before
        while begin < high and item < len(self.ends):
            source, example, start = self.items[item]
            end, first = self.ends[item], max(begin, low)
            size = min(end, high) - first
            found.append(Placement(source, example, start + first - begin, size, 0, first - low))
            begin, item = end, item + 1


class Padded(Kept):
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
        """The placements of a row, by column."""
        number, place = self._find(index)
        if number == len(self.whole):
            return self.text.row(place)
        found = self.whole[number].stream.places(place, place + 1)
        example, length, caption = (
            int(values[0]) for values in (found.examples, found.lengths, found.captions)
        )
        return [Placement(self.numbers[number], example, 0, length, caption, 0)]

    @cached_property
    def _kept(self) -> Callable[[int], tuple[int, list[tuple[int, int]]]]:
        return lru_cache(KEPT_BLOCKS)(self._load)

    def _load(self, block: int) -> tuple[int, list[tuple[int, int]]]:
        """The first row of a block, and what each of its rows is."""
        low, high = (
            [
                *(quota.before(number, self.num_blocks) for quota in self.whole),
                len(self.text) * number // self.num_blocks,
            ]
            for number in (block, block + 1)
        )
        bounds = enumerate(zip(low, high, strict=True))
        slots = [(number, place) for number, ends in bounds for place in range(*ends)]
        order = permuted(np.arange(len(slots)), len(slots), f"{self.key}/block {block}")
        return sum(low), [slots[slot] for slot in order.tolist()]

    def _find(self, index: int) -> tuple[int, int]:
        """Which source a row is of (behind the last one: text), and its place there."""
        block = index * self.num_blocks // self.num_rows
        while True:
            first, rows = self._kept(block)
            if first <= index < first + len(rows):
                return rows[index - first]
            block += 1 if first <= index else -1


@dataclass(frozen=True)
class RowPlan:
    """Every row of a stage."""

    quotas: tuple[Quota, ...]
    rows: Rows
    layout: Filled | Joined | Padded

    def __len__(self) -> int:
        return len(self.layout)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sources, as `Placement.source` numbers them."""
        return tuple(quota.name for quota in self.quotas)

    @property
    def num_steps(self) -> int:
        """Optimiser steps; the last one may hold fewer rows."""
        return -(-len(self) // self.rows.batch_rows)

    @property
    def seen_tokens(self) -> int:
        """Positions that are not padding, over all rows."""
        return sum(quota.tokens for quota in self.quotas)

    def examples_of(self, source: int, at_once: int = 4096) -> Iterator[np.ndarray]:
        """The whole examples that the plan takes of a source, some at a time, in its order."""
        quota = self.quotas[source]
        for low in range(0, quota.examples, at_once):
            yield quota.stream.places(low, min(low + at_once, quota.examples)).examples


def make_plan(supplies: Sequence[Supply], budget: Budget, rows: Rows, seed: int) -> RowPlan:
    """Plan a stage; nothing is listed, so that time and memory do not grow with the plan.

    Raises ValueError for an unknown source, a budget that cannot be met, or examples that stay
    whole in the joined layout.
    """
    quotas = tuple(quotas_of(supplies, budget, row_length=rows.row_length, seed=seed))
    length, key = rows.row_length, str(seed)
    if rows.layout == "filled":
        return RowPlan(quotas, rows, Filled(quotas, length, key))
    if rows.layout == "padded":
        return RowPlan(quotas, rows, Padded(quotas, length, key))
    if whole := [quota.name for quota in quotas if not quota.divisible]:
        raise ValueError(
            f"the joined layout is for text only, {whole} are none; choose filled or padded"
        )
    return RowPlan(quotas, rows, Joined(quotas, range(len(quotas)), length, key))
