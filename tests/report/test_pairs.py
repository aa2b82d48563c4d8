"""Differences on the same examples, from the predictions of two lines."""

from statistics import fmean

import made_studies as made
import pyarrow.parquet as pq
import pytest

from midstream.core.storage import read_json, write_json
from midstream.report.pairs import Examples, paired_rows
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


def test_the_best_place_is_compared_with_every_other_example_by_example(filled: Ledger) -> None:
    rows = paired_rows(STUDY, made.groups_of(STUDY, filled), Examples(filled))
    by_x = {row.x: row for row in rows}
    assert {row.best for row in rows} == {50.0}
    assert set(by_x) == {0.0, 100.0}
    worst, near = by_x[0.0], by_x[100.0].whole
    assert worst.whole.mean == pytest.approx(mean_right(filled, 50.0) - mean_right(filled, 0.0))
    assert worst.whole.low > 0
    assert worst.whole.p_value < 0.001
    assert set(worst.tasks) == {"gqa", "pope"}
    assert worst.tasks["gqa"].num_clusters == NUM // 2
    assert near.low <= 0 <= near.high


def test_what_is_not_done_or_was_asked_otherwise_is_left_out(filled: Ledger) -> None:
    worst = [made.result((0.0,), seed) for seed in (0, 1)]
    mark = filled.folder(worst[1]) / SUCCESS
    mark.unlink()
    rows = paired_rows(STUDY, made.groups_of(STUDY, filled), Examples(filled))
    assert [row.x for row in rows] == [100.0]
    mark.write_text(worst[1].identity)
    for one in worst:
        made.write_answers(filled.predictions(one, "pope"), "pope", range(NUM - 2), 0.4)
    rows = paired_rows(STUDY, made.groups_of(STUDY, filled), Examples(filled))
    assert {row.x: set(row.tasks) for row in rows}[0.0] == {"gqa"}


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_which_tasks_are_not_whole(filled: Ledger) -> None:
    page = made.write_report(STUDY, filled).read_text()
    assert "Not whole" not in page
    assert "On the same examples" in page
    path = filled.folder(made.result((50.0,), 0)) / "results.json"
    results = read_json(path)
    results["tasks"]["gqa"]["shortened"] = "80 of 12,578 examples"
    write_json(path, results)
    page = made.write_report(STUDY, filled).read_text()
    assert "gqa (80 of 12,578 examples in 1 of 6)" in page
