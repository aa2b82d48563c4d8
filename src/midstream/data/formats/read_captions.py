"""The public formats that come with pictures: captions and conversations (see `docs/data.md`).

Records are numbered from 0, JSON lines of conversations from 1. Pictures are not decoded here.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from midstream.core.digests import JSON_LINES
from midstream.data.examples import ConversationError, conversation_of, picture_names
from midstream.data.formats.captions import (
    caption_of,
    count_annotations,
    field_of,
    first_line,
    json_object,
    load_picture,
    objects_of,
    picture_roots,
    read_coco,
    read_csv,
    read_imagefolder,
    rows_of,
)
from midstream.data.formats.files import (
    base_name,
    exists,
    find_files,
    is_folder,
    join,
    read_lines,
)
from midstream.data.formats.records import (
    NOT_UNICODE,
    TOO_LARGE,
    CaptionRecord,
    ConversationRecord,
    Picture,
    ReadOptions,
    Sample,
    Unit,
    list_entries,
    samples_of,
    unicode_problem,
)
from midstream.data.formats.records import json_object as record_of
from midstream.data.source_writer import Reject

NUM_UNIT_RECORDS = 20_000
# A sample that says nothing of a caption, as against one whose caption is no text.
ABSENT = "no caption"
PICTURES = ("jpg", "jpeg", "png", "webp")
FORMATS = {
    "webdataset": "a .tar of samples with a picture, .txt and .json",
    "datacompdr": "such a .tar whose samples also hold .syn.json",
    "coco": "captions_SPLIT.json with the lists images and annotations",
    "csv": "a .csv or .txt with the header image,caption",
    "imagefolder": "metadata.jsonl with file_name and text",
}
# Which files of a folder are captions; a file given by its own name may have another one.
NAMES = {
    "tar": ("*.tar",),
    "coco": ("captions_*.json",),
    "csv": ("captions*.csv", "captions*.txt", "metadata*.csv", "metadata*.txt"),
    "imagefolder": ("metadata.jsonl",),
}
_SUFFIXES = (".tar", ".json", ".csv", ".txt", ".jsonl")


def caption_units(sources: Sequence[str], options: ReadOptions) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, in their order.

    A tar is one unit; other files are cut every 20,000 records. The first tar of a source tells
    the format of all its tars. Raises FileNotFoundError for what is not there, and ValueError for
    a file of an unknown format or without a record, a folder with captions of two formats, and for
    synthetic captions required of a format that has none.
    """
    units: list[Unit] = []
    for source in sources:
        tar_format = ""
        for path in _caption_files(source):
            if path.endswith(".tar"):
                tar_format = tar_format or _tar_format(path)
                units.append(Unit(tar_format, (path,)))
            else:
                units.extend(_cut(path, _lone_format(path), options))
    return units


