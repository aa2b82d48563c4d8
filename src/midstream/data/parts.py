"""Where the texts and pictures of an example stand in a row, and where a long document is cut.

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


def pieces_of(
    places: Sequence[int], num_tokens: int, row_length: int, num_patches: int
) -> list[int]:
    """The lengths of the pieces that a document is cut into, each at most a row.

    It is cut between its parts: texts, and pictures with their separator. A text that is longer
    than a row goes on where its room ends; no picture is.
    """
    # Before each picture its text, which there may be none of.
    parts, at = list[int](), 0
    for place in places:
        parts += [place - at, num_patches + 1]
        at = place + 1
    pieces = [0]
    for part in [*parts, num_tokens - at]:
        if part > row_length:
            part -= (room := row_length - pieces[-1])
            pieces[-1] += room
            whole, part = divmod(part, row_length)
            pieces += [row_length] * whole
        if pieces[-1] + part > row_length:
            pieces.append(0)
        pieces[-1] += part
    return [piece for piece in pieces if piece]
