"""`benchmarks/gpu.py` goes its way without a card, and says what stands in the way of one."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from midstream.core.storage import read_json
from midstream.study.store import Ledger
from midstream.train.step import Clock
from midstream.work.profile_stage import Steps

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_parts

# One of each kind that needs no compiler.
PARTS = ["79m-text-eager", "1b-image-text-eager", "encoder", "saving-79m", "attention"]


def here(name: str, out: Path, dry_run: bool, seconds: float) -> gpu.Ended:
    """A part in this process."""
    asked = ["--out", str(out), "--compute", name]
    return gpu.Ended(gpu.main([*asked, "--dry-run"] if dry_run else asked))


def run(out: Path, *parts: str, start: gpu.Start = here) -> tuple[int, dict[str, Any]]:
    code = gpu.main(["--dry-run", "--out", str(out), "--parts", *parts], start)
    return code, read_json(out / "results.json")["parts"]


def test_every_part_goes_its_way_on_a_cpu_and_is_not_done_again(
    tiny_ledger: Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What has its own tests is done before: the data, an encoder.
    tiny.store_with(tiny_ledger, tmp_path / "store", tiny.DATA, tiny.ENCODER_STAGE)
    size = replace(gpu_parts.DRY, data=tiny.DATA, encoder=tiny.ENCODER_STAGE)
    monkeypatch.setattr(gpu_parts, "DRY", size)
    take = Steps.take

    def small(self: Steps, clock: Clock) -> Any:
        if next(self.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        return take(self, clock)

    begin = Steps.__init__

    def init(self: Steps, job: Any, runner: Any, stage: Any) -> None:
        begin(self, job, runner, stage)
        micro = runner.machine.micro_batch_rows
        self.rows = iter([micro] * 99)

    monkeypatch.setattr(Steps, "__init__", init)
    monkeypatch.setattr(Steps, "take", small)
    code, parts = run(tmp_path, *PARTS)
    assert code == 0
    assert list(parts) == PARTS
    assert all(part["done"] for part in parts.values())
    said = capsys.readouterr().out
    for name in PARTS:
        if "rows" in parts[name]:
            fits = {row["micro_rows"]: row["fits"] for row in parts[name]["rows"]}
            assert fits.pop(4) is False
            assert fits.pop(2) is True
            assert f"{name}: micro-batches of 4 rows do not fit: CUDA out of memory" in said
    assert parts["saving-79m"]["bytes"] > 0
    assert parts["encoder"]["stored_images"] == tiny.DATA.world.num_captions
    best = read_json(tmp_path / "best.json")
    assert {(entry["pictures"], entry["compile"]) for entry in best} == {
        (False, "off"),
        (True, "off"),
    }
    assert "does not fit" in (tmp_path / "table.txt").read_text()

    def nothing(name: str, out: Path, dry_run: bool, seconds: float) -> gpu.Ended:
        assert name == "card"
        return here(name, out, dry_run, seconds)

    assert run(tmp_path, *PARTS, start=nothing)[0] == 0
