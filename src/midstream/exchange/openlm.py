"""Checkpoints of OpenLM: its trainer's files, and folders under Hugging Face's names.

Its trainer leaves `<run>/params.txt` and `<run>/checkpoints/epoch_N.pt`, `optimizer_N.pt`,
`stats_N.pt` (open_lm/params.py, model.py, scheduler.py, main.py, data.py).
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from midstream.config import DecoderConfig
from midstream.core.storage import read_json
from midstream.core.tokens import name_some
from midstream.exchange.hub import TABLES, LanguageModel
from midstream.model.decoder import Decoder
from midstream.model.weights import check, only_tensors, read_pickle, read_tensors
from midstream.study.imported import Position
from midstream.train.checkpoint import MOMENTS

# Hidden size, layers and heads by name.
SIZES: dict[str, list[int]] = TABLES["openlm"]
_DIMENSIONS = re.compile(r"d=(\d+)_l=(\d+)_h=(\d+)")  # so, too, DCLM names its models
# What training wrappers (distributed, torch.compile, FSDP) put into names; Hugging Face's class
# puts `model.` before all.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}

_ONE_NAME = {"dim": "hidden_dim", "norm_type": "model_norm", "apply_qk_norm": "qk_norm"}
_SCHEDULE = ("lr", "warmup", "lr_scheduler", "lr_cooldown_end", "seq_len", "global_batch_size")


def read_openlm(source: Path, *, num_heads: int | None = None) -> LanguageModel:
    """Read an `epoch_N.pt` with what lies around it, a Hugging Face folder, or safetensors alone.

    Tensors and moments are in float32, the note says which file each part comes from; the position
    is in tokens and learning rates, `rate` that of the next step. `num_heads` is needed where
    neither settings nor a rotary table tell it. Raises FileNotFoundError, or ValueError if a file
    is broken, wants to run code, is of a variant that computes something else, or does not hold
    exactly the decoder's tensors.
    """
    if not source.is_dir() and source.suffix != ".safetensors":
        return _read_epoch(source, num_heads)
    epochs = sorted(str(item.relative_to(source)) for item in source.glob("**/epoch_*.pt"))
    if epochs:
        raise ValueError(f"{source} is a training run; give one of {', '.join(epochs)}")
    path = source / "config.json"
    settings = _read_config(path) if path.is_file() else {}
    origins = {"settings": path.name if settings else "tensor shapes"}
    return _checkpoint(read_tensors(source), settings, source, num_heads, origins)


def _read_epoch(source: Path, num_heads: int | None) -> LanguageModel:
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
    settings = _read_params(params) if params else {}
    origins = {"settings": params.name if params else "tensor shapes"}

    moments: dict[str, Tensor] | None = None
    used: float | None = None
    left: list[str] = []
    order = [name for name in map(_own_name, state) if not _is_table(name)]
    found = _beside(source, "optimizer", epoch)
    if found is not None:
        moments, used, left = _moments(found[1]["optimizer"], order, found[0])
    stats = _beside(source, "stats", epoch)
    told = epoch.get("step", stats[1].get("step") if stats else None)
    position = _position(settings, None if told is None else int(told), used, path=source)
    if params and position.tokens_seen is not None:
        origins["position"] = params.name
    elif found and used is not None:
        origins["position"] = f"rate alone, from {found[0].name}"
    if found and moments:
        origins["moments"] = found[0].name
    model = _checkpoint(state, settings, source, num_heads, origins)
    if moments is not None:
        with torch.device("meta"):
            decoder = Decoder(cast(DecoderConfig, model.config))
        for key in ("exp_avg", "exp_avg_sq"):
            each = {name: moments[f"{key}.{name}"] for name in model.tensors}
            check(decoder, each, path=source.with_name(f"{key} beside {source.name}"))
        moments = {name: value.to(torch.float32) for name, value in moments.items()}
    return replace(
        model,
        dropped=(*model.dropped, *left),
        moments=moments,
        step=int(told or 0),
        position=position,
    )


def _checkpoint(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    source: Path,
    num_heads: int | None,
    origins: dict[str, str],
) -> LanguageModel:
    tensors: dict[str, Tensor] = {}
    # Rotary tables, by the file's names: they are computed, not kept.
    tables: dict[str, Tensor] = {}
    for long_name, value in state.items():
        name = _own_name(long_name)
        if _is_table(name):
            tables[long_name] = value
        elif name in tensors:
            raise ValueError(f"{source} holds {name} twice, the second time as {long_name}")
        else:
            tensors[name] = value
    config, origins["num_heads"] = _decoder_config(
        tensors, list(tables.values()), settings, path=source, num_heads=num_heads
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    check(decoder, tensors, path=source)
    if "model_norm" not in settings:
        origins["model_norm"] = "assumed gain-only LayerNorm, as DCLM's; shapes cannot tell"
    told = "; ".join(f"{what}: {origin}" for what, origin in origins.items())
    return LanguageModel(
        config,
        {name: value.to(torch.float32) for name, value in tensors.items()},
        tuple(tables),
        notes=(f"read from its files: {told}",),
    )


# ------------------------------------------------------------------------------ names and files


def _own_name(name: str) -> str:
    kept = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(kept[1:] if kept[:1] == ["model"] else kept)


def _is_table(name: str) -> bool:
    return name.endswith(".inv_freq")


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
        if filled > 1 or len(numbers) != len(order):
            raise ValueError(
                f"{path} numbers {len(numbers)} parameters in {filled} groups, the model has "
                f"{len(order)}, in one; which tensor a number stands for is not known here"
            )
        state = {order[at]: state[one] for at, one in enumerate(numbers) if one in state}
    else:
        state = {_own_name(str(name)): entry for name, entry in state.items()}
    wrong = [
        f"missing: {key}.{name}"
        for name in order
        for key in MOMENTS
        if key not in state.get(name, {})
    ]
    wrong += [f"unexpected: {name}" for name in sorted(state.keys() - set(order))]
    if wrong:
        raise ValueError(f"{path} does not fit the model:\n  " + "\n  ".join(wrong))
    moments = {
        f"{key}.{name}": torch.as_tensor(state[name][key]) for name in order for key in MOMENTS
    }
    left = [f"{key}.{name}" for name in order for key in state[name] if key not in MOMENTS]
    return moments, rate, left


# ------------------------------------------------------------------------------- the settings


def _read_params(path: Path) -> dict[str, Any]:
    """The settings in a params.txt, one `name: value` a line; ValueError names a line that is none.

    What the model's own json says (beside params.txt, or where `model` points) goes first, as it
    does in OpenLM.
    """
    settings: dict[str, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, colon, text = line.partition(":")
        if not colon or not name.isidentifier():
            raise ValueError(f"{path}, line {number}: {line!r} is no 'name: value'")
        try:
            settings[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):  # a word
            settings[name] = text.strip()
    return _with_sizes(settings, path.parent)


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in a Hugging Face config.json, flat or nested in `params_args_dict`."""
    content = read_json(path)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "openlm":
        raise ValueError(f"{path} is of model_type {kind!r}, not 'openlm'")
    nested = _with_sizes(dict(content.get("params_args_dict") or {}), path.parent)
    flat = {name: value for name, value in content.items() if value is not None}
    return nested | {_ONE_NAME.get(name, name): value for name, value in flat.items()}


