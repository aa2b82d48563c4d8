"""What a job does that has a work done."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from midstream.config import Machine, SlurmResources, SlurmSettings
from midstream.cost.graph import plan
from midstream.launch import slurm, slurm_job, workers
from midstream.launch.slurm import SlurmBackend
from midstream.launch.slurm_job import JobFailed
from midstream.launch.submission import Refused, WorkJob, submitting
from midstream.launch.workers import STOPPED_EXIT_CODE
from midstream.study.stages import PrepareSource
from midstream.study.store import Ledger
from midstream.study.studies import Study


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """What a task of an array asks of Slurm's commands."""
    pytest.importorskip("submitit")
    asked: list[tuple[str, ...]] = []

    def answer(*command: str) -> str:
        asked.append(command)
        return "JobState=RUNNING"

    def leave(code: int) -> None:
        raise Left(code)

    place = {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    for name, value in ({"SUBMITIT_EXECUTOR": "slurm"} | place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_job, "ask", answer)
    monkeypatch.setattr(os, "_exit", leave)
    before = signal.getsignal(signal.SIGTERM)
    yield asked
    signal.signal(signal.SIGTERM, before)


def job_that(
    ends: dict[str, Any],
    told: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    signals: Sequence[int] = (),
) -> WorkJob:
    """A job whose work ends with this event, after the job has got these signals."""

    def ask(*given: Any, **more: Any) -> workers.Event:
        for number in signals:
            signal.raise_signal(number)
        return ends | {"code": 1}

    monkeypatch.setattr(workers, "ask", ask)
    return WorkJob("prepare-units", "{}", told)


@pytest.mark.parametrize(
    ("ends", "signals"),
    [
        ({"event": "stopped"}, ()),
        # It had not yet begun to listen.
        ({"event": "failed", "error": "ended with signal 15"}, (signal.SIGTERM,)),
    ],
)
def test_a_work_that_was_told_to_stop_is_queued_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[str, ...]],
    ends: dict[str, Any],
    signals: Sequence[int],
) -> None:
    job = job_that(ends, tmp_path / "told.json", monkeypatch, signals=signals)
    with pytest.raises(Left, match=str(STOPPED_EXIT_CODE)):
        job()
    assert asked[-1] == ("scontrol", "requeue", "12_1")
    assert json.loads((tmp_path / "told.json").read_text())["event"] == ends["event"]


@pytest.mark.parametrize("signals", [(), (signal.SIGTERM,)])
def test_a_work_that_is_done_ends_its_job_well(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[str, ...]],
    signals: Sequence[int],
) -> None:
    job_that({"event": "done"}, tmp_path / "told.json", monkeypatch, signals=signals)()
    assert asked == []


def test_a_work_that_failed_fails_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, ...]]
) -> None:
    job = job_that({"event": "failed", "error": "no room"}, tmp_path / "told.json", monkeypatch)
    with pytest.raises(JobFailed, match="no room"):
        job()
    assert asked == []


@pytest.mark.parametrize(("max_jobs", "tasks"), [(1, 0), (4, 3), (9, 6)])
def test_tasks_count_among_the_jobs_that_are_in_the_queue_at_once(
    make_study: Callable[..., Study],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_jobs: int,
    tasks: int,
) -> None:
    ledger, sizes = Ledger(tmp_path), list[int]()

    def submit(folder: Path, *given: Any, **more: Any) -> list[str]:
        sizes.append(len(given[-1]))
        return [f"{len(sizes)}_{n}" for n in range(sizes[-1])]

    monkeypatch.setattr(slurm, "submit", submit)
    asked = {"prepare_source": {"tasks": 6}}
    settings = SlurmSettings.model_validate({"max_jobs": max_jobs, "stages": asked})
    work = plan(make_study(), ledger)
    rows = [row for row in work.rows if isinstance(row.stage, PrepareSource)]
    assert len(rows) > 1
    backend = SlurmBackend(work, ledger, Machine(), settings, lambda stage: "live", lambda e: None)
    assert backend.start(rows) == [rows[0].stage.name]
    assert sizes == ([tasks, 1] if tasks else [1])
    # There is no room for the tasks of another.
    assert backend.start(rows[1:]) == []


def test_jobs_are_given_nothing_of_the_job_that_submits_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "SLURM_JOB_ID": "12",
        "SLURM_MEM_PER_CPU": "2048",
        "SLURM_CONF": "/etc/slurm.conf",
        "RANK": "1",
        "SBATCH_PARTITION": "cpu",
        "SBATCH_ACCOUNT": "mine",
        "SBATCH_TIMELIMIT": "5",
        "SBATCH_JOB_NAME": "other",
        "SBATCH_MEM_PER_CPU": "4G",
        "SBATCH_GRES": "gpu:1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    # Where somebody asks for a partition, a default in the environment would go before it.
    with submitting(SlurmResources(partition="gpu", time_minutes=60, memory="8G", gpus=1)):
        assert given.keys() & os.environ.keys() == {"SLURM_CONF", "SBATCH_ACCOUNT"}
    assert dict(os.environ) == before
    monkeypatch.delenv("SLURM_JOB_ID")
    with submitting(SlurmResources()):
        gone = {"SLURM_JOB_ID", "RANK", "SBATCH_JOB_NAME"}
        assert given.keys() - os.environ.keys() == gone


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("QOSMaxSubmitJobPerUserLimit Job violates accounting/QOS policy", "max_jobs"),
        ("Invalid job array specification", "max_jobs"),
        ("Job violates accounting/QOS policy (job submit limit, user's size)", "max_jobs, time"),
        ("Invalid account or account/partition combination specified", "account"),
        ("Invalid qos specification", "qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "time_minutes"),
        ("Memory specification can not be satisfied", "memory"),
        ("Requested node configuration is not available", "gpus, cpus"),
        ("something of the site", "NAME=VALUE"),
    ],
)
def test_a_refusal_names_the_setting_that_may_be_at_fault(said: str, option: str) -> None:
    assert Refused(said).remedy.startswith(f"change --slurm-set {option}")


def test_lines_that_a_sites_wrapper_prints_are_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "this answer is 30 s old\n\n12|midstream-x|RUNNING|None\n"
    monkeypatch.setattr(slurm_job, "ask", lambda *command: told)
    assert {job.id: job.state for job in slurm_job.queue().values()} == {"12": "RUNNING"}
    ended = "a word first\nmidstream-x|CANCELLED by 7|0:15|None\n"
    monkeypatch.setattr(slurm_job, "ask", lambda *command: ended)
    job = slurm_job.ended_job("12", "midstream-x", None)
    assert job is not None
    assert (job.state, job.exit_code) == ("CANCELLED", "0:15")
