"""Checkpoints of OpenLM: its trainer's files, and folders under Hugging Face's names.

Its trainer leaves `<run>/params.txt` and `<run>/checkpoints/epoch_N.pt`, `optimizer_N.pt`,
`stats_N.pt` (open_lm/main.py); a Hugging Face folder holds a config.json and weights whose names
start with `model.`. Nothing that a pickle wants to run is run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midstream.config import DecoderConfig
from midstream.exchange.openlm_settings import (
    Position,
    decoder_config,
    read_config,
    read_params,
    schedule_position,
)
from midstream.model.decoder import Decoder
from midstream.model.weights import check, only_tensors, read_pickle, read_tensors
from midstream.train.checkpoint import MOMENTS

# What training wrappers (distributed, torch.compile, FSDP) put into names; Hugging Face's class
# puts `model.` before all.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class OpenLMCheckpoint:
    """A decoder out of someone's run, and where that run stood.

    `tensors` have the names of `Decoder`, in float32; `moments` those of train/checkpoint.py
    (`exp_avg.<name>`), None where the checkpoint has none. The position is in steps, tokens and
    learning rates, each None where the files do not tell; `rate` is that of the next step.
    `dropped` names what was left out; `origins` says which file or reason each part comes from.
    """

    config: DecoderConfig
    tensors: dict[str, Tensor]
    moments: dict[str, Tensor] | None
    step: int | None
    tokens_seen: int | None
    total_tokens: int | None
    rate: float | None
    peak_rate: float | None
    end_rate: float | None
    dropped: tuple[str, ...]
    origins: dict[str, str]


def read_openlm(source: Path, *, num_heads: int | None = None) -> OpenLMCheckpoint:
    """Read an `epoch_N.pt` with what lies around it, a Hugging Face folder, or safetensors alone.

    `num_heads` is needed where neither settings nor a rotary table tell it. Raises
    FileNotFoundError, or ValueError if a file is broken, wants to run code, is of a variant that
    computes something else, or does not hold exactly the decoder's tensors.
    """
    if source.is_dir() or source.suffix == ".safetensors":
        return _read_tensors(source, num_heads)
    return _read_epoch(source, num_heads)


# -------------------------------------------------------------------------------- two layouts


def _read_epoch(source: Path, num_heads: int | None) -> OpenLMCheckpoint:
    epoch = read_pickle(source)
    if isinstance(epoch, dict) and "state_dict" in epoch:
        state = only_tensors(epoch["state_dict"], source)
    elif isinstance(epoch, dict) and all(isinstance(value, Tensor) for value in epoch.values()):
        state, epoch = only_tensors(epoch, source), {}
    else:
        held = ", ".join(map(str, epoch)) if isinstance(epoch, dict) else type(epoch).__name__
        raise ValueError(f"{source} has no 'state_dict', only {held}; give an epoch_N.pt file")
    folders = (source.parent, source.parent.parent)
    params = next((one / "params.txt" for one in folders if (one / "params.txt").is_file()), None)
    settings = read_params(params) if params else {}

    moments: dict[str, Tensor] | None = None
    used: float | None = None
    left: list[str] = []
    order = [name for name in map(_own_name, state) if not _is_table(name)]
    found = _beside(source, "optimizer", epoch)
    if found is not None:
        moments, used, left = _moments(found[1]["optimizer"], order, found[0])
    stats = _beside(source, "stats", epoch)
    told = epoch.get("step", stats[1].get("step") if stats else None)
    step = None if told is None else int(told)
    position = schedule_position(settings, step, used, path=source)
    origins = {"position": params.name if params and position.tokens_seen is not None else "none"}
    origins["moments"] = found[0].name if found and moments else "none"
    if position.tokens_seen is None and used is not None:
        origins["position"] = f"rate alone, from {found[0].name}" if found else "none"
    return _checkpoint(
        state,
        settings,
        source,
        num_heads,
        moments=moments,
        step=step,
        position=position,
        left=left,
        origins=origins | {"settings": params.name if params else "tensor shapes"},
    )


def _read_tensors(source: Path, num_heads: int | None) -> OpenLMCheckpoint:
    epochs = sorted(str(item.relative_to(source)) for item in source.glob("**/epoch_*.pt"))
    if epochs:
        raise ValueError(f"{source} is a training run; give one of {', '.join(epochs)}")
    path = source / "config.json"
    settings = read_config(path) if path.is_file() else {}
    return _checkpoint(
        read_tensors(source),
        settings,
        source,
        num_heads,
        moments=None,
        step=None,
        position=Position(),
        left=[],
        origins={"settings": path.name if settings else "tensor shapes"},
    )


def _checkpoint(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    source: Path,
    num_heads: int | None,
    *,
    moments: dict[str, Tensor] | None,
    step: int | None,
    position: Position,
    left: list[str],
    origins: dict[str, str],
) -> OpenLMCheckpoint:
    tensors, tables = _own_names(state, source)
    config, heads = decoder_config(
        tensors, tables.values(), settings, path=source, num_heads=num_heads
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    check(decoder, tensors, path=source)
    if moments is not None:
        for key in ("exp_avg", "exp_avg_sq"):
            each = {name: moments[f"{key}.{name}"] for name in tensors}
            check(decoder, each, path=source.with_name(f"{key} beside {source.name}"))
        moments = {name: value.to(torch.float32) for name, value in moments.items()}
    if "model_norm" not in settings:
        origins["model_norm"] = "assumed gain-only LayerNorm, as DCLM's; shapes cannot tell"
    return OpenLMCheckpoint(
        config=config,
        tensors={name: value.to(torch.float32) for name, value in tensors.items()},
        moments=moments,
        step=step,
        dropped=(*tables, *left),
        origins=origins | {"num_heads": heads},
        **asdict(position),
    )


# ------------------------------------------------------------------------------ names and files


def _own_name(name: str) -> str:
    kept = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(kept[1:] if kept[:1] == ["model"] else kept)


def _is_table(name: str) -> bool:
    return name.endswith(".inv_freq")


def _own_names(
    state: Mapping[str, Tensor], source: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by our names, and rotary tables by the file's: they are computed, not kept."""
    tensors: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for long_name, value in state.items():
        name = _own_name(long_name)
        if _is_table(name):
            tables[long_name] = value
        elif name in tensors:
            raise ValueError(f"{source} holds {name} twice, the second time as {long_name}")
        else:
            tensors[name] = value
    return tensors, tables


