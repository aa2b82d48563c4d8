"""One optimiser step over its micro-batches and ranks, and the model that it is taken on.

Names of parameters stay those of the plain model, sharded, compiled or not.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from midstream.config import (
    AdamW,
    AnyDecoderConfig,
    AnyEncoderConfig,
    PatchProjection,
    Training,
    VLMConfig,
)
from midstream.config.model import encoder_flops, frozen_saving, head_flops
from midstream.core.batch import Batch
from midstream.core.tokens import TokenCount
from midstream.model.decoder import Decoder
from midstream.model.vlm import VLM
from midstream.train.float8 import to_float8
from midstream.train.parallel import Place

# The parameters of a model's own encoder.
_ENCODER = "encoder."


def freeze(model: VLM, training: Training) -> float:
    """Decide by the stage which parameters are trained; returns the encoder's rate factor.

    All of them, but for the decoder where the stage keeps it, and a model's own encoder where the
    stage gives it no rate. A patch projection is always trained. Raises ValueError for a rate
    without an encoder of the model's own, and where nothing is left to train.
    """
    factor = training.encoder_rate_factor
    if factor is not None and model.encoder is None:
        raise ValueError("encoder_rate_factor is given, but the model owns no encoder to train")
    if factor is None and isinstance(model.config.encoder, PatchProjection):
        factor = 1.0
    if training.freeze_decoder and model.projector is None:
        raise ValueError("freeze_decoder is given, but the model has nothing else to train")
    model.requires_grad_(True)
    model.decoder.requires_grad_(not training.freeze_decoder)
    if model.encoder is not None:
        model.encoder.requires_grad_(factor is not None)
    return factor or 1.0


def is_trained(part: nn.Module | None) -> bool:
    """Whether a part of the model is there and learns anything."""
    return part is not None and any(value.requires_grad for value in part.parameters())


def make_optimizer(
    model: nn.Module, settings: AdamW, *, encoder_rate_factor: float = 1.0
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, with or without decay on vectors.

    decay = all is OpenLM's choice (its no-decay list is empty), matrices is Prismatic's. The
    encoder's parameters are in groups of their own, at their share of the rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = settings.decay == "all" or parameter.ndim >= 2
            factor = encoder_rate_factor if name.startswith(_ENCODER) else 1.0
            key = (-factor, -settings.weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[key], "weight_decay": -key[1], "rate_factor": -key[0]}
            for key in sorted(groups)
        ],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


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
        if place.float8_blocks:
            to_float8(block)
        if place.checkpoint_blocks:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        if place.compile_blocks:
            block.compile()


def _shard(model: VLM, place: Place) -> None:
    """Each block is gathered while it computes; the rest is one group, gathered for the step."""
    policy = MixedPrecisionPolicy(
        # Weights travel in what they are multiplied in; gradients are added up in float32.
        param_dtype=None if place.precision == torch.float32 else place.precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # An encoder that is trained along is a group of its own: all ranks look, or none.
    gated = [] if model.gated is None else list(model.gated.blocks.values())
    encoder = [] if model.encoder is None else [model.encoder]
    units = [*blocks_of(model), *gated, *encoder, model]
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


# The parts of a step. An encoder that the stage trains is part of the model's work.
PARTS = ("data", "encoder", "model", "optimizer", "checkpoint")


class Clock:
    """Seconds by part of the work, of this process; kernels of a GPU by their own time."""

    def __init__(self, device: torch.device, before: Mapping[str, float] | None = None) -> None:
        self._gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0) | dict(before or {})
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """What runs in the block belongs to `name`; `on_device`: it starts kernels."""
        if on_device and self._gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        before = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Seconds of each part so far; to be asked when the step's kernels have ended."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1000
        self._events.clear()
        return dict(self._seconds)


def training_flops(
    decoder: AnyDecoderConfig,
    encoder: AnyEncoderConfig | None,
    counts: TokenCount,
    attended: float | int,
    encoded: float | int,
    *,
    encoder_trained: bool,
    decoder_trained: bool = True,
) -> float:
    """The model FLOPs of training on these positions: 6 N a token, attention, and the encoder.

    A frozen decoder has no gradients of its weights: 4 N a token.

    `attended`: the sum over positions of how many each looks at; `encoded`: images that the
    encoder saw. The input embedding costs nothing, padding does not count, and the head counts at
    every text position, also where it is left out because nothing is learnt there.
    """
    forward = 2.0 * decoder.linear_parameters * counts.seen
    forward += 4.0 * decoder.num_layers * decoder.hidden_size * attended
    forward += head_flops(decoder) * (counts.seen - counts.image)
    looks = encoder_flops(encoder) * encoded if encoder is not None else 0.0
    saved = 0.0
    if not decoder_trained:
        saved = frozen_saving(decoder, counts.seen, counts.seen - counts.image)
    return 3 * forward - saved + (3 if encoder_trained else 1) * looks


def report(
    *,
    counts: TokenCount,
    images: int,
    flops: float,
    seconds: float,
    parts: Mapping[str, float],
    peak_flops: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """The meters of a stage for its `results.json`.

    Tokens are all positions, useful ones those that are no padding; the utilisation is the model
    FLOPs a second over `peak_flops`, what the devices reach in a matrix product, measured when
    the stage began. `time_shares` are of the wall time of the first rank.
    """
    time_taken = max(seconds, 1e-9)
    shares = {name: parts.get(name, 0.0) / time_taken for name in PARTS}
    return {
        "tokens_per_second": counts.total / time_taken,
        "useful_tokens_per_second": counts.seen / time_taken,
        "images_per_second": images / time_taken,
        "model_flops_per_second": flops / time_taken,
        "peak_flops_per_second": peak_flops,
        "model_flops_utilisation": flops / time_taken / peak_flops if peak_flops else None,
        "time_shares": shares | {"other": max(0.0, 1.0 - sum(shares.values()))},
        "peak_memory_bytes": peak_memory_bytes,
    }


@dataclass(frozen=True)
class StepResult:
    """Mean cross-entropy over the step's targets (nats), gradient norm before clipping.

    `num_targets` and `num_images` are those of all ranks; `untouched` names trained parameters
    that no gradient reached (theirs are taken as zero, so that they decay as everywhere).
    """

    loss: float
    grad_norm: float
    num_targets: int
    num_images: int = 0
    untouched: tuple[str, ...] = ()


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite; the optimiser has not moved."""


