"""An encoder on pictures of another size: its positions as `transformers` interpolates them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_vision import CONFIG

from midstream.config import EncoderConfig, FusedEncoder, PatchProjection
from midstream.config.model import at_size
from midstream.exchange.towers import read_encoder
from midstream.model.vision import Tower, build_encoder, load_encoder, positions, resized
from midstream.model.weights import fill, initialise
from vision_checkpoints import BUILD, build_tower, hidden_states, save_tower, vision_part

DINOV2 = CONFIG.model_copy(update={"family": "dinov2"})


@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_an_owned_tower_starts_with_the_positions_that_transformers_interpolates(
    kind: str, tmp_path: Path
) -> None:
    """Smaller and larger; at its own size with those that it has, to the last bit."""
    config, tensors, *_ = read_encoder(save_tower(kind, tmp_path))
    config = EncoderConfig(**{**dict(config), "feature_layer": -1, "final_norm": True})
    save_file({name: one.contiguous() for name, one in tensors.items()}, tmp_path / "w.safetensors")
    own = build_encoder(config)
    load_encoder(own, tmp_path / "w.safetensors")
    tower = vision_part(build_tower(kind))
    family = kind.partition(" ")[0]
    norm = getattr(tower, {"dinov2": "layernorm", "dinov3": "norm"}.get(family, "post_layernorm"))
    for size in (24, 64):
        wanted = at_size(config, size, owned=True)
        assert isinstance(wanted, EncoderConfig)
        assert wanted.position_patches == wanted.num_patches == (size // 8) ** 2
        encoder = build_encoder(wanted)
        load_encoder(encoder, tmp_path / "w.safetensors", config)
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        expected = norm(hidden_states(kind, pixels)[-1])
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(own, Tower)
    if family != "dinov3":
        (stored,) = (value for name, value in own.state_dict().items() if "position_embed" in name)
        assert torch.equal(positions(own).view(-1, 32), stored.view(-1, 32))


@torch.no_grad()
def test_fused_towers_are_interpolated_each_in_its_own_way(tmp_path: Path) -> None:
    config = FusedEncoder(towers=(CONFIG, DINOV2))
    frozen, owned = (at_size(config, 24, owned=kept) for kept in (False, True))
    assert isinstance(frozen, FusedEncoder)
    assert [tower.position_size for tower in frozen.towers] == [16, 16]
    encoder = build_encoder(config)
    initialise(encoder, 0)
    tensors = encoder.state_dict()
    found = []
    for wanted in (frozen, owned):
        encoder = build_encoder(wanted)
        fill(encoder, resized(tensors, config, wanted, path=tmp_path), path=tmp_path)
        pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        found.append(encoder(pixels))
    assert found[0].shape == (2, 36, 64)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_a_size_that_the_patches_do_not_fill_is_refused_with_the_nearest() -> None:
    patches = PatchProjection(image_size=16, patch_size=4, hidden_size=8)
    for encoder in (CONFIG, FusedEncoder(towers=(CONFIG, DINOV2)), patches):
        assert at_size(encoder, 16, owned=True) == encoder
        with pytest.raises(ValueError, match=r"image_size 26 is no multiple .* 4; choose 24 or 28"):
            at_size(encoder, 26, owned=False)
    assert at_size(patches, 24, owned=True).num_patches == 36
    # Towers of other patches happen to agree at one size: 3 x 3 of 4 and of 5 in 15 pixels.
    four, five = (
        CONFIG.model_copy(update={"image_size": 15, "patch_size": size}) for size in (4, 5)
    )
    with pytest.raises(ValueError, match="must agree in image_size, patches and resize"):
        at_size(FusedEncoder(towers=(four, five)), 40, owned=False)
