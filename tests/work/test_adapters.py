"""Stages whose language model learns by adapters: trained, resumed, sharded, merged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import tiny
from midstream.config import LoRA, Training, VLMConfig
from midstream.cost.cost import adapter_parameters
from midstream.model import adapters
from midstream.model.pretrained import describe
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.study.stages import ContinueFrom, Finetune
from midstream.study.store import Ledger
from midstream.train import checkpoint
from midstream.work.open_model import open_model
from ranked import run_ranks

pytest.importorskip("peft", reason="the extra 'lora' is not installed")

SEEN = tiny.image_run(
    ContinueFrom(stage=tiny.TEXT, completion=0.4, optimizer="fresh"),
    budget=tiny.mixture(4_000, pictures=0.5, web=0.5),
    lora=LoRA(rank=4, alpha=8),
)
CHAT = Finetune(start=SEEN, training=tiny.CHAT.training)


@pytest.fixture(scope="module")
def ledger(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    mine = tiny.begun(tiny_ledger, tmp_path_factory.mktemp("adapters"))
    tiny.run_missing(mine, CHAT)
    return mine


def test_merged_weights_differ_by_adapters_of_the_rank_and_nothing_else_moves(
    ledger: Ledger,
) -> None:
    milestone = checkpoint.milestone(ledger.folder(tiny.TEXT), 0.4)
    before, seen = load_file(milestone / "model.safetensors"), tiny.weights(ledger, SEEN)
    assert not any("lora" in name or "base_layer" in name for name in seen)
    moved = 0
    for name, value in before.items():
        change = (seen[name] - value).double()
        if not name.endswith(".weight") or "layers." not in name or value.ndim < 2:
            assert not change.any(), name
            continue
        assert change.any(), name
        sizes = torch.linalg.svdvals(change)
        assert sizes[4:].max() < 1e-4 * sizes[0], name
        moved += 1
    # Four matrices in each block.
    assert moved == 4 * tiny.DECODER.num_layers
    assert tiny.weights(ledger, CHAT).keys() == seen.keys()
    assert open_model(ledger.folder(SEEN), torch.device("cpu")).vlm.decoder is not None


def test_a_stage_that_stops_and_resumes_has_the_same_bits(
    ledger: Ledger, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    mine = tiny.begun(tiny_ledger, tmp_path)
    tiny.run_in_two(mine, SEEN, steps=4)
    assert tiny.bits(mine, SEEN)["weights"] == tiny.bits(ledger, SEEN)["weights"]


@pytest.mark.faults
def test_two_ranks_learn_the_same(ledger: Ledger, tiny_ledger: Ledger, tmp_path: Path) -> None:
    mine = tiny.begun(tiny_ledger, tmp_path)
    ended = run_ranks(mine, SEEN, 2)
    assert ended.returncode == 0, ended.stderr
    losses = [[line["loss"] for line in one.metrics(SEEN)] for one in (mine, ledger)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    folder = mine.folder(SEEN) / "weights"
    found = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    expected = tiny.weights(ledger, SEEN)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-4, name


def test_adapters_draw_nothing_from_the_global_generator_and_start_at_zero(
    tiny_ledger: Ledger,
) -> None:
    decoder = open_model(tiny_ledger.folder(tiny.TEXT), torch.device("cpu")).vlm.decoder
    ids = torch.arange(9)[None]
    before = decoder(decoder.embed(ids), ids, None)
    state = torch.get_rng_state()
    own = decoder.initialisers()
    adapters.add_adapters(decoder, LoRA(rank=2, alpha=2))
    assert torch.equal(torch.get_rng_state(), state)
    table = adapters.initialisers(decoder, own)
    names = {name for name, _ in decoder.named_parameters()}
    assert names == set(table)
    assert sum(map(adapters.is_adapter, names)) == 8 * tiny.DECODER.num_layers
    added = [p.numel() for name, p in decoder.named_parameters() if adapters.is_adapter(name)]
    assert adapter_parameters(tiny.DECODER, 2) == sum(added)
    for name, parameter in decoder.named_parameters():
        if adapters.is_adapter(name):
            torch.nn.init.constant_(parameter, 0.0 if "lora_B" in name else 0.1)
    assert torch.equal(decoder(decoder.embed(ids), ids, None), before)


@torch.no_grad()
def test_a_decoder_of_transformers_takes_them_and_has_plain_names_again() -> None:
    settings = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = describe(AutoConfig.for_model("qwen2", **settings, **sizes))
    vlm = VLM(VLMConfig(decoder=config))
    plain = vlm.state_dict().keys()
    adapters.add_adapters(vlm.decoder, LoRA(rank=2, alpha=4))
    initialise(vlm, 0)
    ids = torch.arange(9)[None]
    layers = [name for name, _ in vlm.named_parameters() if "lora_B" in name]
    assert len(layers) == 7 * 2
    assert not any("lm_head" in name for name in layers)
    before = vlm.decoder(vlm.decoder.embed(ids), ids, None)
    for name, value in vlm.named_parameters():
        if "lora_B" in name:
            value.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    apart = vlm.decoder(vlm.decoder.embed(ids), ids, None)
    adapters.merge_adapters(vlm.decoder)
    merged = vlm.decoder(vlm.decoder.embed(ids), ids, None)
    assert vlm.state_dict().keys() == plain
    assert (apart - before).abs().max() > 1e-2
    assert (merged - apart).abs().max() < 1e-4


def test_adapters_beside_a_frozen_decoder_and_in_a_text_run_are_refused() -> None:
    with pytest.raises(ValueError, match="freeze_decoder and lora are given"):
        Training(**{**dict(SEEN.training), "freeze_decoder": True})
    with pytest.raises(ValueError, match="lora is given, but a text run"):
        tiny.text_run(lora=LoRA(rank=1, alpha=1))
    with pytest.raises(ValueError, match="optimizer='carry'"):
        tiny.image_run(
            ContinueFrom(stage=tiny.TEXT, completion=0.4, optimizer="carry"),
            lora=LoRA(rank=1, alpha=1),
        )
