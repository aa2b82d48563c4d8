"""Pictures: what is decoded, letterboxed and refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from midstream.data.images import GREY, MAX_PIXELS, MAX_SIDE, decode, letterbox, to_pixels

SIZES = st.integers(1, 40)


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@given(width=SIZES, height=SIZES, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_letterbox_keeps_every_pixel_in_the_middle_of_a_grey_square(
    width: int, height: int, seed: int
) -> None:
    pixels = noise(width, height, seed)
    square = np.array(letterbox(Image.fromarray(pixels)))
    side = max(width, height)
    assert square.shape == (side, side, 3)
    left, top = (side - width) // 2, (side - height) // 2
    assert np.array_equal(square[top : top + height, left : left + width], pixels)
    # The borders differ by at most one pixel, and everything else is grey.
    assert 0 <= (side - width - left) - left <= 1
    assert 0 <= (side - height - top) - top <= 1
    border = np.ones((side, side), bool)
    border[top : top + height, left : left + width] = False
    assert (square[border] == GREY).all()


@given(width=SIZES, height=SIZES, size=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_pixels_are_square_float32_from_minus_one_to_one(
    width: int, height: int, size: int, seed: int
) -> None:
    picture = Image.fromarray(noise(width, height, seed))
    for resize in ("letterbox", "square"):
        pixels = to_pixels(picture, size=size, resize=resize)
        assert pixels.shape == (3, size, size)
        assert pixels.dtype == np.float32
        assert pixels.min() >= -1
        assert pixels.max() <= 1


def test_a_picture_of_the_right_size_is_only_scaled() -> None:
    raw = noise(16, 16)
    expected = raw.transpose(2, 0, 1) / 127.5 - 1
    for resize in ("letterbox", "square"):
        found = to_pixels(Image.fromarray(raw), size=16, resize=resize)
        assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_letterbox_has_borders_near_zero_and_square_has_none(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (255, 0, 0))
    boxed = to_pixels(picture, size=20, resize="letterbox")
    stretched = to_pixels(picture, size=20, resize="square")
    boxed = boxed if size[0] > size[1] else boxed.transpose(0, 2, 1)
    assert np.abs(boxed[:, :3]).max() < 0.01
    assert np.abs(boxed[:, -3:]).max() < 0.01
    assert np.allclose(boxed[:, 8:12], np.array([1.0, -1, -1])[:, None, None], atol=0.02)
    assert np.allclose(stretched, np.array([1.0, -1, -1])[:, None, None])


@given(seed=st.integers(0, 99), mode=st.sampled_from(["RGBA", "LA"]))
@settings(max_examples=30, deadline=None)
def test_transparent_pixels_are_laid_on_white(seed: int, mode: str) -> None:
    raw = noise(7, 5, seed, channels=len(mode))
    found = np.asarray(decode(saved(Image.fromarray(raw, mode)), "x")).astype(float)
    color, alpha = raw[..., :-1].astype(float), raw[..., -1:] / 255
    assert np.abs(found - (color * alpha + 255 * (1 - alpha))).max() <= 1


def test_a_transparent_palette_entry_becomes_white_and_others_keep_their_color() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    plain = np.asarray(decode(saved(picture), "x"))
    assert plain.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    holed = np.asarray(decode(saved(picture, transparency=0), "x"))
    assert holed.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_a_cmyk_jpeg_has_its_colors() -> None:
    for cmyk, rgb in {(0, 255, 255, 0): (255, 0, 0), (0, 0, 0, 255): (0, 0, 0)}.items():
        data = saved(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95)
        assert np.abs(np.asarray(decode(data, "x")).astype(int) - rgb).max() <= 6


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_a_16_bit_grey_picture_keeps_its_upper_bits(file_format: str) -> None:
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    found = np.asarray(decode(saved(Image.fromarray(grey), file_format), "x"))
    assert np.array_equal(found, np.repeat((grey >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_grey_or_two_colored_picture_becomes_rgb(mode: str) -> None:
    raw = np.where(noise(9, 6, channels=1)[..., 0] > 127, 255, 0).astype(np.uint8)
    found = np.asarray(decode(saved(Image.fromarray(raw).convert(mode)), "x"))
    assert np.array_equal(found, np.repeat(raw[..., None], 3, axis=2))


@given(kept=st.floats(0, 0.98), file_format=st.sampled_from(["JPEG", "PNG", "WEBP"]))
@settings(max_examples=40, deadline=None)
def test_a_cut_picture_is_refused_by_name(kept: float, file_format: str) -> None:
    whole = saved(Image.fromarray(noise(48, 40)), file_format)
    with pytest.raises(ValueError, match=r"^shard-3\.tar, sample 7: the picture cannot be decoded"):
        decode(whole[: int(kept * len(whole))], "shard-3.tar, sample 7")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "cannot identify"),
        (png_of_size(9000, 9000), f"9000x9000 pixels are more than {MAX_PIXELS:,}"),
        (png_of_size(60_000, 60_000), "pixels"),
        (png_of_size(3, MAX_SIDE + 1), f"3x{MAX_SIDE + 1}: a side is longer than {MAX_SIDE:,}"),
        (png_of_size(MAX_SIDE + 1, 3), f"{MAX_SIDE + 1}x3: a side is longer than {MAX_SIDE:,}"),
        (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
        (saved(Image.new("I", (4, 4), 70_000), "TIFF"), "greys from 70000 to 70000"),
    ],
    ids=["empty", "html", "large", "bomb", "tall", "wide", "float", "32 bit"],
)
def test_what_is_no_usable_picture_is_refused_with_record_and_reason(
    data: bytes, reason: str
) -> None:
    with pytest.raises(ValueError, match=r"^a\.jpg: the picture cannot be decoded") as caught:
        decode(data, "a.jpg")
    assert reason in str(caught.value)
    assert "replace or remove this record" in str(caught.value)
