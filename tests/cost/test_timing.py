"""Time: schedules on GPUs against ones made by hand; how long stages took on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny
from midstream.cli.app import app
from midstream.core.storage import write_json
from midstream.cost import GPUS, UTILISATION
from midstream.cost.graph import plan
from midstream.cost.known import Task, schedule
from midstream.cost.taken import measured, reached, seconds_of
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


def finish(
    ledger: Ledger, stage: Stage, seconds: float, device: str | None = None, **more: Any
) -> None:
    with ledger.open_stage(stage) as work:
        if device is not None:
            (work.folder / "starts.jsonl").write_text(json.dumps({"device": device}) + "\n")
        made = {"seconds": seconds, **MADE, "distinct_images": 0, "peak_memory_bytes": 1}
        work.finish(made | more)


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
    assert found.timing.hours == pytest.approx(sum(found.hours.values()))


def test_what_another_machine_did_says_nothing_of_this_one(ledger: Ledger) -> None:
    finish(ledger, tiny.TEXT, 100.0, "cuda")
    path = ledger.folder(tiny.TEXT) / "status.json"
    write_json(path, json.loads(path.read_text()) | {"host": "elsewhere"})

    found = measured(plan(STUDY, ledger), ledger, workers=1)

    assert found.device is None
    assert tiny.SEEN.name not in found.hours


def test_the_utilisation_of_done_stages_is_that_of_their_time_on_such_gpus(ledger: Ledger) -> None:
    assert reached(ledger, GPUS["H100"]) == (UTILISATION, 0)
    for stage, seconds, share, gpu in (
        (tiny.TEXT, 30.0, 0.5, "H100"),
        (tiny.SEEN, 10.0, 0.3, "H100"),
        (tiny.CHAT, 10.0, 0.1, "B200"),
    ):
        peak = GPUS[gpu].tflops * 1e12
        meters = {"gpu": gpu, "model_flops_per_second": share * peak}
        finish(ledger, stage, seconds, meters=meters | {"vendor_flops_per_second": peak})
    share, number = reached(ledger, GPUS["H100"])
    assert (share, number) == (pytest.approx((30 * 0.5 + 10 * 0.3) / 40), 2)


def test_without_planned_flops_a_stage_takes_the_mean_of_its_kind() -> None:
    samples = {"prepare_source": [(0.0, 2.0), (0.0, 4.0)]}
    assert seconds_of("prepare_source", None, samples) == 3.0
    assert seconds_of("evaluate", 1e9, samples) is None
    assert seconds_of("continue", 1e9, samples) is None


def test_plan_says_the_time_here_once_a_stage_was_done_here(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text(
        "from test_timing import STUDY\n"
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


def task(name: str, hours: float, *parents: str, gpus: int = 1, **disk: float) -> Task:
    return Task(name, hours, gpus, parents, **disk)


def test_two_chains_on_two_gpus_run_side_by_side() -> None:
    tasks = [task("text", 4.0), task("a", 3.0, "text"), task("b", 2.0, "text"), task("c", 1.0, "b")]
    found = schedule(tasks, 2)
    assert found.hours == found.critical_hours == found.lower_bound == 7.0
    assert found.critical_path in (("text", "a"), ("text", "b", "c"))
    assert found.starts == {"text": 0.0, "a": 4.0, "b": 4.0, "c": 6.0}
    assert schedule(tasks, 1).hours == schedule(tasks, 1).lower_bound == 10.0


def test_the_longest_way_to_the_end_goes_first() -> None:
    tasks = [task("short", 1.0), task("long", 1.0), task("behind", 5.0, "long")]
    assert schedule(tasks, 1).starts["long"] == 0.0


def test_a_task_of_several_gpus_waits_until_they_are_free() -> None:
    tasks = [task("one", 2.0), task("wide", 1.0, gpus=2)]
    found = schedule(tasks, 2)
    assert found.starts == {"one": 0.0, "wide": 2.0}
    assert found.lower_bound == 2.0
    with pytest.raises(ValueError, match="wide needs 2 GPUs, there are 1"):
        schedule(tasks, 1)


def test_what_runs_takes_disk_only_while_it_runs() -> None:
    tasks = [
        task("first", 1.0, kept=10.0, running=100.0),
        task("second", 1.0, "first", kept=20.0, running=5.0),
    ]
    assert schedule(tasks, 1).peak_bytes == 110.0
    side_by_side = [task("first", 1.0, running=3.0), task("second", 1.0, running=4.0)]
    assert schedule(side_by_side, 2).peak_bytes == 7.0
    assert schedule(side_by_side, 1).peak_bytes == 4.0


@given(hours=st.lists(st.floats(0.001, 1e3), min_size=2, max_size=6))
def test_a_chain_takes_no_less_than_its_bound_to_the_last_digit(hours: list[float]) -> None:
    names = [str(place) for place in range(len(hours))]
    tasks = [task("0", hours[0])]
    tasks += [
        task(name, time, before)
        for before, name, time in zip(names[:-1], names[1:], hours[1:], strict=True)
    ]
    found = schedule(tasks, 2)
    assert found.hours >= found.lower_bound >= found.critical_hours


def test_nothing_to_run_takes_no_time() -> None:
    found = schedule([], 4)
    assert (found.hours, found.critical_path, found.peak_bytes) == (0.0, (), 0.0)


@given(st.data())
def test_a_schedule_keeps_parents_first_and_within_twice_its_bound(data: st.DataObject) -> None:
    number, gpus = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    tasks: list[Task] = []
    for index in range(number):
        parents = data.draw(st.sets(st.sampled_from(range(index)), max_size=3)) if index else ()
        names = tuple(f"t{parent}" for parent in parents)
        hours = float(data.draw(st.integers(0, 9)))
        tasks.append(task(f"t{index}", hours, *names))
    found = schedule(tasks, gpus)
    ends = {one.name: found.starts[one.name] + one.hours for one in tasks}
    assert set(ends) == {one.name for one in tasks}
    for one in tasks:
        assert all(ends[parent] <= found.starts[one.name] for parent in one.parents)
    for at in found.starts.values():
        running = sum(found.starts[one.name] <= at < ends[one.name] for one in tasks)
        assert running <= gpus
    assert found.lower_bound <= found.hours == max(ends.values())
    # Graham's bound of list scheduling.
    assert found.hours <= 2 * found.lower_bound + 1e-9
