"""Signals to, and losses of, one process of many: the run stops or fails by name, and goes on.

Each case is the real command with torchrun's processes below it (reliability.md P7 to P9 of the
reference facts: a signal costs nothing, a lost rank is named, one writer).
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

import tiny
from faults import launched
from faults.launched import (
    ENDLESS,
    LONG,
    agent,
    finish,
    has_steps,
    launch,
    losses,
    ranks,
    wait_for,
)
from midstream.study.label import label
from midstream.study.store import Ledger

pytestmark = pytest.mark.slow

STOPPED = 75


@pytest.fixture
def ledger(tiny_ledger: Ledger, tmp_path: Path) -> Ledger:
    return tiny.store_with(tiny_ledger, tmp_path / "store", tiny.DATA)


@pytest.fixture(scope="module")
def whole(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the stage on one rank, without an interruption."""
    ledger = tiny.store_with(tiny_ledger, tmp_path_factory.mktemp("whole"), tiny.DATA)
    tiny.run_missing(ledger, LONG)
    return losses(ledger)


def target(name: str, launcher: int) -> int:
    match name:
        case "launcher":
            return launcher
        case "torchrun":
            return agent(launcher)
        case _:
            return ranks(launcher)[int(name.removeprefix("rank "))]


def signalled(number: signal.Signals, to: str) -> object:
    # One pair in every run, all of them among the faults.
    marks = () if (number, to) == (signal.SIGUSR1, "rank 1") else (pytest.mark.faults,)
    return pytest.param(number, to, marks=marks, id=f"{number.name} to {to}")


@pytest.mark.parametrize(
    ("number", "to"),
    [
        signalled(number, to)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        for to in ("launcher", "torchrun", "rank 0", "rank 1")
    ],
)
def test_a_signal_to_any_process_stops_all_at_the_next_step_and_costs_none(
    ledger: Ledger, whole: list[float], number: signal.Signals, to: str
) -> None:
    process = launch(ledger, "--ranks", "2")
    wait_for(has_steps(ledger, 10), process)
    mine = ranks(process.pid)
    os.kill(target(to, process.pid), number)
    text = finish(process)
    assert process.returncode == STOPPED, text
    assert "the same command continues" in text
    assert ledger.status(LONG)["state"] == "stopped"
    kept = sorted((ledger.folder(LONG) / "checkpoints").glob("step-*"))
    num_steps = len(losses(ledger))
    assert kept[-1].name == f"step-{num_steps:08d}"
    assert num_steps < len(whole)
    assert not [pid for pid in mine.values() if Path(f"/proc/{pid}").exists()]
    # Here, on one rank: that ranks go on by a command is for the test of a frozen one.
    tiny.run_missing(ledger, LONG)
    assert losses(ledger) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("number", "rank", "said"),
    [
        pytest.param(signal.SIGKILL, 1, "rank 1 is dead", id="killed"),
        pytest.param(
            signal.SIGSTOP, 1, "rank 1 is dead: silent", id="frozen", marks=pytest.mark.faults
        ),
        pytest.param(
            signal.SIGKILL, 0, "rank 0 is dead", id="first killed", marks=pytest.mark.faults
        ),
    ],
)
def test_a_dead_or_silent_rank_is_named_within_a_minute_and_a_retry_goes_on(
    ledger: Ledger, whole: list[float], number: signal.Signals, rank: int, said: str
) -> None:
    process = launch(ledger, "--ranks", "2")
    wait_for(has_steps(ledger, 30), process)
    mine = ranks(process.pid)
    os.kill(mine[rank], number)
    before = time.monotonic()
    try:
        text = finish(process, 60.0)
    finally:
        if Path(f"/proc/{mine[rank]}").exists():
            os.kill(mine[rank], signal.SIGKILL)
    print(f"named after {time.monotonic() - before:.1f} s")
    assert process.returncode == 1, text
    assert said in " ".join(text.split())
    status = ledger.status(LONG)
    assert status["state"] == "failed"
    assert said in status["error"]
    if number == signal.SIGSTOP:
        again = launch(ledger, "--ranks", "2", "--retry")
        text = finish(again)
        assert again.returncode == 0, text + (ledger.store / "worker-1.log").read_text()
    else:
        tiny.run_missing(ledger, LONG)
    assert losses(ledger) == pytest.approx(whole, rel=1e-6)


@pytest.mark.faults
def test_ranks_leave_a_launcher_that_was_killed_and_keep_a_checkpoint(
    ledger: Ledger, whole: list[float]
) -> None:
    process = launch(ledger, "--ranks", "2")
    wait_for(has_steps(ledger, 10), process)
    mine = ranks(process.pid)
    process.kill()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in mine.values()):
        assert time.monotonic() < end, "a rank stayed"
        time.sleep(0.1)
    process.communicate()
    assert ledger.status(LONG)["state"] == "stopped"
    tiny.run_missing(ledger, LONG)
    assert losses(ledger) == pytest.approx(whole, rel=1e-6)


@pytest.mark.faults
def test_a_second_launcher_leaves_at_once_and_writes_nothing(ledger: Ledger) -> None:
    process = launch(ledger, stage=ENDLESS)
    wait_for(has_steps(ledger, 5, ENDLESS), process)
    mine = sorted(path for path in ledger.store.rglob("*") if "worker-" in path.name)
    before = {path: path.stat().st_mtime_ns for path in mine if path.suffix == ".json"}
    second = launch(ledger, "--ranks", "2", stage=ENDLESS)
    text = finish(second, 20.0)
    assert second.returncode == 2, text
    assert "in use by another launcher" in " ".join(text.split())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    process.send_signal(signal.SIGTERM)
    assert "stopped" in finish(process)
    assert process.returncode == STOPPED


@pytest.mark.faults
def test_two_nodes_train_one_stage_through_one_store(ledger: Ledger, whole: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ("--nodes", "2", "--master", f"127.0.0.1:{port}")
    second = launch(ledger, *shared, "--node", "1")
    first = launch(ledger, *shared)
    text = finish(first)
    assert first.returncode == 0, text
    told = finish(second)
    assert second.returncode == 0, told
    assert f"node 1 trains {label(LONG)}" in told
    assert losses(ledger) == pytest.approx(whole, rel=1e-6)
    assert launched.has_steps(ledger, len(whole))()
