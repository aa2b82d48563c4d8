"""What one card can show of training: sharded, compiled, resumed, and the memory that it takes.

With `--gpu-stand-in` the same on a CPU, with gloo for NCCL and without compiling.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tiny
from midstream.config import Machine, Rows
from midstream.study.stages import Trained
from midstream.study.store import Ledger, Stopped
from midstream.train import parallel
from midstream.train.parallel import Place
from ranked import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plan_reality_stage import Reality, stage_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGES: dict[str, Trained] = {"text": tiny.TEXT, "image-text": tiny.SEEN}
pytestmark = pytest.mark.gpu
each = pytest.mark.parametrize("kind", STAGES)
# By what products are computed in: how far losses of equal steps may be apart.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
on_a_card = pytest.mark.skipif(
    DEVICE == "cpu", reason="`test_start_checks.py` compiles for a CPU, which takes long"
)


def store(tiny_ledger: Ledger, folder: Path, kind: str) -> Ledger:
    """One in which all is done that the stage needs."""
    before = (tiny.DATA, tiny.ENCODER_STAGE, tiny.TEXT)
    return tiny.store_with(tiny_ledger, folder, *(before[:1] if kind == "text" else before))


def machine(**changes: Any) -> Machine:
    given = {"workers": 1, "device": DEVICE, "precision": "float32", "compile": "off"}
    return Machine.model_validate(given | {"micro_batch_rows": 2} | changes)


def losses(ledger: Ledger, stage: Trained) -> list[float]:
    return [line["loss"] for line in ledger.metrics(stage)]


def trained(
    ledger: Ledger,
    stage: Trained,
    changed: Callable[[Place], Place] = lambda place: place,
    **changes: Any,
) -> list[float]:
    """The losses of the stage, run in this process."""
    runner = tiny.runner(ledger, machine=machine(**changes))
    runner.place = changed(runner.place)
    runner.run(stage)
    return losses(ledger, stage)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    kinds = "cuda:nccl,cpu:gloo" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(kinds, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(place: Place) -> Place:
    mesh = init_device_mesh(DEVICE, (1,), mesh_dim_names=("shard",))
    return replace(place, mesh=mesh, scalars=dist.new_group(backend="gloo"))


@each
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_model_sharded_over_one_card_has_the_losses_of_a_whole_one(
    kind: str, precision: str, tiny_ledger: Ledger, tmp_path: Path, group: None
) -> None:
    stage, found = STAGES[kind], []
    for name, changed in (("whole", lambda place: place), ("sharded", sharded)):
        mine = store(tiny_ledger, tmp_path / name, kind)
        found.append(trained(mine, stage, changed, precision=precision))
    assert found[1][:5] == pytest.approx(found[0][:5], rel=TOLERANCES[precision])


@on_a_card
@each
@pytest.mark.parametrize("precision", TOLERANCES)
def test_compiled_steps_have_the_losses_of_eager_ones(
    kind: str, precision: str, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    plain = trained(store(tiny_ledger, tmp_path / "e", kind), STAGES[kind], precision=precision)
    mine = store(tiny_ledger, tmp_path / "compiled", kind)
    # A process of its own: checks of shapes while tests run are not for a compiler to trace.
    given = machine(precision=precision, compile="blocks").model_dump(exclude_defaults=True)
    ended = run_ranks(mine, STAGES[kind], **{"ranks": 1} | given)
    assert ended.returncode == 0, ended.stderr
    found = losses(mine, STAGES[kind])
    assert found[:5] == pytest.approx(plain[:5], rel=TOLERANCES[precision])


@each
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_resumed_stage_has_the_very_losses_of_one_that_was_not_stopped(
    kind: str, precision: str, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    stage = STAGES[kind]
    whole = trained(store(tiny_ledger, tmp_path / "w", kind), stage, precision=precision)
    mine = store(tiny_ledger, tmp_path / "resumed", kind)
    stops = iter([False, False, False, True])
    place = machine(precision=precision)
    with pytest.raises(Stopped):
        tiny.runner(mine, should_stop=lambda: next(stops), machine=place).run(stage)
    assert len(losses(mine, stage)) == 4
    assert trained(mine, stage, precision=precision) == whole


def test_blocks_in_float8_learn_as_those_in_bfloat16_sharded_or_not(
    tiny_ledger: Ledger, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    if DEVICE == "cpu":
        monkeypatch.setattr(parallel, "check_float8", lambda device: None)
        monkeypatch.setitem(parallel._FLOAT8_SETTINGS, "emulate", True)

    def run(name: str, changed: Callable[[Place], Place] = lambda place: place) -> list[float]:
        mine = store(tiny_ledger, tmp_path / name, "text")
        found = trained(mine, tiny.TEXT, changed, precision=name.split()[0])
        start = (mine.folder(tiny.TEXT) / "starts.jsonl").read_text()
        assert f'"precision": "{name.split()[0]}"' in start
        return found

    plain, eighth = run("bfloat16"), run("float8")
    assert eighth != plain
    assert eighth == pytest.approx(plain, rel=5e-2)
    assert run("float8 sharded", sharded)[:5] == pytest.approx(eighth[:5], rel=2e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_the_memory_that_the_plan_says_within_a_tenth(
    checkpointing: bool, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    rows, width, layers = Rows(row_length=256, batch_rows=4), 256, 4
    if DEVICE == "cuda":
        # A size at which what libraries take is little.
        rows, width, layers = Rows(row_length=2048, batch_rows=8), 1024, 12
    tokens = 4 * rows.batch_rows * rows.row_length
    stage = stage_of("text", width, layers, rows, tokens, tiny.DATA)
    budget = stage.training.budget.model_copy(update={"max_epochs": 10_000})
    training = stage.training.model_copy(update={"budget": budget})
    stage = stage.model_copy(update={"training": training})
    real = Reality(store(tiny_ledger, tmp_path, "text"), DEVICE, 4, checkpointing)
    took, _ = real.memory(stage)
    assert real.planned_memory(stage) == pytest.approx(took, rel=0.1)
