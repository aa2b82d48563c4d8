import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from midstream.cli.app import app
from midstream.core.storage import write_json
from midstream.cost.graph import plan
from midstream.cost.taken import measured, seconds_of
from midstream.study.stages import Stage
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study

STUDY = Study(
    name="mine",
    question="?",
    lines=(Line(name="line", axes={"x": 1}, result=tiny.RESULT),),
    figure=Figure(x="x", x_label="x"),
)
MADE = {"kind": "text", "num_examples": 10, "num_tokens": 900, "num_images": 0}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A store whose data is prepared."""
    ledger = Ledger(tmp_path / "store")
    for stage in tiny.PREPARED:
        finish(ledger, stage, 1.0)
    return ledger


def finish(ledger: Ledger, stage: Stage, seconds: float, device: str | None = None) -> None:
    with ledger.open_stage(stage) as work:
        if device is not None:
            (work.folder / "starts.jsonl").write_text(json.dumps({"device": device}) + "\n")
        work.finish({"seconds": seconds, **MADE, "distinct_images": 0, "peak_memory_bytes": 1})


def test_nothing_measured_gives_no_number(tmp_path: Path) -> None:
    found = measured(plan(STUDY, Ledger(tmp_path)), Ledger(tmp_path), workers=2)
    assert (found.timing, found.num_samples, dict(found.hours)) == (None, 0, {})
    assert found.num_untimed == len(plan(STUDY, Ledger(tmp_path)).rows)


def test_a_stage_takes_its_flops_at_the_speed_of_what_was_done_here(ledger: Ledger) -> None:
    finish(ledger, tiny.TEXT, 100.0, "cpu")
    work = plan(STUDY, ledger)
    flops = {row.stage.name: row.cost.flops or 0.0 for row in work.rows}

    found = measured(work, ledger, workers=2)

    speed = flops[tiny.TEXT.name] / 100.0
    for stage in (tiny.SEEN, tiny.CHAT):  # as fast as the other kind of training
        assert found.hours[stage.name] == pytest.approx(flops[stage.name] / speed / 3600)
    assert found.num_samples == len(tiny.PREPARED) + 1
    assert found.num_untimed == 2  # encoder and evaluation
    assert found.device == "cpu"
    assert found.timing is not None
    assert found.timing.hours == pytest.approx(sum(found.hours.values()))


def test_what_another_machine_did_says_nothing_of_this_one(ledger: Ledger) -> None:
    finish(ledger, tiny.TEXT, 100.0, "cuda")
    path = ledger.folder(tiny.TEXT) / "status.json"
    write_json(path, json.loads(path.read_text()) | {"host": "elsewhere"})

    found = measured(plan(STUDY, ledger), ledger, workers=1)

    assert found.device is None
    assert tiny.SEEN.name not in found.hours


def test_without_planned_flops_a_stage_takes_the_mean_of_its_kind() -> None:
    samples = {"prepare_source": [(0.0, 2.0), (0.0, 4.0)]}
    assert seconds_of("prepare_source", None, samples) == 3.0
    assert seconds_of("evaluate", 1e9, samples) is None
    assert seconds_of("continue", 1e9, samples) is None


def test_plan_says_the_time_here_once_a_stage_was_done_here(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text(
        "from test_measured import STUDY\n"
        "from midstream.study.studies import Study\n"
        "def study() -> Study:\n    return STUDY\n"
    )

    def planned() -> str:
        arguments = ["plan", f"{file}:study", "--store", str(ledger.store)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code in (0, 2), result.output
        return result.stdout

    finish(ledger, tiny.TEXT, 3600.0, "cpu")
    (line,) = [one for one in planned().splitlines() if one.startswith("this machine")]
    assert line.startswith("this machine (cpu): about ")
    assert "with 2 workers" in line
    assert f"{len(tiny.PREPARED) + 1} done stages took; 2 stages of kinds not measured" in line
