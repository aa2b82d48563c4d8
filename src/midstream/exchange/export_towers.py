"""The tensors of a vision tower under names of our own, whatever version of transformers named them.

    patch.*  positions  class  registers  norm.*
    blocks.N.{norm1, query, key, value, out, norm2, fc1, fc2}.*   blocks.N.{scale1, scale2}
    blocks.N.{gate, up}.*   in place of fc1, where a block is gated
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_NAMES = (
    (r"^embeddings\.patch_embedding\.", "patch."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch."),
    (r"^embeddings\.position_embedding\.weight$", "positions"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^embeddings\.cls_token$", "class"),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
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
    """Our name of a tensor of a SigLIP or DINOv2 tower of transformers 5."""
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
