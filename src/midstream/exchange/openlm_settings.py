"""What OpenLM's settings say: the decoder's sizes, and where its schedule stood.

Settings are the `name: value` lines of a run's params.txt or a Hugging Face config.json, brought
to one naming. Source: open_lm/params.py, model.py, scheduler.py, main.py, data.py.
"""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midstream.config import DecoderConfig
from midstream.core.storage import read_json

# Hidden size, layers and heads by the model names of OpenLM, DCLM and the paper's runs.
SIZES = {
    "open_lm_test_tiny": (16, 2, 2),
    "open_lm_11m": (96, 12, 12),
    "open_lm_11m_v2": (96, 8, 4),
    "open_lm_25m": (192, 12, 12),
    "open_lm_41m": (288, 12, 12),
    "open_lm_79m_v2": (512, 8, 4),
    "open_lm_154m_v2": (576, 24, 8),
    "open_lm_160m": (768, 12, 12),
    "open_lm_410m": (1024, 24, 16),
    "open_lm_411m_v2": (1024, 24, 8),
    "open_lm_830m": (1536, 24, 16),
    "open_lm_1b": (2048, 24, 16),
    "open_lm_1b_swiglutorch": (2048, 24, 16),
    "open_lm_3b": (2560, 32, 32),
    "open_lm_3b_swiglutorch": (2560, 32, 32),
    "open_lm_7b": (4096, 32, 32),
    "open_lm_7b_swiglutorch": (4096, 32, 32),
    "11m": (96, 8, 4),
    "79m": (512, 8, 4),
    "154m": (576, 24, 8),
    "411m": (1024, 24, 8),
    "1b": (2048, 24, 16),
    "7b": (4096, 32, 32),
}
_DIMENSIONS = re.compile(r"d=(\d+)_l=(\d+)_h=(\d+)")  # so, too, DCLM names its models

# Settings that compute what `Decoder` does (in float32: the norms differ under autocast only).
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_norm": ("gain_only_lp_layer_norm", "gain_only_layer_norm"),
    "ffn_type": ("swiglu", "swiglu_torch"),
    "positional_embedding_type": ("rotary",),
    "rotary_old": (False,),
    "attn_name": ("auto", "torch_attn", "xformers_attn", "xformers_attn_variable_length"),
    "weight_tying": (False,),
    "post_embed_norm": (False,),
    "moe_freq": (0,),
    "hf_model": (),
}
# Tensors by which a model that `Decoder` is not gives itself away, whatever its settings say.
_FOREIGN = {
    r"\.bias$": "bias (model_norm default_layer_norm or lp_layer_norm, or another's model)",
    r"_ff_w[12]\.|feed_forward\.[02]\.": "ffn_type 'gelu'",
    r"feed_forward\.(gate|up|down)_proj\.": "ffn_type 'gemma_geglu'",
    r"feed_forward\.(router|experts)\b": "ffn_type 'moe'",
    r"^post_embed_norm\.": "post_embed_norm",
    r"\bmixer\.|^backbone\.": "a Mamba model",
}
_ONE_NAME = {"dim": "hidden_dim", "norm_type": "model_norm", "apply_qk_norm": "qk_norm"}
_SIZE_NAMES = ("hidden_dim", "n_layers", "n_heads")
_SCHEDULE = ("lr", "warmup", "lr_scheduler", "lr_cooldown_end", "seq_len", "global_batch_size")


@dataclass(frozen=True)
class Position:
    """Where a run's schedule stood, in tokens and learning rates; None where files do not tell."""

    tokens_seen: int | None = None
    total_tokens: int | None = None
    rate: float | None = None
    peak_rate: float | None = None
    end_rate: float | None = None


# ------------------------------------------------------------------------------- the settings


