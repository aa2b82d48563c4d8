"""Towers of two kinds, trained on captions here, side by side: one encoder of a tiny study."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import tiny
from midstream.config import EncoderConfig, FusedEncoder, Machine
from midstream.core.storage import CorruptError
from midstream.cost.cost import cost, encoder_parameters
from midstream.cost.graph import order, plan
from midstream.cost.pictures import feature_folder, feature_plan
from midstream.data.images import load_pixels
from midstream.exchange.export import export
from midstream.model.weights import read_tensors
from midstream.report.line_rows import Part, line_rows, parts_of
from midstream.study.stages import (
    DataStage,
    Evaluate,
    Finetune,
    FuseEncoders,
    TrainEncoder,
    stage_from_json,
)
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study
from midstream.work.open_model import open_encoder, open_model, open_sources

DINOV2 = EncoderConfig(
    family="dinov2",
    image_size=24,
    patch_size=12,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    num_registers=2,
    feature_layer=-1,
    final_norm=True,
    # As public towers have it: another scale of pixels than SigLIP's.
    pixel_mean=(0.485, 0.456, 0.406),
    pixel_std=(0.229, 0.224, 0.225),
)
SECOND = TrainEncoder(data=tiny.DATA, encoder=DINOV2, training=tiny.ENCODER_STAGE.training)
FUSED = FuseEncoders(towers=(tiny.ENCODER_STAGE, SECOND))
SEES = tiny.image_run(total_tokens=2_000).model_copy(update={"encoder": FUSED})
TALKS = Finetune(start=SEES, training=tiny.CHAT.training)
ASKED = tiny.EVALUATION.model_copy(update={"text_tasks": ()})
RESULT = Evaluate(of=TALKS, evaluation=ASKED)
STUDY = Study(
    name="fused",
    question="?",
    lines=(Line(name="fused", axes={"encoder": "fused"}, result=RESULT),),
    figure=Figure(x="encoder", x_label="encoder"),
)


@pytest.fixture(scope="module")
def ledger(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A store in which both towers are trained, put side by side, and the study is done."""
    folder = tmp_path_factory.mktemp("fused-store")
    found = tiny.store_with(tiny_ledger, folder, tiny.DATA, tiny.ENCODER_STAGE, tiny.TEXT)
    tiny.run_missing(found, RESULT)
    return found


def test_a_dinov2_tower_learns_from_captions_by_the_mean_of_its_patches(ledger: Ledger):
    results = ledger.results(SECOND)
    assert results["final_loss"] < results["first_loss"] - 1
    kept = read_tensors(ledger.folder(SECOND) / "weights" / "model.safetensors")
    assert {"embeddings.cls_token", "embeddings.register_tokens", "layernorm.weight"} <= kept.keys()
    assert "embeddings.mask_token" not in kept
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_fused_features_are_those_of_the_towers_side_by_side(ledger: Ledger):
    source = open_sources(tiny.DATA, ["pictures"], ledger)["pictures"]

    def looked(stage: TrainEncoder | FuseEncoders) -> torch.Tensor:
        encoder = open_encoder(ledger, stage)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        pictures = [load_pixels(source, example, stage.encoder) for example in range(3)]
        with torch.no_grad():
            return encoder(torch.stack([torch.from_numpy(pixels) for pixels in pictures]))

    fused, alone = looked(FUSED), [looked(tower) for tower in FUSED.towers]
    assert fused.shape == (3, 4, 16 + 32)
    # The first tower sees its own pixels, the second those of the first under its own scale.
    assert torch.equal(fused[..., :16], alone[0])
    torch.testing.assert_close(fused[..., 16:], alone[1], atol=1e-5, rtol=1e-5)


def test_a_study_sees_through_both_towers_to_its_scores(ledger: Ledger):
    assert SEES.model.encoder == FusedEncoder(towers=(tiny.ENCODER, DINOV2))
    scores = ledger.results(RESULT)
    assert scores["tasks"].keys() == {"vqav2", "pope"}
    opened = open_model(ledger.folder(TALKS), torch.device("cpu"))
    assert opened.encoder is not None
    assert opened.encoder.width == 48
    results = ledger.results(FUSED)
    assert results["num_parameters"] == sum(p.numel() for p in opened.encoder.parameters())
    # SigLIP's features are of the last block but one, so its last is not kept.
    assert any(name.startswith("towers.0.encoder.layers.1.") for name in results["unused"])
    assert not any(name.startswith("towers.1.") for name in results["unused"])


