"""A model that sees as `LlavaForConditionalGeneration`, where stock classes compute the same.

The tower's blocks above the features are left out, so that these are its last hidden states. A
linear projector is Llava's two layers with an identity behind and no activation between.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from midstream.config import EncoderConfig, TransformersDecoderConfig, VLMConfig
from midstream.data.examples import IMAGE_MARK, TextCodec
from midstream.exchange.export_files import (
    check_tokenizer,
    generation_config,
    image_token,
    write_chat_template,
    write_tokenizer,
)
from midstream.exchange.export_text import read_back, save_model, text_config, text_weights
from midstream.exchange.export_towers import own_tensors, stock_tensors
from midstream.model.vlm import VLM
from midstream.storage import write_json


def no_llava(config: VLMConfig) -> str | None:
    """Why stock Llava classes cannot compute this model; None if they do."""
    encoder, projector = config.encoder, config.projector
    if not isinstance(config.decoder, TransformersDecoderConfig):
        return "the decoder is OpenLM's"
    if config.attention == "prefix":
        return "image and question see each other"
    if not isinstance(encoder, EncoderConfig):
        return f"the encoder is not one tower but {getattr(encoder, 'kind', None)}"
    if encoder.family == "siglip2":
        return "Llava does not cut pictures into siglip2's patches"
    if encoder.num_registers:
        return "Llava does not leave DINOv2's registers out"
    if encoder.final_norm:
        return "Llava takes hidden states before the tower's final norm"
    if encoder.position_size not in (None, encoder.image_size):
        return f"positions are interpolated from {encoder.position_size} pixels"
    if encoder.image_size % encoder.patch_size:
        return f"{encoder.image_size} pixels are no whole number of patches"
    if projector.num_layers == 2 and projector.hidden != "decoder":
        return "the projector's inner width is not the decoder's"
    if projector.num_layers == 3:
        return "the projector has three layers"
    return None


def write_llava(
    vlm: VLM, codec: TextCodec, encoder: nn.Module, folder: Path
) -> tuple[nn.Module, tuple[str, ...]]:
    """Write the folder; the model as read back from it, and notes on what differs."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower = vlm.config.encoder
    assert isinstance(tower, EncoderConfig)
    rows, token = vlm.config.decoder.vocab_size, image_token(codec)
    text = text_config(vlm.decoder, codec)
    text.vocab_size = max(rows, token + 1)
    config = LlavaConfig(
        vision_config=_vision_config(tower),
        text_config=text,
        image_token_index=token,
        image_seq_length=tower.num_patches,
        projector_hidden_act="linear" if vlm.config.projector.num_layers == 1 else "gelu",
        vision_feature_select_strategy="default" if tower.family == "dinov2" else "full",
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        names = list(LlavaForConditionalGeneration(config).state_dict())
    weights = _vision_weights(encoder, [name for name in names if "vision_tower." in name])
    weights |= _projector_weights(vlm)
    weights |= _decoder_weights(vlm, text.vocab_size)
    suppressed = (token,) if token >= rows else ()
    stops = generation_config(codec, chats=True, suppressed=suppressed)
    kind = save_model(LlavaForConditionalGeneration, config, weights, stops, folder)
    write_tokenizer(codec, folder, sees=True)
    write_chat_template(folder, sees=True)
    _write_processor(tower, folder)
    check_tokenizer(folder, codec, config, chats=True)
    notes = (
        "Pictures are resized by the stock image processor; one that has the encoder's size keeps "
        "its pixels, others come out a little differently.",
    )
    if suppressed:
        notes += (
            f"The vocabulary has one more row, {token}, for {IMAGE_MARK}; its logit is 0 and "
            "generation never takes it.",
        )
    return read_back(kind, folder), notes


def _vision_config(tower: EncoderConfig) -> Any:
    from transformers import Dinov2Config, SiglipVisionConfig

    shared = {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_size": tower.hidden_size,
        "num_hidden_layers": tower.num_layers + 1 + tower.feature_layer,
        "num_attention_heads": tower.num_heads,
        "hidden_act": tower.hidden_act,
        "layer_norm_eps": tower.norm_eps,
    }
    if tower.family == "siglip":
        return SiglipVisionConfig(
            **shared, intermediate_size=tower.intermediate_size, vision_use_head=False
        )
    ratio = tower.intermediate_size / tower.hidden_size
    if tower.ffn == "swiglu":
        raise NotImplementedError
    return Dinov2Config(**shared, mlp_ratio=ratio, use_swiglu_ffn=False)
