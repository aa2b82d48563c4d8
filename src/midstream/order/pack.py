"""Rows that items are put into: whole, in pieces of whole parts, or cut anywhere."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate
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
