"""What the data stages do: a world laid out, its tokenizer, and each source of it indexed."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from midstream.config import PocketWorld, PublicFolder, SmallReal, TokenizerFile, TrainedTokenizer
from midstream.core.identity import file_sha256, source_digest, source_folders, text_column
from midstream.core.storage import new_folder, write_bytes
from midstream.data.columns import Shard
from midstream.data.examples import END_OF_TEXT, SEPARATOR, TextCodec
from midstream.data.formats.records import (
    CaptionRecord,
    ConversationRecord,
    DocumentRecord,
    ReadOptions,
    Section,
    TextRecord,
)
from midstream.data.lengths import caption_facts, length_facts
from midstream.data.prepare_source import (
    SourcePlan,
    canonical_tokenizer,
    make_share,
    plan_source,
    prepare_source,
)
from midstream.data.shard_state import TaskShare, is_whole
from midstream.data.shard_workers import Progress
from midstream.data.shards import KINDS, read_unit, units_of
from midstream.data.sources import INDEX, Source
from midstream.worlds.pocket_world import write_pocket_world
from midstream.worlds.small_real import write_small_real

SECTIONS: dict[str, Section] = {kind: section for section, kind in KINDS.items()}
World = PocketWorld | SmallReal | PublicFolder


def prepare_world(world: PocketWorld | SmallReal, out: Path) -> dict[str, Any]:
    """Write a generated world's public files to `out/world`; returns its sources' names.

    Raises FileNotFoundError or ValueError for small real data that lack a file or hold others.
    """
    shutil.rmtree(out / "world", ignore_errors=True)
    with new_folder(out / "world") as temporary:
        if isinstance(world, PocketWorld):
            write_pocket_world(world, temporary)
        else:
            write_small_real(world, temporary)
    return {"holds": sorted(source_folders(out / "world"))}


def prepare_tokenizer(
    tokenizer: TrainedTokenizer | TokenizerFile,
    world: World,
    root: Path,
    names: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """Read the tokenizer's file, or train a byte-level BPE on the sources `names` of the world at
    `root`, and save it as `out/tokenizer.json`; returns its size and sha256.

    Prepared sources are passed over: only their tokens are there. Raises FileNotFoundError or
    ValueError for a file that is gone or another, and for a source that is gone or changed.
    """
    if isinstance(world, PublicFolder):
        for name in names:
            _check_unchanged(world, name, _folder_of(root, name)[1])
    codec = _open_tokenizer(tokenizer, root, names)
    write_bytes(tokenizer_path(out), canonical_tokenizer(codec))
    return {"vocab_size": codec.size, "tokenizer_sha256": file_sha256(tokenizer_path(out))}


def prepare_world_source(
    world: World,
    root: Path,
    name: str,
    tokenizer_file: Path,
    out: Path,
    *,
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Index the source `name` of the world at `root` in `out/source`; returns what it holds.

    A source that `midstream prepare` made stays where it is, if it was made with this tokenizer.
    What an earlier try finished is kept. Raises FileNotFoundError or ValueError that names the file
    and the record for what is missing, malformed, or changed since it was planned.
    """
    kind, folder = _folder_of(root, name)
    if isinstance(world, PublicFolder):
        _check_unchanged(world, name, folder)
    if not is_prepared(folder):
        prepare_source(
            _plan(world, root, name, tokenizer_file, out),
            workers=workers,
            max_reject_fraction=_max_reject_fraction(world),
            progress=progress,
        )
    source = open_source(root, name, out)
    if is_prepared(folder):
        _check_prepared(source, kind, TextCodec.from_file(tokenizer_file), tokenizer_file)
    return _summary(source)


def make_world_share(
    world: World,
    root: Path,
    name: str,
    tokenizer_file: Path,
    out: Path,
    *,
    share: TaskShare,
    workers: int,
    progress: Progress,
) -> dict[str, int]:
    """Make a share of the shards that `prepare_world_source` takes in; returns their numbers.

    Raises what `plan_source` and `make_share` do. Whether the data are those that were planned is
    asked by `prepare_world_source`.
    """
    if is_prepared(_folder_of(root, name)[1]):
        return {"kept": 0, "new": 0, "late": 0, "left": 0}
    return make_share(
        _plan(world, root, name, tokenizer_file, out, share),
        workers=workers,
        max_reject_fraction=_max_reject_fraction(world),
        progress=progress,
    )


def tokenizer_path(out: Path) -> Path:
    """The tokenizer's file in the folder of its stage."""
    return out / "tokenizer.json"


def open_codec(out: Path) -> TextCodec:
    """The tokenizer of a finished stage."""
    return TextCodec.from_file(tokenizer_path(out))


def open_source(root: Path, name: str, out: Path) -> Source:
    """A source of the world at `root`, prepared there, or in the folder `out` of its stage."""
    _, folder = _folder_of(root, name)
    return Source(name, folder) if is_prepared(folder) else Source(name, out / "source", root)


def is_prepared(folder: Path) -> bool:
    """Whether a world's source is one that `midstream prepare` has finished."""
    return (folder / INDEX).is_file()


def language_of(root: Path, names: Sequence[str]) -> Iterator[str]:
    """Every text, caption and turn of some sources' public files, for training a tokenizer."""
    for name in names:
        kind, folder = _folder_of(root, name)
        if is_prepared(folder):
            continue
        section = SECTIONS[kind]
        options = _options(root, name)
        for unit in units_of(section, [str(folder)], options):
            for item in read_unit(section, unit, options):
                if isinstance(item, ConversationRecord):
                    yield from (f"{turn.asked} {turn.reply}" for turn in item.turns)
                elif isinstance(item, TextRecord | CaptionRecord | DocumentRecord):
                    yield from item.texts


