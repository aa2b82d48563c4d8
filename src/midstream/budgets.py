"""What a budget asks of each source, and whether the source has it: before a plan, and in it."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from midstream.config import Amounts, Budget, Epochs, Mixture
from midstream.tokens import apportion


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
