"""Budgets: what they ask of each source, whether it has that, and how it lies in a plan."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from midstream.config import Amounts, Budget, Epochs, Mixture
from midstream.core.tokens import apportion
from midstream.order.stream import Lengths, Stream, Stretch

# Places of a stream whose views are counted at once.
VIEWS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Need:
    """What a budget asks of one source: so many tokens (patches included; those before the
    connector's reduction where its shares are of them), whole examples, or passes over all of it.

    `sequences`: what it asks where it counts those; of text they become tokens.
    """

    source: str
    unit: Literal["tokens", "examples", "epochs"]
    amount: int
    sequences: int | None = None


def needs_of(budget: Budget, row_length: int, texts: Container[str]) -> tuple[Need, ...]:
    """What a budget asks of its sources, in its order; `texts` says which may be cut anywhere."""
    match budget:
        case Epochs():
            return tuple(Need(name, "epochs", budget.epochs) for name in budget.sources)
        case Amounts():
            return tuple(
                Need(one.source, "epochs", one.epochs)
                if one.epochs
                else Need(one.source, "tokens", one.tokens or 0)
                for one in budget.amounts
            )
        case Mixture():
            shares = {share.source: share.share for share in budget.shares}
    if budget.by != "sequences":
        parts = apportion(budget.total_tokens, shares)
        return tuple(Need(name, "tokens", part) for name, part in parts.items())
    parts = apportion(budget.total_tokens // row_length, shares)
    return tuple(
        Need(name, "tokens", part * row_length, part)
        if name in texts
        else Need(name, "examples", part, part)
        for name, part in parts.items()
    )


def passes_needed(need: Need, budget: Budget, *, tokens: int, examples: int) -> int | None:
    """The passes over a source of so many tokens and examples that a budget takes, where they are
    more than it allows; None where it can be met."""
    if isinstance(budget, Epochs) or need.unit == "epochs" or budget.sampling == "replacement":
        return None
    have = tokens if need.unit == "tokens" else examples
    if need.amount <= have * budget.max_epochs:
        return None
    return -(-need.amount // max(have, 1))


@dataclass(frozen=True)
class Supply:
    """What a source offers to a plan.

    `lengths` are positions of a row, image patches included. Text (`divisible`) may be cut at any
    token; other examples are counted whole. `unreduced` are the lengths with all patches of each
    picture, where shares are of those and a connector leaves fewer.
    """

    name: str
    lengths: Lengths
    divisible: bool
    unreduced: Lengths | None = None


@dataclass(frozen=True)
class Unreduced:
    """Tokens before the connector's reduction: what is planned of a source, what is realised."""

    planned: int
    realised: int
    lengths: Lengths


@dataclass(frozen=True)
class Quota:
    """How much of a source a plan takes: its first `tokens` tokens, or `examples` whole ones.

    A plan is cut into blocks that all have the whole plan's shares. planned_tokens is what the
    budget says, None where it counts passes or sequences. `by_count` spreads
    whole examples evenly by number, else by tokens. Text is cut between blocks only where a
    document begins, or in a longer one behind a whole number of rows.
    """

    name: str
    stream: Stream
    divisible: bool
    tokens: int
    examples: int
    planned_tokens: int | None
    planned_sequences: int | None
    by_count: bool
    row_length: int
    unreduced: Unreduced | None = None

    def before(self, block: int, num_blocks: int) -> int:
        """What lies before a block: tokens of text, whole examples otherwise."""
        if block in (0, num_blocks):
            return (self.tokens if self.divisible else self.examples) if block else 0
        if self.divisible:
            near = self.stream.cut_near(self.tokens * block // num_blocks, self.row_length)
            return min(near, self.tokens)
        if self.by_count:
            return self.examples * block // num_blocks
        # `count_before` compares whole numbers by <: rounding up keeps that exact.
        found = self.stream.count_before(-(-2 * self.tokens * block // num_blocks))
        return min(found, self.examples)

    def block(self, block: int, num_blocks: int) -> Stretch:
        """The examples of a block, or parts of them where text is cut at its ends."""
        low, high = (self.before(number, num_blocks) for number in (block, block + 1))
        return self.stream.tokens(low, high) if self.divisible else self.stream.places(low, high)

    def views(self) -> np.ndarray:
        """uint32 [examples of the source]: how often each is taken whole."""
        stream, one = self.stream, len(self.stream)
        found = np.zeros(len(stream.lengths), dtype=np.uint32)
        # Each pass is over the same examples.
        passes = self.examples // one if stream.sampling == "permutation" else 0
        for low, high, times in ((0, one, passes), (passes * one, self.examples, 1)):
            for at in range(low, high if times else low, VIEWS_AT_ONCE):
                taken = stream.places(at, min(at + VIEWS_AT_ONCE, high)).examples
                np.add.at(found, taken, np.uint32(times))
        return found


def quotas_of(
    supplies: Sequence[Supply], budget: Budget, *, row_length: int, seed: int
) -> list[Quota]:
    """Meet a budget: text to the token, whole examples within half of one.

    A share of one token or sequence is seen, if only in one example.

    Raises ValueError for an unknown source or a budget that the source cannot meet in `max_epochs`,
    with both numbers.
    """
    by_name = {supply.name: supply for supply in supplies}
    for name in budget.source_names:
        if name not in by_name:
            raise ValueError(f"no source {name!r} in the data; it holds {sorted(by_name)}")
    texts = {supply.name for supply in supplies if supply.divisible}
    found = [
        _quota(by_name[need.source], need, budget, row_length, seed)
        for need in needs_of(budget, row_length, texts)
    ]
    if not any(quota.tokens for quota in found):
        names = ", ".join(budget.source_names)
        raise ValueError(f"the plan holds no token of {names}; raise its budget")
    return found


def _quota(supply: Supply, need: Need, budget: Budget, row_length: int, seed: int) -> Quota:
    lengths, amount = supply.lengths, need.amount
    epochs = 0 if isinstance(budget, Epochs) else budget.max_epochs
    sampling = "permutation" if isinstance(budget, Epochs) else budget.sampling
    pool = budget.pools.get(supply.name)
    stream = Stream(lengths, f"{seed}/{supply.name}", sampling, pool)
    # What the budget counts: the same examples in the same order.
    counted = stream
    if supply.unreduced is not None and need.unit == "tokens":
        counted = Stream(supply.unreduced, stream.key, sampling, pool)
    if need.unit == "tokens" and lengths.drawn:
        # Other captions, another sum: what the passes hold is known once they are drawn.
        limit = None if sampling == "replacement" else epochs * len(stream)
        if not counted.reach(amount, limit):
            raise _too_few(need, counted.tokens_before(limit or 0), epochs, pool)
    elif passes_needed(need, budget, tokens=counted.total, examples=len(stream)):
        have = counted.total if need.unit == "tokens" else len(stream)
        raise _too_few(need, have, epochs, pool)
    elif need.unit == "tokens":
        counted.reach(amount)
    examples, tokens = amount, amount
    if need.unit == "epochs":
        examples = amount * len(stream)
    if need.unit == "tokens":
        # A share that is less than half an example is seen all the same.
        whole = amount and not supply.divisible
        examples = max(1, counted.count_before(2 * amount)) if whole else 0
    if need.unit != "tokens" or not supply.divisible:
        tokens = stream.tokens_before(examples)
    planned = amount if need.unit == "tokens" and need.sequences is None else None
    unreduced = None
    if supply.unreduced is not None and need.unit == "tokens":
        planned = None
        unreduced = Unreduced(amount, counted.tokens_before(examples), supply.unreduced)
    return Quota(
        name=supply.name,
        stream=stream,
        divisible=supply.divisible,
        tokens=tokens,
        examples=examples,
        planned_tokens=planned,
        planned_sequences=need.sequences,
        # Where a row holds one such example, its number of rows is known only if their number is.
        by_count=2 * stream.total > len(stream) * row_length,
        row_length=row_length,
        unreduced=unreduced,
    )


def _too_few(need: Need, have: int, epochs: int, pool: int | None) -> ValueError:
    pooled = "" if pool is None else f"the pool of {pool:,} of "
    return ValueError(
        f"{pooled}source {need.source!r} holds {have:,} {need.unit}, the plan needs "
        f"{need.amount:,}; raise max_epochs above {epochs} or lower the budget"
    )


def interleaved(stretches: Sequence[Stretch]) -> tuple[np.ndarray, np.ndarray]:
    """Merge the examples of several sources so that each is spread evenly over the whole.

    Returns the stretch of each and its place there, ordered by the share of its stretch's tokens
    that lies before its middle.
    """
    due = [
        (2 * np.cumsum(stretch.lengths) - stretch.lengths)
        / (2 * max(int(stretch.lengths.sum()), 1))
        for stretch in stretches
    ]
    order = np.argsort(np.concatenate([np.zeros(0), *due]), kind="stable")
    number = np.repeat(np.arange(len(stretches)), [len(part) for part in due])
    place = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(part)) for part in due)])
    return number[order], place[order]
