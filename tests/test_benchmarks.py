"""The benchmark of the training step goes a GPU's way without one; that of packing, as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


def printed(script: str, *options: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return " ".join(ended.stdout.split())


def test_packing_compares_layouts_and_documents_with_captions() -> None:
    text = printed("packing.py", "--steps", "1")
    assert text.count("ratio filled / padded") == 3
    assert text.count("ratio documents / captions") == 1


def test_the_way_of_a_gpu_has_its_shapes_kernels_and_one_graph_a_block() -> None:
    text = printed("train_step.py", "--dry-run")
    for name in ("79m text", "1b text", "1b image-text"):
        assert name in text
    assert text.count("a block is 1 graph of") == 3
    assert text.count("packed rows: BlockMask") == 3
    assert "1,439,893,504 parameters on meta" in text
