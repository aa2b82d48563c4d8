"""`benchmarks/gpu.py` goes its way without a card, and says what stands in the way of one."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from midstream.core.storage import read_json, write_json
from midstream.study.store import Ledger
from midstream.train.parallel import Clock
from midstream.work.choices import Best
from midstream.work.profile_stage import Steps

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_card
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
    best = [Best.model_validate(entry) for entry in read_json(tmp_path / "best.json")]
    assert [(one.pictures, one.compile) for one in best] == [(False, "off"), (True, "off")]
    assert {one.decoder_parameters for one in best} == {tiny.DECODER.num_parameters}
    for one in best:
        name = "1b-image-text-eager" if one.pictures else "79m-text-eager"
        speeds = {row["micro_rows"]: row.get("tokens_per_second", 0) for row in parts[name]["rows"]}
        assert one.micro_batch_rows == max(speeds, key=lambda micro: speeds[micro])
    assert "does not fit" in (tmp_path / "table.txt").read_text()

    def nothing(name: str, out: Path, dry_run: bool, seconds: float) -> gpu.Ended:
        assert name == "card"
        return here(name, out, dry_run, seconds)

    assert run(tmp_path, *PARTS, start=nothing)[0] == 0


def test_the_search_begins_at_what_fits_and_ends_where_it_is_slower_or_nothing_is_left() -> None:
    def over(speeds: dict[int, float], start: int, least: int = 1) -> list[int]:
        return list(gpu_parts.search(speeds.get, start=start, most=32, least=least))

    assert over({8: 10.0, 16: 12.0, 4: 9.0}, 8) == [8, 16, 4]
    assert over({32: 10.0, 16: 11.0, 8: 9.0}, 32) == [32, 16, 8]
    assert over({2: 3.0, 1: 2.0}, 12) == [8, 16, 4, 2, 1]
    assert over({8: 10.0, 16: 12.0}, 8, least=8) == [8, 16]
    assert over({2: 3.0}, 8, least=8) == [8, 16, 4, 2]
    assert over({}, 2) == [2, 4, 1]


def test_a_part_whose_time_is_over_or_that_fails_is_said_and_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def start(name: str, out: Path, dry_run: bool, seconds: float) -> gpu.Ended:
        asked.append(name)
        if name == "card":
            return here(name, out, dry_run, seconds)
        write_json(out / f"{name}.json", {"kept": 1})
        return gpu.Ended(-9, late=True) if name == "encoder" else gpu.Ended(1, "no room")

    for _ in range(2):
        code, parts = run(tmp_path, "encoder", "attention", start=start)
        assert code == 1
        assert parts["encoder"]["kept"] == 1
    assert asked == ["card", "encoder", "attention"] * 2
    said = " ".join(capsys.readouterr().out.split())
    assert "encoder: not done in 120 s; the same command goes on with it" in said
    assert "attention: no room (" in said
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "0.1"], start) == 1
    assert asked[-1] == "card"
    assert "no time left; the same command goes on with it" in capsys.readouterr().out


def test_a_process_whose_time_is_over_is_ended(tmp_path: Path) -> None:
    assert gpu.child("attention", tmp_path, True, 0.01).late


def test_results_of_another_card_are_not_mixed_with_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = {"name": "NVIDIA H200", "driver": "570", "torch": "2.11", "cuda": "12.8"}
    write_json(tmp_path / "card.json", card)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)], here) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "holds results of NVIDIA H200, driver 570, torch 2.11, CUDA 12.8, this is" in said
    assert "another --out" in said
    assert read_json(tmp_path / "card.json") == card


def test_tests_that_fail_or_were_all_skipped_are_not_done(tmp_path: Path) -> None:
    case = '<testcase classname="a" name="{}">{}</testcase>'
    kinds = {
        "passed": case.format("p", ""),
        "failed": case.format("f", '<failure message="x"/>'),
        "skipped": case.format("s", '<skipped message="no g++"/>'),
    }

    def read(*names: str, code: int = 0) -> dict[str, Any]:
        body = "".join(kinds[name] for name in names)
        (tmp_path / "t.xml").write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
        return gpu.read_tests(tmp_path / "t.xml", gpu.Ended(code))

    assert read("passed", "skipped") == {
        "passed": 1, "failures": [], "skipped": {"a::s": "no g++"}, "done": True,
    }  # fmt: skip
    assert read("passed", "failed", code=1)["failures"] == ["a::f"]
    for names in (("passed", "failed"), ("skipped",)):
        assert not read(*names)["done"]
    assert not read("passed", code=2)["done"]


# ----------------------------------------------------------------------------------- the card


class Fake:
    """What torch says of a card that is not there."""

    def __init__(self, patch: pytest.MonkeyPatch, **told: Any) -> None:
        self.told = {"there": True, "capability": (9, 0), "used": 0.5, "init": None} | told
        patch.setattr(torch.version, "cuda", "12.8")
        patch.setattr(torch.cuda, "is_available", lambda: self.told["there"])
        patch.setattr(torch.cuda, "init", self.init)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setattr(torch.cuda, "get_device_properties", self.properties)
        free = (140 - self.told["used"]) * 2**30
        patch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 140 * 2**30))
        answers = {"--query-gpu=driver_version": "470.57", "--query-compute-apps": "7, 9000 MiB"}
        patch.setattr(gpu_card, "_ask_driver", lambda *query: answers[query[0].removesuffix(_APPS)])

    def init(self) -> None:
        if self.told["init"]:
            raise RuntimeError(self.told["init"])

    def properties(self, _device: int) -> Any:
        major, minor = self.told["capability"]
        return SimpleNamespace(name="NVIDIA H200", major=major, minor=minor)


_APPS = "=pid,used_memory"
OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"there": False}, "torch sees no CUDA device.*CUDA_VISIBLE_DEVICES.*--dry-run"),
        ({"there": False, "init": OLD}, r"driver 470.57 is older than torch .*update the driver"),
        ({"capability": (7, 5)}, r"capability 7.5 and no bfloat16 products.*Ampere"),
    ],
)
def test_what_stands_in_the_way_is_named_with_its_remedy(
    told: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fake(monkeypatch, **told)
    with pytest.raises(ValueError, match=said):
        gpu_card.find_card()


def test_a_torch_without_cuda_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.main(["--out", str(tmp_path)], here) == 2
    assert "is built without CUDA" in " ".join(capsys.readouterr().out.split())


def test_memory_that_others_hold_is_said_with_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch)
    assert gpu_card.find_card().shared() is None
    Fake(monkeypatch, used=9.3)
    said = gpu_card.find_card().shared()
    assert said is not None
    assert "(process 7: 9000 MiB) holds 9.3 of the 140 GiB" in said
    assert "CUDA_VISIBLE_DEVICES" in said


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA Z1", None),
    ],
)
def test_the_makers_peak_is_that_of_the_cards_name(name: str, tflops: float | None) -> None:
    assert replace(gpu_card.no_card(), name=name).vendor_tflops == tflops


@pytest.mark.slow
@pytest.mark.faults
def test_the_command_goes_the_whole_way_without_a_card(tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "30"]) == 0
    results = read_json(tmp_path / "results.json")
    assert list(results["parts"]) == list(gpu.LIMITS)
    assert results["parts"][gpu.TESTS]["passed"] > 5
