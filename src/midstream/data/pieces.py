"""A row of a plan taken apart again: which example each part is, its text, and what is supervised.

For people who look at data, not for training.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from midstream.batch import IGNORE, Row
from midstream.data.examples import TextCodec
from midstream.data.packing import RowPlan
from midstream.data.rows import build_row
from midstream.data.sources import Source


@dataclass(frozen=True)
class Span:
    """A stretch of text that is all targets or not; `special` for a token that is no text."""

    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True)
class Piece:
    """What stands side by side in a row: an example, or a part of one.

    `picture` numbers it among the row's pictures; `before` stands before it. `continued`: it began
    in another row. `goes_on`: its end lies elsewhere; `following` is the token there that the last
    position has as its target.
    `left_out`: tokens that were cut off for good, since a row does not hold them.
    """

    where: str
    columns: range
    num_targets: int
    picture: int | None
    before: tuple[Span, ...]
    spans: tuple[Span, ...]
    continued: bool
    goes_on: bool
    following: tuple[Span, ...]
    left_out: int


def pieces_of(
    plan: RowPlan, sources: Mapping[str, Source], codec: TextCodec, index: int, num_patches: int
) -> tuple[Row, list[Piece]]:
    """Row `index` in arrays and in pieces; every target of the row is a supervised token of one.

    Raises ValueError with both numbers if the plan has no such row.
    """
    if not 0 <= index < len(plan):
        raise ValueError(
            f"row {index:,} is not in the plan: it has {len(plan):,} rows, 0 to {len(plan) - 1:,}"
        )
    row = build_row(plan, sources, index, num_patches)
    predicted = np.append(False, row.targets[:-1] != IGNORE)
    specials = _specials(codec)
    found: list[Piece] = []
    # Where documents see each other, the end of one may have the next one's beginning as target.
    joins, num_pictures = False, 0
    for placed in plan.layout.row(index):
        source = sources[plan.names[placed.source]]
        patches = num_patches if source.has_image(placed.example) else 0
        head = int(bool(patches) and source.begin_of_text is not None)
        first, end = placed.column + head + patches, placed.column + placed.length
        begin = row.input_ids[placed.column : placed.column + head].tolist()
        supervised = predicted[first:end].tolist()
        supervised[0] &= joins or bool(patches) or not placed.column
        length = patches + len(source.input_ids(placed.example, caption=placed.caption))
        behind = length - placed.start - placed.length
        goes_on = behind > 0 and plan.quotas[placed.source].divisible
        last = int(row.targets[end - 1])
        following = [last] if goes_on and last != IGNORE else []
        found.append(
            Piece(
                where=source.describe(placed.example, placed.caption),
                columns=range(placed.column, end),
                num_targets=int((row.targets[placed.column : end] != IGNORE).sum()),
                picture=num_pictures if patches else None,
                before=tuple(_spans(codec, specials, begin, [False] * head)),
                spans=tuple(_spans(codec, specials, row.input_ids[first:end].tolist(), supervised)),
                continued=placed.start > 0,
                goes_on=goes_on,
                following=tuple(_spans(codec, specials, following, [True] * len(following))),
                left_out=0 if goes_on else behind,
            )
        )
        num_pictures += patches > 0
        joins = plan.layout.sees_all(index) and not goes_on
    return row, found


def _specials(codec: TextCodec) -> dict[int, str]:
    added = codec.tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}


def _spans(
    codec: TextCodec, specials: Mapping[int, str], ids: Sequence[int], supervised: Sequence[bool]
) -> Iterator[Span]:
    tokens = list(zip(ids, supervised, strict=True))
    for (mark, special), run in groupby(tokens, key=lambda item: (item[1], specials.get(item[0]))):
        numbers = [token for token, _ in run]
        if special is not None:
            yield from (Span(special, mark, True) for _ in numbers)
        else:
            yield Span(codec.decode(numbers), mark, False)
