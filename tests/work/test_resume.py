"""A stage that is asked to stop does so within one piece of its work; run again, it goes on."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

import tiny
from lives import DEADLINE_SECONDS, born, has_steps, server, wait_for
from midstream.cost.graph import order_of
from midstream.launch.workers import work_line, worker_command, worker_environment, write_work
from midstream.study.stages import Continue, ContinueFrom, Pretrain, Stage
from midstream.study.store import Ledger, Stopped
from midstream.train import checkpoint

# Long enough to be killed along the way: about 60 steps, a checkpoint every third.
LONG_TEXT = tiny.text_run(
    budget=tiny.mixture(40_000, web=1.0).model_copy(update={"max_epochs": 4}),
    checkpoint_every_steps=3,
)
LONG_SEEN = tiny.image_run(
    ContinueFrom(stage=tiny.TEXT, completion=0.4, optimizer="carry"),
    budget=tiny.mixture(44_000, pictures=0.5, web=0.5).model_copy(update={"max_epochs": 4}),
    checkpoint_every_steps=3,
)
Trained = Pretrain | Continue


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    return server()


@pytest.fixture(scope="module")
def ledger(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """The image run without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    mine = tiny.begun(tiny_ledger, folder)
    tiny.run_missing(mine, LONG_SEEN)
    return mine


def test_stages_run_in_two_stores_give_equal_bits(
    tiny_ledger: Ledger, tiny_line: Ledger, tmp_path: Path
) -> None:
    mine = tiny.store_with(tiny_ledger, tmp_path, tiny.DATA, tiny.ENCODER_STAGE)
    tiny.run_missing(mine, tiny.SEEN)
    assert tiny.bits(mine, tiny.TEXT) == tiny.bits(tiny_ledger, tiny.TEXT)
    assert tiny.bits(mine, tiny.SEEN) == tiny.bits(tiny_line, tiny.SEEN)
    assert len(mine.metrics(tiny.SEEN)) > 5
    other = tiny.image_run(seed=1)
    tiny.run_missing(mine, other)
    assert mine.results(tiny.SEEN)["weights_digest"] != mine.results(other)["weights_digest"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [pytest.param(LONG_TEXT, marks=pytest.mark.faults), LONG_SEEN],
    ids=lambda stage: stage.kind,
)
def test_a_stage_killed_at_random_moments_gives_the_uninterrupted_bits(
    ledger: Ledger,
    tiny_ledger: Ledger,
    processes: ForkServerContext,
    tmp_path: Path,
    stage: Trained,
) -> None:
    tiny.run_missing(ledger, stage)
    mine, chance = tiny.begun(tiny_ledger, tmp_path), random.Random(7)
    num_steps = ledger.results(stage)["steps"]
    assert num_steps > 40
    # Before the first checkpoint, and at two random moments of the rest.
    parts = ((0.25, 0.35), (0.5, 0.6))
    moments = [1, *(round(num_steps * chance.uniform(*part)) for part in parts)]
    path = mine.folder(stage) / "metrics.jsonl"
    for moment in moments:
        process = born(processes, mine, stage)
        wait_for(has_steps(mine, stage, moment), process.is_alive)
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert mine.state(stage) == "stopped"
    found = path.read_bytes().splitlines()
    last = born(processes, mine, stage)
    last.join(DEADLINE_SECONDS)
    assert last.exitcode == 0
    assert mine.state(stage) == "done"
    assert tiny.bits(mine, stage) == tiny.bits(ledger, stage)
    assert not list(mine.folder(stage).rglob(".*"))
    # Two runs of a step differ in their seconds: these lines were written once, so the last life
    # went on from a checkpoint and not from the start. The newest one may have been on its way to
    # the disk when the process was killed, the one before it was there.
    once = moments[-1] - 2 * stage.training.checkpoint_every_steps
    assert once > 0
    assert path.read_bytes().splitlines()[:once] == found[:once]


@pytest.mark.slow
def test_a_worker_asked_to_end_keeps_a_checkpoint_and_the_next_goes_on_to_equal_bits(
    ledger: Ledger, tiny_ledger: Ledger, processes: ForkServerContext, tmp_path: Path
) -> None:
    mine = tiny.begun(tiny_ledger, tmp_path)
    file = write_work(mine.store / "work.json", mine.store, tiny.MACHINE)
    worker = subprocess.Popen(
        worker_command(file),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=worker_environment(tiny.MACHINE),
    )
    assert worker.stdin is not None
    worker.stdin.write(work_line(LONG_SEEN).encode())
    worker.stdin.flush()
    wait_for(has_steps(mine, LONG_SEEN, 10), lambda: worker.poll() is None)
    worker.send_signal(signal.SIGTERM)
    out, problems = worker.communicate(timeout=DEADLINE_SECONDS)
    assert worker.returncode == 0
    assert b"Traceback" not in problems
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == [
        "ready",
        "started",
        "finished",
    ]
    assert events[-1]["state"] == "stopped"
    assert mine.status(LONG_SEEN)["state"] == "stopped"
    num_steps = len(mine.metrics(LONG_SEEN))
    assert events[-1]["error"].startswith(f"stopped after step {num_steps} of ")
    kept = [path.name for path in checkpoint.by_age(mine.folder(LONG_SEEN) / "checkpoints")]
    assert kept[0] == f"step-{num_steps:08d}"
    again = born(processes, mine, LONG_SEEN)
    again.join(DEADLINE_SECONDS)
    assert tiny.bits(mine, LONG_SEEN) == tiny.bits(ledger, LONG_SEEN)


PREPARING = [stage for stage in order_of(tiny.RESULT) if stage.kind.startswith("prepare")]
STORED = tiny.MACHINE.model_copy(update={"features": "stored"})


def after(asks: int) -> Callable[[], bool]:
    """Says yes once it was asked so often."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > asks

    return should_stop


def stopped(ledger: Ledger, stage: Stage, asks: int) -> str:
    """Why the stage stopped."""
    with pytest.raises(Stopped) as reason:
        tiny.runner(ledger, should_stop=after(asks), machine=STORED).run(stage)
    assert ledger.state(stage) == "stopped"
    return str(reason.value)


def test_a_stage_that_prepares_data_stops_between_its_parts(tmp_path: Path) -> None:
    ledger, stage = Ledger(tmp_path), PREPARING[-1]
    tiny.run_missing(ledger, *stage.parents)
    assert "is kept" in stopped(ledger, stage, 0)
    tiny.runner(ledger).run(stage)
    assert ledger.is_done(stage)


def test_an_encoder_in_training_stops_between_its_steps(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path, *PREPARING)
    assert "after step 2 of 3" in stopped(ledger, tiny.ENCODER_STAGE, 2)
    tiny.runner(ledger).run(tiny.ENCODER_STAGE)
    assert tiny.bits(ledger, tiny.ENCODER_STAGE) == tiny.bits(tiny_ledger, tiny.ENCODER_STAGE)


def test_a_stage_that_stores_features_stops_there_and_then_stores_the_rest(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path, *PREPARING, tiny.ENCODER_STAGE, tiny.TEXT)
    assert "features were stored" in stopped(ledger, tiny.SEEN, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "features").rglob("features.bin")}
    assert before
    assert not ledger.metrics(tiny.SEEN)
    tiny.runner(ledger, machine=STORED).run(tiny.SEEN)
    after_all = {path: path.read_bytes() for path in (tmp_path / "features").rglob("features.bin")}
    assert len(after_all) > len(before)
    assert all(after_all[path] == content for path, content in before.items())