def _plan(
    world: World,
    root: Path,
    name: str,
    tokenizer_file: Path,
    out: Path,
    share: TaskShare | None = None,
) -> SourcePlan:
    """What a source of a world's public files is prepared by."""
    kind, folder = _folder_of(root, name)
    return plan_source(
        SECTIONS[kind],
        [str(folder)],
        out / "source",
        tokenizer_file=tokenizer_file,
        options=_options(root, name),
        root=str(root),
        validation_fraction=0.0 if isinstance(world, SmallReal) else world.validation_fraction,
        share=share,
    )


def _options(root: Path, name: str) -> ReadOptions:
    column = text_column(root, name)
    return ReadOptions(text_key=column) if column else ReadOptions()


def _max_reject_fraction(world: World) -> float:
    return world.max_reject_fraction if isinstance(world, PublicFolder) else 0.0


def _folder_of(root: Path, name: str) -> tuple[str, Path]:
    listed = source_folders(root)
    if name not in listed:
        raise FileNotFoundError(f"{root} has no source {name!r}; it has {', '.join(listed)}")
    return listed[name]


def _check_unchanged(world: PublicFolder, name: str, folder: Path) -> None:
    planned = None if world.fingerprint is None else world.fingerprint.sources.get(name)
    found = source_digest(world.root, name, folder)
    if planned is None or planned.digest != found:
        had = "nothing" if planned is None else planned.digest
        raise ValueError(
            f"{folder} has fingerprint {found}, the plan was made for {had}: the data changed; "
            "plan again"
        )


def _open_tokenizer(
    tokenizer: TrainedTokenizer | TokenizerFile, root: Path, names: Sequence[str]
) -> TextCodec:
    if isinstance(tokenizer, TokenizerFile):
        if not tokenizer.path.is_file():
            raise FileNotFoundError(f"tokenizer file {tokenizer.path} does not exist")
        if file_sha256(tokenizer.path) != tokenizer.sha256:
            raise ValueError(f"{tokenizer.path} has another sha256 than the plan says; plan again")
        codec = TextCodec.from_file(tokenizer.path)
        if tokenizer.begin_of_text is None and codec.begin_of_text is not None:
            token = codec.tokenizer.id_to_token(codec.begin_of_text)
            raise ValueError(
                f"{tokenizer.path} begins each text with {token!r} by its own rule; say so in the "
                f"study: TokenizerFile.read(path), or begin_of_text={token!r}, or "
                'begin_of_text="" to go without'
            )
        return codec.beginning_with(tokenizer.begin_of_text)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokenizer.vocab_size,
        special_tokens=[END_OF_TEXT, SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(language_of(root, names), trainer)
    return TextCodec(bpe)


def _check_prepared(source: Source, kind: str, codec: TextCodec, tokenizer_file: Path) -> None:
    index, digest = source.index, file_sha256(tokenizer_file)
    if index["kind"] != kind:
        raise ValueError(
            f"{source.folder} is prepared as {index['kind']} and lies among the sources of {kind}; "
            "move it to their folder"
        )
    found, size = index["tokenizer"]["digest"], index["tokenizer"]["vocab_size"]
    if (found, size) != (digest, codec.size):
        raise ValueError(
            f"source {source.name!r} in {source.folder} is prepared with the tokenizer {found} of "
            f"{size:,} ids, the plan has {digest} of {codec.size:,}; prepare it with that one, or "
            f"plan with the tokenizer file {source.folder / 'tokenizer.json'}"
        )
    if source.begin_of_text != codec.begin_of_text:
        had, has = (
            "no token" if number is None else repr(codec.tokenizer.id_to_token(number))
            for number in (source.begin_of_text, codec.begin_of_text)
        )
        raise ValueError(
            f"the examples of source {source.name!r} in {source.folder} begin with {had}, those "
            f"of the plan with {has}; prepare it again"
        )
    for shard in index["shards"]:
        if not is_whole(place := source.folder / "shards" / shard["name"]):
            raise ValueError(
                f"{place} is not whole, or not there; copy the source again, or give the "
                "`midstream prepare` again that made it"
            )


def _summary(source: Source) -> dict[str, Any]:
    """A source's counts, as `results.json` of its stage holds them."""
    index = source.index
    names = ("num_targets", "lengths", "captions")
    counted: dict[str, Any] = {name: index[name] for name in names if name in index}
    if len(counted) < len(names):
        # Prepared before the index said so: its columns do.
        folders = [source.folder / "shards" / shard["name"] for shard in index["shards"]]
        counted = length_facts(map(Shard, folders)) | caption_facts(map(Shard, folders))
    train, validation = index["train"], index["validation"]
    return {
        "source": source.name,
        "kind": index["kind"],
        "num_examples": train["examples"],
        "num_tokens": train["tokens"],
        "num_images": train["images"],
        "distinct_images": index["distinct_images"],
        "validation": validation,
        "records": index["records"],
        "rejects": index["rejects"],
        "dropped_turns": index.get("dropped_turns", {}),
        "unread": index.get("unread", {}),
        "longest": index["longest"],
        "fingerprint": index["fingerprint"],
        "seen": index.get("seen", {}),
        **counted,
    }
