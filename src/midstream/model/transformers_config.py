"""Which language models of `transformers` are known, and their configurations as ours.

What a family's own code would do beside our masks and positions, or what it would draw at random,
is refused by name rather than left out.
"""

import copy
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from midstream.config import TransformersDecoderConfig

# -------------------------------------------------------------------------------- the families


@dataclass(frozen=True)
class Family:
    """The models that have a `model_type`; tensors whose names start otherwise in checkpoints."""

    models: str
    renamed: dict[str, str] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("Llama 2 and 3, SmolLM, SmolLM2, TinyLlama, Amber, OpenCoder"),
    "mistral": Family("Mistral without a sliding window"),
    "olmo": Family("OLMo (-hf)"),
    "olmo2": Family("OLMo 2"),
    "gpt_neox": Family("Pythia, GPT-NeoX", {"embed_out.": "lm_head."}),
    "qwen2": Family("Qwen 2 and 2.5"),
    "qwen3": Family("Qwen 3"),
    "smollm3": Family("SmolLM3"),
}

# Where a model came from and how it was last used, not what it is.
_NOT_THE_MODEL = {
    *("_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype"),
    *("id2label", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states"),
    *("problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache"),
}

# Settings that are fine while absent or at one of these values.
_NEUTRAL: tuple[tuple[tuple[str, ...], tuple[Any, ...], str], ...] = (
    (("quantization_config",), (), "import the checkpoint that was not quantised"),
    (
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        (0,),
        "mixtures of experts are not supported; import a dense model",
    ),
    (
        ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"),
        (1.0,),
        "the loss takes the logits as they are; import a model without it",
    ),
    (
        ("embedding_multiplier", "scale_emb", "attention_multiplier", "residual_multiplier"),
        (1.0,),
        "image features enter as they are; import a model without it",
    ),
    (
        ("attention_dropout", "hidden_dropout", "embedding_dropout", "resid_pdrop"),
        (0.0,),
        "dropout draws from the global generator; set it to 0.0 in config.json",
    ),
    (("is_causal",), (True,), "import a causal language model"),
    (("add_cross_attention",), (False,), "import a decoder without cross-attention"),
)

# The others change with the length of the row, so that segments would change each other.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        known = "; ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise ValueError(f"model_type {model_type!r} is no family known here; known are {known}")
    return FAMILIES[model_type]


def _checked(config: Any) -> Any:
    """A configuration of `transformers`, if our surface can say all that it means."""
    kind = config.model_type
    _family(kind)
    for names, neutral, remedy in _NEUTRAL:
        for name in names:
            value = getattr(config, name, None)
            if value is not None and value not in neutral:
                raise ValueError(f"this {kind} model has {name} {value!r}; {remedy}")
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if set(layers) != {"full_attention"} if layers else window is not None:
        raise ValueError(
            f"this {kind} model has sliding_window {window!r} (layer_types {layers!r}), but who "
            "sees whom is the recipe's to say; where no row is longer than the window, set "
            "sliding_window to null and drop layer_types in config.json"
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in _ROPE_TYPES:
        raise ValueError(
            f"this {kind} model has rope_type {rope!r}, known are {', '.join(_ROPE_TYPES)}; import "
            "a model whose positions do not depend on the length of the row"
        )
    return config


# ------------------------------------------------------------------------------ configurations


def describe(hf_config: Any) -> TransformersDecoderConfig:
    """Our configuration of one of `transformers`, as `AutoConfig` reads it.

    Its `settings` are JSON, without what does not belong to the model (paths, versions, dtype).
    Raises ValueError for an unknown family, or for a setting that would not be honoured.
    """
    _checked(hf_config)
    stated = hf_config.to_dict()
    kept = {name: stated[name] for name in sorted(stated.keys() - _NOT_THE_MODEL)}
    # Through JSON, so that what is stated equals what is read back.
    settings = json.loads(json.dumps(kept))
    with torch.device("meta"):
        model = build_model(_from_settings(hf_config.model_type, settings))
    return TransformersDecoderConfig(
        model_type=hf_config.model_type,
        settings=settings,
        hidden_size=hf_config.hidden_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=hf_config.num_attention_heads,
        vocab_size=hf_config.vocab_size,
        num_parameters=count_parameters(model),
        tied_embeddings=_is_tied(model),
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
        agree(name, getattr(config, name), value)
    return theirs


def _from_settings(model_type: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    # The constructors change nested settings in place.
    settings = copy.deepcopy(settings)
    named = settings.pop("model_type", model_type)
    if named != model_type:
        raise ValueError(f"the settings are of model_type {named!r}, the config of {model_type!r}")
    _family(model_type)
    return AutoConfig.for_model(model_type, **settings)


def agree(name: str, stated: int, found: int) -> None:
    """Raises ValueError with both numbers where a stated size is not the one that follows."""
    if stated != found:
        raise ValueError(
            f"the decoder's config states {name} {stated:,}, its settings make it {found:,}; "
            "build the config with midstream.model.transformers_config.describe"
        )


def build_model(hf_config: Any) -> Any:
    """The model in float32 with unset values, tied where it is tied; nothing is drawn."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, attn_implementation="sdpa"
        )
    # Left out together with the initialisers.
    model.tie_weights()
    return model


def count_parameters(model: nn.Module) -> int:
    """All parameters; a tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight
