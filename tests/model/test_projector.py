import pytest
import torch
from torch.nn.functional import gelu, linear

from midstream.config import ProjectorConfig
from midstream.model.vlm import Projector
from midstream.model.weights import initialise

CASES = {
    "linear": (ProjectorConfig(num_layers=1), (6, 10)),
    "two layers": (ProjectorConfig(num_layers=2), (6, 24, 10)),
    "at decoder width": (ProjectorConfig(num_layers=2, hidden="decoder"), (6, 10, 10)),
    "three layers": (ProjectorConfig(num_layers=3), (6, 24, 10, 10)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_projector_is_its_linear_layers_with_exact_gelu_between(case: str) -> None:
    config, widths = CASES[case]
    module = Projector(config, in_width=6, out_width=10)
    initialise(module, 0)
    assert config.widths(6, 10) == widths
    named = dict(module.named_parameters())
    assert list(named) == [
        f"{2 * index}.{part}" for index in range(len(widths) - 1) for part in ("weight", "bias")
    ]
    hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = hidden
    for index in range(len(widths) - 1):
        expected = gelu(expected) if index else expected
        expected = linear(expected, named[f"{2 * index}.weight"], named[f"{2 * index}.bias"])
    assert torch.equal(module(hidden), expected)


def test_decoder_width_is_for_two_layers() -> None:
    with pytest.raises(ValueError, match="hidden='decoder' is for two layers, the projector has 3"):
        ProjectorConfig(num_layers=3, hidden="decoder")
