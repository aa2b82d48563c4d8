"""Planned rows as arrays, and the rows of each step as a rank's micro-batches.

The loader's whole state is one integer: the rows consumed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, tee
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from midstream.config import Budget, Mixture, Overflow, Rows, check_pool
from midstream.core.batch import IGNORE, PADDING, Batch, Row, stack_rows
from midstream.core.tokens import TokenCount, num_shown
from midstream.data.columns import Shard
from midstream.data.examples import Run, runs_of
from midstream.data.lengths import SourceLengths, fit_to_rows
from midstream.data.processes import plain_errors, watch_over
from midstream.data.sources import Source
from midstream.order.mixture import Quota, Supply
from midstream.order.pack import deal_parts
from midstream.order.plan import Filled, RowPlan, make_plan

EXAMPLES_AT_ONCE = 2**14
# Of these kinds what does not fit into a row goes on in another.
GO_ON = ("text", "interleaved")
NO_IMAGES = np.zeros((0, 4), dtype=np.int64)


def plan_rows(
    sources: Mapping[str, Source],
    num_patches: int,
    budget: Budget,
    rows: Rows,
    seed: int,
    overflow: Overflow = "refuse",
    unreduced_patches: int | None = None,
) -> RowPlan:
    """Plan a whole stage from lengths alone; `overflow` is what `rows` asks for, resolved.

    A picture takes `num_patches` positions of a row, and `unreduced_patches` before the connector's
    reduction, which shares by="patches" count (None: as many).

    Raises ValueError for an unknown source, an empty one, one that lacks the asked captions or has
    no such pool, a budget that cannot be met, a picture that no row holds, or, with its record,
    what is longer than a row and not to be cut.
    """
    missing = [name for name in budget.captions if name not in sources]
    if missing:
        raise ValueError(f"no source {missing[0]!r} in the data; it holds {sorted(sources)}")
    supplies = []
    for name, caption in budget.captions.items():
        source, divisible = sources[name], sources[name].kind == "text"
        source.check_caption(caption)
        if (pool := budget.pools.get(name)) is not None:
            check_pool(name, source.kind, pool, len(source))
        lengths = SourceLengths(source, num_patches, caption)
        if not divisible:
            fit_to_rows(lengths, rows, overflow)
        unreduced = None
        if isinstance(budget, Mixture) and budget.by == "patches" and source.num_images:
            unreduced = SourceLengths(source, unreduced_patches or num_patches, caption)
            unreduced.cuts = lengths.cuts
        supplies.append(Supply(name, lengths, divisible, unreduced))
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
    images: list[tuple[int, int, int, int]] = []
    # By source: text tokens, patches and targets.
    found: dict[int, list[int]] = {}
    end = 0
    # The source whose document just ended, in joined rows.
    ended: int | None = None
    for segment, placed in enumerate(plan.layout.row(index)):
        number, column, size = placed.source, placed.column, placed.length
        shard, local = sources[plan.names[number]].locate(placed.example)
        offsets = shard.offsets_of(placed.caption) if placed.caption else shard.offsets
        example, end = slice(int(offsets[local]), int(offsets[local + 1])), column + size
        runs = runs_of(shard.places_of(local), placed.start, size, num_patches)
        counted = found.setdefault(number, [0, 0, 0])
        for run in runs:
            at = column + run.column
            if run.picture is not None:
                images.append((at, number, placed.example, run.picture))
                input_ids[at : at + num_patches], targets[at : at + num_patches] = 0, IGNORE
                counted[1] += num_patches
                continue
            counted[0] += run.high - run.low
            counted[2] += _fill(shard, example, run, input_ids[at:end], targets[at:end])
        if joined and ended is not None:
            # OpenLM's rows: the end of a document predicts the beginning of the next one.
            targets[column - 1] = input_ids[column]
            found[ended][2] += 1
        ended = number if example.start + runs[-1].high == example.stop else None
        if not joined:
            segment_ids[column:end] = segment
            position_ids[column:end] = positions[:size]
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
    table = np.array(images, dtype=np.int64).reshape(-1, 4) if images else NO_IMAGES
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


def _fill(
    shard: Shard, example: slice, run: Run, input_ids: np.ndarray, targets: np.ndarray
) -> int:
    """Write a run of an example's tokens to the head of both; returns its number of targets."""
    low, high = example.start + run.low, example.start + run.high
    size = run.high - run.low
    input_ids[:size] = shard.tokens[low:high]
    # What is cut off of a caption or a talk is nobody's target; texts and documents go on in
    # another row. Nothing predicts what stands before a picture's slots from behind them.
    goes_on = shard.kind in GO_ON and not run.before_picture
    last = min(high + 1, example.stop) if goes_on else high
    known: int = last - low - 1
    if shard.supervised is None:
        targets[:known], targets[known:size] = shard.tokens[low + 1 : last], IGNORE
        return known
    chosen = shard.supervised[low + 1 : last] > 0
    targets[:size] = IGNORE
    targets[:known][chosen] = shard.tokens[low + 1 : last][chosen]
    return int(np.count_nonzero(chosen))


