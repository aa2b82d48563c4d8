"""A stage that is asked to stop does so within one piece of its work, and goes on when it is run
again."""

from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from midstream.cost.graph import order
from midstream.study.stages import Stage
from midstream.study.store import Ledger, Stopped
from midstream.study.studies import Figure, Line, Study

STUDY = Study(
    name="tiny",
    question="Does every stage stop?",
    lines=(Line(name="tiny", axes={"x": 0}, result=tiny.RESULT),),
    figure=Figure(x="x", x_label="x"),
)
PREPARING = [stage for stage in order(STUDY) if stage.kind.startswith("prepare")]
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
