"""Pictures and text for an exported Midstream model."""

import base64
import os
import struct
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.nn.functional import interpolate
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    ChannelDimension,
    infer_channel_dimension_format,
    is_scaled_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import ProcessingKwargs

# A strip longer than this many widths is cropped to its middle before it is resized.
MAX_STRIP = 8
# A host that sends nothing for so long is given up.
URL_SECONDS = 60
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


class MidstreamImageProcessor(BaseImageProcessor):  # type: ignore[misc]  # not typed
    """Fits pictures to the encoder's square and normalises them."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        image_size: int = 384,
        resize: str = "letterbox",
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.resize = resize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def fetch_images(self, images: Any) -> Any:
        """Every picture of a nested list as one of Pillow, see `opened`; a batch as a list."""
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return [self.fetch_images(one) for one in images]
        return opened(images)

    def preprocess(self, images: Any, return_tensors: Any = None, **_: Any) -> BatchFeature:
        """`pixel_values` [pictures, 3, size, size] of a picture or a nested list of them.

        What else a stock processor may be told changes nothing: the square is the encoder's.
        """
        pictures = make_flat_list_of_images(self.fetch_images(images))
        pixels = [self.pixels(one) for one in pictures]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """One picture as the encoder takes it: float32 [3, size, size]."""
        raster = fitted(np.array(rgb(picture)), self.image_size, self.resize, self.image_mean)
        pixels = raster.transpose(2, 0, 1).astype(np.float32)
        for plane, mean, std in zip(pixels, self.image_mean, self.image_std, strict=True):
            plane -= np.float32(255 * mean)
            plane /= np.float32(255 * std)
        return pixels


class MidstreamProcessor(ProcessorMixin):  # type: ignore[misc]  # transformers is not typed
    """Fits pictures to the encoder's square, and repeats `image_token` once a patch of each."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 729,
        image_token: str = "<image>",
        chat_template: Any = None,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with pictures, `pixel_values`.

        `images` are what `opened` takes, in the order in which the
        texts name them by `image_token`, nested or not; `kwargs` are those of every processor of
        transformers. Raises ValueError if their number is not that of the marks.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        given = self._merge_kwargs(
            ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )["text_kwargs"]
        given.pop("return_mm_token_type_ids", None)
        tensors = given.pop("return_tensors", None)
        data: dict[str, Any] = {}
        pictures = [] if images is None else self.image_processor(images)["pixel_values"]
        marks = sum(one.count(self.image_token) for one in texts)
        if text is not None and marks != len(pictures):
            raise ValueError(f"{len(pictures)} pictures were given, the texts name {marks}")
        if texts:
            places = self.image_token * self.num_image_tokens
            if tensors is not None and len(texts) > 1:
                given.setdefault("padding", True)
            # A conversation's tokenizer output stays nested, as that of a list of texts.
            data |= self.tokenizer(
                [one.replace(self.image_token, places) for one in texts], **given
            )
        if len(pictures):
            data["pixel_values"] = np.stack(pictures)
        return BatchFeature(data, tensor_type=tensors)


def opened(picture: Any) -> Image.Image:
    """A picture of Pillow, from a path, a URL, base64, a data URI, an array or a tensor.

    Arrays are [height, width], [height, width, channels] or [channels, height, width], of bytes or
    of fractions. Raises ValueError for what is none of these.
    """
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, str | os.PathLike):
        return from_text(os.fspath(picture))
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
    if isinstance(picture, np.ndarray):
        return from_array(picture)
    raise ValueError(
        "a picture is one of Pillow, a path, a URL, base64, an array or a tensor, "
        f"not {type(picture)}"
    )


def from_text(text: str) -> Image.Image:
    """The picture that a path, a URL (`data:` and `file:` as well) or base64 leads to."""
    if text.startswith(("http://", "https://", "data:", "file:")):
        # Some hosts refuse clients without a name.
        request = Request(text, headers={"User-Agent": "transformers"})
        with urlopen(request, timeout=URL_SECONDS) as answer:
            return Image.open(BytesIO(answer.read()))
    if os.path.isfile(text):
        return Image.open(text)
    try:
        return Image.open(BytesIO(base64.b64decode("".join(text.split()), validate=True)))
    except (ValueError, OSError):
        raise ValueError(f"{text[:80]!r} is no file, no URL and no picture in base64") from None


def from_array(array: np.ndarray) -> Image.Image:
    """The picture of an array; see `opened`."""
    if array.ndim == 3:
        if infer_channel_dimension_format(array, num_channels=(1, 3, 4)) == ChannelDimension.FIRST:
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[..., 0]
    if array.dtype == np.bool_ or (array.dtype.kind == "f" and is_scaled_image(array)):
        array = array * np.float32(255)
    if array.dtype != np.uint16 or array.ndim == 3:
        if array.dtype == np.uint16:
            array = array >> 8
        if array.size and not (array.min() >= 0 and array.max() <= 255):
            raise ValueError(f"values from {array.min()} to {array.max()} are no bytes")
        array = np.rint(array).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def rgb(picture: Image.Image) -> Image.Image:
    """An upright RGB picture, transparent pixels white, of 16-bit greys the upper 8 bits."""
    # TIFF turns itself while it loads, and PNG may hold its EXIF data behind the pixels.
    picture.load()
    turn = turn_of(picture)
    if picture.mode.startswith("I"):
        # Pillow would clip 16-bit greys at 255.
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"greys from {grey.min()} to {grey.max()} are no 16-bit ones")
        clear = grey == picture.info.get("transparency")
        picture = Image.fromarray(np.where(clear, 255, grey >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def turn_of(picture: Image.Image) -> Any:
    """What sets a picture upright; None where nothing is to be done or its EXIF is broken."""
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (KeyError, SyntaxError, TypeError, ValueError, struct.error):
        return None


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
