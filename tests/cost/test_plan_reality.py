"""What a plan says of real stages, against what torch counts while they are trained."""

import sys
from pathlib import Path

import pytest

import tiny
from midstream.config import Epochs, PatchProjection, Rows, Training
from midstream.cost.cost import cost
from midstream.study.stages import Continue, Finetune, FromScratch, Trained
from midstream.study.store import Ledger

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plan_reality_stage import Reality, stage_of

TOKENS = 8_000


def patches() -> Continue:
    return Continue(
        data=tiny.DATA,
        encoder=PatchProjection(image_size=24, patch_size=12, hidden_size=16),
        decoder=tiny.DECODER,
        start=FromScratch(),
        training=tiny.image_run(total_tokens=TOKENS, schedule=tiny.warm()).training,
    )


def chat(layout: str, epochs: int) -> Finetune:
    rows = Rows.model_validate({"row_length": 192, "batch_rows": 4, "layout": layout})
    passes = Training(
        budget=Epochs(sources=("talks",), epochs=epochs), rows=rows, schedule=tiny.warm(1e-3)
    )
    return Finetune(start=tiny.SEEN, training=passes)


SEES = FromScratch()
STAGES: dict[str, Trained] = {
    "text": tiny.text_run(TOKENS),
    "joined text": tiny.text_run(TOKENS, rows=Rows(row_length=192, batch_rows=4, layout="joined")),
    "text in rows that are cut apart": tiny.text_run(
        TOKENS, rows=Rows(row_length=512, batch_rows=4)
    ),
    "frozen encoder": tiny.image_run(SEES, TOKENS, schedule=tiny.warm()),
    "trained encoder": tiny.image_run(SEES, TOKENS, schedule=tiny.warm(), encoder_rate_factor=0.1),
    "patch projection": patches(),
    "conversations": chat("filled", 4),
}


def store(folder: Path, tiny_ledger: Ledger) -> Ledger:
    """With the tiny data and its encoder."""
    return tiny.store_with(tiny_ledger, folder, tiny.DATA, tiny.ENCODER_STAGE)


@pytest.fixture(scope="module")
def reality(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Reality:
    return Reality(store(tmp_path_factory.mktemp("reality"), tiny_ledger), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_planned_flops_are_those_that_torch_counts_and_model_flops_those_of_results(
    reality: Reality, name: str
) -> None:
    stage = STAGES[name]
    assert reality.planned_flops(stage) == pytest.approx(reality.flops(stage), rel=0.01)
    planned = cost(stage, reality.ledger)
    assert planned.model_flops == pytest.approx(reality.model_flops(stage), rel=0.005)


@pytest.mark.slow
def test_planned_flops_of_padded_rows_are_close_though_batches_are_cut(reality: Reality) -> None:
    # The longest of a batch's examples is known only on average.
    stage = chat("padded", 2)
    assert reality.planned_flops(stage) == pytest.approx(reality.flops(stage), rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "width", "layers", "micro_rows", "length"),
    [
        ("text", 256, 2, 0, 256),
        # Not cut apart: an eighth of the peak are dense masks.
        ("text", 64, 4, 0, 255),
        # A minute each: torch's memory profile is slow.
        pytest.param("image", 384, 3, 2, 256, marks=pytest.mark.faults),
        pytest.param("trained", 256, 2, 0, 256, marks=pytest.mark.faults),
    ],
)
def test_planned_memory_is_within_a_tenth_of_the_allocators_peak(
    tiny_ledger: Ledger,
    tmp_path: Path,
    kind: str,
    width: int,
    layers: int,
    micro_rows: int,
    length: int,
) -> None:
    rows = Rows(row_length=length, batch_rows=4)
    stage = stage_of(kind, width, layers, rows, 4_000, tiny.DATA)
    real = Reality(store(tmp_path, tiny_ledger), "cpu", micro_rows)
    measured, _ = real.memory(stage)
    assert real.planned_memory(stage) == pytest.approx(measured, rel=0.1)


@pytest.mark.faults
def test_planned_memory_falls_with_the_blocks_made_again_as_the_allocators_does(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    stage = stage_of("text", 256, 4, Rows(row_length=256, batch_rows=4), 8_000, tiny.DATA)
    mine = store(tmp_path, tiny_ledger)
    plain, less = (Reality(mine, "cpu", 0, again) for again in (False, True))
    measured, _ = less.memory(stage)
    assert less.planned_memory(stage) == pytest.approx(measured, rel=0.1)
    assert less.planned_memory(stage) < plain.planned_memory(stage)
