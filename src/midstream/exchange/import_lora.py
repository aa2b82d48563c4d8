"""LoRA adapters, which are a language model only together with the one they were trained on."""

from pathlib import Path

import torch
from torch import Tensor

from midstream.config import TransformersDecoderConfig
from midstream.exchange.huggingface import ADAPTER, decoder_tensors, fetch
from midstream.model.transformers_config import describe
from midstream.storage import read_json


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a whole model."""
    whole = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]
    return (folder / ADAPTER).is_file() and not whole


def base_name(folder: Path) -> str:
    """The model that an adapter was trained on; ValueError if its file does not tell."""
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{folder / ADAPTER} names no base model; merge the adapter with its own first"
        )
    return str(base)


def merged(
    folder: Path,
) -> tuple[TransformersDecoderConfig, dict[str, Tensor], Path, tuple[str, ...]]:
    """The base model with the adapter merged into it by `peft`, in float32, under the names of
    `TransformersDecoder`; the base model's folder; sentences.

    Raises ValueError with the way to merge if peft is not installed.
    """
    base = base_name(folder)
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            f"{folder} is a LoRA adapter of {base}; install peft, which merges the two here, or "
            f"merge them yourself (PeftModel.from_pretrained(base, {str(folder)!r})"
            ".merge_and_unload().save_pretrained(...)) and import what that writes"
        ) from None
    from transformers import AutoModelForCausalLM

    here = Path(base).expanduser()
    if not here.is_dir():
        here = fetch(base, read_json(folder / ADAPTER).get("revision"))
    whole = AutoModelForCausalLM.from_pretrained(
        here, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    model = PeftModel.from_pretrained(whole, folder).merge_and_unload()
    config = describe(model.config)
    return (
        config,
        decoder_tensors(config, model.state_dict()),
        here,
        (f"merged with {base} by peft",),
    )
