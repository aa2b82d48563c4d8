"""Vision encoders behind one interface: pixels -> [images, patches, width], patches known up front.

A tower is `transformers`' own, cut down to what its features need: no block above `feature_layer`,
no pooling head, no last norm unless `final_norm` asks for it: each parameter has a gradient.
"""

import math
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from midstream.config import AnyEncoderConfig, EncoderConfig, FusedEncoder, PatchProjection
from midstream.config.model import at_size
from midstream.model.weights import Initialiser, Linear, fill, read_tensors

# Of a whole tower, what no features are made of: the pooling head, and what masked training used.
_UNUSED = re.compile(r"(head|pooler)\.|embeddings\.mask_token$")
_NORMS = ("post_layernorm.", "layernorm.", "norm.")
_BLOCK = re.compile(r"(?:encoder|model)\.layers?\.(\d+)\.")


def num_blocks(config: EncoderConfig) -> int:
    """Blocks up to the features."""
    return config.num_layers + 1 + config.feature_layer


def build_encoder(config: AnyEncoderConfig) -> "VisionEncoder":
    """The encoder of a configuration, unset (NaN) until initialised or loaded."""
    match config:
        case EncoderConfig():
            return Tower(config)
        case FusedEncoder():
            return FusedTowers(config)
        case PatchProjection():
            return PatchMap(config)


