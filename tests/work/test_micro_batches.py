"""Which micro-batch a run takes. Here is no GPU: its kind and its memory are made up."""

from pathlib import Path

import pytest
import torch

import tiny
from midstream.config import Machine
from midstream.cost.cost import work_of
from midstream.cost.taken import Setting, memory
from midstream.study.store import Ledger
from midstream.train import loop
from midstream.work import run_stage


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
    runner.device = torch.device("cuda")
    monkeypatch.setattr(run_stage, "device_bytes", lambda device: size)
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
