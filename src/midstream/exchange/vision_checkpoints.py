"""Vision towers of other people: SigLIP, SigLIP 2, CLIP, DINOv2, DINOv3, as `transformers` saves
them."""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from midstream.config import EncoderConfig
from midstream.exchange.huggingface import read_config, unwrapped
from midstream.model.weights import read_tensors
from midstream.storage import read_json

Family = Literal["siglip", "siglip2", "clip", "dinov2", "dinov3"]

# model_type in config.json -> family, and the class that knows its files' names.
FAMILIES: dict[str, tuple[Family, str]] = {
    "siglip": ("siglip", "SiglipVisionModel"),
    "siglip_vision_model": ("siglip", "SiglipVisionModel"),
    "siglip2": ("siglip2", "Siglip2VisionModel"),
    "siglip2_vision_model": ("siglip2", "Siglip2VisionModel"),
    "clip": ("clip", "CLIPVisionModel"),
    "clip_vision_model": ("clip", "CLIPVisionModel"),
    "dinov2": ("dinov2", "Dinov2Model"),
    "dinov2_with_registers": ("dinov2", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("dinov3", "DINOv3ViTModel"),
}
# Where preprocessor_config.json does not tell: SigLIP's own, CLIP's and ImageNet's.
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_COLOURS = {
    "siglip": _HALF,
    "siglip2": _HALF,
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": _IMAGENET,
    "dinov3": _IMAGENET,
}
# Tensors of another shape are told, not raised for.
LOADING: dict[str, Any] = {
    "dtype": torch.float32,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}
_OF_A_TOWER = re.compile(r"(vision_model|embeddings|encoder|layer|text_model)\.")
# A DINOv3 that has another value computes something that `EncoderConfig` cannot say.
_DINOV3 = {
    **{"rope_theta": 100.0, "query_bias": True, "key_bias": False, "value_bias": True},
    **{"proj_bias": True, "mlp_bias": True},
}


def is_encoder(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a vision tower that is known here."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in FAMILIES


def read_encoder(
    folder: Path,
) -> tuple[EncoderConfig, dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """A tower's configuration, its tensors in float32 under `transformers`' names of its class,
    the file's names of what is no part of it, and sentences about its names.

    Older files' names are brought to today's by `transformers` itself; of a whole SigLIP or CLIP
    only the vision tower is read. Features are those of the second to last block (recipe of
    Prismatic and LLaVA). Raises FileNotFoundError or ValueError as `read_tensors` does, and
    ValueError with the first tensors that are missing or of another shape.
    """
    import transformers

    stated = read_config(folder)
    _, name = FAMILIES[stated.model_type]
    stated = getattr(stated, "vision_config", stated)
    config = encoder_config(stated, folder)
    # Reading the files first names a missing or broken shard; transformers would not.
    stored, notes = unwrapped(
        read_tensors(folder), lambda name: _OF_A_TOWER.match(name) is not None, path=folder
    )
    model, loading = getattr(transformers, name).from_pretrained(
        None, config=stated, state_dict=dict(stored), **LOADING
    )
    # A checkpoint may leave out its pooling head, of which no features are made.
    missing = [key for key in sorted(loading["missing_keys"]) if not key.startswith("head.")]
    wrong = [str(item) for item in loading["mismatched_keys"]]
    others = sorted(loading["unexpected_keys"])
    if missing or wrong:
        raise ValueError(
            f"{folder} is no whole {name}: missing {few(missing)}; mismatched {few(wrong)}; "
            f"unexpected {few(others)}. Download it again"
        )
    tensors: dict[str, Tensor] = model.state_dict()
    kept = {key: value for key, value in tensors.items() if key not in loading["missing_keys"]}
    return config, kept, tuple(others), notes


def few(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def encoder_config(stated: Any, folder: Path, **seen: Any) -> EncoderConfig:
    """The configuration of a tower out of `transformers`' own; its colours are the folder's, and
    `seen` are settings that the folder says elsewhere.

    Raises ValueError for a model_type that is not known, or a setting that would not be honoured.
    """
    if stated.model_type not in FAMILIES:
        raise ValueError(
            f"{folder} has a vision tower of model_type {stated.model_type!r}; known are "
            + ", ".join(FAMILIES)
        )
    family, _ = FAMILIES[stated.model_type]
    for name, value in _DINOV3.items() if family == "dinov3" else ():
        if getattr(stated, name, value) != value:
            raise ValueError(
                f"{folder} is a DINOv3 with {name} {getattr(stated, name)!r}, which is not read; "
                f"import one with {value!r}"
            )
    mean, std = colours(folder, *_COLOURS[family])
    patch = stated.patch_size
    if family == "siglip2":
        # NaFlex takes any grid; its positions are a square one.
        image_size = patch * round(stated.num_patches**0.5)
    else:
        image_size = stated.image_size
    dinov2 = family == "dinov2"
    gated = getattr(stated, "use_swiglu_ffn" if dinov2 else "use_gated_mlp", False)
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
        num_registers=getattr(stated, "num_register_tokens", 0),
        ffn="swiglu" if gated else "mlp",
        hidden_act=stated.hidden_act,
        norm_eps=stated.layer_norm_eps,
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
        **seen,
    )


def colours(folder: Path, mean: Any, std: Any) -> tuple[Any, Any]:
    """Mean and standard deviation that a folder's own processor takes, else those given."""
    values = pictures(folder)
    return values.get("image_mean", mean), values.get("image_std", std)


def fitting(folder: Path) -> Literal["letterbox", "square", "crop"]:
    """How a folder's own processor makes a picture square."""
    values = pictures(folder)
    if "resize" in values:
        named: Literal["letterbox", "square", "crop"] = values["resize"]
        return named
    if values.get("do_pad"):
        return "letterbox"
    return "crop" if values.get("do_center_crop") else "square"


def pictures(folder: Path) -> dict[str, Any]:
    """What a folder's processor files say of pictures, in a file of their own or as a part."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        found |= values.get("image_processor", values) if isinstance(values, dict) else {}
    return found
