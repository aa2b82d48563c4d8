"""The records of any public format, as the preparation takes them: read, measured, in batches."""

from collections.abc import Iterable, Iterator
from typing import assert_never

from midstream.data.formats.read_captions import caption_units, read_captions
from midstream.data.formats.read_conversations import conversation_units, read_conversations
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
from midstream.data.source_writer import Reject

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
