import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from midstream.config import Machine
from midstream.cost.graph import order, plan
from midstream.cost.pictures import Choice, feature_plan
from midstream.launch import scheduler, terminal
from midstream.launch.local import run
from midstream.launch.scheduler import STOPPED_EXIT_CODE, FeatureChoices, remaining_chains
from midstream.launch.workers import worker_environment
from midstream.study.label import label
from midstream.study.stages import Stage
from midstream.study.store import Ledger, launch_lock
from midstream.study.studies import Study

MakeStudy = Callable[..., Study]

FAKE_WORKER = Path(__file__).parent.parent / "fake_worker.py"


class Launch:
    """Runs studies with the fake worker and keeps what happened."""

    def __init__(self, folder: Path) -> None:
        self.acts = folder / "acts"
        self.ledger = Ledger(folder / "store")
        self.events: list[dict[str, Any]] = []

    def __call__(
        self,
        study: Study,
        workers: int = 1,
        behaviour: Mapping[str, str] | None = None,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        retry: bool = False,
    ) -> Any:
        self.events = []

        def keep(event: dict[str, Any]) -> None:
            self.events.append(event)
            on_event(event)

        command = [sys.executable, str(FAKE_WORKER), str(self.ledger.store)]
        shutil.rmtree(self.acts, ignore_errors=True)
        self.acts.mkdir()
        for name, act in (behaviour or {}).items():
            (self.acts / name).write_text(act)
        # What is asked here is order and ends; the studies' data are none.
        return run(
            study, self.ledger, Machine(workers=workers), keep, command, retry, skip_checks=True
        )

    def notes(self, what: str) -> list[str]:
        path = self.ledger.store / "notes.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)[1] for line in lines if json.loads(line)[0] == what]

    def pids(self) -> set[int]:
        lines = (self.ledger.store / "notes.jsonl").read_text().splitlines()
        return {json.loads(line)[2] for line in lines}

    def states(self, study: Study) -> dict[str, str]:
        return {stage.name: self.ledger.state(stage) for stage in order(study)}


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def _stage(study: Study, kind: str, number: int = 0) -> Stage:
    found: list[Stage] = [stage for stage in order(study) if stage.kind == kind]
    return found[number]


def test_a_run_does_every_stage_once_after_its_parents(
    launch: Launch, make_study: MakeStudy
) -> None:
    study = make_study((0.2, 0.6, 1.0))
    outcome = launch(study, workers=8)
    assert (outcome.num_done, outcome.num_before, outcome.exit_code) == (17, 0, 0)
    # Three sources can go side by side, and three models.
    assert not (launch.ledger.store / "worker-5.log").exists()
    begun = launch.notes("begin")
    assert sorted(begun) == sorted(stage.name for stage in order(study))
    finished: set[str] = set()
    for line in (launch.ledger.store / "notes.jsonl").read_text().splitlines():
        what, name, *_ = json.loads(line)
        if what == "begin":
            stage = next(stage for stage in order(study) if stage.name == name)
            assert {parent.name for parent in stage.parents} <= finished
        else:
            finished.add(name)
    assert launch.ledger.study_names() == ["small"]


def test_the_longest_remaining_chain_starts_first(launch: Launch, make_study: MakeStudy) -> None:
    study = make_study((0.2, 1.0))
    launch(study, workers=1)
    assert len(launch.pids()) == 1
    chains = remaining_chains(plan(study, Ledger(launch.ledger.store / "none")).rows)
    begun = launch.notes("begin")
    pair = [_stage(study, "train_encoder").name, _stage(study, "pretrain").name]
    assert [name for name in begun if name in pair] == sorted(
        pair, key=lambda name: chains[name], reverse=True
    )
    # In the study's order the first line would end before the second one begins.
    continued = [begun.index(_stage(study, "continue", number).name) for number in (0, 1)]
    tuned = [begun.index(_stage(study, "finetune", number).name) for number in (0, 1)]
    assert max(continued) < min(tuned)


def test_a_finished_study_starts_and_writes_nothing(launch: Launch, make_study: MakeStudy) -> None:
    study = make_study()
    launch(study)
    store = launch.ledger.store
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    outcome = launch(study, behaviour={"startup": "die"})
    assert (outcome.num_before, outcome.num_done, outcome.exit_code) == (14, 0, 0)
    assert launch.events == []
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_a_failed_stage_stops_its_descendants_only_and_runs_again_with_retry(
    launch: Launch, make_study: MakeStudy
) -> None:
    study = make_study()
    lost = _stage(study, "continue", 0)
    outcome = launch(study, workers=2, behaviour={lost.name: "fail"})
    assert (outcome.num_done, outcome.num_failed, outcome.num_skipped) == (11, 1, 2)
    assert outcome.exit_code == 1
    assert "bad luck" in outcome.messages[0]
    assert label(lost) in outcome.messages[0]
    assert "worker-" in outcome.messages[0]
    assert "2 stages" in outcome.messages[1]
    states = launch.states(study)
    assert states.pop(lost.name) == "failed"
    assert sorted(states.values()) == ["done"] * 11 + ["new"] * 2
    assert "--retry" in outcome.messages[0]
    begun = launch.notes("begin")
    same = launch(study)
    assert (same.num_before, same.num_done, same.num_failed, same.num_skipped) == (11, 0, 1, 2)
    assert same.exit_code == 1
    assert label(lost) in same.messages[0]
    assert "failed before: ValueError: bad luck" in same.messages[0]
    assert "--retry" in same.messages[0]
    assert launch.notes("begin") == begun
    again = launch(study, retry=True)
    assert (again.num_before, again.num_done, again.exit_code) == (11, 3, 0)


