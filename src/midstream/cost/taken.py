"""What stages take: a device's memory at a step's peak, and time by those that are done."""

import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from midstream.config import (
    AnyDecoderConfig,
    AnyEncoderConfig,
    Attention,
    DecoderConfig,
    FusedEncoder,
    PatchProjection,
    VLMConfig,
)
from midstream.config.connectors import RESAMPLER_EXPANSION, kept_numbers
from midstream.config.model import LEAST_CUT_ROW, MASK_BLOCK, MAX_LOGITS
from midstream.core.storage import read_json
from midstream.cost import UTILISATION, Gpu
from midstream.cost.cost import (
    cost,
    encoder_parameters,
    model_parameters,
    trained_parameters,
    trains_encoder,
)
from midstream.cost.graph import Plan
from midstream.cost.known import Number, Schedule, Task, schedule
from midstream.cost.workload import Device, Workload
from midstream.study.results import StageResult, checked
from midstream.study.stages import Pretrain, Trained, stage_from_json
from midstream.study.store import SUCCESS, Ledger

FLOAT, HALF = 4, 2
# Widths beside gate and up that a block's backward pass makes of h: their gradients, the products.
BACKWARD_FFN = 6
# What a tower's block keeps: norms, queries, keys, values, what is mixed; before and behind GELU.
TOWER_WIDTHS, TOWER_FFN = 9, 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for; `total` is the peak of a step.

    gathered: weights in the form in which they are multiplied, and others' parts of them; masks:
    who sees whom; head: the logits' pieces and their gradients; backward: what a block's backward
    pass makes beside.
    Gradients stand there in full at the peak only where `total` says so.
    """

    weights: Number
    moments: Number
    gradients: Number
    gathered: Number
    masks: Number
    activations: Number
    head: Number
    backward: Number
    encoder: Number
    total: Number


@dataclass(frozen=True)
class Setting:
    """How a stage is laid out: ranks, rows of a micro-batch, blocks computed again."""

    ranks: int = 1
    micro_rows: int | None = None
    checkpointing: bool = False
    device: Device = "cuda"

    def rows(self, batch_rows: int) -> tuple[int, bool]:
        """Rows of a rank's micro-batch, and whether it has several of them in a step."""
        mine = ceil(batch_rows / self.ranks)
        micro = min(self.micro_rows or mine, mine)
        return micro, micro < mine


def memory(stage: Trained, work: Workload, setting: Setting) -> Memory:
    """The peak of one rank, as torch's allocator counts it; `work` says how full rows are.

    Weights, gradients and Adam's two moments are float32; with several ranks each holds its part of
    them (FSDP2). Products are in bfloat16 on a GPU: weights in that form are kept from the forward
    to the backward pass by one rank, and by several of the group outside the blocks and of two
    blocks. The backward pass begins with all activations and the head's gradient, and ends with all
    gradients: the peak is at either end.
    """
    model, low = stage.model, FLOAT if setting.device == "cpu" else HALF
    parameters, trained = model_parameters(model), trained_parameters(stage)
    micro, several = setting.rows(stage.training.rows.batch_rows)
    part = micro / max(work.rows, 1)
    weights, moments = FLOAT * parameters / setting.ranks, 2 * FLOAT * trained / setting.ranks
    gradients = FLOAT * trained / setting.ranks
    masks, shown = _masks(stage, work, micro, setting)
    kept, one = _activations(stage, model, work, part, low, setting)
    one += shown
    kept += shown if setting.checkpointing else shown * model.decoder.num_layers
    pieces, ready = _head(stage, work.targets * part, low, setting)
    backward = BACKWARD_FFN * ffn_width(model.decoder) * low * work.positions * part
    block = model.decoder.linear_parameters / model.decoder.num_layers
    rest = parameters - model.decoder.linear_parameters
    if setting.ranks > 1:
        # Two blocks and the rest, their gradients, and one block's on their way to float32.
        gathered = 2 * low * (2 * block + rest) + FLOAT * block
    else:
        # Autocast's copies of the matrices, which the backward pass reads.
        gathered = 0.0 if low == FLOAT else low * float(model.decoder.linear_parameters)
    frozen = None if model.owns_encoder or isinstance(stage, Pretrain) else model.encoder
    encoder = FLOAT * float(encoder_parameters(frozen)) if frozen is not None else 0.0
    early = gradients if several else FLOAT * block / setting.ranks / 2
    first = kept + ready + max(pieces, backward) + early
    last = one + backward + gradients
    return Memory(
        weights=weights,
        moments=moments,
        gradients=gradients,
        gathered=gathered,
        masks=masks,
        activations=kept,
        head=pieces + ready,
        backward=backward,
        encoder=encoder,
        total=weights + moments + gathered + encoder + masks + max(first, last),
    )


