"""`midstream plan` of the paper's suite: what it says, and what it takes to say it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from midstream.cli.app import app
from midstream.cli.catalogue import find_study
from midstream.core.storage import write_json
from midstream.study.store import Ledger

MAX_MIB = 500
# The peak of a process that is asked for a plan, with torch never imported.
PROGRAM = """
import re, sys
from pathlib import Path
from midstream.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as reason:
    assert not reason.code
assert "torch" not in sys.modules
# Of this program: what getrusage says includes the process that it was forked from.
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def planned(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", *arguments])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = tmp_path_factory.mktemp("empty")
    arguments = ["plan", "paper.suite", "--set", "scale=1b", "--store", str(store), "--json"]
    arguments += ["--gpu", "H100", "--gpus", "64"]
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    text, _, peak = found.stdout.rstrip().rpartition("\n")
    values: dict[str, Any] = json.loads(text)
    return values | {"peak_mib": int(peak)}


def test_the_suite_at_1b_is_planned_in_little_memory_and_without_torch(
    suite: dict[str, Any],
) -> None:
    assert suite["num_lines"] >= 200
    assert suite["peak_mib"] < MAX_MIB


def test_the_suite_at_1b_is_priced_whole_before_any_data_is_there(suite: dict[str, Any]) -> None:
    price = suite["price"]
    assert suite["num_unknown"] == 0
    assert price["too_large"] == []
    assert sum(price["flops_by_part"].values()) == pytest.approx(suite["flops"])
    hours = [stage["gpu_hours"] for stage in price["by_stage"].values()]
    assert sum(hours) == pytest.approx(price["gpu_hours"])
    needed = sum(stage["model_flops"] for stage in price["by_stage"].values())
    a_second = price["gpu"]["tflops"] * 1e12 * price["utilisation"]
    assert price["gpu_hours"] == pytest.approx(needed / a_second / 3600)
    assert price["gpu_hours_once"] < price["gpu_hours_alone"]
    assert price["wall_hours"] >= price["lower_bound_hours"] >= price["critical_path_hours"]
    chain = [stage.split("-")[0] for stage in price["critical_path"]]
    assert chain[-1] == "evaluate"
    trained = [stage for stage in price["by_stage"].values() if stage["memory"]]
    assert trained
    for stage in trained:
        assert stage["fits"]
        assert stage["micro_rows"] >= 1


def test_a_plan_says_hours_wall_time_memory_and_disk(tmp_path: Path) -> None:
    found = planned(
        "pocket.when_images_arrive", "--store", str(tmp_path), "--gpu", "100:10", "--gpus", "2"
    )
    assert found.exit_code == 0, found.output
    for text in ("by part: decoder", "100:10 at 31.3%", "GPU-hours", "on 2 GPUs:", "critical path"):
        assert text in found.stdout
    assert "GiB stay" in found.stdout
    assert "memory: at most" in found.stdout
    assert "with the text runs given" in found.stdout
    assert "unknown until their data is prepared" in found.stdout


def test_what_is_no_gpu_or_no_utilisation_is_refused_with_what_there_is(tmp_path: Path) -> None:
    found = planned("pocket.when_images_arrive", "--store", str(tmp_path), "--gpu", "A100")
    assert found.exit_code == 2
    assert "A100-80" in found.output
    found = planned("pocket.when_images_arrive", "--store", str(tmp_path), "--utilisation", "40")
    assert found.exit_code == 2
    assert "not 40" in found.output


def test_a_plan_ends_with_2_where_the_study_is_wrong_and_with_0_where_a_machine_lacks_something(
    tmp_path: Path,
) -> None:
    arguments = ("pocket.when_images_arrive", "--store", str(tmp_path), "--json")
    good = planned(*arguments)
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["problems"] == []
    lacking = planned("paper.table_5", "--set", "scale=79m", "--store", str(tmp_path), "--json")
    assert lacking.exit_code == 0, lacking.output
    told = json.loads(lacking.stdout)["problems"]
    assert {problem["level"] for problem in told} == {"lacking"}
    assert "was planned without the data of" in told[0]["what"]
    assert "(--set)" in told[0]["remedy"]


@pytest.mark.parametrize("command", ["plan", "status"])
def test_a_store_of_an_earlier_version_is_named_in_one_sentence(
    tmp_path: Path, command: str
) -> None:
    study = "pocket.when_images_arrive"
    ledger = Ledger(tmp_path)
    ledger.save_study(find_study(study, []))
    found = CliRunner().invoke(app, [command, study, "--store", str(tmp_path)])
    assert found.stderr == ""
    # Up to format 4 the data of a study was one stage.
    write_json(tmp_path / "prepare-0123456789abcdef" / "stage.json", {"kind": "prepare"})
    found = CliRunner().invoke(app, [command, study, "--store", str(tmp_path)])
    assert found.exit_code == 0, found.output
    (line,) = found.stderr.splitlines()
    assert f"store {tmp_path} holds stages of an earlier version" in line
    assert "give another --store" in line
    # Its kept studies may hold what no longer can be read.
    write_json(tmp_path / "studies" / "mine.json", {"kind": "study", "name": "mine"})
    found = CliRunner().invoke(app, ["status", "mine", "--store", str(tmp_path)])
    assert found.exit_code == 2
    assert isinstance(found.exception, SystemExit)
    assert "mine.json is of another version of Midstream" in found.stderr


def test_a_plan_says_what_image_text_training_is_beside_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("--set", "completions=[0.8]", "--set", "seeds=[1]", "--store", str(tmp_path))
    once = planned("paper.figure_4", "--set", "epochs=[1]", *settings).stdout
    assert "image-text to fine-tuning: 21 to 1 in tokens (the paper's 11 to 1)" in once
    assert "5.2 to 1 in pictures (1.5 to 1)" in once
    both = planned("paper.figure_4", "--set", "epochs=[1,4]", *settings).stdout
    assert "image-text to fine-tuning: between 5.1 and 21 to 1 in tokens" in both
    # Where a stage's sources are not known nothing is, least of all that it shows no picture.
    monkeypatch.setattr(
        "midstream.cost.cost.images_seen",
        lambda stage, *_: None if stage.kind == "continue" else 9,
    )
    assert "image-text to fine-tuning" not in planned("paper.figure_4", *settings).stdout


def test_home_is_meant_also_where_the_shell_leaves_it(tmp_path: Path) -> None:
    runner = CliRunner(env={"HOME": str(tmp_path), "COLUMNS": "400"})
    for arguments in (
        ["report", "mine", "--store=~/none"],
        ["plan", "own_model.fine_tuning", "--set", "model=~/none", "--set", "data=~/none"],
        ["plan", "~/none.py:study"],
    ):
        found = runner.invoke(app, arguments)
        assert found.exit_code == 2
        assert f"{tmp_path}/none" in found.output
