"""Adapters of low rank in a decoder's blocks, by `peft`: put in, begun, merged at the end.

Names of the parameters of a model that has some are `peft`'s while it is trained: `.base_layer.` in
those of each layer's own weights, `.lora_A.` and `.lora_B.` in the adapters'.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from midstream.config import LoRA
from midstream.model.weights import Initialiser, put, tensors_of, whole

_OWN, _DOWN, _UP = ".base_layer.", ".lora_A.", ".lora_B."


def add_adapters(decoder: nn.Module, lora: LoRA) -> None:
    """Put adapters, unset, beside every linear layer of a decoder but its `output`.

    Raises ValueError with the remedy where `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError('training.lora needs peft: pip install "midstream[lora]"') from None
    layers = [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and module is not decoder.output
    ]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=layers)
    # It draws from the global generator what `initialisers` draws anew.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, decoder)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return _DOWN in name or _UP in name


def initialisers(decoder: nn.Module, own: Mapping[str, Initialiser]) -> dict[str, Initialiser]:
    """Those of a decoder that may have adapters, from its `own` by plain or by present names.

    A is uniform within fan_in^-1/2, as in `peft`, and B zero.
    """
    table = {}
    for name, parameter in decoder.named_parameters():
        if _DOWN in name:
            table[name] = Initialiser("uniform", parameter.shape[1] ** -0.5)
        elif _UP in name:
            table[name] = Initialiser("constant", 0.0)
        else:
            plain = name.replace(_OWN, ".")
            table[name] = own[plain if plain in own else name]
    return table


def renamed(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a module without adapters under the names of the same with them, the module's own
    adapters beside them; as they are where it has none."""
    found = dict(tensors)
    for name, value in tensors_of(module).items():
        plain = name.replace(_OWN, ".")
        if is_adapter(name):
            found[name] = whole(value)
        elif plain != name and plain in found:
            found[name] = found.pop(plain)
    return found


@torch.no_grad()
def merge_adapters(decoder: nn.Module) -> None:
    """Add adapters to the weights beside them and take them out: names are plain ones again.

    A collective over the ranks where the model is sharded.
    """
    from peft.tuners.lora import LoraLayer

    # Parameters that a step has gathered are cut again.
    decoder.state_dict()
    layers: dict[str, Any] = {
        name: layer for name, layer in decoder.named_modules() if isinstance(layer, LoraLayer)
    }
    for name, layer in layers.items():
        ((adapter, scaling),) = layer.scaling.items()
        up, down = (whole(one[adapter].weight) for one in (layer.lora_B, layer.lora_A))
        base = layer.get_base_layer()
        put(base.weight, whole(base.weight) + scaling * (up @ down))
        decoder.set_submodule(name, base)
