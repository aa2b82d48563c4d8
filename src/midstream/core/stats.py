"""How sure a mean is, over examples and over seeds; and deciding between places of a study.

Over examples, clusters (questions about one picture) are drawn or turned over whole; splits weigh
alike. Over seeds: one model of a study's cells, contrasts of them, seeds needed. A cell is a place
(values of the axes but the repetition's) under one repetition (a seed). Places are fixed,
repetitions are blocks; what is left is the spread that a difference is judged by.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
# A difference of this size is found with this probability by the seeds that `detectable` names.
POWER = 0.8
# Below this p the places' spreads are not taken as equal, and a contrast is judged by its own.
UNEQUAL = 0.1
# Two repetitions can agree to the last digit by chance: their own spread is then zero.
LEAST_OWN = 3

Verdict = Literal["higher", "lower", "same", "undecided"]
# By place, which may be anything, and then by repetition.
Scores = Mapping[Any, Mapping[str, float]]


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of places' means, and its interval by Student's t.

    `sd` is that of the sum in one repetition; `n` counts the repetitions that have all its places.
    `low`, `high` are None, and `why` says why, where nothing can be said. `pooled`: the spread is
    that of all cells of the figure, not of this contrast alone.
    """

    mean: float
    n: int
    sd: float | None = None
    freedom: int = 0
    pooled: bool = False
    why: str = ""
    # Of the two-sided interval: how many standard errors it reaches to either side.
    reach: float = math.nan
    # Of so many places the pair was picked; 2 where it was fixed before.
    places: int = 2

    @property
    def stderr(self) -> float | None:
        """The standard error of `mean`."""
        return None if self.sd is None or not self.n else self.sd / math.sqrt(self.n)

    @property
    def low(self) -> float | None:
        """The interval's lower end."""
        return None if self.stderr is None else self.mean - self.reach * self.stderr

    @property
    def high(self) -> float | None:
        """The interval's upper end."""
        return None if self.stderr is None else self.mean + self.reach * self.stderr

    def repetitions_for(self, half_width: float) -> int | None:
        """Stein's number: so many make the interval reach `half_width` at the most, judged by this
        spread; at least those that there are, None where the spread is unknown.

        Source: C. Stein, A two-sample test for a linear hypothesis whose power is independent of
        the variance, 1945.
        """
        if self.sd is None:
            return None
        return max(self.n, math.ceil((self.reach * self.sd / half_width) ** 2))

    def is_within(self, size: float) -> bool:
        """Whether two one-sided tests, each at 5 %, find the difference smaller than `size`.

        Of a pair that was picked the whole simultaneous interval lies within it.
        """
        if self.stderr is None:
            return False
        reach = self.reach if self.places > 2 else quantile(CONFIDENCE, self.freedom)
        reach *= self.stderr
        return -size < self.mean - reach and self.mean + reach < size

    def verdict(self, size: float) -> Verdict:
        """higher or lower: the interval leaves zero out; same: within `size`; else undecided."""
        if self.low is not None and self.high is not None and (self.low > 0 or self.high < 0):
            return "higher" if self.low > 0 else "lower"
        return "same" if self.is_within(size) else "undecided"


