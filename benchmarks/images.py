"""JPEG bytes to normalised letterboxed pixels: a plain Pillow pipeline against Midstream's path.

Pillow's side decodes, letterboxes and resizes with its bicubic filter, in two orders: padded first
(what Midstream and Prismatic compute) and padded last (cheaper, other colours next to the border).
All sides normalise with the same code, take turns picture by picture in one process, and CPU
seconds are counted. Pictures are generated unless a folder is named.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from midstream.config import ImageTransform
from midstream.data import images
from midstream.data.images import decode_pixels

SIZES = ((512, 384), (640, 480), (500, 375), (384, 512), (480, 640), (500, 333))
# Below this the sides compute different things, and the ratio says nothing.
MIN_DECIBELS = 40
Side = Callable[[bytes], np.ndarray]


def generated_jpeg(width: int, height: int, seed: int) -> bytes:
    """Smooth colours, edges and fine texture, about as many bytes a pixel as a photograph has."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    planes = []
    for _ in range(3):
        a, b, c, d = random.uniform(1, 6, 4)
        smooth = np.sin(a * x + b) + np.cos(c * y + d) + np.sin(3 * a * x * y)
        texture = np.sin(90 * a * x + 9 * smooth) * np.cos(70 * c * y - 7 * smooth)
        edges = (np.sin(9 * x + a) > np.cos(8 * y + b)).astype(float)
        planes.append(128 + 28 * smooth + 16 * texture * smooth + 20 * edges)
    pixels = np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def normalised(picture: Image.Image, transform: ImageTransform) -> np.ndarray:
    """(value / 255 - mean) / std, as torchvision computes it, channels first."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    found: np.ndarray = pixels.sub_(mean).div_(std).numpy()
    return found


def padded(picture: Image.Image, width: int, height: int, transform: ImageTransform) -> Image.Image:
    """`picture` in the middle of the mean's colour."""
    colour = tuple(int(255 * mean) for mean in transform.mean)
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return canvas


def sides(transform: ImageTransform) -> dict[str, Side]:
    """The three ways from bytes to pixels, by name."""
    size, bicubic = transform.size, Image.Resampling.BICUBIC

    def pad_first(data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        # As much on both sides, so that an odd difference leaves one pixel to crop.
        odd = abs(picture.width - picture.height) % 2
        longer = max(picture.size)
        width = longer - odd * (picture.width < longer)
        height = longer - odd * (picture.height < longer)
        picture = padded(picture, width, height, transform)
        width, height = (size * side // min(picture.size) for side in picture.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        picture = picture.resize((width, height), bicubic)
        return normalised(picture.crop((left, top, left + size, top + size)), transform)

    def pad_last(data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        scale = size / max(picture.size)
        inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return normalised(padded(picture.resize(inner, bicubic), size, size, transform), transform)

    def midstream(data: bytes) -> np.ndarray:
        return decode_pixels(data, "a picture of the benchmark", transform)

    return {
        "Pillow, padded first": pad_first,
        "Pillow, padded last": pad_last,
        "Midstream": midstream,
    }


def psnr(found: np.ndarray, expected: np.ndarray, transform: ImageTransform) -> float:
    """Decibels between two pictures, of the range from black to white; inf if they are equal."""
    std = np.array(transform.std)[:, None, None]
    error = np.mean(((found - expected).astype(np.float64) * std) ** 2)
    return float(-10 * np.log10(error)) if error else float("inf")


def measured(pictures: list[bytes], ways: dict[str, Side], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a picture, by way; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        spent = dict.fromkeys(ways, 0.0)
        for data in pictures:
            for name, way in ways.items():
                before = time.process_time()
                way(data)
                spent[name] += time.process_time() - before
        if number:
            for name in ways:
                seconds[name].append(spent[name] / len(pictures))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="a folder of .jpg files, read at any depth")
    parser.add_argument("--num-images", type=int, default=24, help="how many are generated or read")
    parser.add_argument("--rounds", type=int, default=15, help="how often each side sees them all")
    parser.add_argument("--size", type=int, default=384, help="pixels a side of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.images is None:
        count = options.num_images
        pictures = [generated_jpeg(*SIZES[n % len(SIZES)], seed=n) for n in range(count)]
    else:
        found = sorted(options.images.rglob("*.jpg"))[: options.num_images]
        if not found:
            parser.error(f"{options.images} holds no .jpg file")
        pictures = [path.read_bytes() for path in found]
    transform = ImageTransform(size=options.size)
    ways = sides(transform)
    fast = images.simplejpeg  # type: ignore[attr-defined]
    decoder = "Pillow" if fast is None else "simplejpeg"
    kilobytes = statistics.mean(len(data) for data in pictures) / 1000
    print(
        f"{len(pictures)} JPEGs of {kilobytes:.0f} kB to 3x{options.size}x{options.size}, "
        f"{options.rounds} rounds, one thread; Midstream decodes with {decoder}"
    )
    seconds = measured(pictures, ways, options.rounds)
    wanted = [ways["Pillow, padded first"](data) for data in pictures]
    for name, way in ways.items():
        found = [
            psnr(way(data), pixels, transform)
            for data, pixels in zip(pictures, wanted, strict=True)
        ]
        print(
            f"  {name:<20} {1 / seconds[name]:>6,.0f} images per CPU second; PSNR against padded "
            f"first: median {statistics.median(found):.0f} dB, least {min(found):.0f} dB"
        )
        if name == "Midstream" and min(found) < MIN_DECIBELS:
            raise SystemExit(f"Midstream's pixels are others: below {MIN_DECIBELS} dB")
    for name in list(ways)[:-1]:
        print(f"  ratio Midstream / {name}: {seconds[name] / seconds['Midstream']:.2f}")


if __name__ == "__main__":
    main()
