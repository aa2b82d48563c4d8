"""Stages that go on with larger pictures: frozen and trained encoders, resumed and evaluated."""

import json
from pathlib import Path

import pytest
import torch

import tiny
from midstream.config import ContinuedCosine, Epochs, ProjectorConfig, WarmupCosine
from midstream.config.connectors import AveragePool, Resampler
from midstream.cost.cost import cost
from midstream.cost.pictures import feature_folder, feature_plan
from midstream.exchange.export import export
from midstream.model.vision import build_encoder, resized
from midstream.model.weights import joint_digest, tensor_digest
from midstream.study.label import words
from midstream.study.stages import Continue, ContinueFrom, Evaluate, Finetune, InitFrom
from midstream.study.store import Ledger
from midstream.work.open_model import open_encoder, open_model

HIGH_END = WarmupCosine(peak_rate=tiny.RATE, end_rate=1e-3, warmup_fraction=0.1)


def first(**changes: object) -> Continue:
    start = ContinueFrom(stage=tiny.TEXT, completion=0.4)
    return tiny.image_run(start, total_tokens=4_000, schedule=HIGH_END, **changes)


def larger(before: Continue, image_size: int | None = 48, **changes: object) -> Continue:
    """Goes on from a stage, with its rate, on pictures of this size."""
    # Ends above the end rate of the stage behind it.
    goes_on = ContinuedCosine(end_rate=tiny.END_RATE if image_size else tiny.END_RATE / 2)
    stage = tiny.image_run(total_tokens=4_000, **({"schedule": goes_on} | changes))
    return Continue(**{**dict(stage), "start": InitFrom(stage=before), "image_size": image_size})


def chat(before: Continue, image_size: int | None = None) -> Finetune:
    training = tiny.CHAT.training.model_copy(
        update={"budget": Epochs(sources=("talks",), epochs=1)}
    )
    return Finetune(start=before, training=training, image_size=image_size)


FROZEN, OWNED = first(), first(encoder_rate_factor=0.5)
FROZEN_LARGE, OWNED_LARGE = larger(FROZEN), larger(OWNED)
POSITIONS = "encoder.tower.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def ledger(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    folder = tmp_path_factory.mktemp("resolution")
    mine = tiny.begun(tiny_ledger, folder)
    tiny.run_missing(mine, FROZEN_LARGE, OWNED_LARGE)
    return mine


def test_the_size_is_taken_over_and_says_nothing_where_none_is_given() -> None:
    assert FROZEN.model.encoder == tiny.ENCODER
    for stage in (FROZEN_LARGE, larger(FROZEN_LARGE, None), chat(FROZEN_LARGE)):
        assert stage.model.encoder is not None
        assert (stage.model.encoder.image_size, stage.model.encoder.num_patches) == (48, 16)
        assert stage.encoder_stage == tiny.ENCODER_STAGE
    assert chat(OWNED_LARGE, 24).model.encoder.num_patches == 4  # type: ignore[union-attr]
    assert "image_size" not in FROZEN.identity_fields
    assert FROZEN_LARGE.identity != larger(FROZEN, None).identity
    assert "48 pixels" in words(FROZEN_LARGE)
    assert "pixels" not in words(FROZEN)


def test_sizes_that_cannot_be_are_refused_when_the_stage_is_made() -> None:
    with pytest.raises(ValueError, match=r"image_size 50 is no multiple of .* patch_size 12"):
        larger(FROZEN, 50)
    with pytest.raises(ValueError, match="an image takes 196 positions, a row has 192"):
        chat(FROZEN, 168)


def test_a_connector_takes_the_larger_grid_or_the_stage_is_refused() -> None:
    pooled = ProjectorConfig(reduction=AveragePool(window=2))
    seen = Continue(**{**dict(first()), "projector": pooled})
    assert (seen.model.image_tokens, chat(seen, 48).model.image_tokens) == (1, 4)
    with pytest.raises(
        ValueError, match=r"window 2 .* does not divide the encoder's 3 x 3 patches"
    ):
        chat(seen, 36)
    queries = ProjectorConfig(reduction=Resampler(num_latents=3))
    same = Continue(**{**dict(first()), "projector": queries, "image_size": 48})
    assert same.model.image_tokens == 3


