"""One optimiser step over its micro-batches and ranks, and the model that it is taken on.

What the batches hold over all ranks is counted on the host before the step is computed. Names of
parameters stay those of the plain model, sharded, compiled or not.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import cache, partial
from typing import Any, cast

import torch
from jaxtyping import Float
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

from midstream.config import AdamW, PatchProjection, Training, VLMConfig
from midstream.core.batch import Batch
from midstream.core.tokens import TokenCount
from midstream.model.adapters import add_adapters, is_adapter
from midstream.model.decoder import Decoder
from midstream.model.vlm import VLM, Ahead
from midstream.model.weights import whole
from midstream.train.parallel import Clock, Place, to_float8

_WIDTH = len(fields(TokenCount))


@dataclass(frozen=True)
class StepTotals:
    """Counts of a step over all ranks, and the same by source; the pictures of each micro-batch;
    rows with a picture and the padding in them; `attended`, the sum over positions of how many each
    looks at; whether a rank was asked to stop.
    """

    counts: TokenCount
    sources: Mapping[str, TokenCount]
    num_images: tuple[int, ...]
    image_rows: int
    image_row_pad: int
    attended: int
    stop: bool


def totals_of(
    micro_batches: Sequence[Batch], place: Place, names: Sequence[str] = (), *, stop: bool = False
) -> StepTotals:
    """The sums over the ranks, of which each brings its own and equally many micro-batches.

    `names` are the sources that are counted; `stop` is whether this rank was asked to stop. One
    collective of the hosts.
    """
    image_rows = image_row_pad = attended = 0
    for batch in micro_batches:
        attended += int((batch.position_ids + 1)[batch.segment_ids >= 0].sum())
        shown = torch.unique(batch.image_slots[:, 0])
        image_rows += len(shown)
        image_row_pad += int((batch.segment_ids[shown] < 0).sum())
    nothing = TokenCount()
    held = [sum((batch.counts for batch in micro_batches), nothing)]
    for name in names:
        held.append(sum((batch.sources.get(name, nothing) for batch in micro_batches), nothing))
    mine = [int(stop), image_rows, image_row_pad, attended]
    mine += [number for counts in held for number in astuple(counts)]
    mine += [len(batch.images) for batch in micro_batches]
    asked, image_rows, image_row_pad, attended, *rest = map(int, place.sum(mine))
    end = _WIDTH * len(held)
    every = [TokenCount(*rest[at : at + _WIDTH]) for at in range(0, end, _WIDTH)]
    return StepTotals(
        counts=every[0],
        sources=dict(zip(names, every[1:], strict=True)),
        num_images=tuple(rest[end:]),
        image_rows=image_rows,
        image_row_pad=image_row_pad,
        attended=attended,
        stop=asked > 0,
    )


def placed(model: VLM, batch: Batch, place: Place) -> tuple[Batch, Ahead]:
    """A batch of this rank on its device, as large as its kernels like it, and what the model needs
    to know of it.

    To a GPU both are copied from page-locked memory beside what it computes meanwhile.
    """
    # Shapes that change from batch to batch cost a processor nothing, and a GPU its kernels.
    if place.device.type == "cpu":
        batch = batch.trimmed()
        return batch, model.ahead(batch)
    ahead = model.ahead(batch, place.device)
    copying, computing = _copy_stream(place.device), torch.cuda.current_stream(place.device)

    def copied(tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        there = pinned.to(place.device, non_blocking=True)
        # So that its memory is not given away before `computing` has done with it.
        there.record_stream(computing)
        return there

    with torch.cuda.stream(copying):
        found = batch.map(copied), ahead.map(copied)
    computing.wait_stream(copying)
    return found


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


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


# The parameters of a model's own encoder.
_ENCODER = "encoder."


def freeze(model: VLM, training: Training) -> float:
    """Decide by the stage which parameters are trained; returns the encoder's rate factor.

    All of them, but for the decoder where the stage keeps it (its adapters learn), and a model's
    own encoder where the stage gives it no rate. A patch projection is always trained. Raises
    ValueError for a rate without an encoder of the model's own, and where nothing is left to train.
    """
    factor = training.encoder_rate_factor
    if factor is not None and model.encoder is None:
        raise ValueError("encoder_rate_factor is given, but the model owns no encoder to train")
    if factor is None and isinstance(model.config.encoder, PatchProjection):
        factor = 1.0
    if training.freeze_decoder and model.projector is None:
        raise ValueError("freeze_decoder is given, but the model has nothing else to train")
    model.requires_grad_(True)
    for name, parameter in model.decoder.named_parameters():
        parameter.requires_grad_(is_adapter(name) or not training.keeps_decoder)
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
        model = _unset(config, training).to(place.device)
        freeze(model, training)
        _prepare_blocks(model, place)
        return model
    with _parameters_on_meta():
        model = _unset(config, training)
    freeze(model, training)
    _prepare_blocks(model, place)
    _shard(model, place)
    _materialise(model, place.device)
    return model


def _unset(config: VLMConfig, training: Training) -> VLM:
    model = VLM(config)
    if training.lora is not None:
        add_adapters(model.decoder, training.lora)
    return model


def blocks_of(model: VLM) -> list[nn.Module]:
    """The decoder's blocks, in their order."""
    decoder = model.decoder
    held = decoder.layers if isinstance(decoder, Decoder) else decoder.model.base_model.layers
    return list(cast(nn.ModuleList, held))


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def _prepare_blocks(model: VLM, place: Place) -> None:
    model.compiled_blocks, model.whole_blocks = place.compile_blocks, place.float8_blocks
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


class Taken:
    """A step that the host has done with; a GPU may still compute it.

    `ended` is when it was known to have ended, on the clock of `time.monotonic`.
    """

    def __init__(
        self, numbers: Float[Tensor, "2"], totals: StepTotals, untouched: tuple[str, ...]
    ) -> None:
        self.totals, self._untouched = totals, untouched
        self._numbers, self._event = numbers, cast(torch.cuda.Event | None, None)
        self.ended = time.monotonic()
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> StepResult:
        """What the step gave, once it has ended; waits for that.

        Raises NonFiniteError with both numbers; then the optimiser has not moved, nor will it.
        """
        if self._event is not None:
            self._event.synchronize()
            self._event, self.ended = None, time.monotonic()
        loss, norm = self._numbers.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
        held = self.totals
        images = sum(held.num_images)
        return StepResult(loss, norm, held.counts.target, images, self._untouched)


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
    totals: StepTotals | None = None,
) -> Taken:
    """Move the weights once; the gradient is that of the mean loss over the step's targets.

    Every rank brings the same number of micro-batches. `encode` turns a batch's `images` into
    patch features (the identity for stored ones); None for a model that looks at them itself.
    `clock` measures its parts. `totals` are the step's, counted here where they are not given.

    From the first forward pass on the host waits for nothing. Where loss or gradient is not finite
    on any rank, the optimiser moves neither in this step nor in one after it, which `Taken.read`
    tells. Raises ValueError for a step without a target.
    """
    # Counted before the first backward, so that cutting the step into other
    # micro-batches, or over other ranks, leaves the gradient unchanged.
    totals = totals or totals_of(micro_batches, place)
    num_targets = totals.counts.target
    if not num_targets:
        raise ValueError(
            "a step holds no target; its rows carry nothing to learn from: raise batch_rows, or "
            "look at them with `midstream show-data`"
        )
    clock = clock or Clock(place.device)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for cpu_batch, shown in zip(micro_batches, totals.num_images, strict=True):
        batch, ahead = placed(model, cpu_batch, place)
        with clock.part("encoder", on_device=True), place.autocast():
            features = features_of(model, batch, encode, shown)
        _meet(place, clock)
        with clock.part("model", on_device=True):
            with place.autocast():
                loss, cross_entropy = model.losses(batch, features, settings.z_loss, ahead)
            (loss / num_targets).backward()  # type: ignore[no-untyped-call]
            total += cross_entropy
    _meet(place, clock)
    parameters, untouched = _touched(model)
    with clock.part("optimizer", on_device=True):
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm))
        place.add_up(total)
        numbers = torch.stack((total / num_targets, norm.double()))
        _halt_unless_finite(optimizer, numbers)
        set_rate(optimizer, rate)
        optimizer.step()
    return Taken(numbers, totals, untouched)


def _meet(place: Place, clock: Clock) -> None:
    with clock.part("ranks", on_device=True):
        place.meet()


def _halt_unless_finite(optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
    """From a step with a number that is not finite on the optimiser does not move: the device
    decides, and nobody waits for it."""
    fused: Any = optimizer
    assert fused._step_supports_amp_scaling, "only fused AdamW looks at `found_inf`"
    halted = (~numbers.isfinite().all()).float()
    before = getattr(optimizer, "found_inf", None)
    fused.found_inf = halted if before is None else torch.maximum(before, halted)


def _touched(model: VLM) -> tuple[list[Tensor], tuple[str, ...]]:
    # The trained parameters, all with a gradient now, and the names of those that had none.
    trained, untouched = list[Tensor](), []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.append(parameter)
            if parameter.grad is None:
                untouched.append(name)
                parameter.grad = torch.zeros_like(parameter)
    return trained, tuple(untouched)
