"""Sentences about the data: what decides, what does not, and what was not measured."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import made_studies as made
import pytest

from midstream.core.stats import Contrast
from midstream.core.storage import read_json, write_json
from midstream.report.findings import Finding, interval, points, signed
from midstream.report.gather import gather
from midstream.report.line_rows import stable_of
from midstream.study.store import Ledger
from midstream.study.studies import Claim

BETTER = Claim(
    text="80 is better than 20", higher={"x": 80}, lower={"x": 20}, source="paper, section 3.1"
)


def claimed(
    ledger: Ledger,
    scores: Mapping[Any, Sequence[float]],
    *claims: Claim,
    axes: tuple[str, ...] = ("x",),
    examples: bool = True,
) -> list[Finding]:
    """Findings of a study with a line for each place and seed; scores are stable vision ones."""
    study = made.study(scores, axes=axes, claims=claims or (BETTER,))
    made.fill(ledger, study, scores, axes=axes, examples=examples)
    return gather(study, ledger).findings


def test_a_difference_beyond_the_seeds_agrees_with_a_claim_or_disagrees(ledger: Ledger) -> None:
    scores = {(20,): (0.20, 0.22, 0.24), (80,): (0.30, 0.33, 0.33)}
    turned = BETTER.model_copy(update={"higher": {"x": 20}, "lower": {"x": 80}})
    agrees, disagrees, *_ = claimed(ledger, scores, BETTER, turned)
    assert agrees.verdict_words == "higher: our data agree"
    assert agrees.source == "paper, section 3.1"
    # Differences 0.10, 0.11, 0.09: t of two degrees 4.303, sd 0.01.
    assert agrees.sentence.startswith(
        "Vision, stable is 10.0 points higher at x 80 than at x 20 "
        "(95 % interval +7.5 to +12.5, 3 repetitions, its own spread, 2 degrees of freedom)"
    )
    assert disagrees.verdict_words == "lower: our data disagree"
    assert "10.0 points lower at x 20 than at x 80" in disagrees.sentence


def test_one_seed_has_no_interval_but_the_examples_have_one(ledger: Ledger) -> None:
    found = claimed(ledger, {(20,): (0.2,), (80,): (0.6,)})[0]
    assert found.verdict_words == "no interval"
    assert "(no interval: one repetition)" in found.sentence
    told = r"on the same examples \+\S+ \(\+\S+ to \+\S+\), which decides nothing about others"
    assert re.search(told, found.sentence)


def test_without_predictions_of_the_same_examples_nothing_is_said_of_them(ledger: Ledger) -> None:
    found = claimed(ledger, {(20,): (0.2, 0.3), (80,): (0.6, 0.6)}, examples=False)[0]
    assert "same examples" not in found.sentence


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ({"higher": {"x": 60}}, "The study has no line at x 60."),
        ({"higher": {"place": 80}}, "The study has no line at place 80."),
        ({"score": "vqav2"}, "No line of this study is asked vqav2."),
    ],
)
def test_what_no_line_can_tell_is_not_measured(
    ledger: Ledger, claim: dict[str, Any], words: str
) -> None:
    scores = {(20,): (0.2, 0.3), (80,): (0.6, 0.6)}
    found = claimed(ledger, scores, BETTER.model_copy(update=claim))[0]
    assert (found.verdict_words, found.sentence) == ("not measured", words)
    assert found.comparison is None


def test_lines_that_are_not_done_are_not_measured(ledger: Ledger) -> None:
    scores = {(20,): (0.2, 0.3), (80,): (0.6, 0.6)}
    study = made.study(scores, claims=(BETTER,))
    made.fill(ledger, study, {(20,): (0.2, 0.3)})
    found = gather(study, ledger).findings
    assert found[0].verdict == "not measured"
    assert "No line at x 80 has a score of Vision, stable yet (0 of 2 done)." in found[0].sentence
    assert found[1].sentence.endswith("1 of 2 places have a score; two are needed.")


SEEDS = Claim(text="seeds differ", higher={"seed": 1}, lower={"seed": 0})


@pytest.mark.parametrize(
    ("scores", "claim", "n", "mean", "verdict"),
    [
        # An interval with zero does not decide.
        ({(20,): (0.20, 0.30, 0.25), (80,): (0.24, 0.28, 0.26)}, BETTER, 3, 0.01, "undecided"),
        # Two seeds decide nothing however alike they are.
        ({(20,): (0.20, 0.30), (80,): (0.30, 0.40)}, BETTER, 2, 0.1, "no interval"),
        # Other axes are averaged within each seed and are no repetitions: by seed the difference is
        # 0.10 and 0.20; over four pairs it would be much surer.
        (
            {
                (20, "a"): (0.20, 0.20),
                (20, "b"): (0.40, 0.40),
                (80, "a"): (0.30, 0.40),
                (80, "b"): (0.50, 0.60),
            },
            BETTER,
            2,
            0.15,
            "no interval",
        ),
        # An axis that moves along is part of the place.
        (
            {(20, "dense"): (0.20, 0.22, 0.24), (80, "thin"): (0.30, 0.33, 0.33)},
            BETTER,
            3,
            0.1,
            "higher",
        ),
        # A claim about seeds is repeated by the other axes.
        ({(20,): (0.2, 0.3), (80,): (0.6, 0.72)}, SEEDS, 2, 0.11, "no interval"),
    ],
)
def test_a_difference_is_over_the_repetitions_of_its_places(
    ledger: Ledger, scores: dict[Any, Any], claim: Claim, n: int, mean: float, verdict: str
) -> None:
    axes = ("x", "kind")[: len(next(iter(scores)))]
    found = claimed(ledger, scores, claim, axes=axes)[0]
    assert (found.comparison.contrast.n, found.verdict) == (n, verdict)
    assert found.comparison.contrast.mean == pytest.approx(mean)
    assert ("mean over 2 places of kind" in found.sentence) == (len(scores) == 4)


def test_a_place_that_one_seed_lacks_is_left_out_for_all_and_counted(ledger: Ledger) -> None:
    scores = {
        (20, "a"): (0.20, 0.20),
        (20, "b"): (0.90, 0.90),
        (80, "a"): (0.30, 0.31),
        (80, "b"): (0.10,),
    }
    found = claimed(ledger, scores, axes=("x", "kind"))[0]
    assert found.comparison.contrast.mean == pytest.approx(0.105)
    assert "2 without a counterpart left out" in found.sentence


def test_the_best_place_is_told_from_the_next_best_only_beyond_the_seeds(ledger: Ledger) -> None:
    scores = {(0,): (0.1, 0.1, 0.1), (20,): (0.30, 0.32, 0.34), (80,): (0.31, 0.34, 0.32)}
    best = next(f for f in claimed(ledger, scores) if f.claim is None)
    assert best.verdict_words == "not decided"
    assert best.sentence.startswith(
        "Vision, stable is highest at x 80 with 32.3 points, 0.3 points higher than at x 20, "
        "the next best (95 % interval"
    )


def trend_of(ledger: Ledger, scores: Mapping[Any, Sequence[float]]) -> Finding | None:
    found = [one for one in claimed(ledger, scores) if one.sentence.startswith("Over all")]
    return found[0] if found else None


def test_a_rise_over_all_places_is_decided_where_neighbours_are_not(ledger: Ledger) -> None:
    scores = {
        (0,): (0.10, 0.14, 0.12),
        (20,): (0.15, 0.13, 0.15),
        (80,): (0.16, 0.18, 0.19),
        (100,): (0.20, 0.22, 0.19),
    }
    trend = trend_of(ledger, scores)
    assert trend.verdict_words == "higher"
    # Lines of least squares rise by 0.093, 0.087 and 0.075 over three steps.
    assert trend.comparison.contrast.mean == pytest.approx(0.085)
    assert "Vision, stable is 8.5 points higher at x 100 than at x 0" in trend.sentence


def test_a_curve_that_goes_both_ways_shows_no_trend_and_two_places_are_none(ledger: Ledger) -> None:
    scores = {(0,): (0.1, 0.2, 0.1), (20,): (0.5, 0.4, 0.5), (80,): (0.2, 0.1, 0.1)}
    assert trend_of(ledger, scores).verdict_words == "not decided"
    other = Ledger(ledger.store / "two")
    assert trend_of(other, {(20,): (0.1, 0.2), (80,): (0.4, 0.5)}) is None


CURVE = {
    (0,): (0.10, 0.14, 0.12),
    (20,): (0.30, 0.32, 0.34),
    (40,): (0.31, 0.33, 0.32),
    (80,): (0.30, 0.33, 0.34),
}


def test_a_difference_is_judged_by_one_spread_of_all_places_of_the_curve(ledger: Ledger) -> None:
    found = claimed(ledger, CURVE)[0]
    assert found.comparison.contrast.pooled
    assert found.comparison.contrast.freedom == 6
    assert "3 repetitions, one spread of all places, 6 degrees of freedom" in found.sentence


def test_a_difference_within_the_smallest_of_interest_is_the_same(ledger: Ledger) -> None:
    study = made.study(CURVE, claims=(BETTER,)).model_copy(update={"smallest_difference": 0.03})
    made.fill(ledger, study, CURVE)
    same, *_ = gather(study, ledger).findings
    assert same.verdict_words == "the same within 3 points: our data disagree"
    assert same.is_decided


def test_what_is_not_decided_says_how_many_repetitions_would_do(ledger: Ledger) -> None:
    wide = {at: tuple(value * 5 for value in values) for at, values in CURVE.items()}
    found = claimed(ledger, {at: tuple(v / 2 for v in vs) for at, vs in wide.items()})[0]
    assert found.verdict == "undecided"
    needed = found.comparison.contrast.repetitions_for(0.02)
    assert needed > 3
    assert f"{needed} repetitions would make it 2.0 points to either side" in found.sentence


def test_a_study_run_to_decide_is_judged_by_the_spread_of_its_first_seeds(ledger: Ledger) -> None:
    more = {
        at: (*values, *(v + 0.3 * i for i, v in enumerate(values))) for at, values in CURVE.items()
    }
    study = made.study(more, claims=(BETTER,)).model_copy(update={"pilot": (0, 1, 2)})
    made.fill(ledger, study, more)
    found = gather(study, ledger).findings[0].comparison
    alone = claimed(Ledger(ledger.store / "other"), CURVE)[0].comparison
    assert found.contrast.sd == pytest.approx(alone.contrast.sd)
    assert (found.contrast.n, found.contrast.freedom) == (6, 6)


def test_a_model_that_learnt_nothing_is_counted_and_left_out_beside(ledger: Ledger) -> None:
    scores = {at: (*values, 0.6) for at, values in CURVE.items()}
    scores = dict.fromkeys(scores, (0.6, 0.62, 0.64, 0.61)) | {(80,): (0.6, 0.62, 0.0, 0.61)}
    found = claimed(ledger, scores)[0]
    assert found.comparison.num_failed == 1
    assert found.comparison.learnt.n == 3
    assert "without 1 that did not learn a task" in found.sentence


def test_levels_of_draws_are_told_with_the_spread_that_each_adds(ledger: Ledger) -> None:
    scores = {
        (run, seen): (0.3 + 0.1 * run + 0.01 * seen, 0.3 + 0.1 * run)
        for run in (1, 2)
        for seen in (1, 2)
    }
    axes = ("text_run", "image_text_run")
    study = made.study(scores, axes=axes).model_copy(update={"levels": (*axes, "seed")})
    made.fill(ledger, study, scores, axes=axes)
    found = gather(study, ledger).findings[0]
    assert found.verdict_words == "measured"
    assert found.sentence.startswith("Vision, stable of 8 models of one recipe varies by 7.")
    assert "points over text run, " in found.sentence
    assert not found.is_decided


def test_levels_that_are_not_repeated_yet_are_not_measured(ledger: Ledger) -> None:
    scores = {(1,): (0.3, 0.4)}
    study = made.study(scores).model_copy(update={"levels": ("x", "seed")})
    made.fill(ledger, study, scores)
    assert gather(study, ledger).findings[0].verdict == "not measured"


def test_the_probability_of_right_answers_stands_beside_every_finding(ledger: Ledger) -> None:
    study = made.study(CURVE, claims=(BETTER,))
    made.fill(ledger, study, CURVE)
    for line in study.lines:
        path = ledger.folder(line.result) / "results.json"
        results = read_json(path)
        results["stable"]["vision_prob"] = results["stable"]["vision"] / 2 + 0.01 * line.axes["x"]
        write_json(path, results)
    facts = gather(study, ledger)
    claim, best, trend = (one.sentence for one in facts.findings[:3])
    assert "; by the probability of right answers +60." in claim
    assert "higher)" in claim.partition("by the probability of right answers")[2]
    assert "by the probability of right answers" in best
    assert "by the probability of right answers" in trend
    assert "stable.vision_prob" in stable_of(study, facts.rows)
    assert "by the probability" not in claimed(Ledger(ledger.store / "old"), CURVE)[0].sentence


def test_the_best_place_is_picked_where_all_places_have_been_seen(ledger: Ledger) -> None:
    # Seed 2 is an easy one, and the first place alone has it.
    scores = {(0,): (0.30, 0.31, 0.60), (20,): (0.35, 0.36), (80,): (0.10, 0.11)}
    best = next(f for f in claimed(ledger, scores) if "highest" in f.sentence)
    assert "highest at x 20" in best.sentence
    assert "5.0 points higher than at x 0" in best.sentence


def test_of_a_pair_that_was_picked_the_same_needs_the_whole_interval() -> None:
    contrast = Contrast(0.001, 4, 0.02, 12, True, reach=3.0, places=5)
    assert replace(contrast, places=2).is_within(0.025)
    assert not contrast.is_within(0.025)


def test_later_seeds_compare_what_the_first_ones_did(ledger: Ledger) -> None:
    first = {
        (x, kind): tuple(0.3 + x / 1000 * (kind == "a") + 0.01 * s * (x > 0) for s in range(3))
        for x in (0, 40, 80)
        for kind in "ab"
    }
    # Kind a gets three seeds more, kind b none.
    more = {at: (*v, *(v if at[1] == "a" else ())) for at, v in first.items()}
    claim = Claim(text="80 is better than 0", higher={"x": 80}, lower={"x": 0})
    study = made.study(more, axes=("x", "kind"), claims=(claim,))
    study = study.model_copy(update={"pilot": (0, 1, 2)})
    made.fill(ledger, study, more, axes=("x", "kind"))
    found = gather(study, ledger).findings[0]
    assert found.comparison.num_places == 2
    assert found.comparison.contrast.n == 3
    assert found.comparison.contrast.mean == pytest.approx(0.05)


def test_first_seeds_without_a_spread_leave_the_mean_of_all_and_no_interval(ledger: Ledger) -> None:
    scores = {(20,): (0.2, 0.2, 0.2, 0.21), (80,): (0.3, 0.3, 0.3, 0.33)}
    study = made.study(scores, claims=(BETTER,)).model_copy(update={"pilot": (0, 1, 2)})
    made.fill(ledger, study, scores)
    found = gather(study, ledger).findings[0]
    assert found.comparison.contrast.n == 4
    assert "of the first seeds a spread of zero" in found.sentence


def test_where_no_model_that_learnt_is_left_it_is_said(ledger: Ledger) -> None:
    scores = {(20,): (0.05, 0.7), (80,): (0.7, 0.05)}
    found = claimed(ledger, scores)[0]
    assert "without 2 that did not learn a task nothing is left" in found.sentence
    assert "nan" not in found.sentence


def test_points_are_never_minus_nothing() -> None:
    assert [points(one) for one in (-0.0004, 0.0, -0.0006, 0.5)] == ["0.0", "0.0", "-0.1", "50.0"]


def test_an_interval_that_ends_just_beside_zero_does_not_end_at_zero() -> None:
    assert signed(-0.0004) == signed(1e-12) == "0.0"
    assert interval(-0.029, -0.0004) == "\N{MINUS SIGN}2.9 to \N{MINUS SIGN}0.04"
    assert interval(0.000012, 0.02) == "+0.001 to +2.0"
    assert interval(-1e-12, 0.0) == "0.0 to 0.0"
