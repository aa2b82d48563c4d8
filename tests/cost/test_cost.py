"""Counted against what torch itself counts on the real modules."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from midstream.config import (
    Amount,
    Amounts,
    AttentionPool,
    AveragePool,
    DecoderConfig,
    EncoderConfig,
    ExpectedSource,
    LoRA,
    Mixture,
    PixelShuffle,
    ProjectorConfig,
    Resampler,
    Rows,
    Share,
    VLMConfig,
)
from midstream.config.connectors import connector_flops, untaken_flops
from midstream.config.model import attention_flops, encoder_flops, head_flops, weight_flops
from midstream.cost.cost import (
    connector_parameters,
    cost,
    encoder_parameters,
    images_seen,
    model_parameters,
    work_of,
)
from midstream.cost.graph import order
from midstream.cost.known import facts_of_results
from midstream.cost.workload import SAMPLE_ROWS, workload
from midstream.model.decoder import Decoder
from midstream.model.projector import Projector
from midstream.model.vision import build_encoder
from midstream.order.mixture import Supply
from midstream.order.plan import make_plan
from midstream.order.stream import ArrayLengths
from midstream.study.results import SourceResult
from midstream.study.stages import Evaluate, PrepareSource
from midstream.study.store import Ledger
from midstream.study.studies import Study

DECODER = DecoderConfig(hidden_size=64, num_layers=3, num_heads=2, vocab_size=500)
ENCODER = EncoderConfig(
    image_size=32, patch_size=8, hidden_size=24, num_layers=3, num_heads=2, intermediate_size=40
)


def source(
    kind: str, examples: int, tokens: int, images: int, targets: int, squares: int
) -> dict[str, Any]:
    """The results of a prepared source of one class of lengths."""
    shown = "image" if images else "plain"
    return {
        "kind": kind,
        "num_examples": examples,
        "num_tokens": tokens,
        "num_images": images,
        "distinct_images": images,
        "num_targets": targets,
        "lengths": {"plain": [], "image": [], shown: [[examples, tokens, squares]]},
    }


SOURCES = {
    "stories": source("text", 50, 5_000, 0, 4_950, 500_000),
    "captions": source("caption", 100, 600, 100, 500, 3_600),
    "chats": source("instruct", 30, 700, 30, 300, 16_400),
}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts with the plain attention, since torch does not count the fused one of the CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield counter


@pytest.fixture
def stages(study: Study) -> dict[str, Any]:
    """The last stage of each kind."""
    return {stage.kind: stage for stage in order(study)}


@pytest.fixture
def ledger(study: Study, tmp_path: Path) -> Ledger:
    """A store in which the sources are prepared."""
    return _prepared(study, tmp_path)


def _prepared(study: Study, store: Path, **changes: Mapping[str, object]) -> Ledger:
    ledger = Ledger(store)
    for stage in order(study):
        if isinstance(stage, PrepareSource):
            with ledger.open_stage(stage) as work:
                work.finish(
                    {"seconds": 1.0} | SOURCES[stage.source] | changes.get(stage.source, {})
                )
    return ledger


@pytest.mark.parametrize("length", [16, 64])
def test_decoder_and_head_flops_are_those_that_torch_counts(length: int) -> None:
    decoder = Decoder(DECODER)
    with counting() as counter:
        decoder.output(decoder(torch.zeros(2, length, 64), torch.arange(length).repeat(2, 1), None))
    blocks = weight_flops(DECODER) + attention_flops(DECODER) * length
    per_position = blocks + head_flops(DECODER)
    assert counter.get_total_flops() == 2 * length * per_position


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_encoder_flops_are_those_that_torch_counts(feature_layer: int) -> None:
    config = EncoderConfig(**{**ENCODER.model_dump(), "feature_layer": feature_layer})
    encoder = build_encoder(config)
    with counting() as counter:
        encoder(torch.zeros(3, 3, 32, 32))
    assert counter.get_total_flops() == 3 * encoder_flops(config)


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_encoder_parameters_are_those_of_the_module(feature_layer: int, final_norm: bool) -> None:
    changes = {"feature_layer": feature_layer, "final_norm": final_norm}
    config = EncoderConfig(**{**ENCODER.model_dump(), **changes})
    expected = sum(parameter.numel() for parameter in build_encoder(config).parameters())
    assert encoder_parameters(config) == expected


CONNECTORS = (
    ProjectorConfig(num_layers=2),
    ProjectorConfig(num_layers=3),
    *(ProjectorConfig(reduction=PixelShuffle(window=window)) for window in (2, 4)),
    ProjectorConfig(reduction=AveragePool(window=2)),
    ProjectorConfig(num_layers=1, reduction=AttentionPool(window=2, num_heads=3)),
    ProjectorConfig(reduction=Resampler(num_latents=5, num_layers=2, num_heads=2, head_dim=7)),
)


@pytest.mark.parametrize("config", CONNECTORS, ids=str)
def test_a_connectors_parameters_and_flops_are_those_of_the_module(config: ProjectorConfig) -> None:
    module = Projector(config, in_width=24, out_width=64)
    model = VLMConfig(decoder=DECODER, encoder=ENCODER, projector=config)
    assert connector_parameters(model) == sum(one.numel() for one in module.parameters())
    sizes = (16, 24, 64)
    forward = connector_flops(config, *sizes)
    with counting() as counter, torch.enable_grad():
        found = module(torch.zeros(3, 16, 24))
    assert counter.get_total_flops() == 3 * forward
    assert found.shape == (3, model.image_tokens, 64)
    with counting() as counter, torch.enable_grad():
        module(torch.zeros(3, 16, 24)).sum().backward()
    assert counter.get_total_flops() == 3 * (3 * forward - untaken_flops(config, *sizes))


def test_a_text_stage_costs_three_forward_passes_of_its_positions(
    stages: dict[str, Any], ledger: Ledger
) -> None:
    stage = stages["pretrain"]
    found = cost(stage, ledger)
    decoder = stage.decoder
    assert found.tokens == 10_000
    assert found.parameters == decoder.num_parameters
    assert found.basis == "counted"
    # The rows are the plan's, of 50 documents alike; one token in a hundred predicts nothing.
    supply = Supply("stories", ArrayLengths(np.full(50, 100)), True)
    budget = stage.training.budget.model_copy(update={"max_epochs": 2})
    rows = make_plan([supply], budget, stage.training.rows, 0)
    placed = [one.length for row in range(len(rows)) for one in rows.layout.row(row)]
    expected = 3 * 64 * len(rows) * 2 * decoder.linear_parameters
    expected += 3 * sum(length**2 for length in placed) * attention_flops(decoder)
    assert found.parts.decoder == pytest.approx(expected)
    assert found.parts.head == pytest.approx(3 * 9_900 * head_flops(decoder))
    assert found.parts.encoder == found.parts.projector == 0


@pytest.mark.parametrize("layout", ["filled", "padded"])
def test_a_long_stage_is_priced_as_its_plan_lays_it_out_from_a_sample_of_its_rows(
    stages: dict[str, Any], layout: str
) -> None:
    random, patches = np.random.default_rng(0), 4
    lengths = {
        "stories": np.clip(random.exponential(80, 6_000).round(), 2, None).astype(int),
        "captions": random.integers(4, 40, 9_000),
    }
    stage = stages["continue"]
    shares = (Share(source="stories", share=0.6), Share(source="captions", share=0.4))
    rows = Rows.model_validate({"row_length": 64, "batch_rows": 32, "layout": layout})
    budget = Mixture(total_tokens=500_000, shares=shares, max_epochs=2)
    training = stage.training.model_copy(update={"budget": budget, "rows": rows})
    facts = {
        name: facts_of_results(
            SourceResult.model_validate(
                SOURCES[name]
                | {
                    "seconds": 1.0,
                    "num_examples": len(found),
                    "num_tokens": int(found.sum()),
                    "num_images": len(found) if name == "captions" else 0,
                    "num_targets": int(found.sum()) - len(found),
                    "lengths": _classes(found, "plain" if name == "stories" else "image"),
                }
            )
        )
        for name, found in lengths.items()
    }

    work = workload(stage.model, training, facts, "cuda")

    supplies = [
        Supply("stories", ArrayLengths(lengths["stories"]), True),
        Supply("captions", ArrayLengths(lengths["captions"] + patches), False),
    ]
    plan = make_plan(supplies, budget, rows, 0)
    placed = [one for row in range(len(plan)) for one in plan.layout.row(row)]
    assert work == workload(stage.model, training, facts, "cuda")
    assert work.rows > SAMPLE_ROWS
    assert work.rows == pytest.approx(len(plan), rel=0.005)
    assert work.images == pytest.approx(sum(one.source for one in placed), rel=0.005)
    squares = sum(one.length**2 for one in placed) if layout == "filled" else len(plan) * 64**2
    assert work.squares == pytest.approx(squares, rel=0.01)


def test_shares_before_the_reduction_show_as_many_pictures_through_any_connector(
    stages: dict[str, Any], ledger: Ledger
) -> None:
    stage = stages["continue"]
    pooled = ProjectorConfig(reduction=AveragePool(window=2))
    fewer = stage.model_copy(update={"projector": pooled})
    assert (stage.model.image_tokens, fewer.model.image_tokens) == (4, 1)
    plain = images_seen(stage, ledger)
    assert images_seen(fewer, ledger, "patches") == plain
    # Six tokens of text stand behind each.
    assert images_seen(fewer, ledger, "tokens") == pytest.approx(plain * 10 / 7)
    budget = stage.training.budget.model_copy(update={"by": "patches"})
    training = stage.training.model_copy(update={"budget": budget})
    asked = fewer.model_copy(update={"training": training})
    work = work_of(asked, ledger)
    assert work.images == plain
    # A picture takes three positions less.
    assert work.tokens == pytest.approx(budget.total_tokens - 3 * work.images, abs=2)


def _classes(lengths: np.ndarray, name: str) -> dict[str, list[list[int]]]:
    keys = np.ceil(4 * np.log2(lengths)).astype(int)
    parts = [lengths[keys == key] for key in np.unique(keys)]
    found = [[len(part), int(part.sum()), int((part**2).sum())] for part in parts]
    return {"plain": [], "image": [], name: found}


def test_rows_that_the_checks_refuse_have_no_cost(stages: dict[str, Any], ledger: Ledger) -> None:
    stage = stages["continue"]
    rows = stage.training.rows.model_copy(update={"layout": "joined"})
    training = stage.training.model_copy(update={"rows": rows})
    joined = cost(stage.model_copy(update={"training": training}), ledger)
    assert (joined.tokens, joined.flops) == (4_000, None)


def test_a_text_run_has_a_cost_before_anything_is_known_of_its_data(stages: dict[str, Any]) -> None:
    stage = stages["pretrain"]
    found = cost(stage)
    assert found.basis == "expected"
    assert found.tokens == 10_000
    least = 6 * 10_000 * stage.decoder.linear_parameters
    assert found.flops > least


def test_tokens_of_epochs_are_unknown_until_the_data_is_prepared(
    stages: dict[str, Any], ledger: Ledger, tmp_path: Path
) -> None:
    stage = stages["finetune"]
    assert cost(stage).tokens is None
    assert cost(stage, Ledger(tmp_path / "empty")).flops is None
    found = cost(stage, ledger)
    patches = stage.start.encoder.encoder.num_patches
    assert found.tokens == 2 * (700 + 30 * patches)
    assert found.parameters == model_parameters(stage.model)
    assert found.flops > 0


def test_conversations_that_are_cut_to_their_rows_are_priced_as_cut(
    study: Study, stages: dict[str, Any], tmp_path: Path
) -> None:
    stage = stages["finetune"]
    patches = stage.start.encoder.encoder.num_patches
    row_length = stage.training.rows.row_length
    number, tokens = 5, 5 * (row_length + 100)
    lengths = {"plain": [], "image": [[30, 700, 16_400], [number, tokens, tokens**2 // number]]}
    longer = {"num_examples": 35, "num_images": 35, "num_tokens": 700 + tokens, "lengths": lengths}
    found = cost(stage, _prepared(study, tmp_path, chats=longer))
    assert found.tokens == 2 * (700 + 30 * patches + number * row_length)


def test_conversations_of_more_pictures_than_have_room_are_priced_with_those_that_have(
    study: Study, stages: dict[str, Any], tmp_path: Path
) -> None:
    stage = stages["finetune"]
    patches, length = stage.start.encoder.encoder.num_patches, stage.training.rows.row_length
    room = length // patches
    lengths = {"plain": [], "image": [[30, 700, 16_400]], f"{room + 2} images": [[5, 100, 2_000]]}
    counts = {"num_examples": 35, "num_images": 30 + 5 * (room + 2), "num_tokens": 800}
    found = cost(stage, _prepared(study, tmp_path, chats={**counts, "lengths": lengths}))
    assert found.tokens == 2 * (700 + 30 * patches + 5 * min(room * patches + 20, length))
    assert 0 < found.flops < 1e12


def test_a_plan_counts_with_the_captions_that_the_budget_asks_for(
    study: Study, stages: dict[str, Any], tmp_path: Path
) -> None:
    lengths = {"plain": [], "image": [[100, 900, 8_100]]}
    seen = {"num_tokens": 900, "num_targets": 800, "lengths": lengths}
    held = {"captions": {"original": 100, "synthetic": 100}, "seen": {"random": seen}}
    ledger = _prepared(study, tmp_path, captions=held)
    stage = stages["continue"]
    patches = stage.encoder.encoder.num_patches

    def tokens(caption: str, source: str = "captions") -> int | None:
        amount = Amount(source=source, epochs=2, caption=caption)  # type: ignore[arg-type]
        training = stage.training.model_copy(update={"budget": Amounts(amounts=(amount,))})
        return cost(stage.model_copy(update={"training": training}), ledger).tokens

    assert tokens("original") == 2 * (600 + 100 * patches)
    assert tokens("random") == 2 * (900 + 100 * patches)
    # Captions that a source lacks are refused by the checks; a plan does not price them.
    assert tokens("synthetic", "chats") is None


def test_a_stage_that_sees_is_unknown_without_facts_and_priced_from_expected_ones(
    stages: dict[str, Any], ledger: Ledger
) -> None:
    stage = stages["continue"]
    assert cost(stage).tokens == 4_000
    assert cost(stage).flops is None
    expected = tuple(
        ExpectedSource(
            name=name, **{k: v for k, v in s.items() if k not in ("distinct_images", "lengths")}
        )
        for name, s in SOURCES.items()
    )
    data = stage.data.model_copy(update={"expected": expected})
    guessed = cost(stage.model_copy(update={"data": data}))
    counted = cost(stage, ledger)
    assert (guessed.basis, counted.basis) == ("expected", "counted")
    assert guessed.tokens == counted.tokens == 4_000
    assert guessed.flops == pytest.approx(counted.flops, rel=0.05)
    # Which pictures fill a step's last batch follows from the lengths.
    assert guessed.parts.encoder == pytest.approx(counted.parts.encoder, rel=0.25)
    assert guessed.parts.projector == counted.parts.projector > 0


@pytest.mark.parametrize("kept", [{"freeze_decoder": True}, {"lora": LoRA(rank=2, alpha=2.0)}])
def test_a_kept_decoder_saves_the_gradients_of_its_weights(
    stages: dict[str, Any], ledger: Ledger, kept: dict[str, Any]
) -> None:
    stage = stages["continue"]
    frozen = stage.model_copy(update={"training": stage.training.model_copy(update=kept)})
    all_flops, needed = cost(stage, ledger).model_flops, cost(frozen, ledger).model_flops
    assert needed < all_flops
    whole, saved = cost(stage, ledger).parts, cost(frozen, ledger).parts
    assert saved.head == pytest.approx(whole.head * 2 / 3)
    assert saved.projector == whole.projector
    assert whole.decoder * 2 / 3 < saved.decoder < whole.decoder


def test_evaluations_cost_more_with_more_questions_and_when_asked_blind(study: Study) -> None:
    stage = study.lines[0].result

    def flops(**changes: object) -> float:
        evaluation = {**stage.evaluation.model_dump(), **changes}
        found = cost(Evaluate(of=stage.of, evaluation=evaluation)).flops
        return found

    assert flops(limit=10) < flops(limit=20) < flops(limit=500) == flops(limit=None)
    assert flops(blind=False) < flops(blind=True)


def test_preparing_and_training_an_encoder_have_a_cost(stages: dict[str, Any]) -> None:
    for kind in ("prepare_world", "prepare_tokenizer", "prepare_source"):
        assert (cost(stages[kind]).tokens, cost(stages[kind]).flops) == (0, 0.0)
    found = cost(stages["train_encoder"])
    assert found.tokens == 80 * (4 + 16)
    image = encoder_flops(stages["train_encoder"].encoder.model_copy(update={"feature_layer": -1}))
    assert found.flops > 2 * 80 * image
