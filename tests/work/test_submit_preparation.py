"""What `midstream prepare --slurm` submits and tells; Slurm is a table of jobs here."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models

from midstream.config import SlurmSettings
from midstream.core.storage import write_json
from midstream.data.formats.records import ReadOptions
from midstream.data.prepare_source import SourcePlan, plan_source, prepare_source
from midstream.launch import slurm_job
from midstream.launch.slurm_job import Job
from midstream.launch.submission import WorkJob
from midstream.work import prepare_on_slurm
from midstream.work.prepare_on_slurm import OnSlurm

NUM_FILES = 7


class Table:
    """Slurm's queue: every job waits until it was looked at twice, and then ends well."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, WorkJob]] = {}
        self.looks: dict[str, int] = {}
        self.submitted: list[list[str]] = []
        self.asked: list[tuple[str, ...]] = []
        self.before_submission: Callable[[], object] = bool
        # Whether jobs may end yet.
        self.may_end: Callable[[], bool] = lambda: True

    def ask(self, *command: str) -> str:
        self.asked.append(command)
        return ""

    def submit(
        self, folder: Path, settings: Any, asked: Any, name: str, works: list[WorkJob], **more: Any
    ) -> list[str]:
        self.before_submission()
        self.submitted.append([work.told.stem for work in works])
        array = str(len(self.submitted))
        ids = [f"{array}_{n}" for n in range(len(works))] if len(works) > 1 else [array]
        self.jobs |= {job: (name, work) for job, work in zip(ids, works, strict=True)}
        return ids

    def queue(self) -> dict[str, Job]:
        found = {}
        for job, (name, work) in list(self.jobs.items()):
            self.looks[job] = self.looks.get(job, 0) + 1
            ended = self.looks[job] > 2 and self.may_end()
            if ended:
                write_json(work.told, {"event": "done", "result": {"records": 3}})
            found[job] = Job(job, name, "COMPLETED" if ended else "PENDING", "None")
        return found


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    table = Table()
    monkeypatch.setattr(prepare_on_slurm, "require_slurm", lambda asked: None)
    monkeypatch.setattr(slurm_job, "queue", table.queue)
    monkeypatch.setattr(slurm_job, "ask", table.ask)
    monkeypatch.setattr(slurm_job, "ended_job", lambda job, name, seen: seen)
    monkeypatch.setattr(prepare_on_slurm, "submit", table.submit)
    return table


@pytest.fixture
def plan(tmp_path: Path) -> SourcePlan:
    """Texts to be prepared in `out`, a shard a file."""
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in").mkdir()
    for number in range(NUM_FILES):
        (tmp_path / f"in/{number}.jsonl").write_text('{"text": "a"}\n' * (number + 1))
    return plan_of(tmp_path)


def plan_of(folder: Path, validation: float = 0.0) -> SourcePlan:
    return plan_source(
        "text",
        [str(folder / "in")],
        folder / "out",
        tokenizer_file=folder / "tokenizer.json",
        options=ReadOptions(),
        root="",
        validation_fraction=validation,
    )


def made_alone(plan: SourcePlan) -> None:
    """Prepare the source here."""
    prepare_source(plan, workers=1, max_reject_fraction=0.0, progress=lambda done, note: None)


def preparation(plan: SourcePlan, notes: list[str] | None = None, **settings: Any) -> OnSlurm:
    given = SlurmSettings.model_validate({"poll_seconds": 0.01} | settings)
    told = [] if notes is None else notes
    return OnSlurm(plan, str, given, lambda done, note: told.append(note))


def test_two_commands_at_once_submit_once_and_follow_the_same_jobs(
    table: Table, plan: SourcePlan
) -> None:
    go = threading.Event()
    table.before_submission = go.wait
    notes: list[list[str]] = [[], []]
    # However late the second begins, the jobs are still there to be followed.
    table.may_end = lambda: all(notes)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(preparation(plan, told).run) for told in notes]
        # The second has the time to do what it may do.
        time.sleep(0.3)
        go.set()
        assert [run.result() for run in runs] == [{"records": 3}] * 2
    tasks = [f"task-{n}" for n in range(NUM_FILES)]
    assert table.submitted == [tasks, ["finish"]]
    assert table.asked == []


def test_nothing_is_submitted_while_another_process_prepares(
    table: Table, plan: SourcePlan, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out/prepare.lock"),
        pytest.raises(ValueError, match="out is being prepared by another process"),
    ):
        preparation(plan).run()
    assert table.submitted == []


@pytest.mark.parametrize(("max_jobs", "tasks"), [(1, 0), (3, 2)])
def test_no_more_jobs_than_max_jobs_are_in_the_queue(
    table: Table, plan: SourcePlan, max_jobs: int, tasks: int
) -> None:
    assert preparation(plan, max_jobs=max_jobs).run() == {"records": 3}
    array = [[f"task-{n}" for n in range(tasks)]] if tasks else []
    assert table.submitted == [*array, ["finish"]]


def test_shards_of_another_preparation_are_not_counted(
    table: Table, plan: SourcePlan, tmp_path: Path
) -> None:
    notes, again = list[str](), list[str]()
    made_alone(plan)
    preparation(plan, notes).run()
    preparation(plan_of(tmp_path, validation=0.5), again).run()
    waiting = f"of {NUM_FILES} shards; jobs: {{}} pending"
    assert notes[0] == f"{NUM_FILES} " + waiting.format(1)
    assert again[0] == "0 " + waiting.format(NUM_FILES + 1)
    assert again[-1] == f"0 of {NUM_FILES} shards; jobs: all ended"


def test_a_command_that_follows_counts_what_was_there_and_what_is_made(
    table: Table, plan: SourcePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_alone(plan)
    (tmp_path / "in/0.jsonl").write_text('{"text": "aa"}\n')
    plan = plan_of(tmp_path)

    class Killed(BaseException):
        pass

    def kill(done: float, note: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        OnSlurm(plan, str, SlurmSettings(), kill).run()
    notes = list[str]()
    (plan.job.units / plan.wanted[0].key).mkdir(parents=True)
    preparation(plan, notes).run()
    assert table.submitted == [["task-0"], ["finish"]]
    assert notes[0].startswith(f"{NUM_FILES} of {NUM_FILES} shards")
