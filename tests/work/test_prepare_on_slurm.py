"""`midstream prepare --slurm`, and a study's sources by tasks: the bytes of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from clusters import REAL
from inputs import byte_tokenizer, midstream
from midstream.config import SlurmSettings
from midstream.data.formats.records import ReadOptions
from midstream.launch.slurm import run_on_slurm
from midstream.launch.slurm_job import JobBook
from midstream.study.store import Ledger
from midstream.work.protocol import Channel
from midstream.work.read_data import PrepareRequest, prepare
from own_studies import study_of

DEADLINE_SECONDS = 240.0
NUM_FILES, NUM_TASKS = 4, 2
# Every job is two processes that import the package.
pytestmark = pytest.mark.slow
real_slurm = pytest.mark.parametrize("slurm", [REAL], indirect=True)
stand_in = pytest.mark.parametrize("slurm", ["stand-in"], indirect=True)


class Source:
    """Texts to be prepared, a shard a file, and the command that does it."""

    def __init__(self, folder: Path, slurm: Any, num_lines: int) -> None:
        self.folder, self.slurm, self.out = folder, slurm, folder / "out"
        self.texts, self.hold = folder / "in", folder / "hold"
        self.texts.mkdir()
        self.hold.mkdir()
        for number in range(NUM_FILES):
            lines = (json.dumps({"text": f"line {n} of {number}"}) for n in range(num_lines))
            (self.texts / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
        byte_tokenizer(folder, "<start>")

    def words(self, *more: str) -> list[str]:
        """The command; `more` stands at its end."""
        command = ["prepare", "text", str(self.texts), "--out", str(self.out)]
        command += ["--tokenizer", str(self.folder / "tokenizer.json")]
        return [*command, "--begin-of-text", "<start>", *more]

    def start(self, *more: str) -> "subprocess.Popen[str]":
        command, pipe = [sys.executable, "-m", "midstream", *self.words(*more)], subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def on_slurm(self, *more: str, **settings: Any) -> "subprocess.Popen[str]":
        """The command with jobs; a task whose file lies in `hold` waits for it to go before it
        begins."""
        waits = f"while [ -e {self.hold}/task-$SLURM_ARRAY_TASK_ID ]; do sleep 0.1; done"
        hold = f"trap 'exit 1' TERM; {waits}; trap : TERM"
        values = {"time_minutes": 10, "poll_seconds": 0.3}
        values = {"tasks": NUM_TASKS, "setup": json.dumps([hold])} | values | settings
        sets = (part for name in values for part in ("--slurm-set", f"{name}={values[name]}"))
        return self.start("--slurm", *sets, *more)

    def jobs(self) -> dict[str, str]:
        """The jobs in the book, by entry."""
        return {key: one.job or "" for key, one in JobBook.of(self.out).entries.items()}

    def made(self) -> dict[str, int]:
        """The shards that tasks have published, and when they were made."""
        found = self.out.glob("units/*/made_from.json")
        return {
            path.parent.name: path.stat().st_mtime_ns
            for path in found
            if not path.parent.name.startswith(".")
        }

    def until(self, condition: Callable[[], Any], process: Any = None) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert process is None or process.poll() is None, process.communicate()
            assert time.monotonic() < end, self.slurm.ask("squeue", "--states=all")
            time.sleep(0.05)

    def alone(self) -> dict[str, bytes]:
        """What one process of this machine makes."""
        request = PrepareRequest(
            section="text",
            sources=(str(self.texts),),
            out=self.folder / "alone",
            tokenizer=str(self.folder / "tokenizer.json"),
            options=ReadOptions(),
            max_rejects=0.001,
            validation=0.0,
            workers=1,
            begin_of_text="<start>",
        )
        prepare(request, Channel(None))
        return contents(request.out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a source; not when it was made, nor how the jobs went."""
    assert not (out / "units").exists()
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and path.relative_to(out).parts[0] not in ("slurm", "slurm.json", "prepare.lock")
        and path.name != "made_from.json"
    }


@pytest.fixture
def source(slurm: Any, tmp_path: Path) -> Iterator[Source]:
    made = Source(tmp_path, slurm, 100)
    yield made
    slurm.ask("scancel", "--user", str(os.geteuid()))
    made.until(lambda: not slurm.ask("squeue", "--noheader", "--format=%j").strip())


