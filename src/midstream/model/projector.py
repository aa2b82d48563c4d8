"""From an encoder's features to decoder width: a reduction or none, then linear layers.

Letters in names: N images, P patches, S side of their grid, W side of a window, L what is left of
an image, H heads, C channels of a head.
"""

from collections import OrderedDict
from itertools import pairwise
from math import isqrt
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from midstream.config import AttentionPool, AveragePool, PixelShuffle, ProjectorConfig, Resampler
from midstream.config.connectors import RESAMPLER_EXPANSION, Reduction
from midstream.model.decoder import LayerNorm
from midstream.model.weights import Initialiser, Linear

_EPS = 1e-5


class Projector(nn.Sequential):
    """Linear layers of `config.widths`, exact GELU between them; names as in Prismatic ("0", "2",
    "4"). What makes fewer features of the patches stands before them ("reduction").

    Weights and biases start uniform within fan_in^-1/2, as torch's own linear layers do (and with
    them LLaVA's and Prismatic's); a resampler's queries are normals of sigma 1, cut at three.
    """

    def __init__(self, config: ProjectorConfig, *, in_width: int, out_width: int) -> None:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for fan_in, fan_out in pairwise(config.widths(in_width, out_width)):
            if modules:
                modules[str(len(modules))] = nn.GELU()
            modules[str(len(modules))] = Linear(fan_in, fan_out)
        if config.reduction is not None:
            modules["reduction"] = build_reduction(config.reduction, in_width)
            modules.move_to_end("reduction", last=False)
        super().__init__(modules)

    def initialisers(self) -> dict[str, Initialiser]:
        """One entry for each parameter."""
        table = {}
        for name, module in self.named_modules():
            for part, parameter in module.named_parameters(recurse=False):
                entry = Initialiser("constant", 1.0)  # a norm's gain
                if isinstance(module, nn.Linear):
                    entry = Initialiser("uniform", module.in_features**-0.5)
                elif parameter.ndim > 1:
                    entry = Initialiser("truncated_normal", 1.0)
                table[f"{name}.{part}"] = entry
        return table


def build_reduction(config: Reduction, width: int) -> nn.Module:
    """The module of a reduction over features of this width, unset (NaN) until initialised."""
    if isinstance(config, PixelShuffle | AveragePool):
        return Windows(config)
    if isinstance(config, AttentionPool):
        return WindowAttention(config, width)
    return Perceiver(config, width)


def windows_of(
    features: Float[Tensor, "images patches width"], window: int
) -> Float[Tensor, "images left inside width"]:
    """The patches of each window, windows and their patches in reading order."""
    images, patches, width = features.shape
    side = isqrt(patches)
    left = side // window
    cut = features.view(images, left, window, left, window, width).transpose(2, 3)
    return cut.reshape(images, left * left, window * window, width)


class Windows(nn.Module):
    """The patches of each window side by side, or their mean."""

    def __init__(self, config: PixelShuffle | AveragePool) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, features: Float[Tensor, "images patches width"]
    ) -> Float[Tensor, "images left wide"]:
        """[images, patches, width] -> [images, patches / window², width * window², or width]."""
        windows = windows_of(features, self.config.window)
        shuffles = isinstance(self.config, PixelShuffle)
        return windows.flatten(2) if shuffles else windows.mean(dim=2)


class WindowAttention(nn.Module):
    """Each window's mean attends to the window's patches."""

    def __init__(self, config: AttentionPool, width: int) -> None:
        super().__init__()
        self.window, self.num_heads = config.window, config.num_heads
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))

    def forward(
        self, features: Float[Tensor, "images patches width"]
    ) -> Float[Tensor, "images left width"]:
        """[images, patches, width] -> [images, patches / window², width]."""
        windows = windows_of(features, self.window)
        asked = windows.mean(dim=2, keepdim=True)
        mixed = attention_over(
            self.query(asked).flatten(0, 1),
            self.key(windows).flatten(0, 1),
            self.value(windows).flatten(0, 1),
            self.num_heads,
        )
        return cast(Tensor, self.out(mixed.view(asked.shape).squeeze(2)))


class Perceiver(nn.Module):
    """Learned queries through blocks of attention to the patches and themselves, then a norm.

    As Flamingo's (pre-norm, no biases, GELU), with norms that have a gain alone and no embeddings
    of frames.
    """

    def __init__(self, config: Resampler, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.full((config.num_latents, width), float("nan")))
        self.layers = nn.ModuleList(PerceiverLayer(config, width) for _ in range(config.num_layers))
        self.norm = LayerNorm(width, _EPS)

    def forward(
        self, features: Float[Tensor, "images patches width"]
    ) -> Float[Tensor, "images left width"]:
        """[images, patches, width] -> [images, latents, width]."""
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return cast(Tensor, self.norm(latents))


class PerceiverLayer(nn.Module):
    """Attention of latents to patches and latents, then a feed-forward part, each added."""

    def __init__(self, config: Resampler, width: int) -> None:
        super().__init__()
        inner, wide = config.num_heads * config.head_dim, RESAMPLER_EXPANSION * width
        self.num_heads = config.num_heads
        self.patch_norm, self.latent_norm, self.ffn_norm = (LayerNorm(width, _EPS) for _ in "123")
        self.query = Linear(width, inner, bias=False)
        self.key_value = Linear(width, 2 * inner, bias=False)
        self.out = Linear(inner, width, bias=False)
        self.up = Linear(width, wide, bias=False)
        self.act = nn.GELU()
        self.down = Linear(wide, width, bias=False)

    def forward(
        self,
        latents: Float[Tensor, "images left width"],
        features: Float[Tensor, "images patches width"],
    ) -> Float[Tensor, "images left width"]:
        """The latents after this block."""
        asking = self.latent_norm(latents)
        seen = torch.cat((self.patch_norm(features), asking), dim=1)
        key, value = self.key_value(seen).chunk(2, dim=-1)
        latents = latents + self.out(attention_over(self.query(asking), key, value, self.num_heads))
        return latents + cast(Tensor, self.down(self.act(self.up(self.ffn_norm(latents)))))


def attention_over(
    query: Float[Tensor, "sets asked width"],
    key: Float[Tensor, "sets seen width"],
    value: Float[Tensor, "sets seen width"],
    num_heads: int,
) -> Float[Tensor, "sets asked width"]:
    """Attention in so many heads of queries that see all keys of their set."""

    def heads(part: Tensor) -> Tensor:
        return part.view(*part.shape[:2], num_heads, part.shape[2] // num_heads).transpose(1, 2)

    mixed = scaled_dot_product_attention(heads(query), heads(key), heads(value))
    return mixed.transpose(1, 2).flatten(2)
