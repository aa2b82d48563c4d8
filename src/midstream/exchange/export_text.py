"""A language model as a folder that `AutoModelForCausalLM` reads.

An OpenLM decoder brings its own modelling file (`trust_remote_code`); a decoder of `transformers`
becomes a folder of its own class, without any code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from midstream.config import DecoderConfig
from midstream.data.examples import TextCodec
from midstream.exchange.export_files import (
    check_tokenizer,
    generation_config,
    write_chat_template,
    write_code,
    write_tokenizer,
)
from midstream.model.decoder import Decoder
from midstream.model.pretrained import TransformersDecoder
from midstream.model.transformers_config import transformers_config

OPENLM_CODE = ("configuration_midstream.py", "modeling_openlm.py")


def text_config(decoder: Decoder | TransformersDecoder, codec: TextCodec) -> Any:
    """The decoder's configuration as `transformers` has it, with the codec's special ids."""
    if isinstance(decoder, TransformersDecoder):
        config = transformers_config(decoder.config)
    else:
        config = _openlm_config(decoder.config)
    config.bos_token_id = codec.begin_of_text
    config.eos_token_id = config.pad_token_id = codec.end_of_text
    return config


def _openlm_config(ours: DecoderConfig) -> Any:
    from midstream.exchange.modeling.configuration_midstream import OpenLMConfig

    return OpenLMConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.ffn_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        qk_norm=ours.qk_norm,
        norm_eps=ours.norm_eps,
        rope_base=ours.rope_base,
    )


def text_weights(decoder: Decoder | TransformersDecoder) -> dict[str, Tensor]:
    """The decoder's tensors under the names of the exported class."""
    state = cast(nn.Module, decoder).state_dict()
    if isinstance(decoder, TransformersDecoder):
        return {name.removeprefix("model."): value for name, value in state.items()}
    return {f"model.{name}": value for name, value in state.items()}


def write_text(
    decoder: Decoder | TransformersDecoder, codec: TextCodec, folder: Path, *, chats: bool
) -> nn.Module:
    """Write the folder and return the model as read back from it.

    With `chats` it stops at the separator, too, and has a chat template.
    """
    from transformers import AutoModelForCausalLM

    config = text_config(decoder, codec)
    if isinstance(decoder, TransformersDecoder):
        build: Any = AutoModelForCausalLM.from_config
    else:
        from midstream.exchange.modeling.modeling_openlm import OpenLMForCausalLM

        build = OpenLMForCausalLM
        config.auto_map = {
            "AutoConfig": "configuration_midstream.OpenLMConfig",
            "AutoModelForCausalLM": "modeling_openlm.OpenLMForCausalLM",
        }
        write_code(folder, *OPENLM_CODE)
    write_tokenizer(codec, folder, sees=False)
    if chats:
        write_chat_template(codec, folder, sees=False)
    kind = save_model(
        build, config, text_weights(decoder), generation_config(codec, chats=chats), folder
    )
    check_tokenizer(folder, codec, config, chats=chats)
    return read_back(kind, folder)


def save_model(
    build: Any, config: Any, weights: Mapping[str, Tensor], generation: Any, folder: Path
) -> Any:
    """Save a model of `transformers` that holds exactly these tensors; returns its class.

    Nothing is drawn or copied: the model shares the tensors' memory.
    """
    with torch.device("meta"):
        model = build(config)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = generation
    model.save_pretrained(folder)
    for weights_file in folder.glob("*.safetensors"):
        # They are written for their owner's eyes only.
        weights_file.chmod((folder / "config.json").stat().st_mode)
    return type(model)


def read_back(kind: Any, folder: Path) -> nn.Module:
    """The model in a folder, in float32 and in evaluation mode."""
    model: nn.Module = kind.from_pretrained(folder, dtype=torch.float32)
    return model.eval()
