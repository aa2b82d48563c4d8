"""Vision towers of other people: SigLIP, SigLIP 2, DINOv2, as `transformers` saves them."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from midstream.config import EncoderConfig
from midstream.storage import read_json

Family = Literal["siglip", "siglip2", "dinov2"]

# model_type in config.json -> family, and the class that knows its files' names.
FAMILIES: dict[str, tuple[Family, str]] = {
    "siglip": ("siglip", "SiglipVisionModel"),
    "siglip_vision_model": ("siglip", "SiglipVisionModel"),
    "siglip2": ("siglip2", "Siglip2VisionModel"),
    "siglip2_vision_model": ("siglip2", "Siglip2VisionModel"),
    "dinov2": ("dinov2", "Dinov2Model"),
    "dinov2_with_registers": ("dinov2", "Dinov2WithRegistersModel"),
}
# Where preprocessor_config.json does not tell: SigLIP's own, and ImageNet's.
_COLOURS = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "siglip2": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def is_encoder(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a vision tower that is known here."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in FAMILIES


def read_encoder(folder: Path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """A tower's configuration and tensors, in float32 under `transformers`' names of its class.

    Older files' names are brought to today's by `transformers` itself; of a whole SigLIP only the
    vision tower is read. Features are those of the second to last block (recipe of Prismatic).
    Raises ValueError that names every tensor that is missing or of another shape.
    """
    import torch
    import transformers

    model_type = read_json(folder / "config.json")["model_type"]
    family, name = FAMILIES[model_type]
    model, loading = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    config = _config_of(family, model.config, folder)
    # A checkpoint may leave out its pooling head, of which no features are made.
    missing = [key for key in sorted(loading["missing_keys"]) if not key.startswith("head.")]
    wrong = [str(item) for item in loading["mismatched_keys"]]
    if missing or wrong:
        known = ", ".join(sorted(loading["unexpected_keys"])[:8]) or "none"
        raise ValueError(
            f"{folder} is no whole {name}: missing {', '.join(missing) or 'nothing'}; mismatched "
            f"{', '.join(wrong) or 'nothing'}; unexpected {known}. Download it again"
        )
    tensors: dict[str, Tensor] = model.state_dict()
    return config, {
        key: value for key, value in tensors.items() if key not in loading["missing_keys"]
    }


def _config_of(family: Family, stated: Any, folder: Path) -> EncoderConfig:
    mean, std = _COLOURS[family]
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.is_file():
        values = read_json(preprocessor)
        mean, std = values.get("image_mean", mean), values.get("image_std", std)
    patch = stated.patch_size
    if family == "siglip2":
        # NaFlex takes any grid; its positions are a square one.
        image_size = patch * round(stated.num_patches**0.5)
    else:
        image_size = stated.image_size
    dinov2 = family == "dinov2"
    swiglu = dinov2 and stated.use_swiglu_ffn
    width = stated.hidden_size
    return EncoderConfig(
        family=family,
        image_size=image_size,
        patch_size=patch,
        hidden_size=width,
        num_layers=stated.num_hidden_layers,
        num_heads=stated.num_attention_heads,
        intermediate_size=int(width * stated.mlp_ratio) if dinov2 else stated.intermediate_size,
        position_size=image_size,
        num_registers=getattr(stated, "num_register_tokens", 0) if dinov2 else 0,
        ffn="swiglu" if swiglu else "mlp",
        hidden_act=stated.hidden_act,
        norm_eps=stated.layer_norm_eps,
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
    )
