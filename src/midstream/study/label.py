"""What a stage is in words, with a short handle: "image-text, text 80 %, seed 7 · 018541f".

Folders keep their long names (`docs/store.md`).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from pydantic import BaseModel

from midstream.config import (
    Amount,
    Amounts,
    AnyEncoderConfig,
    Epochs,
    FewShot,
    FusedEncoder,
    Mixture,
    PatchProjection,
    PublicFolder,
    Share,
    TokenizerFile,
    Training,
    World,
)
from midstream.core.identity import Placement
from midstream.core.tokens import counted, quantity
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    FromScratch,
    FuseEncoders,
    InitFrom,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    PrepareSource,
    PrepareTokenizer,
    PrepareWorld,
    Pretrain,
    Stage,
    StageBase,
    StartText,
    TrainEncoder,
)

DIGITS = 7
MARK = " \N{MIDDLE DOT} "
# What a kind of stage is called among others.
KINDS = {
    "prepare_world": "world",
    "prepare_tokenizer": "tokenizer",
    "prepare_source": "source",
    "train_encoder": "encoder",
    "load_encoder": "imported encoder",
    "fuse_encoders": "encoders side by side",
    "load_decoder": "imported text model",
    "load_model": "imported model that sees",
    "pretrain": "text",
    "continue": "image-text",
    "finetune": "fine-tuning",
    "evaluate": "evaluation",
}
# Of the values that tell stages of the same words apart, no more are named.
MAX_DIFFERENCES = 3
# Longer values are cut.
_VALUE_LENGTH = 32


def label(stage: Stage) -> str:
    """What the stage is, and its handle: "image-text, text 80 %, seed 7 · 018541f"."""
    return joined(words(stage), stage.identity)


def labels(stages: Sequence[Stage]) -> dict[str, str]:
    """By folder name, the labels of one study's stages: no two are alike, in words or handle.

    Where stages have the same words, the values of their configurations that differ are added.
    """
    length = shortest([stage.identity for stage in stages])
    groups: dict[tuple[str, ...], list[Stage]] = defaultdict(list)
    for stage in stages:
        groups[_parts(stage)].append(stage)
    found: dict[str, str] = {}
    for parts, alike in groups.items():
        for stage, more in zip(alike, _differences(alike), strict=True):
            seed = [part for part in parts[-1:] if part.startswith("seed ")]
            head = parts[: len(parts) - len(seed)]
            text = ", ".join((*head, *more, *seed))
            found[stage.name] = joined(text, stage.identity, length)
    return {stage.name: found[stage.name] for stage in stages}


def digits_of(folder: str) -> str:
    """The identity that a stage's folder name ends with."""
    return folder.rpartition("-")[2]


def joined(text: str, identity: str, digits: int = DIGITS) -> str:
    """Words, and the first digits of an identity, by which commands know the stage."""
    return f"{text}{MARK}{identity[:digits]}"


def shortened(text: str, width: int) -> str:
    """A label in so many columns: the words are cut, the handle stays as long as there is room."""
    if len(text) <= width:
        return text
    said, _, short = text.rpartition(MARK)
    room = width - len(MARK) - len(short) - 1
    return f"{said[:room].rstrip(' ,')}…{MARK}{short}" if room > 0 else short[:width]


def kind_words(kind: str) -> str:
    """What stages of a kind are called."""
    return KINDS.get(kind, kind.replace("_", " "))


def shortest(identities: Sequence[str]) -> int:
    """How many first digits tell all identities apart, `DIGITS` at least."""
    distinct = set(identities)
    longest = max(map(len, distinct), default=DIGITS)
    return next(
        length
        for length in range(DIGITS, max(longest, DIGITS) + 1)
        if len({one[:length] for one in distinct}) == len(distinct)
    )


def words(stage: Stage) -> str:
    """What the stage is, without its handle."""
    return ", ".join(_parts(stage))


