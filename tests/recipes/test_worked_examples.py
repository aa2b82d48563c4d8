"""The worked examples of docs/studies.md: they plan, and the first one runs."""

from pathlib import Path
from typing import Any

import pytest

import tiny
from checkpoints import save_checkpoint
from midstream.cli.catalogue import find_study
from midstream.config import ContinuedCosine, WarmupCosine
from midstream.cost.graph import order, plan
from midstream.exchange.import_model import import_model
from midstream.exchange.import_source import ImportRequest
from midstream.study.results import StableScores
from midstream.study.stages import Continue, ContinueFrom, Pretrain, TrainEncoder
from midstream.study.store import Ledger
from midstream.study.studies import Study
from vision_checkpoints import save_tower

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(name: str, **settings: Any) -> Study:
    given = [f"{key}={value}" for key, value in settings.items()]
    study = find_study(f"{EXAMPLES / name}.py:study", given)
    return study


@pytest.fixture(scope="module")
def world(tiny_ledger: Ledger) -> Path:
    return tiny_ledger.folder(tiny.WORLD) / "world"


def test_own_data_trains_one_text_run_and_one_encoder(world: Path, tmp_path: Path) -> None:
    study = example("own_data", data=world)
    stages = [row.stage for row in plan(study, Ledger(tmp_path)).rows]
    assert len(study.lines) == 4 * 2 * 3
    assert sum(isinstance(stage, Pretrain) for stage in stages) == 1
    assert sum(isinstance(stage, TrainEncoder) for stage in stages) == 1


@pytest.mark.slow
def test_own_data_runs_from_text_to_scores(world: Path, tmp_path: Path) -> None:
    study, ledger = (
        example(
            "own_data",
            data=world,
            text_tokens=4_000,
            image_text_tokens=3_000,
            completions="[0.8]",
            shares="[0.5]",
            seeds="[0]",
            epochs=1,
            encoder_steps=2,
            vocab_size=400,
            limit=3,
        ),
        Ledger(tmp_path / "store"),
    )
    tiny.run_missing(ledger, *study.results)
    for line in study.lines:
        assert set(ledger.results(line.result)["stable"]) == set(StableScores.model_fields)


def test_own_checkpoint_asks_each_share_with_both_schedules(world: Path, tmp_path: Path) -> None:
    def imported(source: Path, name: str, **given: Any) -> Path:
        request = {"source": str(source), "out": str(tmp_path / name), **given}
        import_model(ImportRequest.model_validate(request))
        return tmp_path / name

    study = example(
        "own_checkpoint",
        checkpoint=imported(save_checkpoint("llama", tmp_path / "hub/llama"), "model", rate=2e-3),
        encoder=imported(save_tower("siglip", tmp_path / "hub/siglip"), "encoder"),
        data=world,
    )
    assert len(study.lines) == 3 * 2 * 3
    assert len({line.name for line in study.lines}) == 18
    schedules = {
        type(stage.training.schedule) for stage in order(study) if isinstance(stage, Continue)
    }
    assert schedules == {ContinuedCosine, WarmupCosine}


def test_new_axis_varies_the_moments_alone() -> None:
    study = example("new_axis", seeds="[7]", end_rates="[3e-5]")
    starts = {
        stage.start.optimizer
        for stage in order(study)
        if isinstance(stage, Continue) and isinstance(stage.start, ContinueFrom)
    }
    assert starts == {"carry", "fresh", "warm"}
    assert sum(isinstance(stage, Pretrain) for stage in order(study)) == 1
