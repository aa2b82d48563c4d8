"""What the end of a job means for its stage, from the ledger and what Slurm says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from midstream.cost.graph import order
from midstream.launch.slurm_job import events_since
from midstream.launch.slurm_queue import (
    MAX_FORGOTTEN,
    NEVER,
    Ended,
    Entry,
    Job,
    JobBook,
    limit_minutes,
    require_no_jobs,
    verdict,
)
from midstream.study.stages import Stage
from midstream.study.store import Ledger, Stopped
from midstream.study.studies import Study


@pytest.fixture
def stage(make_study: Callable[..., Study]) -> Stage:
    found: Stage = order(make_study())[0]
    return found


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def job(state: str) -> Job:
    return Job("12", "midstream-x", state, "None", "0:9")


def ended(stage: Stage, state: str | None, restarts_left: int = 0, **more: object) -> Ended:
    return Ended(stage, "12", None if state is None else job(state), restarts_left, **more)


def test_a_stage_that_is_done_is_done_whatever_its_job_says(ledger: Ledger, stage: Stage) -> None:
    with ledger.open_stage(stage) as work:
        work.finish({})
    for state in ("FAILED", "CANCELLED", "COMPLETED", None):
        assert verdict(ended(stage, state), ledger).action == "done"


def test_the_ledgers_own_error_comes_first(ledger: Ledger, stage: Stage) -> None:
    with pytest.raises(RuntimeError), ledger.open_stage(stage):
        raise RuntimeError("bad luck")
    found = verdict(ended(stage, "FAILED", restarts_left=3), ledger)
    assert (found.action, found.text, found.is_noted) == ("failed", "RuntimeError: bad luck", True)


def test_an_error_from_before_the_job_is_not_taken_for_its_own(
    ledger: Ledger, stage: Stage
) -> None:
    ledger.mark_failed(stage, "long ago")
    before = ledger.status(stage)["ended"]
    found = verdict(ended(stage, "OUT_OF_MEMORY", told_before=before), ledger)
    assert found.action == "failed"
    assert not found.is_noted
    assert "Slurm ended job 12 as OUT_OF_MEMORY (exit code 0:9): ask for more memory" in found.text


@pytest.mark.parametrize("state", ["FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT"])
def test_a_killed_job_uses_up_restarts_and_then_fails_its_stage(
    ledger: Ledger, stage: Stage, state: str
) -> None:
    again = verdict(ended(stage, state, restarts_left=1), ledger)
    assert (again.action, again.counts) == ("again", True)
    last = verdict(ended(stage, state), ledger)
    assert last.action == "failed"
    assert state in last.text


def test_a_cancelled_job_is_not_begun_again(ledger: Ledger, stage: Stage) -> None:
    found = verdict(ended(stage, "CANCELLED", restarts_left=3), ledger)
    assert (found.action, "CANCELLED" in found.text) == ("failed", True)
    # What its own warning stopped stays so as well: somebody wanted it to end.
    with pytest.raises(Stopped), ledger.open_stage(stage):
        raise Stopped
    assert verdict(ended(stage, "CANCELLED", restarts_left=3), ledger).action == "failed"


def test_a_stage_that_kept_a_checkpoint_when_told_to_stop_goes_on_for_nothing(
    ledger: Ledger, stage: Stage
) -> None:
    with pytest.raises(Stopped), ledger.open_stage(stage):
        raise Stopped
    found = verdict(ended(stage, "TIMEOUT"), ledger)
    assert (found.action, found.counts) == ("again", False)
    # A job that dies before it opens the stage has not stopped it.
    before = ledger.status(stage)["ended"]
    assert verdict(ended(stage, "FAILED", told_before=before), ledger).action == "failed"


def test_a_job_whose_parent_was_lost_waits_for_the_next_one(ledger: Ledger, stage: Stage) -> None:
    found = verdict(ended(stage, "CANCELLED", parent_lost=True), ledger)
    assert (found.action, found.text) == ("again", "")
    # Its parent may have been submitted anew by now.
    never = Job("12", "midstream-x", "CANCELLED", NEVER)
    assert verdict(Ended(stage, "12", never, 0), ledger).action == "again"


def test_a_job_that_slurm_has_forgotten_is_submitted_again_a_few_times(
    ledger: Ledger, stage: Stage
) -> None:
    assert verdict(ended(stage, None), ledger).action == "again"
    found = verdict(ended(stage, None, num_forgotten=MAX_FORGOTTEN), ledger)
    assert found.action == "failed"
    assert "no longer knows job 12" in found.text


def test_a_job_that_ended_well_without_its_stage_is_looked_at_twice(
    ledger: Ledger, stage: Stage
) -> None:
    assert verdict(ended(stage, "COMPLETED"), ledger).action == "wait"
    found = verdict(ended(stage, "COMPLETED", doubted=True), ledger)
    assert found.action == "failed"
    assert str(ledger.folder(stage)) in found.text


def test_the_book_keeps_what_it_was_told(tmp_path: Path) -> None:
    book = JobBook.of(tmp_path)
    book.intend({"a": Entry("midstream-a", None, "log"), "b": Entry("midstream-a", None, "log")})
    assert JobBook.of(tmp_path).entries["a"].job is None
    book.submitted({"a": ("7_0", "log-0"), "b": ("7_1", "log-1")})
    book.forget("a", "unknown")
    assert JobBook.of(tmp_path).entries == {"b": Entry("midstream-a", "7_1", "log-1")}


def test_a_local_run_asks_slurm_for_jobs_that_the_store_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    require_no_jobs(tmp_path)
    JobBook.of(tmp_path).intend({"a": Entry("midstream-a", "7", "log")})
    with pytest.raises(ValueError, match=r"names 1 jobs of an earlier run with --slurm.*delete"):
        require_no_jobs(tmp_path)


def test_events_are_read_from_where_reading_ended_and_never_in_half(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert events_since(path, 0) == ([], 0)
    path.write_text('{"event": "ready"}\nnoise\n{"event": "sta')
    events, offset = events_since(path, 0)
    assert [event["event"] for event in events] == ["ready"]
    with path.open("a") as stream:
        stream.write('rted"}\n')
    events, offset = events_since(path, offset)
    assert [event["event"] for event in events] == ["started"]
    assert events_since(path, offset) == ([], offset)


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("2-12:00:00", 3600), ("1:00:00", 60), ("30:00", 30), ("infinite", float("inf"))],
)
def test_a_partitions_time_is_read_as_slurm_prints_it(limit: str, minutes: float) -> None:
    assert limit_minutes(limit) == minutes