def _parts(stage: Stage) -> tuple[str, ...]:
    match stage:
        case PrepareWorld():
            return (f"{_world(stage.world)} laid out",)
        case PrepareTokenizer():
            return (_tokenizer(stage),)
        case PrepareSource():
            return (f"source {stage.source}",)
        case TrainEncoder():
            name = _encoder(stage.encoder)
            return (f"encoder {name}", stage.training.source, f"seed {stage.training.seed}")
        case LoadEncoder():
            return (f"imported encoder {_encoder(stage.encoder)}",)
        case FuseEncoders():
            return (f"encoders {_encoder(stage.encoder)}",)
        case LoadDecoder():
            return (f"imported {_place(stage)}",)
        case LoadModel():
            return (_imported_model(stage),)
        case Pretrain():
            return ("text", _amount(stage.training), f"seed {stage.training.seed}")
        case Continue():
            return (*_image_text(stage), *_pixels(stage), f"seed {stage.training.seed}")
        case Finetune():
            amount = _amount(stage.training)
            seed = f"seed {stage.training.seed}"
            return ("fine-tuning", *_origin(stage), *_pixels(stage), amount, seed)
        case Evaluate():
            return _evaluation(stage)
    return (kind_words(stage.kind),)


def _evaluation(stage: Evaluate) -> tuple[str, ...]:
    of = stage.of
    match of:
        case Pretrain():
            share = _percent(stage.completion)
            return (f"evaluation of text at {share}", f"seed {of.training.seed}")
        case LoadDecoder():
            return (f"evaluation of imported {_place(of)}",)
        case LoadModel():
            return (f"evaluation of {_imported_model(of)}",)
        case Continue():
            return ("evaluation before fine-tuning", *_origin(of), _parts(of)[-1])
    return ("evaluation", *_parts(of)[1:])


def _image_text(stage: Continue) -> tuple[str, ...]:
    """Its kind, with which part of it this is where it goes on from another one, and its start."""
    number, first = 1, stage
    while isinstance(first.start, InitFrom) and isinstance(first.start.stage, Continue):
        number, first = number + 1, first.start.stage
    part = () if number == 1 else (f"part {number}",)
    return ("image-text", *part, *_origin(first))


def _pixels(stage: Continue | Finetune) -> tuple[str, ...]:
    return () if stage.image_size is None else (f"{stage.image_size} pixels",)


def _origin(stage: Continue | Finetune) -> tuple[str, ...]:
    """Where in a text run the first picture was seen."""
    if isinstance(stage, Finetune):
        if isinstance(stage.start, LoadModel):
            return (_imported_model(stage.start),)
        if not isinstance(stage.start, StartText):
            return _image_text(stage.start)[1:]
        return ("no image-text", _place(stage.start.stage, stage.start.completion))
    if isinstance(stage.start, FromScratch):
        return ("text 0 %",)
    if isinstance(stage.start, ContinueFrom):
        return (_place(stage.start.stage, stage.start.completion),)
    if isinstance(stage.start.stage, LoadModel):
        return (_imported_model(stage.start.stage),)
    return _image_text(stage)[1:]


def _imported_model(stage: LoadModel) -> str:
    return f"imported model {stage.checkpoint.folder.name}"


def _place(stage: Pretrain | LoadDecoder, completion: float = 1.0) -> str:
    """Where in its run a text model stands; of an imported one its folder says so: `text/80`."""
    if isinstance(stage, Pretrain):
        return f"text {_percent(completion)}"
    name = stage.checkpoint.folder.name
    return f"text {name} %" if name.isdecimal() and int(name) <= 100 else f"text of {name}"


def _world(world: World) -> str:
    if isinstance(world, PublicFolder):
        return world.root.name
    return f"{world.kind.replace('_', ' ')} world"


def _tokenizer(stage: PrepareTokenizer) -> str:
    if isinstance(stage.tokenizer, TokenizerFile):
        return f"tokenizer {stage.tokenizer.path.name}"
    return f"tokenizer of {stage.tokenizer.vocab_size:,} tokens"


def _encoder(encoder: AnyEncoderConfig) -> str:
    match encoder:
        case FusedEncoder():
            return " + ".join(tower.family for tower in encoder.towers)
        case PatchProjection():
            return "patches"
    return encoder.family


def _amount(training: Training) -> str:
    budget = training.budget
    match budget:
        case Epochs():
            return counted(budget.epochs, "epoch")
        case Mixture():
            return f"{quantity(budget.total_tokens)} tokens"
        case Amounts():
            tokens = sum(amount.tokens or 0 for amount in budget.amounts)
            passes = {amount.epochs for amount in budget.amounts if amount.epochs is not None}
            said = [f"{quantity(tokens)} tokens"] if tokens else []
            return " and ".join([*said, *(counted(number, "epoch") for number in sorted(passes))])


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


_Path = tuple[str, ...]
# A field in which stages differ: its path, and for each of them what is said of it.
_Field = tuple[_Path, list[str]]


