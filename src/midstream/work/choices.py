"""What a machine leaves open, chosen for a stage: what was measured on its GPU, else what fits."""

import json
import sys
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Literal

import torch

from midstream.config import Config, Machine, Positive
from midstream.cost.price import rows_that_fit
from midstream.study.stages import Pretrain, Trained
from midstream.study.store import Ledger
from midstream.train.parallel import Place, device_bytes, device_name


class Best(Config):
    """What was fastest on a GPU for stages of a size, as `benchmarks/gpu.py` writes `best.json`.

    `device` is torch's name for it; `pictures`: whether a frozen encoder looked at them.
    """

    device: str
    decoder_parameters: Positive
    row_length: Positive
    pictures: bool
    compile: Literal["off", "blocks"]
    micro_batch_rows: Positive
    tokens_per_second: float
    torch: str


@cache
def measured() -> tuple[Best, ...]:
    """The entries of `measured.json`. It is empty: no GPU has been measured."""
    text = files("midstream.work").joinpath("measured.json").read_text("utf-8")
    return tuple(Best.model_validate(entry) for entry in json.loads(text))


def best_for(stage: Trained, place: Place) -> Best | None:
    """What was fastest for this very size and row length on this device, where it was measured."""
    for best in measured():
        size = (stage.model.decoder.num_parameters, stage.training.rows.row_length)
        key = (device_name(place.device), *size, not isinstance(stage, Pretrain))
        if key == (best.device, best.decoder_parameters, best.row_length, best.pictures):
            return best
    return None


def place_for(stage: Trained, machine: Machine, place: Place) -> Place:
    """The place, with blocks compiled as was faster where the machine leaves it open."""
    if machine.compile != "auto":
        return place
    best = best_for(stage, place)
    compiled = place.device.type == "cuda" if best is None else best.compile == "blocks"
    return replace(place, compile_blocks=compiled)


def machine_for(stage: Trained, ledger: Ledger, machine: Machine, place: Place) -> Machine:
    """The machine, and where none was chosen on a GPU, the micro-batch that was fastest or fits."""
    if machine.micro_batch_rows is not None or place.device.type != "cuda":
        return machine
    fit = rows_that_fit(stage, ledger, machine, device_bytes(place.device))
    if fit is None:
        return machine
    best = best_for(stage, place)
    mine = max(fit.micro_rows, 1)
    if best is not None:
        mine = min(mine, best.micro_batch_rows)
    # Ranks may have different GPUs, and go through equally many micro-batches.
    rows = min(place.gather(mine))
    if place.rank == 0:
        room = "" if fit.fits else ", and the plan says that it does not fit"
        print(
            f"micro-batches of {rows} rows{room}; --machine micro_batch_rows=N sets others",
            file=sys.stderr,
        )
    return machine.model_copy(update={"micro_batch_rows": rows})


def too_large(stage: Trained, machine: Machine, error: torch.OutOfMemoryError) -> RuntimeError:
    """What is said of a stage whose step does not fit on its GPU, with what would make it fit."""
    share = max(1, stage.training.rows.batch_rows // machine.world_size)
    rows = min(machine.micro_batch_rows or share, share)
    remedies = [f"micro_batch_rows={rows // 2}"] if rows > 1 else []
    if machine.activation_checkpointing == "off":
        remedies.append("activation_checkpointing=blocks")
    ways = [f"--machine {remedy}" for remedy in remedies]
    ways.append("more GPUs that share the stage (--ranks)")
    return RuntimeError(
        f"{stage.name}: micro-batches of {rows} rows do not fit on this GPU "
        f"({str(error).split('. ')[0]}); give {', or '.join(ways)}"
    )
