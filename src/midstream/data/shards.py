"""One unit of input to one shard of a prepared source: read, measured, tokenised in batches."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np

from midstream.core.storage import new_folder, write_json
from midstream.data.examples import (
    Example,
    TextCodec,
    caption_example,
    conversation_example,
    text_example,
)
from midstream.data.formats.files import is_url
from midstream.data.formats.read_captions import (
    caption_units,
    conversation_units,
    read_captions,
    read_conversations,
)
from midstream.data.formats.read_text import read_text, text_units
from midstream.data.formats.records import (
    CaptionRecord,
    ConversationRecord,
    Picture,
    ReadOptions,
    Record,
    Section,
    TextRecord,
    TokenRecord,
    Unit,
)
from midstream.data.images import decode
from midstream.data.shard_state import MADE_FROM, PICTURES, Job, Stamp, Todo, local_stamp
from midstream.data.source_writer import Image, Reject, ShardWriter
from midstream.data.sources import Kind, content_hash

# Records go through the tokenizer together up to these limits, which bound a process's memory.
BATCH_RECORDS, BATCH_CHARACTERS, BATCH_PICTURE_BYTES = 1000, 2_000_000, 32_000_000

Item = Record | Reject


class BrokenError(ValueError):
    """A unit's file cannot be read to its end."""


def units_of(section: Section, sources: Iterable[str], options: ReadOptions) -> list[Unit]:
    """The units of work in `sources`; ValueError or FileNotFoundError names what cannot be read."""
    if section == "text":
        return text_units(list(sources), options)
    if section == "captions":
        return caption_units(list(sources), options)
    return conversation_units(list(sources), options)


def read_unit(section: Section, unit: Unit, options: ReadOptions) -> Iterator[Item]:
    """The records of a unit and what is wrong with those left out; BrokenError for its files."""
    try:
        if section == "text":
            yield from read_text(unit, options)
        elif section == "captions":
            yield from read_captions(unit, options)
        else:
            yield from read_conversations(unit, options)
    except (ValueError, OSError) as error:
        raise BrokenError(str(error)) from error


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of items as large as the limits allow, one at least."""
    batch: list[Item] = []
    characters = picture_bytes = 0
    for item in items:
        batch.append(item)
        characters += num_characters(item)
        picture = picture_of(item)
        picture_bytes += 0 if picture is None else len(picture.data)
        if (
            len(batch) >= BATCH_RECORDS
            or characters >= BATCH_CHARACTERS
            or picture_bytes >= BATCH_PICTURE_BYTES
        ):
            yield batch
            batch, characters, picture_bytes = [], 0, 0
    if batch:
        yield batch


def picture_of(item: Item) -> Picture | None:
    """The picture that a record shows."""
    return item.picture if isinstance(item, CaptionRecord | ConversationRecord) else None


def text_bytes(item: Record) -> bytes:
    """The record's text; UnicodeEncodeError for half a surrogate pair."""
    match item:
        case TextRecord():
            return item.text.encode()
        case CaptionRecord():
            return "\n".join(item.captions).encode()
        case ConversationRecord():
            # A turn without a system text is its question and its reply.
            return "\n".join(text for turn in item.turns for text in turn if text).encode()
        case TokenRecord():
            return item.input_ids.astype("<u4").tobytes()
        case _:
            assert_never(item)


def num_characters(item: Item) -> int:
    """How much text (or ids) an item holds in memory."""
    match item:
        case TextRecord():
            return len(item.text)
        case CaptionRecord():
            return sum(map(len, item.captions))
        case ConversationRecord():
            return sum(len(text) for turn in item.turns for text in turn)
        case TokenRecord():
            return len(item.input_ids)
        case Reject():
            return len(item.detail)
        case _:
            assert_never(item)


KINDS: dict[Section, Kind] = {"text": "text", "captions": "caption", "conversations": "instruct"}
# Verdicts on pictures that are kept, for records that share one and stand near each other.
KEPT_VERDICTS = 1000

# A picture without a caption of its own.
NO_CAPTION = Example(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8))
# Equal to no file's stamp: the shard is made anew every time.
UNKNOWN: Stamp = ["unknown"]

# Takes how many records, tokens and rejects came since the last call; False: stop.
Beat = Callable[[int, int, int], bool]


