import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from midstream.config import ContinuedCosine
from midstream.config.training import rate_at
from midstream.core.tokens import TokenCount
from midstream.data.images import LiveImages
from midstream.data.rows import build_row, plan_rows
from midstream.data.sources import Source
from midstream.order.plan import RowPlan
from midstream.study.stages import Continue, ContinueFrom, Pretrain
from midstream.study.store import Ledger, Stopped
from midstream.train import checkpoint, loop
from midstream.train.checkpoint import Progress
from midstream.train.parallel import Place
from midstream.train.step import NonFiniteError
from midstream.work.open_model import open_sources
from tiny import SEEN, TEXT


@pytest.fixture(scope="module")
def ledger(tiny_line: Ledger) -> Ledger:
    """The text run continued from its 40 %; read only."""
    return tiny_line


def planned(ledger: Ledger, stage: Pretrain | Continue) -> tuple[RowPlan, dict[str, Source], int]:
    sources = open_sources(stage.data, stage.training.budget.source_names, ledger)
    encoder = stage.model.encoder
    patches = encoder.num_patches if encoder else 0
    training = stage.training
    plan = plan_rows(sources, patches, training.budget, training.rows, training.seed)
    return plan, sources, patches


@pytest.mark.parametrize("stage", [TEXT, SEEN], ids=lambda stage: stage.kind)
def test_results_count_the_tokens_of_the_plan(ledger: Ledger, stage: Pretrain | Continue) -> None:
    plan, sources, patches = planned(ledger, stage)
    rows = [build_row(plan, sources, index, patches) for index in range(len(plan))]
    counts = sum((row.counts for row in rows), TokenCount())
    results = ledger.results(stage)
    assert results["tokens"] == vars(counts)
    assert results["tokens_seen"] == counts.seen == plan.seen_tokens
    assert results["steps"] == plan.num_steps
    assert results["pad_fraction"] == counts.pad / counts.total
    metrics = ledger.metrics(stage)
    assert sum(line["num_targets"] for line in metrics) == counts.target
    assert metrics[-1]["tokens_seen"] == counts.seen


@pytest.mark.parametrize("stage", [TEXT, SEEN], ids=lambda stage: stage.kind)
def test_every_source_gets_its_planned_tokens_within_one_example(
    ledger: Ledger, stage: Pretrain | Continue
) -> None:
    budget, results = stage.training.budget, ledger.results(stage)
    # No checkpoint stays behind when a stage is done.
    assert not list(ledger.folder(stage).glob("*checkpoints*"))
    assert len(results["sources"]) == len(budget.shares)
    realised = 0
    for share in budget.shares:
        source = results["sources"][share.source]
        assert source["planned_tokens"] == budget.total_tokens * share.share
        gap = abs(source["realised_tokens"] - source["planned_tokens"])
        assert gap <= source["largest_example_tokens"]
        realised += source["realised_tokens"]
    assert realised == results["tokens_seen"]


def test_a_milestone_is_the_first_step_that_reaches_its_share(ledger: Ledger) -> None:
    metrics, total = ledger.metrics(TEXT), ledger.results(TEXT)["tokens_seen"]
    found = {path.name for path in (ledger.folder(TEXT) / "milestones").iterdir()}
    assert found == {"20", "40", "60", "80", "100"}
    for share in TEXT.milestones:
        progress = checkpoint.read_progress(checkpoint.milestone(ledger.folder(TEXT), share))
        line = next(line for line in metrics if line["tokens_seen"] >= share * total)
        assert (progress.step, progress.tokens_seen) == (line["step"], line["tokens_seen"])
        assert progress.rate == rate_at(TEXT.training.schedule, progress.tokens_seen, total)
    # The last one holds the final weights.
    results = ledger.results(TEXT)
    assert (progress.step, progress.loss) == (results["steps"], results["final_loss"])
    assert progress.counts == TokenCount(**results["tokens"])


