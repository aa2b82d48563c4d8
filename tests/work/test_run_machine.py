"""What the machine's choices make of a run: micro-batches (a GPU is made up), trackers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from midstream.config import Evaluation, Machine, Rows
from midstream.core.storage import read_json
from midstream.cost.cost import work_of
from midstream.cost.taken import Setting, memory
from midstream.study import lease as progress
from midstream.study.stages import Evaluate, Stage, Trained
from midstream.study.store import Ledger, Stopped
from midstream.train import loop
from midstream.train.metrics import TensorBoard
from midstream.work import choices, run_stage


@pytest.fixture
def bytes_of_four_rows(tiny_ledger: Ledger) -> float:
    """A GPU whose memory takes four rows of the stage."""
    work = work_of(tiny.TEXT, tiny_ledger)
    assert work is not None
    # Room is 92 % of it.
    return memory(tiny.TEXT, work, Setting(1, 4)).total / 0.92 + 1


def on_gpu(
    ledger: Ledger, machine: Machine, size: float, monkeypatch: pytest.MonkeyPatch
) -> run_stage.StageRunner:
    runner = tiny.runner(ledger, machine=machine)
    runner.place = replace(runner.place, device=torch.device("cuda"))
    monkeypatch.setattr(choices, "device_bytes", lambda device: size)
    return runner


def test_a_gpu_takes_as_many_rows_as_the_plan_says_that_fit(
    tiny_ledger: Ledger,
    bytes_of_four_rows: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = tiny.MACHINE.model_copy(update={"micro_batch_rows": None})
    runner = on_gpu(tiny_ledger, machine, bytes_of_four_rows, monkeypatch)
    assert runner.machine_for(tiny.TEXT).micro_batch_rows == 4
    assert "micro-batches of 4 rows; --machine micro_batch_rows=N" in capsys.readouterr().err
    small = on_gpu(tiny_ledger, machine, 1, monkeypatch)
    assert small.machine_for(tiny.TEXT).micro_batch_rows == 1
    assert "1 rows, and the plan says that it does not fit" in capsys.readouterr().err


def test_what_was_measured_on_a_gpu_is_taken_there_and_for_that_size_alone(
    tiny_ledger: Ledger, bytes_of_four_rows: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = choices.Best(
        device="NVIDIA Z1",
        decoder_parameters=tiny.DECODER.num_parameters,
        row_length=tiny.ROWS.row_length,
        pictures=False,
        compile="off",
        micro_batch_rows=2,
        tokens_per_second=1e6,
        torch="2.13",
    )
    machine = tiny.MACHINE.model_copy(update={"micro_batch_rows": None})
    runner = on_gpu(tiny_ledger, machine, bytes_of_four_rows, monkeypatch)
    longer = tiny.text_run(rows=Rows(row_length=96, batch_rows=8))

    def taken(stage: Trained, entries: tuple[choices.Best, ...], name: str) -> tuple[bool, int]:
        monkeypatch.setattr(choices, "measured", lambda: entries)
        monkeypatch.setattr(choices, "device_name", lambda device: name)
        place = choices.place_for(stage, machine, runner.place)
        rows = runner.machine_for(stage).micro_batch_rows
        assert rows is not None
        return place.compile_blocks, rows

    assert taken(tiny.TEXT, (best,), "NVIDIA Z1") == (False, 2)
    large = best.model_copy(update={"micro_batch_rows": 64})
    assert taken(tiny.TEXT, (large,), "NVIDIA Z1") == (False, 4)  # more do not fit
    for stage, entries, name in (
        (tiny.TEXT, (), "NVIDIA Z1"),
        (tiny.TEXT, (best,), "NVIDIA Z2"),
        (tiny.TEXT, (best.model_copy(update={"pictures": True}),), "NVIDIA Z1"),
    ):
        assert taken(stage, entries, name) == (True, 4)
    assert taken(longer, (best,), "NVIDIA Z1")[0]
    chosen = machine.model_copy(update={"compile": "blocks"})
    monkeypatch.setattr(choices, "measured", lambda: (best,))
    place = replace(runner.place, compile_blocks=True)
    assert choices.place_for(tiny.TEXT, chosen, place).compile_blocks


def test_a_step_that_does_not_fit_is_named_with_what_would_make_it_fit(
    tiny_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    monkeypatch.setattr(loop, "train_step", full)
    machine = tiny.MACHINE.model_copy(update={"micro_batch_rows": 2})
    said = r"micro-batches of 2 rows do not .*of memory\); give --machine micro_batch_rows=1, or"
    with pytest.raises(RuntimeError, match=said):
        tiny.runner(tiny.store_with(tiny_ledger, tmp_path, tiny.DATA), machine=machine).run(
            tiny.TEXT
        )


def test_a_choice_and_a_cpu_take_what_they_took(
    tiny_ledger: Ledger, bytes_of_four_rows: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tiny.MACHINE.model_copy(update={"micro_batch_rows": 2})
    runner = on_gpu(tiny_ledger, chosen, bytes_of_four_rows, monkeypatch)
    assert runner.machine_for(tiny.TEXT) == chosen
    machine = tiny.MACHINE.model_copy(update={"micro_batch_rows": None})
    assert tiny.runner(tiny_ledger, machine=machine).machine_for(tiny.TEXT) == machine


def test_a_stage_is_trained_in_them(
    tiny_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path, tiny.DATA)
    runner = tiny.runner(ledger)
    three = tiny.MACHINE.model_copy(update={"micro_batch_rows": 3})
    monkeypatch.setattr(runner, "machine_for", lambda stage: three)
    asked: list[int] = []
    real = loop.load_steps

    def load(dataset: object, **options: object) -> object:
        asked.append(int(str(options["micro_rows"])))
        return real(dataset, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "load_steps", load)
    runner.run(tiny.TEXT)
    assert asked == [3]


pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")

TRACKED = Machine(workers=1, threads=1, device="cpu", tracking=("tensorboard",))


def scalars(ledger: Ledger, stage: Stage) -> dict[str, list[tuple[int, float]]]:
    folder = ledger.folder(stage) / "tensorboard"
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in tags}


def test_a_tracked_stage_gives_the_bits_of_one_that_is_not_tracked(
    tiny_line: Ledger, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    tracked = tiny.begun(tiny_ledger, tmp_path)
    tiny.runner(tracked, machine=TRACKED).run(tiny.SEEN)
    assert tiny.bits(tracked, tiny.SEEN) == tiny.bits(tiny_line, tiny.SEEN)
    found, lines = scalars(tracked, tiny.SEEN), tracked.metrics(tiny.SEEN)
    assert {tag.removeprefix("train/") for tag in found} == lines[0].keys() - {"step"}
    for key in ("loss", "rate", "tokens_seen"):
        assert found[f"train/{key}"] == [
            (line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines
        ]
    there = {path.name for path in tracked.folder(tiny.SEEN).iterdir()}
    assert there - {path.name for path in tiny_line.folder(tiny.SEEN).iterdir()} == {
        "tensorboard",
        "tracking.json",
    }


def test_a_stage_that_was_stopped_goes_on_in_the_same_series(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    mine = tiny.begun(tiny_ledger, tmp_path)
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        tiny.runner(mine, machine=TRACKED, should_stop=lambda: next(asked)).run(tiny.SEEN)
    assert [step for step, _ in scalars(mine, tiny.SEEN)["train/loss"]] == [1, 2, 3]
    tiny.runner(mine, machine=TRACKED).run(tiny.SEEN)
    number = mine.results(tiny.SEEN)["steps"]
    assert [step for step, _ in scalars(mine, tiny.SEEN)["train/loss"]] == [*range(1, number + 1)]


def test_a_tracker_that_fails_is_in_the_results_and_changes_nothing_else(
    tiny_line: Ledger, tiny_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TensorBoard, rows: Any) -> None:
        raise OSError("the network is gone")

    tracked = tiny.begun(tiny_ledger, tmp_path)
    monkeypatch.setattr(TensorBoard, "send", broken)
    tiny.runner(tracked, machine=TRACKED).run(tiny.SEEN)
    found = tiny.bits(tracked, tiny.SEEN)
    trouble = found["results"].pop("tracking")
    assert found == tiny.bits(tiny_line, tiny.SEEN)
    assert trouble["tensorboard"]["first"] == "OSError: the network is gone"
    assert trouble["tensorboard"]["failures"] >= 1


def test_an_encoders_training_and_an_evaluation_are_tracked_too(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    mine = tiny.store_with(tiny_ledger, tmp_path, tiny.DATA, tiny.TEXT)
    tiny.runner(mine, machine=TRACKED).run(tiny.ENCODER_STAGE)
    steps = [line["step"] for line in mine.metrics(tiny.ENCODER_STAGE)]
    assert [step for step, _ in scalars(mine, tiny.ENCODER_STAGE)["train/loss"]] == steps
    asked = Evaluation(text_tasks=("pocket_facts",), limit=4)
    stage = Evaluate(of=tiny.TEXT, evaluation=asked)
    tiny.runner(mine, machine=TRACKED).run(stage)
    results, found = mine.results(stage), scalars(mine, stage)
    score = results["tasks"]["pocket_facts"]["score"]
    assert found["score/pocket_facts"] == [(0, pytest.approx(score))]
    assert found["score/stable.text"] == [(0, pytest.approx(results["stable"]["text"]))]


def test_a_stage_keeps_its_progress_while_it_runs_and_takes_it_away_when_it_is_done(
    tiny_line: Ledger, tiny_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "NOTE_SECONDS", 0.0)
    mine = tiny.begun(tiny_ledger, tmp_path)
    folder = mine.folder(tiny.SEEN)
    stops = iter([False, True])
    with pytest.raises(Stopped):
        tiny.runner(mine, should_stop=lambda: next(stops)).run(tiny.SEEN)
    kept = read_json(folder / "progress.json")
    assert kept["tokens_seen"] == mine.metrics(tiny.SEEN)[0]["tokens_seen"]
    assert 0 < kept["done"] < 1
    tiny.runner(mine).run(tiny.SEEN)
    assert not (folder / "progress.json").exists()
    assert tiny.bits(mine, tiny.SEEN) == tiny.bits(tiny_line, tiny.SEEN)


@pytest.mark.parametrize(("ranks", "asked", "told"), [(1, None, 2), (2, 4, 1), (4, 4, None)])
def test_a_step_that_does_not_fit_is_told_rows_that_change_it(
    ranks: int, asked: int | None, told: int | None
) -> None:
    machine = Machine(ranks=ranks, micro_batch_rows=asked)
    said = str(choices.too_large(tiny.TEXT, machine, torch.OutOfMemoryError("Full. More")))
    assert f"micro-batches of {tiny.ROWS.batch_rows // ranks} rows do not fit" in said
    assert "give --machine activation_checkpointing=blocks" in said or told is not None
    assert ("micro_batch_rows=" in said) == (told is not None)
    assert told is None or f"micro_batch_rows={told}," in said
