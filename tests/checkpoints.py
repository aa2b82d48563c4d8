"""Tiny random checkpoints of the known families of language models, as `transformers` saves them.

A key of FAMILIES is the `model_type`; `llama3` is a Llama with tied embeddings, grouped queries and
scaled rotary frequencies. Weights are larger than a new model's and no gain or bias is left at one
or zero, so that using the wrong one shows.
"""

import json
import shutil
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 300
END_OF_TEXT = "<|endoftext|>"
_TEXT = "A red circle is left of the blue square. Which shape is below the green triangle? " * 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _new(kind: str, **settings: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **settings)
    )
    return model


FAMILIES = {
    "llama": partial(_new, "llama", **SIZES),
    "llama3": partial(
        _new, "llama", **GROUPED, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE
    ),
    # Padding is the end of text, as in many checkpoints, and the embeddings are not tied.
    "mistral": partial(_new, "mistral", **GROUPED | {"sliding_window": None, "pad_token_id": 0}),
    "olmo": partial(_new, "olmo", **SIZES, clip_qkv=0.5),
    "olmo2": partial(_new, "olmo2", **GROUPED),
    "gpt_neox": partial(_new, "gpt_neox", **SIZES),
    "qwen2": partial(_new, "qwen2", **GROUPED, tie_word_embeddings=True),
    "qwen3": partial(_new, "qwen3", **GROUPED, head_dim=16),
    # The second of its layers has no rotary embedding.
    "smollm3": partial(_new, "smollm3", **GROUPED | {"no_rope_layers": [1, 0], "pad_token_id": 1}),
}


@torch.no_grad()
def randomise(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """The same model in evaluation mode, every parameter drawn anew from the seed."""
    source = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
        parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=source))
    return model.eval()


def build_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A model of a family; equal seeds give equal weights. The global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        return randomise(FAMILIES[family](), seed=seed)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens at most, its end of text at id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def save_checkpoint(family: str, folder: Path, *, seed: int = 0, shard: bool = False) -> Path:
    """Write a checkpoint of a family with its tokenizer; `shard` cuts the weights into several."""
    return copied(_saved(family, seed, shard), folder)


# What was saved once, for copies of it.
KEPT = TemporaryDirectory()


def copied(saved: Path, folder: Path) -> Path:
    """Lay a saved folder's files into another; returns that."""
    shutil.copytree(saved, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return folder


@cache
def _saved(family: str, seed: int, shard: bool) -> Path:
    folder = Path(KEPT.name, f"{family}-{seed}-{shard}")
    largest = "40KB" if shard else "1GB"
    build_model(family, seed=seed).save_pretrained(folder, max_shard_size=largest)
    build_tokenizer().save_pretrained(folder)
    return folder


def edit(path: Path, **settings: Any) -> None:
    """Change or add keys of a JSON file, which need not be there."""
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(held | settings))
