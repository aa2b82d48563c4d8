"""Laws over sizes: parameters come back, intervals hold, what nothing can be told of is refused."""

from collections.abc import Sequence

import numpy as np
import pytest

from midstream.core.laws import Law, UnidentifiedError, fit_law, fit_trend

SIZES = (47_000, 85_000, 168_000, 344_000)
FLOORS = {"thin": 1.2, "dense": 1.1}
AMPLITUDE, EXPONENT = 1.0, 0.5
Ladder = dict[str, dict[int, list[float]]]


def true(place: str, size: float, exponent: float = EXPONENT) -> float:
    return FLOORS[place] + AMPLITUDE * (size / SIZES[0]) ** -exponent


def ladder(seed: int, spread: float, *, models: int = 3, exponent: float = EXPONENT) -> Ladder:
    """Models of each size at each place, drawn about the law."""
    generator = np.random.default_rng(seed)
    return {
        place: {
            size: list(true(place, size, exponent) * np.exp(spread * generator.normal(size=models)))
            for size in SIZES
        }
        for place in FLOORS
    }


def fitted(found: Ladder, sizes: Sequence[int] = SIZES[:-1], resamples: int = 20) -> Law:
    seen = {place: {size: own[size] for size in sizes} for place, own in found.items()}
    return fit_law(seen, resamples=resamples)


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.5])
def test_a_laws_own_parameters_are_found(exponent: float) -> None:
    law = fitted(ladder(1, 1e-5, exponent=exponent), SIZES)
    assert law.exponent.value == pytest.approx(exponent, rel=0.02)
    assert law.amplitude == pytest.approx(AMPLITUDE, rel=0.02)
    for place, floor in FLOORS.items():
        assert law.floor(place) == pytest.approx(floor, rel=0.02)
        assert law.at(place, 10**6) == pytest.approx(true(place, 10**6, exponent), rel=1e-3)
    assert law.exponent.low < exponent < law.exponent.high
    assert law.spread == pytest.approx(1e-5, rel=0.5)


def test_a_model_that_went_wrong_moves_a_law_little() -> None:
    found = ladder(2, 0.002, models=5)
    before = fitted(found).at("thin", SIZES[-1])
    found["thin"][SIZES[1]][0] *= 1.05
    after = fitted(found)
    assert after.at("thin", SIZES[-1]) == pytest.approx(before, rel=0.01)
    assert after.spread > 0.005


def test_more_models_of_the_new_size_narrow_its_interval_down_to_the_laws_own() -> None:
    law = fitted(ladder(3, 0.01))
    one, many, most = (law.predict("thin", SIZES[-1], n) for n in (1, 10, 10**9))
    assert one.high - one.low > many.high - many.low > most.high - most.low > 0
    assert one.low < law.at("thin", SIZES[-1]) == one.value < one.high


def test_a_loss_that_goes_on_falling_by_as_much_shows_no_floor() -> None:
    generator = np.random.default_rng(0)
    found = {
        "": {
            size: list(2 - 0.3 * np.log(size / SIZES[0]) + 1e-4 * generator.normal(size=3))
            for size in SIZES
        }
    }
    law = fit_law(found, resamples=20)
    assert law.floor("") is None
    assert law.at("", 2 * SIZES[-1]) == pytest.approx(
        2 - 0.3 * np.log(2 * SIZES[-1] / SIZES[0]), rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spread", "ladders"), [pytest.param(0.004, 300, marks=pytest.mark.faults), (0.01, 50)]
)
def test_a_left_out_size_lies_in_its_interval_as_often_as_is_said(
    spread: float, ladders: int
) -> None:
    hits = []
    for number in range(ladders):
        found = ladder(1000 + number, spread)
        law = fitted(found, resamples=40)
        for place, own in found.items():
            told = law.predict(place, SIZES[-1], 3)
            hits.append(told.holds(float(np.mean(own[SIZES[-1]]))))
    assert 0.92 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ({"": {1000: [2.0, 2.1], 2000: [1.8, 1.9]}}, "3 of them at least, and there are 2"),
        ({"": {1000: [2.0, 2.1], 2000: [1.8], 4000: [1.6, 1.7]}}, "1 model at , size 2,000"),
        ({"": {1000: [2.0, 2.0], 2000: [1.8, 1.8], 4000: [1.6, 1.6]}}, "all equal"),
        ({"": {1000: [2.0, 2.1], 2000: [2.1, 2.0], 4000: [2.0, 2.1]}}, "falls by 0.00 %"),
        ({"": {1000: [1.8, 1.9], 2000: [1.9, 2.0], 4000: [2.1, 2.2]}}, "further apart, or more"),
    ],
)
def test_what_no_law_can_be_told_of_is_refused(
    found: dict[str, dict[int, list[float]]], what: str
) -> None:
    with pytest.raises(UnidentifiedError, match=what):
        fit_law(found)


def test_a_loss_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"at thin, size 2,000, are \[1.8, 0.0\]"):
        fit_law({"thin": {1000: [2.0, 2.1], 2000: [1.8, 0.0], 4000: [1.6, 1.7]}})


def test_an_effects_line_is_found_and_refused_as_a_law_is() -> None:
    generator = np.random.default_rng(0)
    pairs = {
        size: list(0.02 + 0.01 * np.log2(size / SIZES[0]) + 1e-5 * generator.normal(size=3))
        for size in SIZES[:-1]
    }
    line = fit_trend(pairs)
    assert line.slope == pytest.approx(0.01, rel=0.01)
    assert line.doubling.low < 0.01 < line.doubling.high
    assert line.at(8 * SIZES[0]) == pytest.approx(0.05, rel=0.01)
    for refused in ({1: [0.1, 0.2], 2: [0.1, 0.2]}, {1: [0.1], 2: [0.1, 0.2], 4: [0.1, 0.2]}):
        with pytest.raises(UnidentifiedError):
            fit_trend(refused)


def test_an_effect_lies_in_its_interval_as_often_as_is_said() -> None:
    hits = []
    for number in range(600):
        generator = np.random.default_rng(number)
        pairs = {
            size: list(0.02 + 0.01 * np.log2(size / SIZES[0]) + 0.03 * generator.normal(size=3))
            for size in SIZES
        }
        told = fit_trend({size: pairs[size] for size in SIZES[:-1]}).predict(SIZES[-1], 3)
        hits.append(told.holds(float(np.mean(pairs[SIZES[-1]]))))
    assert 0.92 <= np.mean(hits) <= 0.98
