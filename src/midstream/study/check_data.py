"""What a study asks of its data against what the data hold: sources, budgets, lengths, captions.

Of a prepared source everything is known. Of one that is not, what the recipe expects of it is taken
for an estimate, and what speaks against that is doubtful rather than wrong.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from midstream.budgets import names_of, needs_of, passes_needed
from midstream.config import (
    Amounts,
    Caption,
    Mixture,
    PublicFolder,
    SmallReal,
    TokenizerFile,
    TrainedTokenizer,
)
from midstream.identity import file_sha256
from midstream.source_files import is_hidden
from midstream.storage import read_json
from midstream.study.ledger import Ledger
from midstream.study.problem import Level, Problem
from midstream.study.stage import (
    PLANNED,
    Continue,
    Finetune,
    Prepare,
    Pretrain,
    Stage,
    Trained,
    TrainEncoder,
)

# Folders of a world that hold sources, and what `midstream prepare` leaves in one.
SECTIONS, INDEX = ("text", "captions", "instruct"), "source.json"


@dataclass(frozen=True)
class Counted:
    """A source as far as it is known; `tokens` without patches, `images` examples with a picture.

    `longest` is, of examples without ("plain") and with ("image") a picture, the longest one's
    "tokens" and "where" it stands. `captions` counts the kinds of caption, None where nobody did.
    `expected`: nothing was counted, the recipe says so.
    """

    kind: str
    tokens: int
    examples: int
    images: int
    longest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    captions: Mapping[str, int] | None = None
    expected: bool = False


@dataclass(frozen=True)
class Known:
    """The sources of a world: those of which something is known, and the names of all of them
    (None where nobody knows them yet)."""

    sources: Mapping[str, Counted]
    names: frozenset[str] | None


def data_problems(stages: Iterable[Stage], ledger: Ledger) -> Iterator[Problem]:
    """What the stages ask of their data that these do not hold."""
    worlds: dict[str, Known] = {}
    for stage in stages:
        if isinstance(stage, Prepare):
            yield from _inputs(stage)
        elif isinstance(stage, Pretrain | Continue | Finetune | TrainEncoder):
            data = stage.data
            if data.name not in worlds:
                worlds[data.name] = known_sources(data, ledger)
            if isinstance(stage, TrainEncoder):
                yield from _encoder_data(stage, worlds[data.name])
            else:
                yield from _training_data(stage, worlds[data.name])
        if isinstance(stage, Pretrain):
            yield from _vocabulary(stage)


def known_sources(data: Prepare, ledger: Ledger) -> Known:
    """What is known of a world's sources before, or after, they are prepared."""
    world = data.world
    root = world.root if isinstance(world, PublicFolder) else None
    if ledger.is_done(data):
        found = ledger.results(data)["sources"]
        folder = ledger.folder(data) / "prepared" / "sources"
        counted = {name: _of_results(one, folder / name) for name, one in found.items()}
        if root is not None:
            counted |= _prepared(root)
        return Known(counted, frozenset(counted))
    expected = {
        one.name: Counted(one.kind, one.num_tokens, one.num_examples, one.num_images, expected=True)
        for one in data.expected
    }
    if not isinstance(world, PublicFolder) or root is None or not root.is_dir():
        return Known(expected, frozenset(expected) or None)
    if world.fingerprint.startswith(PLANNED):
        return Known(expected, frozenset(expected) or None)
    names = frozenset(folder.name for folder in _folders(root))
    return Known({n: c for n, c in (expected | _prepared(root)).items() if n in names}, names)


def _folders(root: Path) -> list[Path]:
    """The sources' folders of a user's world."""
    found = (path for section in SECTIONS for path in sorted(root.glob(f"{section}/*")))
    return [path for path in found if path.is_dir() and not is_hidden(path.name)]


def _prepared(root: Path) -> dict[str, Counted]:
    """The sources of a user's world that `midstream prepare` has finished."""
    return {
        folder.name: _of_index(read_json(folder / INDEX))
        for folder in _folders(root)
        if (folder / INDEX).is_file()
    }


def _of_index(index: Mapping[str, Any]) -> Counted:
    train = index["train"]
    return Counted(
        kind=index["kind"],
        tokens=train["tokens"],
        examples=train["examples"],
        images=train["images"],
        longest=index["longest"],
        captions=index.get("captions"),
    )