def test_tasks_make_the_source_and_one_job_finishes_it(source: Source) -> None:
    process = source.on_slurm()
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"{NUM_FILES} of {NUM_FILES} shards are made by {NUM_TASKS} tasks" in printed
    assert f"{NUM_FILES} shards kept, 0 new" in printed
    assert contents(source.out) == source.alone()
    assert source.jobs() == {}
    script = next(source.out.glob("slurm/jobs/*submission.sh"))
    assert any(
        f"--array=0-{NUM_TASKS - 1}%" in path.read_text() for path in script.parent.glob("*.sh")
    )


@pytest.mark.faults
def test_a_cancelled_task_is_named_and_the_same_command_makes_what_it_left(source: Source) -> None:
    (source.hold / "task-1").touch()
    process = source.on_slurm(restarts=3)
    source.until(lambda: len(source.made()) == NUM_FILES - 2, process)
    before, jobs = source.made(), source.jobs()
    source.slurm.ask("scancel", jobs["task-1"])
    _, errors = process.communicate()
    assert process.returncode == 2
    assert f"1 of {NUM_TASKS} tasks did not end well; task 1: Slurm ended job" in errors
    assert "as CANCELLED" in errors
    assert "the same command goes on" in errors
    assert not (source.out / "source.json").exists()
    assert source.made() == before
    (source.hold / "task-1").unlink()
    again = source.on_slurm()
    printed, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"2 of {NUM_FILES} shards are made by 1 task" in printed
    shards = source.out.glob("shards/*/made_from.json")
    kept = {path.stat().st_mtime_ns for path in shards}
    assert set(before.values()) < kept
    assert contents(source.out) == source.alone()
    printed, errors = source.on_slurm().communicate()
    assert f"0 of {NUM_FILES} shards are made by 0 tasks" in printed, errors


@pytest.mark.faults
def test_a_command_that_is_killed_finds_its_jobs_again_and_others_are_refused(
    source: Source,
) -> None:
    (source.hold / "task-1").touch()
    process = source.on_slurm()
    source.until(lambda: len(source.made()) == NUM_FILES - 2, process)
    jobs = source.jobs()
    process.kill()
    process.communicate()
    other = source.on_slurm("--validation", "0.5")
    _, errors = other.communicate()
    assert other.returncode == 2
    assert "out is being prepared otherwise by jobs" in errors
    assert f"scancel {jobs['task-1']} {jobs['finish']}" in errors
    here = source.start()
    _, errors = here.communicate()
    assert here.returncode == 2
    assert f"2 jobs of {source.out} are in Slurm's queue; follow them with --slurm" in errors
    again = source.on_slurm()
    assert again.stdout is not None
    followed = next((line for line in again.stdout if "followed again" in line), "")
    assert source.jobs() == jobs
    (source.hold / "task-1").unlink()
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "2 jobs, submitted before, followed again" in followed
    assert contents(source.out) == source.alone()


@real_slurm
def test_a_killed_task_and_a_controller_that_is_restarted_cost_nothing(
    slurm: Any, tmp_path: Path
) -> None:
    # Long enough to be met in the middle of a shard.
    source = Source(tmp_path, slurm, 60_000)
    process = source.on_slurm(restarts=1)
    source.until(lambda: len(source.made()) >= 1, process)
    before = source.made()
    running = [
        (key, job) for key, job in source.jobs().items() if key != "finish" and task_of(slurm, job)
    ]
    key, job = running[-1]
    slurm.kill_controller()
    for pid in task_of(slurm, job):
        os.kill(pid, signal.SIGKILL)
    printed = ""
    assert process.stdout is not None
    for line in process.stdout:
        printed += line
        if "waiting until Slurm answers" in line:
            slurm.start_controller()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Slurm answers again" in printed
    assert f"{key.replace('-', ' ')}: " in printed
    assert "it is submitted again" in printed
    kept = {path.stat().st_mtime_ns for path in source.out.glob("shards/*/made_from.json")}
    assert set(before.values()) <= kept
    assert len(kept) == NUM_FILES
    assert contents(source.out) == source.alone()


def task_of(slurm: Any, job: str) -> list[int]:
    """The processes of a task that do its work."""
    return [
        pid
        for pid, words in slurm.job_processes(job).items()
        if "midstream.work" in words or "submitit" in words
    ]


