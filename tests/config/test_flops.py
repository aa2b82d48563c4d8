"""Model FLOPs against sums made by hand."""

from typing import Any

import pytest

from midstream.config import GatedBlocks, ProjectorConfig, Resampler, VLMConfig
from midstream.config.connectors import connector_flops, gated_flops
from midstream.config.flops import model_flops
from midstream.config.model import encoder_flops
from tiny import DECODER, ENCODER

TEXT_MODEL = VLMConfig(decoder=DECODER)
SEEING = VLMConfig(decoder=DECODER, encoder=ENCODER)


def flops(model: VLMConfig, **changes: Any) -> float:
    """Of nothing but what is said."""
    nothing = {"positions": 0, "texts": 0, "attended": 0, "images": 0, "encoded": 0}
    given: dict[str, Any] = {**nothing, "trains_encoder": False, **changes}
    return float(model_flops(model, **given))


def test_a_text_token_takes_six_a_weight_and_attention_once_a_pair() -> None:
    length, config = 10, DECODER
    weights = config.num_parameters - config.vocab_size * config.hidden_size  # no input embedding
    gains = config.num_layers * (2 + 2 * config.qk_norm) * config.hidden_size + config.hidden_size
    attended = length * (length + 1) // 2
    by_hand = 6 * (weights - gains) * length
    by_hand += 12 * config.num_layers * config.hidden_size * attended
    found = flops(TEXT_MODEL, positions=length, texts=length, attended=attended)
    assert found == pytest.approx(by_hand)


def test_patches_have_no_head_and_a_picture_costs_its_encoder_once_or_thrice() -> None:
    row = {"positions": 8, "images": 2}
    stored = flops(SEEING, **row, texts=3)
    head = 6 * DECODER.hidden_size * DECODER.vocab_size
    assert flops(SEEING, **row, texts=8) - stored == pytest.approx(5 * head)
    frozen = flops(SEEING, **row, texts=3, encoded=2)
    assert frozen - stored == pytest.approx(2 * encoder_flops(ENCODER))
    trained = flops(SEEING, **row, texts=3, encoded=2, trains_encoder=True)
    # Pixels have no gradient, features then have one.
    pixels = 2 * ENCODER.num_patches * 3 * ENCODER.patch_size**2 * ENCODER.hidden_size
    sizes = (ENCODER.num_patches, ENCODER.hidden_size, DECODER.hidden_size)
    first = 2 * ENCODER.num_patches * 4 * ENCODER.hidden_size**2
    assert trained - frozen == pytest.approx(2 * (2 * encoder_flops(ENCODER) - pixels + first))
    connector = 3 * connector_flops(SEEING.projector, *sizes) - first
    assert stored - flops(TEXT_MODEL, positions=8, texts=3) == pytest.approx(2 * connector)


def test_gated_blocks_count_at_every_position_and_picture() -> None:
    gated = GatedBlocks(num_heads=2, head_dim=16)
    resampler = Resampler(num_latents=3, num_layers=1, num_heads=2, head_dim=8)
    projector = ProjectorConfig(num_layers=0, reduction=resampler, gated=gated)
    model = VLMConfig(decoder=DECODER, encoder=ENCODER, projector=projector)
    found = flops(model, positions=9, images=2) - flops(TEXT_MODEL, positions=9)
    position, picture = gated_flops(
        gated, DECODER.num_layers, DECODER.hidden_size, ENCODER.hidden_size, 3
    )
    sizes = (ENCODER.num_patches, ENCODER.hidden_size, DECODER.hidden_size)
    connector = 2 * connector_flops(projector, *sizes)
    assert found == pytest.approx(3 * (9 * position + 2 * picture + connector))


def test_a_frozen_decoder_needs_no_gradients_of_its_weights() -> None:
    row = {"positions": 6, "texts": 6, "attended": 21}
    attention = 4 * DECODER.hidden_size * DECODER.num_layers * 21
    learnt, kept = flops(TEXT_MODEL, **row), flops(TEXT_MODEL, **row, trains_decoder=False)
    assert kept - 3 * attention == pytest.approx(2 / 3 * (learnt - 3 * attention))