def _beside(source: Path, kind: str, epoch: Mapping[str, Any]) -> tuple[Path, Any] | None:
    """`<kind>_N.pt` beside `epoch_N.pt`, or the part of the epoch itself, where there is one."""
    path = source.with_name(source.name.replace("epoch_", f"{kind}_", 1))
    if path == source or not path.is_file():
        return (source, epoch) if kind in epoch else None
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; delete it or download it again")
    for key in ("epoch", "step", "name"):
        mine, theirs = epoch.get(key), content.get(key)
        if None not in (mine, theirs) and mine != theirs:
            raise ValueError(f"{path} is of {key} {theirs!r}, {source.name} of {mine!r}")
    if kind == "optimizer" and kind not in content:
        raise ValueError(f"{path} has no 'optimizer', only {', '.join(map(str, content))}")
    return path, content


# --------------------------------------------------------------------------------- the moments


def _moments(
    optimizer: Mapping[str, Any], order: list[str], path: Path
) -> tuple[dict[str, Tensor] | None, float | None, list[str]]:
    """Adam's state by our names, the learning rate it held, and what of it was left out.

    Parameters are numbered in the order of the model's tensors (torch's own state) or named
    (FSDP's gathered state). No state at all gives None.
    """
    groups, state = optimizer["param_groups"], dict(optimizer["state"])
    rate = next((float(group["lr"]) for group in groups if group["params"]), None)
    if not state:
        return None, rate, []
    if all(isinstance(key, int) for key in state):
        numbers = [number for group in groups for number in group["params"]]
        filled = sum(bool(group["params"]) for group in groups)
        if filled > 1:
            raise ValueError(
                f"{path} has {filled} groups of parameters; OpenLM's optimisers have one, in the "
                "model's order, and which tensor a number stands for is not known here"
            )
        if len(numbers) != len(order):
            raise ValueError(
                f"{path} numbers {len(numbers)} parameters, the model has {len(order)}; "
                "it is another model's"
            )
        state = {order[at]: state[one] for at, one in enumerate(numbers) if one in state}
    else:
        state = {_own_name(str(name)): entry for name, entry in state.items()}
    missing = [
        f"{key}.{name}" for name in order for key in MOMENTS if key not in state.get(name, {})
    ]
    unknown = sorted(state.keys() - set(order))
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit the model:\n  "
            + "\n  ".join(
                [f"missing: {one}" for one in missing] + [f"unexpected: {one}" for one in unknown]
            )
        )
    moments = {
        f"{key}.{name}": torch.as_tensor(state[name][key]) for name in order for key in MOMENTS
    }
    left = [f"{key}.{name}" for name in order for key in state[name] if key not in MOMENTS]
    return moments, rate, left