class VisionEncoder(nn.Module):
    """What all encoders share: `num_patches` features an image, each `width` wide."""

    def __init__(self, config: AnyEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.num_patches = config.num_patches
        self.width = config.hidden_size
        self.image_size = config.image_size

    def forward(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images patches hidden"]:
        """Patch features in reading order; autograd is the caller's choice.

        Raises ValueError for pictures that are not `image_size` in both directions.
        """
        if pixel_values.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures are {tuple(pixel_values.shape[2:])}, the encoder takes "
                f"{self.image_size} x {self.image_size}; resize them"
            )
        if not len(pixel_values):
            # transformers' attention takes no empty batch: look at a blank picture and drop it.
            return self._features(pixel_values.new_zeros((1, *pixel_values.shape[1:])))[:0]
        return self._features(pixel_values)

    def _features(self, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError

    def initialisers(self) -> dict[str, Initialiser]:
        """See `initialisers_of`."""
        return initialisers_of(self)


class Tower(VisionEncoder):
    """SigLIP, SigLIP 2, CLIP, DINOv2 or DINOv3; `tower` is the trimmed module of `transformers`.

    Class token and registers stand before the patches and are no part of the features.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.settings = config
        # transformers draws weights from the global generator, which stays untouched here.
        with torch.random.fork_rng(devices=[]):
            tower = _library(config, "Model")(library_config(config))
        norm = {"dinov2": "layernorm", "dinov3": "norm"}.get(config.family, "post_layernorm")
        self.norm_name = norm
        if not config.final_norm:
            setattr(tower, norm, nn.Identity())
        if getattr(tower.embeddings, "mask_token", None) is not None:
            tower.embeddings.mask_token = None
        self.tower = unset(tower)

    def _features(self, pixel_values: Tensor) -> Tensor:
        tower, config = cast(Any, self.tower), self.settings
        known: dict[str, Any] = {}
        if config.family == "dinov2":
            hidden, blocks = tower.embeddings(pixel_values), tower.encoder.layer
        elif config.family == "dinov3":
            hidden, blocks = tower.embeddings(pixel_values), tower.model.layer
            known = {"position_embeddings": tower.rope_embeddings(pixel_values)}
        else:
            blocks, known = tower.encoder.layers, {"attention_mask": None}
            if config.family == "siglip2":
                # Patches flattened row, column, channel; positions once, also for no picture.
                patches = _patches(pixel_values, config.patch_size, last="channel")
                embedded = tower.embeddings.patch_embedding(patches)
                hidden = embedded + naflex_positions(tower.embeddings, config)
            else:
                # CLIP's leaves positions of the right number as they are.
                resized = config.position_patches != config.num_patches or config.family == "clip"
                hidden = tower.embeddings(pixel_values, interpolate_pos_encoding=resized)
            if config.family == "clip":
                hidden = tower.pre_layrnorm(hidden)
        for block in blocks:
            hidden = block(hidden, **known)
        return cast(Tensor, getattr(tower, self.norm_name)(hidden)[:, config.num_prefix :])


class FusedTowers(VisionEncoder):
    """Several towers' features of one picture, side by side along the width.

    Pixels are normalised as the first tower's; the others are given theirs.
    """

    def __init__(self, config: FusedEncoder) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList(Tower(tower) for tower in config.towers)

    def _features(self, pixel_values: Tensor) -> Tensor:
        first = cast(Tower, self.towers[0]).settings
        return torch.cat(
            [
                tower(_renormalised(pixel_values, first, cast(Tower, tower).settings))
                for tower in self.towers
            ],
            dim=-1,
        )


class PatchMap(VisionEncoder):
    """A linear map of raw patches (3 x patch x patch values each, channel by channel)."""

    def __init__(self, config: PatchProjection) -> None:
        super().__init__(config)
        self.patch_size = config.patch_size
        self.projection = Linear(3 * config.patch_size**2, config.hidden_size)

    def _features(self, pixel_values: Tensor) -> Tensor:
        return cast(Tensor, self.projection(_patches(pixel_values, self.patch_size, last="column")))

    def initialisers(self) -> dict[str, Initialiser]:
        """Uniform within fan_in^-1/2, as torch's own linear layers start."""
        uniform = Initialiser("uniform", self.projection.in_features**-0.5)
        return {"projection.weight": uniform, "projection.bias": uniform}


def load_encoder(
    encoder: VisionEncoder, path: Path, held: AnyEncoderConfig | None = None
) -> tuple[str, ...]:
    """Fill an encoder from a file of its own names, or a tower from one of a whole tower; where
    `held`, whose weights they are, has positions of another size, they are interpolated once.

    Returns the names that were left out because no features are made of them (blocks above the
    feature layer, the pooling head, a norm that is not applied). Raises FileNotFoundError, or
    ValueError with every other name that does not fit.
    """
    if held is not None and _position_sizes(held) != _position_sizes(encoder.config):
        other = build_encoder(held)
        unused = load_encoder(other, path)
        tensors = resized(other.state_dict(), held, encoder.config, path=path)
        fill(encoder, tensors, path=path)
        return unused
    tensors = read_tensors(path)
    own = tuple(f"{name}." for name, _ in encoder.named_children())
    if not isinstance(encoder, Tower) or any(name.startswith(own) for name in tensors):
        fill(encoder, tensors, path=path)
        return ()
    left = {name for name in tensors if _is_unused(name, encoder)}
    kept = {f"tower.{name}": value for name, value in tensors.items() if name not in left}
    fill(encoder, kept, path=path)
    return tuple(sorted(left))


def load_towers(encoder: VisionEncoder, paths: Sequence[Path]) -> tuple[str, ...]:
    """Fill each tower of a fused encoder from its own file; returns what was left out."""
    if not isinstance(encoder, FusedTowers) or len(paths) != len(encoder.towers):
        raise ValueError(f"{len(paths)} files were given to a {type(encoder).__name__}")
    unused = []
    for number, (tower, path) in enumerate(zip(encoder.towers, paths, strict=True)):
        left = load_encoder(cast(VisionEncoder, tower), path)
        unused += [f"towers.{number}.{name}" for name in left]
    return tuple(unused)


@torch.no_grad()
def resized(
    tensors: Mapping[str, Tensor], held: AnyEncoderConfig, wanted: AnyEncoderConfig, *, path: Path
) -> dict[str, Tensor]:
    """An encoder's tensors by its own names, its positions for the pictures of `wanted`.

    They are interpolated once, as `held` on such pictures does it in every pass; where both hold
    positions of one size, they stay as they are. Raises ValueError as `fill` does, of `path`.
    """
    if _position_sizes(held) == _position_sizes(wanted):
        return dict(tensors)
    encoder = build_encoder(at_size(held, wanted.image_size, owned=False))
    fill(encoder, tensors, path=path)
    state = dict(tensors)
    for name, tower in encoder.named_modules():
        if isinstance(tower, Tower) and tower.settings.family != "dinov3":
            is_dinov2 = tower.settings.family == "dinov2"
            last = "position_embeddings" if is_dinov2 else "position_embedding.weight"
            own = f"{name}.".lstrip(".") + f"tower.embeddings.{last}"
            state[own] = positions(tower).view(-1, tower.width)[None if is_dinov2 else slice(None)]
    return state


def _position_sizes(config: AnyEncoderConfig) -> list[int]:
    towers = config.towers if isinstance(config, FusedEncoder) else (config,)
    return [tower.position_patches for tower in towers if isinstance(tower, EncoderConfig)]


def _is_unused(name: str, encoder: Tower) -> bool:
    block = _BLOCK.match(name)
    above = block is not None and int(block.group(1)) >= num_blocks(encoder.settings)
    norm = not encoder.settings.final_norm and name.startswith(_NORMS)
    return above or norm or _UNUSED.match(name) is not None


def library_config(config: EncoderConfig) -> Any:
    """The configuration of `transformers` of a tower that ends with its features."""
    settings: dict[str, Any] = {
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": num_blocks(config),
        "num_attention_heads": config.num_heads,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.norm_eps,
        "attn_implementation": "sdpa",
        "image_size": config.position_size or config.image_size,
        "intermediate_size": config.intermediate_size,
    }
    match config.family:
        case "siglip" | "siglip2":
            settings["vision_use_head"] = False
            if config.family == "siglip2":
                settings["num_patches"] = config.position_patches
                del settings["image_size"]
        case "dinov2":
            ratio, rest = divmod(settings.pop("intermediate_size"), config.hidden_size)
            if rest:
                raise ValueError(
                    f"DINOv2's intermediate_size {config.intermediate_size} must be a multiple of "
                    f"its hidden_size {config.hidden_size}"
                )
            settings |= {"mlp_ratio": ratio, "use_swiglu_ffn": config.ffn == "swiglu"}
            settings["use_mask_token"] = False
            if config.num_registers:
                settings["num_register_tokens"] = config.num_registers
        case "dinov3":
            settings |= {
                "image_size": config.image_size,
                "use_gated_mlp": config.ffn == "swiglu",
                "num_register_tokens": config.num_registers,
                # While training it would draw scales of positions from the global generator.
                "pos_embed_rescale": None,
            }
    return _library(config, "Config")(**settings)


def _library(config: EncoderConfig, what: str) -> Any:
    """The family's class of `transformers`, which takes seconds that text-only work need not wait
    for."""
    names = {"dinov2": "Dinov2", "dinov3": "DINOv3ViT", "clip": "CLIPVision"}
    name = names.get(config.family, f"{config.family.capitalize()}Vision")
    if config.family == "dinov2" and config.num_registers:
        name = "Dinov2WithRegisters"
    return getattr(import_module("transformers"), f"{name}{what}")


@torch.no_grad()
def positions(tower: Tower) -> Float[Tensor, "1 positions width"]:
    """What a tower adds to the patches of its pictures, and to a class token before them.

    As its family interpolates: SigLIP, CLIP and DINOv2 bicubic (DINOv2 with registers antialiased),
    SigLIP 2 bilinear and antialiased, corners not aligned. DINOv3 adds nothing.
    """
    embeddings, config = cast(Any, tower.tower).embeddings, tower.settings
    if config.family == "siglip2":
        return naflex_positions(embeddings, config).clone()
    length = config.num_patches + (1 if config.num_prefix else 0)
    like = torch.zeros(1, length, config.hidden_size)
    found = embeddings.interpolate_pos_encoding(like, config.image_size, config.image_size)
    return cast(Tensor, found.clone())


def naflex_positions(embeddings: Any, config: EncoderConfig) -> Tensor:
    """What SigLIP 2's embeddings add to the patches of a square picture, [1, patches, width]."""
    side = config.image_size // config.patch_size
    grid = embeddings.position_embedding.weight.unflatten(
        0, (embeddings.position_embedding_size, -1)
    )
    shape = torch.tensor([[side, side]])
    return cast(
        Tensor, embeddings.resize_positional_embeddings(grid, shape, max_length=side * side)
    )


def _patches(pixel_values: Tensor, size: int, *, last: str) -> Float[Tensor, "images patches _"]:
    """Square patches in reading order, what does not fill a patch cut off at right and bottom.

    Their values run row by row, with the channel first (`last` = column) or last (channel).
    """
    images, channels, height, width = pixel_values.shape
    rows, columns = height // size, width // size
    whole = pixel_values[:, :, : rows * size, : columns * size]
    cut = whole.reshape(images, channels, rows, size, columns, size)
    order = (0, 2, 4, 1, 3, 5) if last == "column" else (0, 2, 4, 3, 5, 1)
    return cut.permute(order).reshape(images, rows * columns, channels * size * size)


def _renormalised(pixels: Tensor, given: EncoderConfig, wanted: EncoderConfig) -> Tensor:
    """Pixels under another tower's mean and standard deviation."""
    if (given.pixel_mean, given.pixel_std) == (wanted.pixel_mean, wanted.pixel_std):
        return pixels

    def channels(values: tuple[float, float, float]) -> Tensor:
        return pixels.new_tensor(values)[:, None, None]

    plain = pixels * channels(given.pixel_std) + channels(given.pixel_mean)
    return (plain - channels(wanted.pixel_mean)) / channels(wanted.pixel_std)


@torch.no_grad()
def unset(module: nn.Module) -> nn.Module:
    """Mark all parameters as neither initialised nor loaded, so that forgetting shows."""
    for parameter in module.parameters():
        parameter.fill_(float("nan"))
    return module.eval()


def initialisers_of(module: nn.Module) -> dict[str, Initialiser]:
    """By parameter name: norm gains and layer scales (DINOv2's) 1; biases 0; all else (matrices,
    patch embeddings, positions, class and register tokens) normal with sigma = fan_in^-1/2, cut at
    three sigma, where fan_in is the product of all axes but the first, the last axis for tokens and
    DINOv2's positions.
    """

    def of(name: str, parameter: Tensor) -> Initialiser:
        if parameter.ndim == 1:
            return Initialiser("constant", 0.0 if name.endswith("bias") else 1.0)
        axes = parameter.shape[-1:] if parameter.ndim == 3 else parameter.shape[1:]
        return Initialiser("truncated_normal", math.prod(axes) ** -0.5)

    return {name: of(name, parameter) for name, parameter in module.named_parameters()}
