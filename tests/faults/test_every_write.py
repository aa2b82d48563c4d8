"""A stage that is killed, or finds no room, at any change of a file ends in the same bits.

The k-th change, for every k of a run; and kills at random moments on top, for what lies between.
`make test` takes some of them, `make faults` all.
"""

import json
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

import tiny
from lives import DEADLINE_SECONDS, Fault, born, has_steps, server, wait_for
from midstream.study.store import Ledger

pytestmark = pytest.mark.slow

# Seven steps, a checkpoint every second, two milestones.
SHORT = tiny.text_run(total_tokens=5_000, checkpoint_every_steps=2).model_copy(
    update={"milestones": (0.5, 1.0)}
)
LONG = tiny.text_run(
    budget=tiny.mixture(80_000, web=1.0).model_copy(update={"max_epochs": 8}),
    checkpoint_every_steps=3,
)
NUM_KILLS = 60
# Of the changes of a run, those that `make test` tries.
SHARE = 24


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    return server()


@pytest.fixture(scope="module")
def whole(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """The short stage without a fault."""
    mine = tiny.store_with(tiny_ledger, tmp_path_factory.mktemp("whole"), tiny.DATA)
    tiny.run_missing(mine, SHORT)
    return mine


def ended(ledger: Ledger, processes: ForkServerContext, fault: Fault | None) -> int:
    process = born(processes, ledger, SHORT, fault)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.faults, id="every"), pytest.param(SHARE, id="some")]
)
def test_a_stage_killed_at_a_change_of_a_file_ends_in_the_uninterrupted_bits(
    whole: Ledger, tiny_ledger: Ledger, processes: ForkServerContext, tmp_path: Path, step: int
) -> None:
    right, at, num_killed = tiny.bits(whole, SHORT), 1, 0
    while True:
        mine = tiny.store_with(tiny_ledger, tmp_path / str(at), tiny.DATA)
        code = ended(mine, processes, Fault("kill", at))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        num_killed += 1
        # The last change is the success mark's: killed behind it, the stage is done.
        if not mine.is_done(SHORT):
            assert ended(mine, processes, None) == 0
        assert tiny.bits(mine, SHORT) == right
        assert not list(mine.folder(SHORT).rglob(".*.tmp"))
        at += step
    assert num_killed >= 60 // step
    print(f"killed at {num_killed} changes")


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.faults, id="every"), pytest.param(SHARE, id="some")]
)
def test_a_full_disk_at_any_write_is_an_error_that_names_it_and_costs_nothing(
    whole: Ledger, tiny_ledger: Ledger, processes: ForkServerContext, tmp_path: Path, step: int
) -> None:
    right, at, num_failed = tiny.bits(whole, SHORT), 1, 0
    while True:
        mine = tiny.store_with(tiny_ledger, tmp_path / str(at), tiny.DATA)
        ended(mine, processes, Fault("full", at))
        if mine.is_done(SHORT):
            break
        num_failed += 1
        status = mine.status(SHORT)
        # Where the status itself found no room, the stage counts as stopped.
        if status["state"] == "failed":
            assert "No space left" in status["error"] or "no room" in status["error"]
        assert ended(mine, processes, None) == 0
        assert tiny.bits(mine, SHORT) == right
        at += step
    assert num_failed >= 24 // step
    print(f"no room at {num_failed} writes")


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before_it_whole(
    whole: Ledger, tiny_ledger: Ledger, processes: ForkServerContext, tmp_path: Path
) -> None:
    mine = tiny.store_with(tiny_ledger, tmp_path, tiny.DATA)
    weights = tiny.DECODER.num_parameters * 4
    ended(mine, processes, Fault("limit", largest_bytes=weights // 2))
    status = mine.status(SHORT)
    assert status["state"] == "failed"
    assert "no room to write" in status["error"]
    assert "make room and run the same command again" in status["error"]
    assert ended(mine, processes, None) == 0
    assert tiny.bits(mine, SHORT) == tiny.bits(whole, SHORT)


@pytest.mark.faults
def test_sixty_kills_at_random_moments_leave_the_uninterrupted_bits(
    whole: Ledger, tiny_ledger: Ledger, processes: ForkServerContext, tmp_path: Path
) -> None:
    tiny.run_missing(whole, LONG)
    chance, right = random.Random(11), tiny.bits(whole, LONG)
    num_steps, num_kills, num_runs = len(right["metrics"]), 0, 0
    while num_kills < NUM_KILLS:
        mine = tiny.store_with(tiny_ledger, tmp_path / str(num_runs), tiny.DATA)
        done = 0
        while not mine.is_done(LONG):
            process = born(processes, mine, LONG)
            if num_kills < NUM_KILLS and done < num_steps - 6:
                # Behind what the last life kept, so that every run comes to its end.
                done += chance.randint(1, 12)
                goal = min(done, num_steps - 4)
                wait_for(has_steps(mine, LONG, goal), process.is_alive)
                time.sleep(chance.uniform(0.0, 0.04))
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    num_kills += 1
            process.join(DEADLINE_SECONDS)
            assert process.exitcode in (0, -signal.SIGKILL)
        assert tiny.bits(mine, LONG) == right
        num_runs += 1
    print(json.dumps({"kills": num_kills, "runs": num_runs}))
