"""The tensors of a vision tower under names of our own, whichever transformers named them.

patch.*  positions  class  registers  prenorm.*  norm.*
blocks.N.{norm1, query, key, value, out, norm2, fc1, fc2}.*   blocks.N.{scale1, scale2}
blocks.N.{gate, up}.*   in place of fc1, where a block is gated
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from midstream.config import AnyEncoderConfig, EncoderConfig, FusedEncoder, PatchProjection
from midstream.model.vision import FusedTowers, Tower, VisionEncoder

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
