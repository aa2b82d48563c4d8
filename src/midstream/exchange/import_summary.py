"""What the user reads after an import."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from midstream.config import EncoderConfig, VLMConfig
from midstream.exchange.position import NUMBERS
from midstream.study.imported import ImportRecord


def summary(out: Path, record: ImportRecord, notes: Sequence[str]) -> Iterator[str]:
    """What was imported, line by line, and the next command."""
    at = f" at {record.revision}" if record.revision else ""
    yield f"{out}: {record.source}{at}"
    config = record.config
    if isinstance(config, EncoderConfig):
        yield (
            f"  {record.family} vision tower: {config.num_layers} blocks, "
            f"{config.hidden_size} wide, {config.num_patches} patches of a picture of "
            f"{config.image_size} x {config.image_size}"
        )
    else:
        yield f"  {record.family} language model, {config.num_parameters:,} parameters"
        if record.model is not None:
            yield from _about_sight(record.model)
        yield from _about_text(record)
    if record.dropped:
        some = ", ".join(record.dropped[:3]) + (", ..." if len(record.dropped) > 3 else "")
        yield f"  left out {len(record.dropped)} stored tensors: {some}"
    yield from (f"  {note}" for note in notes)
    if record.model is not None:
        yield "  to go on, put your data for WORLD:"
        whole = shlex.quote(f"model={out.expanduser()}")
        yield f"next: midstream plan own_model.fine_tuning --set {whole} --set data=WORLD"
        return
    other, what = ("LANGUAGE_MODEL", "language model")
    if record.kind == "decoder":
        other, what = ("VISION_TOWER", "vision tower")
    yield f"  to go on, put an imported {what} for {other} and your data for WORLD:"
    yield _next(out.expanduser(), record, other)


def _next(out: Path, record: ImportRecord, other: str) -> str:
    """The next command, as a shell takes it."""
    encoder = record.kind == "encoder"
    checkpoint, tower = (other, str(out)) if encoder else (str(out), other)
    values = {
        "checkpoint": checkpoint,
        "encoders": json.dumps([tower], ensure_ascii=False),
        "data": "WORLD",
    }
    if isinstance(record.config, EncoderConfig):
        # Where the model that a tower comes from saw otherwise than the recipe does by itself.
        usual = {"feature_layer": -2, "final_norm": False, "resize": "letterbox"}
        told = {name: getattr(record.config, name) for name in usual}
        values |= {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in told.items()
            if value != usual[name]
        }
    options = " ".join(f"--set {shlex.quote(f'{name}={one}')}" for name, one in values.items())
    return f"next: midstream plan own_model.image_shares {options}"


def _about_sight(model: VLMConfig) -> Iterator[str]:
    encoder = model.encoder
    assert encoder is not None, "it sees"
    widths = model.projector.widths(encoder.hidden_size, model.decoder.hidden_size)
    yield (
        f"  sees {encoder.num_patches} patches of a picture of {encoder.image_size} x "
        f"{encoder.image_size} ({encoder.transform.resize}), projector widths "
        f"{', '.join(map(str, widths))}"
    )


def _about_text(record: ImportRecord) -> Iterator[str]:
    assert record.vocabulary is not None
    assert record.position is not None
    before, after = record.vocabulary["rows_before"], record.vocabulary["rows_after"]
    rows = f"{before:,} rows as before" if before == after else f"{before:,} rows, now {after:,}"
    added = [f"{one['token']} = {one['id']:,}" for one in record.vocabulary["added"]]
    yield f"  vocabulary: {rows}; added {', '.join(added) or 'no token'}"
    numbers = {name: getattr(record.position, name) for name in NUMBERS}
    for name, value in numbers.items():
        if value is not None:
            yield f"  {_words(name)}: {value:,} ({record.position.origins[name]})"
    unknown = [_words(name) for name, value in numbers.items() if value is None]
    if unknown:
        yield f"  unknown: {', '.join(unknown)}"
    yield f"  Adam's moments: {'as in the checkpoint' if record.has_moments else 'none'}"


def _words(name: str) -> str:
    return name.replace("_", " ")
