"""Pictures: what is decoded, how it becomes pixels, what is refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inputs import shared
from PIL import ExifTags, Image

from midstream.config import ImageTransform
from midstream.data import images
from midstream.data.images import MAX_PIXELS, MAX_SIDE, MAX_STRIP, decode, decode_pixels
from midstream.data.picture_checks import check_decodes

SIZES, RESIZES = st.integers(1, 40), ("letterbox", "square", "crop")
# CLIP's: no two channels are alike, so that a mix-up of channels shows.
CLIP: dict[str, Any] = {"mean": (0.481, 0.457, 0.408), "std": (0.268, 0.261, 0.275)}
LETTERBOX = ImageTransform(size=32)


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def to_pixels(picture: Image.Image, transform: ImageTransform) -> np.ndarray:
    """The pixels of a picture that went through a PNG."""
    return decode_pixels(saved(picture), "x", transform)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def by_pillow(picture: Image.Image, transform: ImageTransform) -> np.ndarray:
    """Bytes [height, width, 3] as Prismatic and torchvision have them."""
    size, bicubic = transform.size, Image.Resampling.BICUBIC
    if transform.resize == "square":
        return np.asarray(picture.resize((size, size), bicubic))
    if transform.resize == "letterbox":
        longer = max(picture.size)
        left, top = int((longer - picture.width) / 2), int((longer - picture.height) / 2)
        colour = tuple(int(mean * 255) for mean in transform.mean)
        padded = Image.new("RGB", (picture.width + 2 * left, picture.height + 2 * top), colour)
        padded.paste(picture, (left, top))
        picture = padded
    scale_to = (size, int(size * max(picture.size) / min(picture.size)))
    wide = picture.width > picture.height
    picture = picture.resize(scale_to[::-1] if wide else scale_to, bicubic)
    left, top = (round((side - size) / 2.0) for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def bytes_of(pixels: np.ndarray, transform: ImageTransform) -> np.ndarray:
    """What was normalised, [height, width, 3]."""
    found: np.ndarray = 255 * (pixels.transpose(1, 2, 0) * transform.std + transform.mean)
    return found


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((found - expected) ** 2), 1e-9)))


@given(
    width=SIZES,
    height=SIZES,
    size=st.integers(1, 50),
    resize=st.sampled_from(RESIZES),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_pictures_are_fitted_as_pillow_and_torchvision_do(
    width: int, height: int, size: int, resize: Any, seed: int
) -> None:
    transform = ImageTransform(size=size, resize=resize, **CLIP)
    # No value comes near 0 or 255, where the order of the two passes would matter.
    picture = Image.fromarray(96 + noise(width, height, seed) // 4)
    if resize == "crop" and max(width, height) > MAX_STRIP * min(width, height):
        return
    found = bytes_of(to_pixels(picture, transform), transform)
    assert np.abs(found - by_pillow(picture, transform)).max() <= 2.01


@given(width=st.integers(20, 90), height=st.integers(20, 90), resize=st.sampled_from(RESIZES))
@settings(max_examples=25, deadline=None)
def test_even_noise_is_within_40_decibels_of_pillow(width: int, height: int, resize: Any) -> None:
    transform = ImageTransform(size=48, resize=resize)
    picture = Image.fromarray(noise(width, height))
    found = bytes_of(to_pixels(picture, transform), transform)
    assert psnr(found, by_pillow(picture, transform)) >= 40


@given(size=st.integers(1, 30), resize=st.sampled_from(RESIZES), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_picture_of_the_right_size_is_only_normalised(size: int, resize: Any, seed: int) -> None:
    transform = ImageTransform(size=size, resize=resize, **CLIP)
    raw = noise(size, size, seed)
    found = to_pixels(Image.fromarray(raw), transform)
    expected = (raw / 255 - transform.mean) / transform.std
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.allclose(found, expected.transpose(2, 0, 1), atol=1e-6)


@given(longer=st.integers(8, 40), shorter=st.integers(1, 4), size=st.integers(16, 40))
@settings(max_examples=40, deadline=None)
def test_letterbox_borders_have_the_colour_of_the_mean(
    longer: int, shorter: int, size: int
) -> None:
    transform = ImageTransform(size=size, **CLIP)
    colour = [int(255 * mean) for mean in transform.mean]
    for sides in ((longer, shorter), (shorter, longer)):
        found = bytes_of(to_pixels(Image.new("RGB", sides, "red"), transform), transform)
        found = found if sides[0] > sides[1] else found.transpose(1, 0, 2)
        assert np.abs(found[[0, -1]] - colour).max() < 0.01
        # The picture itself reaches both ends of the other side.
        middle = found[size // 2]
        assert middle[0, 0] > colour[0] + 10
        assert np.abs(middle - middle[0]).max() < 0.01


@given(width=st.integers(1, 40), height=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_letterboxed_picture_lies_down_as_it_stands(width: int, height: int) -> None:
    picture = Image.fromarray(noise(width, height + width + 1))
    lying = to_pixels(picture.transpose(Image.Transpose.TRANSPOSE), LETTERBOX)
    assert np.array_equal(lying.transpose(0, 2, 1), to_pixels(picture, LETTERBOX))


@pytest.mark.parametrize("sides", [(MAX_SIDE, 1), (2, MAX_SIDE), (999, 100)])
def test_a_strip_is_cropped_to_its_middle(sides: tuple[int, int]) -> None:
    longer, shorter = max(sides), min(sides)
    strip = np.zeros((shorter, longer, 3), dtype=np.uint8)
    strip[..., 0] = 255
    # Wider than the crop by the reach of the filter.
    low, high = (longer - 7 * shorter) // 2, (longer + 7 * shorter) // 2
    strip[:, low:high] = (0, 255, 0)
    picture = Image.fromarray(strip if sides[0] > sides[1] else strip.transpose(1, 0, 2))
    transform = ImageTransform(size=64, resize="crop")
    assert (bytes_of(to_pixels(picture, transform), transform).round() == (0, 255, 0)).all()


@pytest.mark.parametrize("sides", [(MAX_SIDE, 1), (1, MAX_SIDE)])
@pytest.mark.parametrize("resize", RESIZES)
def test_the_longest_pictures_are_fitted_within_little_memory(
    sides: tuple[int, int], resize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0

    def watched(raster: np.ndarray, height: int, width: int) -> np.ndarray:
        nonlocal largest
        largest = max(largest, raster.nbytes, 3 * height * width)
        return resized(raster, height, width)

    resized = images._resized
    monkeypatch.setattr(images, "_resized", watched)
    to_pixels(Image.new("RGB", sides), ImageTransform(size=384, resize=resize))
    assert 3 * MAX_SIDE <= largest <= 20e6


def test_pixels_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    picture = Image.fromarray(noise(700, 500))
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for resize in RESIZES:
                found.append(to_pixels(picture, ImageTransform(size=384, resize=resize)).tobytes())
    finally:
        torch.set_num_threads(before)
    assert found[:3] == found[3:6] == found[6:]


def jpegs(raw: np.ndarray) -> list[bytes]:
    """One picture in every kind of JPEG that Pillow and simplejpeg write."""
    color, grey = Image.fromarray(raw), Image.fromarray(raw[..., 0])
    found = [
        saved(picture, "JPEG", quality=quality, progressive=progressive, **options)
        for quality in (5, 75, 100)
        for progressive in (False, True)
        for picture, options in [
            *((color, {"subsampling": sampling}) for sampling in (0, 1, 2)),
            (color, {"keep_rgb": True}),
            (color, {"restart_marker_blocks": 2}),
            (color, {"optimize": True}),
            (grey, {}),
        ]
    ]
    if images.simplejpeg is not None:
        for sampling in ("440", "411", "Gray"):
            found.append(images.simplejpeg.encode_jpeg(raw, colorsubsampling=sampling))
    return found


JPEGS = jpegs(np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8))


@pytest.mark.parametrize("sides", [(1, 1), (3, 2), (17, 31), (90, 75)])
def test_every_kind_of_jpeg_has_the_same_bits_with_and_without_simplejpeg(
    sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = pytest.importorskip("simplejpeg")
    calls = []
    spy = SimpleNamespace(
        decode_jpeg=lambda *args, **options: calls.append(1) or fast.decode_jpeg(*args, **options)
    )
    data = jpegs(noise(*sides))
    # As it comes out of the decoder: nothing is resized.
    transform = ImageTransform(size=max(sides), **CLIP)
    monkeypatch.setattr(images, "simplejpeg", spy)
    quick = [decode_pixels(one, "x", transform) for one in data]
    assert len(calls) == len(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    for one, found in zip(data, quick, strict=True):
        assert np.array_equal(found, decode_pixels(one, "x", transform))
        assert np.array_equal(found, to_pixels(decode(one, "x"), transform))


@given(
    whole=st.sampled_from(JPEGS),
    kept=st.one_of(st.just(1.0), st.floats(0.3, 1.0)),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    tail=st.binary(max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_jpeg_has_the_same_bits_or_error_with_and_without_simplejpeg(
    whole: bytes, kept: float, flips: list[tuple[float, int]], tail: bytes
) -> None:
    pytest.importorskip("simplejpeg")
    data = bytearray(whole)
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    damaged = bytes(data[: int(kept * len(data))]) + tail
    with pytest.MonkeyPatch.context() as patch:
        outcomes = []
        for module in (images.simplejpeg, None):
            patch.setattr(images, "simplejpeg", module)
            try:
                outcomes.append(decode_pixels(damaged, "x", LETTERBOX).tobytes())
            except ValueError as error:
                outcomes.append(str(error).encode())
    assert outcomes[0] == outcomes[1]


@given(
    file_format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    resize=st.sampled_from(RESIZES),
    sides=st.tuples(SIZES, SIZES),
)
@settings(max_examples=40, deadline=None)
def test_encoded_and_decoded_pictures_have_the_same_pixels(
    file_format: str, resize: Any, sides: tuple[int, int]
) -> None:
    data = saved(Image.fromarray(noise(*sides)), file_format)
    transform = ImageTransform(size=24, resize=resize, **CLIP)
    found = decode_pixels(data, "x", transform)
    assert np.array_equal(found, to_pixels(decode(data, "x"), transform))


UPRIGHT = {
    1: lambda raw: raw,
    2: lambda raw: raw[:, ::-1],
    3: lambda raw: raw[::-1, ::-1],
    4: lambda raw: raw[::-1],
    5: lambda raw: raw.transpose(1, 0, 2),
    6: lambda raw: np.rot90(raw, -1),
    7: lambda raw: raw[::-1, ::-1].transpose(1, 0, 2),
    8: lambda raw: np.rot90(raw),
    # No orientation of the standard.
    9: lambda raw: raw,
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_upright_once(file_format: str) -> None:
    picture = Image.fromarray(noise(6, 4))
    options = {"lossless": True} if file_format == "WEBP" else {}
    stored = np.asarray(decode(saved(picture, file_format, **options), "x"))
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(picture, file_format, exif=exif, **options)
        found = np.asarray(decode(data, "x"))
        assert np.array_equal(found, turn(stored)), orientation
        expected = to_pixels(Image.fromarray(found), LETTERBOX)
        assert np.array_equal(decode_pixels(data, "x", LETTERBOX), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    file_format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    flips=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), min_size=1, max_size=5),
    length=st.integers(0, 60),
)
@settings(max_examples=100, deadline=None)
def test_a_picture_with_broken_exif_data_is_still_decoded(
    file_format: str, flips: list[tuple[int, int]], length: int
) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "somebody", 1
    data = bytearray(exif.tobytes())
    for place, value in flips:
        data[6 + place % (len(data) - 6)] = value
    picture = Image.fromarray(noise(8, 8))
    broken = saved(picture, file_format, exif=bytes(data[: 6 + length]))
    assert decode(broken, "x").size == (8, 8)
    decode_pixels(broken, "x", LETTERBOX)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(file_format: str) -> None:
    colors = ((200, 30, 20), (10, 220, 30), (20, 40, 250))
    frames = [Image.new("RGB", (8, 6), color) for color in colors]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (np.asarray(decode(data, "x")) == colors[0]).all()


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


def test_a_16_bit_grey_picture_keeps_its_upper_bits_and_a_transparent_grey_becomes_white() -> None:
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for file_format in ("PNG", "TIFF"):
        found = np.asarray(decode(saved(Image.fromarray(grey), file_format), "x"))
        assert np.array_equal(found, np.repeat((grey >> 8)[..., None], 3, axis=2))
    grey = np.array([[0, 1000, 40_000]], dtype=np.uint16)
    data = saved(Image.fromarray(grey), "PNG", transparency=1000)
    assert np.asarray(decode(data, "x")).tolist() == [[[0] * 3, [255] * 3, [156] * 3]]


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
    with pytest.raises(ValueError, match=r"^shard-3\.tar, sample 7: the picture cannot be decoded"):
        decode_pixels(whole[: int(kept * len(whole))], "shard-3.tar, sample 7", LETTERBOX)


def test_a_png_with_a_large_profile_is_read() -> None:
    image = Image.fromarray(noise(4, 4))
    found = decode(saved(image, icc_profile=bytes(2_000_000)), "a")
    assert np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "begins with b''"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "begins with b'<!DOCTYPE"),
        (png_of_size(9000, 9000), f"9000x9000 pixels are more than {MAX_PIXELS:,}"),
        (png_of_size(60_000, 60_000), "pixels"),
        (png_of_size(3, MAX_SIDE + 1), f"3x{MAX_SIDE + 1}: a side is longer than {MAX_SIDE:,}"),
        (png_of_size(MAX_SIDE + 1, 3), f"{MAX_SIDE + 1}x3: a side is longer than {MAX_SIDE:,}"),
        (saved(Image.new("RGB", (4, 4)), "EPS"), "EPS is none of JPEG, MPO, PNG"),
        (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
        (saved(Image.new("I", (4, 4), 70_000), "TIFF"), "greys from 70000 to 70000"),
    ],
    ids=["empty", "html", "large", "bomb", "tall", "wide", "eps", "float", "32 bit"],
)
def test_what_is_no_usable_picture_is_refused_with_record_and_reason(
    data: bytes, reason: str
) -> None:
    with pytest.raises(ValueError, match=r"^a\.jpg: the picture cannot be decoded") as caught:
        decode(data, "a.jpg")
    assert reason in str(caught.value)
    assert "replace or remove this record" in str(caught.value)


def test_lack_of_memory_is_not_the_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_data: object) -> None:
        raise MemoryError

    data = saved(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        decode(data, "x")
    with pytest.raises(MemoryError):
        decode_pixels(data, "x", LETTERBOX)


@pytest.mark.parametrize("kind", ["whole", "grey", "CMYK", "turned"])
def test_a_check_refuses_what_decoding_refuses(kind: str) -> None:
    random = np.random.default_rng(len(kind))
    pixels = random.integers(0, 255, (40, 56, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert({"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if kind == "turned" else 1
    data = saved(picture, "JPEG", quality=90, exif=exif)
    assert not refuses(check_decodes, data)
    assert not refuses(decode, data)
    if kind != "whole":
        return
    for place in range(150, len(data), max(1, (len(data) - 150) // 40)):
        changed = data[:place] + bytes([random.integers(256)]) + data[place + 1 :]
        for tried in (data[:place], changed):
            assert refuses(check_decodes, tried) == refuses(decode, tried), place


def refuses(look: Callable[[bytes, str], object], data: bytes) -> bool:
    try:
        look(data, "here")
    except ValueError:
        return True
    return False


def test_photographs_are_within_50_decibels_of_pillow() -> None:
    paths = sorted(Path(shared("vqa_official_samples")).rglob("*.jpg"))[:4]
    assert len(paths) == 4
    for path in paths:
        picture = decode(path.read_bytes(), str(path))
        for turned in (picture, picture.transpose(Image.Transpose.ROTATE_90)):
            for resize in RESIZES:
                transform = ImageTransform(size=384, resize=resize)
                found = bytes_of(to_pixels(turned, transform), transform)
                assert psnr(found, by_pillow(turned, transform)) >= 50
