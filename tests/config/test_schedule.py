import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.config import Constant, ContinuedCosine, WarmupCosine, WarmupStableDecay
from midstream.config.training import check_start, moments_factor, rate_at

# The text run of the paper's 1.4B model: 512 sequences of 2,048 tokens a step.
STEP_TOKENS = 512 * 2048
NUM_STEPS, WARMUP_STEPS = 4_119_287, 5_000
PAPER = WarmupCosine(peak_rate=1e-2, end_rate=3e-5, warmup_fraction=WARMUP_STEPS / NUM_STEPS)


def paper_rate(step: int) -> float:
    return rate_at(PAPER, step * STEP_TOKENS, NUM_STEPS * STEP_TOKENS)


@pytest.mark.parametrize(
    ("step", "percent", "rate"),
    [
        (813_264, 19.74, 0.009080349589287376),
        (1_666_010, 40.44, 0.006499974971416897),
        (2_481_280, 60.24, 0.0034466737184832607),
        (3_297_840, 80.06, 0.0009788970261355868),
    ],
)
def test_the_text_schedule_has_the_rates_that_the_papers_continued_runs_started_at(
    step: int, percent: float, rate: float
) -> None:
    assert step / NUM_STEPS == pytest.approx(percent / 100, abs=1e-4)
    assert paper_rate(step) == pytest.approx(rate, rel=1e-4)
    total = 10**12
    near = rate_at(PAPER, round(percent / 100 * total), total)
    assert near == pytest.approx(rate, rel=0.01)


@given(
    peak=st.floats(1e-5, 0.5),
    end_share=st.floats(0.0, 1.0),
    warmup=st.floats(0.0, 0.9),
    total=st.integers(1_000, 10**13),
    at=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
)
def test_the_rate_rises_through_the_warm_up_and_falls_to_the_end(
    peak: float, end_share: float, warmup: float, total: int, at: tuple[float, float]
) -> None:
    schedule = WarmupCosine(peak_rate=peak, end_rate=peak * end_share, warmup_fraction=warmup)
    early, late = sorted(int(share * total) for share in at)
    first, second = (rate_at(schedule, tokens, total) for tokens in (early, late))
    assert 0.0 <= first <= peak * (1 + 1e-12)
    if late <= warmup * total:
        assert first <= second
    if early >= warmup * total:
        assert first >= second * (1 - 1e-12)
        assert second >= schedule.end_rate * (1 - 1e-12)


def test_the_warm_up_is_a_line_from_zero_to_the_peak() -> None:
    schedule = WarmupCosine(peak_rate=8e-3, end_rate=1e-4, warmup_fraction=0.25)
    assert [rate_at(schedule, tokens, 4_000) for tokens in (0, 250, 500, 1_000)] == pytest.approx(
        [0.0, 2e-3, 4e-3, 8e-3]
    )
    assert rate_at(schedule, 2_500, 4_000) == pytest.approx((8e-3 + 1e-4) / 2)
    assert rate_at(schedule, 4_000, 4_000) == 1e-4


@given(parent=st.floats(1e-4, 0.5), total=st.integers(1_000, 10**13))
def test_a_continued_schedule_goes_from_the_parents_rate_to_its_own_end(
    parent: float, total: int
) -> None:
    schedule = ContinuedCosine(end_rate=3e-5)
    rates = [rate_at(schedule, total * part // 8, total, parent_rate=parent) for part in range(9)]
    assert rates[0] == parent
    assert rates[-1] == 3e-5
    assert rates[4] == pytest.approx((parent + 3e-5) / 2, rel=1e-2)
    assert rates == sorted(rates, reverse=True)


def test_the_rate_is_a_function_of_the_share_and_not_of_the_scale() -> None:
    schedule = WarmupCosine(peak_rate=1e-2, end_rate=3e-5, warmup_fraction=0.1)
    for part in range(101):
        assert rate_at(schedule, part, 100) == pytest.approx(
            rate_at(schedule, part * 10**9, 100 * 10**9), rel=1e-12
        )


@pytest.mark.parametrize("parent", [3e-5, 2e-5, 0.0])
def test_a_continued_schedule_is_refused_where_the_parents_rate_is_at_its_end(
    parent: float,
) -> None:
    with pytest.raises(ValueError, match=r"stage-7.*above the end rate 3e-05.*WarmupCosine"):
        check_start(ContinuedCosine(end_rate=3e-5), parent, "stage-7")


def test_a_continued_schedule_is_refused_without_a_parent() -> None:
    with pytest.raises(ValueError, match=r"stage-7.*its parent has none.*WarmupCosine"):
        check_start(ContinuedCosine(), None, "stage-7")


def test_other_starts_are_accepted() -> None:
    check_start(ContinuedCosine(end_rate=3e-5), 3.1e-5, "stage-7")
    check_start(WarmupCosine(peak_rate=1e-3), None, "stage-7")
    check_start(WarmupCosine(peak_rate=1e-3), 3e-5, "stage-7")


@pytest.mark.parametrize(
    "schedule",
    [WarmupCosine(peak_rate=0.0), Constant(peak_rate=0.0), WarmupStableDecay(peak_rate=0.0)],
)
def test_a_rate_of_zero_is_refused(schedule: WarmupCosine | Constant | WarmupStableDecay) -> None:
    with pytest.raises(ValueError, match=r"stage-7: the learning rate is 0 .* peak_rate above 0"):
        check_start(schedule, None, "stage-7")


def test_a_constant_rate_stays_and_a_stable_one_falls_at_its_end() -> None:
    constant = Constant(peak_rate=2e-3, warmup_fraction=0.5)
    assert [rate_at(constant, at, 1_000) for at in (250, 500, 1_000)] == [1e-3, 2e-3, 2e-3]
    stable = WarmupStableDecay(
        peak_rate=2e-3, end_rate=1e-3, warmup_fraction=0.1, decay_fraction=0.2
    )
    rates = [rate_at(stable, at, 1_000) for at in (50, 100, 800, 900, 1_000)]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 1.5e-3, 1e-3])


def test_a_warm_up_and_a_decay_have_room_in_a_stage() -> None:
    with pytest.raises(ValueError, match=r"0\.7 and decay_fraction 0\.4 are more than the whole"):
        WarmupStableDecay(peak_rate=1e-3, warmup_fraction=0.7, decay_fraction=0.4)


def test_the_first_step_of_a_warm_up_moves_the_weights() -> None:
    schedule = WarmupCosine(peak_rate=1e-3, warmup_fraction=0.1)
    assert rate_at(schedule, 0, 10_000, step_tokens=100) == pytest.approx(1e-4)


def test_moments_that_start_at_zero_let_the_rate_rise_over_a_hundredth() -> None:
    factors = [moments_factor(at, 100_000, step_tokens=100) for at in (0, 400, 900, 50_000)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0])
