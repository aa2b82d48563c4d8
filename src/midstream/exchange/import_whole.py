"""A whole vision-language model out of one folder: what its language model sees with.

Llava's layout and the one of Midstream's own exports; what ours would compute otherwise is refused.
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
    EncoderConfig,
    FusedEncoder,
    PatchProjection,
    ProjectorConfig,
    VLMConfig,
)
from midstream.core.storage import read_json
from midstream.exchange.hub import read_config, unwrapped
from midstream.exchange.import_parts import OWN, parts_of, read_encoder_part
from midstream.exchange.towers import fitting, pictures
from midstream.model.weights import read_tensors

_PROJECTORS = (
    *(ProjectorConfig(num_layers=2, hidden=hidden) for hidden in ("decoder", "encoder_4x")),
    *(ProjectorConfig(num_layers=layers) for layers in (1, 3)),
)


@dataclass(frozen=True)
class Sight:
    """What a language model sees with: towers as those of `read_encoder_part`, none for a map of
    patches; the projector's tensors, and that map's, under the names of `VLM`."""

    encoder: AnyEncoderConfig
    towers: tuple[tuple[EncoderConfig, dict[str, Tensor]], ...]
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


def read_sight(folder: Path) -> Sight:
    """What the model in a folder sees with; features are not rounded but where it rounds them.

    Raises ValueError that says what ours would compute otherwise, and which parts can be imported.
    """
    content = read_json(folder / "config.json")
    try:
        return _own(folder, content) if content["model_type"] == OWN else _llava(folder, content)
    except _OtherwiseError as reason:
        parts = " or ".join(f"--part {one}" for one in parts_of(folder) if one != "model")
        raise ValueError(
            f"{folder} cannot be imported whole: {reason}; import parts of it with {parts}"
        ) from None


class _OtherwiseError(Exception):
    """What a model does that ours does not."""


# --------------------------------------------------------------------------------- our own exports


def _own(folder: Path, content: dict[str, Any]) -> Sight:
    stored, towers = read_tensors(folder), content["vision"]["towers"]
    widths = tuple(content["projector_widths"])
    tensors = {}
    for index in range(len(widths) - 1):
        for name in ("weight", "bias"):
            # GELUs stand between the layers.
            value = stored[f"projector.layers.{index}.{name}"]
            tensors[f"projector.{2 * index}.{name}"] = value
    read: tuple[tuple[EncoderConfig, dict[str, Tensor]], ...] = ()
    if towers[0]["num_blocks"]:
        parts = ["encoder"] if len(towers) == 1 else [f"encoder{n + 1}" for n in range(len(towers))]
        read = tuple(
            (_rounding(config, content["feature_dtype"]), tower)
            for config, tower, _, _ in (read_encoder_part(folder, part) for part in parts)
        )
        encoder: AnyEncoderConfig = _together(tuple(config for config, _ in read))
    else:
        (patches,) = towers
        encoder = PatchProjection(
            image_size=int(pictures(folder)["image_size"]),
            patch_size=patches["patch_size"],
            hidden_size=patches["hidden_size"],
            resize=fitting(folder),
        )
        tensors["encoder.projection.weight"] = stored["towers.0.patch.weight"].flatten(1)
        tensors["encoder.projection.bias"] = stored["towers.0.patch.bias"]
    return Sight(
        encoder=encoder,
        towers=read,
        projector=_projector(widths),
        attention="prefix" if content["attention"] == "prefix" else "segments",
        tensors=tensors,
    )


def _together(towers: tuple[EncoderConfig, ...]) -> EncoderConfig | FusedEncoder:
    if len(towers) == 1:
        return towers[0]
    return FusedEncoder(towers=towers, feature_dtype=towers[0].feature_dtype)


def _rounding(config: EncoderConfig, feature_dtype: str | None) -> EncoderConfig:
    return config.model_copy(update={"feature_dtype": feature_dtype or "float32"})


def _projector(widths: tuple[int, ...]) -> ProjectorConfig:
    for config in _PROJECTORS:
        if config.widths(widths[0], widths[-1]) == widths:
            return config
    raise _OtherwiseError(f"its projector has the widths {', '.join(map(str, widths))}")


# ------------------------------------------------------------------------------------------- Llava


def _llava(folder: Path, content: dict[str, Any]) -> Sight:
    if content["model_type"] != "llava":
        raise _OtherwiseError("it sees tiles of a picture, with rows of its own between them")
    stated = read_config(folder)
    layer, strategy = stated.vision_feature_layer, stated.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise _OtherwiseError(f"its projector takes features of the layers {layer}")
    config, tower, _, _ = read_encoder_part(folder, "encoder")
    if config.num_prefix != (1 if strategy == "default" else 0):
        raise _OtherwiseError(
            f"vision_feature_select_strategy {strategy!r} does not leave its tower's patches, of "
            f"{config.num_prefix} other tokens before them"
        )
    tensors, projector = _llava_projector(folder, stated)
    config = _rounding(config, None)
    return Sight(config, ((config, tower),), projector, "segments", tensors)


def _llava_projector(folder: Path, stated: Any) -> tuple[dict[str, Tensor], ProjectorConfig]:
    stored, _ = unwrapped(
        read_tensors(folder), lambda name: "multi_modal_projector" in name, path=folder
    )
    mark = "multi_modal_projector."
    held = {name.rpartition(mark)[2]: value for name, value in stored.items() if mark in name}
    others = held.keys() ^ {f"linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    if others:
        raise _OtherwiseError(f"its projector has or lacks {', '.join(sorted(others))}")
    first, second = (
        {part: held[f"linear_{number}.{part}"] for part in ("weight", "bias")} for number in (1, 2)
    )
    layers, hidden = [first, second], "decoder"
    if stated.projector_hidden_act == "linear" and _is_identity(second):
        # As our own exports write a single layer.
        layers, hidden = [first], "encoder_4x"
    elif stated.projector_hidden_act != "gelu":
        raise _OtherwiseError(f"its projector has {stated.projector_hidden_act!r} between layers")
    tensors = {
        f"projector.{2 * index}.{part}": value
        for index, layer in enumerate(layers)
        for part, value in layer.items()
    }
    return tensors, ProjectorConfig(num_layers=cast(Any, len(layers)), hidden=cast(Any, hidden))


def _is_identity(layer: dict[str, Tensor]) -> bool:
    weight, bias = layer["weight"], layer["bias"]
    return not bool(bias.any()) and torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype))
