"""Adapters that were trained on a base model, merged into it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from midstream.core.storage import read_json
from midstream.exchange.hub import LanguageModel, decoder_tensors, fetch, read_decoder
from midstream.model.pretrained import describe
from midstream.model.weights import read_tensors

ADAPTER = "adapter_config.json"
_BASE = "base_model_name_or_path"
_TIED = re.compile(r"\.(embed_tokens|embed_in|lm_head|embed_out)\.(?!.*trainable_tokens)")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a whole model."""
    whole = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]
    return (folder / ADAPTER).is_file() and not whole


def merged(folder: Path) -> LanguageModel:
    """The base model with the adapter merged into it by `peft`, in float32.

    Raises ValueError if the adapter names no base or one that cannot be read, if it changes other
    matrices than the base has or the files say, or with the way to merge if peft is not installed.
    """
    stated = read_json(folder / ADAPTER)
    base = stated.get(_BASE)
    if not base:
        raise ValueError(f"{folder / ADAPTER} names no base model; merge it with its own first")
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            f"{folder} is a LoRA adapter of {base}; install peft, which merges the two here, or "
            "merge them yourself (merge_and_unload, save_pretrained) and import what that writes"
        ) from None
    from transformers import AutoModelForCausalLM

    here = _base_of(folder, base, stated.get("revision"))
    whole = AutoModelForCausalLM.from_pretrained(
        here, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    file, older = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    file = older if older.is_file() and not file.is_file() else file
    held = read_tensors(file)
    # One that was trained with further tokens brings whole embeddings of its own.
    rows = {len(one) for name, one in held.items() if name.endswith(_EMBEDDINGS)}
    if rows - {whole.config.vocab_size}:
        whole.resize_token_embeddings(max(rows), mean_resizing=False)
    if whole.config.tie_word_embeddings and any(map(_TIED.search, held)):
        # What is added to one of the two was not added to the other, as peft trains them; rows of
        # single tokens alone are the same in both.
        head = whole.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        whole.config.tie_word_embeddings = False
    try:
        adapted = PeftModel.from_pretrained(whole, folder)
        if not hasattr(adapted, "merge_and_unload"):
            raise ValueError(f"a {stated.get('peft_type')} adapter changes no weights")
        _check_names(adapted, held, file, base)
        model = adapted.merge_and_unload()
    except Exception as error:  # whatever peft's own code raises
        why = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{folder} cannot be merged with {base}: {why}; if it can be merged where it was "
            "trained, import what that writes"
        ) from None
    config = describe(model.config)
    return LanguageModel(
        config,
        decoder_tensors(config, model.state_dict(), folder),
        notes=(f"merged with {base} by peft",),
        tokenizer_folder=here,
    )


def _base_of(folder: Path, base: str, revision: str | None) -> Path:
    """The folder of an adapter's base, a whole language model; ValueError or FileNotFoundError says
    where the base is named."""
    # A folder's path may be said from here, or from where the adapter lies.
    places = (Path(base).expanduser(), folder / base)
    try:
        here = next((one for one in places if one.is_dir()), None) or fetch(base, revision)
        # What the base lacks would be drawn at random.
        read_decoder(here)
    except (ValueError, OSError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(
            f"the base model of the adapter {folder} cannot be read: {error}; the base is named by "
            f"{_BASE} in its {ADAPTER}: put there the folder or hub name of that model, whole and "
            "not quantised, or merge the two where it was trained and import what that writes"
        ) from None
    return here


def _check_names(adapted: Any, held: Iterable[str], file: Path, base: str) -> None:
    """ValueError for matrices that the file changes and the base has not, or the other way round:
    peft leaves the ones out and the others as they were, with a warning at most."""
    mark = f".{getattr(adapted.base_model, 'prefix', 'lora_')}"

    def changed(names: Iterable[str]) -> set[str]:
        return {name.partition(mark)[0] for name in names if mark in name}

    theirs, ours = changed(held), changed(adapted.state_dict())
    wrong = sorted(theirs - ours) or sorted(ours - theirs)
    if wrong:
        whose = f"which {base} has not" if theirs - ours else "which the file lacks"
        raise ValueError(
            f"{file.name} and {ADAPTER} do not belong together: {len(wrong):,} of the matrices to "
            f"change are {wrong[0]} and the like, {whose} (another base, other names)"
        )
