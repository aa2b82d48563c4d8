"""Planned pieces -> fixed rows; positions, segments, targets.

The row plan is a table of placements (piece, first token, length, column); building row k reads
the plan and k alone.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from midstream.batch import IGNORE, PADDING, Row
from midstream.config import Epochs, Mixture, Rows
from midstream.data.mixture import LongExampleError, Order, Supply, permuted, plan_order, supply
from midstream.data.sources import Source
from midstream.tokens import TokenCount

# Rows are packed within blocks of this many rows' worth of tokens.
BLOCK_ROWS = 256


@dataclass(frozen=True)
class RowPlan:
    """Every row of a stage: placements `first[k]` to `first[k + 1]` make row k.

    A placement puts `length` positions of a piece, from its `start` on, at `column`.
    """

    order: Order
    supplies: tuple[Supply, ...]
    rows: Rows
    first: np.ndarray
    item: np.ndarray
    start: np.ndarray
    length: np.ndarray
    column: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def num_steps(self) -> int:
        """Optimiser steps; the last one may hold fewer rows."""
        return -(-len(self) // self.rows.batch_rows)

    @property
    def seen_tokens(self) -> int:
        """Positions that are not padding, over all rows."""
        return int(self.length.sum())


def plan_rows(
    sources: Mapping[str, Source],
    num_patches: int,
    budget: Mixture | Epochs,
    rows: Rows,
    seed: int,
) -> RowPlan:
    """Plan a whole stage from lengths alone.

    Raises ValueError for an image example longer than a row (with its record), a joined layout
    with images, an unknown source, or a budget that cannot be met.
    """
    names = budget.sources if isinstance(budget, Epochs) else [s.source for s in budget.shares]
    missing = [name for name in names if name not in sources]
    if missing:
        raise ValueError(f"no source {missing[0]!r} in the data; it holds {sorted(sources)}")
    supplies = [_supply_of(sources[name], num_patches, rows) for name in names]
    order = plan_order(supplies, budget, seed)
    by_name = {item.name: item for item in supplies}
    # Sources whose budget is less than half an example come last: reported, in no row.
    used = [by_name[name] for name in order.names]
    supplies = used + [item for item in supplies if item.name not in order.names]
    lengths = np.zeros(len(order.piece), dtype=np.int64)
    image = np.zeros(len(order.piece), dtype=bool)
    for index, item in enumerate(used):
        mine = order.source == index
        lengths[mine] = item.lengths[order.piece[mine]]
        image[mine] = sources[item.name].has_images[item.examples[order.piece[mine]]]
    if rows.layout == "joined":
        if image.any():
            raise ValueError("the joined layout is for text only; choose filled or padded")
        table = _join(lengths, rows.row_length)
    else:
        alone = image if rows.layout == "padded" else np.zeros_like(image)
        table = _fill(lengths, alone, rows.row_length, seed)
    return RowPlan(order, tuple(supplies), rows, *table)


def build_row(plan: RowPlan, sources: Mapping[str, Source], index: int, num_patches: int) -> Row:
    """Row `index` of the plan as arrays of `row_length` positions."""
    length = plan.rows.row_length
    joined = plan.rows.layout == "joined"
    input_ids = np.zeros(length, dtype=np.int64)
    targets = np.full(length, IGNORE, dtype=np.int64)
    position_ids = np.zeros(length, dtype=np.int64)
    segment_ids = np.full(length, PADDING, dtype=np.int64)
    image_starts: list[int] = []
    images: list[tuple[int, int]] = []
    counts = {"text": 0, "caption": 0, "instruct": 0, "image": 0}
    end = 0
    for segment, place in enumerate(range(int(plan.first[index]), int(plan.first[index + 1]))):
        item, column, size = (int(x[place]) for x in (plan.item, plan.column, plan.length))
        number = int(plan.order.source[item])
        pieces, source = plan.supplies[number], sources[plan.order.names[number]]
        piece = int(plan.order.piece[item])
        example = int(pieces.examples[piece])
        start = int(pieces.starts[piece]) + int(plan.start[place])
        patches = num_patches if source.images is not None and source.images[example, 0] >= 0 else 0
        if patches:
            image_starts.append(column)
            images.append((number, example))
        end = column + size
        text = slice(column + patches, end)
        low = int(source.offsets[example]) + start
        input_ids[text] = source.tokens[low : low + size - patches]
        following = _following(source, example, low, low + size - patches)
        targets[text][: len(following)] = following
        if joined and column and targets[column - 1] == IGNORE:
            # OpenLM's rows: the end of a document predicts the beginning of the next one.
            targets[column - 1] = input_ids[column]
        segment_ids[column:end] = 0 if joined else segment
        position_ids[column:end] = np.arange(column, end) if joined else np.arange(size)
        counts[source.kind] += size - patches
        counts["image"] += patches
    return Row(
        input_ids=input_ids,
        targets=targets,
        position_ids=position_ids,
        segment_ids=segment_ids,
        image_starts=np.array(image_starts, dtype=np.int64),
        images=np.array(images, dtype=np.int64).reshape(-1, 2),
        counts=TokenCount(**counts, pad=length - end, target=int((targets != IGNORE).sum())),
    )


def _following(source: Source, example: int, low: int, high: int) -> np.ndarray:
    """The supervised token behind each of tokens[low:high], IGNORE elsewhere."""
    last = min(high + 1, int(source.offsets[example + 1]))
    found = source.tokens[low + 1 : last].astype(np.int64)
    if source.supervised is not None:
        found = np.where(source.supervised[low + 1 : last] > 0, found, IGNORE)
    return found


def _supply_of(source: Source, num_patches: int, rows: Rows) -> Supply:
    patches = source.has_images.astype(np.int64) * num_patches
    if source.kind == "instruct":
        # A conversation is not cut, with or without a picture.
        tokens = np.diff(source.offsets) + patches
        longest = int(tokens.argmax())
        if tokens[longest] > rows.row_length:
            raise _named(source, longest, int(tokens[longest]), rows.row_length)
    try:
        return supply(source.name, np.diff(source.offsets), patches, rows.row_length)
    except LongExampleError as error:
        raise _named(source, error.example, error.length, rows.row_length) from None


def _named(source: Source, example: int, length: int, row_length: int) -> ValueError:
    return ValueError(
        f"{source.describe(example)}: {length} positions do not fit into a row of {row_length}; "
        "raise row_length or shorten the record"
    )


Table = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _join(lengths: np.ndarray, row_length: int) -> Table:
    """Pieces one behind the other, cut at multiples of the row length."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends - lengths, np.arange(0, total, row_length))
    item = np.searchsorted(ends, cuts, side="right")
    size = np.diff(np.append(cuts, total))
    start = cuts - (ends - lengths)[item]
    first = np.searchsorted(cuts, np.arange(0, total + row_length, row_length))
    first[-1] = len(cuts)
    return first, item, start, size, cuts % row_length


