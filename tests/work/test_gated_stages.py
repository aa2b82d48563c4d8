"""A line with Flamingo's blocks: trained beside a frozen decoder, resumed, sharded, asked."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from midstream.config import GatedBlocks, ProjectorConfig, Resampler
from midstream.cost.cost import cost, work_of
from midstream.cost.taken import Setting, memory
from midstream.study.stages import Continue, ContinueFrom, Evaluate, Finetune
from midstream.study.store import Ledger
from midstream.train import checkpoint
from ranked import run_ranks

PROJECTOR = ProjectorConfig(
    num_layers=0,
    reduction=Resampler(num_latents=2, num_layers=1, num_heads=2, head_dim=4),
    gated=GatedBlocks(num_heads=2, head_dim=8),
)
SEEN = Continue(
    data=tiny.DATA,
    encoder=tiny.ENCODER_STAGE,
    decoder=tiny.DECODER,
    projector=PROJECTOR,
    start=ContinueFrom(stage=tiny.TEXT, completion=0.4, optimizer="fresh"),
    training=tiny.training(
        budget=tiny.mixture(4_000, pictures=0.5, web=0.5), schedule=tiny.warm(), freeze_decoder=True
    ),
)
CHAT = Finetune(start=SEEN, training=tiny.CHAT.training)
RESULT = Evaluate(of=CHAT, evaluation=tiny.EVALUATION)


@pytest.fixture(scope="module")
def ledger(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    folder = tmp_path_factory.mktemp("gated")
    mine = tiny.begun(tiny_ledger, folder)
    tiny.run_missing(mine, RESULT)
    return mine


def test_the_blocks_learn_the_decoder_stays_and_both_go_on(ledger: Ledger) -> None:
    milestone = checkpoint.milestone(ledger.folder(tiny.TEXT), 0.4)
    before, seen = load_file(milestone / "model.safetensors"), tiny.weights(ledger, SEEN)
    for name, value in before.items():
        assert torch.equal(seen[name], value), name
    gates = [value for name, value in seen.items() if name.endswith("gate")]
    assert len(gates) == 2 * tiny.DECODER.num_layers
    assert all(bool(gate.any()) for gate in gates)
    # Few steps of fine-tuning move every gate from where the image run left it.
    chat = tiny.weights(ledger, CHAT)
    assert chat.keys() == seen.keys()
    for name, value in seen.items():
        if name.endswith("gate"):
            assert (chat[name] - value).abs() < 10 * value.abs() + 0.1
            assert not torch.equal(chat[name], value)
    assert ledger.results(RESULT)["tasks"]["pope"]["num_examples"] == 6


def test_a_stopped_run_ends_as_one_that_was_not(ledger: Ledger, tmp_path: Path) -> None:
    own = tiny.begun(ledger, tmp_path)
    tiny.run_in_two(own, SEEN, steps=5)
    assert tiny.bits(own, SEEN)["weights"] == tiny.bits(ledger, SEEN)["weights"]


def test_a_plan_counts_the_blocks(ledger: Ledger) -> None:
    plain = SEEN.model_copy(
        update={"projector": PROJECTOR.model_copy(update={"num_layers": 1, "gated": None})}
    )
    gated, other = (cost(stage, ledger, "cpu") for stage in (SEEN, plain))
    assert gated.parts is not None
    assert other.parts is not None
    assert gated.parts.projector > other.parts.projector > 0
    assert gated.parameters == sum(value.numel() for value in tiny.weights(ledger, SEEN).values())
    work = work_of(SEEN, ledger, "cpu")
    assert work is not None
    kept = [memory(stage, work, Setting(device="cpu")).activations for stage in (SEEN, plain)]
    assert kept[0] > kept[1]


@pytest.mark.faults
def test_two_ranks_learn_what_one_does(ledger: Ledger, tmp_path: Path) -> None:
    own = tiny.begun(ledger, tmp_path)
    run_ranks(own, SEEN, 2)
    alone, together = (one.metrics(SEEN) for one in (ledger, own))
    assert [line["step"] for line in alone] == [line["step"] for line in together]
    for one, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
