"""A Prepare stage: a world laid out, its tokenizer, and every source of it indexed."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from midstream.config import (
    PocketWorld,
    PublicFolder,
    SmallReal,
    TokenizerFile,
    TrainedTokenizer,
)
from midstream.data.examples import END_OF_TEXT, SEPARATOR, TextCodec
from midstream.data.formats.records import (
    CaptionRecord,
    ConversationRecord,
    ReadOptions,
    Section,
    TextRecord,
)
from midstream.data.length_facts import length_facts
from midstream.data.preparation.records import read_unit, units_of
from midstream.data.preparation.source import canonical_tokenizer, prepare_source
from midstream.data.preparation.workers import Progress
from midstream.data.sources import INDEX, Shard, Source
from midstream.data.worlds.pocket import write_pocket_world
from midstream.data.worlds.small_real import write_small_real
from midstream.identity import file_sha256, world_fingerprint
from midstream.storage import new_folder, read_json, write_bytes, write_json

KINDS = {"text": "text", "captions": "caption", "instruct": "instruct"}
SECTIONS: dict[str, Section] = {
    "text": "text",
    "caption": "captions",
    "instruct": "conversations",
}
PLAIN = ReadOptions()
World = PocketWorld | SmallReal | PublicFolder


def prepare(
    world: World,
    tokenizer: TrainedTokenizer | TokenizerFile,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Lay the world out, make its tokenizer, index every source.

    Writes `world/` (generated worlds) and, under `prepared/`, `tokenizer.json` and `sources/`;
    returns `results.json` of a Prepare stage, which alone says that all of it is there: what a run
    that was ended has finished is kept by the next one. Sources of a user's folder that are
    prepared already stay where they are. Raises FileNotFoundError or ValueError that names the file
    and the record for what is missing or malformed, or made for another tokenizer.
    """
    root = world_folder(world, out)
    if isinstance(world, PublicFolder):
        check_fingerprint(root, world.fingerprint)
    else:
        progress(0.0, "writing the world")
        _lay_out(world, out)
    found = source_folders(root)
    progress(0.3, "tokenizer")
    options = ReadOptions(caption=world.caption if isinstance(world, PublicFolder) else "original")
    codec = make_codec(tokenizer, root, _tokenizer_path(out), options)
    sha256 = file_sha256(_tokenizer_path(out))
    ready = {name: folder for name, (_, folder) in found.items() if is_prepared(folder)}
    for name, folder in ready.items():
        _check_prepared(Source(name, folder), found[name][0], codec, sha256)
    _remove_others(out, found.keys() - ready.keys())
    summaries = {}
    for number, (name, (kind, folder)) in enumerate(found.items()):
        tell = partial(_tell, progress, number, len(found), name)
        if name in ready:
            tell(1.0, "is prepared")
            summaries[name] = _summary(Source(name, folder))
            continue
        tell(0.0, "")
        _prepare_folder(world, kind, folder, out, options, tell)
        summaries[name] = _summary(Source(name, _sources(out) / name))
    return {"sources": summaries, "vocab_size": codec.size, "tokenizer_sha256": sha256}


def world_folder(world: World, out: Path) -> Path:
    """Where a world's public files lie: the user's folder, or inside the stage `out`."""
    return world.root if isinstance(world, PublicFolder) else out / "world"


def open_codec(out: Path) -> TextCodec:
    """The tokenizer of a finished preparation."""
    return TextCodec.from_file(_tokenizer_path(out))


def open_sources(world: World, out: Path) -> dict[str, Source]:
    """The indexed sources of a finished preparation, by name."""
    root = world_folder(world, out)
    found = {
        name: Source(name, folder)
        if is_prepared(folder)
        else Source(name, _sources(out) / name, root)
        for name, (_, folder) in source_folders(root).items()
    }
    return dict(sorted(found.items()))


def is_prepared(folder: Path) -> bool:
    """Whether a world's source is one that `midstream prepare` has finished."""
    return (folder / INDEX).is_file()


def check_fingerprint(root: Path, expected: str) -> None:
    """Raises ValueError if the bytes under `root` are others than those that were planned with."""
    found = world_fingerprint(root)
    if found != expected:
        raise ValueError(
            f"{root} has fingerprint {found}, the plan was made for {expected}: the data changed; "
            "plan again"
        )


def source_folders(root: Path) -> dict[str, tuple[str, Path]]:
    """Kind and folder of each source of a world; ValueError for a name that is used twice."""
    if not root.is_dir():
        raise FileNotFoundError(f"world folder {root} does not exist")
    found: dict[str, tuple[str, Path]] = {}
    for section, kind in KINDS.items():
        for folder in sorted(path for path in root.glob(f"{section}/*") if path.is_dir()):
            if folder.name in found:
                raise ValueError(f"{folder}: the name {folder.name!r} is used by another source")
            found[folder.name] = (kind, folder)
    if not found:
        raise FileNotFoundError(
            f"{root} holds no source under {', '.join(KINDS)}; see docs/data.md"
        )
    return found


