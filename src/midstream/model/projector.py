"""From an encoder's features to decoder width: a reduction or none, then linear layers.

Letters in names: N images, P patches, S side of their grid, W side of a window, L what is left of
an image, H heads, C channels of a head.

Beside them Flamingo's blocks between those of a decoder: a text looks at the latest picture before
it. A picture takes one position of a row, with an embedding of its own, as Flamingo's mark does;
from there on to the next picture or the document's end, positions attend to its features. What
blocks add goes through tanh gates that start at zero: at first the decoder computes as without.
"""

from collections import OrderedDict
from itertools import pairwise
from math import isqrt
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from midstream.config import AttentionPool, AveragePool, PixelShuffle, ProjectorConfig, Resampler
from midstream.config.connectors import RESAMPLER_EXPANSION, GatedBlocks, Reduction
from midstream.core.batch import PADDING
from midstream.model.attention import NO_PICTURE, pictures_of
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


class Shown(NamedTuple):
    """Features of pictures, and the positions (numbered over all rows) that look at each, filled up
    with the number of positions."""

    features: Float[Tensor, "images left width"]
    positions: Int[Tensor, "images longest"]


def shown(features: Float[Tensor, "images left width"], image_of: Int[Tensor, "rows seq"]) -> Shown:
    """Pictures to look at; `image_of` numbers each position's, or is NO_PICTURE."""
    return Shown(features, looking_at(image_of, len(features)))


def looking_at(image_of: Int[Tensor, "rows seq"], num_images: int) -> Int[Tensor, "images longest"]:
    """`Shown.positions`; finding them reads numbers back to the host."""
    flat = image_of.flatten()
    looking = (flat != NO_PICTURE).nonzero()[:, 0]
    owner, order = flat[looking].sort(stable=True)
    counts = torch.bincount(owner, minlength=num_images)
    longest = int(counts.max()) if num_images else 0
    positions = flat.new_full((num_images, longest), len(flat))
    place = torch.arange(len(owner), device=flat.device) - (counts.cumsum(0) - counts)[owner]
    positions[owner, place] = looking[order]
    return positions


def latest_pictures(
    image_slots: Int[Tensor, "slots 2"], segment_ids: Int[Tensor, "rows seq"]
) -> Int[Tensor, "rows seq"]:
    """The number of the latest picture up to each position in its segment, or NO_PICTURE."""
    latest = pictures_of(image_slots, 1, (len(segment_ids), segment_ids.shape[1]))
    latest = latest.cummax(dim=1).values
    if not len(image_slots):
        return latest
    of_picture = segment_ids[image_slots[:, 0], image_slots[:, 1]]
    is_own = (of_picture[latest.clamp(min=0)] == segment_ids) & (segment_ids != PADDING)
    return torch.where(is_own, latest, NO_PICTURE)


class GatedBlock(nn.Module):
    """Attention to pictures, then a feed-forward part, each through its gate into the stream."""

    def __init__(self, config: GatedBlocks, width: int, seen_width: int) -> None:
        super().__init__()
        inner, wide = config.num_heads * config.head_dim, RESAMPLER_EXPANSION * width
        self.num_heads = config.num_heads
        self.norm, self.ffn_norm = LayerNorm(width, _EPS), LayerNorm(width, _EPS)
        self.query = Linear(width, inner, bias=False)
        self.key_value = Linear(seen_width, 2 * inner, bias=False)
        self.out = Linear(inner, width, bias=False)
        self.up = Linear(width, wide, bias=False)
        self.act = nn.GELU()
        self.down = Linear(wide, width, bias=False)
        self.gate, self.ffn_gate = (nn.Parameter(torch.full((1,), float("nan"))) for _ in "12")

    def forward(
        self, hidden: Float[Tensor, "rows seq hidden"], seen: Shown | None
    ) -> Float[Tensor, "rows seq hidden"]:
        """The stream after this block; positions without a picture go through its feed-forward part
        alone."""
        if seen is not None:
            hidden = hidden + (self.gate.tanh() * self._look(hidden, seen)).to(hidden.dtype)
        inner = self.down(self.act(self.up(self.ffn_norm(hidden))))
        return cast(Tensor, hidden + (self.ffn_gate.tanh() * inner).to(hidden.dtype))

    def _look(self, hidden: Tensor, seen: Shown) -> Tensor:
        width, (images, longest) = hidden.shape[-1], seen.positions.shape
        flat = hidden.reshape(-1, width)
        # One more row, for what fills up.
        flat = torch.cat((flat, flat.new_zeros(1, width)))
        at = seen.positions.flatten()
        asking = self.query(self.norm(flat.index_select(0, at)))
        asking = asking.view(images, longest, self.query.out_features)
        key, value = self.key_value(seen.features).chunk(2, dim=-1)
        mixed = self.out(attention_over(asking, key, value, self.num_heads)).flatten(0, 1)
        found = torch.zeros_like(flat, dtype=mixed.dtype).index_copy(0, at, mixed)
        return found[:-1].view(hidden.shape)


class GatedStack(nn.Module):
    """The gated blocks of a decoder, by the number of the block that each stands before, and the
    embedding of a picture's position."""

    def __init__(
        self, config: GatedBlocks, *, num_layers: int, width: int, seen_width: int
    ) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.full((width,), float("nan")))
        self.blocks = nn.ModuleDict(
            {
                str(index): GatedBlock(config, width, seen_width)
                for index in config.places(num_layers)
            }
        )

    def forward(
        self, index: int, hidden: Float[Tensor, "rows seq hidden"], seen: Shown | None
    ) -> Float[Tensor, "rows seq hidden"]:
        """The stream on its way into the decoder's block `index`."""
        if str(index) not in self.blocks:
            return hidden
        return cast(Tensor, self.blocks[str(index)](hidden, seen))

    def initialisers(self) -> dict[str, Initialiser]:
        """Gates 0, norms' gains 1, matrices uniform within fan_in^-1/2; the picture's embedding as
        wide as a decoder's, a normal of sigma width^-1/2 cut at three."""
        table = {}
        for name, parameter in self.named_parameters():
            entry = Initialiser("constant", 0.0 if name.endswith("gate") else 1.0)
            if parameter.ndim > 1:
                entry = Initialiser("uniform", parameter.shape[1] ** -0.5)
            table[name] = entry
        table["picture"] = Initialiser("truncated_normal", len(self.picture) ** -0.5)
        return table
