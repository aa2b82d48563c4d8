"""Tiny tokenizers and decoders, and a fresh Python without Midstream that reads what was exported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from midstream.data.examples import TextCodec

TEXTS = ("What colour is the big round ball on the left?", "The ball is red.", "In: Out: how many")

# Runs before each script: Midstream must be out of reach, however it was installed.
_HEAD = """
import json, os, sys
sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, "midstream"))]
try:
    import midstream
except ImportError:
    pass
else:
    raise AssertionError("midstream can still be imported")
import numpy as np, torch
torch.set_num_threads(1)
request = json.loads(sys.stdin.read())
"""


def codec(*, adds_start: bool = False) -> TextCodec:
    """A byte-level tokenizer of 300 ids; `adds_start` puts a start token before each text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = ["<s>"] if adds_start else []
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), special_tokens=special
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if adds_start:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return TextCodec(tokenizer)


def run_fresh(script: str, request: dict[str, Any], scratch: Path) -> Any:
    """What a script prints as its last line, as JSON; it finds `request` and has no network."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + script],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        cwd=scratch,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
