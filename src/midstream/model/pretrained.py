"""Causal language models of `transformers` behind the decoder's interface, and which are known.

Parameters are named "model." and their name there: `model.model.layers.0.mlp.up_proj.weight`.
"""

import copy
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from midstream.config import TransformersDecoderConfig
from midstream.model.attention import attend_blocks
from midstream.model.decoder import check_room, select
from midstream.model.weights import Initialiser

_TABLES = tomllib.loads(Path(__file__).with_name("language_models.toml").read_text("utf-8"))
# The models that have a `model_type`.
FAMILIES: dict[str, str] = _TABLES["families"]
# The others change with the length of the row, so that segments would change each other.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _check_known(kind: str) -> None:
    if kind not in FAMILIES:
        known = "; ".join(f"{name} ({models})" for name, models in FAMILIES.items())
        raise ValueError(f"model_type {kind!r} is no family known here; known are {known}")


def _checked(config: Any) -> Any:
    """A configuration of `transformers`, if our surface can say all that it means.

    What a family's own code would do beside our masks and positions, or what it would draw at
    random, is refused by name rather than left out.
    """
    kind = config.model_type
    _check_known(kind)
    for neutral in _TABLES["neutral"]:
        for name in neutral["names"]:
            value = getattr(config, name, None)
            if value is not None and value not in neutral["values"]:
                raise ValueError(f"this {kind} model has {name} {value!r}; {neutral['remedy']}")
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if set(layers) != {"full_attention"} if layers else window is not None:
        raise ValueError(
            f"this {kind} model has sliding_window {window!r} (layer_types {layers!r}); where no "
            "row is longer, set sliding_window to null and drop layer_types in config.json"
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in _ROPE_TYPES:
        raise ValueError(
            f"this {kind} model has rope_type {rope!r}, known are {', '.join(_ROPE_TYPES)}; import "
            "a model whose positions do not depend on the length of the row"
        )
    return config


def describe(hf_config: Any) -> TransformersDecoderConfig:
    """Our configuration of one of `transformers`, as `AutoConfig` reads it.

    Its `settings` are JSON, without what does not belong to the model (paths, versions, dtype).
    Raises ValueError for an unknown family, or for a setting that would not be honoured.
    """
    _checked(hf_config)
    stated = hf_config.to_dict()
    ours = stated.keys() - set(_TABLES["left_out"]["settings"])
    kept = {name: stated[name] for name in sorted(ours)}
    # Through JSON, so that what is stated equals what is read back.
    settings = json.loads(json.dumps(kept))
    with torch.device("meta"):
        model = _build(_from_settings(hf_config.model_type, settings))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return TransformersDecoderConfig(
        model_type=hf_config.model_type,
        settings=settings,
        hidden_size=hf_config.hidden_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=hf_config.num_attention_heads,
        vocab_size=hf_config.vocab_size,
        num_parameters=model.num_parameters(),
        tied_embeddings=tied,
    )


def with_vocabulary(
    config: TransformersDecoderConfig, vocab_size: int
) -> TransformersDecoderConfig:
    """The same model with another number of token ids.

    A padding id that no longer fits is dropped: it only says which row `transformers` leaves out.
    """
    settings = config.settings | {"vocab_size": vocab_size}
    if (settings.get("pad_token_id") or 0) >= vocab_size:
        settings["pad_token_id"] = None
    return describe(_from_settings(config.model_type, settings))


def transformers_config(config: TransformersDecoderConfig) -> Any:
    """The configuration object of `transformers`; a new one at each call.

    Raises ValueError as `describe` does, and with both numbers where a stated size differs from
    the settings.
    """
    theirs = _checked(_from_settings(config.model_type, config.settings))
    sizes = {
        "hidden_size": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "vocab_size": theirs.vocab_size,
        "tied_embeddings": theirs.tie_word_embeddings,
    }
    for name, value in sizes.items():
        _agree(name, getattr(config, name), value)
    return theirs


def _from_settings(model_type: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    # The constructors change nested settings in place.
    settings = copy.deepcopy(settings)
    _agree("model_type", model_type, settings.pop("model_type", model_type))
    _check_known(model_type)
    return AutoConfig.for_model(model_type, **settings)


def _agree(name: str, stated: Any, found: Any) -> None:
    if stated != found:
        raise ValueError(
            f"the decoder's config states {name} {stated}, its settings make it {found}"
        )


# By this name transformers calls `_attention`. It knows no masks of that name, and so makes none.
_ATTENTION = "midstream"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    *,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention: [rows, heads, seq, channels] in, [rows, seq, heads,
    channels] out. Its own kernels, but under a BlockMask; None is plain causal attention."""
    if not isinstance(attention_mask, BlockMask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    # Turned queries and keys are float32 under autocast, which casts them for other kernels.
    query, key = query.to(value.dtype), key.to(value.dtype)
    mixed = attend_blocks(query, key, value, attention_mask, scaling)
    return mixed.transpose(1, 2).contiguous(), None


def _build(hf_config: Any) -> Any:
    """The model in float32 with unset values, tied where it is tied; nothing is drawn."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    AttentionInterface.register(_ATTENTION, _attention)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, attn_implementation=_ATTENTION
        )
    # Left out together with the initialisers.
    model.tie_weights()
    return model


PREFIX = "model."


class TransformersCache:
    """Keys and values of the positions seen so far, with room for `columns` of them."""

    def __init__(self, columns: int) -> None:
        from transformers import DynamicCache

        self.columns = columns
        self.held = DynamicCache()

    @property
    def length(self) -> int:
        """Positions held."""
        return cast(int, self.held.get_seq_length())

    def select(
        self, rows: Int[Tensor, "chosen"], columns: int | None = None
    ) -> "TransformersCache":
        """A new cache of these rows, which may repeat, with the same room or another one."""
        chosen = TransformersCache(self.columns if columns is None else columns)
        for index, layer in enumerate(self.held.layers):
            chosen.held.update(layer.keys[rows], layer.values[rows], index)
        return chosen

    @classmethod
    def joined(cls, caches: "Sequence[TransformersCache]") -> "TransformersCache":
        """The rows of caches that hold equally much, one after the other."""
        whole = cls(caches[0].columns)
        for index, layers in enumerate(zip(*(cache.held.layers for cache in caches), strict=True)):
            keys = torch.cat([layer.keys for layer in layers])
            whole.held.update(keys, torch.cat([layer.values for layer in layers]), index)
        return whole


class TransformersDecoder(nn.Module):
    """A causal language model of `transformers`; unset (NaN) until initialised or loaded.

    Raises ValueError for a config that `transformers_config` refuses.
    """

    def __init__(self, config: TransformersDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _build(transformers_config(config))
        _agree("num_parameters", config.num_parameters, self.model.num_parameters())
        # transformers keeps the gradient from the row of its padding id, which may be the
        # end-of-text token's; our padding has no targets and needs no row of its own.
        self.model.get_input_embeddings().padding_idx = None
        # From 5.24 on transformers says `cache`.
        named = inspect.signature(self.model.base_model.forward).parameters
        self._held_name = "cache" if "cache" in named else "past_key_values"
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))

    @property
    def output(self) -> nn.Linear:
        """Hidden states to logits; a tied model shares its weight with the input embeddings."""
        return cast(nn.Linear, self.model.get_output_embeddings())

    def embed(self, input_ids: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows seq width"]:
        """The input embeddings of token ids."""
        return cast(Tensor, self.model.get_input_embeddings()(input_ids))

    def forward(
        self,
        embeddings: Float[Tensor, "rows seq width"],
        position_ids: Int[Tensor, "rows seq"],
        mask: Bool[Tensor, "rows 1 seq seen"] | BlockMask | None,
        cache: TransformersCache | None = None,
        at: Int[Tensor, "asked"] | None = None,
    ) -> Float[Tensor, "*asked width"]:
        """The hidden states after the final norm; `output` turns them into logits.

        `mask` is True where a position sees another, or a BlockMask, which has no backward on a
        CPU; None is plain causal attention, whatever the position ids, and needs an empty or no
        cache. With a cache the mask is dense, and `seen` counts the held positions and the new
        ones. `at` asks for some positions alone (their numbers over all
        rows): [asked, width].
        """
        if cache is not None:
            check_room(cache.length, embeddings.shape[1], cache.columns, mask)
        outputs = self.model.base_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=cache is not None,
            **({} if cache is None else {self._held_name: cache.held}),
        )
        return select(cast(Tensor, outputs.last_hidden_state), at)

    def new_cache(
        self, *, rows: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> TransformersCache:
        """An empty cache with room for `columns` positions.

        Rows, dtype and device are those of the first keys it is given.
        """
        return TransformersCache(columns)

    def initialisers(self) -> dict[str, Initialiser]:
        """By parameter name; a tied weight has one entry.

        Weights of two or more dimensions are normals of sigma `initializer_range` (0.02 where the
        settings have none), cut at three sigma; gains of norms 1; biases 0.
        """
        sigma = float(self.config.settings.get("initializer_range") or 0.02)

        def rule(name: str, parameter: Tensor) -> Initialiser:
            if parameter.ndim > 1:
                return Initialiser("truncated_normal", sigma)
            return Initialiser("constant", 0.0 if name.endswith(".bias") else 1.0)

        return {name: rule(name, parameter) for name, parameter in self.named_parameters()}

    def parameter_name(self, tensor: str) -> str | None:
        """This module's name of a tensor of a `transformers` checkpoint.

        None for one that the model computes itself (rotary frequencies, masks). A checkpoint of
        the model without its output layer has names without the model's own prefix. A name that
        fits nothing comes back with our prefix and is in no `state_dict`; both names of a tied
        weight are.
        """
        if re.search(r"(^|\.)(rotary_emb\.inv_freq|attention\.(bias|masked_bias))$", tensor):
            return None
        tensor = re.sub(r"^embed_out\.", "lm_head.", tensor)  # as older GPT-NeoX files say
        bare = f"{PREFIX}{self.model.base_model_prefix}.{tensor}"
        return bare if bare in self.state_dict() else PREFIX + tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransformersDecoder":
        """Moves and casts the module, and computes the rotary frequencies anew: in half precision
        they would turn far positions wrongly, and from the meta device they would come unset."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        rotary = self.model.base_model.rotary_emb
        with torch.device("cpu"):
            fresh = type(rotary)(rotary.config)
        for name, buffer in fresh.named_buffers():
            setattr(rotary, name, buffer.to(self.output.weight.device))
        return self
