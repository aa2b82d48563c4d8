"""What a stage says of its speed."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midstream.core.batch import Batch
from midstream.core.tokens import TokenCount
from midstream.cost.cost import cost
from midstream.study.store import Ledger
from midstream.train.checkpoint import Progress
from midstream.train.metrics import MetricsLog, Record, meters_of
from midstream.train.parallel import ALONE, Clock
from midstream.train.step import NonFiniteError, Taken, totals_of
from tiny import TEXT


def meters(device: str, **changes: Any) -> dict[str, Any]:
    """Of two seconds on two devices."""
    given: dict[str, Any] = {
        "counts": TokenCount(text=60, image=20, pad=20),
        "images": 4,
        "flops": 989e12,
        "seconds": 2.0,
        "parts": {"data": 0.5, "model": 1.0},
        "device": device,
        "num_devices": 2,
        "product_flops": 1e15,
        "memory": {"peak_memory_bytes": 7, "memory_of": "device"},
    }
    return meters_of(**given | changes)


def test_utilisation_is_over_the_makers_peak_and_beside_it_over_the_measured_product() -> None:
    found = meters("NVIDIA H100 80GB HBM3")
    assert found["tokens_per_second"] == 50.0
    assert found["useful_tokens_per_second"] == 40.0
    assert found["images_per_second"] == 2.0
    assert found["gpu"] == "H100"
    assert found["model_flops_utilisation"] == pytest.approx(0.25)
    assert found["product_share"] == pytest.approx(0.4945)
    assert found["time_shares"] == {"data": 0.25, "model": 0.5, "other": 0.25}
    assert (found["peak_memory_bytes"], found["memory_of"]) == (7, "device")


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G"])
def test_a_device_of_unknown_peak_has_the_measured_share_alone(device: str) -> None:
    found = meters(device)
    assert found["device"] == device
    assert found["gpu"] is found["model_flops_utilisation"] is None
    assert found["product_share"] == pytest.approx(0.4945)


def test_a_plan_expects_the_model_flops_that_a_done_stage_counted(tiny_ledger: Ledger) -> None:
    results, planned = tiny_ledger.results(TEXT), cost(TEXT, tiny_ledger)
    counted = results["meters"]["model_flops_per_second"] * results["seconds"]
    assert planned.model_flops == pytest.approx(counted, rel=0.005)
    # Padding and a head at targets alone.
    assert planned.model_flops != planned.flops


def taken(loss: float, norm: float = 1.0) -> Taken:
    return Taken(torch.tensor([loss, norm]), totals_of([], ALONE), ())


def reached(step: int) -> Progress:
    return Progress(step, 10 * step, 100, 0.1, TokenCount())


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl", 0)


@pytest.fixture
def record(log: MetricsLog) -> Record:
    return Record(log, Clock(torch.device("cpu")), lambda event: None, reached(0), rows=(4, 10))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_that_cannot_be_read_leave_the_line_of_the_step_before(
    record: Record, log: MetricsLog, tmp_path: Path
) -> None:
    def steps() -> Iterator[list[Batch]]:
        yield []
        raise ValueError("a broken picture")

    rows = steps()
    assert record.next_rows(rows) == []
    assert not record.has_begun
    record.hold(reached(1), taken(2.5, 0.5), 0.1)
    with pytest.raises(ValueError, match="a broken picture"):
        record.next_rows(rows)
    log.close()
    (line,) = lines(tmp_path)
    assert (line["step"], line["loss"], line["grad_norm"], line["rate"]) == (1, 2.5, 0.5, 0.1)
    assert record.write().loss == 2.5


@pytest.mark.parametrize("numbers", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_is_named_by_its_rows_and_has_no_line(
    record: Record, log: MetricsLog, tmp_path: Path, numbers: tuple[float, float]
) -> None:
    record.hold(reached(2), taken(2.5), 0.1)
    assert record.write().step == 2
    record.hold(reached(3), taken(*numbers), 0.1)
    # The plan ends within the third step.
    for ask in (record.read, record.write):
        with pytest.raises(NonFiniteError, match=r"step 2, rows 8 to 9: loss .*before the step"):
            ask()
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_a_full_disk_under_the_lines_of_steps_is_told_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(step=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no room to write .*metrics\.jsonl .*make room"):
        log.sync()
