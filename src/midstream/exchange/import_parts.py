"""A whole vision-language model in one folder: its language model, a tower, what it sees with.

Llava's layout, whoever wrote it, and the one of Midstream's own exports.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from midstream.config import (
    AnyDecoderConfig,
    AnyEncoderConfig,
    Attention,
    DecoderConfig,
    EncoderConfig,
    FusedEncoder,
    PatchProjection,
    ProjectorConfig,
    TransformersDecoderConfig,
    VLMConfig,
)
from midstream.core.storage import read_json
from midstream.exchange.hub import (
    LanguageModel,
    decoder_tensors,
    described,
    read_config,
    unwrapped,
)
from midstream.exchange.towers import (
    FoundTower,
    encoder_config,
    fitting,
    inner_width,
    loaded,
    other_sizes,
    own_tensors,
    pictures,
    stock_tensors,
)
from midstream.model.decoder import Decoder
from midstream.model.pretrained import TransformersDecoder, with_vocabulary
from midstream.model.vision import build_encoder
from midstream.model.weights import check, read_tensors

# model_type in config.json -> the class that knows its files' names.
_LLAVA = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
OWN, OWN_TEXT = "midstream", "midstream_openlm"
WHOLE = (*_LLAVA, OWN)
LEFT_OUT = "the projector is left out; --part model takes the whole model"


def _content(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], read_json(folder / "config.json"))


def _parts(folder: Path) -> tuple[str, ...]:
    """What may be taken: `model` (all of it), `decoder`, and `encoder` or `encoder1`, ..."""
    content = _content(folder)
    if content["model_type"] != OWN:
        return ("model", "decoder", "encoder")
    return ("model", "decoder", *_tower_parts(content["vision"]["towers"]))


def _tower_parts(towers: list[dict[str, Any]]) -> list[str]:
    if len(towers) > 1:
        return [f"encoder{number + 1}" for number in range(len(towers))]
    # A linear map of patches is no tower; each model learns its own.
    return ["encoder"] if towers[0]["num_blocks"] else []


def check_part(folder: Path, part: str | None) -> None:
    """Raises ValueError that names the parts of a folder, if `part` is none of them."""
    parts = _parts(folder)
    if part not in parts:
        raise ValueError(
            f"{folder} holds a whole vision-language model; import "
            + " or ".join(f"--part {one}" for one in parts)
            + ("" if part is None else f", it has no {part!r}")
        )


# -------------------------------------------------------------------------------- the decoder


def read_decoder_part(folder: Path) -> LanguageModel:
    """The language model of a whole model, or an OpenLM decoder that Midstream exported alone.

    A last row that only stands for pictures and holds zeros is cut off again: our own exports add
    it. Raises FileNotFoundError or ValueError as `read_decoder` does.
    """
    content = _content(folder)
    if content["model_type"] == OWN_TEXT:
        return LanguageModel(*_own_decoder(content, read_tensors(folder), folder))
    config: AnyDecoderConfig
    notes: tuple[str, ...] = ()
    if content["model_type"] == OWN:
        stored = read_tensors(folder)
        inner = _behind(stored, "language_model.")
        config, tensors = _own_decoder(content["text_config"], inner, folder)
        left = tuple(sorted(stored.keys() - {f"language_model.{name}" for name in inner}))
    else:
        model, left, notes = _llava_model(folder, "language_model", "lm_head")
        text = model.config.text_config
        # Who ties is said for the whole model.
        text.tie_word_embeddings = model.config.tie_word_embeddings
        config = described(text, folder)
        tensors = dict(model.model.language_model.state_dict())
        tensors["lm_head.weight"] = model.lm_head.weight.detach()
        tensors = decoder_tensors(config, tensors, folder)
    token = int(content.get("image_token_id", content.get("image_token_index", -1)))
    if isinstance(config, TransformersDecoderConfig) and content["model_type"] != OWN:
        config, tensors = _without_picture_row(config, tensors, token)
    return LanguageModel(
        config,
        tensors,
        left,
        (LEFT_OUT, *notes),
        picture_token=token if token >= config.vocab_size else None,
    )


def _without_picture_row(
    config: TransformersDecoderConfig, tensors: dict[str, Tensor], token: int
) -> tuple[TransformersDecoderConfig, dict[str, Tensor]]:
    if token != config.vocab_size - 1:
        return config, tensors
    with torch.device("meta"):
        smaller = with_vocabulary(config, token)
        shapes = TransformersDecoder(smaller).state_dict()
    grown = [name for name in tensors if tensors[name].shape != shapes[name].shape]
    if any(bool(tensors[name][-1].any()) for name in grown):
        return config, tensors
    return smaller, tensors | {name: tensors[name][:-1] for name in grown}


def _own_decoder(
    settings: dict[str, Any], inner: dict[str, Tensor], folder: Path
) -> tuple[AnyDecoderConfig, dict[str, Tensor]]:
    if settings["model_type"] != OWN_TEXT:
        from transformers import AutoConfig

        config = described(AutoConfig.for_model(**settings), folder)
        return config, decoder_tensors(config, inner, folder)
    ours = DecoderConfig(
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        **{
            name: settings[name]
            for name in ("hidden_size", "vocab_size", "qk_norm", "norm_eps", "rope_base")
        },
    )
    tensors = {name.removeprefix("model."): value for name, value in inner.items()}
    with torch.device("meta"):
        check(Decoder(ours), tensors, path=folder)
    return ours, tensors


def _behind(stored: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(start): value for name, value in stored.items() if name.startswith(start)
    }


def _llava_model(folder: Path, *marks: str) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """A whole Llava in float32, the stored names without any of the marks, and sentences."""
    config = read_config(folder)

    def is_mine(name: str) -> bool:
        return any(mark in name for mark in marks)

    model, loading, notes = loaded(
        folder, _LLAVA[config.model_type], config, lambda name: marks[0] in name, is_mine
    )
    return model, tuple(name for name in loading["stored"] if not is_mine(name)), notes


# -------------------------------------------------------------------------------- the encoder


def read_encoder_part(folder: Path, part: str) -> FoundTower:
    """A tower as `read_encoder` reads one; its features and pictures are those that the whole model
    was trained with."""
    content = _content(folder)
    if content["model_type"] == OWN:
        return _own_tower(folder, content, int(part.removeprefix("encoder") or 1) - 1)
    layer, is_next = content.get("vision_feature_layer", -2), content["model_type"] == "llava_next"
    if not isinstance(layer, int):
        raise ValueError(
            f"{folder} takes features of the layers {layer}; a stage takes one layer's"
        )
    model, left, notes = _llava_model(folder, "vision_tower")
    stated = model.config.vision_config
    # Counted from behind, the embeddings being number 0.
    layer = layer - stated.num_hidden_layers - 1 if layer >= 0 else layer
    # Llava-NeXT resizes a whole picture whatever its shape; it pads tiles, and batches of them.
    config = encoder_config(stated, folder, feature_layer=layer)
    resize = "square" if is_next else fitting(folder, config.family)
    config = config.model_copy(update={"resize": resize})
    if not is_next:
        notes = (*notes, *other_sizes(folder, config.image_size, resize))
    # How the features that its projector sees differ from the patches'.
    left_out = 1 if model.config.vision_feature_select_strategy == "default" else 0
    if left_out != config.num_prefix:
        seen = "saw registers" if left_out else "saw the class token, too"
        seen = "did not see the first patch" if left_out > config.num_prefix else seen
        notes = (*notes, f"its projector {seen}; features here are of all patches")
    if is_next:
        notes = (*notes, "its model saw tiles of a picture, too; features here are of the whole")
    return FoundTower(config, dict(model.model.vision_tower.state_dict()), left, (LEFT_OUT, *notes))


def _own_tower(folder: Path, content: dict[str, Any], index: int) -> FoundTower:
    description = content["vision"]["towers"][index]
    stored, prefix = read_tensors(folder), f"towers.{index}."
    own = _behind(stored, prefix)
    config = _own_config(folder, description, content["feature_dtype"])
    shapes = {
        name.removeprefix("tower."): value.shape
        for name, value in build_encoder(config).state_dict().items()
    }
    # DINOv3's is the library's own class, under whatever names this version of it saved.
    own = own_tensors(own) if config.family == "dinov3" else _unfixed(config, own)
    tensors = {
        name: value.reshape(shapes[name]) for name, value in stock_tensors(own, shapes).items()
    }
    left = tuple(sorted(name for name in stored if not name.startswith(prefix)))
    return FoundTower(config, tensors, left, (LEFT_OUT,))


def _own_config(folder: Path, tower: dict[str, Any], feature_dtype: str | None) -> EncoderConfig:
    marks = {"dinov3": "rotary", "dinov2": "layer_scale", "clip": "pre_norm"}
    family = next((one for one, mark in marks.items() if tower.get(mark)), "siglip")
    told = pictures(folder)
    mean, std = told.get("image_mean", (0.5,) * 3), told.get("image_std", (0.5,) * 3)
    if tower["repaint"] is not None:
        _, _, mean, std = tower["repaint"]
    same = ("patch_size", "hidden_size", "num_heads", "intermediate_size", "hidden_act", "norm_eps")
    settings = {name: tower[name] for name in (*same, "final_norm")} | {
        "family": family,
        "image_size": int(told["image_size"]),
        "position_size": int(told["image_size"]),
        "num_layers": tower["num_blocks"],
        "num_registers": max(0, tower["num_prefix"] - 1),
        "ffn": "swiglu" if tower["swiglu"] else "mlp",
        "feature_layer": -1,
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


# --------------------------------------------------------------------------------- all of it

_PROJECTORS: tuple[dict[str, Any], ...] = (
    *({"num_layers": 2, "hidden": hidden} for hidden in ("decoder", "encoder_4x")),
    *({"num_layers": layers} for layers in (1, 3)),
)


@dataclass(frozen=True)
class Sight:
    """What a language model sees with: towers as those of `read_encoder_part`, none for a map of
    patches; the tensors of projector, gated blocks and that map under the names of `VLM`."""

    encoder: AnyEncoderConfig
    towers: tuple[FoundTower, ...]
    projector: ProjectorConfig
    attention: Attention
    tensors: dict[str, Tensor]

    def model(self, decoder: AnyDecoderConfig) -> VLMConfig:
        """The whole model around a language model."""
        return VLMConfig(
            decoder=decoder,
            encoder=self.encoder,
            projector=self.projector,
            attention=self.attention,
            owns_encoder=isinstance(self.encoder, PatchProjection),
        )


class _OtherwiseError(Exception):
    """What a model does that ours does not."""


def read_sight(folder: Path) -> Sight:
    """What the model in a folder sees with; features are not rounded but where it rounds them.

    Raises ValueError that says what ours would compute otherwise, and which parts can be imported.
    """
    content = _content(folder)
    try:
        return (_own if content["model_type"] == OWN else _llava)(folder, content)
    except _OtherwiseError as reason:
        parts = " or ".join(f"--part {one}" for one in _parts(folder) if one != "model")
        raise ValueError(
            f"{folder} cannot be imported whole: {reason}; import parts of it with {parts}"
        ) from None


def _own(folder: Path, content: dict[str, Any]) -> Sight:
    stored, towers = read_tensors(folder), content["vision"]["towers"]
    widths, reduction = tuple(content["projector_widths"]), content.get("reduction")
    # Folders that were written before gated blocks were known have none.
    gated = content.get("gated")
    width = widths[0]
    if reduction is not None and reduction["kind"] == "shuffle":
        width //= reduction["window"] ** 2
    settings = {"reduction": reduction, "gated": gated}
    asked = _PROJECTORS if len(widths) > 1 else ({"num_layers": 0},)
    known = (ProjectorConfig.model_validate(one | settings) for one in asked)
    projector = next((one for one in known if one.widths(width, widths[-1]) == widths), None)
    if projector is None:
        raise _OtherwiseError(f"its projector has the widths {', '.join(map(str, widths))}")
    tensors = {
        # GELUs stand between the layers.
        f"projector.{2 * index}.{name}": stored[f"projector.layers.{index}.{name}"]
        for index in range(len(widths) - 1)
        for name in ("weight", "bias")
    }
    marks = ("projector.reduction.", "gated.")
    tensors |= {name: value for name, value in stored.items() if name.startswith(marks)}
    read = tuple(
        _rounding(read_encoder_part(folder, part), content["feature_dtype"])
        for part in _tower_parts(towers)
    )
    encoder: AnyEncoderConfig
    if not read:
        encoder = PatchProjection(
            image_size=int(pictures(folder)["image_size"]),
            patch_size=towers[0]["patch_size"],
            hidden_size=towers[0]["hidden_size"],
            resize=fitting(folder),
        )
        tensors["encoder.projection.weight"] = stored["towers.0.patch.weight"].flatten(1)
        tensors["encoder.projection.bias"] = stored["towers.0.patch.bias"]
    elif len(read) == 1:
        encoder = read[0].config
    else:
        configs = tuple(one.config for one in read)
        encoder = FusedEncoder(towers=configs, feature_dtype=configs[0].feature_dtype)
    attention: Attention = "segments" if content["attention"] == "causal" else content["attention"]
    return Sight(encoder, read, projector, attention, tensors)


def _rounding(tower: FoundTower, feature_dtype: str | None) -> FoundTower:
    update = {"feature_dtype": feature_dtype or "float32"}
    return tower._replace(config=tower.config.model_copy(update=update))


def _llava(folder: Path, content: dict[str, Any]) -> Sight:
    if content["model_type"] != "llava":
        raise _OtherwiseError("it sees tiles of a picture, with rows of its own between them")
    stated = read_config(folder)
    layer, strategy = stated.vision_feature_layer, stated.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise _OtherwiseError(f"its projector takes features of the layers {layer}")
    tower = _rounding(read_encoder_part(folder, "encoder"), None)
    if tower.config.num_prefix != (1 if strategy == "default" else 0):
        raise _OtherwiseError(
            f"vision_feature_select_strategy {strategy!r} does not leave its tower's patches, of "
            f"{tower.config.num_prefix} other tokens before them"
        )
    mark = "multi_modal_projector."
    stored, _ = unwrapped(read_tensors(folder), lambda name: mark in name, path=folder)
    held = {name.rpartition(mark)[2]: value for name, value in stored.items() if mark in name}
    names = [f"linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")]
    others = held.keys() ^ set(names)
    if others:
        raise _OtherwiseError(f"its projector has or lacks {', '.join(sorted(others))}")
    projector, act = ProjectorConfig(num_layers=2, hidden="decoder"), stated.projector_hidden_act
    second = held["linear_2.weight"]
    is_identity = torch.equal(second, torch.eye(len(second), dtype=second.dtype))
    if act == "linear" and is_identity and not bool(held["linear_2.bias"].any()):
        # As our own exports write a single layer.
        projector, names = ProjectorConfig(num_layers=1), names[:2]
    elif act != "gelu":
        raise _OtherwiseError(f"its projector has {act!r} between layers")
    # linear_1 and linear_2 are projector.0 and projector.2: a GELU stands between.
    tensors = {
        f"projector.{2 * int(name[7]) - 2}.{name.partition('.')[2]}": held[name] for name in names
    }
    return Sight(tower.config, (tower,), projector, "segments", tensors)
