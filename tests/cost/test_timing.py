"""Stages on GPUs: order, critical path, bounds and disk, against schedules made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.cost.known import Task, schedule


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
