from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from midstream.core.storage import read_json, write_json
from midstream.exchange.towers import read_encoder
from vision_checkpoints import BUILD, build_tower, save_tower, vision_part

PATCHES = {"dinov2": 25, "dinov2 swiglu": 25, "dinov2 with registers": 25}
REGISTERS = {"dinov2 with registers": 3, "dinov3": 2, "dinov3 swiglu": 4}


@pytest.mark.parametrize(
    ("kind", "shard"), [*((kind, False) for kind in BUILD), ("whole siglip", True)]
)
def test_a_saved_tower_is_read_with_all_that_it_says(
    kind: str, shard: bool, tmp_path: Path
) -> None:
    folder = save_tower(kind, tmp_path, shard=shard)
    assert len(list(folder.glob("*.safetensors"))) == 1 if not shard else True
    config, tensors, _, notes = read_encoder(folder)
    assert notes == ()
    expected = vision_part(build_tower(kind)).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert config.num_patches == config.position_patches == PATCHES.get(kind, 16)
    assert (config.hidden_size, config.num_layers, config.num_heads) == (32, 3, 2)
    assert config.intermediate_size == 64
    assert config.family == kind.replace("whole ", "").split(" ")[0]
    assert config.num_registers == REGISTERS.get(kind, 0)
    assert config.ffn == ("swiglu" if "swiglu" in kind else "mlp")
    acts = {"dinov2": "gelu", "dinov3": "gelu", "clip": "quick_gelu"}
    assert config.hidden_act == acts.get(config.family, "gelu_pytorch_tanh")
    means = {"dinov2": 0.485, "dinov3": 0.485, "clip": 0.48}
    assert config.pixel_mean[0] == means.get(config.family, 0.5)
    assert config.feature_layer == -2


@pytest.mark.parametrize(
    ("shape", "told"), [(None, "missing pre_layrnorm"), ((31,), r"mismatched .*pre_layr.*31.*32")]
)
def test_a_tensor_that_does_not_fit_is_named(
    shape: tuple[int, ...] | None, told: str, tmp_path: Path
) -> None:
    folder = save_tower("clip", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["pre_layrnorm.weight"]
    if shape is not None:
        tensors["pre_layrnorm.weight"] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=told):
        read_encoder(folder)


def test_a_tower_without_a_pooling_head_is_whole(tmp_path: Path) -> None:
    folder = save_tower("siglip", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    _, found, _, _ = read_encoder(folder)
    assert found.keys() == kept.keys()


def test_clips_own_colours_are_taken_where_no_processor_is_beside_it(tmp_path: Path) -> None:
    folder = save_tower("clip", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    assert read_encoder(folder)[0].pixel_mean == (0.48145466, 0.4578275, 0.40821073)
    nested = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}
    write_json(folder / "processor_config.json", nested)
    assert read_encoder(folder)[0].pixel_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("kind", "name"), [("dinov3", "query_bias"), ("dinov2", "qkv_bias")], ids=["dinov3", "dinov2"]
)
def test_a_dino_with_other_biases_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    folder = save_tower(kind, tmp_path)
    settings = read_json(folder / "config.json")
    write_json(folder / "config.json", settings | {name: False})
    with pytest.raises(ValueError, match=f"{kind} with {name} False, which is not read"):
        read_encoder(folder)


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_a_square_may_be_said_twice_and_another_shape_is_refused(kind: str, tmp_path: Path) -> None:
    folder = save_tower(kind, tmp_path)
    expected, settings = read_encoder(folder)[0], read_json(folder / "config.json")
    side = settings["image_size"]
    twice = {"image_size": [side, side], "patch_size": [8, 8]}
    write_json(folder / "config.json", settings | twice)
    assert read_encoder(folder)[0] == expected
    write_json(folder / "config.json", settings | {"image_size": [side, 2 * side]})
    with pytest.raises(ValueError, match=rf"image_size .{side}, {2 * side}.; only squares"):
        read_encoder(folder)