def _fill(lengths: np.ndarray, alone: np.ndarray, row_length: int, seed: int) -> Table:
    """Whole pieces into rows, block by block, each into the fullest row that it fits."""
    rows: list[list[int]] = []
    block = np.cumsum(lengths) // (BLOCK_ROWS * row_length)
    num_blocks = int(block[-1]) + 1 if len(block) else 0
    bounds = np.searchsorted(block, np.arange(num_blocks + 1))
    for number in range(num_blocks):
        items = np.arange(bounds[number], bounds[number + 1])
        packed = _best_fit(items, lengths, alone, row_length)
        # Packing sorts by length; the seeded order keeps every part of the block alike.
        order = permuted(np.arange(len(packed)), len(packed), f"{seed}/block {number}")
        rows += [packed[index] for index in order]
    item = np.array([piece for row in rows for piece in row], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    size = lengths[item]
    ends = np.cumsum(size)
    row_start = np.append(0, ends)[first[:-1]]
    column = ends - size - np.repeat(row_start, np.diff(first))
    return first, item, np.zeros(len(item), np.int64), size, column


def _best_fit(
    items: np.ndarray, lengths: np.ndarray, alone: np.ndarray, row_length: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for item in items[np.argsort(-lengths[items], kind="stable")]:
        size = int(lengths[item])
        at = len(room) if alone[item] else bisect_left(room, (size, -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(int(item))
        else:
            left, row = row_length, len(rows)
            rows.append([int(item)])
        if not alone[item] and left - size > 0:
            insort(room, (left - size, row))
    return [sorted(row) for row in rows]


def shares_report(plan: RowPlan, sources: Mapping[str, Source]) -> dict[str, dict[str, object]]:
    """By source: planned and realised tokens, examples, epochs and the largest it has."""
    report: dict[str, dict[str, object]] = {}
    for number, item in enumerate(plan.supplies):
        pieces = plan.order.piece[plan.order.source == number]
        report[item.name] = {
            "planned_tokens": plan.order.planned_tokens[item.name],
            "realised_tokens": plan.order.realised_tokens[item.name],
            "examples": len(pieces),
            "epochs": len(pieces) / len(item.lengths),
            "largest_example_tokens": int(item.lengths.max()),
            "kind": sources[item.name].kind,
        }
    return report