def test_a_frozen_encoder_looks_at_the_larger_pictures_and_keeps_features_of_its_own(
    ledger: Ledger,
) -> None:
    assert "encoder" not in {name.split(".")[0] for name in tiny.weights(ledger, FROZEN_LARGE)}
    machine = tiny.MACHINE.model_copy(update={"features": "stored"})
    stages = [chat(FROZEN), chat(FROZEN_LARGE)]
    small, large = feature_plan(stages, ledger, machine)
    assert (small.config.num_patches, large.config.num_patches) == (4, 16)
    assert large.store_bytes == 4 * small.store_bytes  # type: ignore[operator]
    folders = {feature_folder(ledger, tiny.ENCODER_STAGE, plan.config) for plan in (small, large)}
    assert len(folders) == 2
    assert feature_folder(ledger, tiny.ENCODER_STAGE) in folders
    opened = open_model(ledger.folder(FROZEN_LARGE), torch.device("cpu"))
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert opened.encode(pixels).shape == (2, 16, 16)


def test_an_owned_encoders_positions_are_interpolated_once_and_saved(ledger: Ledger) -> None:
    before, after = tiny.weights(ledger, OWNED), tiny.weights(ledger, OWNED_LARGE)
    assert before[POSITIONS].shape == (4, 16)
    assert after[POSITIONS].shape == (16, 16)
    held, wanted = OWNED.model.encoder, OWNED_LARGE.model.encoder
    assert held is not None
    assert wanted is not None
    own = {name[8:]: value for name, value in before.items() if name.startswith("encoder.")}
    expected = resized(own, held, wanted, path=Path())
    # This stage keeps the encoder as it is.
    for name, value in expected.items():
        assert torch.equal(after[f"encoder.{name}"], value), name
    started = {**before, **{f"encoder.{name}": value for name, value in expected.items()}}
    line, *_ = (ledger.folder(OWNED_LARGE) / "starts.jsonl").read_text().splitlines()
    digests = {name: tensor_digest(value) for name, value in started.items()}
    assert json.loads(line)["weights_digest"] == joint_digest(digests)
    assert ledger.metrics(OWNED_LARGE)[0]["rate"] == ledger.results(OWNED)["last_rate"]


def test_an_encoder_that_learns_with_larger_pictures_learns_positions_for_them(
    ledger: Ledger, tmp_path: Path
) -> None:
    """From the encoder's own weights, stopped in between and resumed bit for bit."""
    stage = larger(FROZEN, encoder_rate_factor=0.5)
    tiny.run_missing(ledger, stage)
    frozen = open_encoder(ledger, tiny.ENCODER_STAGE).state_dict()
    assert stage.model.encoder is not None
    shape = build_encoder(stage.model.encoder).state_dict()[POSITIONS[8:]].shape
    learnt = tiny.weights(ledger, stage)[POSITIONS]
    start = resized(frozen, tiny.ENCODER, stage.model.encoder, path=Path())[POSITIONS[8:]]
    assert learnt.shape == start.shape == shape == (16, 16)
    assert not torch.equal(learnt, start)
    torch.testing.assert_close(learnt, start, atol=0.1, rtol=0.0)
    own = tiny.begun(ledger, tmp_path, FROZEN)
    tiny.run_in_two(own, stage, steps=1)
    assert tiny.bits(own, stage)["weights"] == tiny.bits(ledger, stage)["weights"]


def test_fine_tuning_and_evaluation_see_the_last_size_and_the_plan_counts_it(
    ledger: Ledger,
) -> None:
    stage = chat(OWNED_LARGE)
    result = Evaluate(of=stage, evaluation=tiny.EVALUATION)
    tiny.run_missing(ledger, result)
    assert set(ledger.results(result)["tasks"]) == {"vqav2", "pope", "pocket_facts"}
    small, large = (cost(one, ledger) for one in (chat(OWNED), stage))
    images = ledger.results(stage)["tokens"]["image"]
    assert images == 16 * 60  # a picture a conversation
    assert large.tokens == ledger.results(stage)["tokens_seen"]
    assert large.tokens - small.tokens == 12 * 60
    assert large.flops > small.flops  # type: ignore[operator]


def test_an_export_computes_what_the_model_does_and_says_its_size(
    ledger: Ledger, tmp_path: Path
) -> None:
    said = {FROZEN_LARGE: ", positions interpolated from pictures of 24 x 24", OWNED_LARGE: "\n"}
    for stage, further in said.items():
        opened = open_model(ledger.folder(stage), torch.device("cpu"))
        export(opened, tmp_path / stage.name, text_only=False)
        card = (tmp_path / stage.name / "README.md").read_text()
        assert f"final norm, 48 x 48 pixels, 16 patches{further}" in card
        assert card.count("- Pictures from this stage on: 48 x 48 pixels") == 1
