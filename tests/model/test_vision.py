"""Every encoder against `transformers`' own hidden states, on tiny checkpoints of its class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from midstream.config import EncoderConfig, FusedEncoder, PatchProjection
from midstream.exchange.towers import read_encoder
from midstream.model.vision import (
    FusedTowers,
    Tower,
    VisionEncoder,
    build_encoder,
    load_encoder,
    load_towers,
)
from midstream.model.weights import initialise, save_weights, weights_digest
from vision_checkpoints import BUILD, build_tower, hidden_states, save_tower, vision_part

CONFIG = EncoderConfig(
    image_size=16, patch_size=4, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=64
)
# Two rows of sizes: the checkpoint's own, and one that interpolates its positions.
NATIVE = {"dinov2": 40, "dinov2 swiglu": 40, "dinov2 with registers": 40}


def native(kind: str) -> int:
    return NATIVE.get(kind, 32)


def pictures(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def loaded(kind: str, folder: Path, **changes: Any) -> VisionEncoder:
    """Our encoder of a tiny checkpoint, with other options than it has."""
    config, tensors, _, _ = read_encoder(save_tower(kind, folder))
    config = EncoderConfig.model_validate(config.model_dump() | changes)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "tower.safetensors"
    )
    encoder = build_encoder(config)
    load_encoder(encoder, folder / "tower.safetensors")
    return encoder


@torch.no_grad()
def theirs(kind: str, pixels: torch.Tensor, layer: int, final_norm: bool) -> torch.Tensor:
    """What `transformers` records for a layer: patches only."""
    states = hidden_states(kind, pixels)
    assert len(states) == 4
    tower = vision_part(build_tower(kind))
    names = {"dinov2": "layernorm", "dinov3": "norm"}
    norm = getattr(tower, names.get(kind.partition(" ")[0], "post_layernorm"))
    return norm(states[layer]) if final_norm else states[layer]


@pytest.mark.parametrize(
    ("layer", "final_norm", "scale"), [(-1, True, 1.0), (-2, False, 1.5), (-3, False, 1.0)]
)
@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_features_are_the_hidden_states_that_transformers_records(
    kind: str, scale: float, layer: int, final_norm: bool, tmp_path: Path
) -> None:
    size = 8 * round(native(kind) * scale / 8)
    encoder = loaded(kind, tmp_path, image_size=size, feature_layer=layer, final_norm=final_norm)
    pixels = pictures(2, size)
    found = encoder(pixels)
    assert found.shape == (2, encoder.num_patches, encoder.width) == (2, (size // 8) ** 2, 32)
    torch.testing.assert_close(found, theirs(kind, pixels, layer, final_norm), atol=2e-6, rtol=2e-6)


@torch.no_grad()
def test_fused_towers_see_the_same_picture_each_in_its_own_colours(tmp_path: Path) -> None:
    parts = [loaded("siglip", tmp_path / "a"), loaded("dinov2", tmp_path / "b", image_size=32)]
    configs = [part.settings for part in parts if isinstance(part, Tower)]
    fused = build_encoder(FusedEncoder(towers=tuple(configs)))
    unused = load_towers(fused, [tmp_path / part / "tower.safetensors" for part in "ab"])
    assert {name.split(".")[1] for name in unused} == {"0", "1"}
    raw = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def pixels(config: EncoderConfig) -> torch.Tensor:
        mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
        return (raw - mean[:, None, None]) / std[:, None, None]

    found = fused(pixels(configs[0]))
    assert found.shape == (2, 16, 64) == (2, fused.num_patches, fused.width)
    for part, config, columns in zip(parts, configs, found.split(32, dim=-1), strict=True):
        torch.testing.assert_close(columns, part(pixels(config)), atol=5e-6, rtol=5e-6)
    assert configs[0].pixel_mean != configs[1].pixel_mean


@torch.no_grad()
def test_patches_are_mapped_one_by_one_in_reading_order() -> None:
    encoder = build_encoder(PatchProjection(image_size=14, patch_size=4, hidden_size=10))
    initialise(encoder, 0)
    pixels = pictures(2, 14)
    weight = encoder.get_parameter("projection.weight")
    bias = encoder.get_parameter("projection.bias")
    found = encoder(pixels)
    assert found.shape == (2, 9, 10)
    for image in range(2):
        for y in range(3):
            for x in range(3):
                patch = pixels[image, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
                expected = weight @ patch.reshape(-1) + bias
                torch.testing.assert_close(found[image, 3 * y + x], expected)


def test_a_tower_holds_only_what_its_features_are_made_of(tmp_path: Path) -> None:
    encoder = build_encoder(CONFIG)
    names = [name for name, _ in encoder.named_parameters()]
    assert not [name for name in names if "head" in name or "post_layernorm" in name]
    assert {name.split(".")[3] for name in names if "layers" in name} == {"0", "1"}
    with_norm = build_encoder(CONFIG.model_copy(update={"final_norm": True}))
    assert {name for name, _ in with_norm.named_parameters()} - set(names) == {
        "tower.post_layernorm.weight",
        "tower.post_layernorm.bias",
    }


def test_so400m_has_the_published_sizes() -> None:
    sizes = {"hidden_size": 1152, "num_layers": 27, "num_heads": 16, "intermediate_size": 4304}
    config = EncoderConfig(image_size=384, patch_size=14, **sizes)
    with torch.device("meta"):
        encoder = build_encoder(config)
    assert config.num_patches == encoder.num_patches == 729
    block = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    embedded = 3 * 14**2 * 1152 + 1152 + 729 * 1152
    assert sum(p.numel() for p in encoder.parameters()) == 26 * block + embedded


def test_an_encoder_without_weights_shows_it_and_building_draws_nothing() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with torch.no_grad():
        for family in ("siglip", "siglip2", "clip", "dinov2", "dinov3"):
            config = EncoderConfig.model_validate(CONFIG.model_dump() | {"family": family})
            assert build_encoder(config)(pictures(1)).isnan().all()
    assert torch.equal(before, torch.get_rng_state())


def test_no_picture_gives_no_feature_and_one_of_another_size_is_refused() -> None:
    encoder = build_encoder(CONFIG)
    assert encoder(pictures(0)).shape == (0, 16, 32)
    with pytest.raises(ValueError, match=r"\(8, 16\), the encoder takes 16 x 16"):
        encoder(torch.zeros(1, 3, 8, 16))


def test_an_encoders_own_file_is_read_back_whole(tmp_path: Path) -> None:
    for config in (CONFIG, FusedEncoder(towers=(CONFIG, CONFIG))):
        encoder, again = build_encoder(config), build_encoder(config)
        initialise(encoder, 3)
        save_weights(encoder, tmp_path / "own.safetensors")
        assert load_encoder(again, tmp_path / "own.safetensors") == ()
        assert weights_digest(again) == weights_digest(encoder)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    loaded("dinov2", tmp_path)
    with pytest.raises(ValueError, match=r"missing: tower\.embeddings\.position_embedding\.weight"):
        load_encoder(build_encoder(CONFIG), tmp_path / "tower.safetensors")
    fused = build_encoder(FusedEncoder(towers=(CONFIG, CONFIG)))
    assert isinstance(fused, FusedTowers)
    with pytest.raises(ValueError, match="1 files were given to a FusedTowers"):
        load_towers(fused, [tmp_path / "tower.safetensors"])
