"""Vision towers of other people, as `transformers` saves them, and ours under names of our own.

`families.toml` says which are known, and their names.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from midstream.config import AnyEncoderConfig, EncoderConfig, FusedEncoder, PatchProjection
from midstream.core.storage import read_json
from midstream.exchange.hub import TABLES, check_plain, read_config, unwrapped
from midstream.model.vision import Tower, VisionEncoder, positions
from midstream.model.weights import read_tensors, some

# model_type in config.json -> family, and the class that knows its files' names.
FAMILIES: dict[str, list[Any]] = TABLES["towers"]
_OF_A_TOWER = re.compile(r"(vision_model|embeddings|encoder|layer|text_model)\.")


class FoundTower(NamedTuple):
    """A tower's configuration, its tensors in float32 under `transformers`' names of its class,
    the file's names of what is no part of it, and sentences."""

    config: EncoderConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


# --------------------------------------------------------------------------------- our names


def own_name(name: str) -> str:
    """Our name of a tensor of a SigLIP, CLIP, DINOv2 or DINOv3 tower of transformers 5."""
    for pattern, replacement in TABLES["names"].items():
        name = re.sub(pattern, replacement, name)
    return name


def own_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors under our names; "tower." before a name is left out."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        mine = own_name(name.removeprefix("tower."))
        if ".gate_up." in mine:
            gate, up = value.chunk(2)
            found |= {mine.replace("gate_up", "gate"): gate, mine.replace("gate_up", "up"): up}
        else:
            found[mine] = value
    return found


