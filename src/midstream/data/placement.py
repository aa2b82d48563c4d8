"""What the layouts of rows share: placements, blocks, what is kept of them."""

from typing import Any, NamedTuple

# Rows that are laid out at once.
BLOCK_ROWS = 1024
KEPT_BLOCKS = 3

# Each is source, example, start, length and caption, then the column where that is known.
Items = list[list[int]]


class Placement(NamedTuple):
    """`length` positions of an example, from its position `start` on, at `column` of a row.

    `source` numbers the plan's `names`. An example's image patches are its first positions.
    `caption` is 0 for the example's own text, n for its picture's n-th synthetic caption.
    """

    source: int
    example: int
    start: int
    length: int
    caption: int
    column: int


def without_cache(layout: Any) -> dict[str, Any]:
    """The state of a layout without what it keeps: that is made anew in a worker process."""
    return {name: value for name, value in layout.__dict__.items() if not name.startswith("_")}
