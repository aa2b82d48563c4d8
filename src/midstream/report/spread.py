"""Values over repetitions: mean, standard deviation, differences with their 95 % interval."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, each under the name of its repetition (such as "seed=0")."""

    values: tuple[tuple[str, float | int], ...]

    @property
    def n(self) -> int:
        """How many repetitions have the value."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """The mean; None without a value."""
        return fmean(value for _, value in self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None below two values, where no spread is known."""
        return stdev(value for _, value in self.values) if self.n > 1 else None


@dataclass(frozen=True)
class Difference:
    """Mean of one group less the mean of another, and its 95 % interval by Student's t.

    `low`, `high` and `sd` are None where too few repetitions leave the spread unknown. `sd` is the
    pooled one, or that of the differences where `paired`.
    """

    mean: float | int
    sd: float | int | None
    n: tuple[int, int]
    low: float | None
    high: float | None
    paired: bool

    @property
    def exceeds_spread(self) -> bool | None:
        """Whether the interval leaves out zero; None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def difference(one: Spread, other: Spread) -> Difference | None:
    """Mean of `one` less mean of `other`, both with one pooled spread; None without two means."""
    if one.mean is None or other.mean is None:
        return None
    freedom = one.n + other.n - 2
    squares = sum(
        (value - spread.mean) ** 2
        for spread in (one, other)
        for _, value in spread.values
        if spread.mean is not None
    )
    sd = math.sqrt(squares / freedom) if freedom else None
    error = None if sd is None else sd * math.sqrt(1 / one.n + 1 / other.n)
    return _difference(one.mean - other.mean, sd, error, (one.n, other.n), freedom, paired=False)


def paired_difference(one: Spread, other: Spread) -> Difference | None:
    """As `difference`, from the differences within each repetition; None unless they match."""
    first, second = dict(one.values), dict(other.values)
    if not first or first.keys() != second.keys():
        return None
    gaps = Spread(tuple((name, first[name] - second[name]) for name in first))
    error = None if gaps.sd is None else gaps.sd / math.sqrt(gaps.n)
    assert gaps.mean is not None
    return _difference(gaps.mean, gaps.sd, error, (one.n, other.n), gaps.n - 1, paired=True)


def _difference(
    mean: float,
    sd: float | None,
    error: float | None,
    n: tuple[int, int],
    freedom: int,
    *,
    paired: bool,
) -> Difference:
    if error is None:
        return Difference(mean, sd, n, None, None, paired)
    half = t_quantile(freedom) * error
    return Difference(mean, sd, n, mean - half, mean + half, paired)


def t_quantile(freedom: int) -> float:
    """The half width, in standard errors, of a 95 % interval at `freedom` degrees of freedom.

    Source: the finite series for whole degrees, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    if freedom < 1:
        raise ValueError(f"an interval needs 1 degree of freedom or more, got {freedom}")
    low, high = 0.0, 1000.0
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
