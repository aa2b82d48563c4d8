"""What a frozen encoder makes of pictures: the same numbers whether stored or computed anew.

Features belong to the encoder's weights, its `EncoderConfig` and the picture's bytes, nothing else.
They go through batches of one shape and through the bytes of their stored form in either case, so
that on a CPU a stored feature equals a live one bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from midstream.config import AnyEncoderConfig, PretrainedEncoder
from midstream.data.images import decode_pixels
from midstream.data.sources import Source

# Pictures that are read, and with small towers or on a GPU looked at, together.
FILL_BATCH = 8
# A tower of so many patches fills a CPU with one picture.
_LARGE_TOWER = 256
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The largest code of an int8 feature; its scale is the patch's largest magnitude over this.
LARGEST_CODE = 127

Encode = Callable[[Float[Tensor, "images 3 size size"]], Float[Tensor, "images patches width"]]


def load_pixels(
    source: Source, example: int, config: AnyEncoderConfig
) -> Float32[np.ndarray, "3 s s"]:
    """The picture of an example as the encoder takes it."""
    data, where = source.image_bytes(example), source.describe(example)
    return decode_pixels(data, where, config.transform)


def picture_bytes(config: PretrainedEncoder) -> int:
    """Bytes of one picture's features in their stored form."""
    if config.feature_dtype == "int8":
        return config.num_patches * (config.hidden_size + 2)
    return config.num_patches * config.hidden_size * _DTYPES[config.feature_dtype].itemsize


def pack(
    features: Float32[Tensor, "images patches width"], config: PretrainedEncoder
) -> UInt8[Tensor, "images bytes"]:
    """The stored form, one row a picture, rounded to `feature_dtype`.

    float32, bfloat16: the numbers. int8: codes from -127 to 127, then one bfloat16 scale a patch.
    """
    if config.feature_dtype in _DTYPES:
        return _bytes(features.to(_DTYPES[config.feature_dtype]))
    scales = (features.abs().amax(-1, keepdim=True) / LARGEST_CODE).bfloat16()
    wide = scales.float()
    # A patch of zeros has scale 0. The scale is rounded, so that a code may come out at 127.25.
    codes = torch.where(wide > 0, features / wide, 0.0).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return torch.cat([_bytes(codes.to(torch.int8)), _bytes(scales)], dim=1)


def unpack(
    packed: UInt8[Tensor, "images bytes"], config: PretrainedEncoder
) -> Float32[Tensor, "images patches width"]:
    """The numbers of a stored form; every one is exact in float32."""
    shape = (len(packed), config.num_patches, config.hidden_size)
    if config.feature_dtype in _DTYPES:
        return _numbers(packed, _DTYPES[config.feature_dtype]).reshape(shape)
    num_codes = config.num_patches * config.hidden_size
    codes = _numbers(packed[:, :num_codes], torch.int8).reshape(shape)
    return codes * _numbers(packed[:, num_codes:], torch.bfloat16).reshape(*shape[:2], 1)


# Seen as one dimension, since torch views no other one as larger numbers where there is no picture.
def _bytes(numbers: Tensor) -> UInt8[Tensor, "images bytes"]:
    size = numbers.shape[1:].numel() * numbers.element_size()
    return numbers.reshape(-1).view(torch.uint8).reshape(len(numbers), size)


def _numbers(packed: UInt8[Tensor, "images bytes"], dtype: torch.dtype) -> Float32[Tensor, " n"]:
    return packed.reshape(-1).view(dtype).float()


def encode_fixed(
    encode: Encode, pixels: Float32[Tensor, "images 3 size size"], config: PretrainedEncoder
) -> Float32[Tensor, "images patches width"]:
    """Features as they are stored, without autograd, on the encoder's device.

    They do not depend on how many pictures are encoded together.
    """
    return unpack(pack(encode_raw(encode, pixels, config), config), config)


