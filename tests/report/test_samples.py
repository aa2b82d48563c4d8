"""Differences on the same examples, from the predictions of two lines."""

from statistics import fmean

import made_studies as made
import pyarrow.parquet as pq
import pytest

from midstream.core.storage import read_json, write_json
from midstream.report.samples import Examples, mean_gap
from midstream.study.stages import Evaluate
from midstream.study.store import SUCCESS, Ledger

SCORES = {(0.0,): (0.4, 0.42), (50.0,): (0.7, 0.72), (100.0,): (0.69, 0.71)}
STUDY = made.study(SCORES)
NUM = made.NUM_EXAMPLES


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """Three places of two seeds each, all of whose lines answered the same examples."""
    made.fill(ledger, STUDY, SCORES, pictures=True)
    return ledger


def mean_right(ledger: Ledger, place: float) -> float:
    """The share of right answers to the visual tasks, over seeds."""
    files = [
        ledger.predictions(made.result((place,), seed), task)
        for seed in (0, 1)
        for task in made.ASKED.visual_tasks
    ]
    return fmean(fmean(pq.read_table(file)["score"].to_pylist()) for file in files)


def place(at: float) -> list[Evaluate]:
    return [made.result((at,), seed) for seed in (0, 1)]


def test_two_places_are_compared_example_by_example(filled: Ledger) -> None:
    examples = Examples(filled)
    gaps = {task: examples.gap(place(50.0), place(0.0), task) for task in ("gqa", "pope")}
    mean = mean_right(filled, 50.0) - mean_right(filled, 0.0)
    assert mean_gap(list(gaps.values())).mean == pytest.approx(mean)
    assert gaps["gqa"].low > 0
    near = mean_gap([examples.gap(place(50.0), place(100.0), task) for task in gaps])
    assert near.low <= 0 <= near.high


def test_what_is_not_done_or_was_asked_otherwise_is_not_compared(filled: Ledger) -> None:
    worst, best = place(0.0), place(50.0)
    mark = filled.folder(worst[1]) / SUCCESS
    mark.unlink()
    assert Examples(filled).gap(best, worst, "gqa") is None
    mark.write_text(worst[1].identity)
    for one in worst:
        made.write_answers(filled.predictions(one, "pope"), "pope", range(NUM - 2), 0.4)
    assert Examples(filled).gap(best, worst, "pope") is None
    assert Examples(filled).gap(best, worst, "gqa") is not None


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_which_tasks_are_not_whole(filled: Ledger) -> None:
    page = made.write_report(STUDY, filled).read_text()
    assert "Not whole" not in page
    path = filled.folder(made.result((50.0,), 0)) / "results.json"
    results = read_json(path)
    results["tasks"]["gqa"]["shortened"] = "80 of 12,578 examples"
    write_json(path, results)
    page = made.write_report(STUDY, filled).read_text()
    assert "gqa (80 of 12,578 examples in 1 of 6)" in page
