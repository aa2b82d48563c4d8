"""An encoder on pictures of another size than its own; no torch."""

from midstream.config.model import AnyEncoderConfig, EncoderConfig, FusedEncoder


def at_size(encoder: AnyEncoderConfig, image_size: int, *, owned: bool) -> AnyEncoderConfig:
    """The encoder on square pictures of another size, in more or fewer patches.

    One that the model owns has positions of that size; of a frozen one those that its weights hold
    are interpolated in every pass. Raises ValueError for a size that the patches do not fill, with
    the nearest that they do.
    """
    if image_size == encoder.image_size:
        return encoder
    if isinstance(encoder, FusedEncoder):
        towers = tuple(_tower_at(tower, image_size, owned=owned) for tower in encoder.towers)
        return FusedEncoder(towers=towers, feature_dtype=encoder.feature_dtype)
    if isinstance(encoder, EncoderConfig):
        return _tower_at(encoder, image_size, owned=owned)
    _check_filled(encoder.patch_size, image_size)
    return encoder.model_copy(update={"image_size": image_size})


def _tower_at(tower: EncoderConfig, image_size: int, *, owned: bool) -> EncoderConfig:
    _check_filled(tower.patch_size, image_size)
    held = image_size if owned else tower.position_size or tower.image_size
    if not owned and held == image_size:
        # Back at its own size: the encoder that it was.
        return tower.model_copy(update={"image_size": image_size, "position_size": None})
    return tower.model_copy(update={"image_size": image_size, "position_size": held})


def _check_filled(patch_size: int, image_size: int) -> None:
    if rest := image_size % patch_size:
        near = sorted({max(image_size - rest, patch_size), image_size - rest + patch_size})
        raise ValueError(
            f"image_size {image_size} is no multiple of the encoder's patch_size {patch_size}; "
            f"choose {' or '.join(map(str, near))}"
        )
