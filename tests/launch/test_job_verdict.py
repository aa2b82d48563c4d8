"""What the end of a job means for its stage, from the ledger and what Slurm says."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from midstream.config import Machine
from midstream.core.storage import write_json
from midstream.cost.graph import PlanRow, plan
from midstream.launch.slurm import MAX_FORGOTTEN, NEVER, Queued, Verdict, verdict
from midstream.launch.slurm_job import (
    Entry,
    Job,
    JobBook,
    JobFailed,
    StageJob,
    events_since,
    job_folder,
)
from midstream.launch.submission import limit_minutes
from midstream.launch.workers import work_line
from midstream.study.label import label
from midstream.study.store import Ledger, Stopped
from midstream.study.studies import Study


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


@pytest.fixture
def row(make_study: Callable[..., Study], ledger: Ledger) -> PlanRow:
    return plan(make_study(), ledger).rows[0]


def ended(
    ledger: Ledger, one: Queued, state: str | None, reason: str = "None", **more: Any
) -> Verdict:
    job = None if state is None else Job("12", "midstream-x", state, reason, "0:9")
    return verdict(one, "12", job, ledger, **more)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "COMPLETED", None])
def test_a_stage_that_is_done_is_done_whatever_its_job_says(
    ledger: Ledger, row: PlanRow, state: str | None
) -> None:
    with ledger.open_stage(row.stage) as work:
        work.finish({})
    assert ended(ledger, Queued(row), state).state == "done"


def test_the_ledgers_own_error_comes_first_unless_it_is_from_before_the_job(
    ledger: Ledger, row: PlanRow
) -> None:
    ledger.mark_failed(row.stage, "long ago")
    before = ledger.status(row.stage)["ended"]
    found = ended(ledger, Queued(row, told_before=before), "OUT_OF_MEMORY")
    assert (found.state, found.unnoted) == ("failed", True)
    assert found.text == (
        "Slurm ended job 12 as OUT_OF_MEMORY (exit code 0:9): ask for more memory"
    )
    with pytest.raises(RuntimeError), ledger.open_stage(row.stage):
        raise RuntimeError("bad luck")
    found = ended(ledger, Queued(row), "FAILED", restarts_left=3)
    assert found == Verdict("failed", "RuntimeError: bad luck")


@pytest.mark.parametrize(
    ("state", "more", "becomes", "counts"),
    [
        # What was killed uses up restarts, and then fails its stage.
        ("NODE_FAIL", {"restarts_left": 1}, "waiting", True),
        ("TIMEOUT", {"restarts_left": 1}, "waiting", True),
        ("FAILED", {}, "failed", False),
        # Somebody wanted it to end.
        ("CANCELLED", {"restarts_left": 3}, "failed", False),
        # It waits for its parent's next job, which may be submitted by now.
        ("CANCELLED", {"parent_lost": True}, "waiting", False),
        ("CANCELLED", {"reason": NEVER}, "waiting", False),
        # Slurm has lost its parent's job, and with it the order of the two.
        ("FAILED", {"waits_for": "text"}, "waiting", False),
        ("FAILED", {"waits_for": "text", "num_forgotten": MAX_FORGOTTEN}, "failed", False),
        (None, {}, "waiting", False),
        (None, {"num_forgotten": MAX_FORGOTTEN}, "failed", False),
        # A shared disk may be late.
        ("COMPLETED", {}, "doubted", False),
    ],
)
def test_what_a_job_ended_as_decides_where_the_ledger_says_nothing(
    ledger: Ledger,
    row: PlanRow,
    state: str | None,
    more: dict[str, Any],
    becomes: str,
    counts: bool,
) -> None:
    found = ended(ledger, Queued(row), state, **more)
    assert (found.state, found.counts) == (becomes, counts)
    if becomes == "failed":
        early = "began before text was done" if "waits_for" in more else state
        assert (early or "no longer knows job 12") in found.text


def test_a_job_that_ended_well_twice_without_its_stage_fails_it(
    ledger: Ledger, row: PlanRow
) -> None:
    found = ended(ledger, Queued(row, is_doubted=True), "COMPLETED")
    assert found.state == "failed"
    assert str(ledger.folder(row.stage)) in found.text


def test_a_stage_that_kept_a_checkpoint_when_told_to_stop_goes_on_for_nothing(
    ledger: Ledger, row: PlanRow
) -> None:
    with pytest.raises(Stopped), ledger.open_stage(row.stage):
        raise Stopped
    found = ended(ledger, Queued(row), "TIMEOUT")
    assert (found.state, found.counts) == ("waiting", False)
    assert ended(ledger, Queued(row), "CANCELLED", restarts_left=3).state == "failed"
    # A job that dies before it opens the stage has not stopped it.
    before = ledger.status(row.stage)["ended"]
    assert ended(ledger, Queued(row, told_before=before), "FAILED").state == "failed"


def test_tasks_that_did_not_end_well_are_told_once_when_their_stages_job_begins(
    row: PlanRow, tmp_path: Path
) -> None:
    write_json(tmp_path / "task-0.json", {"event": "done"})
    write_json(tmp_path / "task-1.json", {"event": "failed", "error": "no room"})
    events, one = tmp_path / "events.jsonl", Queued(row, tasks=3)
    assert list(one.news(events)) == []
    events.write_text('{"event": "started"}\n')
    begun, note = one.news(events)
    assert begun["event"] == "started"
    assert note["text"].endswith(": 2 of 3 tasks did not end well: task 1: no room")
    assert list(one.news(events)) == []
    write_json(tmp_path / "task-1.json", {"event": "done"})
    assert [told["event"] for told in Queued(row, tasks=2).news(events)] == ["started"]


def test_the_book_keeps_what_it_was_told(tmp_path: Path) -> None:
    book = JobBook.of(tmp_path)
    book.note({"a": Entry("midstream-a", None), "b": Entry("midstream-a", None)})
    assert JobBook.of(tmp_path).entries["a"].job is None
    book.note({"a": Entry("midstream-a", "7_0"), "b": Entry("midstream-a", "7_1", 1)})
    book.forget("a", "unknown")
    assert JobBook.of(tmp_path).entries == {"b": Entry("midstream-a", "7_1", 1)}


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


def test_a_job_that_begins_before_a_parent_is_done_runs_nothing_and_says_so(
    make_study: Callable[..., Study], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = SimpleNamespace(node=0, job_id="12", hostname="here")
    monkeypatch.setattr("submitit.JobEnvironment", lambda: here)
    child = next(row for row in plan(make_study(), ledger).rows if row.stage.parents)
    given, events = (job_folder(ledger.store, child.stage.name) / x for x in ("given", "events"))
    work = json.loads(work_line(child.stage, "auto"))
    write_json(given, work | {"machine": Machine().model_dump(mode="json")})
    with pytest.raises(JobFailed, match=r"it began before .* was done"):
        StageJob(ledger.store, given, 0, 1, command=("no such program",))()
    one = Queued(child)
    assert list(one.news(events.with_suffix(".jsonl"))) == []
    assert one.early is not None
    assert (one.early["job"], one.early["waits_for"]) == ("12", label(child.stage.parents[0]))
