"""How often a stage shows each picture of a source: from its plan and the pictures' hashes."""

import numpy as np

from midstream.data.sources import Source
from midstream.order.mixture import Quota
from midstream.study.results import PictureViews

# Sources of more examples or pictures are not counted: their hashes and what sorts them take 48
# bytes each.
MOST_PICTURES = 2**25
EXAMPLES_AT_ONCE = 2**16


def picture_views(quota: Quota, source: Source) -> PictureViews | None:
    """The views of a source's pictures in a plan; examples that share a picture's bytes add up.

    None for a source without pictures, and for one of more than MOST_PICTURES examples or
    pictures.
    """
    if (
        quota.divisible
        or not source.num_images
        or max(len(source), source.num_images) > MOST_PICTURES
    ):
        return None
    numbers, hashes = _taken(quota, source)
    order = np.argsort(hashes)
    hashes, numbers = hashes[order], numbers[order]
    del order
    # Where another picture begins.
    begins = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))[: len(hashes)]
    del hashes
    each = np.add.reduceat(numbers, begins, dtype=np.int64) if len(begins) else numbers
    times, how_many = np.unique(each, return_counts=True)
    return PictureViews(
        distinct=len(each),
        views=int(each.sum()),
        times=tuple(zip(times.tolist(), how_many.tolist(), strict=True)),
    )


def _taken(quota: Quota, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Views (uint32 [n], above 0) and hashes (S16 [n]) of the pictures of the examples taken."""
    views = quota.views()
    taken = np.flatnonzero(views)
    most = source.num_images
    numbers, hashes, at = np.zeros(most, np.uint32), np.zeros((most, 16), np.uint8), 0
    for low in range(0, len(taken), EXAMPLES_AT_ONCE):
        found = source.pictures_of(taken[low : low + EXAMPLES_AT_ONCE])
        here = slice(at, at + len(found.which))
        numbers[here], hashes[here] = views[found.which[:, 0]], found.hashes
        at = here.stop
    return numbers[:at], hashes[:at].view("S16")[:, 0]
