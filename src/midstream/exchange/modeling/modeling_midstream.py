"""A vision-language model of Midstream: towers, projector, decoder; for `trust_remote_code`.

The towers are plain vision transformers; what is fixed for one picture size (interpolated
positions, the class token with its position) is stored as it is added. DINOv3, which turns patches
by their place, is transformers' own.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modeling_connectors import reduction_of
from .modeling_gated import GatedLayers, Shown, shown
from .modeling_openlm import CACHE, OpenLMConfig, OpenLMForCausalLM, next_token_loss, positions

# The pictures of a held prompt, for gated blocks: an attribute of its cache.
_SHOWN = "midstream_shown"


class MidstreamConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """A vision-language model: decoder, vision towers, projector, and who sees whom.

    `text_config` is an `OpenLMConfig` or that of a causal language model of transformers. `vision`
    describes the encoder: `num_patches`, the places that a picture takes, and its `towers` as
    `VisionTower` takes them. `projector_widths` are the widths before, between and after its linear
    layers, `reduction` what stands before them, as `reduction_of` takes it; `gated` are blocks of
    the decoder's that look at what comes out, as `GatedLayers` takes them. `attention` is
    `causal`; `prefix`, with which the positions up to the first question's end see each other;
    `pictures`, those of each picture; or `latest`, for one picture a prompt. `feature_dtype` is
    what the encoder's features are rounded to, or None.
    """

    model_type = "midstream"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        text_config: Any = None,
        vision: dict[str, Any] | None = None,
        projector_widths: list[int] | None = None,
        reduction: dict[str, Any] | None = None,
        gated: dict[str, Any] | None = None,
        attention: str = "causal",
        feature_dtype: str | None = None,
        image_token_id: int = 0,
        separator_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = OpenLMConfig()
        elif isinstance(text_config, dict):
            settings = dict(text_config)
            kind = settings.pop("model_type")
            own = kind == OpenLMConfig.model_type
            text_config = (
                OpenLMConfig(**settings) if own else AutoConfig.for_model(kind, **settings)
            )
        self.text_config = text_config
        self.vision = vision or {}
        self.projector_widths = projector_widths or []
        self.reduction = reduction
        self.gated = gated
        self.attention = attention
        self.feature_dtype = feature_dtype
        self.image_token_id = image_token_id
        self.separator_token_id = separator_token_id
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


# ------------------------------------------------------------------------------ the encoder


class VisionBlock(nn.Module):
    """A pre-norm block of a vision transformer; `layer_scale` and `swiglu` are DINOv2's."""

    def __init__(self, tower: dict[str, Any]) -> None:
        super().__init__()
        width, inner = tower["hidden_size"], tower["intermediate_size"]
        self.num_heads = tower["num_heads"]
        self.swiglu = tower["swiglu"]
        self.act = ACT2FN[tower["hidden_act"]]
        self.norm1 = nn.LayerNorm(width, eps=tower["norm_eps"])
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=tower["norm_eps"])
        self.fc1 = nn.Linear(width, 2 * inner if self.swiglu else inner)
        self.fc2 = nn.Linear(inner, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if tower["layer_scale"] else None
        self.scale2 = nn.Parameter(torch.ones(width)) if tower["layer_scale"] else None

    def forward(self, hidden: Tensor) -> Tensor:
        """The stream after this block."""
        normed = self.norm1(hidden)
        heads = (*hidden.shape[:2], self.num_heads, -1)
        query, key, value = (
            layer(normed).view(heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value)
        mixed = self.out(mixed.transpose(1, 2).reshape(hidden.shape))
        hidden = hidden + (mixed if self.scale1 is None else mixed * self.scale1)
        inner = self.fc1(self.norm2(hidden))
        if self.swiglu:
            gate, up = inner.chunk(2, dim=-1)
            inner = silu(gate) * up
        else:
            inner = self.act(inner)
        new: Tensor = self.fc2(inner)
        return hidden + (new if self.scale2 is None else new * self.scale2)


class VisionTower(nn.Module):
    """Pixels -> patch features. `prefix` holds class and register tokens, which are left out of
    the result."""

    def __init__(self, tower: dict[str, Any]) -> None:
        super().__init__()
        width, patch = tower["hidden_size"], tower["patch_size"]
        self.patch = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        num_prefix, num_patches = tower["num_prefix"], tower["num_patches"]
        self.positions = None
        if tower["positions"]:
            self.positions = nn.Parameter(torch.zeros(1, num_patches, width))
        self.prefix = nn.Parameter(torch.zeros(1, num_prefix, width)) if num_prefix else None
        # Of folders that were written before CLIP's was known, none has it.
        pre_norm = tower.get("pre_norm", False)
        self.prenorm = nn.LayerNorm(width, eps=tower["norm_eps"]) if pre_norm else None
        self.blocks = nn.ModuleList(VisionBlock(tower) for _ in range(tower["num_blocks"]))
        self.norm = nn.LayerNorm(width, eps=tower["norm_eps"]) if tower["final_norm"] else None
        self.repaint = tower["repaint"]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, size, size] -> [images, patches, width], patches in reading order."""
        pixel_values = repainted(pixel_values, self.repaint)
        hidden = self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        if self.positions is not None:
            hidden = hidden + self.positions
        if self.prefix is not None:
            hidden = torch.cat((self.prefix.expand(len(hidden), -1, -1), hidden), dim=1)
        if self.prenorm is not None:
            hidden = self.prenorm(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        skipped = 0 if self.prefix is None else self.prefix.shape[1]
        features: Tensor = hidden[:, skipped:]
        return features


class RotaryTower(nn.Module):
    """DINOv3: pixels -> patch features, without class token and registers."""

    def __init__(self, tower: dict[str, Any]) -> None:
        super().__init__()
        self.num_prefix, self.repaint = tower["num_prefix"], tower["repaint"]
        settings = DINOv3ViTConfig(
            patch_size=tower["patch_size"],
            hidden_size=tower["hidden_size"],
            intermediate_size=tower["intermediate_size"],
            num_hidden_layers=tower["num_blocks"],
            num_attention_heads=tower["num_heads"],
            num_register_tokens=tower["num_prefix"] - 1,
            hidden_act=tower["hidden_act"],
            layer_norm_eps=tower["norm_eps"],
            use_gated_mlp=tower["swiglu"],
            # While training it would draw scales of positions.
            pos_embed_rescale=None,
        )
        self.tower = DINOv3ViTModel(settings)
        if not tower["final_norm"]:
            self.tower.norm = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, size, size] -> [images, patches, width], patches in reading order."""
        pixel_values = repainted(pixel_values, self.repaint)
        features: Tensor = self.tower(pixel_values).last_hidden_state[:, self.num_prefix :]
        return features


def repainted(pixel_values: Tensor, colours: list[list[float]] | None) -> Tensor:
    """Pixels, normalised for the first tower, as one wants them that was trained with others."""
    if colours is None:
        return pixel_values
    given_std, given_mean, mean, std = (
        pixel_values.new_tensor(row)[:, None, None] for row in colours
    )
    return (pixel_values * given_std + given_mean - mean) / std


def rounded(features: Tensor, dtype: str | None) -> Tensor:
    """Features as the model was trained with them: bfloat16, or int8 with one scale a patch."""
    if dtype in (None, "float32"):
        return features
    if dtype == "bfloat16":
        return features.bfloat16().to(features.dtype)
    scales = (features.float().abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    codes = torch.where(scales > 0, features.float() / scales, 0.0).round().clamp(-127, 127)
    return (codes * scales).to(features.dtype)


class Projector(nn.Module):
    """A reduction or none, then linear layers with exact GELU between."""

    def __init__(self, widths: list[int], reduction: dict[str, Any] | None) -> None:
        super().__init__()
        self.reduction = None if reduction is None else reduction_of(reduction, widths[0])
        self.layers = nn.ModuleList(nn.Linear(one, two) for one, two in pairwise(widths))

    def forward(self, features: Tensor) -> Tensor:
        """Features at decoder width."""
        if self.reduction is not None:
            features = self.reduction(features)
        for index, layer in enumerate(self.layers):
            features = layer(gelu(features) if index else features)
        return features


# -------------------------------------------------------------------------------- the model


class MidstreamForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Pictures and text in, text out: features of each picture in its row's image places."""

    config_class = MidstreamConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    _no_split_modules = ["OpenLMLayer", "VisionBlock", "GatedLayer"]  # noqa: RUF012 - transformers' own form
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MidstreamConfig) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList(
            # Folders that were written before DINOv3 was known do not say.
            RotaryTower(tower) if tower.get("rotary", False) else VisionTower(tower)
            for tower in config.vision["towers"]
        )
        self.projector = Projector(config.projector_widths, config.reduction)
        # Not by its class: each file of a folder may have been imported on its own.
        if config.text_config.model_type == OpenLMConfig.model_type:
            self.language_model: Any = OpenLMForCausalLM(config.text_config)
        else:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.gated = None
        if config.gated is not None:
            self.gated = GatedLayers(
                config.gated, config.text_config, seen_width=config.projector_widths[-1]
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of token ids."""
        module: nn.Module = self.language_model.get_input_embeddings()
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace them."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The layer that gives logits."""
        module: nn.Module = self.language_model.get_output_embeddings()
        return module

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, size, size] -> [images, places, decoder width]."""
        features = torch.cat([tower(pixel_values) for tower in self.towers], dim=-1)
        projected: Tensor = self.projector(rounded(features, self.config.feature_dtype))
        return projected

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        **_: Any,
    ) -> Any:
        """Logits of the next token; a picture stands where `image_token_id` is repeated, in order.

        `attention_mask` is 1 at tokens and 0 at padding ([rows, held positions and new ones]).
        `cache` and `past_key_values` are two names of one thing.
        Raises ValueError if pictures and places for them do not agree.
        """
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.get_text_config())
        past = 0 if cache is None else int(cache.get_seq_length())
        features = self._features(input_ids, pixel_values, past)
        embeddings, between = self._embed(input_ids, features), {}
        if self.gated is not None:
            seen = self._seen(input_ids, features, past, cache)
            between["before_layer"] = partial(self.gated, seen=seen)
        if position_ids is None:
            position_ids = positions(attention_mask, embeddings, past)
        output = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=self._mask(input_ids, embeddings, attention_mask, past),
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **between,
            **{CACHE: cache},
        )
        logits = output.logits
        missing = self.config.image_token_id + 1 - logits.shape[-1]
        if missing > 0:
            # The image's token has no row in the vocabulary; it is never the next one.
            logits = nn.functional.pad(logits, (0, missing), value=-torch.inf)
        loss = None if labels is None else next_token_loss(logits, labels)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return result.to_tuple() if return_dict is False else result

    def _expand_inputs_for_generation(self, expand_size: int = 1, **given: Any) -> Any:
        """As transformers does, which would repeat pictures one by one: with each copy of a prompt
        go all of its pictures, in their order."""
        pixel_values = given.pop("pixel_values", None)
        input_ids, given = super()._expand_inputs_for_generation(expand_size, **given)
        if pixel_values is not None:
            places = (input_ids[::expand_size] == self.config.image_token_id).sum(dim=1)
            counts = (places // self.config.vision["num_patches"]).tolist()
            parts = [part for part in pixel_values.split(counts) for _ in range(expand_size)]
            given["pixel_values"] = torch.cat(parts)
        return input_ids, given

    def _features(self, input_ids: Tensor, pixel_values: Tensor | None, past: int) -> Tensor | None:
        """Of each picture, in order; None without, and behind a held prompt, which saw them: from
        there on all ids are tokens of their own."""
        if past > 0:
            return None
        num_images = 0 if pixel_values is None else len(pixel_values)
        wanted = num_images * self.config.vision["num_patches"]
        places = int((input_ids == self.config.image_token_id).sum())
        if places != wanted:
            raise ValueError(
                f"{num_images} pictures fill {wanted} places, the prompts have {places}; let the "
                "processor write them"
            )
        if pixel_values is None:
            return None
        return self.get_image_features(pixel_values.to(input_ids.device))

    def _embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        if features is None:
            embedded: Tensor = self.get_input_embeddings()(input_ids)
            return embedded
        places = input_ids == self.config.image_token_id
        embeddings: Tensor = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if self.gated is not None:
            features = self.gated.picture.expand(len(features), 1, -1)
        return embeddings.masked_scatter(places[..., None], features.to(embeddings.dtype))

    def _seen(
        self, input_ids: Tensor, features: Tensor | None, past: int, cache: Any
    ) -> Shown | None:
        """What gated blocks look at. It is kept beside the keys and values: rows that a search
        exchanges are of one prompt, and have the same pictures."""
        if past > 0:
            held = getattr(cache, _SHOWN, None)
            return None if held is None else held.afterwards(input_ids.shape[1])
        seen = None
        if features is not None:
            seen = shown(features, input_ids == self.config.image_token_id)
        if cache is not None:
            setattr(cache, _SHOWN, seen)
        return seen

    def _mask(
        self, input_ids: Tensor, embeddings: Tensor, held: Tensor | None, past: int
    ) -> Tensor:
        """0 where a position sees another, else the least number: [rows, 1, new, held and new].

        Padding sees itself, so that no softmax is empty.
        """
        (rows, length), device = input_ids.shape, input_ids.device
        row = torch.arange(past, past + length, device=device)[:, None]
        column = torch.arange(past + length, device=device)[None]
        sees = (column <= row).expand(rows, -1, -1)
        if self.config.attention == "prefix" and past == 0:
            prefix = self._prefix(input_ids)
            sees = sees | (prefix[:, :, None] & prefix[:, None, :])
        if self.config.attention in ("pictures", "latest") and past == 0:
            picture = self._pictures(input_ids)
            same = picture[:, :, None] == picture[:, None, :]
            if self.config.attention == "pictures":
                sees = sees | (same & (picture > 0)[:, None])
            elif int(picture.max()) > 1:
                raise ValueError(
                    "this model sees the latest picture alone; give one picture in each prompt"
                )
        if held is not None:
            sees = (sees & held.bool()[:, None, :]) | (column == row)
        mask = embeddings.new_zeros((rows, 1, length, past + length))
        return mask.masked_fill(~sees[:, None], torch.finfo(embeddings.dtype).min)

    def _pictures(self, input_ids: Tensor) -> Tensor:
        """The number of the picture that a place is of, from 1 in each row; 0 in a text."""
        places = (input_ids == self.config.image_token_id).long()
        before = nn.functional.pad(places, (1, 0))[:, :-1]
        numbers: Tensor = (places * (1 - before)).cumsum(dim=1) * places
        return numbers

    def _prefix(self, input_ids: Tensor) -> Tensor:
        """Pictures and the first question, to the separator that ends it; none in plain text."""
        separators = input_ids == self.config.separator_token_id
        places = input_ids == self.config.image_token_id
        # A picture has a separator behind it, and after a caption's no other one follows.
        asks = separators & ~nn.functional.pad(places, (1, 0))[:, :-1]
        ends = torch.where(asks.any(dim=1, keepdim=True), asks, separators).long()
        before = ends.cumsum(dim=1) - ends
        prefix: Tensor = (before < 1) & (ends.sum(dim=1, keepdim=True) > 0)
        return prefix