def test_a_stage_that_failed_before_leaves_the_others_their_turn(
    launch: Launch, make_study: MakeStudy
) -> None:
    study = make_study()
    launch(study, behaviour={_stage(study, "train_encoder").name: "fail"})
    wider = make_study((0.2, 0.6, 1.0))
    outcome = launch(wider)
    # The text run has another milestone and is another stage; what needs the encoder is left.
    assert (outcome.num_done, outcome.num_failed, outcome.num_skipped) == (2, 1, 9)
    assert launch.ledger.state(_stage(wider, "pretrain")) == "done"


def test_a_study_edited_while_it_runs_is_refused_and_planned_anew_afterwards(
    launch: Launch, make_study: MakeStudy
) -> None:
    study, edited = make_study((0.2, 1.0)), make_study((0.2, 0.6, 1.0))
    refusals = []

    def edit(event: dict[str, Any]) -> None:
        if event["event"] == "started" and not refusals:
            with pytest.raises(ValueError, match="in use by another launcher") as refused:
                run(edited, launch.ledger, Machine(workers=1), lambda event: None)
            refusals.append(str(refused.value))

    outcome = launch(study, on_event=edit)
    assert len(refusals) == 1
    # The run goes by the plan that it has made.
    assert (outcome.num_done, outcome.exit_code) == (14, 0)
    assert launch.ledger.load_study("small") == study
    again = launch(edited)
    # Data and encoder are shared; the text run has one milestone more.
    assert (again.num_before, again.num_done, again.exit_code) == (6, 11, 0)
    assert launch.ledger.load_study("small") == edited


@pytest.mark.parametrize(("act", "how"), [("kill", "SIGKILL"), ("exit", "exit code 7")])
def test_a_worker_that_dies_fails_its_stage_and_is_replaced(
    launch: Launch, make_study: MakeStudy, act: str, how: str
) -> None:
    study = make_study()
    lost = _stage(study, "continue", 1)
    outcome = launch(study, workers=1, behaviour={lost.name: act})
    assert (outcome.num_done, outcome.num_failed, outcome.num_skipped) == (11, 1, 2)
    assert how in outcome.messages[0]
    assert launch.ledger.state(lost) == "failed"
    assert how in launch.ledger.status(lost)["error"]
    assert len(launch.pids()) == 2


def test_workers_that_cannot_start_end_the_run(launch: Launch, make_study: MakeStudy) -> None:
    study = make_study()
    outcome = launch(study, workers=2, behaviour={"startup": "die"})
    assert (outcome.num_done, outcome.num_failed, outcome.num_skipped) == (0, 1, 13)
    assert "before it was ready; no other worker was started" in outcome.messages[0]
    assert "exit code 3" in outcome.messages[0]
    assert outcome.exit_code == 1


def test_a_worker_that_says_why_it_cannot_start_is_quoted(
    launch: Launch, make_study: MakeStudy
) -> None:
    outcome = launch(make_study(), workers=2, behaviour={"startup": "say"})
    assert "failed: there is no such device; no other worker was started" in outcome.messages[0]
    assert outcome.exit_code == 1


def test_a_stage_reported_done_without_its_mark_is_failed(
    launch: Launch, make_study: MakeStudy
) -> None:
    study = make_study()
    lie = _stage(study, "train_encoder")
    outcome = launch(study, behaviour={lie.name: "lie"})
    assert outcome.num_failed == 1
    assert "reported done" in outcome.messages[0]


