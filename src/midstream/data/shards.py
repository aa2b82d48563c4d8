"""One unit of input to one shard of a prepared source: read, measured, tokenised in batches."""

import errno
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree

import numpy as np

from midstream.core.identity import PREPARED, Kind, refuse_unfinished
from midstream.core.storage import (
    finish_folder,
    publish_folder,
    room_for,
    seal,
    start_folder,
    write_json,
)
from midstream.data.columns import MADE_FROM, PICTURES
from midstream.data.examples import (
    Example,
    TextCodec,
    caption_example,
    conversation_example,
    document_example,
    text_example,
)
from midstream.data.formats.conversations import conversation_units, read_conversations
from midstream.data.formats.document_parts import document_of
from midstream.data.formats.files import exists, is_folder, is_url
from midstream.data.formats.read_captions import caption_units, read_captions
from midstream.data.formats.read_documents import document_units, read_documents
from midstream.data.formats.read_text import read_text, text_units
from midstream.data.formats.records import (
    FILES,
    CaptionRecord,
    ConversationRecord,
    DocumentRecord,
    Picture,
    ReadOptions,
    Record,
    Section,
    TextRecord,
    TokenRecord,
    Unit,
)
from midstream.data.picture_checks import check_decodes
from midstream.data.remote import ChangedError, RemoteError, Stamp, refuse_changed
from midstream.data.shard_state import Job, Todo, num_counted, stamp_of
from midstream.data.source_writer import Image, Reject, ShardWriter, Shown
from midstream.data.sources import content_hash

# Records go through the tokenizer together up to these limits, which bound a process's memory.
BATCH_RECORDS, BATCH_CHARACTERS, BATCH_PICTURE_BYTES = 1000, 2_000_000, 32_000_000

# Options that some kinds of sources have.
ONLY_OF: dict[str, tuple[Section, ...]] = {
    "text_key": ("text", "captions"),
    "require": ("captions",),
    "images": ("captions", "conversations", "documents"),
    "max_tokens": ("captions", "conversations", "documents"),
    "lost": ("documents",),
    "similarity": ("documents",),
    "rating": ("conversations",),
}
# Why a picture is lost whose file was looked for.
LOOKED_FOR = ("missing picture", "zero-byte picture", "picture too large")

Item = Record | Reject


class BrokenError(ValueError):
    """A unit's file cannot be read to its end."""


def units_of(section: Section, sources: Sequence[str], options: ReadOptions) -> list[Unit]:
    """The units of work in `sources`.

    ValueError or FileNotFoundError names what cannot be read, is not there, or is given twice.
    """
    if options.images is not None and not is_folder(options.images):
        remedy = "unpack it" if exists(options.images) else "correct its name"
        raise FileNotFoundError(f"{options.images} is no folder of pictures; {remedy}")
    for folder in (Path(source) for source in sources if not is_url(source)):
        _refuse_prepared(folder)
    if options.split and section != "captions":
        raise ValueError(f"{section} say no split of their records; name the files of the split")
    for option, sections in ONLY_OF.items():
        if section not in sections and getattr(options, option) != getattr(ReadOptions, option):
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name} is of {' and '.join(sections)}; for {section} leave it out")
    match section:
        case "captions":
            units = caption_units(sources, options)
        case "documents":
            units = document_units(sources, options)
        case "conversations":
            units = conversation_units(sources, options)
        case "text":
            units = text_units(sources)
    for path, times in Counter(x for unit in units if not unit.first for x in unit.files).items():
        if times > 1:
            raise ValueError(f"{path} is given {times} times; give each file once")
    for path in (unit.files[0] for unit in units if unit.files[0].endswith(f"/{MADE_FROM}")):
        _refuse_prepared(Path(path).parents[2])
    return units


def _refuse_prepared(folder: Path) -> None:
    """Raises ValueError for the folder of a source that `midstream prepare` makes."""
    refuse_unfinished(folder)
    if (folder / PREPARED).is_file() and (folder / "shards").is_dir():
        raise ValueError(
            f"{folder} is a prepared source already; give the files that it was made from, or put "
            "or link it into a world as it is"
        )


