"""The OpenLM decoder as a causal language model of transformers.

Letters in names: R rows, T positions, S positions seen by attention, H heads, C channels of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, scaled_dot_product_attention, silu
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls the keys and values held so far: from 5.24 on `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class OpenLMConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """An OpenLM decoder: gain-only LayerNorm, rotary embedding, SwiGLU, no biases, untied."""

    model_type = "midstream_openlm"

    def __init__(
        self,
        vocab_size: int = 50432,
        hidden_size: int = 64,
        intermediate_size: int = 256,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        qk_norm: bool = True,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps
        self.rope_base = rope_base
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


class OpenLMNorm(nn.Module):
    """Layer normalisation with a gain and no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Subtract the mean, divide by the standard deviation, multiply by the gain."""
        return layer_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), None, self.eps)


class OpenLMRotary:
    """Rotary embedding of half-split channels; angles in float32."""

    def __init__(self, config: OpenLMConfig, position_ids: Tensor, dtype: torch.dtype) -> None:
        half = config.hidden_size // config.num_attention_heads // 2
        channel = torch.arange(0, 2 * half, 2, dtype=torch.float32, device=position_ids.device)
        frequency = 1.0 / config.rope_base ** (channel / (2 * half))
        angle = position_ids[:, :, None, None].float() * frequency
        self.half = half
        self.cos = torch.cat((angle.cos(), angle.cos()), dim=-1).to(dtype)
        self.sin = torch.cat((-angle.sin(), angle.sin()), dim=-1).to(dtype)

    def turn(self, value_RTHC: Tensor) -> Tensor:
        """The channels turned by their position's angles."""
        return value_RTHC * self.cos + value_RTHC.roll(self.half, -1) * self.sin


class OpenLMAttention(nn.Module):
    """Multi-head attention; q and k are normalised over their full width before the head split."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.q_norm = OpenLMNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = OpenLMNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, hidden: Tensor, rotary: OpenLMRotary, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """Attend where `mask` allows it; None is plain causal attention."""
        query, key, value = self.in_proj(hidden).chunk(3, dim=-1)
        heads = (*hidden.shape[:2], self.num_heads, -1)
        query_RHTC = rotary.turn(self.q_norm(query).view(heads)).transpose(1, 2)
        key_RHSC = rotary.turn(self.k_norm(key).view(heads)).transpose(1, 2)
        value_RHSC = value.view(heads).transpose(1, 2)
        if cache is not None:
            key_RHSC, value_RHSC = cache.update(key_RHSC, value_RHSC, self.layer)
        mixed = scaled_dot_product_attention(
            query_RHTC, key_RHSC, value_RHSC, attn_mask=mask, is_causal=mask is None
        )
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(hidden.shape))
        return projected


class OpenLMFeedForward(nn.Module):
    """SwiGLU; the first half of `w12` is the gate."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """w3(silu(gate) * up)."""
        gate, up = self.w12(hidden).chunk(2, dim=-1)
        projected: Tensor = self.w3(silu(gate) * up)
        return projected


class OpenLMLayer(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = OpenLMNorm(config.hidden_size, config.norm_eps)
        self.attention = OpenLMAttention(config, layer)
        self.ffn_norm = OpenLMNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = OpenLMFeedForward(config)

    def forward(
        self, hidden: Tensor, rotary: OpenLMRotary, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """The stream after this block."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, mask, cache)
        stream: Tensor = hidden + self.feed_forward(self.ffn_norm(hidden))
        return stream


class OpenLMModel(nn.Module):
    """Embeddings, blocks, final norm and output layer, under OpenLM's own names."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.tok_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            OpenLMLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = OpenLMNorm(config.hidden_size, config.norm_eps)
        self.output: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class OpenLMForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An OpenLM decoder with the head over its vocabulary."""

    config_class = OpenLMConfig
    base_model_prefix = "model"
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["OpenLMLayer"]  # noqa: RUF012 - transformers' own form
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__(config)
        self.model = OpenLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The layer that gives logits."""
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace it."""
        self.model.output = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        before_layer: Any = None,
        **_: Any,
    ) -> Any:
        """Logits of the next token.

        `attention_mask` is 1 at tokens and 0 at padding ([rows, held positions and new ones]), or
        four-dimensional: True, or 0 among -inf, where a position sees another. `cache` and
        `past_key_values` are two names of one thing. `before_layer` changes the stream on its way
        into each block, by its number.
        """
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.model.tok_embeddings(input_ids)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = positions(attention_mask, inputs_embeds, past)
        if attention_mask is None or attention_mask.ndim == 2:
            attention_mask = causal_mask(attention_mask, inputs_embeds, past)
        rotary = OpenLMRotary(self.config, position_ids, inputs_embeds.dtype)
        hidden = inputs_embeds
        for index, layer in enumerate(self.model.layers):
            if before_layer is not None:
                hidden = before_layer(index, hidden)
            hidden = layer(hidden, rotary, attention_mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.output(self.model.norm(hidden)[:, kept])
        loss = None if labels is None else next_token_loss(logits, labels)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output


def positions(attention_mask: Tensor | None, embeddings: Tensor, past: int) -> Tensor:
    """Positions counted around padding; [rows, new positions]."""
    rows, length = embeddings.shape[:2]
    if attention_mask is None or attention_mask.ndim != 2:
        new = torch.arange(past, past + length, device=embeddings.device)
        return new.expand(rows, length)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def causal_mask(attention_mask: Tensor | None, embeddings: Tensor, past: int) -> Tensor | None:
    """True where a new position sees another; None is plain causal attention.

    Padding sees itself, so that no softmax is empty.
    """
    rows, length = embeddings.shape[:2]
    if past == 0 and (attention_mask is None or bool(attention_mask.all())):
        return None
    seen, device = past + length, embeddings.device
    row = torch.arange(past, seen, device=device)[:, None]
    column = torch.arange(seen, device=device)[None]
    mask = (column <= row)[None].expand(rows, length, seen)
    if attention_mask is not None:
        mask = (mask & attention_mask.bool()[:, None, :]) | (column == row)
    return mask[:, None]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each label given what stands before it; -100 is left out."""
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
