"""Weights in and out: safetensors files of our own, and OpenLM's checkpoints."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from midstream.model.decoder import Decoder
from midstream.storage import write_bytes

# What training wrappers (distributed, torch.compile, Hugging Face) put before OpenLM's names.
_OPENLM_PREFIXES = ("module.", "_orig_mod.", "model.")


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's tensors as a safetensors file, completely or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in _tensors(module).items()}
    write_bytes(path, save(tensors))


def load_weights(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Fill a module from a safetensors file of exactly its names, shapes and dtypes.

    With `prefix` ("decoder.") all names in the file start with it and lose it: so a model's part
    reads the file of a model that had only this part. Raises FileNotFoundError, or ValueError
    with every missing, unexpected and mismatched name; the module is then unchanged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give a .safetensors file")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    kept = {
        name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)
    }
    foreign = [name for name in found if not name.startswith(prefix)]
    _fill(module, kept, foreign=foreign, path=path)


def load_openlm(decoder: Decoder, path: Path) -> None:
    """Fill a decoder from OpenLM's `epoch_N.pt` (key `state_dict`; wrappers' prefixes and rotary
    tables are dropped).

    Only tensors and plain values are unpickled. Raises FileNotFoundError, or ValueError with every
    missing, unexpected and mismatched name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no OpenLM checkpoint at {path}; give an epoch_N.pt file")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "state_dict" not in content:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has no 'state_dict', only {keys}; give an epoch_N.pt file")
    found: dict[str, Tensor] = {}
    for long_name, value in content["state_dict"].items():
        name = _without_prefixes(long_name)
        if name in found:
            raise ValueError(f"{path} holds {name} twice, the second time as {long_name}")
        if not name.endswith(".inv_freq"):
            found[name] = value
    _fill(decoder, found, foreign=[], path=path)


def weights_digest(module: nn.Module) -> str:
    """The sha256 of a module's tensors: name, dtype, shape and bytes, in the order of names."""
    state = hashlib.sha256()
    for name, value in sorted(_tensors(module).items()):
        state.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def _without_prefixes(name: str) -> str:
    while name.startswith(_OPENLM_PREFIXES):
        name = name.split(".", 1)[1]
    return name


@torch.no_grad()
def _fill(
    module: nn.Module, found: Mapping[str, Tensor], *, foreign: list[str], path: Path
) -> None:
    held = _tensors(module)
    problems = [f"missing: {name}" for name in sorted(held.keys() - found.keys())]
    problems += [f"unexpected: {name}" for name in sorted({*foreign, *found} - held.keys())]
    for name in sorted(held.keys() & found.keys()):
        theirs, mine = found[name], held[name]
        if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
            problems.append(
                f"mismatched: {name} is {theirs.dtype} {list(theirs.shape)} in the file, "
                f"{mine.dtype} {list(mine.shape)} in the model"
            )
    if problems:
        raise ValueError(
            f"{path} does not fit this {type(module).__name__}; build the model from the config "
            "that the file was written with:\n  " + "\n  ".join(problems)
        )
    for name, value in held.items():
        value.copy_(found[name])
