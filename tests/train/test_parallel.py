"""Where a process computes, and what loads ahead of it."""

import os

import pytest
import torch

from midstream.config import Machine
from midstream.train.parallel import data_workers


@pytest.mark.parametrize(
    ("cores", "machine", "expected"),
    [
        (64, {"ranks": 8}, 7),
        (16, {"ranks": 1}, 8),
        (16, {"workers": 2, "threads": 2}, 6),
        (2, {"ranks": 2}, 1),
        (64, {"data_workers": 0}, 0),
        (2, {"data_workers": 11}, 11),
    ],
)
def test_a_gpu_is_fed_by_the_cores_that_its_threads_leave(
    cores: int, machine: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    given = Machine.model_validate({"workers": 1} | machine)
    assert data_workers(given, torch.device("cuda")) == expected
    alone = machine.get("data_workers", 0)
    assert data_workers(given, torch.device("cpu")) == alone
