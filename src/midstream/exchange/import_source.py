"""What `midstream import` is asked for, where it stands in its run, and what is printed."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from tokenizers import AddedToken, Tokenizer

from midstream.config import EncoderConfig
from midstream.config.base import Config, Positive
from midstream.core.storage import read_json
from midstream.data.tokenise import open_tokenizer
from midstream.eval.foreign_model import LLAVAS_OWN
from midstream.exchange import hub, import_parts, towers
from midstream.exchange.hub import LanguageModel, model_type
from midstream.exchange.merge_adapter import ADAPTER, is_adapter, merged
from midstream.exchange.openlm import read_openlm
from midstream.model.pretrained import FAMILIES
from midstream.study.families import Known, holds_final_weights, known_checkpoint
from midstream.study.imported import RECORD, ImportRecord, Position

NUMBERS = ("tokens_seen", "total_tokens", "rate", "peak_rate", "end_rate")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# As it stands in a browser, and as other programs write a revision.
_HUB_ADDRESS = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://|hf\.co/)?"
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:(?:/(?:tree|blob|resolve)/|@|:)(?P<revision>[^/]+)/?.*)?/?"
)
_SAVE = "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
_FILES = (".pt", ".pth", ".bin", ".safetensors", ".json")


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
    for low, high in (("tokens_seen", "total_tokens"), ("rate", "peak_rate")):
        if numbers.get(low, 0) > numbers.get(high, math.inf):
            raise ValueError(
                f"{low} {numbers[low]:,} is above {high} {numbers[high]:,}; give them with "
                f"--{low.replace('_', '-')} and --{high.replace('_', '-')}"
            )
    return Position.model_validate(numbers | {"origins": origins}), conflicts


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
    if path.exists():
        if request.revision is not None:
            raise ValueError(
                f"{path} lies here and has no revisions; leave --revision {request.revision} out"
            )
        source = Source(path, str(path.resolve()))
    elif _HUB_NAME.fullmatch(request.source) and path.suffix not in _FILES:
        source = _from_hub(request)
    else:
        told = "give an epoch_N.pt, a folder or a hub name (owner/name)"
        address = _HUB_ADDRESS.fullmatch(request.source)
        if address is not None and address["name"] != request.source.rstrip("/"):
            revision = f" --revision {address['revision']}" if address["revision"] else ""
            told = f"a hub's model is given by its name: {address['name']}{revision}"
        raise FileNotFoundError(f"{request.source} does not exist; {told}")
    if source.path.is_dir():
        _check_folder(source.path, request)
    elif path.suffix not in (".pt", ".pth") and (
        path.suffix != ".safetensors" or request.num_heads is None
    ):
        raise ValueError(
            f"{path} is no OpenLM epoch_N.pt; of another model give the folder with its config.json"
            " (and of OpenLM's safetensors --num-heads)"
        )
    return source


def _from_hub(request: ImportRequest) -> Source:
    """ValueError if the position that is public for the revision cannot be that of its weights,
    unless the user allows it; a sentence if other revisions hold the very same."""
    name, revision = request.source, request.revision or "main"
    otherwise = "take another revision, or say --allow-same-weights and give --tokens-seen, --rate"
    if holds_final_weights(name, request.revision) and not request.allow_same_weights:
        raise ValueError(
            f"{name} at {revision} is publicly known to serve the weights of the run's end, not of "
            f"that step; {otherwise}"
        )
    path = hub.fetch(name, request.revision)
    known, last = known_checkpoint(name, request.revision), known_checkpoint(name, "main")
    # A revision of the run's middle that serves the final weights is the publisher's mistake.
    middle = known is not None and last is not None and known.position != last.position
    same = hub.same_weights(name, revision, path, ask_hub=middle)
    those = f"{name} at {revision} holds the same weights as {', '.join(same)}"
    twins = [one for one in (known_checkpoint(name, each) for each in same) if one]
    differs = known is not None and any(one.position != known.position for one in twins)
    if middle and differs and not request.allow_same_weights:
        raise ValueError(
            f"{those}, so that the tokens and the rate of {revision} may not be theirs; {otherwise}"
        )
    # The folder of a snapshot is named by its commit.
    return Source(path, name, request.revision or path.name, known, (those,) if same else ())


def _check_folder(path: Path, request: ImportRequest) -> None:
    if (path / RECORD).is_file():
        raise ValueError(f"{path} is imported already; give it to a recipe")
    if (path / "stage.json").is_file():
        raise ValueError(
            f"{path} is a stage of a store; to import it, give what midstream export writes of it"
        )
    if list(path.glob("**/epoch_*.pt")):
        return
    bare = request.num_heads is not None and not (path / "config.json").is_file()
    adapter = is_adapter(path)
    hub.check_downloaded(path, needed=None if bare else ADAPTER if adapter else "config.json")
    if not bare and not adapter:
        _check_family(path)
    if model_type(path) in import_parts.WHOLE:
        import_parts.check_part(path, request.part)
    elif request.part is not None:
        raise ValueError(f"{path} is no vision-language model with parts; leave --part out")


def _check_family(folder: Path) -> None:
    kind, whole = model_type(folder), ", ".join(import_parts.WHOLE)
    content = read_json(folder / "config.json")
    if isinstance(content, dict) and "mm_vision_tower" in content:
        raise ValueError(f"{folder / 'config.json'} {LLAVAS_OWN}")
    own = ("openlm", import_parts.OWN_TEXT, *import_parts.WHOLE)
    if kind in (*own, *towers.FAMILIES, *FAMILIES):
        return
    told = f"{folder / 'config.json'} is of model_type {kind!r}"
    if isinstance(content, dict) and isinstance(content.get("vision_config"), dict):
        raise ValueError(
            f"{told}, a whole vision-language model of which no part is read; parts are read of "
            f"{whole}. Save its language model by itself, if that is one of {', '.join(FAMILIES)}"
        )
    if isinstance(content, dict) and kind is None and "architecture" in content:
        raise ValueError(
            f"{folder / 'config.json'} is timm's, whose files are not read; many of its towers are "
            "published as transformers saves them, too: google/siglip-..., facebook/dinov2-..."
        )
    models = ", ".join(f"{name} ({one})" for name, one in FAMILIES.items())
    raise ValueError(
        f"{told}, no family that is known here. Language models: openlm, {models}. Vision towers: "
        f"{', '.join(towers.FAMILIES)}. Whole models, by their parts: {whole}"
    )


def read_language_model(request: ImportRequest, path: Path) -> LanguageModel:
    """A decoder with all its tensors in memory.

    Raises FileNotFoundError or ValueError as `read_openlm` and `read_decoder` do.
    """
    adapter = path.is_dir() and is_adapter(path)
    kind = model_type(path)
    if not adapter and kind in (None, "openlm"):
        return read_openlm(path, num_heads=request.num_heads)
    if request.num_heads is not None:
        raise ValueError("--num-heads is for OpenLM's files; this model's config.json tells")
    if adapter:
        return merged(path)
    if kind in (import_parts.OWN_TEXT, *import_parts.WHOLE):
        return import_parts.read_decoder_part(path)
    return hub.read_decoder(path)


def find_tokenizer(request: ImportRequest, *places: Path | None) -> Tokenizer | None:
    """The one that the user names, else the one in the first of these folders that has any.

    Raises FileNotFoundError or ValueError if it is not found or of another kind.
    """
    if request.tokenizer is not None:
        return open_tokenizer(request.tokenizer)
    for path in places:
        if path is None or not path.is_dir():
            continue
        if (path / "tokenizer.json").is_file():
            tokenizer = open_tokenizer(str(path))
            _add_stated(tokenizer, path)
            return tokenizer
        kinds = ("tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken")
        others = [one.name for kind in kinds for one in sorted(path.glob(kind))]
        if others:
            raise FileNotFoundError(
                f"{path} has {' and '.join(others)} but no tokenizer.json, which alone is read; "
                f"{_SAVE} writes one, or give one with --tokenizer"
            )
    return None


def stated_of_tokenizer(folder: Path) -> dict[str, Any]:
    """What a folder's tokenizer_config.json says; nothing where there is none."""
    path = folder / "tokenizer_config.json"
    content = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _add_stated(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens that only the files beside tokenizer.json know, which `transformers` adds.

    Raises ValueError where they would get other ids than those files say.
    """
    stated: dict[int, AddedToken] = {}
    path = folder / "added_tokens.json"
    older = read_json(path) if path.is_file() else {}
    listed = stated_of_tokenizer(folder).get("added_tokens_decoder") or {}
    try:
        for token, number in older.items():
            stated[int(number)] = AddedToken(token, special=True, normalized=False)
        for number, told in listed.items():
            words = {key: value for key, value in told.items() if key not in ("content", "__type")}
            stated[int(number)] = AddedToken(told["content"], **words)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{folder} has added_tokens.json or added_tokens_decoder in a form that transformers "
            f"does not write; let it write them anew: {_SAVE}"
        ) from None
    for number, added in sorted(stated.items(), key=lambda pair: pair[0]):
        if tokenizer.token_to_id(added.content) is None:
            tokenizer.add_tokens([added])
            if tokenizer.token_to_id(added.content) != number:
                raise ValueError(
                    f"{folder} has {added.content} as token {number:,} beside its tokenizer.json, "
                    f"which has no place for it; write a whole one: {_SAVE}"
                )


# ------------------------------------------------------------------------------ what is printed


def summary(out: Path, record: ImportRecord, notes: Sequence[str]) -> Iterator[str]:
    """What was imported, line by line, and the next command."""
    yield f"{out}: {record.source}" + (f" at {record.revision}" if record.revision else "")
    config = record.config
    if isinstance(config, EncoderConfig):
        yield (
            f"  {record.family} vision tower: {config.num_layers} blocks, "
            f"{config.hidden_size} wide, {config.num_patches} patches of a picture of "
            f"{config.image_size} x {config.image_size}"
        )
    else:
        yield f"  {record.family} language model, {config.num_parameters:,} parameters"
        yield from _about_model(record)
    if record.dropped:
        some = ", ".join(record.dropped[:3]) + (", ..." if len(record.dropped) > 3 else "")
        yield f"  left out {len(record.dropped)} stored tensors: {some}"
    yield from (f"  {note}" for note in notes)
    yield from _next(str(out.expanduser()), record)


def _next(out: str, record: ImportRecord) -> Iterator[str]:
    """The next command, as a shell takes it."""
    if record.kind == "model":
        recipe, values, missing = "fine_tuning", {"model": out}, ""
    else:
        encoder = record.kind == "encoder"
        other, what = (
            ("LANGUAGE_MODEL", "language model") if encoder else ("VISION_TOWER", "vision tower")
        )
        checkpoint, tower = (other, out) if encoder else (out, other)
        encoders = json.dumps([tower], ensure_ascii=False)
        recipe, values = "image_shares", {"checkpoint": checkpoint, "encoders": encoders}
        missing = f"an imported {what} for {other} and "
    values["data"] = "WORLD"
    if isinstance(record.config, EncoderConfig):
        # Where the model that a tower comes from saw otherwise than the recipe does by itself.
        usual = {"feature_layer": -2, "final_norm": False, "resize": "letterbox"}
        for name, value in usual.items():
            told = getattr(record.config, name)
            if told != value:
                values[name] = told if isinstance(told, str) else json.dumps(told)
    options = " ".join(f"--set {shlex.quote(f'{name}={one}')}" for name, one in values.items())
    yield f"  to go on, put {missing}your data for WORLD:"
    yield f"next: midstream plan own_model.{recipe} {options}"


def _about_model(record: ImportRecord) -> Iterator[str]:
    assert record.vocabulary is not None
    assert record.position is not None
    model = record.model
    if model is not None and model.encoder is not None:
        size, wide = model.encoder.image_size, model.decoder.hidden_size
        widths = ", ".join(map(str, model.projector.widths(model.encoder.hidden_size, wide)))
        yield (
            f"  sees {model.encoder.num_patches} patches of a picture of {size} x {size} "
            f"({model.encoder.transform.resize}), projector widths {widths}"
        )
    before, after = record.vocabulary["rows_before"], record.vocabulary["rows_after"]
    rows = f"{before:,} rows as before" if before == after else f"{before:,} rows, now {after:,}"
    added = [f"{one['token']} = {one['id']:,}" for one in record.vocabulary["added"]]
    yield f"  vocabulary: {rows}; added {', '.join(added) or 'no token'}"
    unknown = []
    for name in NUMBERS:
        value, words = getattr(record.position, name), name.replace("_", " ")
        if value is None:
            unknown.append(words)
        else:
            yield f"  {words}: {value:,} ({record.position.origins[name]})"
    if unknown:
        yield f"  unknown: {', '.join(unknown)}"
    yield f"  Adam's moments: {'as in the checkpoint' if record.has_moments else 'none'}"
