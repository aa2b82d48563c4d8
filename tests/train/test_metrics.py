"""What a stage says of its speed."""

from typing import Any

import pytest

from midstream.core.tokens import TokenCount
from midstream.cost.cost import cost
from midstream.study.store import Ledger
from midstream.train.metrics import meters_of
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
