"""Pictures and text for an exported Midstream model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from transformers import BatchFeature, ProcessorMixin

# A strip longer than this many widths is cropped to its middle before it is resized.
MAX_STRIP = 8


class MidstreamProcessor(ProcessorMixin):  # type: ignore[misc]  # transformers is not typed
    """Fits pictures to the encoder's square, and repeats `image_token` once a patch of each."""

    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 384,
        resize: str = "letterbox",
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        num_image_tokens: int = 729,
        image_token: str = "<image>",
        chat_template: Any = None,
    ) -> None:
        self.image_size = image_size
        self.resize = resize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with pictures, `pixel_values`.

        `images` are pictures of Pillow, arrays [height, width, 3] of bytes, or paths, in the order
        in which the texts name them by `image_token`, nested or not; `kwargs` are the
        tokenizer's. Raises ValueError if their number is not that of the marks.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures = list(flat(images))
        marks = sum(one.count(self.image_token) for one in texts)
        if marks != len(pictures):
            raise ValueError(f"{len(pictures)} pictures were given, the texts name {marks}")
        places = self.image_token * self.num_image_tokens
        texts = [one.replace(self.image_token, places) for one in texts]
        tensors = kwargs.pop("return_tensors", None)
        if tensors is not None and len(texts) > 1:
            kwargs.setdefault("padding", True)
        # A conversation's tokenizer output stays nested, as that of a list of texts.
        data = dict(self.tokenizer(texts, **kwargs))
        if pictures:
            data["pixel_values"] = np.stack([self.pixels(one) for one in pictures])
        return BatchFeature(data, tensor_type=tensors)

    def pixels(self, picture: Any) -> np.ndarray:
        """One picture as the encoder takes it: float32 [3, size, size]."""
        raster = fitted(np.array(rgb(picture)), self.image_size, self.resize, self.image_mean)
        pixels = raster.transpose(2, 0, 1).astype(np.float32)
        for plane, mean, std in zip(pixels, self.image_mean, self.image_std, strict=True):
            plane -= np.float32(255 * mean)
            plane /= np.float32(255 * std)
        return pixels

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", "pixel_values"]


def flat(images: Any) -> Any:
    """The pictures of a nested list, in order."""
    if images is None:
        return
    if isinstance(images, list | tuple):
        for one in images:
            yield from flat(one)
    else:
        yield images


def rgb(picture: Any) -> Image.Image:
    """An upright RGB picture, transparent pixels white."""
    if isinstance(picture, str | Path):
        picture = Image.open(picture)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a picture is one of Pillow, an array or a path, not {type(picture)}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # Pillow would clip 16-bit greys at 255.
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    upright: Image.Image = picture.convert("RGB")
    return upright


def fitted(raster: np.ndarray, size: int, resize: str, mean: list[float]) -> np.ndarray:
    """Bytes [height, width, 3] fitted to a square, as Midstream's `data/images.py` does."""
    axis = int(raster.shape[1] > raster.shape[0])
    longer, shorter = raster.shape[axis], raster.shape[1 - axis]
    if resize == "square":
        return resized(raster, size, size)
    if resize == "crop" and longer > MAX_STRIP * shorter:
        longer = MAX_STRIP * shorter + (longer - MAX_STRIP * shorter) % 2
        raster = middle(raster, axis, longer)
    padding = (longer - shorter) // 2 if resize == "letterbox" else 0
    length = size * longer // (shorter + 2 * padding)
    across = shorter if padding else size
    raster = resized(raster, *((across, length) if axis else (length, across)))
    raster = middle(raster, axis, size)
    if not padding:
        return raster
    around = [(0, 0), (0, 0), (0, 0)]
    around[1 - axis] = (padding, padding)
    colours = [int(255 * one) for one in mean]
    planes = [
        np.pad(raster[..., channel], around[:2], constant_values=colour)
        for channel, colour in enumerate(colours)
    ]
    return resized(np.stack(planes, axis=-1), size, size)


def resized(raster: np.ndarray, height: int, width: int) -> np.ndarray:
    """Torch's antialiased bicubic filter on bytes."""
    image = torch.from_numpy(np.ascontiguousarray(raster))[None].permute(0, 3, 1, 2)
    image = interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    found: np.ndarray = image[0].permute(1, 2, 0).numpy()
    return found


def middle(raster: np.ndarray, axis: int, length: int) -> np.ndarray:
    """`length` rows or columns from the middle; halves go to even numbers."""
    start = round((raster.shape[axis] - length) / 2)
    return raster[start : start + length] if axis == 0 else raster[:, start : start + length]
