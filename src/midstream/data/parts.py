"""Where the texts and pictures of an example stand in a row.

A picture has its positions before the token of its place, which is the separator that ends it.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """What stands side by side in a piece of an example, from the piece's `column` on: its tokens
    `low` to `high`, or its picture of this number. `before_picture`: a picture follows these."""

    column: int
    low: int
    high: int
    picture: int | None = None
    before_picture: bool = False


def runs_of(places: Sequence[int], start: int, size: int, num_patches: int) -> list[Run]:
    """The runs of `size` positions of an example, from its position `start` on.

    Each picture takes `num_patches` positions before the token of `places`; no piece begins or ends
    in one.
    """
    if not places or not num_patches:
        return [Run(0, start, start + size)]
    found, end, at = list[Run](), start + size, 0
    for number, place in enumerate(places):
        # Of the tokens up to this picture those of the piece; they stand so far behind their own.
        shift = number * num_patches
        low, high = max(at, start - shift), min(place, end - shift)
        if high > low:
            found.append(Run(low + shift - start, low, high, before_picture=high == place))
        if start <= place + shift < end:
            found.append(Run(place + shift - start, place, place, number))
        at = place
    shift = len(places) * num_patches
    if end - shift > (low := max(at, start - shift)):
        found.append(Run(low + shift - start, low, end - shift))
    return found
