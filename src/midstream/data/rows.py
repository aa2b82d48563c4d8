"""From prepared sources and a budget to rows: lengths into the plan, its placements into arrays."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from midstream.batch import IGNORE, PADDING, Row
from midstream.config import Budget, Overflow, Rows
from midstream.data.lengths import SourceLengths, fit_to_rows
from midstream.data.mixture import Quota, Supply
from midstream.data.packing import RowPlan, make_plan
from midstream.data.sources import Source
from midstream.tokens import TokenCount

EXAMPLES_AT_ONCE = 2**14
NO_IMAGES = np.zeros((0, 3), dtype=np.int64)


def plan_rows(
    sources: Mapping[str, Source],
    num_patches: int,
    budget: Budget,
    rows: Rows,
    seed: int,
    overflow: Overflow = "refuse",
) -> RowPlan:
    """Plan a whole stage from lengths alone; `overflow` is what `rows` asks for, resolved.

    Raises ValueError for an unknown source, an empty one, one that lacks the asked captions, a
    budget that cannot be met, or, with its record, a caption or conversation that is longer than
    a row and not to be cut.
    """
    missing = [name for name in budget.captions if name not in sources]
    if missing:
        raise ValueError(f"no source {missing[0]!r} in the data; it holds {sorted(sources)}")
    supplies = []
    for name, caption in budget.captions.items():
        source, divisible = sources[name], sources[name].kind == "text"
        source.check_caption(caption)
        lengths = SourceLengths(source, num_patches, caption)
        if not divisible:
            fit_to_rows(lengths, rows.row_length, overflow)
        supplies.append(Supply(name, lengths, divisible))
    return make_plan(supplies, budget, rows, seed)


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
    for segment, (number, example, start, size, caption, column) in enumerate(
        plan.layout.row(index)
    ):
        shard, local = sources[plan.names[number]].locate(example)
        patches = num_patches if shard.images is not None and shard.images[local, 0] >= 0 else 0
        text, end = column + patches, column + size
        offsets = shard.offsets_of(caption) if caption else shard.offsets
        low, after = int(offsets[local]) + start, int(offsets[local + 1])
        high = low + size - patches
        if patches:
            # What begins an example stands before its image.
            head = 0 if sources[plan.names[number]].begin_of_text is None else 1
            images.append((column + head, number, example))
            input_ids[column : text + head], targets[column : text + head] = 0, IGNORE
            input_ids[column : column + head] = shard.tokens[low : low + head]
            text, low = text + head, low + head
        input_ids[text:end] = shard.tokens[low:high]
        # What is cut off of a whole example is nobody's target; a text goes on in another row.
        last = min(high + 1, after) if shard.supervised is None else high
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
    """By source: planned and realised tokens, examples, passes, the largest example it has, and how
    many examples are cut to fit into a row and how many tokens that leaves out."""
    report: dict[str, dict[str, Any]] = {}
    for quota in plan.quotas:
        source, examples = sources[quota.name], quota.examples
        if quota.divisible and quota.tokens:
            # The example that the budget ends in counts.
            examples = quota.stream.count_before(2 * quota.tokens)
            examples += quota.stream.tokens_before(examples) < quota.tokens
        report[quota.name] = {
            "kind": source.kind,
            "planned_tokens": quota.planned_tokens,
            "planned_sequences": quota.planned_sequences,
            "realised_tokens": quota.tokens,
            "examples": examples,
            "epochs": quota.tokens / quota.stream.lengths.total,
            "largest_example_tokens": _largest(quota, source, num_patches),
            "cut": _cut_of(quota),
        }
    return report


def _largest(quota: Quota, source: Source, num_patches: int) -> int:
    lengths = quota.stream.lengths
    assert isinstance(lengths, SourceLengths)
    longest = max(
        (
            tokens + (num_patches if shown == "image" else 0)
            for shown, tokens in source.longest(lengths.caption).items()
        ),
        default=0,
    )
    return longest if quota.divisible else min(longest, quota.row_length)


def _cut_of(quota: Quota) -> dict[str, int]:
    """How many of the examples that the plan takes are cut to fit, and what that leaves out."""
    lengths = quota.stream.lengths
    assert isinstance(lengths, SourceLengths)
    number = tokens = 0
    # Only where the source has such examples is the plan gone through.
    for low in range(0, quota.examples if lengths.cuts else 0, EXAMPLES_AT_ONCE):
        taken = quota.stream.places(low, min(low + EXAMPLES_AT_ONCE, quota.examples))
        excess = lengths.excess(taken.examples, taken.captions)
        number, tokens = number + int(np.count_nonzero(excess)), tokens + int(excess.sum())
    return {"examples": number, "tokens": tokens}
