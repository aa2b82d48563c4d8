"""Decode, letterbox or resize, normalise."""

import io
from typing import Literal

import numpy as np
from jaxtyping import Float32
from PIL import Image

# Larger pictures are refused before decoding: 64 million pixels take 192 MB as RGB.
MAX_PIXELS = 64_000_000
# So are longer ones: letterboxed to a square, 16,000 pixels take 768 MB.
MAX_SIDE = 16_000
# Letterbox borders: the middle grey that normalises to 0 (Prismatic's int(255 * 0.5)).
GREY = (127, 127, 127)


def decode(data: bytes, where: str) -> Image.Image:
    """An RGB picture; transparent pixels become white.

    16-bit greys keep their upper 8 bits. Raises ValueError that names `where` if the bytes are no
    whole picture, it is too large, or its numbers are not 8- or 16-bit colours.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"{width}x{height}: a side is longer than {MAX_SIDE:,} pixels")
        if picture.mode.startswith("I"):
            picture = _eight_bits(picture)
        if picture.mode == "F":
            raise ValueError("floating-point pixels have no fixed range")
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return picture.convert("RGB")
    except Exception as error:
        raise ValueError(
            f"{where}: the picture cannot be decoded ({error}); replace or remove this record"
        ) from None


def _eight_bits(picture: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit greys at 255, which turns nearly all of them white.
    grey = np.asarray(picture).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"greys from {grey.min()} to {grey.max()} are no 16-bit ones")
    return Image.fromarray((grey >> 8).astype(np.uint8))


def letterbox(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a grey square as wide as its longer side."""
    width, height = picture.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def to_pixels(
    picture: Image.Image, *, size: int, resize: Literal["letterbox", "square"]
) -> Float32[np.ndarray, "3 size size"]:
    """Pixels in -1 to 1, resized with a bicubic filter to `size` (letterboxed first if asked)."""
    if resize == "letterbox" and picture.width != picture.height:
        picture = letterbox(picture)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
