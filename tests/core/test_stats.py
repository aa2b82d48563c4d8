"""Verdicts that are wrong as often as they say, numbers of seeds that do what they promise, and
intervals and paired tests against closed forms and repeated sampling."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from midstream.core.stats import (
    Contrast,
    after_more,
    bootstrap,
    detectable,
    fit,
    mean_by_split,
    nested_spread,
    paired_difference,
    quantile,
    standard_error,
    trend,
)

PLACES = 7


def simulated(
    generator: np.random.Generator,
    seeds: int,
    spreads: Sequence[float] = (1.0,) * PLACES,
    failing: float = 0.0,
) -> dict[int, dict[str, float]]:
    """Scores of places that do not differ, over seeds that do; a share fails by ten spreads."""
    scores = (
        generator.normal(0, 2, seeds)
        + generator.normal(0, 1, (len(spreads), seeds)) * (np.asarray(spreads)[:, None])
    )
    scores = np.where(generator.random(scores.shape) < failing, scores - 10, scores)
    return {p: {f"seed={s}": float(x) for s, x in enumerate(own)} for p, own in enumerate(scores)}


EQUAL, UNEQUAL = (1.0,) * PLACES, tuple(np.linspace(1, 3, PLACES))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "spreads", "failing"),
    [
        (3, EQUAL, 0.0),
        (4, UNEQUAL, 0.0),
        (3, EQUAL, 0.02),
        *(
            pytest.param(*rest, marks=pytest.mark.faults)
            for rest in ((4, EQUAL, 0.0), (3, UNEQUAL, 0.0), (4, EQUAL, 0.02))
        ),
    ],
)
def test_two_arms_that_differ_by_name_only_are_told_apart_in_five_of_a_hundred_studies(
    seeds: int, spreads: tuple[float, ...], failing: float
) -> None:
    generator = np.random.default_rng([seeds, len(spreads), int(failing * 100), 5])
    verdicts = []
    for _ in range(1000):
        one, other = generator.choice(PLACES, 2, replace=False)
        contrast = fit(simulated(generator, seeds, spreads, failing)).contrast(
            {int(one): 1.0, int(other): -1.0}
        )
        verdicts.append(contrast.verdict(0.0))
    wrong = sum(verdict in ("higher", "lower") for verdict in verdicts) / len(verdicts)
    assert 0.03 <= wrong <= 0.07


@pytest.mark.slow
def test_picking_the_best_of_seven_equal_places_decides_in_five_of_a_hundred_studies() -> None:
    generator = np.random.default_rng(6)
    wrong = 0
    for _ in range(600):
        scores = simulated(generator, 4)
        means = {place: np.mean(list(own.values())) for place, own in scores.items()}
        order = sorted(means, key=lambda place: -means[place])
        best = fit(scores).contrast({order[0]: 1.0, order[-1]: -1.0}, places=PLACES)
        wrong += best.verdict(0.0) == "higher"
    assert 0.02 <= wrong / 600 <= 0.08


def test_with_two_places_the_pooled_contrast_is_the_paired_t_test() -> None:
    one, other = [3.1, 2.7, 4.4, 3.0], [2.2, 2.6, 3.1, 2.8]
    scores = {
        name: {str(seed): value for seed, value in enumerate(values)}
        for name, values in (("one", one), ("other", other))
    }
    ours = fit(scores).contrast({"one": 1.0, "other": -1.0})
    theirs = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_a_contrast_is_judged_by_all_cells_where_their_spreads_are_equal() -> None:
    model = fit(simulated(np.random.default_rng(1), 4))
    contrast = model.contrast({0: 1.0, 1: -0.5, 2: -0.5})
    assert contrast.pooled
    assert contrast.freedom == (PLACES - 1) * 3
    assert contrast.sd == pytest.approx(model.spread * math.sqrt(1.5))


def test_a_place_with_a_wild_spread_is_judged_by_its_own() -> None:
    model = fit(simulated(np.random.default_rng(1), 8, (1.0,) * 6 + (30.0,)))
    assert model.equal_spread < 1e-6
    calm, wild = model.contrast({0: 1.0, 1: -1.0}), model.contrast({0: 1.0, 6: -1.0})
    assert (calm.freedom, wild.freedom) == (7, 7)
    assert not calm.pooled
    assert wild.sd > 5 * calm.sd


def test_a_missing_cell_leaves_a_contrast_the_repetitions_that_have_both_places() -> None:
    scores = simulated(np.random.default_rng(2), 4)
    del scores[0]["seed=3"]
    model = fit(scores)
    assert model.freedom == PLACES * 4 - 1 - (PLACES + 4 - 1)
    assert model.contrast({0: 1.0, 1: -1.0}).n == 3


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ({"a": {"1": 0.5}, "b": {"2": 0.4}}, "share no repetition"),
        ({"a": {"1": 0.5}, "b": {"1": 0.4}}, "one repetition"),
        ({"a": {"1": 0.5, "2": 0.6}, "b": {"1": 0.4, "2": 0.5}}, "two repetitions"),
        ({"a": dict.fromkeys("123", 0.5), "b": dict.fromkeys("123", 0.25)}, "spread of zero"),
    ],
)
def test_what_cannot_be_judged_is_not_and_says_why(
    scores: dict[str, dict[str, float]], why: str
) -> None:
    contrast = fit(scores).contrast({"a": 1.0, "b": -1.0})
    assert why in contrast.why
    assert contrast.low is None
    assert contrast.verdict(1.0) == "undecided"


def test_two_repetitions_of_many_places_are_judged_by_the_pooled_spread() -> None:
    contrast = fit(simulated(np.random.default_rng(3), 2)).contrast({0: 1.0, 1: -1.0})
    assert contrast.pooled
    assert contrast.freedom == PLACES - 1


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a under 1 is nan"):
        fit({"a": {"1": math.nan}})


def test_weights_that_do_not_add_up_to_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to zero"):
        fit({"a": {"1": 0.5}}).contrast({"a": 1.0})


@pytest.mark.parametrize(
    ("mean", "sd", "verdict"),
    [(3.0, 1.0, "higher"), (-3.0, 1.0, "lower"), (0.1, 1.0, "same"), (0.1, 6.0, "undecided")],
)
def test_the_four_verdicts(mean: float, sd: float, verdict: str) -> None:
    reach = quantile(0.975, 12)
    assert Contrast(mean, 4, sd, 12, True, reach=reach).verdict(2.0) == verdict


@pytest.mark.slow
def test_same_is_said_wrongly_in_at_most_five_of_a_hundred_studies() -> None:
    generator = np.random.default_rng(8)
    wrong = 0
    for _ in range(1000):
        scores = simulated(generator, 6)
        scores[0] = {name: value + 2.0 for name, value in scores[0].items()}
        wrong += fit(scores).contrast({0: 1.0, 1: -1.0}).is_within(2.0)
    assert 0.03 <= wrong / 1000 <= 0.07


def test_a_trend_is_the_rise_of_the_line_of_least_squares() -> None:
    values = [1.0, 4.0, 2.0, 6.0]
    slope = stats.linregress(range(4), values).slope
    weights = trend(range(4))
    rise = sum(weights[at] * value for at, value in enumerate(values))
    assert rise == pytest.approx(3 * slope)
    assert sum(weights.values()) == pytest.approx(0)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, pytest.param(3.0, marks=pytest.mark.faults)])
def test_steins_design_covers_at_95_percent_within_the_half_width(spread: float) -> None:
    """Whatever the spread is, the interval is as narrow as asked and holds the truth."""
    generator = np.random.default_rng([4, int(spread)])
    covered, rounds, truth = 0, 1000, 0.7
    for _ in range(rounds):
        scores = simulated(generator, 3, (spread,) * PLACES)
        scores[0] = {name: value + truth for name, value in scores[0].items()}
        first = fit(scores).contrast({0: 1.0, 1: -1.0})
        assert first.sd is not None
        total = first.repetitions_for(1.0)
        further = generator.normal(truth, spread * math.sqrt(2), total - 3)
        more = Contrast((3 * first.mean + float(further.sum())) / total, total)
        last = after_more(first, more)
        assert last.high - last.low <= 2.0 + 1e-9
        covered += last.low <= truth <= last.high
    assert 0.93 <= covered / rounds <= 0.97


@pytest.mark.slow
def test_the_detectable_difference_is_found_in_eight_of_ten_studies() -> None:
    generator = np.random.default_rng(9)
    size = detectable(math.sqrt(2), 4, (PLACES - 1) * 3)
    found = 0
    for _ in range(1000):
        scores = simulated(generator, 4)
        scores[0] = {name: value + size for name, value in scores[0].items()}
        found += fit(scores).contrast({0: 1.0, 1: -1.0}).verdict(0.0) == "higher"
    assert 0.75 <= found / 1000 <= 0.85


@pytest.mark.slow
def test_the_spread_of_each_level_of_the_chain_is_found() -> None:
    generator, sizes = np.random.default_rng(10), (3.0, 1.0, 2.0)
    levels = [
        (str(a), str(b), str(c))
        for a in range(4)
        for b in range(3 + a % 2)
        for c in range(2 + b % 2)
    ]
    squares = np.zeros(3)
    for _ in range(300):
        drawn: dict[tuple[str, ...], float] = {}
        scores = [
            sum(drawn.setdefault(at[: d + 1], generator.normal(0, sizes[d])) for d in range(3))
            for at in levels
        ]
        squares += np.square(nested_spread(levels, scores))
    # One below nought counts as nought, so that the mean of the middle one is a little large.
    assert np.sqrt(squares / 300) == pytest.approx(sizes, rel=0.2)


@pytest.mark.parametrize(
    ("levels", "what"),
    [([("a", "1"), ("a", "1")], "same draws"), ([("a", "1"), ("b", "1")], "level 2")],
)
def test_a_level_that_is_never_repeated_is_refused(
    levels: list[tuple[str, ...]], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        nested_spread(levels, [1.0, 2.0])


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
