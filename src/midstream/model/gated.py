"""Flamingo's blocks between those of a decoder: a text looks at the latest picture before it.

A picture takes one position of a row, with an embedding of its own, as Flamingo's mark does; from
there on to the next picture or the document's end, positions attend to its features. What blocks
add goes through tanh gates that start at zero: at first the decoder computes as if without them.
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from midstream.config.connectors import RESAMPLER_EXPANSION, GatedBlocks
from midstream.core.batch import PADDING
from midstream.model.attention import NO_PICTURE, pictures_of
from midstream.model.decoder import LayerNorm
from midstream.model.projector import attention_over
from midstream.model.weights import Initialiser, Linear

_EPS = 1e-5


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
