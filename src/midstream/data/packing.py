"""A stage's plan: every row of it, found by its number alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from midstream.config import Budget, Rows
from midstream.data.filling import Filled
from midstream.data.joining import Joined, Padded
from midstream.data.mixture import Quota, Supply, quotas_of
from midstream.data.placement import Placement


@runtime_checkable
class Layout(Protocol):
    """Rows by number."""

    def __len__(self) -> int:
        """Rows."""

    def row(self, index: int) -> list[Placement]:
        """What stands in a row."""

    def sees_all(self, index: int) -> bool:
        """Whether the documents of the row see each other."""


@dataclass(frozen=True)
class RowPlan:
    """Every row of a stage."""

    quotas: tuple[Quota, ...]
    rows: Rows
    layout: Layout

    def __len__(self) -> int:
        return len(self.layout)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sources, as `Placement.source` numbers them."""
        return tuple(quota.name for quota in self.quotas)

    @property
    def num_steps(self) -> int:
        """Optimiser steps; the last one may hold fewer rows."""
        return -(-len(self) // self.rows.batch_rows)

    @property
    def seen_tokens(self) -> int:
        """Positions that are not padding, over all rows."""
        return sum(quota.tokens for quota in self.quotas)

    def examples_of(self, source: int, at_once: int = 4096) -> Iterator[np.ndarray]:
        """The whole examples that the plan takes of a source, some at a time, in its order."""
        quota = self.quotas[source]
        for low in range(0, quota.examples, at_once):
            yield quota.stream.places(low, min(low + at_once, quota.examples)).examples


def make_plan(supplies: Sequence[Supply], budget: Budget, rows: Rows, seed: int) -> RowPlan:
    """Plan a stage; nothing is listed, so that time and memory do not grow with the plan.

    Raises ValueError for an unknown source, a budget that cannot be met, or examples that stay
    whole in the joined layout.
    """
    quotas = tuple(quotas_of(supplies, budget, row_length=rows.row_length, seed=seed))
    if rows.layout == "joined":
        whole = [quota.name for quota in quotas if not quota.divisible]
        if whole:
            raise ValueError(
                f"the joined layout is for text only, {whole} are none; choose filled or padded"
            )
        return RowPlan(quotas, rows, Joined(quotas, range(len(quotas)), rows.row_length, str(seed)))
    if rows.layout == "padded":
        return RowPlan(quotas, rows, Padded(quotas, rows.row_length, str(seed)))
    return RowPlan(quotas, rows, Filled(quotas, rows.row_length, str(seed)))
