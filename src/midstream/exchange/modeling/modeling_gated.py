"""Flamingo's gated blocks: between those of a decoder, each position looks at the latest picture.

Letters in names: R rows, T positions, N pictures of the row that has most, L features a picture.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

# Width of a block's feed-forward part over the decoder's.
_EXPANSION = 4


class Shown(NamedTuple):
    """The features of each row's pictures [R, N, L, width], and which of them each position looks
    at: [R, T], counted from 1, 0 for none."""

    features: Tensor
    latest: Tensor

    def afterwards(self, length: int) -> "Shown":
        """The same pictures for `length` further positions, which look at a row's last one."""
        return Shown(self.features, self.latest[:, -1:].expand(-1, length))


def shown(features: Tensor, places: Tensor) -> Shown:
    """Pictures [pictures, L, width] in reading order, where True in `places` [R, T] begins one."""
    latest = places.long().cumsum(dim=1)
    most = int(latest.max())
    by_row = features.new_zeros((len(places), most, *features.shape[1:]))
    row, column = places.nonzero(as_tuple=True)
    by_row[row, latest[row, column] - 1] = features
    return Shown(by_row, latest)


class GatedLayer(nn.Module):
    """Attention to a picture, then a feed-forward part, each through its gate into the stream."""

    def __init__(self, settings: dict[str, Any], width: int, seen_width: int) -> None:
        super().__init__()
        inner, wide = settings["num_heads"] * settings["head_dim"], _EXPANSION * width
        self.num_heads = settings["num_heads"]
        self.norm, self.ffn_norm = (nn.LayerNorm(width, eps=1e-5, bias=False) for _ in "12")
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(seen_width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.up = nn.Linear(width, wide, bias=False)
        self.down = nn.Linear(wide, width, bias=False)
        self.gate, self.ffn_gate = (nn.Parameter(torch.zeros(1)) for _ in "12")

    def forward(self, hidden: Tensor, seen: Shown | None) -> Tensor:
        """The stream after this block; positions without a picture pass the second part alone."""
        if seen is not None:
            hidden = hidden + self.gate.tanh() * self._look(hidden, seen)
        inner = self.down(gelu(self.up(self.ffn_norm(hidden))))
        stream: Tensor = hidden + self.ffn_gate.tanh() * inner
        return stream

    def _look(self, hidden: Tensor, seen: Shown) -> Tensor:
        def heads(part: Tensor) -> Tensor:
            return part.view(*part.shape[:2], self.num_heads, -1).transpose(1, 2)

        num_pictures, num_features = seen.features.shape[1:3]
        key, value = self.key_value(seen.features.flatten(1, 2)).chunk(2, dim=-1)
        number = torch.arange(1, num_pictures + 1, device=hidden.device)
        sees = seen.latest[..., None] == number.repeat_interleave(num_features)
        looks = (seen.latest > 0)[..., None]
        # Who has no picture looks at all of them, for no softmax to be empty, and drops it.
        mixed = scaled_dot_product_attention(
            heads(self.query(self.norm(hidden))),
            heads(key),
            heads(value),
            attn_mask=(sees | ~looks)[:, None],
        )
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2)) * looks
        return found


class GatedLayers(nn.Module):
    """A gated block before `every`-th ones of a decoder, by their number from 0 on, and the
    embedding of a picture's place."""

    def __init__(self, settings: dict[str, Any], decoder: Any, *, seen_width: int) -> None:
        super().__init__()
        width, every = decoder.hidden_size, settings["every"]
        places = range(every - 1, decoder.num_hidden_layers, every)
        self.picture = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleDict(
            {str(place): GatedLayer(settings, width, seen_width) for place in places}
        )

    def forward(self, index: int, hidden: Tensor, seen: Shown | None) -> Tensor:
        """The stream on its way into the decoder's block `index`."""
        if str(index) not in self.blocks:
            return hidden
        found: Tensor = self.blocks[str(index)](hidden, seen)
        return found
