import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from midstream.config import HELD_APART, ContrastiveTraining, EncoderConfig
from midstream.config.training import rate_at
from midstream.data.prepare import open_codec
from midstream.data.sources import Source
from midstream.model.vision import build_encoder, load_encoder
from midstream.model.weights import load_weights, save_weights, weights_digest
from midstream.study.store import Ledger
from midstream.train import contrastive
from midstream.train.contrastive import PixelCache, SiglipPair, build_siglip, train_encoder
from midstream.work.open_model import open_sources

CPU = torch.device("cpu")


@pytest.fixture
def source(tiny_ledger: Ledger) -> Source:
    return open_sources(tiny.DATA, ["pictures"], tiny_ledger)["pictures"]


def train(ledger: Ledger, source: Source, folder: Path, **changes: Any) -> dict[str, Any]:
    training = ContrastiveTraining(**{**dict(tiny.ENCODER_STAGE.training), **changes})
    codec = open_codec(ledger.folder(tiny.TOKENIZER))
    folder.mkdir(exist_ok=True)
    return train_encoder(
        tiny.ENCODER, training, source, codec, folder, CPU, report=lambda event: None
    )


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(
    tiny_ledger: Ledger, source: Source, tmp_path: Path
) -> None:
    done = tiny_ledger.results(tiny.ENCODER_STAGE)
    again = train(tiny_ledger, source, tmp_path / "again")
    other = train(tiny_ledger, source, tmp_path / "other", seed=1, num_steps=1)
    for name in ("weights_digest", "first_loss", "final_loss", "retrieval"):
        assert again[name] == done[name], name
    assert other["first_loss"] != done["first_loss"]


def test_the_loss_falls_and_each_step_has_a_line(tiny_ledger: Ledger) -> None:
    results = tiny_ledger.results(tiny.ENCODER_STAGE)
    metrics = tiny_ledger.metrics(tiny.ENCODER_STAGE)
    training = tiny.ENCODER_STAGE.training
    assert results["final_loss"] < results["first_loss"] - 1
    assert [line["step"] for line in metrics] == list(range(1, results["steps"] + 1))
    assert [line["loss"] for line in metrics][:: results["steps"] - 1] == [
        results["first_loss"],
        results["final_loss"],
    ]
    assert [line["rate"] for line in metrics] == [
        rate_at(training.schedule, step, training.num_steps) for step in range(results["steps"])
    ]


def test_retrieval_is_measured_on_captions_that_were_never_trained_on(
    tiny_ledger: Ledger, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[np.ndarray] = []
    batch = PixelCache.batch

    def noted(cache: PixelCache, examples: np.ndarray) -> torch.Tensor:
        calls.append(examples)
        return batch(cache, examples)

    monkeypatch.setattr(contrastive.PixelCache, "batch", noted)
    results = train(tiny_ledger, source, tmp_path, num_steps=9)
    trained = np.concatenate(calls[:-1])
    assert len(trained) == 9 * 16
    assert trained.min() >= HELD_APART
    # Two epochs and a bit: each caption that is not held apart comes up at least twice.
    assert np.bincount(trained, minlength=len(source))[HELD_APART:].min() >= 2
    assert np.array_equal(calls[-1], np.arange(HELD_APART))
    assert results["retrieval_chance"] == 1 / HELD_APART
    assert (results["retrieval"] * HELD_APART) % 1 == 0


def test_the_weights_kept_are_those_of_the_vision_tower(tiny_ledger: Ledger) -> None:
    tower = build_siglip(tiny.ENCODER)
    path = tiny_ledger.folder(tiny.ENCODER_STAGE) / "weights" / "model.safetensors"
    load_weights(tower, path)
    digest = tiny_ledger.results(tiny.ENCODER_STAGE)["weights_digest"]
    assert weights_digest(tower) == digest
    encoder = build_encoder(tiny.ENCODER)
    unused = load_encoder(encoder, path)
    assert {name.split(".")[0] for name in unused} == {"encoder", "head", "post_layernorm"}
    assert all(torch.isfinite(value).all() for value in encoder.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_images": 65}, r"'pictures' holds 320 captions.*65 and 256 held apart"),
        ({"max_text_tokens": 8}, r"\.tar, sample .*tokens.*takes 8; raise max_text_tokens"),
        ({"caption": "random"}, r"'pictures': 0 of its 320 pictures have a synthetic"),
    ],
)
def test_captions_that_do_not_fit_are_refused_before_the_training(
    tiny_ledger: Ledger, source: Source, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_ledger, source, tmp_path, **changes)


def test_a_step_that_is_not_finite_stops_the_training(
    tiny_ledger: Ledger, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = PixelCache.batch
    monkeypatch.setattr(PixelCache, "batch", lambda cache, examples: batch(cache, examples) * 1e38)
    with pytest.raises(contrastive.NonFiniteError, match="step 0: loss nan"):
        train(tiny_ledger, source, tmp_path)
    assert not (tmp_path / "weights").exists()


CONFIG = EncoderConfig(
    image_size=16, patch_size=4, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=64
)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def pair_of(seed: int = 0) -> SiglipPair:
    sizes = {"text_hidden_size": 16, "text_num_layers": 2, "max_text_tokens": 5, "seed": seed}
    return SiglipPair(CONFIG, 20, tiny.ENCODER_STAGE.training.model_copy(update=sizes))


def test_start_is_a_function_of_the_seed_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pair_of(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert weights_digest(first) == weights_digest(pair_of(0)) != weights_digest(pair_of(1))
    named = dict(first.named_parameters())
    assert float(named["logit_scale"].exp()) == pytest.approx(10)
    assert float(named["logit_bias"]) == -10
    assert float(named["vision.embeddings.patch_embedding.weight"].std()) == pytest.approx(
        1 / math.sqrt(48), rel=0.1
    )
    assert named["vision.encoder.layers.0.mlp.fc1.bias"].abs().max() == 0
    assert (named["text.encoder.layers.0.layer_norm1.weight"] == 1).all()


def test_loss_is_the_sigmoid_loss_summed_over_all_pairs() -> None:
    pair = pair_of()
    input_ids = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = pair.logits(pictures(3), input_ids)
        loss = pair(pictures(3), input_ids)
    expected = 0.0
    for image in range(3):
        for text in range(3):
            value = float(logits[image, text]) * (1 if image == text else -1)
            expected += math.log1p(math.exp(-value))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert (logits.abs() <= 20.001).all()
    with pytest.raises(ValueError, match="4 ids long, the text tower takes exactly 5"):
        pair.logits(pictures(3), input_ids[:, :4])


def test_training_the_pair_ranks_each_text_with_its_picture(tmp_path: Path) -> None:
    pair = pair_of()
    images, input_ids = pictures(6), torch.arange(30).reshape(6, 5) % 19
    optimizer = torch.optim.Adam(pair.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (pair(images, input_ids) / 6).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in pair.parameters())
    with torch.no_grad():
        assert pair.logits(images, input_ids).argmax(dim=0).tolist() == list(range(6))
    save_weights(pair.tower, tmp_path / "model.safetensors")
    encoder = build_encoder(CONFIG.model_copy(update={"feature_layer": -1}))
    load_encoder(encoder, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = pair.vision(images, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(encoder(images), expected, atol=1e-6, rtol=1e-6)
