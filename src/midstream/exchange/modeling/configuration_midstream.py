"""Configurations of exported Midstream models."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


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


class MidstreamConfig(PretrainedConfig):  # type: ignore[misc]
    """A vision-language model: decoder, vision towers, projector, and who sees whom.

    `text_config` is an `OpenLMConfig` or that of a causal language model of transformers. `vision`
    describes the encoder in Midstream's words: a `tower`, `fused` towers, or `patches`.
    `projector_widths` are the widths before, between and after its linear layers. `attention` is
    `causal` or `prefix`; with the latter the positions up to the first question's end see each
    other. `feature_dtype` is what the encoder's features are rounded to, or None.
    """

    model_type = "midstream"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        text_config: Any = None,
        vision: dict[str, Any] | None = None,
        projector_widths: list[int] | None = None,
        attention: str = "causal",
        feature_dtype: str | None = None,
        image_token_id: int = 0,
        separator_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.text_config = _text_config(text_config)
        self.vision = vision or {}
        self.projector_widths = projector_widths or []
        self.attention = attention
        self.feature_dtype = feature_dtype
        self.image_token_id = image_token_id
        self.separator_token_id = separator_token_id
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def _text_config(value: Any) -> Any:
    if value is None:
        return OpenLMConfig()
    if not isinstance(value, dict):
        return value
    settings = {key: item for key, item in value.items() if key != "model_type"}
    if value["model_type"] == OpenLMConfig.model_type:
        return OpenLMConfig(**settings)
    return AutoConfig.for_model(value["model_type"], **settings)
