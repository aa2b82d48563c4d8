import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from midstream.config import Machine
from midstream.launch.local import require_trackers
from midstream.train import metrics as tracking_module
from midstream.train.metrics import MetricsLog, TensorBoard, TrackedRow, Tracking, tracking_of

pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NAME = "continue-0123456789abcdef"


def rows(*steps: int) -> list[TrackedRow]:
    return [TrackedRow(step, {"train/loss": step / 8}, 1000.0 + step) for step in steps]


def scalars(folder: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """Every value in the event files, as TensorBoard reads them; all of them are kept."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


class Recorder:
    """A tracker that keeps what it gets, and fails where it is told to."""

    def __init__(self, last: int | None = None, fails: Sequence[str] = ()) -> None:
        self.last, self.fails = last, fails
        self.began: int | None = None
        self.steps: list[int] = []
        self.ended: bool | None = None
        self.failed = threading.Event()

    def begin(self, step: int) -> int:
        self._fail("begin")
        self.began = step
        return step if self.last is None else self.last

    def send(self, rows: Sequence[TrackedRow]) -> None:
        self._fail("send")
        self.steps += [row.step for row in rows]

    def finish(self, failed: bool) -> None:
        self.ended = failed

    def _fail(self, where: str) -> None:
        if where in self.fails:
            self.failed.set()
            raise ConnectionError("no network")


def log_of(path: Path, position: int, tracker: object) -> tuple[MetricsLog, Tracking]:
    made = Tracking({"recorder": lambda: tracker})  # type: ignore[dict-item, return-value]
    return MetricsLog(path, position, made), made


def write(log: MetricsLog, *steps: int) -> None:
    for step in steps:
        log.write(step=step, loss=step / 8)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_held_out_losses_are_tracked_by_source() -> None:
    measured = {"web": {"loss": 2.5, "loss_other_picture": None, "num_targets": 7}}
    row = tracking_module._row({"step": 3, "loss": 3.0, "held_out": measured}, "train", 1.0)
    assert row == TrackedRow(
        3, {"train/loss": 3.0, "held_out/web/loss": 2.5, "held_out/web/num_targets": 7.0}, 1.0
    )


def test_lines_behind_the_checkpoint_are_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    write(log, 1, 2)
    kept = log.position
    assert path.stat().st_size == kept > 0  # what a killed process leaves
    write(log, 3)
    log.close()
    assert steps(path) == [1, 2, 3]
    again = MetricsLog(path, kept)
    assert again.position == kept
    write(again, 3, 4)
    with pytest.raises(ValueError, match="not JSON compliant"):
        again.write(step=5, loss=float("nan"))
    again.sync()
    assert steps(path) == [1, 2, 3, 4]
    again.close()
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds \d+ bytes.*1,000; delete"):
        MetricsLog(path, 1000)
    assert steps(path) == [1, 2, 3, 4]
    MetricsLog(path, 0).close()
    assert path.read_bytes() == b""


def board(folder: Path, step: int, *values: TrackedRow) -> int:
    """A start at `step` that sends something; what it found there."""
    made = TensorBoard(folder, "p", NAME, "continue", {})
    last = made.begin(step)
    made.send(values)
    made.finish(False)
    return last


@pytest.mark.parametrize(("step", "left"), [(2, 2), (9, 4), (-1, 0)])
def test_event_files_are_cut_back_to_the_step_that_a_stage_goes_on_from(
    tmp_path: Path, step: int, left: int
) -> None:
    assert board(tmp_path, -1, *rows(1, 2, 3, 4)) == -1
    again = [TrackedRow(n, {"train/loss": 9.0}, 2000.0) for n in range(left + 1, 7)]
    assert board(tmp_path, step, *again) == (left or -1)
    expected = [(n, n / 8 if n <= left else 9.0) for n in range(1, 7)]
    assert scalars(tmp_path / "tensorboard") == expected
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [one.wall_time for one in found] == [
        1000.0 + n if n <= left else 2000.0 for n in range(1, 7)
    ]


def test_a_record_that_a_killed_process_left_torn_is_sent_again(tmp_path: Path) -> None:
    board(tmp_path, -1, *rows(1, 2))
    noted = (tmp_path / "tracking.json").read_bytes()
    board(tmp_path, 2, *rows(3))
    (tmp_path / "tracking.json").write_bytes(noted)
    path = max((tmp_path / "tensorboard").iterdir())
    os.truncate(path, path.stat().st_size - 5)
    assert board(tmp_path, 3, *rows(3, 4)) == 2
    assert [step for step, _ in scalars(tmp_path / "tensorboard")] == [1, 2, 3, 4]


def test_a_tracker_gets_every_line_once_and_those_from_before_it_was_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    plain = MetricsLog(path, 0)
    write(plain, 1, 2)
    position = plain.position
    plain.close()
    recorder = Recorder(last=-1)
    log, made = log_of(path, position, recorder)
    write(log, 3, 4)
    log.close()
    assert made.close() == {}
    assert (recorder.began, recorder.steps, recorder.ended) == (2, [1, 2, 3, 4], False)
    # One that only takes more is not sent what it has.
    recorder = Recorder(last=3)
    log, made = log_of(path, 0, recorder)
    write(log, 1, 2, 3, 4, 5)
    log.close()
    made.close()
    assert recorder.steps == [4, 5]


@pytest.mark.parametrize("fails", ["begin", "send"])
def test_a_tracker_that_fails_is_counted_told_once_and_changes_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(tracking_module, "SEND_SECONDS", 0.001)
    path, recorder = tmp_path / "metrics.jsonl", Recorder(fails=[fails])
    log, made = log_of(path, 0, recorder)
    write(log, 1)
    assert recorder.failed.wait(20)
    write(log, 2)
    log.close()
    first, number = "ConnectionError: no network", 2 if fails == "send" else 1
    assert made.close() == {"recorder": {"failures": number, "first": first}}
    assert capsys.readouterr().err.count(f"tracking by recorder failed: {first}") == 1
    assert steps(path) == [1, 2]


def test_a_tracker_that_hangs_does_not_hold_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_module, "CLOSE_SECONDS", 0.05)
    release = threading.Event()

    class Hanging(Recorder):
        def begin(self, step: int) -> int:
            release.wait(20)
            return step

    log, made = log_of(tmp_path / "metrics.jsonl", 0, Hanging())
    write(log, 1)
    log.close()
    assert "TimeoutError: it was not done within 0.05 s" in made.close()["recorder"]["first"]
    release.set()


def test_a_tracker_that_is_not_installed_is_refused_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine.model_validate({"tracking": ["tensorboard", "wandb"]})
    there = lambda name: None if name == "wandb" else object()  # noqa: E731
    monkeypatch.setattr("midstream.launch.local.find_spec", there)
    with pytest.raises(ValueError, match=r"asks for wandb.*pip install 'midstream\[wandb\]'"):
        require_trackers(machine)
    require_trackers(Machine.model_validate({"tracking": ["tensorboard"]}))


def test_trackers_that_do_not_exist_or_stand_twice_are_refused(tmp_path: Path) -> None:
    assert tracking_of(Machine(), tmp_path, NAME, "continue", {}) is None
    with pytest.raises(ValueError, match="tensorboard"):
        Machine.model_validate({"tracking": ["tensorbord"]})
    # As a shell leaves them.
    for text in ("wandb,tensorboard", "[wandb, tensorboard]", '["wandb","tensorboard"]'):
        assert Machine.model_validate({"tracking": text}).tracking == ("wandb", "tensorboard")
    with pytest.raises(ValueError, match="names one twice"):
        Machine.model_validate({"tracking": ["wandb", "wandb"]})


class Library:
    """What the trackers call of W&B's library and of Trackio's."""

    Settings = dict

    def __init__(self) -> None:
        self.runs: list[dict[str, object]] = []
        self.sent: list[tuple[int, float]] = []
        self.ended: list[dict[str, int]] = []

    def init(self, **given: object) -> "Library":
        self.runs.append(given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.sent.append((step, values["train/loss"]))

    def finish(self, **given: int) -> None:
        self.ended.append(given)


@pytest.mark.parametrize(("name", "end"), [("wandb", {"exit_code": 0}), ("trackio", {})])
def test_a_run_goes_on_and_is_sent_no_step_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, end: dict[str, int]
) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, name, library)
    machine = Machine.model_validate({"tracking": [name], "tracking_project": "mine"})
    position = 0
    for steps in ((1, 2, 3), (3, 4)):
        made = tracking_of(machine, tmp_path, NAME, "continue", {"seed": 3})
        log = MetricsLog(tmp_path / "metrics.jsonl", position, made)
        write(log, *steps[:2])
        position = log.position
        write(log, *steps[2:])
        log.close()
        assert made.close() == {}
    assert library.sent == [(step, step / 8) for step in (1, 2, 3, 4)]
    assert library.ended == [end] * 2
    first, again = library.runs
    assert first == again
    assert first["name"].startswith(NAME)
    assert (first["project"], first["config"], first["resume"]) == ("mine", {"seed": 3}, "allow")
