"""Where a process computes, and what loads ahead of it."""

import os

import pytest
import torch

from midstream.config import Machine
from midstream.train import parallel
from midstream.train.parallel import data_workers, set_up


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


def test_a_cpu_is_refused_with_what_goes_without() -> None:
    machine = Machine(workers=1, device="cpu", precision="float8")
    with pytest.raises(ValueError, match=r"needs a GPU, this stage.*precision=bfloat16"):
        set_up(machine)


@pytest.mark.parametrize(
    ("capability", "there", "said"),
    [
        ((8, 0), True, r"capability 8\.9 or above .*, this one has 8\.0"),
        ((9, 0), False, r"needs torchao: pip install .*float8"),
    ],
)
def test_a_card_or_a_library_that_lacks_it_is_named(
    capability: tuple[int, int], there: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(parallel, "find_spec", lambda name: object() if there else None)
    with pytest.raises(ValueError, match=said):
        parallel.check_float8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(parallel, "find_spec", lambda name: object())
    parallel.check_float8(torch.device("cuda"))
