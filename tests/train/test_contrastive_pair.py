import math
from pathlib import Path

import pytest
import torch

from midstream.config import EncoderConfig
from midstream.model.vision import build_encoder, load_encoder
from midstream.model.weights import weights_digest
from midstream.train.contrastive import SiglipPair

CONFIG = EncoderConfig(
    image_size=16, patch_size=4, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=64
)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def pair_of(seed: int = 0) -> SiglipPair:
    return SiglipPair(
        CONFIG, vocab_size=20, hidden_size=16, num_layers=2, max_text_tokens=5, seed=seed
    )


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
    pair.save_vision(tmp_path / "model.safetensors")
    encoder = build_encoder(CONFIG.model_copy(update={"feature_layer": -1}))
    load_encoder(encoder, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = pair.vision(images, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(encoder(images), expected, atol=1e-6, rtol=1e-6)