def _with_sizes(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    model = str(settings.get("model", ""))
    if "mamba" in model:
        raise ValueError(f"{folder} is of the Mamba model {model}; only OpenLM's transformer fits")
    written = folder / (model if model.endswith(".json") else f"{model}.json")
    if written.is_file():
        sizes_and_more: dict[str, Any] = read_json(written)
        return settings | sizes_and_more
    named = _DIMENSIONS.fullmatch(model)
    sizes = map(int, named.groups()) if named else SIZES.get(model, ())
    return settings | dict(zip(("hidden_dim", "n_layers", "n_heads"), sizes, strict=False))


def _decoder_config(
    tensors: Mapping[str, Tensor],
    tables: list[Tensor],
    settings: Mapping[str, Any],
    *,
    path: Path,
    num_heads: int | None,
) -> tuple[DecoderConfig, str]:
    """The decoder that tensors of our names belong to, and where its number of heads comes from.

    Width, depth, vocabulary and qk-norm are the tensors'; settings that say so must agree.
    """
    _refuse_variants(tensors, settings, path)
    shape = tensors["tok_embeddings.weight"].shape if "tok_embeddings.weight" in tensors else ()
    layers = {int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))}
    if len(shape) != 2 or not layers:
        raise ValueError(
            f"{path} holds no OpenLM decoder: tok_embeddings.weight or layers.N are missing "
            f"among its {len(tensors)} tensors ({', '.join(sorted(tensors)[:3])}, ...)"
        )
    vocab_size, width = shape
    has_norms = any(name.endswith(".q_norm.weight") for name in tensors)
    seen = {"vocab_size": vocab_size, "hidden_dim": width, "n_layers": max(layers) + 1}
    for name, value in (seen | {"qk_norm": has_norms}).items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{path} has {name} {value}, its settings say {settings[name]}; "
                "they are of another run"
            )
    heads = {"given": num_heads, "settings": settings.get("n_heads")}
    if tables:
        heads["rotary table"] = width // (2 * len(tables[0]))
    said = {origin: number for origin, number in heads.items() if number is not None}
    if len(set(said.values())) != 1:
        raise ValueError(
            f"{path} does not tell the number of heads; give num_heads "
            f"(heads of 128 channels would be {width / 128:g})"
            if not said
            else f"{path}: the number of heads is {said}; which is it?"
        )
    origin, number = next(iter(said.items()))
    config = DecoderConfig(
        hidden_size=width,
        num_layers=seen["n_layers"],
        num_heads=number,
        vocab_size=vocab_size,
        qk_norm=has_norms,
        norm_eps=float(settings.get("norm_eps", 1e-5)),
    )
    half = config.head_dim // 2
    usual = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    for table in tables:
        # Some runs keep the table in bfloat16.
        if table.shape != usual.shape or not torch.allclose(table.float(), usual, rtol=5e-3):
            raise ValueError(f"{path} turns by other angles than base {config.rope_base:g}")
    return config, origin