@pytest.mark.faults
@stand_in
def test_a_task_that_is_told_to_stop_is_queued_again_and_goes_on(
    slurm: Any, tmp_path: Path
) -> None:
    # Long enough to be met in the middle of a shard.
    source = Source(tmp_path, slurm, 60_000)
    process = source.on_slurm()
    source.until(lambda: len(source.made()) >= 1, process)
    before = source.made()
    tasks = [job for key, job in source.jobs().items() if key != "finish" and task_of(slurm, job)]
    assert tasks
    for job in tasks:
        for pid in slurm.job_processes(job):
            os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    logs = [path.read_text() for path in source.out.glob("slurm/jobs/*_log.out")]
    assert sum("prepare-units is queued again: told to stop" in log for log in logs) == len(tasks)
    kept = {path.stat().st_mtime_ns for path in source.out.glob("shards/*/made_from.json")}
    assert set(before.values()) <= kept
    assert contents(source.out) == source.alone()


@pytest.mark.faults
@stand_in
def test_what_the_data_lack_is_told_by_the_job_that_finishes(source: Source) -> None:
    (source.texts / "0.jsonl").write_text('{"body": "bad"}\n')
    process = source.on_slurm("--max-rejects", "0")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "1 x no text: name the field with --text-key" in errors
    assert "raise the limit (--max-rejects)" in errors


@stand_in
def test_what_slurm_cannot_give_is_refused_and_workers_are_of_this_machine(source: Source) -> None:
    refused = {
        ("--slurm",): "time_minutes is 240, but the default partition gives 60",
        ("--slurm", "--slurm-set", "partition=hgih"): "did you mean 'high'?",
        (
            *("--slurm", "--slurm-set", "time_minutes=10", "--slurm-set", "memory=900G"),
        ): "sbatch refused the jobs of",
        ("--slurm", "--workers", "2"): "--slurm-set cpus=N",
        ("--slurm-set", "cpus=2"): "go with --slurm",
    }
    for options, told in refused.items():
        ended = midstream(*source.words(*options))
        assert (ended.exit_code, told in ended.stderr) == (2, True), ended.stderr
    assert source.jobs() == {}


@stand_in
@pytest.mark.faults
@pytest.mark.parametrize("lost", [0, 1])
def test_a_studys_source_is_made_by_tasks_before_its_own_job(
    slurm: Any, tmp_path: Path, tiny_ledger: Ledger, lost: int
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path / "store", tiny.WORLD, tiny.TOKENIZER)
    run = tiny.text_run(total_tokens=6_000, seed=1)
    text = tiny.EVALUATION.model_copy(update={"visual_tasks": ()})
    study = study_of(run, asked=text)
    # The first tasks, which have its only shard to make, do not begin.
    setup = [f'[ "${{SLURM_ARRAY_TASK_ID:-{NUM_TASKS}}}" -ge {lost} ] || exit 1']
    asked = {"prepare_source": {"tasks": NUM_TASKS, "cpus": 2}}
    settings = SlurmSettings.model_validate(
        {"time_minutes": 10, "poll_seconds": 0.3, "stages": asked, "setup": setup}
    )
    events: list[dict[str, Any]] = []
    outcome = run_on_slurm(study, ledger, tiny.MACHINE, settings, events.append)
    assert outcome.exit_code == 0, outcome.messages
    web = tiny.DATA.source("web")
    assert tiny.bits(ledger, web) == tiny.bits(tiny_ledger, web)
    told = [
        json.loads(path.read_text())
        for path in sorted((ledger.store / "slurm" / web.name).glob("task-*.json"))
    ]
    num_shards = len(list((ledger.folder(web) / "source/shards").iterdir()))
    assert [one["event"] for one in told] == ["done"] * (NUM_TASKS - lost)
    made = sum(one["result"]["new"] for one in told)
    assert (made == num_shards) is (lost == 0)
    given = json.loads((ledger.store / "slurm" / web.name / "given.json").read_text())
    assert given["machine"]["workers"] == 2
    notes = [event["text"] for event in events if event["event"] == "note"]
    found = [note for note in notes if "1 of 2 tasks did not end well: task 0: it did not" in note]
    assert len(found) == lost
    assert not (ledger.folder(web) / "source/units").exists()
