"""One part of a folder that holds a whole vision-language model: its language model, or a tower.

Llava's layout, whoever wrote it, and the one of Midstream's own exports; `import_whole.py` reads
the rest.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midstream.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    TransformersDecoderConfig,
)
from midstream.core.storage import read_json
from midstream.exchange.hub import decoder_tensors, read_config, unwrapped
from midstream.exchange.towers import (
    LOADING,
    colours,
    encoder_config,
    few,
    fitting,
    inner_width,
    own_tensors,
    pictures,
    stock_tensors,
)
from midstream.model.decoder import Decoder
from midstream.model.pretrained import TransformersDecoder, describe, with_vocabulary
from midstream.model.vision import build_encoder
from midstream.model.weights import check, read_tensors

# model_type in config.json -> the class that knows its files' names.
_LLAVA = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
OWN, OWN_TEXT = "midstream", "midstream_openlm"
WHOLE = (*_LLAVA, OWN)

DecoderPart = tuple[AnyDecoderConfig, dict[str, Tensor], tuple[str, ...], tuple[str, ...]]
EncoderPart = tuple[EncoderConfig, dict[str, Tensor], tuple[str, ...], tuple[str, ...]]


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a vision-language model whose parts can be taken."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in WHOLE


def parts_of(folder: Path) -> tuple[str, ...]:
    """What may be taken: `model` (all of it), `decoder`, and `encoder` or, of several towers,
    `encoder1`, ..."""
    content = read_json(folder / "config.json")
    if content["model_type"] != OWN:
        return ("model", "decoder", "encoder")
    towers = content["vision"]["towers"]
    if len(towers) == 1:
        # A linear map of patches is no tower; each model learns its own.
        return ("model", "decoder", *(("encoder",) if towers[0]["num_blocks"] else ()))
    return ("model", "decoder", *(f"encoder{number + 1}" for number in range(len(towers))))


def check_part(folder: Path, part: str | None) -> None:
    """Raises ValueError that names the parts of a folder, if `part` is none of them."""
    parts = parts_of(folder)
    if part not in parts:
        raise ValueError(
            f"{folder} holds a whole vision-language model; import "
            + " or ".join(f"--part {one}" for one in parts)
            + ("" if part is None else f", it has no {part!r}")
        )


def image_token(folder: Path) -> int:
    """The id that stands for a picture."""
    content = read_json(folder / "config.json")
    return int(content.get("image_token_id", content.get("image_token_index", -1)))


# -------------------------------------------------------------------------------- the decoder


def read_decoder_part(folder: Path) -> DecoderPart:
    """Configuration and tensors as those of `read_decoder`, what was left out, and sentences.

    A last row that only stands for pictures and holds zeros is cut off again: our own exports add
    it. Raises FileNotFoundError or ValueError as `read_decoder` does.
    """
    content = read_json(folder / "config.json")
    if content["model_type"] == OWN:
        stored = read_tensors(folder)
        inner = {
            name.removeprefix("language_model."): value
            for name, value in stored.items()
            if name.startswith("language_model.")
        }
        config, tensors = _own_decoder(content["text_config"], inner, folder)
        left = tuple(sorted(stored.keys() - {f"language_model.{name}" for name in inner}))
        return config, tensors, left, (LEFT_OUT,)
    model, left, notes = _loaded(folder, "language_model")
    text = model.config.text_config
    # Who ties is said for the whole model.
    text.tie_word_embeddings = model.config.tie_word_embeddings
    config = describe(text)
    inner = dict(model.model.language_model.state_dict())
    inner["lm_head.weight"] = model.lm_head.weight.detach()
    tensors = decoder_tensors(config, inner)
    config, tensors = _without_picture_row(config, tensors, image_token(folder))
    return config, tensors, left, (LEFT_OUT, *notes)


def read_own_text(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """An OpenLM decoder that Midstream exported as a language model."""
    config, tensors = _own_decoder(read_json(folder / "config.json"), read_tensors(folder), folder)
    assert isinstance(config, DecoderConfig)
    return config, tensors


LEFT_OUT = "the projector is left out; --part model takes the whole model"


def _own_decoder(
    settings: dict[str, Any], inner: dict[str, Tensor], folder: Path
) -> tuple[AnyDecoderConfig, dict[str, Tensor]]:
    if settings["model_type"] != OWN_TEXT:
        from transformers import AutoConfig

        config = describe(AutoConfig.for_model(**settings))
        return config, decoder_tensors(config, inner)
    ours = DecoderConfig(
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        vocab_size=settings["vocab_size"],
        qk_norm=settings["qk_norm"],
        norm_eps=settings["norm_eps"],
        rope_base=settings["rope_base"],
    )
    tensors = {name.removeprefix("model."): value for name, value in inner.items()}
    with torch.device("meta"):
        check(Decoder(ours), tensors, path=folder)
    return ours, tensors


def _without_picture_row(
    config: TransformersDecoderConfig, tensors: dict[str, Tensor], token: int
) -> tuple[TransformersDecoderConfig, dict[str, Tensor]]:
    rows = config.vocab_size
    with torch.device("meta"):
        smaller = with_vocabulary(config, rows - 1)
        shapes = TransformersDecoder(smaller).state_dict()
    vocabulary = [name for name in tensors if tensors[name].shape != shapes[name].shape]
    if token != rows - 1 or any(bool(tensors[name][-1].any()) for name in vocabulary):
        return config, tensors
    return smaller, tensors | {name: tensors[name][:-1] for name in vocabulary}


# -------------------------------------------------------------------------------- the encoder


def read_encoder_part(folder: Path, part: str) -> EncoderPart:
    """A tower as `read_encoder` reads one; its features and pictures are those that the whole model
    was trained with."""
    content = read_json(folder / "config.json")
    if content["model_type"] == OWN:
        return _own_tower(folder, content, int(part.removeprefix("encoder") or 1) - 1)
    layer = content.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(
            f"{folder} takes features of the layers {layer}; a stage takes one layer's"
        )
    model, left, notes = _loaded(folder, "vision_tower")
    stated = model.config.vision_config
    # Counted from behind, the embeddings being number 0.
    layer = layer - stated.num_hidden_layers - 1 if layer >= 0 else layer
    # Llava-NeXT resizes a whole picture whatever its shape; it pads tiles, and batches of them.
    resize = "square" if content["model_type"] == "llava_next" else fitting(folder)
    config = encoder_config(stated, folder, feature_layer=layer, resize=resize)
    if note := _selected_otherwise(config, model.config.vision_feature_select_strategy):
        notes = (*notes, f"{note}; features here are of all patches")
    if content["model_type"] == "llava_next":
        notes = (*notes, "its model saw tiles of a picture, too; features here are of the whole")
    tensors = dict(model.model.vision_tower.state_dict())
    return config, tensors, left, (LEFT_OUT, *notes)


def _selected_otherwise(config: EncoderConfig, strategy: str) -> str | None:
    """How the features that a Llava's projector sees differ from the patches'; None if they do not.

    `default` leaves the first token out, `full` none.
    """
    left = 1 if strategy == "default" else 0
    if left == config.num_prefix:
        return None
    if left > config.num_prefix:
        return "its projector did not see the first patch"
    return "its projector saw the class token, too" if not left else "its projector saw registers"


def _own_tower(folder: Path, content: dict[str, Any], index: int) -> EncoderPart:
    description = content["vision"]["towers"][index]
    stored, prefix = read_tensors(folder), f"towers.{index}."
    own = {
        name.removeprefix(prefix): value
        for name, value in stored.items()
        if name.startswith(prefix)
    }
    config = _own_config(folder, description, content["feature_dtype"])
    encoder = build_encoder(config)
    shapes = {
        name.removeprefix("tower."): value.shape for name, value in encoder.state_dict().items()
    }
    if config.family == "dinov3":
        # The library's own class, under whatever names this version of it saved.
        own = own_tensors({name.removeprefix("tower."): value for name, value in own.items()})
    else:
        own = _unfixed(config, own)
    tensors = stock_tensors(own, shapes)
    tensors = {name: value.reshape(shapes[name]) for name, value in tensors.items()}
    left = tuple(sorted(name for name in stored if not name.startswith(prefix)))
    return config, tensors, left, (LEFT_OUT,)


def _own_config(folder: Path, tower: dict[str, Any], feature_dtype: str | None) -> EncoderConfig:
    marks = {"dinov3": "rotary", "dinov2": "layer_scale", "clip": "pre_norm"}
    family = next((one for one, mark in marks.items() if tower.get(mark)), "siglip")
    mean, std = colours(folder, (0.5,) * 3, (0.5,) * 3)
    if tower["repaint"] is not None:
        _, _, mean, std = tower["repaint"]
    size = int(pictures(folder)["image_size"])
    settings = {
        "family": family,
        "image_size": size,
        "position_size": size,
        "patch_size": tower["patch_size"],
        "hidden_size": tower["hidden_size"],
        "num_layers": tower["num_blocks"],
        "num_heads": tower["num_heads"],
        "intermediate_size": tower["intermediate_size"],
        "num_registers": max(0, tower["num_prefix"] - 1),
        "ffn": "swiglu" if tower["swiglu"] else "mlp",
        "hidden_act": tower["hidden_act"],
        "norm_eps": tower["norm_eps"],
        "feature_layer": -1,
        "final_norm": tower["final_norm"],
        "resize": fitting(folder),
        "pixel_mean": mean,
        "pixel_std": std,
        **({} if feature_dtype is None else {"feature_dtype": feature_dtype}),
    }
    config = EncoderConfig.model_validate(settings)
    if config.ffn == "mlp" or family == "dinov3":
        return config
    # The folder holds the width that transformers makes of the stated one.
    for ratio in range(1, 17):
        stated = config.model_copy(update={"intermediate_size": ratio * config.hidden_size})
        if inner_width(stated) == config.intermediate_size:
            return stated
    raise ValueError(
        f"{folder} has a tower with {config.intermediate_size} inner channels of "
        f"{config.hidden_size}, which transformers' DINOv2 cannot have"
    )


def _unfixed(config: EncoderConfig, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `fixed_tower` put together, apart again; features are the same to the last bit.

    The class token keeps its position's share, and its position is zero.
    """
    found = dict(own)
    if config.num_prefix:
        prefix = found.pop("prefix")
        found["class"], found["registers"] = prefix[:, :1], prefix[:, 1:]
        none = torch.zeros_like(prefix[:, :1])
        found["positions"] = torch.cat((none, found["positions"]), dim=1)
    for name in [name for name in found if config.ffn == "swiglu" and ".fc1." in name]:
        gate, up = found.pop(name).chunk(2)
        found |= {name.replace("fc1", "gate"): gate, name.replace("fc1", "up"): up}
    return found


# ------------------------------------------------------------------------------- Llava's layout


def _loaded(folder: Path, part: str) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """The whole model in float32, the stored names of all but one part, and sentences.

    Raises ValueError that names what the part lacks.
    """
    import transformers

    config = read_config(folder)
    name = _LLAVA[config.model_type]
    stored, notes = unwrapped(read_tensors(folder), lambda name: part in name, path=folder)
    model, loading = getattr(transformers, name).from_pretrained(
        None, config=config, state_dict=dict(stored), **LOADING
    )
    marks = ("vision_tower",) if part == "vision_tower" else ("language_model", "lm_head")
    missing = [
        key
        for key in sorted(loading["missing_keys"])
        if any(mark in key for mark in marks) and ".head." not in key
    ]
    wrong = [one for one in map(str, loading["mismatched_keys"]) if any(m in one for m in marks)]
    if missing or wrong:
        raise ValueError(
            f"{folder} is no whole {name}: missing {few(missing)}; mismatched {few(wrong)}; "
            f"unexpected {few(sorted(loading['unexpected_keys']))}. Download it again"
        )
    left = tuple(sorted(key for key in stored if not any(mark in key for mark in marks)))
    return model, left, notes
