"""Imported folders as `midstream import` described them, read without torch.

Also what a study was planned without: how to get each of it, and what can be run meanwhile.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from midstream.config import (
    DecoderConfig,
    EncoderConfig,
    FusedEncoder,
    PatchProjection,
    TransformersDecoderConfig,
    VLMConfig,
)
from midstream.config.base import Config
from midstream.core.storage import read_json, verify
from midstream.core.tokens import name_some
from midstream.study.first_stages import PLANNED, LoadDecoder
from midstream.study.stages import Evaluate, Imported, LoadEncoder, LoadModel, Prepare, Stage
from midstream.study.studies import AnyStudy

RECORD = "import.json"


class Position(Config):
    """Where a checkpoint stands in its run; None where nobody told. `origins` says who did."""

    tokens_seen: int | None = None
    total_tokens: int | None = None
    rate: float | None = None
    peak_rate: float | None = None
    end_rate: float | None = None
    origins: dict[str, str] = Field(default_factory=dict)


class ImportRecord(Config):
    """`import.json`: what was imported, from where, and what was added or left out.

    `content` stands for weights, moments and position: a stage that loads the folder has it in its
    identity. Of a whole vision-language model `config` is the decoder's and `model` all of it; its
    towers lie in the folders of `tower_folders`, imported folders themselves.
    """

    kind: Literal["decoder", "encoder", "model"]
    source: str
    revision: str | None = None
    family: str
    config: Annotated[
        DecoderConfig | TransformersDecoderConfig | EncoderConfig, Field(discriminator="kind")
    ]
    model: VLMConfig | None = None
    vocabulary: dict[str, Any] | None = None
    position: Position | None = None
    dropped: tuple[str, ...] = ()
    has_moments: bool = False
    weights_digest: str
    content: str

    @property
    def origin(self) -> str:
        """The hub name or the file's own name, and the revision: what may be told to others."""
        path = Path(self.source)
        name = path.name if path.is_absolute() or path.exists() else self.source
        return name if self.revision is None else f"{name} at {self.revision}"


def read_import(folder: Path) -> ImportRecord:
    """The record of an imported folder.

    Raises FileNotFoundError if it is none, ValueError if its record cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no imported folder (it has no {RECORD}); make one with "
            f"midstream import SRC --out DIR"
        )
    try:
        return ImportRecord.model_validate(read_json(path))
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise ValueError(
            f"{path} cannot be read by this version ({fields}); import the checkpoint again"
        ) from None


def as_imported(folder: Path) -> Imported:
    """The value that stages name an imported folder by."""
    return Imported(folder=folder, content=read_import(folder).content)


def tower_folders(model: VLMConfig) -> tuple[str, ...]:
    """Where in the folder of an imported model its towers lie; nowhere for a map of patches."""
    match model.encoder:
        case FusedEncoder(towers=towers):
            return tuple(f"tower{number + 1}" for number in range(len(towers)))
        case EncoderConfig():
            return ("tower",)
    return ()


def load_model(folder: Path, data: Prepare) -> LoadModel:
    """The stage that loads an imported vision-language model; `data` must speak its tokens.

    Raises FileNotFoundError or ValueError as `read_import` does, ValueError for a folder that
    holds something else.
    """
    record = read_import(folder)
    model = record.model
    if model is None:
        raise ValueError(
            f"{folder} holds no whole vision-language model; import one with --part model"
        )
    assert model.encoder is not None, "it sees"
    if isinstance(model.encoder, PatchProjection):
        encoder: LoadEncoder | PatchProjection = model.encoder
    else:
        towers = tuple(as_imported(folder / name) for name in tower_folders(model))
        encoder = LoadEncoder(towers=towers, encoder=model.encoder)
    return LoadModel(
        data=data,
        checkpoint=as_imported(folder),
        encoder=encoder,
        decoder=model.decoder,
        projector=model.projector,
        attention=model.attention,
    )


def open_imported(imported: Imported) -> ImportRecord:
    """As `read_planned`, after checking all bytes of the folder; CorruptError for others."""
    verify(imported.folder)
    return read_planned(imported)


def read_planned(imported: Imported) -> ImportRecord:
    """The record of a stage's imported folder.

    Raises as `read_import`, and ValueError where the folder holds another import than was planned
    with.
    """
    record = read_import(imported.folder)
    if record.content != imported.content:
        raise ValueError(
            f"{imported.folder} holds {record.content}, the plan was made with {imported.content}; "
            "plan again, or import the same checkpoint again"
        )
    return record


# Lines and studies that a sentence names before it counts.
MOST_NAMES = 6


def is_lacking(imported: Imported) -> bool:
    """Whether a study was planned before the folder was there."""
    return imported.content.startswith(PLANNED)


def how_to_have(imported: Imported) -> str:
    """The folder, and the command that makes it where what it is made of is public."""
    folder = imported.folder
    if not imported.source:
        return f"{folder} (not public: import one of your own)"
    return f"{folder} (midstream import {imported.source} --out {folder})"


def what_can_run(study: AnyStudy) -> str | None:
    """Which lines or studies need no checkpoint that is missing; None where none is missing."""
    whole = {
        one.name: [name for name, result in one.named_results if not _lacks(result)]
        for one in study.studies
    }
    lines = {one.name: len(one.named_results) for one in study.studies}
    if all(len(whole[name]) == number for name, number in lines.items()):
        return None
    if len(whole) == 1:
        (names,) = whole.values()
        what, number = "lines and baselines", len(study.named_results)
    else:
        names = [name for name, own in whole.items() if len(own) == lines[name]]
        what, number = "studies", len(whole)
    if not names:
        return f"without the missing checkpoints none of the {number} {what} can be run"
    return (
        f"without the missing checkpoints {len(names)} of {number} {what} can be run: "
        f"{name_some(names, MOST_NAMES, '; ')}"
    )


def _lacks(result: Evaluate) -> bool:
    """Whether an evaluation rests on an imported model that is missing."""
    stages: list[Stage] = [result]
    while stages:
        stage = stages.pop()
        if isinstance(stage, LoadDecoder | LoadModel):
            return is_lacking(stage.checkpoint)
        stages += stage.parents
    return False