@pytest.mark.parametrize("stage", [TEXT, SEEN], ids=lambda stage: stage.kind)
def test_each_step_uses_the_rate_at_the_tokens_seen_before_it(
    ledger: Ledger, stage: Pretrain | Continue
) -> None:
    parent = None
    if isinstance(stage, Continue):
        parent = checkpoint.read_progress(checkpoint.milestone(ledger.folder(TEXT), 0.4)).rate
    metrics, results = ledger.metrics(stage), ledger.results(stage)
    total, seen = results["tokens_seen"], 0
    for number, line in enumerate(metrics, start=1):
        assert line["step"] == number
        assert line["rate"] == rate_at(
            stage.training.schedule,
            seen,
            total,
            parent_rate=parent,
            step_tokens=tiny.ROWS.batch_rows * tiny.ROWS.row_length,
        )
        assert line["rate"] > 0
        seen = line["tokens_seen"]
    assert results["first_rate"] == metrics[0]["rate"]
    assert results["last_rate"] == tiny.END_RATE


def test_nan_in_a_picture_stops_the_stage_and_names_its_rows(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tiny.store_with(ledger, tmp_path, tiny.DATA, tiny.ENCODER_STAGE, TEXT)
    stage = tiny.image_run(seed=11)
    plan, sources, patches = planned(mine, stage)
    shown = [build_row(plan, sources, index, patches).images for index in range(len(plan))]
    low, high = 2 * tiny.ROWS.batch_rows, 3 * tiny.ROWS.batch_rows - 1
    chosen = next(which.tolist() for k in range(low, high + 1) for which in shown[k])
    assert chosen not in [which.tolist() for k in range(low) for which in shown[k]]
    plain = LiveImages.__call__

    def broken(self: LiveImages, images: np.ndarray) -> torch.Tensor:
        pixels = plain(self, images)
        for place, which in zip(pixels, images.tolist(), strict=True):
            if which == chosen:
                place.fill_(float("nan"))
        return pixels

    monkeypatch.setattr(LiveImages, "__call__", broken)
    with pytest.raises(NonFiniteError, match=rf"step 2, rows {low} to {high}: loss nan.*before"):
        tiny.runner(mine).run(stage)
    assert len(mine.metrics(stage)) == 2
    assert mine.state(stage) == "failed"
    assert f"rows {low} to {high}" in mine.status(stage)["error"]


def test_a_step_that_fails_leaves_the_line_of_the_one_before(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, stage = tiny.store_with(ledger, tmp_path, tiny.DATA), tiny.text_run(seed=13)
    plain, steps = loop.train_step, iter([False, False, True])

    def full(*args: Any, **given: Any) -> Any:
        if next(steps):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return plain(*args, **given)

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(RuntimeError, match="micro_batch_rows"):
        tiny.runner(mine).run(stage)
    assert [line["step"] for line in mine.metrics(stage)] == [1, 2]


def test_a_schedule_cannot_continue_from_a_run_that_is_at_its_end(
    ledger: Ledger, tmp_path: Path
) -> None:
    mine = tiny.store_with(ledger, tmp_path, tiny.DATA, tiny.ENCODER_STAGE, TEXT)
    stage = tiny.image_run(ContinueFrom(stage=TEXT, completion=1.0))
    with pytest.raises(ValueError, match=r"3e-05, not above the end rate 3e-05; re-warm"):
        tiny.runner(mine).run(stage)
    assert mine.metrics(stage) == []
    lower = tiny.image_run(
        ContinueFrom(stage=TEXT, completion=1.0), schedule=ContinuedCosine(end_rate=1e-5)
    )
    tiny.runner(mine).run(lower)
    assert mine.metrics(lower)[0]["rate"] == 3e-5


@pytest.mark.parametrize("steps", [1, 5, 6, 21])
def test_a_stage_that_is_asked_to_stop_goes_on_to_the_same_bits(
    ledger: Ledger, tmp_path: Path, steps: int
) -> None:
    mine = tiny.store_with(ledger, tmp_path, tiny.DATA)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == steps

    with pytest.raises(Stopped, match=f"after step {steps} of 21"):
        tiny.runner(mine, should_stop=should_stop).run(TEXT)
    assert mine.state(TEXT) == "stopped"
    kept = {path.name for path in (mine.folder(TEXT) / "checkpoints").iterdir()}
    # The newest, and the one before it: every fifth step's.
    before = [f"step-{step:08d}" for step in [(steps - 1) // 5 * 5] if step]
    assert kept == {f"step-{steps:08d}", *before}
    tiny.runner(mine).run(TEXT)
    assert tiny.bits(mine, TEXT) == tiny.bits(ledger, TEXT)


def test_a_stage_that_trains_its_encoder_is_stopped_and_goes_on_to_the_same_bits(
    ledger: Ledger, tmp_path: Path
) -> None:
    stage = tiny.image_run(encoder_rate_factor=0.1, total_tokens=4_000)
    stores = [
        tiny.store_with(ledger, tmp_path / name, tiny.DATA, tiny.ENCODER_STAGE, TEXT)
        for name in ("whole", "stopped")
    ]
    tiny.runner(stores[0]).run(stage)
    asked = iter([False, False, True])
    with pytest.raises(Stopped, match="after step 3 of"):
        tiny.runner(stores[1], should_stop=lambda: next(asked)).run(stage)
    tiny.runner(stores[1]).run(stage)
    assert tiny.bits(stores[0], stage) == tiny.bits(stores[1], stage)
    kept = stores[0].folder(stage) / "weights" / "model.safetensors"
    frozen = stores[0].folder(tiny.ENCODER_STAGE) / "weights" / "model.safetensors"
    name = "encoder.layers.0.mlp.fc1.weight"
    before, after = load_file(frozen)[name], load_file(kept)[f"encoder.tower.{name}"]
    assert 0 < float((after - before).abs().max()) < 0.05


def test_progress_is_told_with_tokens_loss_and_speed(ledger: Ledger, tmp_path: Path) -> None:
    mine = tiny.store_with(ledger, tmp_path, tiny.DATA)
    events: list[dict[str, object]] = []
    tiny.runner(mine, report=events.append).run(tiny.text_run(total_tokens=2_000))
    keys = {"done", "tokens_seen", "total_tokens", "loss", "tokens_per_second", "note"}
    assert events[0].keys() == keys
    assert json.loads(json.dumps(events[0])) == events[0]


def test_a_stage_killed_while_it_clears_up_ends_in_the_same_bits(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tiny.store_with(ledger, tmp_path, tiny.DATA)

    def killed(path: Path) -> None:
        shutil.rmtree(next(path.glob("step-*")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("midstream.work.run_stage.remove_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.runner(mine).run(TEXT)
    assert mine.state(TEXT) == "stopped"
    tiny.runner(mine).run(TEXT)
    assert tiny.bits(mine, TEXT) == tiny.bits(ledger, TEXT)
    assert not list(mine.folder(TEXT).glob(".*"))


def test_the_first_rank_alone_counts_views_and_tells_the_others(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tiny.MACHINE.model_copy(update={"features": "live"})
    job = tiny.runner(ledger, machine=live).job(SEEN, ledger.folder(SEEN))
    told = [share["pictures"] for share in ledger.results(SEEN)["sources"].values()]
    assert told[0]["views"] > 0
    assert told[1] is None

    class Second(Place):
        def gather(self, value: Any) -> list[Any]:
            return [told if value is None else value]

    def never(*of: object) -> None:
        raise AssertionError("the second rank counts")

    monkeypatch.setattr(loop, "picture_views", never)
    progress = Progress(9, 9, 9, 0.1, TokenCount(), seconds=1.0)
    second = Second(torch.device("cpu"), rank=1, peak_flops=1.0)
    results = loop._results(job, progress, second)
    assert [share["pictures"] for share in results["sources"].values()] == told
