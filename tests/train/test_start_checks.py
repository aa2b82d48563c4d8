"""What every start looks at, and the choices of a machine that change no result."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from midstream.config import AdamW, VLMConfig
from midstream.core.tokens import TokenCount
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.study.store import Ledger
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress
from midstream.train.guards import StartChecks, parameter_table
from midstream.train.parallel import ALONE, Place
from midstream.train.step import StepResult, make_optimizer
from ranked import run_ranks

STEP = StepResult(loss=1.0, grad_norm=1.0, num_targets=3)


def model_of() -> VLM:
    model = VLM(VLMConfig(decoder=tiny.DECODER))
    initialise(model, 0)
    return model


def with_gradients(model: VLM) -> dict[str, torch.nn.Parameter]:
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    return named


@pytest.mark.parametrize("key", ["code", "data"])
def test_ranks_with_other_code_or_data_are_refused_with_both_values(key: str) -> None:
    class Two(Place):
        def gather(self, value: Any) -> list[Any]:
            return [value, value | {key: "another"}]

    with pytest.raises(ValueError, match=rf"rank 1 runs with {key} 'another', rank 0 with '.+'"):
        StartChecks(model_of(), Two(torch.device("cpu")), {"data": "a1"})


def test_a_trained_matrix_without_a_gradient_is_named() -> None:
    model = model_of()
    checks = StartChecks(model, ALONE, {})
    named = with_gradients(model)
    checks.after_step(STEP)
    checks = StartChecks(model, ALONE, {})
    name = "decoder.layers.1.attention.out_proj.weight"
    named[name].grad = torch.zeros_like(named[name])
    with pytest.raises(ValueError, match=rf"1 trained parameters got no gradient .*: {name};"):
        checks.after_step(STEP)
    checks = StartChecks(model, ALONE, {})
    named = with_gradients(model)
    with pytest.raises(ValueError, match="got no gradient"):
        checks.after_step(StepResult(1.0, 1.0, 3, untouched=("decoder.norm.weight",)))


def test_a_frozen_parameter_that_changes_is_an_error_at_the_end(tmp_path: Path) -> None:
    model = model_of()
    embeddings = model.decoder.tok_embeddings.weight.requires_grad_(requires_grad=False)
    assert parameter_table(model)["decoder"]["frozen"] == embeddings.numel()
    checks, optimizer = StartChecks(model, ALONE, {}), make_optimizer(model, AdamW())
    progress = Progress(3, 900, 1_000, 0.02, TokenCount(text=900))
    checks.begin(tmp_path, optimizer, progress, 0.02, tiny.MACHINE, {})
    checks.end()
    with torch.no_grad():
        embeddings[3, 0] += 1e-6
    with pytest.raises(RuntimeError, match="keeps frozen have changed"):
        checks.end()


def test_a_rate_that_is_not_the_schedules_is_refused_with_both(tmp_path: Path) -> None:
    model = model_of()
    checks, optimizer = StartChecks(model, ALONE, {}), make_optimizer(model, AdamW())
    progress = Progress(3, 900, 1_000, 0.02, TokenCount(text=900))
    with pytest.raises(ValueError, match=r"at a rate of 0\.02, the schedule says 0\.01 at 900"):
        checks.begin(tmp_path, optimizer, progress, 0.01, tiny.MACHINE, {})
    assert not list(tmp_path.iterdir())
    checks.begin(tmp_path, optimizer, progress, 0.02, tiny.MACHINE, {})
    assert (tmp_path / "starts.jsonl").read_text().count("\n") == 1


def test_weights_in_memory_that_are_not_those_that_were_saved_are_refused(tmp_path: Path) -> None:
    model = model_of()
    checks, optimizer = StartChecks(model, ALONE, {}), make_optimizer(model, AdamW())
    progress = Progress(3, 900, 1_000, 0.02, TokenCount(text=900))
    saved = checkpoint.digests(model, optimizer)
    checks.begin(tmp_path, optimizer, progress, 0.02, tiny.MACHINE, saved)
    with torch.no_grad():
        model.decoder.tok_embeddings.weight[3, 0] += 1e-6
    with pytest.raises(RuntimeError, match="in memory model differ from what was saved"):
        checks.begin(tmp_path, optimizer, progress, 0.02, tiny.MACHINE, saved)


STAGE = tiny.text_run(total_tokens=4_000)


def losses(ledger: Ledger, folder: Path, **machine: Any) -> list[float]:
    mine = tiny.store_with(ledger, folder, tiny.DATA)
    tiny.runner(mine, machine=tiny.MACHINE.model_copy(update=machine)).run(STAGE)
    return [line["loss"] for line in mine.metrics(STAGE)]


@pytest.fixture(scope="module")
def plain(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The stage's losses by the machine's defaults."""
    return losses(tiny_ledger, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("machine", "tolerance"),
    [
        ({"saving": "foreground"}, 0.0),
        ({"activation_checkpointing": "blocks"}, 0.0),
        ({"micro_batch_rows": 1}, 1e-5),
        ({"precision": "bfloat16"}, 2e-2),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_choices_of_the_machine_leave_the_losses(
    plain: list[float],
    tiny_ledger: Ledger,
    tmp_path: Path,
    machine: dict[str, Any],
    tolerance: float | int,
) -> None:
    found = losses(tiny_ledger, tmp_path, **machine)
    assert found == pytest.approx(plain, rel=tolerance, abs=0.0)
    if machine.get("precision"):
        assert found != plain


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_compiled_blocks_leave_the_losses(
    plain: list[float], tiny_ledger: Ledger, tmp_path: Path
) -> None:
    mine = tiny.store_with(tiny_ledger, tmp_path, tiny.DATA)
    # A process of its own: checks of shapes while tests run are not for a compiler to trace.
    ended = run_ranks(mine, STAGE, 1, compile="blocks")
    assert ended.returncode == 0, ended.stderr
    found = [line["loss"] for line in mine.metrics(STAGE)]
    assert found == pytest.approx(plain, rel=1e-5)
    (start,) = (mine.folder(STAGE) / "starts.jsonl").read_text().splitlines()
    assert '"compiled": true' in start
