"""Counted against what torch itself counts on the real modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from midstream.config import DecoderConfig, EncoderConfig, ProjectorConfig, Rows
from midstream.flops import decoder_flops, encoder_flops, head_flops, mean_context
from midstream.model.decoder import Decoder
from midstream.model.projector import Projector
from midstream.model.vision import build_encoder
from midstream.study.cost import (
    cost,
    encoder_parameters,
    model_parameters,
    projector_parameters,
)
from midstream.study.graph import order
from midstream.study.ledger import Ledger
from midstream.study.stage import (
    Evaluate,
    Finetune,
    Prepare,
    Stage,
)
from midstream.study.studies import Study

MakeStudy = Callable[..., Study]
DECODER = DecoderConfig(hidden_size=64, num_layers=3, num_heads=2, vocab_size=500)
ENCODER = EncoderConfig(
    image_size=32, patch_size=8, hidden_size=24, num_layers=3, num_heads=2, intermediate_size=40
)
SOURCES = {
    "stories": {"num_tokens": 5_000, "num_images": 0},
    "captions": {"num_tokens": 600, "num_images": 100},
    "chats": {"num_tokens": 700, "num_images": 30},
}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts with the plain attention, since torch does not count the fused one of the CPU."""
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        yield counter


def _by_kind(study: Study) -> dict[str, Stage]:
    return {stage.kind: stage for stage in order(study)}


def _prepared(study: Study, store: Path) -> Ledger:
    ledger = Ledger(store)
    with ledger.open_stage(order(study)[0]) as work:
        work.finish({"sources": SOURCES})
    return ledger


@pytest.mark.parametrize("length", [16, 64])
def test_decoder_and_head_flops_are_those_that_torch_counts(length: int) -> None:
    decoder = Decoder(DECODER)
    with counting() as counter:
        decoder.output(decoder(torch.zeros(2, length, 64), torch.arange(length).repeat(2, 1), None))
    per_position = decoder_flops(DECODER, context=float(length)) + head_flops(DECODER)
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


@pytest.mark.parametrize("num_layers", [2, 3])
def test_projector_parameters_are_those_of_the_module(num_layers: int) -> None:
    config = ProjectorConfig.model_validate({"num_layers": num_layers})
    module = Projector(config, in_width=24, out_width=64)
    expected = sum(parameter.numel() for parameter in module.parameters())
    assert projector_parameters(config, encoder=ENCODER, decoder=DECODER) == expected


def test_causal_rows_attend_to_half_of_themselves_on_average() -> None:
    joined = Rows(row_length=8, batch_rows=1, layout="joined")
    assert mean_context(joined) == sum(range(1, 9)) / 8
    assert mean_context(Rows(row_length=8, batch_rows=1, layout="filled")) == 8


def test_a_text_stage_costs_three_forward_passes_of_its_tokens(make_study: MakeStudy) -> None:
    stage = _by_kind(make_study())["pretrain"]
    found = cost(stage)
    decoder = stage.decoder
    assert found.tokens == 10_000
    assert found.parameters == decoder.num_parameters
    per_token = decoder_flops(decoder, context=64.0) + head_flops(decoder)
    assert found.flops == 3 * 10_000 * per_token


def test_tokens_of_epochs_are_unknown_until_the_data_is_prepared(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study()
    stage = _by_kind(study)["finetune"]
    assert isinstance(stage, Finetune)
    assert cost(stage).tokens is None
    assert cost(stage, Ledger(tmp_path)).flops is None
    found = cost(stage, _prepared(study, tmp_path))
    patches = stage.start.encoder.encoder.num_patches
    assert found.tokens == 2 * (700 + 30 * patches)
    assert found.parameters == model_parameters(stage.model)
    assert found.flops is not None
    assert found.flops > 0


def test_images_of_a_mixture_need_no_head_but_an_encoder(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study()
    stage = _by_kind(study)["continue"]
    before, after = cost(stage), cost(stage, _prepared(study, tmp_path))
    assert before.tokens == after.tokens == 4_000
    assert before.flops is not None
    assert after.flops is not None
    encoder, decoder = stage.encoder.encoder, stage.decoder
    images = 2_000 * 100 / (600 + 100 * encoder.num_patches)
    connector = projector_parameters(stage.projector, encoder=encoder, decoder=decoder)
    each = encoder_flops(encoder) + encoder.num_patches * (6 * connector - 3 * head_flops(decoder))
    assert after.flops - before.flops == pytest.approx(images * each)


def test_a_budget_of_a_source_that_the_world_lacks_is_refused(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study, ledger = make_study(), Ledger(tmp_path)
    with ledger.open_stage(order(study)[0]) as work:
        work.finish({"sources": {"poems": SOURCES["stories"]}})
    with pytest.raises(ValueError, match="'stories'; the prepared world has poems"):
        cost(_by_kind(study)["pretrain"], ledger)


def test_evaluations_cost_more_with_more_questions_and_when_asked_blind(
    make_study: MakeStudy,
) -> None:
    stage = make_study().lines[0].result

    def flops(**changes: object) -> float:
        evaluation = {**stage.evaluation.model_dump(), **changes}
        found = cost(Evaluate(of=stage.of, evaluation=evaluation)).flops
        assert found is not None
        return found

    assert flops(limit=10) < flops(limit=20) < flops(limit=200) == flops(limit=None)
    assert flops(blind=False) < flops(blind=True)


def test_preparing_and_training_an_encoder_have_a_cost(make_study: MakeStudy) -> None:
    stages = _by_kind(make_study())
    prepare = stages["prepare"]
    assert isinstance(prepare, Prepare)
    assert (cost(prepare).tokens, cost(prepare).flops) == (0, 0.0)
    found = cost(stages["train_encoder"])
    assert found.tokens == 80 * (4 + 16)
    assert found.flops is not None
    image = encoder_flops(stages["train_encoder"].encoder.model_copy(update={"feature_layer": -1}))
    assert found.flops > 3 * 80 * image
