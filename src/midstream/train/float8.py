"""Matrix products of the decoder's blocks in float8, by torchao."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

# The first cards with units for it: Ada and Hopper.
_LEAST_CAPABILITY = (8, 9)
# Its kernels want sizes that this divides.
_MULTIPLE = 16
# For torchao's Float8LinearConfig: a tensor has one scale, computed at each product, and any number
# of positions is filled up to what the kernels want.
_SETTINGS: dict[str, Any] = {"pad_inner_dim": True}


def check_float8(device: torch.device) -> None:
    """Raises ValueError, with the remedy, where float8 products cannot be computed."""
    otherwise = "; --machine precision=bfloat16 goes without"
    if device.type != "cuda":
        raise ValueError(f"precision float8 needs a GPU, this stage runs on a CPU{otherwise}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise ValueError(
            f"precision float8 needs a GPU of compute capability 8.9 or above (L40S, H100), this "
            f"one has {'.'.join(map(str, capability))}{otherwise}"
        )
    if find_spec("torchao") is None:
        raise ValueError(
            f'precision float8 needs torchao: pip install "midstream[float8]"{otherwise}'
        )


def to_float8(block: nn.Module) -> None:
    """Have a block's linear layers multiply in float8; weights and their names stay."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, _name: str) -> bool:
        assert isinstance(layer, nn.Linear), "no other is asked about"
        return layer.in_features % _MULTIPLE == 0 == layer.out_features % _MULTIPLE

    convert_to_float8_training(block, module_filter_fn=fits, config=Float8LinearConfig(**_SETTINGS))