def train_step(
    model: VLM,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    encode: Callable[[Tensor], Tensor] | None,
    rate: float,
    settings: AdamW,
    place: Place,
    clock: Clock | None = None,
) -> StepResult:
    """Move the weights once; the gradient is that of the mean loss over the step's targets.

    Every rank brings the same number of micro-batches. `encode` turns a batch's `images` into
    patch features (the identity for stored ones); None for a model that looks at them itself.
    `clock` measures its parts.
    Raises NonFiniteError before the optimiser moves on any rank, ValueError for a step without a
    target.
    """
    # Counted before the first backward, so that cutting the step into other
    # micro-batches, or over other ranks, leaves the gradient unchanged.
    mine = [sum(batch.counts.target for batch in micro_batches)]
    mine += [len(batch.images) for batch in micro_batches]
    num_targets, *num_images = (int(value) for value in place.sum(mine))
    if not num_targets:
        raise ValueError(
            "a step holds no target; its rows carry nothing to learn from: raise batch_rows, or "
            "look at them with `midstream show-data`"
        )
    clock = clock or Clock(place.device)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for cpu_batch, shown in zip(micro_batches, num_images, strict=True):
        batch = placed(cpu_batch, place)
        with clock.part("encoder", on_device=True), place.autocast():
            features = features_of(model, batch, encode, shown)
        with clock.part("model", on_device=True):
            with place.autocast():
                loss, cross_entropy = model.losses(batch, features, settings.z_loss)
            (loss / num_targets).backward()  # type: ignore[no-untyped-call]
            total += cross_entropy
    untouched = _touch(model)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    with clock.part("optimizer", on_device=True):
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)))
    (summed,) = place.sum([float(total)])
    result = StepResult(summed / num_targets, norm, num_targets, sum(num_images), untouched)
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise NonFiniteError(f"loss {result.loss}, gradient norm {result.grad_norm}")
    set_rate(optimizer, rate)
    with clock.part("optimizer", on_device=True):
        optimizer.step()
    return result


def placed(batch: Batch, place: Place) -> Batch:
    """A batch of this rank on its device, as large as its kernels like it."""
    # Shapes that change from batch to batch cost a processor nothing, and a GPU its kernels.
    return batch.trimmed() if place.device.type == "cpu" else batch.to(place.device)


def features_of(
    model: VLM, batch: Batch, encode: Callable[[Tensor], Tensor] | None, num_images: int
) -> Tensor | None:
    """The batch's patch features, or None; `num_images` counts the pictures of all ranks."""
    if encode is not None:
        return encode(batch.images) if len(batch.images) else None
    # A model's own encoder is sharded: it runs on every rank, if need be on no picture, or on none.
    config = model.config.encoder
    if config is None or num_images:
        return None
    return torch.zeros((0, config.num_patches, config.hidden_size), device=batch.input_ids.device)


def _touch(model: VLM) -> tuple[str, ...]:
    untouched = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            untouched.append(name)
            parameter.grad = torch.zeros_like(parameter)
    return tuple(untouched)
