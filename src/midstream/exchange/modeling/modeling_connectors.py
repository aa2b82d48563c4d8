"""What makes fewer features of a picture's patches, before the projector's linear layers."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

# Width of a resampler's feed-forward part over its own.
_EXPANSION = 4


def reduction_of(settings: dict[str, Any], width: int) -> nn.Module:
    """The module of a reduction, by its `kind`, over features of this width."""
    if settings["kind"] == "resampler":
        return Perceiver(settings, width)
    return Windows(settings, width)


class Windows(nn.Module):
    """[images, patches, width] -> one feature a window: its patches side by side, their mean, or
    what the mean finds in them."""

    def __init__(self, settings: dict[str, Any], width: int) -> None:
        super().__init__()
        self.kind, self.window = settings["kind"], settings["window"]
        if self.kind == "attention":
            self.num_heads = settings["num_heads"]
            self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in "1234")

    def forward(self, features: Tensor) -> Tensor:
        """Windows in reading order."""
        images, patches, width = features.shape
        window, left = self.window, isqrt(patches) // self.window
        cut = features.view(images, left, window, left, window, width).transpose(2, 3)
        cut = cut.reshape(images, left * left, window * window, width)
        if self.kind == "shuffle":
            return cut.flatten(2)
        mean = cut.mean(dim=2)
        if self.kind == "average":
            return mean
        query, flat = self.query(mean).view(-1, 1, width), cut.flatten(0, 1)
        mixed = attention(query, self.key(flat), self.value(flat), self.num_heads)
        found: Tensor = self.out(mixed.view(mean.shape))
        return found


class Perceiver(nn.Module):
    """Learned queries that attend to patches and to each other, block by block."""

    def __init__(self, settings: dict[str, Any], width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(settings["num_latents"], width))
        blocks = range(settings["num_layers"])
        self.layers = nn.ModuleList(PerceiverLayer(settings, width) for _ in blocks)
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[images, patches, width] -> [images, latents, width]."""
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        found: Tensor = self.norm(latents)
        return found


class PerceiverLayer(nn.Module):
    """Attention, then a feed-forward part, each added to the queries."""

    def __init__(self, settings: dict[str, Any], width: int) -> None:
        super().__init__()
        self.num_heads = settings["num_heads"]
        inner, wide = self.num_heads * settings["head_dim"], _EXPANSION * width
        self.patch_norm = nn.LayerNorm(width, bias=False)
        self.latent_norm = nn.LayerNorm(width, bias=False)
        self.ffn_norm = nn.LayerNorm(width, bias=False)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.up = nn.Linear(width, wide, bias=False)
        self.down = nn.Linear(wide, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """The queries after this block."""
        asking = self.latent_norm(latents)
        seen = torch.cat((self.patch_norm(features), asking), dim=1)
        key, value = self.key_value(seen).chunk(2, dim=-1)
        latents = latents + self.out(attention(self.query(asking), key, value, self.num_heads))
        found: Tensor = latents + self.down(gelu(self.up(self.ffn_norm(latents))))
        return found


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """[sets, asked, width] of queries that see all of [sets, seen, width] keys and values."""

    def heads(part: Tensor) -> Tensor:
        return part.view(*part.shape[:2], num_heads, -1).transpose(1, 2)

    mixed = scaled_dot_product_attention(heads(query), heads(key), heads(value))
    return mixed.transpose(1, 2).flatten(2)
