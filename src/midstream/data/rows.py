"""From prepared sources and a budget to rows: lengths into the plan, its placements into arrays."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from midstream.batch import IGNORE, PADDING, Row
from midstream.config import Budget, Rows
from midstream.data.mixture import Supply, names_of
from midstream.data.packing import RowPlan, make_plan
from midstream.data.sources import Source
from midstream.tokens import TokenCount

NO_IMAGES = np.zeros((0, 3), dtype=np.int64)


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
    length, joined = plan.rows.row_length, plan.layout.sees_all(index)
    input_ids, targets = np.empty((2, length), dtype=np.int64)
    # Alike in every full joined row: these two are shared and must not be written to.
    segment_ids, positions = _shared(length)
    position_ids = positions
    if not joined:
        segment_ids, position_ids = np.empty((2, length), dtype=np.int64)
    images: list[tuple[int, int, int]] = []
    # By source: text tokens, patches and targets.
    found: dict[int, list[int]] = {}
    end = 0
    # The source whose document just ended, in joined rows.
    ended: int | None = None
    for segment, (number, example, start, size, column) in enumerate(plan.layout.row(index)):
        shard, local = sources[plan.names[number]].locate(example)
        patches = num_patches if shard.images is not None and shard.images[local, 0] >= 0 else 0
        text, end = column + patches, column + size
        if patches:
            images.append((column, number, example))
            input_ids[column:text], targets[column:text] = 0, IGNORE
        low, after = int(shard.offsets[local]) + start, int(shard.offsets[local + 1])
        high = low + size - patches
        input_ids[text:end] = shard.tokens[low:high]
        last = min(high + 1, after)
        counted = found.setdefault(number, [0, 0, 0])
        if shard.supervised is None:
            known = text + last - low - 1
            targets[text:known], targets[known:end] = shard.tokens[low + 1 : last], IGNORE
            counted[2] += last - low - 1
        else:
            chosen = shard.supervised[low + 1 : last] > 0
            targets[text:end] = IGNORE
            targets[text : text + last - low - 1][chosen] = shard.tokens[low + 1 : last][chosen]
            counted[2] += int(np.count_nonzero(chosen))
        if joined and ended is not None:
            # OpenLM's rows: the end of a document predicts the beginning of the next one.
            targets[column - 1] = input_ids[column]
            found[ended][2] += 1
        ended = number if last == high else None
        if not joined:
            segment_ids[column:end] = segment
            position_ids[column:end] = positions[:size]
        counted[0] += size - patches
        counted[1] += patches
    if end < length:
        if joined:
            segment_ids, position_ids = segment_ids.copy(), position_ids.copy()
        input_ids[end:], targets[end:] = 0, IGNORE
        segment_ids[end:], position_ids[end:] = PADDING, 0
    counts: dict[str, TokenCount] = {}
    for number, (num_text, image, target) in found.items():
        name = plan.names[number]
        mine = TokenCount(**{sources[name].kind: num_text, "image": image, "target": target})
        counts[name] = mine
    alone = len(counts) == 1 and end == length
    seen = mine if alone else sum(counts.values(), TokenCount(pad=length - end))
    table = np.array(images, dtype=np.int64).reshape(-1, 3) if images else NO_IMAGES
    return Row(
        input_ids=input_ids,
        targets=targets,
        position_ids=position_ids,
        segment_ids=segment_ids,
        image_starts=table[:, 0],
        images=table[:, 1:],
        counts=seen,
        sources=counts,
    )


@cache
def _shared(length: int) -> tuple[np.ndarray, np.ndarray]:
    found = np.zeros(length, dtype=np.int64), np.arange(length)
    for array in found:
        array.flags.writeable = False
    return found


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
            examples += quota.stream.tokens_before(examples) < quota.tokens
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
