"""Rows that items are put into: whole, in pieces of whole parts, or cut anywhere; and rows dealt so
that all who share them have as many pictures as any other."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, combinations
from math import inf

import numpy as np

# Each is source, example, start, length and caption, then the column once it is placed.
Items = list[list[int]]
# Pieces that are looked at, of all sizes, for a pair that fills a row.
LOOK_AHEAD = 32
# A row is full where at most one position in so many is left.
FULL = 1024


class Packer:
    """Rows that items (source, example, start, length, caption) are put into."""

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self.rows: list[Items] = []
        # (positions left, row) of the rows that are not full, in ascending order.
        self._room: list[tuple[int, int]] = []

    def add_all(self, items: np.ndarray) -> None:
        """Put each into the fullest row that it fits, or a new one, the largest first."""
        for item in items[np.argsort(-items[:, 3], kind="stable")].tolist():
            self.add(item)

    def add(self, item: list[int], max_rows: int | None = None) -> bool:
        """Put an item into the fullest row that it fits, or a new one; False if there is none."""
        size = item[3]
        at = bisect_left(self._room, (size, -1))
        if at < len(self._room):
            left, row = self._room.pop(at)
        elif max_rows is None or len(self.rows) < max_rows:
            left, row = self.row_length, len(self.rows)
            self.rows.append([])
        else:
            return False
        self.rows[row].append([*item, self.row_length - left])
        if left > size:
            insort(self._room, (left - size, row))
        return True

    def pour(self, items: list[list[int]]) -> None:
        """Cut items to fill the emptiest rows."""
        for source, example, start, length, caption in items:
            while length:
                left, row = self._room.pop()
                size = min(left, length)
                column = self.row_length - left
                self.rows[row].append([source, example, start, size, caption, column])
                start, length = start + size, length - size
                if left > size:
                    insort(self._room, (left - size, row))

    def spread(self, num_rows: int) -> None:
        """Bring the rows to their fixed number: from those with the most items, one each."""
        while len(self.rows) < num_rows:
            fullest = max(range(len(self.rows)), key=lambda row: len(self.rows[row]))
            many = len(self.rows[fullest]) > 1
            self.rows.append([[*self.rows[fullest].pop()[:-1], 0]] if many else [])

    def fill(self, documents: Items, parts: Sequence[Sequence[int]]) -> None:
        """Put documents in pieces of whole parts, whose lengths are given, into what is left of the
        rows, the emptiest first, and into new ones; a part longer than a row is cut at its length.

        A row takes the piece, of all that begin or end what is left of a document, which fills it
        alone or with another one.
        """
        pieces = _Pieces(parts, self.row_length)
        rows, self._room = self._room, []
        while pieces.sizes:
            if rows:
                left, row = rows.pop()
            else:
                left, row = self.row_length, len(self.rows)
                self.rows.append([])
            while left and (found := pieces.take(left)):
                size, number, begin = found
                source, example, start, _, caption = documents[number]
                item = [source, example, start + begin, size, caption, self.row_length - left]
                self.rows[row].append(item)
                left -= size
            if left:
                insort(self._room, (left, row))
        self._room = sorted(self._room + rows)


class _Pieces:
    """Pieces of documents that are left, by size: what begins or ends the rest of a document."""

    def __init__(self, parts: Sequence[Sequence[int]], longest: int) -> None:
        self.longest = longest
        # Before each part of a document and behind its last.
        self.bounds = [
            list(accumulate((piece for part in one for piece in _cut(part, longest)), initial=0))
            for one in parts
        ]
        self.rest = [(0, len(bounds) - 1) for bounds in self.bounds]
        # (size, document, first part, part behind the last), in ascending order.
        self.sizes = sorted(one for number in range(len(parts)) for one in self._ends(number))

    def take(self, room: int) -> tuple[int, int, int] | None:
        """Size, document and first position of the piece that, alone or with one of another
        document, leaves least of so much room; None where none fits."""
        at = self._largest(room)
        if at < 0:
            return None
        best, least = at, room - self.sizes[at][0]
        for one in range(at, -1, -max(1, (at + 1) // LOOK_AHEAD)):
            if least <= self.longest // FULL:
                break
            size, number, *_ = self.sizes[one]
            other = self._largest(room - size)
            if other >= 0 and self.sizes[other][1] != number:
                left = room - size - self.sizes[other][0]
                if left < least:
                    best, least = one, left
        size, number, low, high = self.sizes[best]
        for gone in self._ends(number):
            del self.sizes[bisect_left(self.sizes, gone)]
        first, last = self.rest[number]
        self.rest[number] = (high, last) if low == first else (first, low)
        for new in self._ends(number):
            insort(self.sizes, new)
        return size, number, self.bounds[number][low]

    def _largest(self, room: int) -> int:
        return bisect_right(self.sizes, (room, inf)) - 1

    def _ends(self, number: int) -> list[tuple[int, int, int, int]]:
        bounds, (first, last) = self.bounds[number], self.rest[number]
        # What begins or ends it is longer with each part.
        begin = bisect_right(bounds, bounds[first] + self.longest, first, last + 1)
        end = max(bisect_left(bounds, bounds[last] - self.longest, first, last), first + 1)
        runs = [
            *((first, at) for at in range(first + 1, begin)),
            *((at, last) for at in range(end, last)),
        ]
        return [(bounds[high] - bounds[low], number, low, high) for low, high in runs]


def _cut(part: int, longest: int) -> list[int]:
    whole, left = divmod(part, longest)
    return [longest] * whole + [left] * (left > 0)


# Of the table of sums that two shares are made alike by, about 128 MB.
MOST_BITS = 2**31


def deal_parts(
    rows: Sequence[int], pictures: Callable[[int], int], num_ranks: int, most_rows: int
) -> list[list[list[int]]]:
    """The rows of a step by rank and micro-batch; `pictures` says how many a row shows.

    Ranks have as many rows as any other or one more, and of pictures too where rows allow it (see
    `deal`); so have the micro-batches of each, of at most `most_rows`. Those with the most pictures
    come first, so that ranks are alike in each; their number is the same for all ranks.
    """
    shown = {row: pictures(row) for row in rows}
    num_parts = -(-len(rows) // (num_ranks * most_rows))
    found = []
    for rank in _dealt(rows, shown, num_ranks):
        parts = _dealt(rank, shown, num_parts)
        found.append(sorted(parts, key=lambda part: -sum(map(shown.__getitem__, part))))
    return found


def _dealt(rows: Sequence[int], shown: Mapping[int, int], num_shares: int) -> list[list[int]]:
    least, more = divmod(len(rows), num_shares)
    sizes = [least + (at < more) for at in range(num_shares)]
    return [[rows[at] for at in share] for share in deal([shown[row] for row in rows], sizes)]


def deal(pictures: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Rows 0 to n - 1, which show so many pictures, in shares of `sizes` rows; each ascends.

    No two shares can be made more alike in pictures by exchanging rows between them: of two
    shares the best possible, of more within one picture but for rows of very unequal numbers.
    Steps of thousands of rows, whose table of sums would be larger than MOST_BITS, stay as they
    are dealt first: the largest first, each to whoever has the fewest.
    The same numbers give the same shares on every machine. `sizes` must add up to n.
    """
    assert sum(sizes) == len(pictures), "every row is dealt once"
    shares: list[list[int]] = [[] for _ in sizes]
    totals = [0] * len(sizes)
    # The largest first, each to whoever has the fewest pictures and room.
    for row in sorted(range(len(pictures)), key=lambda row: -pictures[row]):
        free = (at for at, share in enumerate(shares) if len(share) < sizes[at])
        least = min(free, key=lambda at: (totals[at], at))
        shares[least].append(row)
        totals[least] += pictures[row]
    while _exchange(shares, totals, pictures):
        pass
    return [sorted(share) for share in shares]