def make_codec(
    tokenizer: TrainedTokenizer | TokenizerFile,
    root: Path,
    path: Path,
    options: ReadOptions = PLAIN,
) -> TextCodec:
    """Train a byte-level BPE on the world's language or read the file named, and save it."""
    codec = _open_tokenizer(tokenizer, root, options)
    write_bytes(path, canonical_tokenizer(codec))
    return codec


def language_of(root: Path, options: ReadOptions = PLAIN) -> Iterator[str]:
    """Every text, caption and turn of a world's public files, for training a tokenizer."""
    for kind, folder in source_folders(root).values():
        if is_prepared(folder):
            continue
        section = SECTIONS[kind]
        for unit in units_of(section, [str(folder)], options):
            for item in read_unit(section, unit, options):
                match item:
                    case TextRecord():
                        yield item.text
                    case CaptionRecord():
                        yield item.caption
                    case ConversationRecord():
                        yield from (
                            f"In: {question}\nOut: {reply}" for question, reply in item.turns
                        )


def _open_tokenizer(
    tokenizer: TrainedTokenizer | TokenizerFile, root: Path, options: ReadOptions
) -> TextCodec:
    if isinstance(tokenizer, TokenizerFile):
        if not tokenizer.path.is_file():
            raise FileNotFoundError(f"tokenizer file {tokenizer.path} does not exist")
        if file_sha256(tokenizer.path) != tokenizer.sha256:
            raise ValueError(f"{tokenizer.path} has another sha256 than the plan says; plan again")
        return TextCodec.from_file(tokenizer.path)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokenizer.vocab_size,
        special_tokens=[END_OF_TEXT, SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(language_of(root, options), trainer)
    return TextCodec(bpe)


def _lay_out(world: PocketWorld | SmallReal, out: Path) -> None:
    """Write a generated world, unless it stands there whole: its sources' shards then stay."""
    root, record = world_folder(world, out), out / "prepared" / "world_made_from.json"
    made_from = world.model_dump(mode="json")
    if record.is_file() and root.is_dir() and read_json(record) == made_from:
        return
    record.unlink(missing_ok=True)
    with new_folder(root) as temporary:
        if isinstance(world, PocketWorld):
            write_pocket_world(world, temporary)
        else:
            write_small_real(world, temporary)
    write_json(record, made_from)


def _prepare_folder(
    world: World, kind: str, folder: Path, out: Path, options: ReadOptions, tell: Progress
) -> None:
    public = world if isinstance(world, PublicFolder) else None
    prepare_source(
        SECTIONS[kind],
        [str(folder)],
        _sources(out) / folder.name,
        tokenizer_file=_tokenizer_path(out),
        options=options,
        root=str(world_folder(world, out)),
        # Other stages run beside this one; `midstream prepare` takes more processes.
        workers=1,
        max_reject_fraction=public.max_reject_fraction if public else 0.0,
        validation_fraction=public.validation_fraction if public else 0.0,
        progress=tell,
    )


def _check_prepared(source: Source, kind: str, codec: TextCodec, digest: str) -> None:
    index = source.index
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


def _remove_others(out: Path, names: set[str]) -> None:
    for path in _sources(out).glob("*"):
        if path.name not in names:
            shutil.rmtree(path)


def _summary(source: Source) -> dict[str, Any]:
    """A source's part of `results.json`."""
    index = source.index
    names = ("num_targets", "lengths")
    facts: dict[str, Any] = {name: index[name] for name in names if name in index}
    if len(facts) < len(names):
        # Prepared before the index said so: its columns do.
        shards = (Shard(source.folder / "shards" / shard["name"]) for shard in index["shards"])
        facts = length_facts(shards)
    train, validation = index["train"], index["validation"]
    return {
        "kind": index["kind"],
        "num_examples": train["examples"],
        "num_tokens": train["tokens"],
        "num_images": train["images"],
        "distinct_images": index["distinct_images"],
        "validation": validation,
        "records": index["records"],
        "rejects": index["rejects"],
        "fingerprint": index["fingerprint"],
        **facts,
    }


def _tell(progress: Progress, number: int, total: int, name: str, done: float, note: str) -> None:
    text = f"indexing {name}" + (f": {note}" if note else "")
    progress(0.4 + 0.6 * (number + done) / total, text)


def _sources(out: Path) -> Path:
    return out / "prepared" / "sources"


def _tokenizer_path(out: Path) -> Path:
    return out / "prepared" / "tokenizer.json"
