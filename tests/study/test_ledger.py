import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from midstream.core import storage
from midstream.core.storage import read_json
from midstream.cost.graph import order
from midstream.study import store as ledger_module
from midstream.study.stages import PrepareWorld, Stage, stage_from_json
from midstream.study.store import Ledger, Stopped, launch_lock
from midstream.study.studies import Study, Suite

# A worker that opens the stage given on its standard input and then waits.
HOLD = """
import sys
from pathlib import Path
from midstream.study.store import Ledger
from midstream.study.stages import stage_from_json
stage = stage_from_json(sys.stdin.readline())
with Ledger(Path(sys.argv[1])).open_stage(stage) as work:
    print("open", flush=True)
    sys.stdin.read()
    work.finish({})
"""


@pytest.fixture
def stage(study: Study) -> Stage:
    return order(study)[0]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "store")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _hold(ledger: Ledger, stage: Stage) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ledger.store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(stage.model_dump_json().encode() + b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"open\n"
    return process


def test_a_finished_stage_has_results_status_and_the_success_mark(
    ledger: Ledger, stage: Stage
) -> None:
    assert ledger.state(stage) == "new"
    assert ledger.status(stage) == {"state": "new"}
    with ledger.open_stage(stage) as work:
        assert ledger.state(stage) == "running"
        assert work.folder == ledger.folder(stage)
        work.finish({"seconds": 1.5})
        assert not ledger.is_done(stage)
    assert ledger.state(stage) == "done"
    assert ledger.results(stage) == {"seconds": 1.5}
    status = ledger.status(stage)
    assert (status["state"], status["error"], status["pid"]) == ("done", None, os.getpid())
    assert status["started"] <= status["ended"]
    kept = stage_from_json((ledger.folder(stage) / "stage.json").read_bytes())
    assert kept.identity == stage.identity


def test_the_success_mark_is_the_last_file_written(
    ledger: Ledger, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = storage.write_bytes

    def noted(path: Path, data: bytes) -> None:
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", noted)
    monkeypatch.setattr(ledger_module, "write_bytes", noted)
    with ledger.open_stage(stage) as work:
        work.finish({})
    assert written == ["stage.json", "status.json", "results.json", "status.json", "SUCCESS"]


@pytest.mark.parametrize("name", ["results.json", "SUCCESS"])
def test_a_disk_that_fails_at_the_end_leaves_the_stage_unfinished(
    ledger: Ledger, stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = storage.write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.name == name:
            raise OSError("disk full")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        patch.setattr(ledger_module, "write_bytes", full)
        with pytest.raises(OSError, match="disk full"), ledger.open_stage(stage) as work:
            work.finish({})
    assert ledger.state(stage) in ("failed", "stopped")
    with ledger.open_stage(stage) as work:
        work.finish({"again": 1})
    assert ledger.results(stage) == {"again": 1}


def test_an_exception_leaves_the_stage_failed_with_its_text(ledger: Ledger, stage: Stage) -> None:
    def break_down() -> None:
        with ledger.open_stage(stage) as work:
            work.finish({})
            raise ZeroDivisionError("one by zero")

    with pytest.raises(ZeroDivisionError):
        break_down()
    assert ledger.state(stage) == "failed"
    assert ledger.status(stage)["error"] == "ZeroDivisionError: one by zero"
    assert not (ledger.folder(stage) / "results.json").exists()


@pytest.mark.parametrize("reason", [Stopped("at step 7"), KeyboardInterrupt()])
def test_a_stage_asked_to_stop_is_stopped_and_may_go_on(
    ledger: Ledger, stage: Stage, reason: BaseException
) -> None:
    with pytest.raises(type(reason)), ledger.open_stage(stage):
        raise reason
    assert ledger.state(stage) == "stopped"
    with ledger.open_stage(stage) as work:
        work.finish({})
    assert ledger.state(stage) == "done"
    assert ledger.status(stage)["error"] is None


def test_a_stage_without_results_is_failed(ledger: Ledger, stage: Stage) -> None:
    with pytest.raises(RuntimeError, match="without handing in"), ledger.open_stage(stage):
        pass
    assert ledger.state(stage) == "failed"


def test_a_done_stage_is_not_run_again(ledger: Ledger, stage: Stage) -> None:
    with ledger.open_stage(stage) as work:
        work.finish({"kept": 1})
    before = _files(ledger.store)
    with pytest.raises(ValueError, match="done already"), ledger.open_stage(stage):
        pytest.fail("the block must not run")
    assert _files(ledger.store) == before


def test_a_stage_runs_in_one_process_and_a_killed_one_counts_as_stopped(
    ledger: Ledger, stage: Stage
) -> None:
    process = _hold(ledger, stage)
    assert ledger.state(stage) == "running"
    before = _files(ledger.store)
    with (
        pytest.raises(ValueError, match=rf"{stage.name}.*process {process.pid}\b"),
        ledger.open_stage(stage),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(ValueError, match="being run"):
        ledger.mark_failed(stage, "no")
    assert _files(ledger.store) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_json(ledger.folder(stage) / "status.json")["state"] == "running"
    assert ledger.state(stage) == "stopped"
    assert ledger.status(stage)["state"] == "stopped"
    ledger.mark_failed(stage, "killed")
    assert ledger.status(stage)["error"] == "killed"
    with ledger.open_stage(stage) as work:
        work.finish({})
    assert ledger.state(stage) == "done"


def test_a_killed_end_without_the_success_mark_is_not_done(ledger: Ledger, stage: Stage) -> None:
    with ledger.open_stage(stage) as work:
        work.finish({})
    (ledger.folder(stage) / "SUCCESS").unlink()
    assert ledger.state(stage) == "stopped"
    told = f"{stage.identity[:7]} is stopped, not done, in {ledger.folder(stage)}"
    with pytest.raises(FileNotFoundError, match=told):
        ledger.results(stage)


def test_leftovers_of_a_killed_writer_are_removed(ledger: Ledger, stage: Stage) -> None:
    folder = ledger.folder(stage)
    (folder / "checkpoints" / f".step-1.{'a0' * 16}.tmp").mkdir(parents=True)
    (folder / f".results.json.{'a0' * 16}.tmp").write_text("{")
    with ledger.open_stage(stage) as work:
        assert not list(folder.rglob(".*.tmp"))
        work.finish({})


def test_a_folder_of_another_stage_is_refused(ledger: Ledger, stage: Stage) -> None:
    assert isinstance(stage, PrepareWorld)
    other = PrepareWorld(world=stage.world.model_copy(update={"seed": 5}))
    folder = ledger.folder(stage)
    storage.write_json(folder / "stage.json", other.model_dump(mode="json"))
    with (
        pytest.raises(ValueError, match=rf"{other.identity}, not {stage.identity}"),
        ledger.open_stage(stage),
    ):
        pytest.fail("the block must not run")
    assert not (folder / "status.json").exists()


def test_results_that_a_copy_left_behind_are_named_with_the_way_out(
    ledger: Ledger, stage: Stage
) -> None:
    with ledger.open_stage(stage) as work:
        work.finish({})
    (ledger.folder(stage) / "results.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"results\.json is missing though .* is done.*copy"
    ):
        ledger.results(stage)


def test_a_stages_file_that_is_cut_is_one_line(ledger: Ledger, stage: Stage) -> None:
    ledger.folder(stage).mkdir(parents=True)
    (ledger.folder(stage) / "stage.json").write_text("")
    with (
        pytest.raises(ValueError, match=r"stage\.json is no stage of .*; move it away") as caught,
        ledger.open_stage(stage),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_metrics_leave_out_a_line_that_is_still_being_written(ledger: Ledger, stage: Stage) -> None:
    assert ledger.metrics(stage) == []
    path = ledger.folder(stage) / "metrics.jsonl"
    add = storage.append_line(path)
    entries = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    for entry in entries:
        add(entry)
    whole = path.read_bytes()
    third = whole.splitlines(keepends=True)[2]
    for cut in range(1, len(third) + 1):
        path.write_bytes(whole[: len(whole) - cut])
        assert ledger.metrics(stage) == entries[:2]
    path.write_bytes(whole)
    assert ledger.metrics(stage) == entries


def test_metrics_refuse_a_damaged_line_in_the_middle(ledger: Ledger, stage: Stage) -> None:
    path = ledger.folder(stage) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        ledger.metrics(stage)


def test_predictions_that_are_missing_are_told_with_those_there_are(
    ledger: Ledger, stage: Stage
) -> None:
    folder = ledger.folder(stage) / "predictions"
    folder.mkdir(parents=True)
    (folder / "gqa.parquet").touch()
    assert ledger.predictions(stage, "gqa") == folder / "gqa.parquet"
    with pytest.raises(FileNotFoundError, match=r"'pope'.*it has gqa"):
        ledger.predictions(stage, "pope")


def test_a_study_is_kept_and_read_by_name(ledger: Ledger, study: Study) -> None:
    assert ledger.study_names() == []
    with pytest.raises(FileNotFoundError, match="it has none"):
        ledger.load_study("small")
    ledger.save_study(study)
    assert ledger.study_names() == ["small"]
    read = ledger.load_study("small")
    assert [stage.name for stage in order(read)] == [stage.name for stage in order(study)]
    with pytest.raises(FileNotFoundError, match=r"'large'.*it has small"):
        ledger.load_study("large")


def test_a_study_has_a_name_that_its_files_can_have(ledger: Ledger, study: Study) -> None:
    """One that lay elsewhere would not be found again, and its stages be taken for unneeded."""
    values = study.model_dump()
    for name in ("", "a/b", "../up", ".mine", "two\nlines", "n" * 300):
        with pytest.raises(ValidationError, match=r"study's name is that of its files.*give it"):
            Study.model_validate({**values, "name": name})
        with pytest.raises(ValidationError, match="study's name is that of its files"):
            Suite(name=name, question="?", studies=())
    named = Study.model_validate({**values, "name": "50 % | <b>: caf\u00e9"})
    ledger.save_study(named)
    assert ledger.study_names() == [named.name]


def test_a_store_that_is_no_folder_is_refused_and_one_that_is_not_there_yet_is_not(
    tmp_path: Path,
) -> None:
    assert not Ledger(tmp_path / "new").study_names()
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "away")
    with pytest.raises(NotADirectoryError, match=r"file is a file, not a folder; .*--store"):
        Ledger(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"nowhere is a link to .*away"):
        Ledger(tmp_path / "nowhere")


def test_a_second_launcher_is_refused_and_leaves_the_store_as_it_was(ledger: Ledger) -> None:
    with launch_lock(ledger.store):
        before = _files(ledger.store)
        with (
            pytest.raises(ValueError, match=rf"process {os.getpid()} on .*--store") as caught,
            launch_lock(ledger.store),
        ):
            pytest.fail("the block must not run")
        assert str(ledger.store) in str(caught.value)
        assert _files(ledger.store) == before
    with launch_lock(ledger.store):
        pass