def _of_results(source: Mapping[str, Any], folder: Path) -> Counted:
    """From a source's part of a preparation's results, and the index that lies beside them."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    return Counted(
        kind=source["kind"],
        tokens=source["num_tokens"],
        examples=source["num_examples"],
        images=source["num_images"],
        longest=source.get("longest") or index.get("longest", {}),
        captions=source.get("captions"),
    )


# ------------------------------------------------------------------------------------- one check


def _inputs(stage: Prepare) -> Iterator[Problem]:
    """Folders and files that were there when the study was planned."""
    world, tokenizer = stage.world, stage.tokenizer
    if (
        isinstance(world, PublicFolder | SmallReal)
        and not world.fingerprint.startswith(PLANNED)
        and not world.root.is_dir()
    ):
        yield Problem(
            f"data folder {world.root} does not exist",
            "give the folder that holds it",
            (stage.name,),
        )
    if not isinstance(tokenizer, TokenizerFile) or tokenizer.sha256.startswith(PLANNED):
        return
    if not tokenizer.path.is_file():
        yield Problem(
            f"tokenizer file {tokenizer.path} does not exist", "give its path", (stage.name,)
        )
    elif file_sha256(tokenizer.path) != tokenizer.sha256:
        yield Problem(
            f"{tokenizer.path} has another sha256 than the plan says", "plan again", (stage.name,)
        )


def _vocabulary(stage: Pretrain) -> Iterator[Problem]:
    tokenizer, size = stage.data.tokenizer, stage.decoder.vocab_size
    if isinstance(tokenizer, TrainedTokenizer) and tokenizer.vocab_size > size:
        yield Problem(
            f"the tokenizer is trained to {tokenizer.vocab_size:,} ids, the decoder has {size:,}",
            "raise the decoder's vocab_size, or lower the tokenizer's",
            (stage.name,),
        )


def _absent(name: str, known: Known, data: Prepare, stage: Stage) -> Iterator[Problem]:
    if known.names is None or name in known.names:
        return
    near = get_close_matches(name, known.names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    there = ", ".join(sorted(known.names))
    world = data.world
    add = f", or put its folder into {world.root}" if isinstance(world, PublicFolder) else ""
    yield Problem(
        f"no source {name!r} in the data{hint}", f"choose from {there}{add}", (stage.name,)
    )


def _encoder_data(stage: TrainEncoder, known: Known) -> Iterator[Problem]:
    training = stage.training
    yield from _absent(training.source, known, stage.data, stage)
    source = known.sources.get(training.source)
    if source is None:
        return
    yield from _captions(training.source, training.caption, source, stage)
    for found in source.longest.values():
        # The separator before a caption is not given to the tower.
        if (length := found["tokens"] - 1) > training.max_text_tokens:
            yield Problem(
                f"source {training.source!r}, {found['where']}: the caption has {length} tokens, "
                f"the text tower takes {training.max_text_tokens}",
                "raise max_text_tokens",
                (stage.name,),
            )


def _training_data(stage: Trained, known: Known) -> Iterator[Problem]:
    budget = stage.training.budget
    names = names_of(budget)
    for name in names:
        yield from _absent(name, known, stage.data, stage)
    sources = {name: known.sources[name] for name in names if name in known.sources}
    encoder = stage.model.encoder
    patches = 0 if encoder is None else encoder.num_patches
    asked: dict[str, Caption] = {}
    if isinstance(budget, Mixture):
        asked = {share.source: share.caption for share in budget.shares}
    elif isinstance(budget, Amounts):
        asked = {amount.source: amount.caption for amount in budget.amounts}
    for name, source in sources.items():
        yield from _captions(name, asked.get(name, "original"), source, stage)
        yield from _longest(name, source, patches, stage)
    yield from _budget(sources, patches, stage)
    whole = [name for name, source in sources.items() if source.kind != "text"]
    if stage.training.rows.layout == "joined" and whole:
        yield Problem(
            f"the joined layout is for text only, {', '.join(whole)} are none",
            "choose filled or padded",
            (stage.name,),
        )
    blind = len(sources) == len(names) and not any(one.images for one in sources.values())
    if stage.training.freeze_decoder and blind:
        yield Problem(
            f"the decoder is frozen and {', '.join(names)} hold no picture, so that nothing would "
            "be learnt",
            "add a source that does",
            (stage.name,),
        )


def _budget(sources: Mapping[str, Counted], patches: int, stage: Trained) -> Iterator[Problem]:
    training = stage.training
    texts = {name for name, source in sources.items() if source.kind == "text"}
    for need in needs_of(training.budget, training.rows.row_length, texts):
        if (source := sources.get(need.source)) is None:
            continue
        tokens = source.tokens + patches * source.images
        level: Level = "doubtful" if source.expected else "wrong"
        holds = "is expected to hold" if source.expected else "holds"
        if not source.examples or not tokens:
            yield Problem(
                f"source {need.source!r} holds no example", "leave it out", (stage.name,), level
            )
        passes = passes_needed(need, training.budget, tokens=tokens, examples=source.examples)
        if passes is None or not tokens:
            continue
        have = tokens if need.unit == "tokens" else source.examples
        counted = f", {patches} patches a picture among them" if patches and source.images else ""
        yield Problem(
            f"source {need.source!r} {holds} {have:,} {need.unit}{counted}, the plan needs "
            f"{need.amount:,}",
            f"raise max_epochs to {passes:,} or lower the budget",
            (stage.name,),
            level,
            f"budget {stage.data.name} {need.source} {patches}",
            passes,
        )


def _longest(name: str, source: Counted, patches: int, stage: Trained) -> Iterator[Problem]:
    rows = stage.training.rows
    cut = (rows.overflow or ("cut" if isinstance(stage, Finetune) else "refuse")) == "cut"
    if source.kind == "text" or cut:
        return
    for shown, found in source.longest.items():
        length = found["tokens"] + (patches if shown == "image" else 0)
        if length > rows.row_length:
            yield Problem(
                f"source {name!r}, {found['where']}: {length} positions do not fit into a row of "
                f"{rows.row_length}",
                "raise row_length, or leave such records out (midstream prepare --max-tokens)",
                (stage.name,),
                key=f"longest {stage.data.name} {name} {rows.row_length}",
                weight=length,
            )


def _captions(name: str, asked: Caption, source: Counted, stage: Stage) -> Iterator[Problem]:
    # A random caption is one of the synthetic ones.
    kind = "original" if asked == "original" else "synthetic"
    if source.captions is None or source.captions.get(kind):
        return
    held = ", ".join(one for one, number in source.captions.items() if number) or "no"
    yield Problem(
        f"source {name!r} has {held} captions, caption={asked!r} asks for {kind} ones",
        "prepare it from files that have them, or choose another caption",
        (stage.name,),
    )