def test_a_signal_stops_the_running_stage_and_the_next_run_goes_on(
    launch: Launch, make_study: MakeStudy
) -> None:
    study = make_study()
    waiting = _stage(study, "pretrain")
    before = signal.getsignal(signal.SIGTERM)

    def send(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = launch(study, behaviour={waiting.name: "wait"}, on_event=send)
    assert outcome.num_stopped == 1
    assert outcome.num_failed == 0
    assert outcome.exit_code == STOPPED_EXIT_CODE
    assert launch.ledger.state(waiting) == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before
    again = launch(study)
    assert again.exit_code == 0
    assert again.num_before + again.num_done == 14


def test_an_error_of_the_display_ends_the_workers(launch: Launch, make_study: MakeStudy) -> None:
    study = make_study()
    waiting = _stage(study, "pretrain")

    def break_down(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        launch(study, behaviour={waiting.name: "wait"}, on_event=break_down)
    assert launch.ledger.state(waiting) == "stopped"
    with launch_lock(launch.ledger.store):
        pass


def test_a_stage_that_an_earlier_launcher_left_running_is_named(
    launch: Launch, make_study: MakeStudy
) -> None:
    study = make_study()
    stage = order(study)[0]
    with launch.ledger.open_stage(stage) as work:
        with pytest.raises(ValueError, match=rf"{stage.identity[:7]} .*process {os.getpid()}"):
            launch(study)
        work.finish({})
    assert launch.notes("begin") == []


def test_events_tell_plan_and_stages_and_other_output_goes_to_the_log(
    launch: Launch, make_study: MakeStudy
) -> None:
    study = make_study((1.0,))
    launch(study)
    assert launch.events[0] == {"event": "plan", "num_stages": 11, "num_done": 0}
    kinds = [event["event"] for event in launch.events[1:]]
    assert kinds == ["started", "finished"] * 11
    log = Path(launch.events[1]["log"])
    assert log == launch.ledger.store / "worker-1.log"
    assert "a library says hello" in log.read_text()
    assert "and complains" in log.read_text()


def test_workers_get_their_threads_no_network_and_nothing_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As Kubeflow, torchrun and Accelerate set them in the process that they start.
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "GROUP_RANK", "PET_NNODES")
    for name in (*ranks, "TORCHELASTIC_RUN_ID", "RANKING"):
        monkeypatch.setenv(name, "3")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    environment = worker_environment(Machine(threads=3))
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {*ranks, "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert environment["RANKING"] == "3"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert worker_environment(Machine())["HF_HUB_OFFLINE"] == "0"


def test_a_module_in_the_folder_of_the_command_is_none_of_a_workers(tmp_path: Path) -> None:
    (tmp_path / "shadowed_by_a_user.py").touch()
    command = [sys.executable, "-m", "shadowed_by_a_user"]
    for environment, code in ((worker_environment(Machine()), 1), (os.environ, 0)):
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert ended.returncode == code


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_asks_for_a_stop_unless_nohup_has_it_ignored(
    ignored: bool,
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    asked: list[int] = []
    try:
        with scheduler.stop_signals(asked.append):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert asked == ([] if ignored else [signal.SIGHUP])


def test_a_terminal_that_is_closed_and_says_so_twice_leaves_time_for_checkpoints() -> None:
    stopped: list[int] = []
    backend: Any = SimpleNamespace(queues=False, stop=stopped.append)
    asked: Any = None
    work = scheduler.Scheduler([], {}, asked, backend, asked, on_event=lambda _: None)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGINT):
        work._stop(number)
    assert stopped == [signal.SIGTERM, signal.SIGKILL]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_run_goes_on_where_nobody_reads_what_it_shows(number: int) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

        def fileno(self) -> int:
            raise io.UnsupportedOperation

    with terminal.progress(Console(file=Gone()), {}) as show:
        for _ in range(2):
            show({"event": "note", "text": "a word"})


def test_stages_side_by_side_see_different_gpus(
    launch: Launch, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    study = make_study()
    both = (_stage(study, "continue", 0).name, _stage(study, "continue", 1).name)
    assert launch(study, workers=2, behaviour=dict.fromkeys(both, "meet")).exit_code == 0
    lines = (launch.ledger.store / "notes.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    seen = {name: gpus for _, name, _, gpus in told}
    assert {seen[name] for name in both} == {"3", "5"}
    assert len({(pid, gpus) for *_, pid, gpus in told}) == len(launch.pids()) == 2


def test_pictures_are_priced_again_when_data_was_prepared_and_at_no_other_dispatch(
    launch: Launch, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced: list[int] = []

    def count(stages: Sequence[Stage], *others: Any) -> list[Any]:
        priced.append(len(stages))
        return feature_plan(stages, *others)

    monkeypatch.setattr(scheduler, "feature_plan", count)
    study = make_study((0.2, 0.6, 1.0))
    assert launch(study).exit_code == 0
    # Six stages see through the encoder; one source is prepared after the first of them began.
    assert sum(row.kind in ("continue", "finetune") for row in order(study)) == 6
    assert priced == [17, 17]


def test_what_data_holds_counts_as_soon_as_it_is_prepared(
    launch: Launch, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, decision = make_study(), "unknown"

    def answer(stages: Sequence[Stage], *others: Any) -> list[Any]:
        plans = feature_plan(stages, *others)
        return [replace(one, choice=Choice(decision, "")) for one in plans]

    monkeypatch.setattr(scheduler, "feature_plan", answer)
    choices = FeatureChoices(plan(study, launch.ledger).to_run, launch.ledger, Machine())
    seeing = _stage(study, "continue")
    assert choices.of(seeing) == "auto"
    decision = "stored"
    choices.ended(_stage(study, "pretrain"))
    assert choices.of(seeing) == "auto"
    choices.ended(_stage(study, "prepare_source"))
    assert choices.of(seeing) == "stored"
    assert choices.of(_stage(study, "pretrain")) == "auto"
