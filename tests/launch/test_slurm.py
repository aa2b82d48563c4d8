"""Studies as jobs of Slurm; most with a worker that only pretends.

They run on a stand-in for Slurm, and where there is a real one, on that as well.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import own_studies
import tiny
from clusters import REAL
from midstream.config import SlurmSettings
from midstream.launch import local as launch_local
from midstream.launch.scheduler import STOPPED_EXIT_CODE, Outcome
from midstream.launch.slurm import run_on_slurm
from midstream.launch.slurm_job import JobBook
from midstream.study.label import label
from midstream.study.stages import Pretrain, Stage
from midstream.study.store import Ledger
from midstream.study.studies import Study

DEADLINE_SECONDS = 120.0
TEXT = tiny.EVALUATION.model_copy(update={"visual_tasks": ()})
FAKE_WORKER = Path(__file__).parent.parent / "fake_worker.py"
# Every job is two processes that import the package.
pytestmark = pytest.mark.slow
real_slurm = pytest.mark.parametrize("slurm", [REAL], indirect=True)
stand_in = pytest.mark.parametrize("slurm", ["stand-in"], indirect=True)


def text_run(seed: int, **changes: Any) -> Pretrain:
    return tiny.text_run(total_tokens=6_000, seed=seed, **changes)


def study_of(*runs: Pretrain) -> Study:
    """A text run and its evaluation a line."""
    return own_studies.study_of(*runs, asked=TEXT)


def with_data(store: Path) -> Ledger:
    """A store whose data counts as prepared."""
    ledger = Ledger(store)
    made = {"kind": "text", "num_examples": 9, "num_tokens": 9_000, "num_images": 0}
    for stage in tiny.PREPARED:
        with ledger.open_stage(stage) as work:
            work.finish({**made, "distinct_images": 0, "seconds": 1.0})
    return ledger


RUN = text_run(1)


class Cluster:
    """Runs studies on the Slurm and keeps what was told."""

    def __init__(self, slurm: Any, ledger: Ledger, folder: Path) -> None:
        self.slurm, self.ledger = slurm, ledger
        self.acts = folder / "acts"
        self.acts.mkdir()
        self.events: list[dict[str, Any]] = []

    def __call__(
        self,
        study: Study,
        *,
        fake: bool = True,
        retry: bool = False,
        detach: bool = False,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        **settings: Any,
    ) -> Outcome:
        self.events = []

        def keep(event: dict[str, Any]) -> None:
            self.events.append(event)
            on_event(event)

        return run_on_slurm(
            study,
            self.ledger,
            tiny.MACHINE,
            SlurmSettings.model_validate({"time_minutes": 10, "poll_seconds": 0.3} | settings),
            keep,
            retry=retry,
            detach=detach,
            # What is asked here is jobs; what a study asks of its data is none of it.
            skip_checks=fake,
            command=(sys.executable, str(FAKE_WORKER)) if fake else None,
        )

    def disturbed(self, steps: Mapping[str, Callable[[str], object]], **settings: Any) -> Outcome:
        """Run RUN, which waits, and call what stands under "begun", or in a note, with its job."""
        self.act(RUN, "wait")
        starts: list[str] = []

        def disturb(event: dict[str, Any]) -> None:
            begins = event["event"] == "started" and event["stage"] == RUN.name
            told = "begun" if begins else event.get("text", "")
            if begins:  # a busy machine's worker may not have come to its first line yet
                starts.append(told)
                self.until(lambda: self.begun().count(RUN.name) >= len(starts))
            for words, act in steps.items():
                if words in told:
                    act(self.jobs().get(RUN.name, ""))

        return self(study_of(RUN), on_event=disturb, **settings)

    def act(self, stage: Stage, what: str | None) -> None:
        """Tell the pretending worker of a stage: fail, wait, or (None) go on."""
        path = self.acts / stage.name
        path.unlink(missing_ok=True) if what is None else path.write_text(what)

    def begun(self) -> list[str]:
        """The names of the stages that a pretending worker has begun, in their order."""
        path = self.ledger.store / "notes.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line)[1] for line in lines if json.loads(line)[0] == "begin"]

    def jobs(self) -> dict[str, str]:
        """The job by stage name."""
        entries = JobBook.of(self.ledger.store).entries
        return {name: entry.job or "" for name, entry in entries.items()}

    def notes(self) -> str:
        return "\n".join(event["text"] for event in self.events if event["event"] == "note")

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < end, self.slurm.ask("squeue", "--states=all")
            time.sleep(0.1)

    def queue(self) -> list[str]:
        """The names of the jobs that wait or run."""
        return self.slurm.ask("squeue", "--noheader", "--array", "--format=%j").split()


@pytest.fixture
def cluster(slurm: Any, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(slurm, with_data(tmp_path / "store"), tmp_path)
    yield made
    slurm.ask("scancel", "--user", str(os.geteuid()))
    made.until(lambda: not made.queue())


@real_slurm
def test_jobs_give_the_bits_of_a_local_run_though_preempted_and_killed_with_the_controller(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # Asked for here, since it takes a while and is skipped where there is no Slurm.
    tiny_ledger = request.getfixturevalue("tiny_ledger")
    cluster.ledger = tiny.store_with(tiny_ledger, tmp_path / "true", tiny.DATA)
    # Long enough to be met along the way twice, and a checkpoint now and then.
    budget = tiny.mixture(160_000, web=1.0).model_copy(update={"max_epochs": 32})
    long = text_run(1, budget=budget, checkpoint_every_steps=5)
    study, steps = study_of(long), ["preempt", "requeued", "kill", "restart"]
    urgent = ("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")

    def disturb(event: dict[str, Any]) -> None:
        is_running = event["event"] == "progress" and event["stage"] == long.name
        text = event.get("text", "")
        match steps[:1]:
            case ["preempt"] if is_running:
                cluster.slurm.ask(*urgent)
            case ["requeued"] if f"{label(long)} is requeued: told to stop" in text:
                pass
            case ["kill"] if is_running:
                cluster.slurm.kill_controller()
                for pid, words in cluster.slurm.job_processes(cluster.jobs()[long.name]).items():
                    if "midstream.work.worker" in words or "submitit" in words:
                        os.kill(pid, signal.SIGKILL)
            case ["restart"] if "waiting until Slurm answers" in text:
                cluster.slurm.start_controller()
            case _:
                return
        steps.pop(0)

    outcome = cluster(study, fake=False, restarts=1, on_event=disturb)
    assert (outcome.num_done, outcome.exit_code) == (2, 0), outcome.messages
    assert steps == []
    assert "Slurm answers again" in cluster.notes()
    assert f"{label(long)} is submitted again: Slurm ended job" in cluster.notes()
    assert cluster.jobs() == {}
    local = tiny.store_with(tiny_ledger, tmp_path / "local", tiny.DATA)
    result = study.lines[0].result
    tiny.run_missing(local, result)
    for stage in (long, result):
        assert tiny.bits(cluster.ledger, stage) == tiny.bits(local, stage)


def test_equal_stages_are_one_array_and_children_wait_for_their_parents(cluster: Cluster) -> None:
    study = study_of(RUN, text_run(2))
    sizes: dict[str, str] = {}

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            sizes.update(cluster.jobs())

    outcome = cluster(study, on_event=look, array_limit=1)
    assert (outcome.num_done, outcome.exit_code) == (4, 0), outcome.messages
    runs = [sizes[line.result.of.name] for line in study.lines]
    assert len({job.partition("_")[0] for job in runs}) == 1
    assert [job.partition("_")[2] for job in runs] == ["0", "1"]
    for line in study.lines:
        assert "_" not in sizes[line.result.name]
        begun = cluster.begun()
        assert begun.index(line.result.of.name) < begun.index(line.result.name)
    script = next(cluster.ledger.store.glob("slurm/jobs/midstream-pretrain-*/*submission.sh"))
    assert "--array=0-1%1" in script.read_text()


def test_what_slurm_cannot_give_is_named_and_nothing_is_queued(cluster: Cluster) -> None:
    before = sorted(cluster.ledger.store.rglob("*"))
    with pytest.raises(ValueError, match=r"no partition 'hgih'; did you mean 'high'\? it has ci"):
        cluster(study_of(RUN), stages={"evaluate": {"partition": "hgih"}})
    # Without the check its jobs would wait for ever.
    with pytest.raises(ValueError, match=r"time_minutes is 61, but partition high gives 60"):
        cluster(study_of(RUN), stages={"evaluate": {"partition": "high"}}, time_minutes=61)
    with pytest.raises(ValueError, match=r"time_minutes is 61, but the default partition"):
        cluster(study_of(RUN), time_minutes=61)
    assert sorted(cluster.ledger.store.rglob("*")) == before
    with pytest.raises(ValueError, match=r"sbatch refused 1 pretrain jobs: .*Memory specification"):
        cluster(study_of(RUN), memory="900G")
    assert cluster.jobs() == {}
    assert cluster.queue() == []
    assert cluster.ledger.state(RUN) == "new"


def test_without_slurms_commands_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = with_data(tmp_path / "store")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no sbatch, srun.* on the PATH.*leave --slurm out"):
        run_on_slurm(study_of(RUN), ledger, tiny.MACHINE, SlurmSettings(), lambda event: None)
    assert not (ledger.store / "slurm.json").exists()


def test_a_failed_stage_cancels_its_descendants_only_and_runs_again_with_retry(
    cluster: Cluster,
) -> None:
    bad, good = RUN, text_run(2)
    study = study_of(bad, good)
    cluster.act(bad, "fail")
    outcome = cluster(study)
    assert (outcome.num_done, outcome.num_failed, outcome.num_skipped) == (2, 1, 1)
    assert outcome.exit_code == 1
    child = study.lines[0].result.name
    assert f"{label(bad)} failed: ValueError: bad luck" in outcome.messages[0]
    assert f"was not started: {label(study.lines[0].result)}" in outcome.messages[1]
    assert cluster.ledger.status(bad)["error"] == "ValueError: bad luck"
    assert child not in cluster.begun()
    cluster.act(bad, None)
    same = cluster(study)
    assert (same.num_done, same.num_failed, same.num_skipped) == (0, 1, 1)
    assert "--retry" in same.messages[0]
    again = cluster(study, retry=True)
    assert (again.num_before, again.num_done, again.exit_code) == (5, 2, 0)


def test_a_cancelled_job_is_named_in_the_ledger_with_slurms_reason(cluster: Cluster) -> None:
    outcome = cluster.disturbed({"begun": lambda job: cluster.slurm.ask("scancel", job)})
    assert (outcome.num_done, outcome.num_failed, outcome.num_skipped) == (0, 1, 1)
    assert cluster.ledger.status(RUN)["state"] == "failed"
    assert "as CANCELLED" in cluster.ledger.status(RUN)["error"]
    assert cluster.begun() == [RUN.name]
    assert "as CANCELLED" in outcome.messages[0]


def test_a_launcher_that_is_killed_finds_its_jobs_again_and_submits_none_twice(
    cluster: Cluster,
) -> None:
    study = study_of(RUN, text_run(2))
    cluster.act(RUN, "wait")
    first = cluster(study, detach=True)
    assert (first.num_queued, first.num_done, first.exit_code) == (4, 0, 0)
    jobs = cluster.jobs()
    assert len(jobs) == 4
    cluster.until(lambda: cluster.ledger.is_done(text_run(2)))
    # On this machine a run is refused, since the queue has the same stages.
    with pytest.raises(ValueError, match=r"jobs of .* are in Slurm's queue.*--slurm"):
        launch_local.run(study, cluster.ledger, tiny.MACHINE, lambda event: None)

    def leave(event: dict[str, Any]) -> None:
        if event["event"] == "finished":
            os.kill(os.getpid(), signal.SIGTERM)

    second = cluster(study, on_event=leave)
    assert second.interrupted
    assert second.exit_code == STOPPED_EXIT_CODE
    assert "the same command follows them" in cluster.notes()
    assert cluster.jobs().items() <= jobs.items()
    cluster.act(RUN, None)
    third = cluster(study)
    assert third.exit_code == 0, third.messages
    assert sorted(cluster.begun()) == sorted(jobs)
    assert first.num_before + len(jobs) == third.num_before + third.num_done


def test_a_submission_that_was_cut_off_is_made_anew(cluster: Cluster) -> None:
    study = study_of(RUN)
    cluster.act(RUN, "wait")
    cluster(study, detach=True)
    old = cluster.jobs()
    book = JobBook.of(cluster.ledger.store)
    book.note({RUN.name: replace(book.entries[RUN.name], job=None)})

    def go_on(event: dict[str, Any]) -> None:
        # Not before: the old job would end by itself.
        if cluster.jobs().get(RUN.name) not in ("", None, old[RUN.name]):
            cluster.act(RUN, None)

    outcome = cluster(study, on_event=go_on)
    assert (outcome.num_done, outcome.exit_code) == (2, 0), outcome.messages
    states = cluster.slurm.ask("scontrol", "show", "job", old[RUN.name])
    assert "JobState=CANCELLED" in states


@stand_in
def test_a_preempted_job_is_queued_again_and_its_stage_goes_on(cluster: Cluster) -> None:
    def preempt(job: str) -> None:
        for pid in cluster.slurm.job_processes(job):
            os.kill(pid, signal.SIGTERM)

    steps = {"begun": preempt, "is requeued: told to stop": lambda _: cluster.act(RUN, None)}
    outcome = cluster.disturbed(steps)
    assert (outcome.num_done, outcome.exit_code) == (2, 0), outcome.messages
    assert cluster.begun().count(RUN.name) == 2


@pytest.mark.faults
@stand_in
def test_a_job_that_slurm_ends_uses_up_a_restart_and_then_fails_its_stage(cluster: Cluster) -> None:
    steps = {"begun": lambda job: cluster.slurm.end(job, "OUT_OF_MEMORY")}
    outcome = cluster.disturbed(steps, restarts=1)
    assert (outcome.num_done, outcome.num_failed, outcome.num_skipped) == (0, 1, 1)
    assert f"{label(RUN)} is submitted again: Slurm ended job" in cluster.notes()
    assert "as OUT_OF_MEMORY" in cluster.ledger.status(RUN)["error"]
    assert cluster.begun() == [RUN.name] * 2


@stand_in
def test_a_killed_worker_is_begun_again_by_its_own_job(cluster: Cluster) -> None:
    def kill(job: str) -> None:
        for pid, words in cluster.slurm.job_processes(job).items():
            if str(FAKE_WORKER) in words and "submitit" not in words:
                os.kill(pid, signal.SIGKILL)

    outcome = cluster.disturbed(
        {"begun": kill, "is restarted: ": lambda _: cluster.act(RUN, None)}, restarts=1
    )
    assert (outcome.num_done, outcome.exit_code) == (2, 0), outcome.messages
    assert "ended with signal SIGKILL" in cluster.notes()


@stand_in
def test_a_controller_that_was_away_and_forgot_a_job_costs_nothing(cluster: Cluster) -> None:
    def forget(job: str) -> None:
        cluster.slurm.forget(job)
        cluster.slurm.kill_controller()

    outcome = cluster.disturbed(
        {
            "begun": forget,
            "waiting until Slurm answers": lambda _: cluster.slurm.start_controller(),
            "no longer knows job": lambda _: cluster.act(RUN, None),
        }
    )
    assert (outcome.num_done, outcome.exit_code) == (2, 0), outcome.messages
    assert "Slurm answers again" in cluster.notes()
    assert cluster.begun().count(RUN.name) == 1


@stand_in
def test_no_more_jobs_are_queued_than_max_jobs(cluster: Cluster) -> None:
    study = study_of(RUN)
    with pytest.raises(ValueError, match="max_jobs is 1"):
        cluster(study, detach=True, max_jobs=1)
    queued = []

    def count(event: dict[str, Any]) -> None:
        queued.append(len(cluster.jobs()))

    assert cluster(study, on_event=count, max_jobs=1).num_done == 2
    assert max(queued) == 1
