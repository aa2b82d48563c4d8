"""Tiny tokenizers and models, and a fresh Python without Midstream that reads exports."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import nn

from midstream.config import (
    DecoderConfig,
    EncoderConfig,
    ProjectorConfig,
    TransformersDecoderConfig,
    VLMConfig,
)
from midstream.data.examples import TextCodec
from midstream.model.pretrained import describe
from midstream.model.vision import build_encoder
from midstream.model.vlm import VLM

TEXTS = ("What colour is the big round ball on the left?", "The ball is red.", "In: Out: how many")

# Midstream is out of reach, however it was installed; what each script needs is imported once, and
# each is run in a fork.
_FRESH = """
import json, os, sys, traceback
sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, "midstream"))]
try:
    import midstream
except ImportError:
    pass
else:
    raise AssertionError("midstream can still be imported")
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
torch.set_num_threads(1)
for line in sys.stdin:
    asked = json.loads(line)
    if (pid := os.fork()) == 0:
        os.chdir(asked["folder"])
        for place, name in ((1, "printed"), (2, "errors")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), place)
        try:
            exec(asked["script"], globals() | {"request": asked["request"]})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def codec(*, adds_start: bool = False, texts: tuple[str, ...] = TEXTS) -> TextCodec:
    """A byte-level tokenizer of 300 ids; `adds_start` puts a start token before each text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = ["<s>"] if adds_start else []
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), special_tokens=special
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    if adds_start:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return TextCodec(tokenizer)


@cache
def _fresh() -> "subprocess.Popen[str]":
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": mkdtemp(), "OMP_NUM_THREADS": "1"}
    pipe, environment = subprocess.PIPE, os.environ | own | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", _FRESH]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def run_fresh(script: str, request: dict[str, Any], scratch: Path) -> Any:
    """What a script prints as its last line, as JSON; it finds `request` and has no network."""
    process, asked = _fresh(), {"script": script, "request": request, "folder": str(scratch)}
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "0\n", (scratch / "errors").read_text()[-4000:]
    return json.loads((scratch / "printed").read_text().splitlines()[-1])


OPENLM = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=320)
SIGLIP = EncoderConfig(
    image_size=24,
    patch_size=12,
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    intermediate_size=24,
    pixel_mean=(0.4, 0.5, 0.6),
)
DINOV2 = EncoderConfig(
    family="dinov2",
    image_size=24,
    patch_size=12,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=32,
    hidden_act="gelu",
    pixel_mean=(0.5, 0.4, 0.4),
    pixel_std=(0.2, 0.3, 0.25),
)
CLIP = SIGLIP.model_copy(update={"family": "clip", "hidden_act": "quick_gelu"})
DINOV3 = DINOV2.model_copy(
    update={
        **{"family": "dinov3", "num_registers": 2, "num_layers": 3},
        **{"pixel_mean": SIGLIP.pixel_mean, "pixel_std": SIGLIP.pixel_std},
    }
)
INNER = ProjectorConfig(num_layers=2, hidden="decoder")


def stock(model_type: str = "llama", **changes: Any) -> TransformersDecoderConfig:
    """A tiny decoder of transformers."""
    from transformers import AutoConfig

    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": None,
        "eos_token_id": 300,
        **({} if model_type == "gpt_neox" else {"num_key_value_heads": 1}),
        **changes,
    }
    return describe(AutoConfig.for_model(model_type, **settings))


@torch.no_grad()
def made(config: VLMConfig) -> tuple[VLM, nn.Module | None]:
    """A model of random weights, wide enough apart that no two tokens are about as likely."""
    vlm = VLM(config)
    encoder = vlm.encoder
    if encoder is None and config.encoder is not None:
        encoder = build_encoder(config.encoder)
    source = torch.Generator().manual_seed(7)
    parts = [vlm] if encoder is None or encoder is vlm.encoder else [vlm, encoder]
    for part in parts:
        for name, value in part.named_parameters():
            gain = value.ndim == 1 and not name.endswith("bias")
            value.normal_(mean=float(gain), std=0.3, generator=source)
        part.eval()
    return vlm, encoder


def picture(height: int, width: int) -> np.ndarray:
    """Bytes [height, width, 3] of waves."""
    row, column = np.mgrid[:height, :width]
    planes = [128 + 120 * np.sin(0.3 * row * (1 + one) + 0.2 * column) for one in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def cached(cache: Path, folder: Path, name: str, revision: str, commit: str) -> None:
    """Lay a folder down as the hub's cache does."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / revision).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"