def _differences(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    """For each stage the few values that tell it from the others of the same words."""
    fields = sorted(_unequal((), list(stages)), key=lambda field: len(field[0]))
    chosen: list[tuple[str, ...]] = [() for _ in stages]
    _split(list(range(len(stages))), fields, chosen)
    return chosen


def _split(members: list[int], fields: Sequence[_Field], chosen: list[tuple[str, ...]]) -> None:
    """Name the field that tells most of the members apart (the nearest of equals); then so on
    among those whom it leaves alike.
    """
    if len(members) == 1 or not fields or len(chosen[members[0]]) == MAX_DIFFERENCES:
        return
    best = max(fields, key=lambda field: len({field[1][member] for member in members}))
    groups: dict[str, list[int]] = defaultdict(list)
    for member in members:
        groups[best[1][member]].append(member)
    if len(groups) == 1:
        return
    for text, own in groups.items():
        for member in own:
            chosen[member] = (*chosen[member], text)
        _split(own, fields, chosen)


def _unequal(path: _Path, values: list[Any]) -> Iterator[_Field]:
    """The fields in which values of one kind differ; `Placement` makes no difference."""
    keys = [value.identity if isinstance(value, StageBase) else value for value in values]
    if all(key == keys[0] for key in keys):
        return
    if all(isinstance(value, BaseModel) and type(value) is type(values[0]) for value in values):
        for name, info in type(values[0]).model_fields.items():
            if Placement not in info.metadata:
                yield from _unequal((*path, name), [getattr(value, name) for value in values])
    elif all(isinstance(value, tuple) for value in values):
        yield from _unequal_parts(path, values)
    else:
        yield path, [_told(path, value) for value in values]


def _unequal_parts(path: _Path, values: list[tuple[Any, ...]]) -> Iterator[_Field]:
    """Shares and amounts source by source; of other lists what not all of them have."""
    every = list(chain.from_iterable(values))
    if all(isinstance(item, Share | Amount) for item in every):
        by_source = [{item.source: item for item in value} for value in values]
        for source in dict.fromkeys(item.source for item in every):
            own = [one.get(source) for one in by_source]
            place, there = (*path, source), [item for item in own if item is not None]
            yield from _unequal(place, [_measure(item) for item in own])
            if len({item.pool for item in there}) > 1:
                yield place, [_pool(source, item) for item in own]
            if len({item.caption for item in there}) > 1:
                kinds = ("no" if item is None else item.caption for item in own)
                yield place, [f"{source} {kind} captions" for kind in kinds]
        return
    some = [item for item in every if any(item not in value for value in values)]
    told = ["+".join(_short(item) for item in value if item in some) for value in values]
    if not some:  # the same in another order
        told = ["+".join(_short(item) for item in value) for value in values]
    lists = zip(told, values, strict=True)
    yield path, [_told(path, text or ("fewer" if value else None)) for text, value in lists]


def _pool(source: str, item: Share | Amount | None) -> str:
    if item is None:
        return f"no {source}"
    return f"all of {source}" if item.pool is None else f"{item.pool:,} of {source}"


def _measure(item: Share | Amount | None) -> str:
    if item is None:
        return "0 %"
    if isinstance(item, Share):
        return _percent(item.share)
    if item.tokens is not None:
        return f"{quantity(item.tokens)} tokens"
    return counted(item.epochs or 0, "epoch")


def _told(path: _Path, value: Any) -> str:
    name = path[-1].replace("_", " ")
    # The field that says which kind of thing stands here is about that thing.
    if path[-1] == "kind" and len(path) > 1:
        name = path[-2].replace("_", " ")
    if value is None or value is False:
        return f"no {name}"
    if value is True or isinstance(value, StageBase):
        return name if value is True else _short(value)
    if name == "total tokens":
        return f"{quantity(value)} tokens"
    return f"{name} {_short(value)}"


def _short(value: Any) -> str:
    match value:
        case (
            TrainEncoder()
            | LoadEncoder()
            | FuseEncoders()
            | LoadDecoder()
            | LoadModel()
            | Pretrain()
        ):
            text = _parts(value)[0]
        case float():
            text = f"{value:g}"
        case FewShot():
            text = f"{value.num_shots}"
        case BaseModel():
            text = str(getattr(value, "kind", type(value).__name__)).replace("_", " ")
        case Mapping():
            text = "+".join(f"{key}={_short(item)}" for key, item in value.items()) or "none"
        case _:
            text = str(value)
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 1] + "…"
