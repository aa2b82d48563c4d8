"""Counted by hand: model FLOPs, shares of time, what the meters of a stage say."""

import time

import pytest
import torch

import tiny
from midstream.core.tokens import TokenCount
from midstream.study.store import Ledger
from midstream.train.step import PARTS, Clock, report, training_flops


def test_the_flops_of_a_text_token_are_six_a_weight_and_attention() -> None:
    config = tiny.DECODER
    length = 10
    counts = TokenCount(text=length, target=length, pad=6)
    weights = config.num_parameters - config.vocab_size * config.hidden_size  # no input embedding
    gains = config.num_layers * (2 + 2 * config.qk_norm) * config.hidden_size + config.hidden_size
    attended = length * (length + 1) // 2
    by_hand = 6 * (weights - gains) * length
    by_hand += 12 * config.num_layers * config.hidden_size * attended
    found = training_flops(config, None, counts, attended, 0, encoder_trained=False)
    assert found == pytest.approx(by_hand)


def test_patches_have_no_head_and_a_frozen_encoder_only_looks() -> None:
    counts = TokenCount(image=5, caption=3, target=3)
    common = (tiny.DECODER, tiny.ENCODER, counts, 0)
    none = training_flops(*common, 0, encoder_trained=False)
    frozen = training_flops(*common, 2, encoder_trained=False)
    trained = training_flops(*common, 2, encoder_trained=True)
    assert trained - none == pytest.approx(3 * (frozen - none))
    text = training_flops(
        tiny.DECODER, tiny.ENCODER, TokenCount(text=8), 0, 0, encoder_trained=False
    )
    head = 6 * tiny.DECODER.hidden_size * tiny.DECODER.vocab_size
    assert text - none == pytest.approx(5 * head)


def test_a_clock_adds_up_and_goes_on_from_before() -> None:
    clock = Clock(torch.device("cpu"), {"data": 2.0})
    with clock.part("data"):
        time.sleep(0.01)
    with clock.part("model", on_device=True):
        pass
    read = clock.read()
    assert read.keys() == set(PARTS)
    assert 2.01 <= read["data"] < 3.0
    assert read["encoder"] == 0.0


def test_the_report_divides_by_the_whole_time() -> None:
    found = report(
        counts=TokenCount(text=60, image=20, pad=20),
        images=4,
        flops=8e9,
        seconds=2.0,
        parts={"data": 0.5, "model": 1.0},
        peak_flops=1e10,
        peak_memory_bytes=7,
    )
    assert found["tokens_per_second"] == 50.0
    assert found["useful_tokens_per_second"] == 40.0
    assert found["images_per_second"] == 2.0
    assert found["model_flops_utilisation"] == pytest.approx(0.4)
    assert found["time_shares"]["data"] == 0.25
    assert found["time_shares"]["other"] == pytest.approx(0.25)
    assert sum(found["time_shares"].values()) == pytest.approx(1.0)


def test_a_stage_keeps_its_meters(tiny_ledger: Ledger) -> None:
    results = tiny_ledger.results(tiny.TEXT)
    meters = results["meters"]
    assert meters["useful_tokens_per_second"] <= meters["tokens_per_second"]
    assert meters["images_per_second"] == 0.0
    assert 0.0 < meters["model_flops_utilisation"] < 1.0
    assert meters["time_shares"]["model"] > 0.1
    assert sum(meters["time_shares"].values()) == pytest.approx(1.0, abs=0.05)
    seconds = sum(line["seconds"] for line in tiny_ledger.metrics(tiny.TEXT))
    assert results["seconds"] >= seconds * 0.9