@torch.no_grad()
def encode_raw(
    encode: Encode, pixels: Float32[Tensor, "images 3 size size"], config: AnyEncoderConfig
) -> Float32[Tensor, "images patches width"]:
    """Features before rounding, in batches of one size, the last one padded.

    The shape of a batch decides the last bits of its results.
    """
    shape, size = (config.num_patches, config.hidden_size), encode_batch(config)
    if not len(pixels):
        return torch.zeros((0, *shape), device=pixels.device)
    found = []
    for low in range(0, len(pixels), size):
        part = pixels[low : low + size]
        padding = part.new_zeros((size - len(part), *part.shape[1:]))
        features = encode(torch.cat([part, padding]))
        if features.shape != (size, *shape):
            raise ValueError(
                f"the encoder gives features of shape {tuple(features.shape[1:])} a picture, its "
                f"configuration says {shape}; load the weights that belong to it"
            )
        found.append(features[: len(part)].float())
    return torch.cat(found)


@dataclass(frozen=True)
class LiveImages:
    """Pixels of a row's pictures, decoded where it is called (in a loader's worker)."""

    sources: Mapping[str, Source]
    names: tuple[str, ...]
    config: AnyEncoderConfig

    def __call__(self, images: np.ndarray) -> Float32[Tensor, "images 3 size size"]:
        """Pixels of (source number, example) pairs, in their order."""
        pixels = [
            load_pixels(self.sources[self.names[source]], example, self.config)
            for source, example in images.tolist()
        ]
        if len(pixels) == 1:
            return torch.from_numpy(pixels[0])[None]
        size = self.config.image_size
        return torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros((0, 3, size, size))


@dataclass(frozen=True)
class RoundingError:
    """What rounding to `dtype` changes, over the root mean square of the unrounded features.

    `rms_error` is the root mean square of the differences, `max_error` the largest of them.
    """

    dtype: str
    pictures: int
    rms_error: float
    max_error: float


class ErrorMeter:
    """Adds up the rounding errors of features as they come, in constant memory."""

    def __init__(self, config: PretrainedEncoder) -> None:
        self._configs = [
            config.model_copy(update={"feature_dtype": dtype}) for dtype in ("bfloat16", "int8")
        ]
        self.pictures, self._numbers, self._squares = 0, 0, 0.0
        self._errors = [(0.0, 0.0) for _ in self._configs]

    def add(self, features: Float32[Tensor, "images patches width"]) -> None:
        """Count unrounded features in."""
        self.pictures += len(features)
        self._numbers += features.numel()
        self._squares += float(features.double().square().sum())
        for at, config in enumerate(self._configs):
            wrong = (unpack(pack(features, config), config) - features).double().abs()
            squares, largest = self._errors[at]
            if len(wrong):
                largest = max(largest, float(wrong.max()))
            self._errors[at] = (squares + float(wrong.square().sum()), largest)

    def errors(self) -> tuple[RoundingError, ...]:
        """The error of each dtype so far; 0 where all features are 0."""
        rms = (self._squares / max(1, self._numbers)) ** 0.5
        unit = rms or 1.0
        return tuple(
            RoundingError(
                dtype=config.feature_dtype,
                pictures=self.pictures,
                rms_error=(squares / max(1, self._numbers)) ** 0.5 / unit,
                max_error=largest / unit,
            )
            for config, (squares, largest) in zip(self._configs, self._errors, strict=True)
        )


def error_of(
    encode: Encode, source: Source, config: PretrainedEncoder, sample: Sequence[int]
) -> tuple[RoundingError, ...]:
    """The error of bfloat16 and of int8 features against float32, on the pictures of `sample`."""
    meter = ErrorMeter(config)
    for pixels in pixel_batches(source, sample, config):
        meter.add(encode_raw(encode, pixels, config))
    return meter.errors()


def encode_batch(config: AnyEncoderConfig) -> int:
    """Pictures that an encoder is given at once on this machine."""
    alone = config.num_patches >= _LARGE_TOWER and not torch.cuda.is_available()
    return 1 if alone else FILL_BATCH


def pixel_batches(
    source: Source, examples: Sequence[int], config: PretrainedEncoder
) -> Iterator[Float32[Tensor, "images 3 size size"]]:
    """Pictures of these examples, up to `FILL_BATCH` at a time."""
    for low in range(0, len(examples), FILL_BATCH):
        part = examples[low : low + FILL_BATCH]
        pixels = [load_pixels(source, int(example), config) for example in part]
        yield torch.from_numpy(np.stack(pixels))
