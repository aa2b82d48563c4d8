"""How often a stage shows each picture of a source: from its plan and the pictures' hashes."""

import numpy as np

from midstream.data.sources import Source
from midstream.order.mixture import Quota
from midstream.study.results import PictureViews

# Sources of more examples are not counted: their hashes and what sorts them take 60 bytes each.
MOST_EXAMPLES = 2**25
EXAMPLES_AT_ONCE = 2**16


def picture_views(quota: Quota, source: Source) -> PictureViews | None:
    """The views of a source's pictures in a plan; examples that share a picture's bytes add up.

    None for a source without pictures, and for one of more than MOST_EXAMPLES examples.
    """
    if quota.divisible or not source.num_images or len(source) > MOST_EXAMPLES:
        return None
    views = quota.views()
    seen, hashes = [np.zeros(0, np.int64)], [np.zeros((0, 16), np.uint8)]
    taken = np.flatnonzero(views)
    for low in range(0, len(taken), EXAMPLES_AT_ONCE):
        block = taken[low : low + EXAMPLES_AT_ONCE]
        block = block[source.sizes_of(block, np.zeros_like(block))[:, 1] > 0]
        seen.append(block)
        hashes.append(source.hashes_of(block))
    numbers = views[np.concatenate(seen)].astype(np.int64)
    keys = np.concatenate(hashes).view("S16")[:, 0]
    pictures, which = np.unique(keys, return_inverse=True)
    times, how_many = np.unique(
        np.bincount(which, numbers, len(pictures)).astype(np.int64), return_counts=True
    )
    return PictureViews(
        distinct=len(pictures),
        views=int(numbers.sum()),
        times=tuple(zip(times.tolist(), how_many.tolist(), strict=True)),
    )
