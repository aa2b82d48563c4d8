"""Pictures to pixels, and pixels to a frozen encoder's features, stored or computed anew alike.

Neither depends on installed packages, threads or other pictures.
"""

import io
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Num, UInt8
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError, features
from torch import Tensor
from torch.nn.functional import interpolate

from midstream.config import AnyEncoderConfig, ImageTransform, PretrainedEncoder
from midstream.config.model import FILL_BATCH, LARGE_TOWER
from midstream.data.sources import Source, Which

# Both must be libjpeg-turbo to make the same bytes of a JPEG.
try:
    import simplejpeg
except ImportError:
    simplejpeg = None
if not features.check("libjpeg_turbo"):
    simplejpeg = None

# Larger pictures are refused before decoding: 64 million pixels take 192 MB as RGB.
MAX_PIXELS = 64_000_000
# So are longer ones: one row of 16,000 pixels is letterboxed within 20 MB at 384 pixels.
MAX_SIDE = 16_000
# Other formats are refused: Pillow hands some of them to programs (EPS to Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
# Colour profiles and notes of whole workflows have more than Pillow's 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# EXIF orientations and what undoes them.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A strip longer than this many widths is cropped to its middle before it is resized.
MAX_STRIP = 8


def decode(data: bytes, where: str) -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, transparent pixels white.

    Of an animation it is the first frame. 16-bit greys keep their upper 8 bits, CMYK becomes RGB
    without a colour profile, EXIF data that cannot be read turns nothing. Raises ValueError that
    names `where` if the bytes are no whole picture in one of `FORMATS`, it is too large (checked
    before decoding), or its numbers are not 8- or 16-bit colours.
    """
    with naming_picture(lambda: where):
        return upright_rgb(open_picture(data))


def decode_pixels(
    data: bytes, where: str, transform: ImageTransform
) -> Float32[np.ndarray, "3 size size"]:
    """What `decode` gives fitted to a square, then (value / 255 - mean) / std by channel.

    letterbox: int((longer - shorter) / 2) pixels of the colour int(255 * mean) on both sides, then
    the shorter side is resized to `size` and the middle is cut out; the crop takes something only
    where padding ends a pixel from square (an odd difference) and the picture is enlarged. crop:
    the same without padding. square: both sides are resized, whatever the shape. The filter is
    torch's antialiased bicubic on bytes.

    Source: Prismatic's `image_processing` over torchvision's Resize and CenterCrop, which Pillow
    computes. Over 800 photographs letterboxed to 384 pixels, half of them on their sides: no byte
    differs by more than 2 (68 dB at least) in wide pictures; in tall ones, which are resized in
    the other order, by 19 in the worst photograph (53 dB at least, median 56). Another difference:
    `crop` first takes the middle of pictures longer than `MAX_STRIP` widths, which moves them by
    half a pixel at most. Raises ValueError as `decode` does.
    """
    return normalised(_raster(data, lambda: where, transform), transform)


def _raster(
    data: bytes, where: Callable[[], str], transform: ImageTransform
) -> UInt8[np.ndarray, "size size 3"]:
    with naming_picture(where):
        picture = open_picture(data)
        raster = _decode_jpeg(data, picture)
        if raster is None:
            raster = np.array(upright_rgb(picture))
    return _fitted(raster, transform)


@contextmanager
def naming_picture(where: Callable[[], str]) -> Iterator[None]:
    """Whatever goes wrong inside is a ValueError that names the picture, but for memory."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{where()}: the picture cannot be decoded ({error}); replace or remove this record"
        ) from None


def open_picture(data: bytes) -> Image.Image:
    """The picture's header, checked; no pixel is decoded."""
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        begins = f"cannot identify what begins with {data[:16]!r}"
        raise ValueError(f"{begins} as one of {', '.join(FORMATS)}") from None
    if picture.format not in FORMATS:
        raise ValueError(f"{picture.format} is none of {', '.join(FORMATS)}")
    return within_limits(picture)


