"""Pictures looked at before they are used: whether they decode, and those that hold several."""

import io

from midstream.data.images import (
    jpeg_raster,
    naming_picture,
    open_picture,
    upright_rgb,
    within_limits,
)


def check_decodes(data: bytes, where: str) -> None:
    """Raises ValueError as `images.decode` does.

    A JPEG is read to its end at an eighth of its size: that takes a quarter of the time, and damage
    shows in what is read, not in the pixels that are made of it.
    """
    with naming_picture(lambda: where):
        picture = open_picture(data)
        scaling = {"min_height": 1, "min_width": 1, "min_factor": 8}
        is_jpeg = picture.format in ("JPEG", "MPO")
        if not is_jpeg or jpeg_raster(data, "GRAY", **scaling) is None:
            upright_rgb(picture)


def num_frames(data: bytes, where: str) -> int:
    """How many pictures a TIFF holds; raises ValueError as `decode` does."""
    with naming_picture(lambda: where):
        return int(getattr(open_picture(data), "n_frames", 1))


def frame_as_png(data: bytes, number: int, where: str) -> bytes:
    """What `decode` would give for picture `number` of a TIFF, from 0, as a file of its own.

    Raises ValueError as `decode` does.
    """
    with naming_picture(lambda: where):
        picture = open_picture(data)
        picture.seek(number)
        png = io.BytesIO()
        upright_rgb(within_limits(picture)).save(png, "PNG", compress_level=1)
        return png.getvalue()
