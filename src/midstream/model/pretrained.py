"""Causal language models of `transformers`, behind the decoder's interface.

The module holds the model that `transformers` builds, unchanged, as `model`: a parameter's name is
"model." and its name there, such as `model.model.layers.0.mlp.up_proj.weight`, and so for good.

Initialisers (for training from scratch): weights of two or more dimensions are normals of sigma
`initializer_range` (0.02 where the settings have none), cut at three sigma; gains of norms 1;
biases 0.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from midstream.config import TransformersDecoderConfig
from midstream.model.decoder import select
from midstream.model.initialise import Initialiser
from midstream.model.transformers_config import (
    FAMILIES,
    agree,
    build_model,
    count_parameters,
    transformers_config,
)

PREFIX = "model."

# ----------------------------------------------------------------------------------- the cache


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

    def check_room(self, new: int) -> None:
        """Raises ValueError with both numbers if `new` more positions do not fit."""
        if self.length + new > self.columns:
            raise ValueError(
                f"the cache has room for {self.columns} positions, {self.length + new} are needed"
            )


# --------------------------------------------------------------------------------- the decoder


class TransformersDecoder(nn.Module):
    """A causal language model of `transformers`; unset (NaN) until initialised or loaded.

    Raises ValueError for a config that `transformers_config` refuses.
    """

    def __init__(self, config: TransformersDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = build_model(transformers_config(config))
        agree("num_parameters", config.num_parameters, count_parameters(self.model))
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
        mask: Bool[Tensor, "rows 1 seq seen"] | None,
        cache: TransformersCache | None = None,
        at: Int[Tensor, "asked"] | None = None,
    ) -> Float[Tensor, "*asked width"]:
        """The hidden states after the final norm; `output` turns them into logits.

        `mask` is True where a position sees another; None is plain causal attention, whatever the
        position ids, and needs an empty or no cache. With a cache, `seen` counts the held
        positions and the new ones. `at` asks for some positions alone (their numbers over all
        rows): [asked, width].
        """
        if cache is not None:
            cache.check_room(embeddings.shape[1])
        if mask is None:
            if cache is not None and cache.length > 0:
                raise ValueError(
                    f"the cache holds {cache.length} positions; a mask must say who sees"
                )
            # Given no mask at all, transformers starts a new segment wherever positions do. Of one
            # that hides nothing it makes the same plain causal attention without looking at them.
            seen = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        outputs = self.model.base_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=seen if mask is None else mask,
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
        """The rules at the head of this file, by parameter name; a tied weight has one entry."""
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
        for theirs, ours in FAMILIES[self.config.model_type].renamed.items():
            if tensor.startswith(theirs):
                tensor = ours + tensor.removeprefix(theirs)
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
