import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from midstream.cost.graph import order
from midstream.launch.overview import Board, Overview, StageView, overview_json
from midstream.launch.slurm_job import Entry, JobBook
from midstream.study.stages import (
    DataStage,
    Evaluate,
    Finetune,
    PrepareWorld,
    Pretrain,
    Stage,
    TrainEncoder,
)
from midstream.study.store import Ledger, launch_lock
from midstream.study.studies import Study

MakeStudy = Callable[..., Study]


@pytest.fixture
def study(make_study: MakeStudy) -> Study:
    return make_study()


@pytest.fixture
def ledger(tmp_path: Any) -> Ledger:
    return Ledger(tmp_path / "store")


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def first(study: Study, kind: type) -> Stage:
    return next(stage for stage in order(study) if isinstance(stage, kind))


def finish(ledger: Ledger, stage: Stage, seconds: float = 10.0) -> None:
    made = {"kind": "text", "num_examples": 10, "num_tokens": 900, "num_images": 0}
    with ledger.open_stage(stage) as work:
        work.finish({"seconds": seconds, **made, "distinct_images": 0})


def view(seen: Overview, stage: Stage) -> StageView:
    return next(one for one in seen.stages if one.name == stage.name)


def steps(ledger: Ledger, stage: Stage, *tokens: int) -> None:
    lines = [
        {"step": k, "tokens_seen": seen, "loss": 2.0, "seconds": 1.0}
        for k, seen in enumerate(tokens, start=1)
    ]
    path = ledger.folder(stage) / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_study_that_nobody_has_run_is_new_idle_and_of_unknown_time(
    study: Study, ledger: Ledger
) -> None:
    seen = Board(study, ledger).look()
    assert seen.counts == {"running": 0, "failed": 0, "stopped": 0, "new": 14, "done": 0}
    assert (seen.active, seen.settled, seen.seconds_left) == (False, False, None)
    assert seen.num_unestimated == len(seen.stages) == 14


def test_a_running_stage_tells_share_loss_speed_time_left_and_place(
    study: Study, ledger: Ledger, held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    finish(ledger, first(study, PrepareWorld))
    text = first(study, Pretrain)
    work = held.enter_context(ledger.open_stage(text))
    held.callback(work.finish, {})
    steps(ledger, text, 1_000, 2_000, 3_000)
    JobBook.of(ledger.store).note({text.name: Entry("midstream-pretrain-1", "77")})
    seen = Board(study, ledger).look()
    found = view(seen, text)
    assert (found.state, found.sign.done, found.sign.loss) == ("running", 0.3, 2.0)
    assert (found.sign.tokens_per_second, found.sign.seconds_left) == (1000.0, 7.0)
    assert found.where.endswith("4 ranks, job 77")
    assert f"{found.host}:{found.pid}" in found.where
    assert seen.active
    assert not seen.settled
    values = json.loads(json.dumps(overview_json(seen)))
    assert values["counts"]["running"] == 1
    row = next(one for one in values["stages"] if one["name"] == text.name)
    assert (row["done"], row["job"], row["ranks"]) == (0.3, "77", 4)


def test_the_time_left_follows_from_finished_stages_speed_and_planned_flops(
    study: Study, ledger: Ledger
) -> None:
    text = first(study, Pretrain)
    for data in order(study):
        if isinstance(data, DataStage):
            finish(ledger, data, 5.0)
    finish(ledger, first(study, TrainEncoder), 5.0)
    finish(ledger, text, 100.0)
    board = Board(study, ledger)
    seen = board.look()
    speed = (view(seen, text).flops or 0.0) / 100.0
    todo = [one for one in seen.stages if one.state == "new"]
    trained = [one for one in todo if one.kind in ("continue", "finetune")]
    # Nothing runs: one after the other. Evaluations are not timed yet.
    assert seen.seconds_left == pytest.approx(sum(one.flops or 0 for one in trained) / speed)
    assert seen.num_unestimated == len(todo) - len(trained) == 3
    chat = first(study, Finetune)
    finish(ledger, chat.parents[0], 40.0)
    finish(ledger, chat, 20.0)
    again = board.look()
    (seen_twin,) = [o for o in again.stages if o.state == "new" and o.kind == "continue"]
    (chat_twin,) = [o for o in again.stages if o.state == "new" and o.kind == "finetune"]
    assert seen_twin.flops == view(again, chat.parents[0]).flops
    assert chat_twin.flops == view(again, chat).flops
    # Their own kinds are known now.
    assert again.seconds_left == pytest.approx(60.0)


def test_stages_behind_a_failed_one_are_blocked_and_settle_the_study(
    study: Study, ledger: Ledger
) -> None:
    data = first(study, PrepareWorld)
    ledger.mark_failed(data, "ValueError: bad")
    seen = Board(study, ledger).look()
    assert view(seen, data).error == "ValueError: bad"
    assert seen.num_blocked == len(seen.stages) - 1
    assert seen.settled
    assert not seen.active


def test_a_stage_whose_process_died_is_stopped_and_says_how_far_it_was(
    study: Study, ledger: Ledger
) -> None:
    finish(ledger, first(study, PrepareWorld))
    text = first(study, Pretrain)
    with pytest.raises(KeyboardInterrupt), ledger.open_stage(text):
        raise KeyboardInterrupt
    steps(ledger, text, 1_000, 2_000)
    found = view(Board(study, ledger).look(), text)
    assert (found.state, found.sign.done, found.sign.seconds_left) == ("stopped", 0.2, None)


def test_a_launcher_and_a_job_in_the_queue_keep_a_study_alive(study: Study, ledger: Ledger) -> None:
    board = Board(study, ledger)
    with launch_lock(ledger.store):
        assert board.look().active
    assert not board.look().active
    JobBook.of(ledger.store).note({first(study, Evaluate).name: Entry("midstream-evaluate-1", "5")})
    assert board.look().active


def test_looking_changes_nothing_in_the_store(study: Study, ledger: Ledger) -> None:
    finish(ledger, first(study, PrepareWorld))
    ledger.mark_failed(first(study, Pretrain), "bad")
    before = {path: path.stat().st_mtime_ns for path in ledger.store.rglob("*")}
    Board(study, ledger).look()
    assert {path: path.stat().st_mtime_ns for path in ledger.store.rglob("*")} == before
