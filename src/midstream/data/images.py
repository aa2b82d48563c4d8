"""Decode, letterbox or resize, normalise."""

import io
from typing import Literal

import numpy as np
from jaxtyping import Float32
from PIL import Image

# Larger pictures are refused before decoding: 64 million pixels take 192 MB as RGB.
MAX_PIXELS = 64_000_000
# Letterbox borders: the middle grey that normalises to 0 (Prismatic's int(255 * 0.5)).
GREY = (127, 127, 127)


def decode(data: bytes, where: str) -> Image.Image:
    """An RGB picture; transparent pixels become white.

    Raises ValueError that names `where` if the bytes are no whole picture or it is too large.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return picture.convert("RGB")
    except Exception as error:
        raise ValueError(
            f"{where}: the picture cannot be decoded ({error}); replace or remove this record"
        ) from None


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
