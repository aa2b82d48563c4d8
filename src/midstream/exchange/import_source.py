"""What `midstream import` is asked for, where it stands in its run, and what is printed."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from midstream.config import AnyDecoderConfig, EncoderConfig, TransformersDecoderConfig, VLMConfig
from midstream.config.model import Config, Positive
from midstream.core.storage import read_json
from midstream.data.tokenise import open_tokenizer
from midstream.exchange import hub, import_parts, towers
from midstream.exchange.hub import ADAPTER, check_downloaded, fetch, read_decoder, same_weights
from midstream.exchange.openlm import read_openlm
from midstream.model.pretrained import FAMILIES
from midstream.study.families import Known, holds_final_weights, known_checkpoint
from midstream.study.imported import RECORD, ImportRecord, Position

NUMBERS = ("tokens_seen", "total_tokens", "rate", "peak_rate", "end_rate")


def settle(given: Position, checkpoint: Position, known: Position) -> tuple[Position, list[str]]:
    """One position out of what the user gave, the checkpoint's files and the table say, in this
    order; and a sentence for each number that a source lower down has otherwise.

    Raises ValueError where the numbers contradict each other.
    """
    sources = {"given": given, "checkpoint": checkpoint, "known family": known}
    numbers: dict[str, int | float] = {}
    origins: dict[str, str] = {}
    conflicts = []
    for name in NUMBERS:
        for source, position in sources.items():
            value = getattr(position, name)
            if value is None:
                continue
            if name not in numbers:
                numbers[name], origins[name] = value, source
            elif not math.isclose(value, numbers[name], rel_tol=1e-3):
                conflicts.append(
                    f"{name} is {numbers[name]:,} ({origins[name]}); {source} says {value:,}"
                )
    _check(numbers)
    return Position.model_validate(numbers | {"origins": origins}), conflicts


def _check(numbers: dict[str, int | float]) -> None:
    for low, high in (("tokens_seen", "total_tokens"), ("rate", "peak_rate")):
        if low in numbers and high in numbers and numbers[low] > numbers[high]:
            raise ValueError(
                f"{low} {numbers[low]:,} is above {high} {numbers[high]:,}; give them with "
                f"--{low.replace('_', '-')} and --{high.replace('_', '-')}"
            )


_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILES = (".pt", ".pth", ".bin", ".safetensors", ".json")


class ImportRequest(Config):
    """What to import, to where, and what the user knows about it; see `midstream import --help`."""

    source: str
    out: Path
    revision: str | None = None
    part: str | None = None
    allow_same_weights: bool = False
    tokenizer: str | None = None
    pad_vocab_to: Positive = 64
    add_tokens: tuple[str, ...] = ()
    tokens_seen: int | None = Field(default=None, ge=0)
    total_tokens: Positive | None = None
    rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    peak_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    end_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    num_heads: Positive | None = None

    @property
    def position(self) -> Position:
        """The numbers that the user gave."""
        return Position(**{name: getattr(self, name) for name in NUMBERS})


@dataclass(frozen=True)
class LanguageModel:
    """A decoder as it was found: tensors under its module's names, and what its files tell."""

    family: str
    config: AnyDecoderConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]
    moments: dict[str, Tensor] | None = None
    step: int = 0
    position: Position = field(default_factory=Position)
    notes: tuple[str, ...] = ()
    # Where a tokenizer may lie besides the source; a token without a row that stands for pictures.
    tokenizer_folder: Path | None = None
    picture_token: int | None = None


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies on this machine, what it is called, and what is public about it."""

    path: Path
    name: str
    revision: str | None = None
    known: Known | None = None
    notes: tuple[str, ...] = ()


def locate(request: ImportRequest) -> Source:
    """The file or folder of the source, downloaded if it is a hub name.

    Raises FileNotFoundError or ValueError naming what is missing, unfinished or unknown.
    """
    path = Path(request.source).expanduser()
    source = Source(path, str(path.resolve()))
    if path.exists():
        if request.revision is not None:
            raise ValueError(
                f"{path} lies here and has no revisions; leave --revision {request.revision} out, "
                "or give the hub's name"
            )
    elif _HUB_NAME.fullmatch(request.source) and path.suffix not in _FILES:
        if holds_final_weights(request.source, request.revision) and (
            not request.allow_same_weights
        ):
            raise ValueError(
                f"{request.source} at {request.revision} is publicly known to serve the weights of "
                "the run's end, not of that step; take another revision, or say "
                "--allow-same-weights and give --tokens-seen and --rate"
            )
        path = fetch(request.source, request.revision)
        # The folder of a snapshot is named by its commit.
        revision = request.revision or path.name
        known = known_checkpoint(request.source, request.revision)
        notes = _twins(request, path, known)
        source = Source(path, request.source, revision, known, notes)
    else:
        raise FileNotFoundError(
            f"{path} does not exist; give an epoch_N.pt, a folder or a hub name (owner/name)"
        )
    if path.is_dir():
        if (path / RECORD).is_file():
            raise ValueError(f"{path} is imported already; give it to a recipe")
        if not list(path.glob("**/epoch_*.pt")):
            bare = request.num_heads is not None and not (path / "config.json").is_file()
            adapter = hub.is_adapter(path)
            needed = ADAPTER if adapter else "config.json"
            check_downloaded(path, needed=() if bare else (needed,))
            if not bare and not adapter:
                _check_family(path)
            if import_parts.is_whole(path):
                import_parts.check_part(path, request.part)
            elif request.part is not None:
                raise ValueError(f"{path} is no vision-language model with parts; leave --part out")
    elif path.suffix not in (".pt", ".pth") and (
        path.suffix != ".safetensors" or request.num_heads is None
    ):
        raise ValueError(
            f"{path} is no OpenLM epoch_N.pt; of another model give the folder with its config.json"
            " (and of OpenLM's safetensors --num-heads)"
        )
    return source


def _twins(request: ImportRequest, folder: Path, known: Known | None) -> tuple[str, ...]:
    """A sentence if other revisions hold the very same weights; ValueError if the position that is
    public for the one asked for can then not be true, unless the user allows it."""
    name, revision = request.source, request.revision or "main"
    last = known_checkpoint(name, "main")
    # A revision of the run's middle that serves the final weights is the publisher's mistake.
    middle = known is not None and last is not None and known.position != last.position
    same = same_weights(name, revision, folder, ask_hub=middle)
    if not same:
        return ()
    those = f"{name} at {revision} holds the same weights as {', '.join(same)}"
    positions = [one.position for one in (known_checkpoint(name, each) for each in same) if one]
    differs = known is not None and any(one != known.position for one in positions)
    if middle and differs and not request.allow_same_weights:
        raise ValueError(
            f"{those}, so that the tokens and the rate of {revision} may not be theirs; take "
            "another revision, or say --allow-same-weights and give --tokens-seen and --rate"
        )
    return (those,)


def _check_family(folder: Path) -> None:
    content = read_json(folder / "config.json")
    kind = content.get("model_type") if isinstance(content, dict) else None
    own = ("openlm", import_parts.OWN_TEXT, *import_parts.WHOLE)
    if kind in own or kind in towers.FAMILIES or kind in FAMILIES:
        return
    models = ", ".join(f"{name} ({one.models})" for name, one in FAMILIES.items())
    if isinstance(content, dict) and isinstance(content.get("vision_config"), dict):
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {kind!r}, a whole vision-language model of "
            f"which no part is read; parts are read of {', '.join(import_parts.WHOLE)}. Save its "
            f"language model as a folder of its own, if that is one of {', '.join(FAMILIES)}"
        )
    raise ValueError(
        f"{folder / 'config.json'} is of model_type {kind!r}, no family that is known here. "
        f"Language models: openlm, {models}. Vision towers: "
        + ", ".join(towers.FAMILIES)
        + ". Whole models, by their parts: "
        + ", ".join(import_parts.WHOLE)
    )


def read_language_model(request: ImportRequest, path: Path) -> LanguageModel:
    """A decoder with all its tensors in memory.

    Raises FileNotFoundError or ValueError as `read_openlm` and `read_decoder` do.
    """
    adapter = path.is_dir() and hub.is_adapter(path)
    openlm = path.is_file() or not (path / "config.json").is_file()
    if adapter or (not openlm and read_json(path / "config.json")["model_type"] != "openlm"):
        if request.num_heads is not None:
            raise ValueError("--num-heads is for OpenLM's files; this model's config.json tells")
        return _read_folder(path, adapter=adapter)
    found = read_openlm(path, num_heads=request.num_heads)
    numbers = {name: getattr(found, name) for name in NUMBERS}
    notes = [f"{what}: {origin}" for what, origin in found.origins.items() if origin != "none"]
    return LanguageModel(
        family="openlm",
        config=found.config,
        tensors=found.tensors,
        dropped=found.dropped,
        moments=found.moments,
        step=found.step or 0,
        position=Position(**numbers),
        notes=("read from its files: " + "; ".join(notes),),
    )


def _read_folder(path: Path, *, adapter: bool) -> LanguageModel:
    if adapter:
        ours, tensors, base, notes = hub.merged(path)
        return LanguageModel(ours.model_type, ours, tensors, (), notes=notes, tokenizer_folder=base)
    kind = read_json(path / "config.json")["model_type"]
    if kind == import_parts.OWN_TEXT:
        own, tensors = import_parts.read_own_text(path)
        return LanguageModel("openlm", own, tensors, ())
    if kind not in import_parts.WHOLE:
        config, tensors, dropped, notes = read_decoder(path)
        return LanguageModel(config.model_type, config, tensors, dropped, notes=notes)
    part, tensors, dropped, notes = import_parts.read_decoder_part(path)
    family = part.model_type if isinstance(part, TransformersDecoderConfig) else "openlm"
    token = import_parts.image_token(path)
    return LanguageModel(
        family,
        part,
        tensors,
        dropped,
        notes=notes,
        picture_token=token if token >= part.vocab_size else None,
    )


def find_tokenizer(request: ImportRequest, path: Path) -> Tokenizer | None:
    """The one that the user names, else the one in the source's folder, if there is any.

    Raises FileNotFoundError or ValueError if it is not found or of another kind.
    """
    if request.tokenizer is not None:
        return open_tokenizer(request.tokenizer)
    if not path.is_dir():
        return None
    if (path / "tokenizer.json").is_file():
        return open_tokenizer(str(path))
    others = [name for name in ("tokenizer.model", "vocab.json") if (path / name).is_file()]
    if others:
        raise FileNotFoundError(
            f"{path} has {' and '.join(others)} but no tokenizer.json, which alone is read; give "
            "one with --tokenizer"
        )
    return None


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