READERS: dict[Section, Callable[[Unit, ReadOptions], Iterator[Item]]] = {
    "text": read_text,
    "captions": read_captions,
    "conversations": read_conversations,
    "documents": read_documents,
}


def read_unit(section: Section, unit: Unit, options: ReadOptions) -> Iterator[Item]:
    """The records of a unit and what is wrong with those left out; BrokenError for its files."""
    try:
        yield from READERS[section](unit, options)
    except (ValueError, OSError) as error:
        raise BrokenError(str(error)) from error


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of items as large as the limits allow, one at least."""
    batch: list[Item] = []
    characters = picture_bytes = 0
    for item in items:
        batch.append(item)
        characters += num_characters(item)
        if not isinstance(item, Reject):
            picture_bytes += sum(len(picture.data) for picture in item.pictures)
        if (
            len(batch) >= BATCH_RECORDS
            or characters >= BATCH_CHARACTERS
            or picture_bytes >= BATCH_PICTURE_BYTES
        ):
            yield batch
            batch, characters, picture_bytes = [], 0, 0
    if batch:
        yield batch


def content_of(item: Record) -> bytes:
    """What a record's split follows from: its picture, the first of a conversation, its text, or
    all of a document."""
    if isinstance(item, DocumentRecord):
        hashes = (content_hash(picture.data) for picture in item.pictures)
        return b"".join([text_bytes(item), *hashes])
    return item.pictures[0].data if item.pictures else text_bytes(item)


def text_bytes(item: Record) -> bytes:
    """The record's text; UnicodeEncodeError for half a surrogate pair."""
    if isinstance(item, TokenRecord):
        return item.input_ids.astype("<u4").tobytes()
    return "\n".join(item.texts).encode()


def num_characters(item: Item) -> int:
    """How much text (or ids) an item holds in memory."""
    if isinstance(item, Reject | TokenRecord):
        return len(item.detail if isinstance(item, Reject) else item.input_ids)
    return sum(map(len, item.texts))


KINDS: dict[Section, Kind] = {
    "text": "text",
    "captions": "caption",
    "conversations": "instruct",
    "documents": "interleaved",
}
# Verdicts on pictures that are kept, for records that share one and stand near each other.
KEPT_VERDICTS = 1000

# A picture without a caption of its own.
NO_CAPTION = Example(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8))

# Takes how many records, tokens and rejects came since the last call; False: stop.
Beat = Callable[[int, int, int], bool]


@dataclass(frozen=True)
class Ended:
    """How a unit went: unreadable for this `problem`, which may pass where a server `is_refusing`,
    stopped after these rejects, or `is_late`: another task has published it first."""

    problem: str = ""
    is_refusing: bool = False
    rejects: tuple[Reject, ...] = ()
    is_late: bool = False


@dataclass(frozen=True)
class _Versions:
    """A record as examples; `left_out` counts captions that cannot be used."""

    own: Example
    synthetic: tuple[Example, ...] = ()
    left_out: int = 0

    @property
    def all(self) -> tuple[Example, ...]:
        """The example and what stands for it with other captions."""
        return (self.own, *self.synthetic)


class StoppedError(Exception):
    """The shard is not wanted to its end."""


def make_shard(job: Job, codec: TextCodec, item: Todo, beat: Beat) -> Ended:
    """Write a shard, or say why not; nothing is left of one that was not finished.

    It appears whole in its place, with what it was made from. Raises OSError if it cannot be
    written.
    """
    work, place = _Work(job, codec, item.unit), job.place(item)
    if job.share is not None and not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "nobody waits for this task any more", str(place))
    temporary = start_folder(place)
    try:
        with room_for(place):
            names = work.fill(temporary, beat)
            _refuse_other(item)
            entries = seal(temporary, names)
            # Beside the manifest: the shard's fingerprint stands for its content, not for where
            # and when.
            write_json(temporary / MADE_FROM, item.made_from | {PICTURES: work.stamps})
            if job.share is None:
                finish_folder(temporary, place, entries)
                return Ended()
            return Ended(is_late=not publish_folder(temporary, place, entries))
    except (BrokenError, RemoteError) as error:
        cause = error.__cause__ if isinstance(error, BrokenError) else error
        is_refusing = isinstance(cause, RemoteError) and not isinstance(cause, ChangedError)
        return Ended(str(error), is_refusing)
    except StoppedError:
        return Ended(rejects=tuple(work.rejects))
    finally:
        # It has gone where it became the shard.
        rmtree(temporary, ignore_errors=True)


