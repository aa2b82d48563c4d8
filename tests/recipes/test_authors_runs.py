"""The authors' runs: how many, which, and that their mixtures are whole."""

from collections import Counter

import pytest

from midstream.recipes.paper.suites import AUTHORS_LATER_RUNS, AUTHORS_RUNS, STARTS, AuthorsRun


def mixture(run: AuthorsRun) -> tuple[float, float, float]:
    return run.caption_share, run.instruct_share, run.text_share


def test_there_are_279_distinct_runs_and_93_later_ones():
    first, later = AUTHORS_RUNS, AUTHORS_LATER_RUNS
    assert len(first) == len(set(first)) == 279
    assert len(later) == len(set(later)) == 93
    assert not set(first) & set(later)


def test_shares_add_up_to_one_and_starts_are_the_six():
    for run in (*AUTHORS_RUNS, *AUTHORS_LATER_RUNS):
        assert sum(mixture(run)) == pytest.approx(1.0, abs=1e-12)
        assert run.completion in STARTS


def test_both_lists_together_hold_a_whole_grid_up_to_ten_per_cent_pictures():
    runs = [run for run in (*AUTHORS_RUNS, *AUTHORS_LATER_RUNS) if run.text_share != 0.8]
    runs = [run for run in runs if run.caption_set == "DataComp-DR"]
    assert len({mixture(run) for run in runs}) == 13
    at = Counter((*mixture(run), run.completion) for run in runs)
    assert len(at) == 13 * 6
    # Five epochs were tried at 40 % alone.
    assert Counter(at.values()) == {4: 73, 5: 5}
    assert {key[3] for key, number in at.items() if number == 5} == {0.4}


def test_runs_by_mixture_are_those_of_the_list():
    numbers = Counter(mixture(run) for run in AUTHORS_RUNS)
    assert numbers[1.0, 0.0, 0.0] == 20
    assert numbers[0.05, 0.0, 0.95] == 22
    assert numbers[0.08, 0.02, 0.9] == 17
    assert numbers[0.0, 0.0, 1.0] == 25
    assert numbers[0.0, 0.1, 0.9] == 24


def test_known_runs_are_there_and_those_that_were_not_listed_are_not():
    first, later = set(AUTHORS_RUNS), set(AUTHORS_LATER_RUNS)
    best = AuthorsRun(0.1, 0.0, 0.9, 0.8, 4, "DataComp-DR")
    assert best in first
    # Table 4 asks the same with the captions that DataComp's pictures came with.
    assert best._replace(caption_set="DataComp") in later - first
    assert AuthorsRun(0.08, 0.02, 0.9, 0.4, 5, "DataComp-DR") in first
    assert AuthorsRun(0.05, 0.0, 0.95, 1.0, 3, "DataComp-DR") in first
    assert AuthorsRun(0.05, 0.0, 0.95, 1.0, 2, "DataComp-DR") in later
    assert AuthorsRun(0.08, 0.02, 0.9, 0.8, 4, "DataComp-DR") in later
    assert AuthorsRun(0.2, 0.0, 0.8, 0.8, 3, "DataComp-DR") not in first | later
