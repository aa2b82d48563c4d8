"""The OpenLM decoder, its cache, and how its parameters start.

Letters in names: R rows, T positions, S positions seen by attention, H heads, C channels of a head.
Parameter names are those of OpenLM's own checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm, linear, silu

from midstream.config import DecoderConfig
from midstream.model.attention import Mask, attend
from midstream.model.weights import Embedding, Initialiser, Linear


@dataclass
class Cache:
    """Keys and values of the positions seen so far, `length` of them, with room for more."""

    keys: Float[Tensor, "layers rows heads columns channels"]
    values: Float[Tensor, "layers rows heads columns channels"]
    length: int = 0

    def select(self, rows: Int[Tensor, " chosen"], columns: int | None = None) -> "Cache":
        """A new cache of these rows, which may repeat, with the same room or another one."""

        def chosen(held: Tensor) -> Tensor:
            layers, _, heads, room, channels = held.shape
            found = held.new_empty(layers, len(rows), heads, columns or room, channels)
            # What is held is shorter than either room.
            there = found[:, :, :, : self.length]
            torch.index_select(held[:, :, :, : self.length], 1, rows, out=there)
            return found

        return Cache(chosen(self.keys), chosen(self.values), self.length)

    @classmethod
    def joined(cls, caches: "Sequence[Cache]") -> "Cache":
        """The rows of caches that hold equally much, one after the other."""
        keys = torch.cat([cache.keys for cache in caches], dim=1)
        values = torch.cat([cache.values for cache in caches], dim=1)
        return cls(keys, values, caches[0].length)

    def extend(self, layer: int, key_RHTC: Tensor, value_RHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind the held ones of a layer and return all of them.

        The decoder has seen that they fit, and moves `length` once all layers have.
        """
        end = self.length + key_RHTC.shape[2]
        self.keys[layer, :, :, self.length : end] = key_RHTC
        self.values[layer, :, :, self.length : end] = value_RHTC
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def check_room(held: int, new: int, room: int, mask: object) -> None:
    """Raises ValueError if `new` positions do not fit behind the held ones, or no mask says what
    they see of those."""
    if mask is None and held > 0:
        raise ValueError(f"the cache holds {held} positions; a mask must say who sees")
    if held + new > room:
        raise ValueError(f"the cache has room for {room} positions, {held + new} are needed")


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype that matrix products on the device of `like` have: autocast's, or its own."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if _is_cast(kind) else like.dtype


def _is_cast(kind: str) -> bool:
    """Whether autocast is on; on the meta device, where there are but shapes, there is none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


class LayerNorm(nn.Module):
    """Layer normalisation with a gain and no bias (OpenLM's `gain_only_lp_layer_norm`).

    Under autocast it is evaluated in the low precision, where torch would take float32.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float("nan")))
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Subtract the mean, divide by the standard deviation, multiply by the gain."""
        dtype, kind = compute_dtype(hidden), hidden.device.type
        if dtype == hidden.dtype == self.weight.dtype and not _is_cast(kind):
            return layer_norm(hidden, self.weight.shape, self.weight, None, self.eps)
        with torch.autocast(kind, enabled=False):
            gain = self.weight.to(dtype)
            return layer_norm(hidden.to(dtype), gain.shape, gain, None, self.eps)


class Rotary:
    """Rotary embedding of half-split channels: channel c turns with channel c + C/2.

    Angles are computed in float32; cosine and sine have the activations' dtype. In float32 every
    operation is OpenLM's, so that logits are equal to the last bit. Under bfloat16 autocast OpenLM
    computes the angles in bfloat16 too, which this does not repeat.
    """

    def __init__(
        self, config: DecoderConfig, position_ids: Int[Tensor, "rows seq"], dtype: torch.dtype
    ) -> None:
        half = config.head_dim // 2
        channel = torch.arange(
            0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device
        )
        frequency = 1.0 / config.rope_base ** (channel / config.head_dim)
        angle = position_ids[:, :, None, None].float() * frequency
        self.half = half
        self.cos = torch.cat((angle.cos(), angle.cos()), dim=-1).to(dtype)
        # The sign of the rotated half is put into the sine: exact, and a copy less a call.
        self.sin = torch.cat((-angle.sin(), angle.sin()), dim=-1).to(dtype)

    def turn(self, value_RTHC: Tensor) -> Tensor:
        """The channels turned by their position's angles."""
        # Two products and a sum: a fused multiply-add rounds otherwise than OpenLM.
        return value_RTHC * self.cos + value_RTHC.roll(self.half, -1) * self.sin