def _refuse_variants(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path
) -> None:
    wrong = [
        f"{name} {settings[name]!r}"
        for name, known in TABLES["openlm_settings"].items()
        if settings.get(name) is not None and settings[name] not in known
    ]
    for pattern, variant in TABLES["openlm_foreign"].items():
        named = [name for name in tensors if re.search(pattern, name)]
        if named:
            wrong.append(f"{variant}: {name_some(named, 1)}")
    rows, output = tensors.get("tok_embeddings.weight"), tensors.get("output.weight")
    if rows is not None and output is not None and rows.data_ptr() == output.data_ptr():
        wrong.append("weight_tying: output.weight is tok_embeddings.weight")
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(
            f"{path} is a variant of OpenLM's model that this decoder is not:\n  {lines}"
        )


# -------------------------------------------------------------------------------- the schedule


def _position(
    settings: Mapping[str, Any], step: int | None, last_rate: float | None, *, path: Path
) -> Position:
    """Where the schedule of these settings stands after `step` steps: tokens, and the next rate.

    `last_rate` is what the optimiser held, which OpenLM sets to the next step's rate before it
    looks for data; it is the rate where the settings do not tell, and must otherwise agree within
    1 %. Raises ValueError for an unknown schedule, a step beyond the end, or rates that differ.
    """
    if step is None or any(settings.get(name) is None for name in _SCHEDULE):
        return Position(rate=last_rate)
    peak, row, batch = (settings[name] for name in ("lr", "seq_len", "global_batch_size"))
    if settings["lr_scheduler"] not in ("cosine", "const"):
        raise ValueError(
            f"{path} has the unknown lr_scheduler {settings['lr_scheduler']!r}, not cosine or const"
        )
    steps, fixed = _total_steps(settings), settings.get("skip_scheduler", False)
    if steps is not None and step > steps:
        raise ValueError(f"{path} stands at step {step:,} of a run of {steps:,} steps")
    constant = fixed or settings["lr_scheduler"] == "const"
    floor, low = settings.get("force_min_lr", 0.0), settings["lr_cooldown_end"]
    warmup = 0 if fixed else settings["warmup"]
    rate: float | None = peak
    if step < warmup:
        rate = peak * (step + 1) / warmup
    elif not constant and steps is None:
        rate = last_rate
    elif not constant and steps is not None:
        part = (step - warmup) / max(steps - warmup, 1)
        rate = max(low + 0.5 * (1 + math.cos(math.pi * part)) * (peak - low), floor)
    if None not in (rate, last_rate) and not math.isclose(rate, last_rate, rel_tol=0.01):  # type: ignore[arg-type]
        raise ValueError(
            f"{path}: after step {step:,} the settings give the rate {rate:.6g}, the optimiser "
            f"held {last_rate:.6g}; they are of another run"
        )
    return Position(
        tokens_seen=step * batch * row,
        total_tokens=None if steps is None else steps * batch * row,
        rate=rate,
        peak_rate=peak,
        end_rate=peak if constant else max(low, floor),
    )


def _total_steps(settings: Mapping[str, Any]) -> int | None:
    """Steps of the whole run; None where the data's own size decides.

    `train_num_samples` counts rows here: OpenLM divides the tokens by seq_len before it writes
    params.txt. Without a manifest each source's rows are rounded up to whole batches a worker.
    """
    rows, epochs = settings.get("train_num_samples"), settings.get("epochs")
    if rows is None or epochs is None:
        return None
    batch = settings["global_batch_size"]
    if settings.get("dataset_manifest") is not None:
        return int(rows * epochs // batch)
    sources = settings.get("train_data")
    if not isinstance(sources, list):
        return None
    workers = max(1, settings.get("workers", 1))
    shares = settings.get("train_data_mix_weights")
    each = [int(rows * share) for share in shares or ()] or [rows // len(sources)] * len(sources)
    return int(sum(workers * math.ceil(one / (batch * workers)) for one in each) * epochs)
