"""What a training stage computes on, from the lengths of its examples.

How many rows whole examples take side by side, and how long the longest of some is: expected
from their lengths alone, by laying out a sample as `order/plan.py` lays out a block.

What a training stage computes on: positions, what they look at, where something is learnt.

Counted as `train/step.py` goes about it: rows of a step are one batch, padding is computed along,
logits exist where there is a target, and so does the last block where few positions have one. On a
CPU batches are cut behind their last held column, and long rows into their segments; on a GPU
segments cost what they hold, and rows are whole.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, exp
from typing import Literal

from midstream.config import (
    Amounts,
    AnyEncoderConfig,
    DecoderConfig,
    Epochs,
    Mixture,
    Training,
    VLMConfig,
)
from midstream.cost.known import Basis, Facts, Number

# Lengths and how many examples have them, in ascending order.
Points = tuple[tuple[Number, Number], ...]
# Rows that are laid out to find out: those of a block in `order/plan.py`.
BLOCK_ROWS = 1024


@cache
def rows_of(points: Points, row_length: int) -> int:
    """Rows that whole examples take: longest first, each into the fullest row that it fits."""
    number = sum(count for _, count in points)
    if not number:
        return 0
    held = sum(length * count for length, count in points)
    # A plan of several blocks is a block, several times.
    blocks = max(1, round(held / (BLOCK_ROWS * row_length)))
    lengths = _drawn(points, ceil(number / blocks))
    room: list[int] = []
    rows = 0
    for length in reversed(lengths):
        at = bisect_left(room, length)
        if at < len(room):
            left = room.pop(at) - length
        else:
            left, rows = row_length - length, rows + 1
        if left > 0:
            insort(room, left)
    return ceil(rows * number / len(lengths))


def _drawn(points: Points, number: int) -> list[int]:
    """This many lengths that stand for all, in ascending order."""
    total = sum(count for _, count in points)
    found: list[int] = []
    upto = 0.0
    for length, count in points:
        upto += count / total
        found += [round(length)] * (round(upto * number) - len(found))
    return found


def longest_of(points: Sequence[tuple[Number, Number]], number: int) -> Number:
    """The longest of `number` examples drawn from these lengths, as expected."""
    total = sum(count for _, count in points)
    below = longest = upto = 0.0
    for length, count in points:
        upto += count / total
        longest += length * (min(upto, 1.0) ** number - below**number)
        below = min(upto, 1.0)
    return longest


Device = Literal["cpu", "cuda"]
# As in `order/plan.py`: how full filled rows are, in thousandths.
FILL = 997
# As in `model/vlm.py`: above this share of positions the last block works on all of them.
MOST_TARGETS = 0.8
# As in `model/attention.py`: shorter rows stay under one mask on a CPU.
LEAST_CUT_ROW = 256
# As in `data/images.py`: pictures that a frozen encoder is given at once; one for a tower of
# LARGE_TOWER patches on a CPU.
ENCODER_BATCH, LARGE_TOWER = 8, 256


@dataclass(frozen=True)
class Taken:
    """What a budget takes of a source: positions that are not padding, examples, pictures."""

    tokens: int
    examples: Number
    images: Number


Part = tuple[Facts, Taken]


@dataclass(frozen=True)
class Workload:
    """A training stage in numbers.

    tokens: positions that are not padding; positions: all that are computed; squares: pairs of
    positions that attention computes, a causal mask taken for none; asked: positions that the last
    block computes whole; encoded: pictures that a live frozen encoder is given, the fill of its
    batches among them.
    """

    tokens: int
    images: Number
    positions: Number
    squares: Number
    targets: Number
    asked: Number
    encoded: Number
    rows: int
    steps: int
    basis: Basis


def taken(training: Training, sources: Mapping[str, Facts], patches: int) -> dict[str, Taken]:
    """By source, what a budget takes of it. Raises ValueError for a source that is not there."""
    budget, sources = training.budget, _fitted(training, sources, patches)
    found: dict[str, Taken] = {}
    match budget:
        case Mixture(by="sequences"):
            sequences = budget.total_tokens // training.rows.row_length
            for share in budget.shares:
                source, number = _source(sources, share.source), sequences * share.share
                if source.kind == "text":
                    found[share.source] = _of_tokens(
                        number * training.rows.row_length, source, patches
                    )
                else:
                    part = number / max(source.examples, 1)
                    found[share.source] = _part(source, part, patches)
        case Mixture():
            for share in budget.shares:
                source = _source(sources, share.source)
                found[share.source] = _of_tokens(budget.total_tokens * share.share, source, patches)
        case Amounts():
            for amount in budget.amounts:
                source = _source(sources, amount.source)
                found[amount.source] = (
                    _of_tokens(amount.tokens, source, patches)
                    if amount.tokens
                    else _part(source, amount.epochs or 0, patches)
                )
        case Epochs():
            for name in budget.sources:
                found[name] = _part(_source(sources, name), budget.epochs, patches)
    return found


def workload(
    model: VLMConfig, training: Training, sources: Mapping[str, Facts], device: Device
) -> Workload:
    """The work of a stage over its whole budget."""
    patches = model.encoder.num_patches if model.encoder is not None else 0
    sources = _fitted(training, sources, patches)
    parts = [
        (_source(sources, name), part) for name, part in taken(training, sources, patches).items()
    ]
    tokens = _total_tokens(training, [part for _, part in parts])
    images = sum(part.images for _, part in parts)
    batches = _batches(training, parts, patches, device)
    targets = sum(_targets(training, source, part) for source, part in parts)
    rows = sum(batch.rows for batch in batches)
    steps = ceil(rows / training.rows.batch_rows)
    whole_last = not isinstance(model.decoder, DecoderConfig)
    return Workload(
        tokens=tokens,
        images=images,
        positions=sum(batch.positions for batch in batches),
        squares=_squares(model, training, parts, patches, batches, device),
        targets=targets,
        asked=sum(batch.positions if whole_last else batch.asked for batch in batches),
        encoded=0.0 if model.encoder is None else _encoded(images, steps, model.encoder, device),
        rows=ceil(rows),
        steps=steps,
        basis="counted" if all(s.basis == "counted" for s, _ in parts) else "expected",
    )


@dataclass(frozen=True)
class _Batches:
    """Rows of batches that are alike: their columns, and the targets in all of them."""

    rows: Number
    width: Number
    targets: Number

    @property
    def positions(self) -> Number:
        """Positions of all rows."""
        return self.rows * self.width

    @property
    def asked(self) -> Number:
        """Positions that the last block computes whole."""
        few = self.targets <= MOST_TARGETS * self.positions
        return self.targets if few else self.positions


def _fitted(training: Training, sources: Mapping[str, Facts], patches: int) -> Mapping[str, Facts]:
    length = training.rows.row_length
    return {name: source.fitted(patches, length) for name, source in sources.items()}


def _source(sources: Mapping[str, Facts], name: str) -> Facts:
    if name not in sources:
        raise ValueError(
            f"the budget names source {name!r}; the world has {', '.join(sorted(sources))}"
        )
    return sources[name]


def _of_tokens(tokens: Number, source: Facts, patches: int) -> Taken:
    part = tokens / max(source.size(patches), 1)
    return Taken(int(tokens), part * source.examples, part * source.images)


def _part(source: Facts, part: Number, patches: int) -> Taken:
    return Taken(int(part * source.size(patches)), part * source.examples, part * source.images)


def _total_tokens(training: Training, parts: list[Taken]) -> int:
    budget = training.budget
    if isinstance(budget, Mixture) and budget.by == "tokens":
        return budget.total_tokens
    return sum(part.tokens for part in parts)


def _batches(training: Training, parts: list[Part], patches: int, device: Device) -> list[_Batches]:
    """The batches of a stage: all as wide as a row, but on a CPU those of padded rows alone."""
    length, layout, size = training.rows.row_length, training.rows.layout, training.rows.batch_rows
    text = [(source, part) for source, part in parts if source.kind == "text"]
    whole = [(source, part) for source, part in parts if source.kind != "text"]
    text_tokens = sum(part.tokens for _, part in text)
    text_targets, whole_targets = (
        sum(_targets(training, source, part) for source, part in some) for some in (text, whole)
    )
    targets = text_targets + whole_targets
    points = _points(whole, patches)
    if layout == "filled":
        held = text_tokens + sum(part.tokens for _, part in whole)
        filled = max(ceil(1000 * held / (FILL * length)), rows_of(points, length), 1)
        return [_Batches(filled, length, targets)]
    text_rows, whole_rows = ceil(text_tokens / length), sum(part.examples for _, part in whole)
    rows = text_rows + whole_rows
    if device == "cuda" or not whole_rows:
        return [_Batches(rows, length, targets)]
    # A batch without text is cut behind its longest example.
    alone = whole_rows * (whole_rows / rows) ** (size - 1)
    mine = whole_targets * alone / whole_rows
    longest = min(float(length), longest_of(points, min(size, ceil(whole_rows))))
    return [
        _Batches(alone, longest, mine),
        _Batches(rows - alone, length, targets - mine),
    ]


def _points(whole: list[Part], patches: int) -> Points:
    return tuple(
        sorted(
            (length, count * part.examples / max(source.examples, 1))
            for source, part in whole
            for length, count in source.points(patches)
        )
    )


def _targets(training: Training, source: Facts, part: Taken) -> Number:
    if source.kind == "text" and training.rows.layout != "filled":
        # Joined documents predict each other's beginning.
        return float(part.tokens)
    return source.targets * part.examples / max(source.examples, 1)


def _squares(
    model: VLMConfig,
    training: Training,
    parts: list[Part],
    patches: int,
    batches: list[_Batches],
    device: Device,
) -> Number:
    """Pairs of positions: of whole rows, or of segments where those are cut apart or masked by
    blocks."""
    length, openlm = training.rows.row_length, isinstance(model.decoder, DecoderConfig)
    cut = model.attention == "segments" and length >= LEAST_CUT_ROW
    by_segment = openlm and (device == "cuda" or cut) and model.attention != "causal"
    if training.rows.layout != "filled" or not by_segment:
        return sum(batch.positions * batch.width for batch in batches)
    return sum(
        source.squares(patches, length) * part.examples / max(source.examples, 1)
        for source, part in parts
    )


def _encoded(images: Number, steps: int, encoder: AnyEncoderConfig, device: Device) -> Number:
    """Pictures in batches of one size, the last of each step filled up; steps hold pictures by
    chance."""
    if not images or (device == "cpu" and encoder.num_patches >= LARGE_TOWER):
        return images
    mean = images / max(steps, 1)
    if mean > 16 * ENCODER_BATCH:
        return images + steps * (ENCODER_BATCH - 1) / 2
    chance, at_least, batches = exp(-mean), 1.0, 0.0
    # The expected number of batches is the sum over k of the chance of more than 8 k pictures.
    for number in range(ceil(mean + 12 * mean**0.5 + 2 * ENCODER_BATCH)):
        at_least -= chance
        if number % ENCODER_BATCH == 0:
            batches += max(at_least, 0.0)
        chance *= mean / (number + 1)
    return steps * batches * ENCODER_BATCH