@cache
def _shared(length: int) -> tuple[np.ndarray, np.ndarray]:
    found = np.zeros(length, dtype=np.int64), np.arange(length)
    for array in found:
        array.flags.writeable = False
    return found


def shares_report(
    plan: RowPlan, sources: Mapping[str, Source], num_patches: int
) -> dict[str, dict[str, Any]]:
    """By source: planned and realised tokens, examples, passes, the largest example it has, how
    many examples are cut to fit into a row and how many tokens that leaves out.

    Of documents, which go on in another row, `cut` says how many `pieces` those make that are cut,
    in a long plan by what some of its blocks hold.
    """
    report: dict[str, dict[str, Any]] = {}
    for number, quota in enumerate(plan.quotas):
        source, examples = sources[quota.name], quota.examples
        if quota.divisible and quota.tokens:
            # The example that the budget ends in counts.
            examples = quota.stream.count_before(2 * quota.tokens)
            examples += quota.stream.tokens_before(examples) < quota.tokens
        largest = _largest(quota, source, num_patches)
        report[quota.name] = {
            "kind": source.kind,
            "planned_tokens": quota.planned_tokens,
            "planned_sequences": quota.planned_sequences,
            "unreduced": _unreduced(quota, source),
            "realised_tokens": quota.tokens,
            "examples": examples,
            "epochs": quota.tokens / quota.stream.total,
            "largest_example_tokens": largest,
            "cut": _pieces_of(plan, number, largest)
            if source.kind == "interleaved"
            else _cut_of(quota),
        }
    return report


def _unreduced(quota: Quota, source: Source) -> dict[str, int] | None:
    """Where shares count all patches of a picture: planned, realised, the largest example."""
    if (found := quota.unreduced) is None:
        return None
    assert isinstance(found.lengths, SourceLengths)
    return {
        "planned_tokens": found.planned,
        "realised_tokens": found.realised,
        "largest_example_tokens": _longest(source, found.lengths, found.lengths.num_patches),
    }


def _longest(source: Source, lengths: SourceLengths, num_patches: int) -> int:
    return max(
        (
            tokens + num_patches * num_shown(shown)
            for shown, tokens in source.longest(lengths.caption).items()
        ),
        default=0,
    )


def _largest(quota: Quota, source: Source, num_patches: int) -> int:
    lengths = quota.stream.lengths
    assert isinstance(lengths, SourceLengths)
    longest = _longest(source, lengths, num_patches)
    return longest if source.kind in GO_ON else min(longest, quota.row_length)


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


def _pieces_of(plan: RowPlan, source: int, largest: int) -> dict[str, int]:
    """The same of documents, of at most `largest` positions, and how many pieces those that are
    cut make."""
    quota = plan.quotas[source]
    number = pieces = 0
    # Only where the source has such documents is the plan gone through.
    if largest > quota.row_length and isinstance(plan.layout, Filled):
        for low in range(0, quota.examples, EXAMPLES_AT_ONCE):
            taken = quota.stream.places(low, min(low + EXAMPLES_AT_ONCE, quota.examples))
            number += int(np.count_nonzero(taken.lengths > quota.row_length))
        pieces = plan.layout.num_placed(source) - (quota.examples - number)
    return {"examples": number, "tokens": 0, "pieces": pieces}


# What `Row.images` names, int64 [images, 3] -> pixels or stored features, in their order.
Images = Callable[[np.ndarray], Float[Tensor, "images ..."]]
NOTHING = torch.zeros((0, 0, 0))


class NoImages:
    """The pictures of rows that have none."""

    def __call__(self, images: np.ndarray) -> Float[Tensor, "images ..."]:
        """An empty tensor; ValueError if there are pictures."""
        if len(images):
            raise ValueError(f"{len(images)} pictures in rows of a stage that sees none")
        return NOTHING