def stock_tensors(own: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Our tensors under the names of a stock tower; KeyError for one that there is not."""
    found: dict[str, Tensor] = {}
    for name in names:
        mine = own_name(name)
        parts = [mine]
        if ".gate_up." in mine:
            parts = [mine.replace("gate_up", part) for part in ("gate", "up")]
        found[name] = torch.cat([own[part] for part in parts]) if len(parts) > 1 else own[mine]
    return found


def inner_width(tower: EncoderConfig) -> int:
    """Width between a block's two layers; transformers takes two thirds for DINOv2's gated ones."""
    inner = tower.intermediate_size
    gated = tower.family == "dinov2" and tower.ffn == "swiglu"
    return (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner


@torch.no_grad()
def fixed_tower(config: AnyEncoderConfig, tower: VisionEncoder) -> dict[str, Tensor]:
    """The tensors of the tower's class in `modeling_midstream`, for pictures of the encoder's size.

    Positions are interpolated here; a linear map of flat patches becomes a convolution.
    """
    assert not isinstance(config, FusedEncoder), "its towers are asked one by one"
    size, width, state = config.patch_size, config.hidden_size, tower.state_dict()
    if isinstance(config, PatchProjection):
        weight = state["projection.weight"].reshape(width, 3, size, size)
        return {"patch.weight": weight, "patch.bias": state["projection.bias"]}
    if config.family == "dinov3":
        # The class has a token for masked patches, which no picture has.
        return {"tower.embeddings.mask_token": torch.zeros(1, 1, width)} | state
    own = own_tensors(state)
    if config.family == "siglip2":
        flat = own["patch.weight"].reshape(width, size, size, 3)
        own["patch.weight"] = flat.permute(0, 3, 1, 2).contiguous()
    own["positions"] = positions(cast(Tower, tower))
    if config.family == "clip":
        own["patch.bias"] = torch.zeros(width)
    if config.num_prefix:
        start = own.pop("class") + own["positions"][:, :1]
        registers = own.pop("registers", start[:, :0])
        own["prefix"] = torch.cat((start, registers), dim=1)
        own["positions"] = own["positions"][:, 1:].contiguous()
    for name in [name for name in own if ".gate." in name]:
        up = own.pop(name.replace(".gate.", ".up."))
        own[name.replace(".gate.", ".fc1.")] = torch.cat((own.pop(name), up))
    return own


# ----------------------------------------------------------------------------- others' folders


def read_encoder(folder: Path) -> FoundTower:
    """The tower in a Hugging Face folder.

    Older files' names are brought to today's by `transformers` itself; of a whole SigLIP or CLIP
    only the vision tower is read. Features are those of the second to last block (recipe of
    Prismatic and LLaVA). Raises FileNotFoundError or ValueError as `read_tensors` does, and
    ValueError with the first tensors that are missing or of another shape.
    """
    stated = read_config(folder)
    _, name = FAMILIES[stated.model_type]
    stated = getattr(stated, "vision_config", stated)
    config = encoder_config(stated, folder)
    model, loading, notes = loaded(
        folder, name, stated, lambda name: _OF_A_TOWER.match(name) is not None, lambda _: True
    )
    further = [key for key in loading["unexpected_keys"] if own_name(key).startswith("blocks.")]
    if further:
        raise ValueError(
            f"{folder} holds {some(further)}, of which its config.json says nothing "
            f"(num_hidden_layers {config.num_layers}); put there how many layers the file has"
        )
    tensors = {
        key: value
        for key, value in model.state_dict().items()
        if key not in loading["missing_keys"]
    }
    return FoundTower(config, tensors, tuple(sorted(loading["unexpected_keys"])), notes)


def loaded(
    folder: Path,
    kind: str,
    config: Any,
    fits: Callable[[str], bool],
    needed: Callable[[str], bool],
) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """The model of a class of `transformers` in float32, what that says of loading (with `stored`,
    the file's names), and sentences.

    `fits` and `needed` take names. A pooling head, of which no features are made, may be missing;
    ValueError names what else of the needed is, or has another shape.
    """
    import transformers

    # Reading the files first names a missing or broken shard; transformers would not.
    stored, notes = unwrapped(read_tensors(folder), fits, path=folder)
    check_plain(stored, config, folder)
    # Tensors of another shape are told, not raised for.
    model, loading = getattr(transformers, kind).from_pretrained(
        None,
        config=config,
        state_dict=dict(stored),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    missing = [
        key for key in sorted(loading["missing_keys"]) if needed(key) and ".head." not in f".{key}"
    ]
    wrong = [one for one in map(str, loading["mismatched_keys"]) if needed(one)]
    if missing or wrong:
        remedy = "Put the sizes into config.json that it has" if wrong else "Download it again"
        if missing == ["lm_head.weight"] and not wrong:
            remedy = (
                "Where the output layer is tied to the embeddings, set tie_word_embeddings to true "
                "in config.json"
            )
        raise ValueError(
            f"{folder} is no whole {kind}: missing {some(missing)}; mismatched {some(wrong)}; "
            f"unexpected {some(loading['unexpected_keys'])}. {remedy}"
        )
    return model, loading | {"stored": tuple(sorted(stored))}, notes


def encoder_config(stated: Any, folder: Path, **seen: Any) -> EncoderConfig:
    """The configuration of a tower out of `transformers`' own; its colours are the folder's, and
    `seen` are settings that the folder says elsewhere.

    Raises ValueError for a model_type that is not known, or a setting that would not be honoured.
    """
    if stated.model_type not in FAMILIES:
        raise ValueError(
            f"{folder} has a vision tower of model_type {stated.model_type!r}; known are "
            + ", ".join(FAMILIES)
        )
    family, _ = FAMILIES[stated.model_type]
    for name, value in TABLES["kept"].get(family, {}).items():
        if getattr(stated, name, value) != value:
            raise ValueError(
                f"{folder} is a {family} with {name} {getattr(stated, name)!r}, which is not read; "
                f"import one with {value!r}"
            )
    if getattr(stated, "num_channels", 3) != 3:
        raise ValueError(f"{folder} sees {stated.num_channels} channels; pictures have three")
    mean, std = _colours(folder, *TABLES["colours"][family])
    patch = _side(stated, "patch_size", folder)
    width, dinov2 = stated.hidden_size, family == "dinov2"
    # NaFlex takes any grid; its positions are a square one.
    grid = family == "siglip2"
    held = round(stated.num_patches**0.5) * patch if grid else _side(stated, "image_size", folder)
    gated = getattr(stated, "use_swiglu_ffn" if dinov2 else "use_gated_mlp", False)
    return EncoderConfig(
        family=family,
        image_size=held,
        patch_size=patch,
        hidden_size=width,
        num_layers=stated.num_hidden_layers,
        num_heads=stated.num_attention_heads,
        intermediate_size=int(width * stated.mlp_ratio) if dinov2 else stated.intermediate_size,
        position_size=held,
        num_registers=getattr(stated, "num_register_tokens", 0),
        ffn="swiglu" if gated else "mlp",
        hidden_act=stated.hidden_act,
        norm_eps=stated.layer_norm_eps,
        pixel_mean=mean,
        pixel_std=std,
        **seen,
    )


def _side(stated: Any, name: str, folder: Path) -> int:
    """The side of a square; where a configuration says it twice, once is put there, as not all
    classes take both. ValueError for another shape."""
    value = getattr(stated, name)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int) or side < 1:
        raise ValueError(f"{folder} has a tower with {name} {value}; only squares are read")
    setattr(stated, name, side)
    return side


def _colours(folder: Path, *usual: list[float]) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation, by channel, of values from 0 to 1, which a processor's own may
    not be: it scales bytes by `rescale_factor`, or leaves them, or does not normalise."""
    told, found = pictures(folder), []
    for name, one in zip(("image_mean", "image_std"), usual, strict=True):
        value = one if told.get(name) in (None, []) else told[name]
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        values = values * 3 if len(values) == 1 else values
        known = len(values) == 3 and all(isinstance(each, int | float) for each in values)
        if not known or (name == "image_std" and min(values) <= 0):
            raise ValueError(f"{folder}: its processor has {name} {value}; give three, std above 0")
        found.append(values)
    mean, std = found if told.get("do_normalize") is not False else [(0.0,) * 3, (1.0,) * 3]
    scale = 255.0
    if told.get("do_rescale") is not False:
        scale *= told.get("rescale_factor") or 1 / 255
    if abs(scale - 1) < 1e-6:
        return mean, std
    return tuple(one / scale for one in mean), tuple(one / scale for one in std)


def fitting(folder: Path, family: str = "siglip") -> Literal["letterbox", "square", "crop"]:
    """How a folder's own processor, else the usual one of a tower's family, makes a picture
    square."""
    values = pictures(folder)
    kind = values.get("image_processor_type") or values.get("feature_extractor_type") or family
    # These crop unless they are told not to.
    crops = values.get("do_center_crop")
    if crops is None:
        crops = kind.lower().startswith(("clip", "llava", "bit", "dinov2"))
    named: Literal["letterbox", "square", "crop"] = values.get(
        "resize", "letterbox" if values.get("do_pad") else "crop" if crops else "square"
    )
    return named


def other_sizes(folder: Path, side: int, resize: str) -> Iterator[str]:
    """Sentences where a folder's own processor makes other squares than `side` and `resize`, or
    where there is none."""
    values = pictures(folder)
    if not values:
        yield (
            "no preprocessor_config.json says how pictures become pixels; they do as is usual for "
            f"its tower ({resize})"
        )

    def told(name: str) -> int | None:
        size = values.get(name)
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        return size if isinstance(size, int) else None

    resized, cut = told("size"), told("crop_size") if resize == "crop" else None
    made = resized if cut is None else cut
    if made not in (None, side):
        yield f"its processor makes pictures of {made} x {made}; here they are {side} x {side}"
    elif cut is not None and resized not in (None, cut):
        yield (
            f"its processor resizes the shorter side to {resized} and cuts out {cut} x {cut}; here "
            "all of the shorter side is seen"
        )


def pictures(folder: Path) -> dict[str, Any]:
    """What a folder's processor files say of pictures, in a file of their own or as a part."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        found |= values.get("image_processor", values) if isinstance(values, dict) else {}
    return found