def within_limits(picture: Image.Image) -> Image.Image:
    """The picture itself, where its size is one that is decoded."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width}x{height}: a side is longer than {MAX_SIDE:,} pixels")
    if min(width, height) < 1:
        raise ValueError(f"{width}x{height} pixels are none")
    return picture


def _decode_jpeg(data: bytes, picture: Image.Image) -> UInt8[np.ndarray, "height width 3"] | None:
    """What Pillow makes of an upright colour or grey JPEG, or None where Pillow must tell."""
    upright = picture.format in ("JPEG", "MPO") and _turn(picture) is None
    if not upright or picture.mode not in ("RGB", "L"):
        return None
    raster = jpeg_raster(data, "RGB")
    whole = raster is not None and raster.shape == (picture.height, picture.width, 3)
    return raster if whole else None


def jpeg_raster(data: bytes, colors: str, **scaling: int) -> np.ndarray | None:
    """What libjpeg-turbo makes of a JPEG; None without it, and of a damaged one, of which Pillow
    refuses some and repairs others."""
    if simplejpeg is None:
        return None
    how = {"fastdct": False, "fastupsample": False, "strict": True}
    try:
        raster: np.ndarray = simplejpeg.decode_jpeg(data, colors, **how, **scaling)
    except ValueError:
        return None
    return raster


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The picture decoded as `decode` says; ValueError for floating-point pixels."""
    # TIFF turns itself while it loads, and PNG may hold its EXIF data behind the pixels.
    picture.load()
    turn = _turn(picture)
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (KeyError, SyntaxError, TypeError, ValueError, struct.error):
        # Viewers show a picture whose EXIF data is broken as it is stored.
        return None


def _eight_bits(picture: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit greys at 255, which turns nearly all of them white.
    grey = np.asarray(picture).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"greys from {grey.min()} to {grey.max()} are no 16-bit ones")
    transparent = picture.info.get("transparency")
    return Image.fromarray(np.where(grey == transparent, 255, grey >> 8).astype(np.uint8))


def _fitted(
    raster: UInt8[np.ndarray, "height width 3"], transform: ImageTransform
) -> UInt8[np.ndarray, "size size 3"]:
    size, axis = transform.size, int(raster.shape[1] > raster.shape[0])
    longer, shorter = raster.shape[axis], raster.shape[1 - axis]
    if transform.resize == "square":
        return _resized(raster, size, size)
    if transform.resize == "crop" and longer > MAX_STRIP * shorter:
        longer = MAX_STRIP * shorter + (longer - MAX_STRIP * shorter) % 2
        raster = _middle(raster, axis, longer)
    padding = (longer - shorter) // 2 if transform.resize == "letterbox" else 0
    length = size * longer // (shorter + 2 * padding)
    # The longer side goes first where the other one is padded: padding is resized only once.
    across = shorter if padding else size
    raster = _resized(raster, *((across, length) if axis else (length, across)))
    raster = _middle(raster, axis, size)
    if not padding:
        return raster
    return _resized(_padded(raster, 1 - axis, padding, transform), size, size)