class Attention(nn.Module):
    """Multi-head attention; q and k are normalised over their full width before the head split."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer = layer
        self.num_heads = config.num_heads
        self.in_proj = Linear(width, 3 * width, bias=False)
        self.out_proj = Linear(width, width, bias=False)
        self.q_norm = LayerNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LayerNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden: Float[Tensor, "rows seq hidden"],
        rotary: Rotary,
        mask: Mask,
        cache: Cache | None,
        at: Int[Tensor, "asked"] | None = None,
    ) -> Float[Tensor, "*asked hidden"]:
        """Mix what `mask` shows; None is plain causal attention. `at`: as in `Layer`."""
        query, key, value = self.in_proj(hidden).chunk(3, dim=-1)
        heads = (*hidden.shape[:2], self.num_heads, -1)
        query_RHTC = rotary.turn(self.q_norm(query).view(heads)).transpose(1, 2)
        key_RHSC = rotary.turn(self.k_norm(key).view(heads)).transpose(1, 2)
        value_RHSC = value.view(heads).transpose(1, 2)
        if cache is not None:
            key_RHSC, value_RHSC = cache.extend(self.layer, key_RHSC, value_RHSC)
        mixed = attend(query_RHTC, key_RHSC, value_RHSC, mask)
        return cast(Tensor, self.out_proj(select(mixed.transpose(1, 2).reshape(hidden.shape), at)))


def select(hidden: Tensor, at: Tensor | None) -> Tensor:
    """The positions that are asked for, [asked, width]; all of them, as they are, for None."""
    return hidden if at is None else hidden.flatten(0, 1).index_select(0, at)


class FeedForward(nn.Module):
    """SwiGLU; the first half of `w12` is the gate."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w12 = Linear(config.hidden_size, 2 * config.ffn_size, bias=False)
        self.w3 = Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """w3(silu(gate) * up)."""
        both = self.w12(hidden)
        # A compiler chooses itself what to keep, autocast has its own casts to keep, and beside an
        # adapter the weight alone is not what the layer computes.
        plain = type(self.w3) is Linear and not _is_cast(both.device.type)
        if both.requires_grad and plain and not torch.compiler.is_compiling():
            return cast(Tensor, _GatedLinear.apply(both, self.w3.weight))  # type: ignore[no-untyped-call]
        gate, up = both.chunk(2, dim=-1)
        return cast(Tensor, self.w3(silu(gate) * up))


class _GatedLinear(torch.autograd.Function):
    """linear(silu(gate) * up), which keeps gate and up alone: half of what autograd would keep.

    Values and gradients are those of the operations one by one, to the last bit.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> Tensor:
        """[..., 2 * hidden] to [..., width]."""
        gate, up = both.chunk(2, dim=-1)
        ctx.save_for_backward(both, weight)
        return linear(silu(gate) * up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_result: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of `forward`'s tensors."""
        both, weight = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        opened = silu(gate)
        of_weight = None
        if ctx.needs_input_grad[1]:
            product = (opened * up).flatten(0, -2)
            of_weight = of_result.flatten(0, -2).T @ product
        of_product = of_result @ weight
        of_both = torch.empty_like(both)
        of_gate, of_up = of_both.chunk(2, dim=-1)
        torch.mul(of_product, opened, out=of_up)
        of_gate.copy_(torch.ops.aten.silu_backward(of_product * up, gate))
        return of_both, of_weight


class Layer(nn.Module):
    """A pre-norm block: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        hidden: Float[Tensor, "rows seq hidden"],
        rotary: Rotary,
        mask: Mask,
        cache: Cache | None,
        at: Int[Tensor, "asked"] | None = None,
    ) -> Float[Tensor, "*asked hidden"]:
        """The stream after this block; with `at` (numbers of positions, counted over all rows) at
        these alone, [asked, width], and no more is computed than they need."""
        mixed = self.attention(self.attention_norm(hidden), rotary, mask, cache, at)
        hidden = select(hidden, at) + mixed
        return cast(Tensor, hidden + self.feed_forward(self.ffn_norm(hidden)))


class Decoder(nn.Module):
    """An OpenLM decoder with untied embeddings; unset (NaN) until initialised or loaded."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.output = Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows seq hidden"]:
        """The input embeddings of token ids."""
        return cast(Tensor, self.tok_embeddings(input_ids))

    def forward(
        self,
        embeddings: Float[Tensor, "rows seq hidden"],
        position_ids: Int[Tensor, "rows seq"],
        mask: Mask,
        cache: Cache | None = None,
        at: Int[Tensor, "asked"] | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "*asked hidden"]:
        """The hidden states after the final norm; `output` turns them into logits.

        `mask` comes from `make_mask`; None is plain causal attention and needs an empty or no
        cache. With a cache the mask is dense, and `seen` counts the held positions and the new
        ones. `at` asks for some positions alone (their numbers over all rows): [asked, width].
        `before_block` changes the stream on its way into each block, by its number.
        """
        if cache is not None:
            check_room(cache.length, embeddings.shape[1], cache.keys.shape[3], mask)
        rotary = Rotary(self.config, position_ids, compute_dtype(embeddings))
        hidden = embeddings
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if before_block is not None:
                hidden = before_block(index, hidden)
            hidden = layer(hidden, rotary, mask, cache, at if index == last else None)
        if cache is not None:
            cache.length += embeddings.shape[1]
        return cast(Tensor, self.norm(hidden))

    def new_cache(
        self, *, rows: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """An empty cache with room for `columns` positions."""
        config = self.config
        shape = (config.num_layers, rows, config.num_heads, columns, config.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return Cache(keys, values)

    def initialisers(self) -> dict[str, Initialiser]:
        """As open_lm/model.py: norm gains 1; normals cut at three sigma, which is fan_in^-1/2, of
        what is added to the stream times (2 (l + 1))^-1/2 in the l-th layer, counted from 0."""

        def normal(fan_in: int, depth: int = 0) -> Initialiser:
            residual = (2 * depth) ** -0.5 if depth else 1.0
            return Initialiser("truncated_normal", fan_in**-0.5 * residual)

        width, ffn = self.config.hidden_size, self.config.ffn_size
        table = {name: Initialiser("constant", 1.0) for name, _ in self.named_parameters()}
        table["tok_embeddings.weight"] = table["output.weight"] = normal(width)
        for index in range(self.config.num_layers):
            layer = f"layers.{index}"
            table[f"{layer}.attention.in_proj.weight"] = normal(width)
            table[f"{layer}.attention.out_proj.weight"] = normal(width, index + 1)
            table[f"{layer}.feed_forward.w12.weight"] = normal(width)
            table[f"{layer}.feed_forward.w3.weight"] = normal(ffn, index + 1)
        return table
