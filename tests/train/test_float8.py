"""Where float8 cannot be, it is refused with the remedy (`work/test_one_gpu.py` computes in it)."""

import pytest
import torch

from midstream.config import Machine
from midstream.train import parallel
from midstream.train.parallel import set_up


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