def read_params(path: Path) -> dict[str, Any]:
    """The settings in a params.txt, one `name: value` a line, with those of its model's name.

    What the model's own json says (beside params.txt, or where `model` points) goes first, as it
    does in OpenLM. ValueError names a line that is none.
    """
    settings: dict[str, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, colon, text = line.partition(":")
        if not colon or not name.isidentifier():
            raise ValueError(f"{path}, line {number}: {line!r} is no 'name: value'")
        settings[name] = _value(text.strip())
    return _with_sizes(settings, path.parent)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a Hugging Face config.json, flat or nested in `params_args_dict`."""
    content = read_json(path)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "openlm":
        raise ValueError(f"{path} is of model_type {kind!r}, not 'openlm'")
    nested = _with_sizes(dict(content.get("params_args_dict") or {}), path.parent)
    flat = {name: value for name, value in content.items() if value is not None}
    return nested | {_ONE_NAME.get(name, name): value for name, value in flat.items()}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word
        return text


def _with_sizes(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    model = str(settings.get("model", ""))
    if "mamba" in model:
        raise ValueError(f"{folder} is of the Mamba model {model}; only OpenLM's transformer fits")
    written = folder / (model if model.endswith(".json") else f"{model}.json")
    if written.is_file():
        sizes_and_more: dict[str, Any] = read_json(written)
        return settings | sizes_and_more
    named = _DIMENSIONS.fullmatch(model)
    sizes = tuple(map(int, named.groups())) if named else SIZES.get(model)
    return settings | dict(zip(_SIZE_NAMES, sizes, strict=True)) if sizes else settings


# --------------------------------------------------------------------------------- the decoder


def decoder_config(
    tensors: Mapping[str, Tensor],
    tables: Iterable[Tensor],
    settings: Mapping[str, Any],
    *,
    path: Path,
    num_heads: int | None,
) -> tuple[DecoderConfig, str]:
    """The decoder that tensors of our names belong to, and where its number of heads comes from.

    Width, depth, vocabulary and qk-norm are the tensors'; the settings, where they say so, must
    agree. `tables` are the rotary tables of the checkpoint. Raises ValueError naming each setting
    or tensor of a variant that `Decoder` is not, or asks for `num_heads`.
    """
    _refuse_variants(tensors, settings, path)
    shape = tensors["tok_embeddings.weight"].shape if "tok_embeddings.weight" in tensors else ()
    layers = {int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))}
    if len(shape) != 2 or not layers:
        raise ValueError(
            f"{path} holds no OpenLM decoder: tok_embeddings.weight or layers.N are missing "
            f"among its {len(tensors)} tensors ({', '.join(sorted(tensors)[:3])}, ...)"
        )
    seen = {
        "vocab_size": shape[0],
        "hidden_dim": shape[1],
        "n_layers": max(layers) + 1,
        "qk_norm": any(name.endswith(".q_norm.weight") for name in tensors),
    }
    for name, value in seen.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{path} has {name} {value}, its settings say {settings[name]}; "
                "they are of another run"
            )
    tables = list(tables)
    heads = {"given": num_heads, "settings": settings.get("n_heads")}
    if tables:
        heads["rotary table"] = seen["hidden_dim"] // (2 * len(tables[0]))
    said = {origin: number for origin, number in heads.items() if number is not None}
    if len(set(said.values())) != 1:
        raise ValueError(
            f"{path} does not tell the number of heads; give num_heads "
            f"(heads of 128 channels would be {seen['hidden_dim'] / 128:g})"
            if not said
            else f"{path}: the number of heads is {said}; which is it?"
        )
    origin, number = next(iter(said.items()))
    config = DecoderConfig(
        hidden_size=seen["hidden_dim"],
        num_layers=seen["n_layers"],
        num_heads=number,
        vocab_size=seen["vocab_size"],
        qk_norm=seen["qk_norm"],
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
        for name, known in _SUPPORTED.items()
        if settings.get(name) is not None and settings[name] not in known
    ]
    for pattern, variant in _FOREIGN.items():
        named = [name for name in tensors if re.search(pattern, name)]
        if named:
            wrong.append(
                f"{variant}: {named[0]}" + f" and {len(named) - 1} more" * (len(named) > 1)
            )
    pair = [tensors.get("tok_embeddings.weight"), tensors.get("output.weight")]
    if pair[0] is not None and pair[1] is not None and pair[0].data_ptr() == pair[1].data_ptr():
        wrong.append("weight_tying: output.weight is tok_embeddings.weight")
    if wrong:
        raise ValueError(
            f"{path} is a variant of OpenLM's model that this decoder is not:\n  "
            + "\n  ".join(wrong)
        )


# -------------------------------------------------------------------------------- the schedule


def schedule_position(
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
    if (
        rate is not None
        and last_rate is not None
        and not math.isclose(rate, last_rate, rel_tol=0.01)
    ):
        raise ValueError(
            f"{path}: after step {step:,} the settings give the rate {rate:.6g}, the optimiser "
            f"held {last_rate:.6g}; they are of another run"
        )
    return Position(
        tokens_seen=step * batch * row,
        total_tokens=None if steps is None else steps * batch * row,
        rate=rate if rate is None else float(rate),
        peak_rate=float(peak),
        end_rate=float(peak if constant else max(low, floor)),
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
    each = [int(rows * share) for share in shares] if shares else [rows // len(sources)]
    each *= 1 if shares else len(sources)
    return int(sum(workers * math.ceil(one / (batch * workers)) for one in each) * epochs)
