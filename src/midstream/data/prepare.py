"""Public formats in (jsonl.zst, tar shards, LLaVA JSON) -> indexed sources and a tokenizer."""

from collections.abc import Callable, Iterator
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
from midstream.data.examples import (
    END_OF_TEXT,
    SEPARATOR,
    TextCodec,
    caption_example,
    conversation_example,
    text_example,
)
from midstream.data.images import decode
from midstream.data.pocket import write_pocket_world
from midstream.data.readers import read_captions, read_conversations, read_texts
from midstream.data.small_real import write_small_real
from midstream.data.sources import Source, SourceWriter
from midstream.identity import file_sha256, folder_fingerprint
from midstream.storage import new_folder

Progress = Callable[[float, str], None]
KINDS = {"text": "text", "captions": "caption", "instruct": "instruct"}
# Texts go through the tokenizer this many at a time.
TEXT_BATCH = 1000


def prepare(
    world: PocketWorld | SmallReal | PublicFolder,
    tokenizer: TrainedTokenizer | TokenizerFile,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Lay the world out, make its tokenizer, index every source.

    Writes `world/` (generated worlds), `tokenizer.json` and `sources/` under `out`; returns
    `results.json` of a Prepare stage. Raises FileNotFoundError or ValueError that names the file
    and the record for what is missing or malformed; nothing is skipped.
    """
    root = world_folder(world, out)
    if isinstance(world, PublicFolder):
        check_fingerprint(root, world.fingerprint)
    else:
        progress(0.0, "writing the world")
        with new_folder(root) as temporary:
            if isinstance(world, PocketWorld):
                write_pocket_world(world, temporary)
            else:
                write_small_real(world, temporary)
    progress(0.3, "tokenizer")
    with new_folder(out / "prepared") as temporary:
        codec = make_codec(tokenizer, root, temporary / "tokenizer.json")
        found = source_folders(root)
        summaries = {}
        for number, (name, (kind, folder)) in enumerate(found.items()):
            progress(0.4 + 0.6 * number / len(found), f"indexing {name}")
            summaries[name] = index_source(name, kind, folder, root, temporary / "sources", codec)
        sha256 = file_sha256(temporary / "tokenizer.json")
    return {"sources": summaries, "vocab_size": codec.size, "tokenizer_sha256": sha256}


def world_folder(world: PocketWorld | SmallReal | PublicFolder, out: Path) -> Path:
    """Where a world's public files lie: the user's folder, or inside the stage `out`."""
    return world.root if isinstance(world, PublicFolder) else out / "world"


def open_codec(out: Path) -> TextCodec:
    """The tokenizer of a finished preparation."""
    return TextCodec.from_file(out / "prepared" / "tokenizer.json")


def open_sources(world: PocketWorld | SmallReal | PublicFolder, out: Path) -> dict[str, Source]:
    """The indexed sources of a finished preparation, by name."""
    root, base = world_folder(world, out), out / "prepared" / "sources"
    return {path.name: Source(path.name, path, root) for path in sorted(base.iterdir())}


def check_fingerprint(root: Path, expected: str) -> None:
    """Raises ValueError if the bytes under `root` are others than those that were planned with."""
    found = folder_fingerprint(root)
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


def make_codec(tokenizer: TrainedTokenizer | TokenizerFile, root: Path, path: Path) -> TextCodec:
    """Train a byte-level BPE on the world's language or copy the file named, and save it."""
    if isinstance(tokenizer, TokenizerFile):
        if not tokenizer.path.is_file():
            raise FileNotFoundError(f"tokenizer file {tokenizer.path} does not exist")
        if file_sha256(tokenizer.path) != tokenizer.sha256:
            raise ValueError(f"{tokenizer.path} has another sha256 than the plan says; plan again")
        codec = TextCodec.from_file(tokenizer.path)
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=tokenizer.vocab_size,
            special_tokens=[END_OF_TEXT, SEPARATOR],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(language_of(root), trainer)
        codec = TextCodec(bpe)
    codec.tokenizer.save(str(path))
    return codec


def language_of(root: Path) -> Iterator[str]:
    """Every text, caption and turn of a world, for training a tokenizer."""
    for kind, folder in source_folders(root).values():
        if kind == "text":
            yield from (text for _, text in read_texts(folder))
        elif kind == "caption":
            yield from (caption for _, caption, _ in read_captions(folder))
        else:
            for _, turns, _ in read_conversations(folder):
                yield from (f"In: {question}\nOut: {reply}" for question, reply in turns)


def index_source(
    name: str, kind: str, folder: Path, root: Path, base: Path, codec: TextCodec
) -> dict[str, Any]:
    """Tokenise one source and check its pictures; returns its part of `results.json`."""
    dtype = "<u2" if codec.size <= 2**16 else "<u4"
    if kind == "text":
        writer = SourceWriter(base / name, kind="text", dtype=dtype)
        for batch in batches(read_texts(folder), TEXT_BATCH):
            for (where, _), ids in zip(
                batch, codec.encode_many([t for _, t in batch]), strict=True
            ):
                example = text_example(codec, ids)
                writer.add(example.input_ids, example.supervised, name=where)
    elif kind == "caption":
        writer = SourceWriter(base / name, kind="caption", dtype=dtype)
        for where, caption, (path, offset, data) in read_captions(folder):
            decode(data, where)
            example = caption_example(codec, codec.encode(caption))
            image = (path.relative_to(root).as_posix(), offset, len(data))
            writer.add(example.input_ids, example.supervised, name=where, image=image)
    else:
        writer = SourceWriter(base / name, kind="instruct", dtype=dtype)
        checked: set[Path] = set()
        for where, turns, picture in read_conversations(folder):
            example = conversation_example(codec, turns, has_image=picture is not None)
            image = None
            if picture is not None:
                if picture not in checked:
                    decode(picture.read_bytes(), f"{where}, {picture}")
                    checked.add(picture)
                image = (picture.relative_to(root).as_posix(), 0, picture.stat().st_size)
            writer.add(example.input_ids, example.supervised, name=where, image=image)
    summary = writer.close()
    if not summary["num_examples"]:
        raise ValueError(f"{folder} holds no example")
    return summary


def batches(items: Iterator[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    """Lists of up to `size` items."""
    batch: list[tuple[str, str]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
