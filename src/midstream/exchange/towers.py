"""Vision towers of other people, as `transformers` saves them, and ours under names of our own.

patch.*  positions  class  registers  prenorm.*  norm.*
blocks.N.{norm1, query, key, value, out, norm2, fc1, fc2}.*   blocks.N.{scale1, scale2}
blocks.N.{gate, up}.*   in place of fc1, where a block is gated
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from midstream.config import AnyEncoderConfig, EncoderConfig, FusedEncoder, PatchProjection
from midstream.core.storage import read_json
from midstream.exchange.hub import read_config, unwrapped
from midstream.model.vision import FusedTowers, Tower, VisionEncoder
from midstream.model.weights import read_tensors

_NAMES = (
    (r"^embeddings\.patch_embedding\.", "patch."),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch."),
    (r"^embeddings\.position_embedding\.weight$", "positions"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^embeddings\.(cls_token|class_embedding)$", "class"),
    (r"^pre_layrnorm\.", "prenorm."),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^((encoder|model)\.)?layers?\.(\d+)\.", r"blocks.\3."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.(self_attn|attention)\.q_proj\.", ".query."),
    (r"\.(self_attn|attention)\.k_proj\.", ".key."),
    (r"\.(self_attn|attention)\.v_proj\.", ".value."),
    (r"\.(self_attn\.out_proj|attention\.o_proj|attention\.output\.dense)\.", ".out."),
    (r"\.attention\.attention\.(query|key|value)\.", r".\1."),
    (r"\.mlp\.weights_in\.", ".gate_up."),
    (r"\.mlp\.(weights_out|down_proj|fc2)\.", ".fc2."),
    (r"\.mlp\.fc1\.", ".fc1."),
    (r"\.mlp\.gate_proj\.", ".gate."),
    (r"\.mlp\.up_proj\.", ".up."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
    (r"^(post_layernorm|layernorm)\.", "norm."),
)


def own_name(name: str) -> str:
    """Our name of a tensor of a SigLIP, CLIP, DINOv2 or DINOv3 tower of transformers 5."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def own_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors under our names."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        mine = own_name(name)
        if ".gate_up." in mine:
            gate, up = value.chunk(2)
            found |= {mine.replace("gate_up", "gate"): gate, mine.replace("gate_up", "up"): up}
        else:
            found[mine] = value
    return found


def stock_tensors(own: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Our tensors under the names of a stock tower; KeyError for one that there is not."""
    found: dict[str, Tensor] = {}
    for name in names:
        mine = own_name(name)
        if ".gate_up." in mine:
            parts = [own[mine.replace("gate_up", part)] for part in ("gate", "up")]
            found[name] = torch.cat(parts)
        else:
            found[name] = own[mine]
    return found


def num_blocks(tower: EncoderConfig) -> int:
    """Blocks up to the features."""
    return tower.num_layers + 1 + tower.feature_layer


def inner_width(tower: EncoderConfig) -> int:
    """Width between a block's two layers; transformers takes two thirds for DINOv2's gated ones."""
    inner = tower.intermediate_size
    gated = tower.family == "dinov2" and tower.ffn == "swiglu"
    return (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner


def towers_of(
    config: AnyEncoderConfig, encoder: VisionEncoder
) -> list[tuple[AnyEncoderConfig, VisionEncoder]]:
    """The towers side by side in an encoder, each with its configuration."""
    if isinstance(config, FusedEncoder):
        towers = cast(FusedTowers, encoder).towers
        return [
            (one, cast(VisionEncoder, tower))
            for one, tower in zip(config.towers, towers, strict=True)
        ]
    return [(config, encoder)]


def tower_tensors(tower: VisionEncoder) -> dict[str, Tensor]:
    """The tensors of one of Midstream's towers under our names."""
    state = tower.state_dict()
    return own_tensors({name.removeprefix("tower."): value for name, value in state.items()})


@torch.no_grad()
def fixed_tower(config: AnyEncoderConfig, tower: VisionEncoder) -> dict[str, Tensor]:
    """The tensors of the tower's class in `modeling_midstream`, for pictures of the encoder's size.

    Positions are interpolated here; a linear map of flat patches becomes a convolution.
    """
    assert not isinstance(config, FusedEncoder), "its towers are asked one by one"
    size, width = config.patch_size, config.hidden_size
    if isinstance(config, PatchProjection):
        weight, bias = (
            tower.state_dict()["projection.weight"],
            tower.state_dict()["projection.bias"],
        )
        return {"patch.weight": weight.reshape(width, 3, size, size), "patch.bias": bias}
    if config.family == "dinov3":
        # The class has a token for masked patches, which no picture has.
        unused = {"tower.embeddings.mask_token": torch.zeros(1, 1, width)}
        return unused | tower.state_dict()
    own = tower_tensors(tower)
    if config.family == "siglip2":
        flat = own["patch.weight"].reshape(width, size, size, 3)
        own["patch.weight"] = flat.permute(0, 3, 1, 2).contiguous()
    own["positions"] = _positions(config, cast(Tower, tower))
    if config.family == "clip":
        own["patch.bias"] = torch.zeros(width)
    if config.num_prefix:
        start = own.pop("class") + own["positions"][:, :1]
        registers = own.pop("registers", start[:, :0])
        own["prefix"] = torch.cat((start, registers), dim=1)
        own["positions"] = own["positions"][:, 1:].contiguous()
    for name in [name for name in own if ".gate." in name]:
        up = own.pop(name.replace(".gate.", ".up."))
        own[name.replace(".gate.", ".fc1.")] = torch.cat((own.pop(name), up))
    return own


def _positions(config: EncoderConfig, tower: Tower) -> Tensor:
    """What the tower adds to its patches, and to a class token before them."""
    embeddings, size = cast(Any, tower.tower).embeddings, config.image_size
    if config.family == "siglip2":
        side = size // config.patch_size
        weight = embeddings.position_embedding.weight
        grid = weight.unflatten(0, (embeddings.position_embedding_size, -1))
        shape = torch.tensor([[side, side]])
        found = embeddings.resize_positional_embeddings(grid, shape, max_length=side * side)
    else:
        length = config.num_patches + (1 if config.num_prefix else 0)
        like = torch.zeros(1, length, config.hidden_size)
        found = embeddings.interpolate_pos_encoding(like, size, size)
    positions: Tensor = found.detach().clone()
    return positions


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
