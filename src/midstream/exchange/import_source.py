"""What `midstream import` is asked for: found, brought here, seen to be whole, and read."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from midstream.config import AnyDecoderConfig, TransformersDecoderConfig
from midstream.config.base import Config, Positive
from midstream.data.tokenising.tokenise import open_tokenizer
from midstream.exchange import import_lora, import_parts, vision_checkpoints
from midstream.exchange.huggingface import (
    ADAPTER,
    check_downloaded,
    fetch,
    read_decoder,
    same_weights,
)
from midstream.exchange.openlm import read_openlm
from midstream.exchange.position import NUMBERS
from midstream.model.transformers_config import FAMILIES
from midstream.storage import read_json
from midstream.study.families import Known, holds_final_weights, known_checkpoint
from midstream.study.imported import RECORD, Position

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
            adapter = import_lora.is_adapter(path)
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
    if kind in own or kind in vision_checkpoints.FAMILIES or kind in FAMILIES:
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
        + ", ".join(vision_checkpoints.FAMILIES)
        + ". Whole models, by their parts: "
        + ", ".join(import_parts.WHOLE)
    )


def read_language_model(request: ImportRequest, path: Path) -> LanguageModel:
    """A decoder with all its tensors in memory.

    Raises FileNotFoundError or ValueError as `read_openlm` and `read_decoder` do.
    """
    adapter = path.is_dir() and import_lora.is_adapter(path)
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
        ours, tensors, base, notes = import_lora.merged(path)
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