@dataclass(frozen=True)
class Ended:
    """How a unit went: unreadable for this `problem`, or stopped after these rejects."""

    problem: str = ""
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True)
class _Versions:
    """A record as examples: its own text, and the synthetic captions of its picture.

    `left_out` counts captions that cannot be used.
    """

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

    Raises OSError if it cannot be written.
    """
    work = _Work(job, codec, item.unit)
    try:
        with new_folder(job.folder(item.number)) as folder:
            writer = ShardWriter(
                folder,
                kind=KINDS[job.section],
                dtype="<u2" if codec.size <= 2**16 else "<u4",
                input_name=job.short(_input_name(item.unit)),
                validation_fraction=job.validation_fraction,
            )
            for batch in batches(work.items()):
                before = len(work.rejects)
                num_tokens = work.write(batch, writer)
                if not beat(len(batch), num_tokens, len(work.rejects) - before):
                    raise StoppedError
            writer.close()
    except BrokenError as error:
        return Ended(problem=str(error))
    except StoppedError:
        return Ended(rejects=tuple(work.rejects))
    # Beside the manifest: the shard's fingerprint stands for its content, not for where and when.
    write_json(job.folder(item.number) / MADE_FROM, item.made_from | {PICTURES: work.stamps})
    return Ended()


class _Work:
    """The records of one unit on their way into a shard."""

    def __init__(self, job: Job, codec: TextCodec, unit: Unit) -> None:
        self.job, self.codec, self.unit = job, codec, unit
        self.rejects: list[Reject] = []
        # By content hash: what is wrong with a picture, None if nothing is.
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        # Local picture files that are none of the unit's own, as they were when they were read.
        self.stamps: dict[str, Stamp] = {}

    def items(self) -> Iterator[Item]:
        """The unit's records and rejects; those with unusable content become rejects."""
        for item in read_unit(self.job.section, self.unit, self.job.options):
            if not isinstance(item, Reject):
                yield self._checked(item)
                continue
            # A picture that is missing or too large is named: it may be another the next time.
            if "picture" in item.reason and is_url(item.detail):
                self.stamps[item.detail] = UNKNOWN
            elif "picture" in item.reason and item.detail.startswith("/"):
                path = item.detail.partition(" has ")[0]
                self.stamps[path] = local_stamp(path)
            yield item

    def write(self, batch: Sequence[Item], writer: ShardWriter) -> int:
        """Tokenise a batch and add it to the shard; returns how many tokens that were."""
        texts = [text for item in batch for text in _texts(item)]
        encoded = iter(self.codec.encode_many(texts))
        num_tokens = 0
        for item in batch:
            if isinstance(item, Reject):
                self._reject(item, writer)
                continue
            if isinstance(item, CaptionRecord):
                versions = self._versions(item, encoded)
            else:
                versions = self._whole(item, self._example(item, encoded))
            if isinstance(versions, Reject):
                self._reject(versions, writer)
                continue
            num_tokens += sum(len(example.input_ids) for example in versions.all)
            if isinstance(item, ConversationRecord):
                writer.drop_turns(item.left_out)
            picture = picture_of(item)
            writer.add(
                versions.own.input_ids,
                versions.own.supervised,
                name=self.job.short(item.where),
                content=text_bytes(item) if picture is None else picture.data,
                image=None if picture is None else self._placed(picture),
                synthetic=versions.synthetic,
                left_out=versions.left_out,
            )
        return num_tokens

    def _whole(self, item: Record, example: Example) -> "_Versions | Reject":
        limit = self.job.options.max_tokens
        number = len(example.input_ids)
        if limit is None or not isinstance(item, ConversationRecord) or number <= limit:
            return _Versions(example)
        return _too_many(item, number, limit)

    def _versions(self, item: CaptionRecord, encoded: Iterator[list[int]]) -> "_Versions | Reject":
        """All captions of a picture, or why it is left out: none that is wanted is short enough."""
        examples = [caption_example(self.codec, next(encoded)) for _ in item.captions]
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
        picture = picture_of(item)
        problem = None if picture is None else self._problem(picture)
        return Reject(item.where, "picture cannot be decoded", problem) if problem else item

    def _problem(self, picture: Picture) -> str | None:
        key = content_hash(picture.data)
        if not is_url(picture.file) and picture.file not in self.unit.files:
            self.stamps.setdefault(picture.file, local_stamp(picture.file))
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            return self._verdicts[key]
        problem = None
        try:
            decode(picture.data, self.job.short(picture.file))
        except ValueError as error:
            problem = str(error)
        self._verdicts[key] = problem
        if len(self._verdicts) > KEPT_VERDICTS:
            self._verdicts.popitem(last=False)
        return problem

    def _example(
        self, item: TextRecord | TokenRecord | ConversationRecord, encoded: Iterator[list[int]]
    ) -> Example:
        match item:
            case TextRecord():
                return text_example(self.codec, next(encoded))
            case ConversationRecord():
                has_image = item.picture is not None
                return conversation_example(self.codec, item.turns, has_image=has_image)
            case TokenRecord():
                return Example(item.input_ids, np.ones(len(item.input_ids), dtype=np.uint8))
            case _:
                assert_never(item)

    def _placed(self, picture: Picture) -> Image:
        return Image(self.job.short(picture.file), picture.offset, len(picture.data))


def _texts(item: Item) -> tuple[str, ...]:
    """What goes through the tokenizer in one call for many records."""
    if isinstance(item, CaptionRecord):
        return item.captions
    return (item.text,) if isinstance(item, TextRecord) else ()


def _too_many(item: Record, number: int, limit: int) -> Reject:
    return Reject(item.where, "too many tokens", f"{number:,}, the limit is {limit:,}")


def _input_name(unit: Unit) -> str:
    name = unit.files[0]
    if len(unit.files) > 1:
        name += f" and {len(unit.files) - 1} more"
    if unit.first or unit.last is not None:
        name += f", records {unit.first} to {'the end' if unit.last is None else unit.last - 1}"
    return name
