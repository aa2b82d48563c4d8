"""`midstream profile`: the real command on a tiny store."""

import json
from pathlib import Path

import pytest
from typer.testing import Result

import tiny
from faults.launched import recipe
from in_process import stay_here
from inputs import midstream
from midstream.study.store import Ledger


def profiled(ledger: Ledger, out: Path, steps: int) -> Result:
    command = ("profile", recipe(out.parent), "--store", ledger.store, "--device", "cpu")
    return midstream(*command, "--out", out, "--steps", steps)


@pytest.mark.slow
def test_a_profile_has_meters_a_trace_and_a_page_and_leaves_the_store_alone(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    mine = tiny.store_with(tiny_ledger, tmp_path / "store", tiny.DATA)
    before = sorted(path for path in mine.store.rglob("*"))
    ended = profiled(mine, tmp_path / "out", 3)
    assert ended.exit_code == 0, ended.stderr
    assert "useful" in ended.stdout
    assert "of what a matrix product reaches" in " ".join(ended.stdout.split())
    assert sorted(path for path in mine.store.rglob("*")) == before
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["meters"]["time_shares"]["model"] > 0.1
    assert summary["parameters"]["decoder"]["trained"] == tiny.DECODER.num_parameters
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    page = (tmp_path / "out" / "summary.html").read_text()
    assert summary["stage"] in page
    assert "aten::" in page
    assert "<script" not in page


def test_a_stage_that_is_too_short_or_lacks_its_data_is_refused(
    tiny_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay_here(monkeypatch)
    short = "3004 are wanted, 4 of them to warm up and for the trace; give --steps "
    for ledger, steps, said in (
        (tiny_ledger, 3000, short),
        (Ledger(tmp_path / "empty"), 3, "not done"),
    ):
        ended = profiled(ledger, tmp_path / "out", steps)
        assert ended.exit_code == 2
        assert said in ended.stderr
    assert not (tmp_path / "out").exists()
