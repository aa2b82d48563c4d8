"""Rows dealt so that all who share them have as many pictures as any other."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

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
