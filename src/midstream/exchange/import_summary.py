"""What the user reads after an import."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from midstream.config import EncoderConfig
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
        yield from _about_text(record)
    if record.dropped:
        some = ", ".join(record.dropped[:3]) + (", ..." if len(record.dropped) > 3 else "")
        yield f"  left out {len(record.dropped)} stored tensors: {some}"
    yield from (f"  {note}" for note in notes)
    given = f"encoders='[\"{out}\"]'" if record.kind == "encoder" else f"checkpoint={out}"
    rest = "checkpoint=DIR" if record.kind == "encoder" else "encoders='[\"DIR\"]'"
    yield f"next: midstream plan own_model.image_shares --set {given} --set {rest} --set data=WORLD"


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
