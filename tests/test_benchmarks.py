"""The benchmark of the training step runs without peers and, as far as it can, without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_step.py"
pytestmark = pytest.mark.slow


def test_the_way_of_a_gpu_has_its_shapes_kernels_and_one_graph_a_block() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    text = " ".join(ended.stdout.split())
    for name in ("79m text", "1b text", "1b image-text"):
        assert name in text
    assert text.count("a block is 1 graph of") == 3
    assert text.count("packed rows: BlockMask") == 3
    assert "1,439,893,504 parameters on meta" in text
