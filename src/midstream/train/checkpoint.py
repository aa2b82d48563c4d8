"""Save and load a training stage: weights, optimiser state, progress; never a pickle.

Every folder is written under a temporary name, with a sha256 manifest, and renamed; it is checked
completely before the first tensor goes into the model.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from midstream.model.weights import load_weights, save_weights
from midstream.storage import new_folder, read_json, verify, write_json
from midstream.tokens import TokenCount

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Progress:
    """Where a stage stands: whole steps done, what they held, and the metrics file's length.

    `sources` are the counts by source; `rate` is the schedule's learning rate at `tokens_seen`,
    where a continuation starts; None where an imported checkpoint does not tell.
    """

    step: int
    tokens_seen: int
    total_tokens: int
    rate: float | None
    counts: TokenCount
    sources: Mapping[str, TokenCount] = field(default_factory=dict)
    loss: float = 0.0
    image_rows: int = 0
    image_row_pad: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, progress: Progress
) -> None:
    """Write `folder` completely or not at all."""
    with new_folder(folder) as temporary:
        save_weights(model, temporary / "model.safetensors")
        if optimizer is not None:
            save_file(_moments(model, optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "progress.json", asdict(progress))


def read_progress(folder: Path) -> Progress:
    """The progress of a checkpoint, after checking all its bytes (CorruptError)."""
    verify(folder)
    values = read_json(folder / "progress.json")
    sources = {name: TokenCount(**counts) for name, counts in values["sources"].items()}
    return Progress(**values | {"counts": TokenCount(**values["counts"]), "sources": sources})


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Progress:
    """Put a checkpoint into model and optimiser; names, shapes and types must match exactly."""
    progress = read_progress(folder)
    load_weights(model, folder / "model.safetensors")
    if optimizer is not None:
        load_moments(folder, model, optimizer)
    return progress


def load_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put Adam's moments into the optimiser; parameters that the file lacks start fresh."""
    path = folder / "optimizer.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no optimiser state; choose optimizer='fresh'")
    stored = load_file(path)
    for name, parameter in model.named_parameters():
        if f"exp_avg.{name}" in stored:
            # The step count stays where fused AdamW keeps it: on the parameter's device.
            optimizer.state[parameter] = {
                key: stored[f"{key}.{name}"].to(parameter.device) for key in MOMENTS
            }


def milestone(folder: Path, share: float) -> Path:
    """Where a text stage's folder keeps the weights at a share of its tokens."""
    return folder / "milestones" / f"{share * 100:g}"


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step, by name."""
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def keep_newest(folder: Path) -> None:
    """Delete all checkpoints but the newest."""
    for path in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(path)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": optimizer.state[parameter][key].contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in MOMENTS
    }