def _resized(
    raster: UInt8[np.ndarray, "_ _ 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    # Channels last and one byte each: torch resizes this layout without a copy.
    image = torch.from_numpy(raster)[None].permute(0, 3, 1, 2)
    image = interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    found: np.ndarray = image[0].permute(1, 2, 0).numpy()
    return found


def _middle(raster: np.ndarray, axis: int, length: int) -> np.ndarray:
    # `round` takes halves to even numbers, as torchvision's CenterCrop does.
    start = round((raster.shape[axis] - length) / 2)
    return raster[start : start + length] if axis == 0 else raster[:, start : start + length]


def _padded(raster: np.ndarray, axis: int, padding: int, transform: ImageTransform) -> np.ndarray:
    height, width = raster.shape[:2]
    rows, columns = (padding, 0) if axis == 0 else (0, padding)
    row = [int(255 * mean) for mean in transform.mean] * (width + 2 * columns)
    # Rows are copied whole: three bytes at a time take seventy times as long.
    canvas = np.empty((height + 2 * rows, len(row)), dtype=np.uint8)
    canvas[:] = np.array(row, dtype=np.uint8)
    canvas = canvas.reshape(len(canvas), -1, 3)
    canvas[rows : rows + height, columns : columns + width] = raster
    return canvas


def normalised(
    raster: UInt8[np.ndarray, "*images size size 3"], transform: ImageTransform
) -> Float32[np.ndarray, "*images 3 size size"]:
    """(value / 255 - mean) / std by channel; of one picture or of several, to the same bits."""
    pixels = np.ascontiguousarray(np.moveaxis(raster, -1, -3), dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(transform.mean, transform.std, strict=True)):
        plane = pixels[..., channel, :, :]
        plane -= np.float32(255 * mean)
        plane /= np.float32(255 * std)
    return pixels


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The largest code of an int8 feature; its scale is the patch's largest magnitude over this.
LARGEST_CODE = 127

Encode = Callable[[Float[Tensor, "images 3 size size"]], Float[Tensor, "images patches width"]]


def load_pixels(
    source: Source, example: int, config: AnyEncoderConfig, picture: int = 0
) -> Float32[np.ndarray, "3 s s"]:
    """A picture of an example as the encoder takes it."""
    return normalised(load_raster(source, example, config, picture), config.transform)


def load_raster(
    source: Source, example: int, config: AnyEncoderConfig, picture: int = 0
) -> UInt8[np.ndarray, "s s 3"]:
    """The same before `normalised`."""
    # Its name stands behind those of all examples before it: it is looked up where it is needed.
    data = source.image_bytes(example, picture)
    return _raster(data, lambda: source.describe(example), config.transform)


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
) -> Float[Tensor, "images patches width"]:
    """The numbers of a stored form, bfloat16 where they are stored so, else float32."""
    shape = (len(packed), config.num_patches, config.hidden_size)
    if config.feature_dtype in _DTYPES:
        return _numbers(packed, _DTYPES[config.feature_dtype]).reshape(shape)
    num_codes = config.num_patches * config.hidden_size
    codes = _numbers(packed[:, :num_codes], torch.int8).float().reshape(shape)
    return codes * _numbers(packed[:, num_codes:], torch.bfloat16).reshape(*shape[:2], 1)


# Seen as one dimension, since torch views no other one as larger numbers where there is no picture.
def _bytes(numbers: Tensor) -> UInt8[Tensor, "images bytes"]:
    size = numbers.shape[1:].numel() * numbers.element_size()
    return numbers.reshape(-1).view(torch.uint8).reshape(len(numbers), size)


def _numbers(packed: UInt8[Tensor, "images bytes"], dtype: torch.dtype) -> Num[Tensor, " n"]:
    return packed.reshape(-1).view(dtype)


def encode_fixed(
    encode: Encode, pixels: Float32[Tensor, "images 3 size size"], config: PretrainedEncoder
) -> Float32[Tensor, "images patches width"]:
    """Features as they are stored, without autograd, on the encoder's device.

    They do not depend on how many pictures are encoded together.
    """
    return unpack(pack(encode_raw(encode, pixels, config), config), config).float()


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
        """Pixels of the pictures that `Row.images` names, in their order."""
        pixels = [
            load_pixels(self.sources[self.names[source]], example, self.config, picture)
            for source, example, picture in images.tolist()
        ]
        if len(pixels) == 1:
            return torch.from_numpy(pixels[0])[None]
        size = self.config.image_size
        return torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros((0, 3, size, size))


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
            self._errors[at] = (
                squares + float(wrong.square().sum()),
                max(largest, wrong.max().item()),
            )

    def errors(self) -> dict[str, dict[str, Any]]:
        """What rounding to each dtype changes: `rms_error`, root mean square of the changes, and
        `max_error`, the largest, both over the root mean square of the unrounded features."""
        number = max(1, self._numbers)
        unit = (self._squares / number) ** 0.5 or 1.0
        return {
            config.feature_dtype: {
                "dtype": config.feature_dtype,
                "pictures": self.pictures,
                "rms_error": (squares / number) ** 0.5 / unit,
                "max_error": largest / unit,
            }
            for config, (squares, largest) in zip(self._configs, self._errors, strict=True)
        }


def encode_batch(config: AnyEncoderConfig) -> int:
    """Pictures that an encoder is given at once on this machine."""
    alone = config.num_patches >= LARGE_TOWER and not torch.cuda.is_available()
    return 1 if alone else FILL_BATCH


def pixel_batches(
    source: Source, pictures: Sequence[Which], config: PretrainedEncoder, workers: int = 0
) -> Iterator[Float32[Tensor, "images 3 size size"]]:
    """Pictures of a source, up to `FILL_BATCH` at a time, decoded ahead by so many threads.

    Without threads each is decoded when it is its turn. The pixels are the same.
    """
    batches = [pictures[low : low + FILL_BATCH] for low in range(0, len(pictures), FILL_BATCH)]
    if not workers:
        for part in batches:
            pixels = [load_pixels(source, one, config, picture) for one, picture in part]
            yield torch.from_numpy(np.stack(pixels))
        return

    def decoded(data: bytes, example: int) -> np.ndarray:
        raster = _raster(data, lambda: source.describe(example), config.transform)
        return normalised(raster, config.transform)

    ahead = deque[list[Future[np.ndarray]]]()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for part in batches:
                # A source's files are read by one thread; decoding leaves Python's lock to others.
                read = [(source.image_bytes(*one), one[0]) for one in part]
                ahead.append([threads.submit(decoded, *one) for one in read])
                if len(ahead) > 1 + workers // FILL_BATCH:
                    yield _stacked(ahead.popleft())
            while ahead:
                yield _stacked(ahead.popleft())
        finally:
            threads.shutdown(cancel_futures=True)


def _stacked(pixels: Sequence["Future[np.ndarray]"]) -> Float32[Tensor, "images 3 size size"]:
    return torch.from_numpy(np.stack([one.result() for one in pixels]))
