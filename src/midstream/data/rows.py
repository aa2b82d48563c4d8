"""From prepared sources and a budget to rows: lengths into the plan, its placements into arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from midstream.batch import IGNORE, PADDING, Row
from midstream.config import Budget, Rows
from midstream.data.mixture import Supply, names_of
from midstream.data.packing import RowPlan, make_plan
from midstream.data.sources import Source
from midstream.tokens import TokenCount


class SourceLengths:
    """The lengths of a source's examples in a row, `num_patches` for each picture."""

    def __init__(self, source: Source, num_patches: int) -> None:
        self.source, self.num_patches = source, num_patches

    def __len__(self) -> int:
        return len(self.source)

    @property
    def total(self) -> int:
        """Sum over all examples."""
        return self.source.num_tokens + self.num_patches * self.source.num_images

    def of(self, examples: np.ndarray) -> np.ndarray:
        """The length of each of these examples."""
        found: np.ndarray = self._before(examples + 1) - self._before(examples)
        return found

    def totals(self, chunks: np.ndarray, size: int) -> np.ndarray:
        """Summed length of each chunk of `size` examples."""
        ends = np.minimum((chunks + 1) * size, len(self))
        found: np.ndarray = self._before(ends) - self._before(chunks * size)
        return found

    def _before(self, examples: np.ndarray) -> np.ndarray:
        found = self.source.before(examples)
        before: np.ndarray = found[:, 0] + self.num_patches * found[:, 1]
        return before


def plan_rows(
    sources: Mapping[str, Source], num_patches: int, budget: Budget, rows: Rows, seed: int
) -> RowPlan:
    """Plan a whole stage from lengths alone.

    Raises ValueError for an example that must stay whole and is longer than a row (with its
    record), an unknown source, an empty one, or a budget that cannot be met.
    """
    names = names_of(budget)
    missing = [name for name in names if name not in sources]
    if missing:
        raise ValueError(f"no source {missing[0]!r} in the data; it holds {sorted(sources)}")
    for name in names:
        _check_longest(sources[name], num_patches, rows.row_length)
    supplies = [
        Supply(name, SourceLengths(sources[name], num_patches), sources[name].kind == "text")
        for name in names
    ]
    return make_plan(supplies, budget, rows, seed)


def _check_longest(source: Source, num_patches: int, row_length: int) -> None:
    if source.kind == "text":
        return
    for shown, found in source.index["longest"].items():
        length = found["tokens"] + (num_patches if shown == "image" else 0)
        if length > row_length:
            raise ValueError(
                f"source {source.name!r}, {found['where']}: {length} positions do not fit into a "
                f"row of {row_length}; raise row_length, or leave such records out "
                "(midstream prepare --max-tokens)"
            )


def build_row(plan: RowPlan, sources: Mapping[str, Source], index: int, num_patches: int) -> Row:
    """Row `index` of the plan as arrays of `row_length` positions."""
    length = plan.rows.row_length
    joined = plan.layout.sees_all(index)
    input_ids = np.zeros(length, dtype=np.int64)
    targets = np.full(length, IGNORE, dtype=np.int64)
    position_ids = np.zeros(length, dtype=np.int64)
    segment_ids = np.full(length, PADDING, dtype=np.int64)
    positions = np.arange(length)
    image_starts: list[int] = []
    images: list[tuple[int, int]] = []
    counts: dict[str, TokenCount] = {}
    names, placements = plan.names, plan.layout.row(index)
    end = 0
    for segment, placed in enumerate(placements):
        source = sources[names[placed.source]]
        shard, local = source.locate(placed.example)
        patches = num_patches if shard.images is not None and shard.images[local, 0] >= 0 else 0
        column, end = placed.column, placed.column + placed.length
        if patches:
            image_starts.append(column)
            images.append((placed.source, placed.example))
        low = int(shard.offsets[local]) + placed.start
        high = low + placed.length - patches
        input_ids[column + patches : end] = shard.tokens[low:high]
        last = min(high + 1, int(shard.offsets[local + 1]))
        following = shard.tokens[low + 1 : last]
        if shard.supervised is not None:
            following = np.where(shard.supervised[low + 1 : last] > 0, following, IGNORE)
        targets[column + patches : column + patches + len(following)] = following
        if joined and column and targets[column - 1] == IGNORE:
            # OpenLM's rows: the end of a document predicts the beginning of the next one.
            targets[column - 1] = input_ids[column]
        if not joined:
            segment_ids[column:end] = segment
            position_ids[column:end] = positions[: placed.length]
        counted = TokenCount(**{source.kind: placed.length - patches, "image": patches})
        counts[source.name] = counts.get(source.name, TokenCount()) + counted
    if joined:
        segment_ids[:end], position_ids[:end] = 0, positions[:end]
    for placed in placements:
        here = targets[placed.column : placed.column + placed.length]
        counts[names[placed.source]] += TokenCount(
            target=int(np.count_nonzero(here != IGNORE))
        )
    return Row(
        input_ids=input_ids,
        targets=targets,
        position_ids=position_ids,
        segment_ids=segment_ids,
        image_starts=np.array(image_starts, dtype=np.int64),
        images=np.array(images, dtype=np.int64).reshape(-1, 2),
        counts=sum(counts.values(), TokenCount(pad=length - end)),
        sources=counts,
    )


def shares_report(
    plan: RowPlan, sources: Mapping[str, Source], num_patches: int
) -> dict[str, dict[str, Any]]:
    """By source: planned and realised tokens, examples, passes and the largest example it has."""
    report: dict[str, dict[str, Any]] = {}
    for quota in plan.quotas:
        source, examples = sources[quota.name], quota.examples
        if quota.divisible and quota.tokens:
            # The example that the budget ends in counts.
            examples = quota.stream.count_before(2 * quota.tokens)
        longest = [
            found["tokens"] + (num_patches if shown == "image" else 0)
            for shown, found in source.index["longest"].items()
        ]
        report[quota.name] = {
            "kind": source.kind,
            "planned_tokens": quota.planned_tokens,
            "planned_sequences": quota.planned_sequences,
            "realised_tokens": quota.tokens,
            "examples": examples,
            "epochs": quota.tokens / quota.stream.lengths.total,
            "largest_example_tokens": max(longest, default=0),
        }
    return report
