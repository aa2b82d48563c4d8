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
from midstream.exchange.export_towers import (
    num_blocks,
    own_name,
    stock_tensors,
    tower_tensors,
)
from midstream.model.pretrained import TransformersDecoder
from midstream.model.vision import VisionEncoder
from midstream.model.vlm import VLM
from midstream.storage import write_json


def no_llava(config: VLMConfig) -> str | None:
    """Why stock Llava classes cannot compute this model; None if they do."""
    encoder, projector = config.encoder, config.projector
    if not isinstance(config.decoder, TransformersDecoderConfig):
        return "the decoder is OpenLM's"
    if config.decoder.tied_embeddings and config.decoder.model_type == "gpt_neox":
        return "Llava does not know where a GPT-NeoX model has its tied embeddings"
    if config.attention == "prefix":
        return "image and question see each other"
    if not isinstance(encoder, EncoderConfig):
        return f"the encoder is not one tower but {getattr(encoder, 'kind', None)}"
    if encoder.family == "siglip2":
        return "Llava does not cut pictures into siglip2's patches"
    if encoder.family == "dinov3":
        return "Llava does not leave DINOv3's registers out"
    if encoder.num_registers:
        return "Llava does not leave DINOv2's registers out"
    if encoder.final_norm:
        return "Llava takes hidden states before the tower's final norm"
    if encoder.position_size not in (None, encoder.image_size):
        return f"positions are interpolated from {encoder.position_size} pixels"
    if projector.num_layers == 2 and projector.hidden != "decoder":
        return "the projector's inner width is not the decoder's"
    if projector.num_layers == 3:
        return "the projector has three layers"
    return None


def write_llava(
    vlm: VLM, codec: TextCodec, encoder: VisionEncoder, folder: Path
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
        vision_feature_select_strategy="default" if tower.num_prefix else "full",
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(config).state_dict()
    names = {name: value for name, value in empty.items() if "vision_tower." in name}
    weights = _vision_weights(encoder, names)
    weights |= _projector_weights(vlm) | _decoder_weights(vlm, text.vocab_size)
    suppressed = (token,) if token >= rows else ()
    stops = generation_config(codec, chats=True, suppressed=suppressed)
    kind = save_model(LlavaForConditionalGeneration, config, weights, stops, folder)
    write_tokenizer(codec, folder, sees=True)
    write_chat_template(codec, folder, sees=True)
    _write_processor(tower, folder)
    check_tokenizer(folder, codec, config, chats=True)
    notes: tuple[str, ...] = (
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
    from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

    shared = {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_size": tower.hidden_size,
        "num_hidden_layers": num_blocks(tower),
        "num_attention_heads": tower.num_heads,
        "hidden_act": tower.hidden_act,
        "layer_norm_eps": tower.norm_eps,
    }
    if tower.family == "siglip":
        return SiglipVisionConfig(
            **shared, intermediate_size=tower.intermediate_size, vision_use_head=False
        )
    if tower.family == "clip":
        return CLIPVisionConfig(**shared, intermediate_size=tower.intermediate_size)
    return Dinov2Config(
        **shared,
        mlp_ratio=tower.intermediate_size // tower.hidden_size,
        use_swiglu_ffn=tower.ffn == "swiglu",
        use_mask_token=False,
    )


def _vision_weights(encoder: VisionEncoder, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the stock model; what no feature depends on is at its neutral value."""
    own = tower_tensors(encoder)
    prefix = "model.vision_tower."
    unused = {name for name in names if own_name(name.removeprefix(prefix)).startswith("norm.")}
    used = {name.removeprefix(prefix) for name in names if name not in unused}
    found = {prefix + name: value for name, value in stock_tensors(own, used).items()}
    for name in unused:
        fill = torch.zeros_like if name.endswith("bias") else torch.ones_like
        found[name] = fill(names[name], device="cpu")
    return found


def _projector_weights(vlm: VLM) -> dict[str, Tensor]:
    assert vlm.projector is not None
    layers = [layer for layer in vlm.projector.modules() if isinstance(layer, nn.Linear)]
    width = vlm.config.decoder.hidden_size
    first = layers[0]
    second = layers[1] if len(layers) == 2 else None
    found = {
        "linear_1.weight": first.weight,
        "linear_1.bias": first.bias,
        "linear_2.weight": torch.eye(width) if second is None else second.weight,
        "linear_2.bias": torch.zeros(width) if second is None else second.bias,
    }
    return {f"model.multi_modal_projector.{name}": value for name, value in found.items()}


def _decoder_weights(vlm: VLM, vocab_size: int) -> dict[str, Tensor]:
    """By the names of the stock model, the vocabulary filled up with rows of zeros."""
    decoder = vlm.decoder
    assert isinstance(decoder, TransformersDecoder)
    base = f"{decoder.model.base_model_prefix}."
    vocabulary = (decoder.model.get_input_embeddings().weight, decoder.output.weight)
    rows = {part.data_ptr() for part in vocabulary}
    found = {}
    for name, value in text_weights(decoder).items():
        if value.data_ptr() in rows and vocab_size > len(value):
            value = nn.functional.pad(value, (0, 0, 0, vocab_size - len(value)))
        inner = name.startswith(base)
        found[f"model.language_model.{name.removeprefix(base)}" if inner else name] = value
    return found


def _write_processor(tower: EncoderConfig, folder: Path) -> None:
    """The picture's way to pixels: as near to `data/images.py` as stock settings come."""
    side = {"height": tower.image_size, "width": tower.image_size}
    crops = tower.resize == "crop"
    pictures = {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": tower.resize == "letterbox",
        "do_resize": True,
        "size": {"shortest_edge": tower.image_size} if crops else side,
        "resample": 3,
        "do_center_crop": crops,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.pixel_mean),
        "image_std": list(tower.pixel_std),
        "processor_class": "LlavaProcessor",
    }
    has_class_token = tower.num_prefix > 0
    words = {
        "processor_class": "LlavaProcessor",
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": "default" if has_class_token else "full",
        "num_additional_image_tokens": int(has_class_token),
        "image_token": IMAGE_MARK,
    }
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "processor_config.json", words)