class RowDataset(Dataset[tuple[Row, Tensor]]):
    """Row k of a plan and the pixels or features of its pictures, a function of k alone."""

    def __init__(
        self, plan: RowPlan, sources: Mapping[str, Source], num_patches: int, images: Images
    ) -> None:
        self.plan = plan
        self.sources = {name: sources[name] for name in plan.names}
        self.num_patches, self.images = num_patches, images

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> tuple[Row, Tensor]:
        row = build_row(self.plan, self.sources, index, self.num_patches)
        return row, self.images(row.images)

    def num_pictures(self, index: int) -> int:
        """How many pictures row `index` shows."""
        found = 0
        for placed in self.plan.layout.row(index):
            places = self.sources[self.plan.names[placed.source]].places_of(placed.example)
            runs = runs_of(places, placed.start, placed.length, self.num_patches)
            found += sum(run.picture is not None for run in runs)
        return found

    def padding(self) -> tuple[Row, Tensor]:
        """A row that holds nothing: what a rank works on while only others have rows."""
        length = self.plan.rows.row_length
        column, nothing = np.arange(length), np.zeros((0, 3), dtype=np.int64)
        row = Row(
            input_ids=np.zeros(length, dtype=np.int64),
            targets=np.full(length, IGNORE, dtype=np.int64),
            position_ids=column,
            segment_ids=np.full(length, PADDING, dtype=np.int64),
            image_starts=np.zeros(0, dtype=np.int64),
            images=nothing,
            counts=TokenCount(),
        )
        return row, self.images(nothing)


@dataclass(frozen=True)
class View:
    """Which rows of each step a rank works on, and at most how many at a time.

    With `pictures`, how many a row shows, several ranks get rows as `deal_parts` says, else as they
    come. Raises ValueError if ranks do not divide the step.
    """

    num_rows: int
    batch_rows: int
    micro_rows: int
    rank: int = 0
    world_size: int = 1
    pictures: Callable[[int], int] | None = None

    def __post_init__(self) -> None:
        if self.batch_rows % self.world_size:
            raise ValueError(
                f"batch_rows {self.batch_rows} is no multiple of {self.world_size} ranks"
            )

    def ranks(self, step: int, first_row: int) -> list[list[list[int]]]:
        """The micro-batches of one optimiser step by rank, without the rows before `first_row`.

        Every rank gets the same number of them (some may be empty at the plan's end), so that all
        run the same collectives.
        """
        low, share = step * self.batch_rows, self.batch_rows // self.world_size
        if self.pictures is not None and self.world_size > 1:
            left = range(max(low, first_row), min(low + self.batch_rows, self.num_rows))
            return deal_parts(left, self.pictures, self.world_size, self.micro_rows)
        shares = [range(first, first + share) for first in range(low, low + self.batch_rows, share)]
        starts = range(0, share, self.micro_rows)
        cut = [[mine[at : at + self.micro_rows] for at in starts] for mine in shares]
        left = range(first_row, self.num_rows)
        return [[[row for row in part if row in left] for part in parts] for parts in cut]

    def steps(self, first_row: int) -> Iterator[list[list[int]]]:
        """The rank's steps that are left once `first_row` rows are consumed.

        A part that is empty on every rank is left out; one that some rank has, every rank has.
        """
        for step in count(first_row // self.batch_rows):
            if max(first_row, step * self.batch_rows) >= self.num_rows:
                return
            ranks = self.ranks(step, first_row)
            held = [any(parts) for parts in zip(*ranks, strict=True)]
            yield [part for part, used in zip(ranks[self.rank], held, strict=True) if used]


def load_steps(
    dataset: RowDataset,
    *,
    first_row: int,
    micro_rows: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    looks: bool = False,
) -> Iterator[list[Batch]]:
    """The micro-batches of each optimiser step from row `first_row` of the plan on.

    `looks`: an encoder sees the pictures, so that ranks are dealt alike many (`View`).
    `workers` processes build rows and decode pictures ahead; for a GPU `device` batches lie in
    page-locked memory. Neither changes what they hold.
    """
    pictures = dataset.num_pictures if looks else None
    view = View(len(dataset), dataset.plan.rows.batch_rows, micro_rows, rank, world_size, pictures)
    # The loader is ahead of who takes the steps.
    ahead, steps = tee(view.steps(first_row))
    loader = DataLoader(
        dataset,
        # Made as it goes: a plan may have millions of rows.
        batch_sampler=(part for step in ahead for part in step),
        collate_fn=partial(_collate, dataset),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device is not None and device.type == "cuda",
        # Else the loader draws its workers' seed from the global generator.
        generator=torch.Generator(),
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=watch_over if workers else None,
    )
    batches = iter(loader)
    for step in steps:
        with plain_errors(workers):
            micro_batches = [next(batches) for _ in step]
        yield micro_batches


def _collate(dataset: RowDataset, items: list[tuple[Row, Tensor]]) -> Batch:
    items = items or [dataset.padding()]
    return stack_rows([row for row, _ in items], torch.cat([images for _, images in items]))