def read_captions(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """The records of a unit in the order of its file: a caption with its picture, or why not.

    The reasons are "no picture", "more than one picture", "missing picture", "zero-byte picture",
    "picture too large", "picture outside the folder", "no caption", "empty caption", "caption not
    UTF-8", "caption not Unicode", "no synthetic caption", "metadata not JSON", "wrong number of
    columns", "unsafe member name" and "member there twice". A tar's records are its samples, each
    with all its captions: one that cannot be used is left out where others can.

    Raises ValueError that names the file if it is damaged or lacks a column or list.
    """
    return _READERS[unit.format](unit, options)


def _known() -> str:
    return "known are " + "; ".join(f"{name}: {what}" for name, what in FORMATS.items())


def _caption_files(source: str) -> list[str]:
    files = find_files(source, _SUFFIXES)
    if not is_folder(source):
        return files
    found = {
        kind: [file for file in files if any(fnmatchcase(base_name(file), name) for name in names)]
        for kind, names in NAMES.items()
    }
    kinds = [kind for kind, named in found.items() if named]
    if not kinds:
        raise ValueError(f"{source} holds no captions; {_known()}")
    if len(kinds) > 1:
        named = ", ".join(found[kind][0] for kind in kinds)
        raise ValueError(f"{source} holds captions in several formats ({named}); name the files")
    return found[kinds[0]]


def _tar_format(path: str) -> str:
    first = next(samples_of(path), None)
    return "datacompdr" if first is not None and "syn.json" in first.members else "webdataset"


def _lone_format(path: str) -> str:
    """The format of a file that is no tar, by its name and its first line."""
    if path.endswith(".json"):
        return "coco"
    if path.endswith(".jsonl"):
        first, _ = json_object(first_line(path))
        if base_name(path) == "metadata.jsonl" or (first and "file_name" in first):
            return "imagefolder"
    if path.endswith((".csv", ".txt")):
        names = {name.strip(b'" \r\n') for name in first_line(path).split(b",")}
        if names & {b"image", b"file_name"}:
            return "csv"
    raise ValueError(f"{path} holds no captions in a known format; {_known()}")


def _cut(path: str, form: str, options: ReadOptions) -> list[Unit]:
    if options.require == "synthetic":
        raise ValueError(f"{path}: {form} has no synthetic captions; do not require them")
    if form == "coco":
        count = count_annotations(path, options)
    elif form == "csv":
        count = sum(1 for _ in rows_of(path, options))
    else:
        count = sum(1 for _ in objects_of(path))
    if not count:
        raise ValueError(f"{path} holds no record; remove it")
    if count <= NUM_UNIT_RECORDS:
        return [Unit(form, (path,))]
    starts = range(0, count, NUM_UNIT_RECORDS)
    return [Unit(form, (path,), x, min(x + NUM_UNIT_RECORDS, count)) for x in starts]


def _read_tar(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    return (_sample_record(sample, options) for sample in samples_of(unit.files[0]))


def _sample_record(sample: Sample, options: ReadOptions) -> CaptionRecord | Reject:
    where, members = sample.where, sample.members
    if sample.problem:
        reason = "picture too large" if sample.problem == TOO_LARGE else sample.problem
        return Reject(where, reason, sample.detail)
    pictures = [members[suffix] for suffix in PICTURES if suffix in members]
    if not pictures:
        detail = f"it has {', '.join(sorted(members))}"
        if "syn.json" in members:
            detail += "; DataCompDR's own tars hold no pictures, join them by uid with DataComp's"
        return Reject(where, "no picture", detail)
    if len(pictures) > 1:
        return Reject(where, "more than one picture", ", ".join(p.name for p in pictures))
    if not pictures[0].data:
        return Reject(where, "zero-byte picture", pictures[0].name)
    picture = Picture(sample.path, pictures[0].offset, pictures[0].data)
    own, synthetic = _own_caption(sample, options), _synthetic_captions(sample)
    usable = tuple(caption for caption in synthetic if isinstance(caption, str))
    unusable = [caption for caption in synthetic if isinstance(caption, Reject)]
    if options.require == "synthetic" and not usable:
        return unusable[0] if unusable else _without(sample, "no synthetic caption")
    if isinstance(own, Reject) and (options.require == "original" or not usable):
        return own
    if isinstance(own, Reject):
        unusable += [own] if own.reason != ABSENT else []
        own = ""
    return CaptionRecord(where, own, picture, usable, len(unusable))


def _own_caption(sample: Sample, options: ReadOptions) -> str | Reject:
    """`text_key` in .json comes before .txt only where a user names it."""
    members, where = sample.members, sample.where
    if "txt" in members and options.text_key == "text":
        return caption_of(members["txt"].data, where)
    if "json" not in members:
        return _without(sample, ABSENT)
    values, reason = json_object(members["json"].data)
    if values is None:
        return Reject(where, reason, members["json"].name)
    caption = field_of(values, options)
    if caption is None:
        return Reject(where, ABSENT, f"{members['json'].name} has none under {options.text_key!r}")
    return caption_of(caption, where, reason)


def _synthetic_captions(sample: Sample) -> list[str | Reject]:
    """DataCompDR's list `syn_text`, in .syn.json or else in .json."""
    member = sample.members.get("syn.json", sample.members.get("json"))
    if member is None:
        return []
    values, reason = json_object(member.data)
    if values is None:
        own = member is sample.members.get("json")
        return [] if own else [Reject(sample.where, reason, member.name)]
    captions = values.get("syn_text")
    if not isinstance(captions, list):
        return []
    return [caption_of(caption, sample.where, reason) for caption in captions]


def _without(sample: Sample, reason: str) -> Reject:
    return Reject(sample.where, reason, f"it has {', '.join(sorted(sample.members))}")


_READERS: dict[str, Callable[[Unit, ReadOptions], Iterator[CaptionRecord | Reject]]] = {
    "webdataset": _read_tar,
    "datacompdr": _read_tar,
    "coco": read_coco,
    "csv": read_csv,
    "imagefolder": read_imagefolder,
}


LLAVA = "llava.json"
SUFFIXES = (".json", *JSON_LINES)
_ID_CHARACTERS = 80


def conversation_units(sources: Sequence[str]) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, in their order.

    A folder stands for the `llava.json` in it, or for all JSON files under it. Files are cut every
    20,000 records, for which they are read once. Raises FileNotFoundError for what is not there,
    and ValueError for a file that holds no list or lines of records or is cut short.
    """
    return [
        unit for source in sources for path in _files(source) for unit in _conversations_of(path)
    ]


def read_conversations(unit: Unit, options: ReadOptions) -> Iterator[ConversationRecord | Reject]:
    """The records of a unit in the order of its file: turns and a picture's bytes, or why not.

    Pictures are looked for under `options.images`, else in the file's folder. Blank lines are no
    records. Raises ValueError that names the file if it is cut short or damaged.
    """
    path = unit.files[0]
    roots = picture_roots(path, options)
    for where, data in islice(_entries(path), unit.first, unit.last):
        record = record_of(data, where)
        yield record if isinstance(record, Reject) else _conversation(record, where, roots)


def _files(source: str) -> list[str]:
    if is_folder(source) and exists(llava := join(source, LLAVA, source)):
        return [llava]
    files = find_files(source, SUFFIXES)
    for path in files:
        if not base_name(path).endswith(SUFFIXES):
            raise ValueError(
                f"{path} is of no known format of conversations; known are .json (a list of "
                f"records) and lines of records ({', '.join(JSON_LINES)})"
            )
    return files


def _conversations_of(path: str) -> list[Unit]:
    num_records = sum(1 for _ in _entries(path))
    starts = range(0, max(1, num_records), NUM_UNIT_RECORDS)
    name = "json" if _is_list(path) else "jsonl"
    # The last one reads to the file's end.
    ends = [*starts[1:], None]
    return [Unit(name, (path,), first, last) for first, last in zip(starts, ends, strict=True)]


def _is_list(path: str) -> bool:
    return base_name(path).endswith(".json")


def _entries(path: str) -> Iterator[tuple[str, bytes]]:
    if _is_list(path):
        for number, data in enumerate(list_entries(path)):
            yield f"{path}, record {number}", data
        return
    for number, line in enumerate(read_lines(path), start=1):
        if not line.isspace():
            yield f"{path}, line {number}", line


def _conversation(
    record: dict[str, Any], where: str, roots: Sequence[str]
) -> ConversationRecord | Reject:
    if isinstance(record.get("id"), str | int):
        where = f"{where} ({str(record['id'])[:_ID_CHARACTERS]!r})"
    try:
        talk = conversation_of(record, where)
        names = picture_names(record, where)
    except ConversationError as error:
        return Reject(where, error.reason, error.detail)
    for number, turn in enumerate(talk.turns):
        if problem := unicode_problem("\n".join(turn)):
            return Reject(where, NOT_UNICODE, f"in question or reply {number}: {problem}")
    picture = load_picture(roots, names[0], where) if names else None
    if isinstance(picture, Reject):
        return picture
    return ConversationRecord(where, talk.turns, picture, talk.left_out)
