"""What a step holds over all ranks: counted on the host, before the step is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch

from midstream.core.batch import Batch
from midstream.core.tokens import TokenCount
from midstream.train.parallel import Place

_WIDTH = len(fields(TokenCount))


@dataclass(frozen=True)
class StepTotals:
    """Counts of a step over all ranks, and the same by source; the pictures of each micro-batch;
    rows with a picture and the padding in them; `attended`, the sum over positions of how many each
    looks at; whether a rank was asked to stop.
    """

    counts: TokenCount
    sources: Mapping[str, TokenCount]
    num_images: tuple[int, ...]
    image_rows: int
    image_row_pad: int
    attended: int
    stop: bool


def totals_of(
    micro_batches: Sequence[Batch], place: Place, names: Sequence[str] = (), *, stop: bool = False
) -> StepTotals:
    """The sums over the ranks, of which each brings its own and equally many micro-batches.

    `names` are the sources that are counted; `stop` is whether this rank was asked to stop. One
    collective of the hosts.
    """
    image_rows = image_row_pad = attended = 0
    for batch in micro_batches:
        attended += int((batch.position_ids + 1)[batch.segment_ids >= 0].sum())
        shown = torch.unique(batch.image_slots[:, 0])
        image_rows += len(shown)
        image_row_pad += int((batch.segment_ids[shown] < 0).sum())
    nothing = TokenCount()
    held = [sum((batch.counts for batch in micro_batches), nothing)]
    for name in names:
        held.append(sum((batch.sources.get(name, nothing) for batch in micro_batches), nothing))
    mine = [int(stop), image_rows, image_row_pad, attended]
    mine += [number for counts in held for number in astuple(counts)]
    mine += [len(batch.images) for batch in micro_batches]
    asked, image_rows, image_row_pad, attended, *rest = map(int, place.sum(mine))
    end = _WIDTH * len(held)
    every = [TokenCount(*rest[at : at + _WIDTH]) for at in range(0, end, _WIDTH)]
    return StepTotals(
        counts=every[0],
        sources=dict(zip(names, every[1:], strict=True)),
        num_images=tuple(rest[end:]),
        image_rows=image_rows,
        image_row_pad=image_row_pad,
        attended=attended,
        stop=asked > 0,
    )
