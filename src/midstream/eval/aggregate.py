"""From scores of examples to scores of tasks, and from those to the stable score."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence


def stable_score(scores: Mapping[str, float], chances: Mapping[str, float]) -> float:
    """The mean over tasks of score minus chance, without rescaling (paper, section 2.2).

    Raises ValueError unless both name the same tasks, at least one.
    """
    if not scores or set(scores) != set(chances):
        raise ValueError(
            f"the stable score needs the same tasks on both sides, at least one; scores without "
            f"chance: {sorted(set(scores) - set(chances))}, chances without score: "
            f"{sorted(set(chances) - set(scores))}"
        )
    return math.fsum(scores[task] - chances[task] for task in scores) / len(scores)


def split_means(scores: Sequence[float], splits: Sequence[str]) -> dict[str, float]:
    """The mean score of each split, in the order of first appearance."""
    by_split: dict[str, list[float]] = defaultdict(list)
    for score, split in zip(scores, splits, strict=True):
        by_split[split].append(score)
    return {split: math.fsum(values) / len(values) for split, values in by_split.items()}


def mean_by_split(scores: Sequence[float], splits: Sequence[str]) -> float:
    """The mean of the splits' means: splits weigh the same however many examples they hold."""
    if not scores:
        raise ValueError("there is no score to average; evaluate at least one example")
    means = split_means(scores, splits)
    return math.fsum(means.values()) / len(means)


def standard_error(
    scores: Sequence[float],
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
) -> float | None:
    """The standard error of the mean, or of `mean_by_split` where `splits` are given.

    `groups` are clusters whose scores depend on one another (questions about one picture).
    None where there are fewer than two clusters, since nothing can be said then.
    """
    splits = splits if splits is not None else [""] * len(scores)
    groups = groups if groups is not None else [str(index) for index in range(len(scores))]
    means = split_means(scores, splits)
    sizes = Counter(splits)
    pulls: dict[str, float] = defaultdict(float)  # each cluster's pull on the mean
    for score, group, split in zip(scores, groups, splits, strict=True):
        pulls[group] += (score - means[split]) / (sizes[split] * len(means))
    if len(pulls) < 2:
        return None
    squares = math.fsum(pull * pull for pull in pulls.values())
    return math.sqrt(squares * len(pulls) / (len(pulls) - 1))
