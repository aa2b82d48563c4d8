"""How many rows whole examples take side by side, and how long the longest of some is: expected
from their lengths alone, by laying out a sample as `data/filling.py` lays out a block.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import cache
from math import ceil

from midstream.study.sources import Number

# Lengths and how many examples have them, in ascending order.
Points = tuple[tuple[Number, Number], ...]
# Rows that are laid out to find out: those of a block in `data/placement.py`.
BLOCK_ROWS = 1024


@cache
def rows_of(points: Points, row_length: int) -> int:
    """Rows that whole examples take: longest first, each into the fullest row that it fits."""
    number = sum(count for _, count in points)
    if not number:
        return 0
    held = sum(length * count for length, count in points)
    # A plan of several blocks is a block, several times.
    blocks = max(1, round(held / (BLOCK_ROWS * row_length)))
    lengths = _drawn(points, ceil(number / blocks))
    room: list[int] = []
    rows = 0
    for length in reversed(lengths):
        at = bisect_left(room, length)
        if at < len(room):
            left = room.pop(at) - length
        else:
            left, rows = row_length - length, rows + 1
        if left > 0:
            insort(room, left)
    return ceil(rows * number / len(lengths))


def _drawn(points: Points, number: int) -> list[int]:
    """This many lengths that stand for all, in ascending order."""
    total = sum(count for _, count in points)
    found: list[int] = []
    upto = 0.0
    for length, count in points:
        upto += count / total
        found += [round(length)] * (round(upto * number) - len(found))
    return found


def longest_of(points: Sequence[tuple[Number, Number]], number: int) -> Number:
    """The longest of `number` examples drawn from these lengths, as expected."""
    total = sum(count for _, count in points)
    below = longest = upto = 0.0
    for length, count in points:
        upto += count / total
        longest += length * (min(upto, 1.0) ** number - below**number)
        below = min(upto, 1.0)
    return longest