def ffn_width(config: AnyDecoderConfig) -> int:
    """Width of the feed-forward part; for decoders of `transformers` as their parameters tell."""
    if isinstance(config, DecoderConfig):
        return config.ffn_size
    d = config.hidden_size
    return max(config.linear_parameters // config.num_layers - 4 * d * d, 0) // (3 * d)


def _activations(
    stage: Trained, model: VLMConfig, work: Workload, part: Number, low: int, setting: Setting
) -> tuple[Number, Number]:
    """Bytes kept for the backward pass by all blocks, and by one of them."""
    # Of width d and SwiGLU width h a block keeps for each position its input, what its norms and
    # in-projection give, turned queries and keys, what the heads mix (10 d), gate and up (2 h).
    decoder, rows = model.decoder, stage.training.rows
    d, h, layers = decoder.hidden_size, ffn_width(decoder), decoder.num_layers
    own = isinstance(decoder, DecoderConfig)
    cut = setting.device == "cpu" and rows.row_length >= LEAST_CUT_ROW and rows.layout == "filled"
    mixing = (8 + cut) * d * low + FLOAT * decoder.num_heads
    # Autograd keeps gate and up, their activation and product, where no function of ours does.
    ffn = 2 * d * low + (2 if own and setting.device == "cpu" else 4) * h * low
    positions, asked = work.positions * part, work.asked * part
    one = positions * (mixing + ffn)
    if setting.checkpointing:
        # The stream between blocks is float32 also where products are not.
        kept = layers * positions * d * FLOAT + one
    else:
        chosen = (positions - asked) * (ffn - d * low)
        kept = layers * one - chosen
    if model.encoder is not None:
        sizes = (model.encoder.num_patches, model.encoder.hidden_size, d)
        seen: Number = low * kept_numbers(model.projector, *sizes)
        seen += _tower(model.encoder, low) if trains_encoder(stage) else 0.0
        kept += work.images * part * seen
    if (gated := model.projector.gated) is not None:
        # Inputs of norms and products, what the heads mix, both sides of the activation.
        wide = (4 + 2 * RESAMPLER_EXPANSION) * d + 2 * gated.num_heads * gated.head_dim
        kept += len(gated.places(layers)) * positions * wide * low
    return kept, one


def _masks(stage: Trained, work: Workload, micro: int, setting: Setting) -> tuple[Number, Number]:
    """Bytes of a micro-batch's masks, and of those that each block keeps for its backward pass.

    On a GPU blocks keep none of their own; on a CPU torch makes each a dense one of floats.
    """
    attention, rows = stage.model.attention, stage.training.rows
    # A row of one segment needs a mask where a rule treats its pictures otherwise than its texts.
    apart = attention != "segments" and work.images > 0
    if attention == "causal" or not (rows.layout == "filled" or apart):
        return 0.0, 0.0
    if setting.device == "cuda":
        return micro * block_mask_bytes(attention, rows.row_length), 0.0
    own = isinstance(stage.model.decoder, DecoderConfig)
    if attention == "segments" and own and rows.row_length >= LEAST_CUT_ROW:
        return 0.0, 0.0
    pairs = work.squares * micro / max(work.rows, 1)
    return pairs, FLOAT * pairs


def block_mask_bytes(attention: Attention, row_length: int) -> int:
    """Bytes of a row's mask for FlexAttention (`_blocks` of `model/attention.py`).

    Blocks seen in part and in whole, by queries and by keys: how many there are (int32) and which,
    with room for all; and what the rule asks of positions: segments and pictures (int64), prefixes.
    """
    blocks = ceil(row_length / MASK_BLOCK)
    asked = {"prefix": 8 + 1, "pictures": 3 * 8, "latest": 3 * 8}.get(attention, 8)
    return 4 * 4 * (blocks + blocks**2) + asked * row_length


def _tower(config: AnyEncoderConfig, low: int) -> Number:
    """Bytes that one picture's features keep for their backward pass."""
    if isinstance(config, FusedEncoder):
        return sum(_tower(tower, low) for tower in config.towers)
    pixels = 3 * config.image_size**2 * FLOAT
    if isinstance(config, PatchProjection):
        return float(pixels)
    width = TOWER_WIDTHS * config.hidden_size + TOWER_FFN * config.intermediate_size
    blocks = config.num_layers + 1 + config.feature_layer
    return float(pixels + blocks * config.num_patches * width * low)


def _head(stage: Trained, targets: Number, low: int, setting: Setting) -> tuple[Number, Number]:
    """Logits and softmax, gone when the backward pass begins; gradients of states and weight."""
    config = stage.model.decoder
    rows = min(targets, max(MAX_LOGITS[setting.device] // config.vocab_size, 1))
    pieces = float(rows) * config.vocab_size * (2 * FLOAT + (0 if low == FLOAT else 2 * low))
    ready = 2 * targets * config.hidden_size * low
    if not stage.training.keeps_decoder:
        ready += config.vocab_size * config.hidden_size * (FLOAT + (0 if low == FLOAT else low))
    return pieces, ready


TRAINING = ("pretrain", "continue", "finetune")
# Of a kind so many stages are read, those that ended last.
MAX_SAMPLES = 32

# By kind: FLOPs (0 where none are planned) and seconds of each stage.
Samples = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Measured:
    """The time of what is left of a plan, side by side on `workers` processes of this machine.

    `timing` is in hours and None where no stage can be timed; `num_samples` stages were measured,
    `num_untimed` of those to run have no time. `device` is what trained, where a stage says so.
    """

    workers: int
    timing: Schedule | None
    hours: Mapping[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_untimed: int = 0
    device: str | None = None

    def values(self) -> dict[str, Any]:
        """As plain values; the hours are None where no stage can be timed."""
        return {
            "device": self.device,
            "workers": self.workers,
            "hours": None if self.timing is None else self.timing.hours,
            "stage_hours": dict(self.hours),
            "num_samples": self.num_samples,
            "num_untimed": self.num_untimed,
        }


def measured(plan: Plan, ledger: Ledger, workers: int) -> Measured:
    """What is left of a plan at the speed of this machine's done stages."""
    samples, device = samples_here(ledger)
    hours = {}
    for row in plan.to_run:
        seconds = seconds_of(row.stage.kind, row.cost.flops, samples)
        if seconds is not None:
            hours[row.stage.name] = seconds / 3600
    tasks = [
        Task(
            name=row.stage.name,
            hours=hours.get(row.stage.name, 0.0),
            gpus=1,
            parents=tuple(parent.name for parent in row.stage.parents),
        )
        for row in plan.to_run
    ]
    return Measured(
        workers=workers,
        timing=schedule(tasks, workers) if hours else None,
        hours=hours,
        num_samples=sum(map(len, samples.values())),
        num_untimed=len(tasks) - len(hours),
        device=device,
    )


def seconds_of(kind: str, flops: float | None, samples: Samples) -> float | None:
    """The seconds of a stage by its kind and planned FLOPs; without FLOPs the mean of its kind.

    None where the samples do not tell.
    """
    own = samples.get(kind)
    known = own or [one for other in TRAINING for one in samples.get(other, ())]
    if not own and (kind not in TRAINING or flops is None):
        return None
    if not known:
        return None
    whole, seconds = sum(one for one, _ in known), sum(one for _, one in known)
    return flops * seconds / whole if whole and flops is not None else seconds / len(known)


def samples_here(ledger: Ledger) -> tuple[Samples, str | None]:
    """FLOPs and seconds of the stages that were done on this host, by kind; where they trained.

    Of training stages, those of the device of the last one. What another version wrote is left out.
    """
    here = socket.gethostname()
    device: str | None = None
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for folder in _done(ledger.store):
        if read_json(folder / "status.json").get("host") != here:
            continue
        try:
            stage = stage_from_json((folder / "stage.json").read_bytes())
        except ValidationError:
            continue
        if len(found[stage.kind]) == MAX_SAMPLES:
            continue
        own = _device(folder)
        device = device or own
        if own in (None, device):
            path = folder / "results.json"
            seconds = checked(StageResult, read_json(path), path).seconds
            found[stage.kind].append((float(cost(stage, ledger).flops or 0.0), seconds))
    return found, device


def reached(ledger: Ledger, gpu: Gpu) -> tuple[float, int]:
    """The utilisation of the store's training stages on such GPUs, over their time, and how many
    they are; UTILISATION and 0 where no stage was trained on one."""
    needed, offered, number = 0.0, 0.0, 0
    for folder in _done(ledger.store):
        if not folder.name.startswith(TRAINING) or number == MAX_SAMPLES:
            continue
        results = read_json(folder / "results.json")
        meters = results.get("meters", {})
        if meters.get("gpu") == gpu.name:
            needed += meters["model_flops_per_second"] * results["seconds"]
            offered += meters["vendor_flops_per_second"] * results["seconds"]
            number += 1
    return (needed / offered, number) if offered else (UTILISATION, 0)


def _done(store: Path) -> Iterable[Path]:
    """Folders of stages that are done, the last ones first."""
    marks = {path: path.stat().st_mtime_ns for path in store.glob(f"*/{SUCCESS}")}
    return [mark.parent for mark in sorted(marks, key=lambda path: marks[path], reverse=True)]


def _device(folder: Path) -> str | None:
    """What a training stage last ran on; None for others."""
    path = folder / "starts.jsonl"
    if not path.is_file():
        return None
    lines = path.read_text().splitlines()
    return str(json.loads(lines[-1])["device"]) if lines else None
