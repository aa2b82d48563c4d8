"""A model that sees as a folder with its own modelling file (`trust_remote_code`).

For what stock Llava classes do not compute: see `export_llava.no_llava`.
"""

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from midstream.config import AnyEncoderConfig, EncoderConfig, FusedEncoder, ImageTransform
from midstream.data.examples import IMAGE_MARK, TextCodec
from midstream.exchange.export_files import (
    check_tokenizer,
    generation_config,
    image_token,
    write_chat_template,
    write_code,
    write_tokenizer,
)
from midstream.exchange.export_text import (
    OPENLM_CODE,
    read_back,
    save_model,
    text_config,
    text_weights,
)
from midstream.exchange.export_towers import fixed_tower, inner_width, num_blocks, towers_of
from midstream.model.vision import VisionEncoder
from midstream.model.vlm import VLM
from midstream.storage import write_json

CODE = (
    *OPENLM_CODE,
    "modeling_midstream.py",
    "processing_midstream.py",
    "image_processing_midstream.py",
)
_IMAGE_PROCESSOR = "image_processing_midstream.MidstreamImageProcessor"


def write_own(
    vlm: VLM, codec: TextCodec, encoder: VisionEncoder, folder: Path
) -> tuple[nn.Module, tuple[str, ...]]:
    """Write the folder; the model as read back from it, and notes on what differs."""
    from midstream.exchange.modeling.configuration_midstream import MidstreamConfig
    from midstream.exchange.modeling.modeling_midstream import MidstreamForConditionalGeneration

    sees = vlm.config.encoder
    assert sees is not None
    token = image_token(codec)
    text = text_config(vlm.decoder, codec)
    frozen = isinstance(sees, EncoderConfig | FusedEncoder) and not vlm.config.owns_encoder
    config = MidstreamConfig(
        text_config=text,
        vision={"num_patches": sees.num_patches, "towers": _descriptions(sees)},
        projector_widths=list(
            vlm.config.projector.widths(sees.hidden_size, vlm.config.decoder.hidden_size)
        ),
        attention="prefix" if vlm.config.attention == "prefix" else "causal",
        feature_dtype=cast(Any, sees).feature_dtype if frozen else None,
        image_token_id=token,
        separator_token_id=codec.separator,
        auto_map={
            "AutoConfig": "configuration_midstream.MidstreamConfig",
            "AutoModelForImageTextToText": "modeling_midstream.MidstreamForConditionalGeneration",
            "AutoProcessor": "processing_midstream.MidstreamProcessor",
            "AutoImageProcessor": _IMAGE_PROCESSOR,
        },
    )
    write_code(folder, *CODE)
    write_tokenizer(codec, folder, sees=True)
    write_chat_template(codec, folder, sees=True)
    write_json(folder / "processor_config.json", _processor(sees))
    write_json(folder / "preprocessor_config.json", _image_processor(sees.transform))
    stops = generation_config(codec, chats=True)
    weights = _weights(vlm, encoder)
    kind = save_model(MidstreamForConditionalGeneration, config, weights, stops, folder)
    check_tokenizer(folder, codec, config, chats=True)
    notes: tuple[str, ...] = ()
    if token >= vlm.config.decoder.vocab_size:
        notes = (f"{IMAGE_MARK} has the id {token}, behind the vocabulary's rows; it needs none.",)
    return read_back(kind, folder), notes


def _weights(vlm: VLM, encoder: VisionEncoder) -> dict[str, Tensor]:
    assert vlm.projector is not None, "it has an encoder"
    assert vlm.config.encoder is not None
    found: dict[str, Tensor] = {}
    for index, (config, tower) in enumerate(towers_of(vlm.config.encoder, encoder)):
        for name, value in fixed_tower(config, tower).items():
            found[f"towers.{index}.{name}"] = value
    layers = [layer for layer in vlm.projector.modules() if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            found[f"projector.layers.{index}.{name}"] = value
    for name, value in text_weights(vlm.decoder).items():
        found[f"language_model.{name}"] = value
    return found


def _descriptions(sees: AnyEncoderConfig) -> list[dict[str, Any]]:
    """Each tower as `modeling_midstream.VisionTower` takes it."""
    if isinstance(sees, FusedEncoder):
        first = sees.towers[0].transform
        return [_description(tower, first) for tower in sees.towers]
    if isinstance(sees, EncoderConfig):
        return [_description(sees, sees.transform)]
    return [
        {
            **{"hidden_size": sees.hidden_size, "patch_size": sees.patch_size},
            **{"num_patches": sees.num_patches, "num_prefix": 0, "num_blocks": 0},
            **{
                "positions": False,
                "rotary": False,
                "pre_norm": False,
                "final_norm": False,
                "repaint": None,
                "norm_eps": 1e-6,
            },
        }
    ]


def _description(tower: EncoderConfig, given: ImageTransform) -> dict[str, Any]:
    is_dino = tower.family == "dinov2"
    return {
        "hidden_size": tower.hidden_size,
        "intermediate_size": inner_width(tower),
        "num_heads": tower.num_heads,
        "num_blocks": num_blocks(tower),
        "patch_size": tower.patch_size,
        "num_patches": tower.num_patches,
        "num_prefix": tower.num_prefix,
        "pre_norm": tower.family == "clip",
        "positions": tower.family != "dinov3",
        "layer_scale": is_dino,
        "rotary": tower.family == "dinov3",
        "swiglu": tower.ffn == "swiglu",
        "hidden_act": tower.hidden_act,
        "norm_eps": tower.norm_eps,
        "final_norm": tower.final_norm,
        "repaint": _repaint(tower, given),
    }


def _repaint(tower: EncoderConfig, given: ImageTransform) -> list[list[float]] | None:
    """Std and mean of the first tower's pixels, mean and std of this one's, where these differ."""
    mine = tower.transform
    if (mine.mean, mine.std) == (given.mean, given.std):
        return None
    return [list(row) for row in (given.std, given.mean, mine.mean, mine.std)]


def _processor(sees: AnyEncoderConfig) -> dict[str, Any]:
    return {
        "processor_class": "MidstreamProcessor",
        "auto_map": {"AutoProcessor": "processing_midstream.MidstreamProcessor"},
        "num_image_tokens": sees.num_patches,
        "image_token": IMAGE_MARK,
    }


def _image_processor(transform: ImageTransform) -> dict[str, Any]:
    return {
        "image_processor_type": "MidstreamImageProcessor",
        "auto_map": {"AutoImageProcessor": _IMAGE_PROCESSOR},
        "image_size": transform.size,
        "resize": transform.resize,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