def _exchange(shares: list[list[int]], totals: list[int], pictures: Sequence[int]) -> bool:
    """Make the first pair of shares that can be more alike as alike as possible; whether there was
    one. The most unequal pair comes first."""
    pairs = [pair for pair in combinations(range(len(shares)), 2) if _apart(totals, *pair) > 1]
    for one, other in sorted(pairs, key=lambda pair: -_apart(totals, *pair)):
        rows = shares[one] + shares[other]
        held = [pictures[row] for row in rows]
        if len(held) ** 2 * (sum(held) + 1) > MOST_BITS:
            continue
        chosen = _halved(held, len(shares[one]))
        half = sum(held[at] for at in chosen)
        if abs(sum(held) - 2 * half) < _apart(totals, one, other):
            shares[one] = [rows[at] for at in chosen]
            shares[other] = [row for at, row in enumerate(rows) if at not in set(chosen)]
            totals[one], totals[other] = half, sum(held) - half
            return True
    return False


def _apart(totals: Sequence[int], one: int, other: int) -> int:
    return abs(totals[one] - totals[other])


def _halved(numbers: Sequence[int], size: int) -> list[int]:
    """Places of `size` of the numbers (not negative) whose sum is nearest to half of all."""
    total = sum(numbers)
    width = total + 1
    # Bit `count * width + sum` of the k-th: so many of the first k numbers have this sum.
    reached = [1]
    for number in numbers:
        reached.append(reached[-1] | reached[-1] << width + number)
    sums = reached[-1] >> size * width & (1 << width) - 1
    nearest = min(range(width), key=lambda one: (not sums >> one & 1, abs(2 * one - total)))
    left, chosen = size * width + nearest, list[int]()
    for at in reversed(range(len(numbers))):
        if not reached[at] >> left & 1:
            chosen.append(at)
            left -= width + numbers[at]
    return chosen
