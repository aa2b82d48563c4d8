"""How sure a mean over examples is: standard errors, intervals, differences of two models.

Clusters (questions about one picture) are drawn or turned over whole; splits weigh alike.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from midstream.core.decide import CONFIDENCE

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