def _refuse_other(item: Todo) -> None:
    """Raises ChangedError for a file at a URL that is another than before it was read, and
    BrokenError for one that is gone."""
    for file, stamp in zip(item.unit.files, item.made_from["stamps"], strict=True):
        # Of samples in files of their own, the hashes of their pictures are enough.
        if is_url(file) and item.unit.format != FILES:
            try:
                refuse_changed(file, stamp, "its preparation began", "run the same again")
            except FileNotFoundError as error:
                raise BrokenError(str(error)) from None


class _Work:
    """The records of one unit on their way into a shard."""

    def __init__(self, job: Job, codec: TextCodec, unit: Unit) -> None:
        self.job, self.codec, self.unit = job, codec, unit
        self.rejects: list[Reject] = []
        # Those that the limit is held against.
        self.num_counted = 0
        # By content hash: what is wrong with a picture, None if nothing is.
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        # Picture files that are none of the unit's own, as they were when they were read: local
        # ones, and archives at URLs.
        self.stamps: dict[str, Stamp] = {}

    def fill(self, folder: Path, beat: Beat) -> list[str]:
        """Write the unit's columns into an empty folder; returns the names of its files.

        Raises StoppedError where `beat` says so, BrokenError for the unit's files.
        """
        writer = ShardWriter(
            folder,
            kind=KINDS[self.job.section],
            dtype="<u2" if self.codec.size <= 2**16 else "<u4",
            input_name=self.job.short(_input_name(self.unit)),
            validation_fraction=self.job.validation_fraction,
            head=len(self.codec.begin_ids),
        )
        for batch in batches(self.items()):
            before = self.num_counted
            num_tokens = self.write(batch, writer)
            if not beat(len(batch), num_tokens, self.num_counted - before):
                raise StoppedError
        writer.close()
        return sorted(path.name for path in folder.iterdir())

    def items(self) -> Iterator[Item]:
        """The unit's records and rejects; those with unusable content become rejects."""
        for item in read_unit(self.job.section, self.unit, self.job.options):
            lost = item.lost if isinstance(item, DocumentRecord) else ()
            for reject in (item,) if isinstance(item, Reject) else lost:
                # The file is named first, and may be another the next time.
                path = reject.detail.partition(" has ")[0]
                if reject.reason in LOOKED_FOR and (is_url(path) or path.startswith("/")):
                    self.stamps[path] = stamp_of(path)
            yield item if isinstance(item, Reject) else self._checked(item)

    def write(self, batch: Sequence[Item], writer: ShardWriter) -> int:
        """Tokenise a batch and add it to the shard; returns how many tokens that were."""
        kinds = CaptionRecord | TextRecord | DocumentRecord
        whole = (item for item in batch if isinstance(item, kinds))
        texts = [text for item in whole for text in item.texts]
        encoded = iter(self.codec.encode_many(texts))
        num_tokens = 0
        for item in batch:
            if isinstance(item, Reject):
                self._reject(item, writer)
                continue
            versions = self._versions(item, encoded)
            if isinstance(versions, Reject):
                self._reject(versions, writer)
                continue
            num_tokens += sum(len(example.input_ids) for example in versions.all)
            if isinstance(item, ConversationRecord | DocumentRecord):
                writer.drop_turns(item.left_out)
            # Also where a picture has synthetic captions alone.
            places = versions.all[-1].pictures
            writer.add(
                versions.own.input_ids,
                versions.own.supervised,
                name=self.job.short(item.where),
                content=content_of(item),
                pictures=list(map(self._shown, places, item.pictures)),
                synthetic=versions.synthetic,
                left_out=versions.left_out,
            )
        return num_tokens

    def _shown(self, place: int, picture: Picture) -> Shown:
        # A name says where a picture stays; without one the shard keeps it.
        file = "" if self.job.copies else self.job.short(picture.file)
        return Shown(place, Image(file, picture.offset, len(picture.data)), picture.data)

    def _versions(self, item: Record, encoded: Iterator[list[int]]) -> "_Versions | Reject":
        """A record's examples, or why it is left out: none that is wanted is short enough."""
        if isinstance(item, CaptionRecord):
            return self._captions(item, encoded)
        if isinstance(item, TextRecord):
            return _Versions(text_example(self.codec, next(encoded)))
        if isinstance(item, TokenRecord):
            ones = np.ones(len(item.input_ids), dtype=np.uint8)
            return _Versions(Example(item.input_ids, ones))
        limit = self.job.options.max_tokens
        if isinstance(item, DocumentRecord):
            parts = (None if isinstance(part, Picture) else next(encoded) for part in item.joined)
            example = document_example(self.codec, list(parts))
        else:
            example = conversation_example(self.codec, item.turns)
        if limit is not None and len(example.input_ids) > limit:
            return _too_many(item, len(example.input_ids), limit)
        if (have := len(item.pictures)) != (places := len(example.pictures)):
            detail = f"{have} pictures, places for {places}"
            return Reject(item.where, "marks and pictures disagree", detail)
        return _Versions(example)

    def _captions(self, item: CaptionRecord, encoded: Iterator[list[int]]) -> "_Versions | Reject":
        examples = [caption_example(self.codec, next(encoded)) for _ in item.texts]
        limit, require = self.job.options.max_tokens, self.job.options.require
        own, synthetic = examples[: bool(item.caption)], examples[bool(item.caption) :]
        if limit is not None:
            own = [example for example in own if len(example.input_ids) <= limit]
            synthetic = [example for example in synthetic if len(example.input_ids) <= limit]
            wanted = {"original": own, "synthetic": synthetic, None: own + synthetic}[require]
            if not wanted:
                return _too_many(item, min(len(one.input_ids) for one in examples), limit)
        left_out = item.left_out + len(examples) - len(own) - len(synthetic)
        return _Versions(own[0] if own else NO_CAPTION, tuple(synthetic), left_out)

    def _reject(self, reject: Reject, writer: ShardWriter) -> None:
        named = replace(reject, where=self.job.short(reject.where))
        self.rejects.append(named)
        self.num_counted += num_counted({named.reason: 1})
        writer.reject(named)

    def _checked(self, item: Record) -> Item:
        try:
            text_bytes(item)
        except UnicodeEncodeError as error:
            return Reject(item.where, "text not Unicode", str(error))
        if isinstance(item, TokenRecord):
            ids = item.input_ids
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.codec.size:
                wrong = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
                detail = f"{wrong}, the tokenizer has ids 0 to {self.codec.size - 1}"
                return Reject(item.where, "token id outside the vocabulary", detail)
        problems = [self._problem(picture) for picture in item.pictures]
        broken = [Reject(item.where, "picture cannot be decoded", one) for one in problems if one]
        if not broken or not isinstance(item, DocumentRecord):
            return broken[0] if broken else item
        why, lost = iter(problems), iter(broken)
        parts = [
            next(lost) if isinstance(part, Picture) and next(why) else part for part in item.parts
        ]
        return document_of(item.where, parts, self.job.options, item.left_out, item.joint)

    def _problem(self, picture: Picture) -> str | None:
        key = content_hash(picture.data)
        stamped = picture.file and (picture.offset or not is_url(picture.file))
        if stamped and not (picture.file in self.stamps or picture.file in self.unit.files):
            self.stamps[picture.file] = stamp_of(picture.file)
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            return self._verdicts[key]
        problem = None
        try:
            check_decodes(picture.data, self.job.short(picture.file) or "its record")
        except ValueError as error:
            problem = str(error)
        self._verdicts[key] = problem
        if len(self._verdicts) > KEPT_VERDICTS:
            self._verdicts.popitem(last=False)
        return problem


def _too_many(item: Record, number: int, limit: int) -> Reject:
    return Reject(item.where, "too many tokens", f"{number:,}, the limit is {limit:,}")


def _input_name(unit: Unit) -> str:
    name = unit.files[0]
    if len(unit.files) > 1:
        name += f" and {len(unit.files) - 1} more"
    if unit.first or unit.last is not None:
        name += f", records {unit.first} to {'the end' if unit.last is None else unit.last - 1}"
    return name
