"""A model laid over the ranks: sharded with FSDP2 along the mesh, whole on one process.

Also what is done to its blocks by choice of the machine: compiled one by one, or computed again in
the backward pass. Names of parameters stay those of the plain model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint

from midstream.config import Training, VLMConfig
from midstream.model.decoder import Decoder
from midstream.model.vlm import VLM
from midstream.train.optim import freeze
from midstream.train.parallel import Place


def build_model(config: VLMConfig, training: Training, place: Place) -> VLM:
    """The model of a stage where it is trained, frozen as the stage says; unset until filled.

    On a mesh no rank ever holds more than its own part of the parameters, and one tensor.
    """
    if place.mesh is None:
        model = VLM(config).to(place.device)
        freeze(model, training)
        _prepare_blocks(model, place)
        return model
    with _parameters_on_meta():
        model = VLM(config)
    freeze(model, training)
    _prepare_blocks(model, place)
    _shard(model, place)
    _materialise(model, place.device)
    return model


def blocks_of(model: VLM) -> list[nn.Module]:
    """The decoder's blocks, in their order."""
    decoder = model.decoder
    held = decoder.layers if isinstance(decoder, Decoder) else decoder.model.base_model.layers
    return list(cast(nn.ModuleList, held))


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts: a collective over the ranks where it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def _prepare_blocks(model: VLM, place: Place) -> None:
    model.compiled_blocks = place.compile_blocks
    for block in blocks_of(model):
        if place.checkpoint_blocks:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        if place.compile_blocks:
            block.compile()


def _shard(model: VLM, place: Place) -> None:
    """Each block is gathered while it computes; the rest is one group, gathered for the step.

    An encoder that is trained along is a group of its own: all ranks look, or none.
    """
    policy = MixedPrecisionPolicy(
        # Weights travel in what they are multiplied in; gradients are added up in float32.
        param_dtype=None if place.precision == torch.float32 else place.precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    units = [*blocks_of(model), *([model.encoder] if model.encoder is not None else []), model]
    for unit in units:
        fully_shard(unit, mesh=place.mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "losses")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are sums over the step's targets: gradients are added, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made in the block have a shape and no memory; buffers are as ever."""

    def made(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(made)
    try:
        yield
    finally:
        handle.remove()


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Give parameters memory, NaN in it; tied ones stay one tensor. Buffers move to the device."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in made:
                filled = torch.empty_like(parameter, device=device).fill_(float("nan"))
                made[parameter] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                setattr(module, name, buffer.to(device))