def quantile(share: float, freedom: int) -> float:
    """Student's t below which `share` of the values lie."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


@cache
def _tukey(places: int, freedom: int) -> float:
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, places, freedom)) / math.sqrt(2)


@dataclass(frozen=True)
class Fit:
    """The cells of one score in a figure: place plus repetition plus what is left.

    `spread` is the standard deviation of what is left, `freedom` its degrees of freedom;
    `equal_spread` the p-value of Bartlett's test over the places, None where it cannot be asked.
    """

    scores: Scores
    spread: float | None
    freedom: int
    equal_spread: float | None

    @property
    def pools(self) -> bool:
        """Whether one spread may stand for all places."""
        return self.equal_spread is None or self.equal_spread >= UNEQUAL

    def contrast(self, weights: Mapping[Any, float], places: int = 2) -> Contrast:
        """The sum of the places' means by `weights`, over the repetitions that have all of them.

        With `places` above 2 the interval is simultaneous (Tukey's) for all pairs of so many, as
        where the best one is picked. Raises ValueError unless the weights add up to zero.
        """
        if abs(math.fsum(weights.values())) > 1e-9:
            raise ValueError(f"the weights of a contrast add up to zero, not to {weights}")
        known = [self.scores.get(place, {}) for place in weights]
        names = [name for name in known[0] if all(name in each for each in known)]
        sums = [
            math.fsum(w * each[name] for w, each in zip(weights.values(), known, strict=True))
            for name in names
        ]
        if not sums:
            return Contrast(math.nan, 0, why="the places share no repetition")
        mean = math.fsum(sums) / len(sums)
        if len(sums) == 1:
            return Contrast(mean, 1, why="one repetition")
        size = math.sqrt(math.fsum(w * w for w in weights.values()))
        own = float(np.std(sums, ddof=1))
        pooled = self.pools and self.freedom > len(sums) - 1
        sd, freedom = own, len(sums) - 1
        if pooled and self.spread is not None:
            sd, freedom = self.spread * size, self.freedom
        elif len(sums) < LEAST_OWN:
            return Contrast(mean, len(sums), why="two repetitions, whose own spread says little")
        if sd < 1e-12:
            return Contrast(mean, len(sums), why="a spread of zero")
        reach = quantile((1 + CONFIDENCE) / 2, freedom)
        if places > 2:
            reach = _tukey(places, freedom)
        return Contrast(mean, len(sums), sd, freedom, pooled, reach=reach, places=places)


def fit(scores: Scores) -> Fit:
    """The model of a figure's cells; cells may be missing.

    `scores`: by place, then by repetition. Raises ValueError where a score is not finite.
    """
    cells = [(place, name, value) for place, own in scores.items() for name, value in own.items()]
    for place, name, value in cells:
        if not math.isfinite(value):
            raise ValueError(f"the score at {place} under {name} is {value}; evaluate it again")
    places = [place for place, own in scores.items() if own]
    names = list(dict.fromkeys(name for _, name, _ in cells))
    if not cells:
        return Fit(scores, None, 0, None)
    design = np.zeros((len(cells), len(places) + len(names)))
    for row, (place, name, _) in enumerate(cells):
        design[row, places.index(place)] = design[row, len(places) + names.index(name)] = 1.0
    values = np.array([value for *_, value in cells])
    solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    left = values - design @ solution
    freedom = len(cells) - int(rank)
    spread = math.sqrt(float(left @ left) / freedom) if freedom > 0 else None
    by_place = [[x for x, cell in zip(left, cells, strict=True) if cell[0] == p] for p in places]
    return Fit(scores, spread, freedom, _equal_spread(by_place))


def _equal_spread(left: Sequence[Sequence[float]]) -> float | None:
    from scipy.stats import bartlett

    groups = [group for group in left if len(group) > 2 and np.ptp(group) > 1e-12]
    return float(bartlett(*groups).pvalue) if len(groups) > 2 else None


def trend(places: Sequence[Any]) -> dict[Any, float]:
    """Weights of the rise from the first to the last place on a line through evenly spaced ones."""
    middle = (len(places) - 1) / 2
    squares = sum((at - middle) ** 2 for at in range(len(places)))
    return {p: (at - middle) / squares * (len(places) - 1) for at, p in enumerate(places)}


def detectable(sd: float, n: int, freedom: int) -> float:
    """The true difference that `n` repetitions find with a power of 80 %.

    `sd`: of the difference in one repetition; `freedom`: of the estimate that will judge it.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct

    error, reach = sd / math.sqrt(n), quantile((1 + CONFIDENCE) / 2, freedom)
    missing = lambda size: float(nct.sf(reach, freedom, size)) - POWER  # noqa: E731
    return float(brentq(missing, 0.0, 10 * reach)) * error


def after_more(first: Contrast, more: Contrast) -> Contrast:
    """The contrast of all repetitions, judged by the spread of the first, as Stein's design has it.

    Its interval holds at 95 % whatever number the first ones led to.
    """
    return replace(first, mean=more.mean, n=more.n)


def nested_spread(levels: Sequence[tuple[str, ...]], scores: Sequence[float]) -> list[float]:
    """How much each level of a chain adds to the spread: standard deviations, outermost first.

    `levels` names, for each score, what was drawn for it, outermost first: ("text run 1",
    "image-text 3", "fine-tuning 1"); a name counts within the outer ones. Variances are those that
    make the sums of squares of nested groups, of any sizes, what they are expected to be (Henderson
    1953, method 1); one below nought is nought. Raises ValueError where a level is never repeated
    within another, or two scores have the same names.
    """
    if len(set(levels)) < len(levels):
        raise ValueError("two scores have the same draws; name what was drawn anew between them")
    values, whole = np.asarray(scores, dtype=float), len(levels)
    inner: list[np.ndarray] = []
    for depth in range(len(levels[0]) + 1):
        keys = [level[:depth] for level in levels]
        names = {key: column for column, key in enumerate(dict.fromkeys(keys))}
        groups = np.zeros((whole, len(names)))
        groups[np.arange(whole), [names[key] for key in keys]] = 1.0
        inner.append(groups)
    means = [groups / groups.sum(0) @ groups.T for groups in inner]
    within = [after - before for before, after in pairwise(means)]
    for depth, gain in enumerate(within):
        if np.trace(gain) < 0.5:
            raise ValueError(
                f"level {depth + 1} of {len(within)} is drawn once within each of the one before; "
                "draw it at least twice"
            )
    expected = [[np.trace(groups.T @ gain @ groups) for groups in inner[1:]] for gain in within]
    variances = np.linalg.solve(expected, [values @ gain @ values for gain in within])
    return [math.sqrt(max(0.0, float(variance))) for variance in variances]


RESAMPLES = 2000
# Sign flips of a paired test: p-values are known to a ten-thousandth.
FLIPS = 10_000
# Numbers drawn at a time.
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and its 95 % interval, by a bootstrap over clusters.

    `stderr`, `low` and `high` are None where there are fewer than two clusters.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """Mean score of one model less that of another on the same examples.

    `p_value` is two-sided, by turning over the sign of whole clusters (a permutation test). None
    where there are fewer than two clusters.
    """

    p_value: float | None
    num_examples: int
    num_clusters: int


def split_means(scores: Sequence[float], splits: Sequence[str]) -> dict[str, float]:
    """The mean score of each split, in the order of first appearance."""
    by_split: dict[str, list[float]] = defaultdict(list)
    for score, split in zip(scores, splits, strict=True):
        by_split[split].append(score)
    return {split: math.fsum(values) / len(values) for split, values in by_split.items()}


def mean_by_split(scores: Sequence[float], splits: Sequence[str]) -> float:
    """The mean of the splits' means; ValueError without a score."""
    if not scores:
        raise ValueError("there is no score to average; evaluate at least one example")
    means = split_means(scores, splits)
    return math.fsum(means.values()) / len(means)


def standard_error(
    scores: Sequence[float],
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
) -> float | None:
    """The standard error of `mean_by_split` in closed form, `groups` being clusters.

    None where there are fewer than two clusters, since nothing can be said then.
    """
    pulls = _pulls(scores, groups, splits)
    if len(pulls) < 2:
        return None
    squares = math.fsum(pull * pull for pull in pulls)
    return math.sqrt(squares * len(pulls) / (len(pulls) - 1))


def bootstrap(
    scores: Sequence[float],
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    """`mean_by_split` and how it varies where clusters are drawn again with replacement.

    scores: one number an example; groups: its cluster (each its own without them); splits: see
    `mean_by_split`. Raises ValueError without a score.
    """
    splits = splits if splits is not None else [""] * len(scores)
    groups = groups if groups is not None else [str(index) for index in range(len(scores))]
    mean = mean_by_split(scores, splits)
    cluster_of = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    split_of = {name: number for number, name in enumerate(dict.fromkeys(splits))}
    num_clusters = len(cluster_of)
    if num_clusters < 2:
        return Estimate(mean, None, None, None)
    places = (
        np.array([cluster_of[group] for group in groups]),
        np.array([split_of[split] for split in splits]),
    )
    totals = np.zeros((num_clusters, len(split_of)))
    counts = np.zeros_like(totals)
    np.add.at(totals, places, np.asarray(scores, dtype=np.float64))
    np.add.at(counts, places, 1.0)
    generator = np.random.default_rng([0, num_clusters, len(scores)])
    means = np.empty(resamples)
    part = max(1, _AT_ONCE // num_clusters)
    for start in range(0, resamples, part):
        size = min(part, resamples - start)
        drawn = generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size)
        held = drawn @ counts
        # A split of which nothing was drawn says nothing in that resample.
        with np.errstate(invalid="ignore"):
            by_split = np.where(held > 0, drawn @ totals / held, np.nan)
        means[start : start + size] = np.nanmean(by_split, axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = map(float, np.quantile(means, [tail, 1 - tail]))
    # As many clusters as there are, less one, are free: without it the error is too small.
    stderr = float(means.std()) * math.sqrt(num_clusters / (num_clusters - 1))
    return Estimate(mean, stderr, low, high)


def paired_difference(
    one: Sequence[float],
    other: Sequence[float],
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
) -> PairedDifference:
    """How much better `one` is than `other` on the same examples, in the same order.

    Raises ValueError where the numbers of scores differ or there is none.
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} scores are paired with {len(other)}; pair the same examples")
    gaps = [first - second for first, second in zip(one, other, strict=True)]
    found = bootstrap(gaps, groups, splits)
    pulls = np.array(_pulls(gaps, groups, splits, centred=False))
    p_value = _sign_flip(pulls) if len(pulls) > 1 else None
    return PairedDifference(
        **vars(found), p_value=p_value, num_examples=len(gaps), num_clusters=len(pulls)
    )


def _pulls(
    scores: Sequence[float],
    groups: Sequence[str] | None,
    splits: Sequence[str] | None,
    *,
    centred: bool = True,
) -> list[float]:
    """How far each cluster pulls the mean from its value, or from zero."""
    splits = splits if splits is not None else [""] * len(scores)
    groups = groups if groups is not None else [str(index) for index in range(len(scores))]
    means = split_means(scores, splits)
    sizes = Counter(splits)
    pulls: dict[str, float] = defaultdict(float)
    for score, group, split in zip(scores, groups, splits, strict=True):
        pull = score - means[split] if centred else score
        pulls[group] += pull / (sizes[split] * len(means))
    return list(pulls.values())


def _sign_flip(pulls: np.ndarray) -> float:
    """How often signs turned at random make a difference at least as large."""
    seen = abs(float(pulls.sum()))
    generator = np.random.default_rng([0, len(pulls), 1])
    as_large, part = 0, max(1, _AT_ONCE // len(pulls))
    for start in range(0, FLIPS, part):
        size = min(part, FLIPS - start)
        signs = generator.integers(0, 2, (size, len(pulls)), dtype=np.int8) * 2 - 1
        # Sums of the same numbers in another order differ in the last bits.
        as_large += int((np.abs(signs @ pulls) >= seen * (1 - 1e-9) - 1e-15).sum())
    return (1 + as_large) / (1 + FLIPS)