def test_a_plan_has_each_tower_once_and_knows_what_they_cost(ledger: Ledger, tmp_path: Path):
    kinds = [stage.kind for stage in order(STUDY) if not isinstance(stage, DataStage)]
    assert kinds == [
        *("train_encoder", "train_encoder", "fuse_encoders", "pretrain"),
        *("continue", "finetune", "evaluate"),
    ]
    assert plan(STUDY, ledger).num_done == len(order(STUDY)) == 5 + 7
    assert plan(STUDY, Ledger(tmp_path)).num_done == 0
    found = cost(FUSED)
    assert (found.tokens, found.flops) == (0, 0.0)
    assert found.parameters == encoder_parameters(tiny.ENCODER) + encoder_parameters(DINOV2)


def test_features_are_planned_and_kept_for_the_fused_encoder_as_one(ledger: Ledger):
    seeing = SEES.model_copy(
        update={"training": SEES.training.model_copy(update={"seed": SEES.training.seed + 1})}
    )
    stored = Machine(features="stored")
    (found,) = feature_plan([seeing], ledger, stored)
    assert found.encoder == FUSED
    assert found.choice.decision == "stored"
    assert found.pictures is not None
    runner = tiny.runner(ledger, machine=tiny.MACHINE.model_copy(update={"features": "stored"}))
    runner.run(seeing)
    folder = feature_folder(ledger, FUSED)
    assert folder is not None
    assert list(folder.glob("part-*/features.bin"))
    # Four patches of 48 numbers, two bytes each.
    size = sum(path.stat().st_size for path in folder.glob("part-*/features.bin"))
    assert size % (4 * 48 * 2) == 0
    (again,) = feature_plan(
        [TALKS.model_copy(update={"training": seeing.training})], ledger, stored
    )
    assert again.kept == size // (4 * 48 * 2)


def test_the_report_counts_both_towers(ledger: Ledger):
    parts = parts_of(RESULT)
    assert list(parts) == [
        *(
            "prepare_world",
            "prepare_tokenizer",
            "prepare_source",
            "train_encoder",
            "fuse_encoders",
            "pretrain",
        ),
        *("continue", "finetune", "evaluate"),
    ]
    assert parts["train_encoder"] == Part(tiny.ENCODER_STAGE, before=(SECOND,))
    seen = SEES.model_copy(update={"encoder": SECOND})
    alone = Evaluate(of=Finetune(start=seen, training=TALKS.training), evaluation=ASKED)
    beside = Line(name="alone", axes={"encoder": "dinov2"}, result=alone)
    fused, single = line_rows(STUDY.model_copy(update={"lines": (*STUDY.lines, beside)}), ledger)
    first, second = (ledger.results(tower)["seconds"] for tower in FUSED.towers)
    assert fused.values["seconds.train_encoder"] == pytest.approx(first + second)
    assert fused.values["seconds.fuse_encoders"] == ledger.results(FUSED)["seconds"]
    assert single.values["seconds.train_encoder"] == second
    assert single.values["seconds.fuse_encoders"] is None


def test_an_export_carries_both_towers_and_its_card_tells_of_them(ledger: Ledger, tmp_path: Path):
    opened = open_model(ledger.folder(TALKS), torch.device("cpu"))
    report = export(opened, tmp_path / "out", text_only=False)
    assert report.kind == "own"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "siglip and dinov2 side by side" in card
    for stage in (FUSED, *FUSED.towers):
        assert stage.name in card
    assert card.index(FUSED.towers[0].name) < card.index(FUSED.towers[1].name)


def test_a_tower_whose_bytes_have_changed_is_not_fused(ledger: Ledger, tmp_path: Path):
    towers = (tiny.DATA, *FUSED.towers)
    broken = tiny.store_with(ledger, tmp_path / "store", *towers)
    path = broken.folder(SECOND) / "weights" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        tiny.runner(broken).run(FUSED)
    assert not broken.is_done(FUSED)


def test_a_fused_encoder_is_read_back_from_json_with_its_identity():
    assert stage_from_json(FUSED.model_dump_json()) == FUSED
    assert stage_from_json(RESULT.model_dump_json()).identity == RESULT.identity
    other = FuseEncoders(towers=(SECOND, tiny.ENCODER_STAGE))
    assert len({FUSED.identity, other.identity, tiny.ENCODER_STAGE.identity}) == 3


def test_towers_that_do_not_look_at_the_same_pictures_are_refused():
    larger = SECOND.model_copy(update={"encoder": DINOV2.model_copy(update={"image_size": 48})})
    with pytest.raises(ValidationError, match="fused towers must agree in image_size"):
        FuseEncoders(towers=(tiny.ENCODER_STAGE, larger))
    with pytest.raises(ValidationError, match="at least 2 items"):
        FuseEncoders(towers=(SECOND,))


def test_a_siglip_2_tower_is_not_trained_on_captions():
    with pytest.raises(ValidationError, match="siglip2 tower is imported, not trained"):
        TrainEncoder(
            data=tiny.DATA,
            encoder=tiny.ENCODER.model_copy(update={"family": "siglip2"}),
            training=tiny.ENCODER_STAGE.training,
        )
