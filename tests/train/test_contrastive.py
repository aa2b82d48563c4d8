from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from midstream.config import ContrastiveTraining
from midstream.config.training import rate_at
from midstream.data.prepare import open_codec
from midstream.data.sources import Source
from midstream.model.vision import build_encoder, load_encoder
from midstream.model.weights import load_weights, weights_digest
from midstream.study.store import Ledger
from midstream.train import contrastive
from midstream.train.contrastive import HELD_APART, PixelCache, build_siglip, train_encoder
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


def test_a_source_without_room_for_a_batch_is_refused_with_the_numbers(
    tiny_ledger: Ledger, source: Source, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"'pictures' holds 320 captions.*65 and 256 held apart"):
        train(tiny_ledger, source, tmp_path, batch_images=65)


def test_a_caption_longer_than_the_text_tower_is_named(
    tiny_ledger: Ledger, source: Source, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\.tar, sample .*tokens.*takes 8; raise max_text_tokens"):
        train(tiny_ledger, source, tmp_path, max_text_tokens=8)


def test_a_source_without_the_asked_captions_is_refused_before_the_training(
    tiny_ledger: Ledger, source: Source, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"'pictures': 0 of its 320 pictures have a synthetic"):
        train(tiny_ledger, source, tmp_path, caption="random")


def test_a_step_that_is_not_finite_stops_the_training(
    tiny_ledger: Ledger, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = PixelCache.batch
    monkeypatch.setattr(PixelCache, "batch", lambda cache, examples: batch(cache, examples) * 1e38)
    with pytest.raises(contrastive.NonFiniteError, match="step 0: loss nan"):
        train(tiny_ledger, source, tmp_path)
    assert not (tmp_path / "weights").exists()
