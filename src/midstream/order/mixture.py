"""Budgets: what they ask of each source, whether the source has it, and how it lies in a row plan.

A row plan is cut into blocks that all have the whole plan's shares. Text is taken to the token;
examples that stay whole (captions, conversations) are taken as long as more than half of one lies
inside the budget. What a block holds follows from the block's number alone.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from midstream.config import Amounts, Budget, Epochs, Mixture
from midstream.core.tokens import apportion
from midstream.order.stream import Lengths, Stream, Stretch


@dataclass(frozen=True)
class Need:
    """What a budget asks of one source: so many tokens (patches included), whole examples, or
    passes over all of it.

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
    if budget.by == "tokens":
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
    token; other examples stay whole.
    """

    name: str
    lengths: Lengths
    divisible: bool


@dataclass(frozen=True)
class Quota:
    """How much of a source a plan takes: its first `tokens` tokens, or `examples` whole ones.

    planned_tokens is what the budget says, None where it counts passes or sequences. `by_count`
    spreads whole examples evenly by number, else by tokens. Text is cut between blocks only where
    a document begins, or in a longer one behind a whole number of rows.
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
        raise ValueError(f"the plan holds no token; raise the budget {budget.model_dump()}")
    return found


def _quota(supply: Supply, need: Need, budget: Budget, row_length: int, seed: int) -> Quota:
    if isinstance(budget, Epochs) or need.unit == "epochs":
        return _passes(supply, need.amount, row_length, seed)
    if need.sequences is not None and isinstance(budget, Mixture):
        return _sequences(supply, need.sequences, budget, row_length, seed)
    return _tokens(supply, need.amount, budget, row_length, seed)


def _stream(supply: Supply, budget: Mixture | Amounts | None, seed: int) -> Stream:
    sampling = "permutation" if budget is None else budget.sampling
    return Stream(supply.lengths, f"{seed}/{supply.name}", sampling)


def _by_count(supply: Supply, row_length: int) -> bool:
    # Where a row holds one such example, its number of rows is known only if their number is.
    return 2 * supply.lengths.total > len(supply.lengths) * row_length


def _passes(supply: Supply, epochs: int, row_length: int, seed: int) -> Quota:
    stream, examples = _stream(supply, None, seed), epochs * len(supply.lengths)
    return Quota(
        name=supply.name,
        stream=stream,
        divisible=supply.divisible,
        tokens=stream.tokens_before(examples),
        examples=examples,
        planned_tokens=None,
        planned_sequences=None,
        by_count=_by_count(supply, row_length),
        row_length=row_length,
    )


def _tokens(
    supply: Supply, tokens: int, budget: Mixture | Amounts, row_length: int, seed: int
) -> Quota:
    if not supply.lengths.drawn:
        _check(supply, tokens, supply.lengths.total, "tokens", budget)
    stream = _stream(supply, budget, seed)
    limit = None if budget.sampling == "replacement" else budget.max_epochs * len(supply.lengths)
    if not stream.reach(tokens, limit if supply.lengths.drawn else None):
        # Other captions, another sum: what the passes hold is known once they are drawn.
        raise _too_few(supply, tokens, stream.tokens_before(limit or 0), "tokens", budget)
    examples, taken = 0, tokens
    if not supply.divisible and tokens:
        # A share that is less than half an example is seen all the same.
        examples = max(1, stream.count_before(2 * tokens))
        taken = stream.tokens_before(examples)
    return Quota(
        name=supply.name,
        stream=stream,
        divisible=supply.divisible,
        tokens=taken,
        examples=examples,
        planned_tokens=tokens,
        planned_sequences=None,
        by_count=_by_count(supply, row_length),
        row_length=row_length,
    )


def _sequences(
    supply: Supply, sequences: int, budget: Mixture, row_length: int, seed: int
) -> Quota:
    if supply.divisible:
        found = _tokens(supply, sequences * row_length, budget, row_length, seed)
        return Quota(**{**found.__dict__, "planned_tokens": None, "planned_sequences": sequences})
    _check(supply, sequences, len(supply.lengths), "examples", budget)
    stream = _stream(supply, budget, seed)
    return Quota(
        name=supply.name,
        stream=stream,
        divisible=False,
        tokens=stream.tokens_before(sequences),
        examples=sequences,
        planned_tokens=None,
        planned_sequences=sequences,
        by_count=_by_count(supply, row_length),
        row_length=row_length,
    )


def _check(supply: Supply, need: int, have: int, unit: str, budget: Mixture | Amounts) -> None:
    if budget.sampling == "permutation" and need > have * budget.max_epochs:
        raise _too_few(supply, need, have, unit, budget)


def _too_few(
    supply: Supply, need: int, have: int, unit: str, budget: Mixture | Amounts
) -> ValueError:
    return ValueError(
        f"source {supply.name!r} holds {have:,} {unit}, the plan needs {need:,}; "
        f"raise max_epochs above {budget.max_epochs} or lower the budget"
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
