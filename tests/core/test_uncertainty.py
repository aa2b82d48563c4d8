"""Intervals and paired tests against closed forms and against repeated sampling."""

import math
import random

import numpy as np
import pytest

from midstream.core.stats import bootstrap, mean_by_split, paired_difference, standard_error


def clustered(seed: int, clusters: int = 60, each: int = 4) -> tuple[list[float], list[str]]:
    """Scores that agree within a cluster more than between clusters."""
    draws = random.Random(seed)
    scores, groups = [], []
    for cluster in range(clusters):
        level = draws.gauss(0.5, 0.3)
        for _ in range(each):
            scores.append(level + draws.gauss(0, 0.05))
            groups.append(str(cluster))
    return scores, groups


def test_the_bootstrap_agrees_with_the_closed_form() -> None:
    scores, groups = clustered(0)
    splits = ["a" if int(group) % 3 else "b" for group in groups]
    for own_splits in (None, splits):
        found = bootstrap(scores, groups, own_splits, resamples=8000)
        assert found.stderr == pytest.approx(standard_error(scores, groups, own_splits), rel=0.05)
        assert found.mean == mean_by_split(scores, own_splits or [""] * len(scores))
        half = (found.high - found.low) / 2
        assert half == pytest.approx(1.96 * (found.stderr or 0), rel=0.06)


def test_clusters_widen_an_interval_as_repeated_sampling_does() -> None:
    means = [sum(clustered(seed)[0]) / 240 for seed in range(300)]
    true = float(np.std(means))
    scores, groups = clustered(1)
    assert bootstrap(scores, groups).stderr == pytest.approx(true, rel=0.3)
    alone = bootstrap(scores).stderr
    assert alone < 0.65 * true


def test_the_same_scores_give_the_same_interval() -> None:
    scores, groups = clustered(3)
    assert bootstrap(scores, groups) == bootstrap(scores, groups)


def test_one_cluster_says_nothing() -> None:
    found = bootstrap([1.0, 0.0], ["one", "one"])
    assert (found.mean, found.stderr, found.low, found.high) == (0.5, None, None, None)
    assert paired_difference([1.0, 0.0], [0.0, 0.0], ["one", "one"]).p_value is None


def test_pairing_sees_a_small_difference_that_two_intervals_hide() -> None:
    scores, groups = clustered(4)
    draws = random.Random(5)
    better = [score + 0.02 + draws.gauss(0, 0.02) for score in scores]
    found = paired_difference(better, scores, groups)
    apart = bootstrap(scores, groups)
    assert found.mean == pytest.approx(0.02, abs=0.005)
    assert found.low > 0
    assert found.p_value < 0.001
    assert apart.high - apart.mean > 3 * found.mean
    assert (found.num_examples, found.num_clusters) == (240, 60)


def test_a_p_value_is_that_of_all_sign_flips() -> None:
    gaps = [0.3, -0.1, 0.4, 0.2, 0.5, 0.1]
    means = []
    for signs in range(2 ** len(gaps)):
        flipped = [gap if signs >> i & 1 else -gap for i, gap in enumerate(gaps)]
        means.append(abs(sum(flipped)))
    exact = sum(value >= abs(sum(gaps)) - 1e-12 for value in means) / len(means)
    found = paired_difference(gaps, [0.0] * len(gaps))
    assert found.p_value == pytest.approx(exact, abs=0.01)


def test_scores_of_other_examples_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="2 scores are paired with 1"):
        paired_difference([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="no score"):
        bootstrap([])
    assert math.isclose(paired_difference([1.0] * 5, [1.0] * 5).p_value or 0, 1.0)
