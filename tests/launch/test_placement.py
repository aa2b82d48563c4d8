"""Where a study runs; workers side by side have GPUs of their own (what lists them is replaced)."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from pydantic import ValidationError

from midstream.config import Machine
from midstream.launch import workers
from midstream.launch.local import machine_for, run
from midstream.launch.workers import Worker, gpu_shares, visible_gpus, write_work
from midstream.study.store import Ledger
from midstream.study.studies import Study, Suite, study_from_json

MakeStudy = Callable[..., Study]
FOUR = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "visible_gpus", lambda: FOUR)


@pytest.mark.parametrize(
    ("machine", "shares"),
    [
        (Machine(workers=2), [("GPU-a",), ("GPU-b",)]),
        (Machine(workers=2, ranks=2), [("GPU-a", "GPU-b"), ("GPU-c", "GPU-d")]),
        (Machine(workers=1, ranks=3), [("GPU-a", "GPU-b", "GPU-c")]),
        (Machine(workers=5, device="cpu"), [()] * 5),
    ],
)
@pytest.mark.usefixtures("four")
def test_every_worker_has_one_gpu_a_rank_and_none_of_anothers(
    machine: Machine, shares: list[tuple[str, ...]]
) -> None:
    assert gpu_shares(machine) == shares


@pytest.mark.parametrize(
    ("machine", "remedy"),
    [
        (Machine(workers=5), "--workers 4"),
        (Machine(workers=3, ranks=2), "--workers 2"),
        (Machine(workers=1, ranks=8), "--ranks 4"),
    ],
)
@pytest.mark.usefixtures("four")
def test_more_workers_than_gpus_are_refused_before_anything_is_written(
    make_study: MakeStudy, tmp_path: Path, machine: Machine, remedy: str
) -> None:
    ledger = Ledger(tmp_path / "store")
    with pytest.raises(ValueError, match=f"sees 4 .*{remedy}"):
        run(make_study(), ledger, machine, lambda event: None, skip_checks=True)
    assert not ledger.store.exists()


@pytest.mark.usefixtures("four")
def test_workers_that_nobody_asked_for_are_no_more_than_have_gpus(make_study: MakeStudy) -> None:
    assert machine_for(make_study(), {"ranks": 4}).workers == 1
    assert machine_for(make_study(), {}).workers == 2
    assert machine_for(make_study(), {"ranks": 4, "workers": 2}).workers == 2
    assert machine_for(make_study(), {"ranks": 4, "device": "cpu"}).workers == 2


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("2,5", ("2", "5")),
        ("GPU-x", ("GPU-x",)),
        ("", ()),
        ("-1", ()),
        ("3,-1,4", ("3",)),
        ("NoDevFiles", ()),  # of Slurm, in a job without GPUs
    ],
)
def test_what_the_user_or_a_job_made_visible_counts(
    monkeypatch: pytest.MonkeyPatch, value: str, seen: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == seen


def test_a_gpu_that_is_asked_for_and_hidden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES='' leaves no GPU; unset it"):
        gpu_shares(Machine(device="cuda"))
    assert gpu_shares(Machine(device="auto", workers=1)) == [()]


def test_the_driver_is_asked_where_nothing_was_made_visible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == ()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-1\necho GPU-2\n")
    tool.chmod(0o755)
    assert visible_gpus() == ("GPU-1", "GPU-2")
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert visible_gpus() == ()


@pytest.mark.parametrize(
    ("gpus", "printed"), [(("GPU-c", "GPU-d"), "'GPU-c,GPU-d'"), ((), "'the users'")]
)
def test_a_workers_processes_see_its_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: tuple[str, ...], printed: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "the users")
    machine = Machine(ranks=2)
    work, log = write_work(tmp_path / "work.json", tmp_path, machine), tmp_path / "log"
    show = [sys.executable, "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    events: list[Any] = []
    worker = Worker(2, work, log, machine, events.append, True, show, gpus)
    worker.leave()
    while not events:
        time.sleep(0.01)
    assert log.read_text().strip() == printed


# A killed worker leaves a process that holds its output, as those that load rows do.
LEAVES_ONE = """
import os, signal, subprocess
print("a word", flush=True)
subprocess.Popen(["sleep", "60"])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_was_killed_is_known_to_be_gone_whatever_it_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workers, "LEAVE_SECONDS", 0.2)
    work, log = write_work(tmp_path / "work.json", tmp_path, Machine()), tmp_path / "log"
    events: SimpleQueue[Any] = SimpleQueue()
    program = [sys.executable, "-c", LEAVES_ONE]
    worker = Worker(1, work, log, Machine(), events.put, False, program)
    try:
        assert events.get(timeout=30)[1] == {"event": "exit", "code": -signal.SIGKILL}
        assert log.read_text() == "a word\n"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)


def test_a_studys_placement_counts_unless_the_run_says_otherwise(make_study: MakeStudy) -> None:
    study = make_study().model_copy(update={"machine": {"workers": 4, "threads": 3}})
    chosen = {"workers": 1, "threads": None}
    assert machine_for(study, chosen) == Machine(workers=1, threads=3)
    assert machine_for(make_study(), {}) == Machine()
    assert [one.identity for one in study.results] == [o.identity for o in make_study().results]
    suite = Suite(name="all", question="?", studies=(study,), machine={"workers": 5})
    assert machine_for(suite, {}) == Machine(workers=5)
    # Over several nodes stages run one by one.
    found = machine_for(make_study(), {"nodes": 2, "master": "a:1", "workers": 3})
    assert (found.nodes, found.workers) == (2, 1)


def test_a_placement_is_checked_with_its_study_and_kept_with_it(make_study: MakeStudy) -> None:
    plain = make_study()
    with pytest.raises(ValidationError, match=r"no field 'worker'; did you mean 'workers'"):
        Study.model_validate({**dict(plain), "machine": {"worker": 2}})
    study = Study.model_validate({**dict(plain), "machine": {"tracking": ["wandb"]}})
    again = study_from_json(study.model_dump_json())
    assert again.machine == {"tracking": ["wandb"]}
    assert Machine.model_validate(again.machine).tracking == ("wandb",)


def test_a_tracker_that_is_not_there_is_refused_before_anything_starts(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midstream.launch.local.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'midstream\[tensorboard\]'"):
        machine_for(make_study(), {"tracking": ["tensorboard"]})
