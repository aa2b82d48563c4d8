"""Tiny vision checkpoints in the layouts of the hub, saved by `transformers`: random weights."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from checkpoints import KEPT, copied, randomise

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP = SIZES | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
DINOV2 = SIZES | {"mlp_ratio": 2, "image_size": 40, "patch_size": 8}
TEXT = SIZES | {"intermediate_size": 64, "vocab_size": 40}


BUILD: dict[str, Callable[[], Any]] = {
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP)),
    "whole siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=SIGLIP, text_config=TEXT)
    ),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIGLIP)),
    "whole clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=SIGLIP, text_config=TEXT, projection_dim=16)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SIGLIP, num_register_tokens=2)
    ),
    "dinov3 swiglu": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SIGLIP, num_register_tokens=4, use_gated_mlp=True)
    ),
    "siglip2": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            **SIZES, intermediate_size=64, patch_size=8, num_patches=16
        )
    ),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)),
    "dinov2 swiglu": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**DINOV2, use_swiglu_ffn=True)
    ),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=3)
    ),
}


@cache
def build_tower(kind: str, seed: int = 0) -> Any:
    """A model of one kind whose every tensor is random (norms and tokens too); read it only."""
    with torch.random.fork_rng(devices=[]):
        return randomise(BUILD[kind](), seed=seed)


def save_tower(kind: str, folder: Path, *, seed: int = 0, shard: bool = False) -> Path:
    """Save a tower with its preprocessor_config.json; returns the folder."""
    return copied(_saved(kind, seed, shard), folder)


@cache
def _saved(kind: str, seed: int, shard: bool) -> Path:
    folder = Path(KEPT.name, f"{kind}-{seed}-{shard}")
    build_tower(kind, seed).save_pretrained(folder, max_shard_size="20KB" if shard else "1GB")
    mean, std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
    if kind.startswith("dino"):
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    elif "clip" in kind:
        mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    stated = {"image_mean": mean, "image_std": std, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return folder


def vision_part(model: Any) -> Any:
    """The tower itself, also inside a whole SigLIP or CLIP."""
    whole = (transformers.SiglipModel, transformers.CLIPModel)
    return model.vision_model if isinstance(model, whole) else model


@torch.no_grad()
def hidden_states(kind: str, pixels: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """What `transformers` records behind the embeddings and each block: the patches' part."""
    tower = vision_part(build_tower(kind, seed))
    if kind.startswith("dino"):
        skipped = 1 + getattr(tower.config, "num_register_tokens", 0)
        states = tower(pixels, output_hidden_states=True).hidden_states
        return [state[:, skipped:] for state in states]
    if "clip" in kind:
        states = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        return [state[:, 1:] for state in states.hidden_states]
    if kind != "siglip2":
        found = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        return list(found.hidden_states)
    # NaFlex takes patches as its image processor flattens them: row, column, channel.
    side = pixels.shape[-1] // 8
    corners = [(8 * y, 8 * x) for y in range(side) for x in range(side)]
    patches = [
        pixels[:, :, y : y + 8, x : x + 8].permute(0, 2, 3, 1).flatten(1) for y, x in corners
    ]
    found = tower(
        torch.stack(patches, dim=1),
        pixel_attention_mask=torch.ones((len(pixels), side * side), dtype=torch.long),
        spatial_shapes=torch.tensor([[side, side]] * len(pixels)),
        output_hidden_states=True,
    )
    return list(found.hidden_states)
