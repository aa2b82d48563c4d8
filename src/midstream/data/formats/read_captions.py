"""The public formats of captions, found and cut into units, and tars of samples (`docs/data.md`).

Records are numbered from 0. Pictures are not decoded here.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

from midstream.core.digests import plain_name
from midstream.data.formats.captions import (
    PICTURE_KEYS,
    caption_columns,
    caption_of,
    count_annotations,
    field_of,
    first_line,
    json_object,
    objects_of,
    read_coco,
    read_csv,
    read_objects,
    read_table,
    rows_of,
)
from midstream.data.formats.files import (
    base_name,
    exists,
    find_files,
    folder_of,
    inside,
    is_folder,
    name_some,
    read_head,
    read_range,
    shown_files,
    size_of,
)
from midstream.data.formats.records import (
    LARGEST_BYTES,
    NUM_UNIT_RECORDS,
    PICTURES,
    TOO_LARGE,
    CaptionRecord,
    Member,
    Picture,
    ReadOptions,
    Sample,
    Unit,
    is_picture,
    samples_of,
)
from midstream.data.formats.tables import TABLES, columns_of, refuse_splits, table_rows
from midstream.data.source_writer import Reject
from midstream.data.sources import content_hash

# A sample that says nothing of a caption, as against one whose caption is no text.
ABSENT = "no caption"
# What WebDataset groups under the name before its first dot, where no reader looks for it.
DOTTED = "picture with a further dot in its name"
FORMATS = {
    "webdataset": "a .tar of samples with a picture, .txt and .json",
    "datacompdr": "such a .tar whose samples also hold .syn.json",
    "coco": "captions_SPLIT.json with the lists images and annotations",
    "csv": "a .csv or .txt with the header image,caption",
    "imagefolder": "metadata.jsonl with file_name and text",
    "list": "a list or lines of {image, caption}",
    "table": "a .parquet or .arrow with the columns image and text",
    "joined": "tables of `midstream join captions`",
    "files": "a folder of pictures with .txt or .json of the same name beside them",
}
# Which files of a folder are captions; a file given by its own name may have another one.
NAMES = {
    "tar": ("*.tar",),
    "coco": ("captions_*.json", "*.coco.json"),
    "csv": ("captions*.csv", "captions*.txt", "metadata*.csv", "metadata*.txt"),
    "imagefolder": ("metadata.jsonl",),
    "table": tuple(f"*{end}" for end in TABLES),
}
# A table of these columns has the folder of its pictures among its notes.
JOINED_ROOT = b"midstream.pictures"
JOINED_COLUMNS = ("file", "key", "picture", "offset", "size", "hash", "text", "syn.json")
# Kinds that are read where there is none of the others: img2dataset's tars have tables beside them.
_LAST = ("table",)
_BLANK = b"\xef\xbb\xbf \t\r\n"
_SUFFIXES = (".tar", ".json", ".csv", ".txt", ".jsonl", *TABLES)


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
        files = _caption_files(source)
        if not files:
            units.extend(_sample_units(source))
        for path in files:
            if plain_name(base_name(path)).endswith(".tar"):
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
        refuse_splits(source, files)
        return files
    found = {
        kind: [
            file
            for file in files
            if any(fnmatchcase(plain_name(base_name(file)), name) for name in names)
        ]
        for kind, names in NAMES.items()
    }
    kinds = [kind for kind, named in found.items() if named]
    if len(kinds) > 1:
        kinds = [kind for kind in kinds if kind not in _LAST]
    if kinds == ["table"] and not any(map(_shows, found["table"])) and _sample_units(source):
        return []  # img2dataset's tables of what it fetched lie beside its pictures
    if not kinds:
        if _sample_units(source):
            return []
        if lists := [file for file in files if _is_list(file)]:
            return lists
        raise ValueError(f"{source} holds no captions; {_known()}")
    if len(kinds) > 1:
        named = ", ".join(found[kind][0] for kind in kinds)
        raise ValueError(f"{source} holds captions in several formats ({named}); name the files")
    if kinds[0] in _LAST:
        refuse_splits(source, found[kinds[0]])
    return found[kinds[0]]


def _shows(path: str) -> bool:
    columns = columns_of(path)
    return bool(set(PICTURE_KEYS) & set(columns.names)) or JOINED_ROOT in (columns.metadata or {})


def _tar_format(path: str) -> str:
    first = next(samples_of(path), None)
    return "datacompdr" if first is not None and "syn.json" in first.members else "webdataset"


def _lone_format(path: str) -> str:
    """The format of a file that is no tar, by its name and how it begins."""
    name = plain_name(base_name(path))
    found = "table" if name.endswith(TABLES) else ""
    if found and JOINED_ROOT in (columns_of(path).metadata or {}):
        found = "joined"
    if name.endswith(".json") and read_head(path, 4096).lstrip(_BLANK)[:1] != b"[":
        found = "coco"
    elif name.endswith((".json", ".jsonl")):
        first, _ = json_object(next(objects_of(path), b""))
        if name.endswith(".json"):
            found = "list" if first and set(PICTURE_KEYS) & first.keys() else ""
        elif name == "metadata.jsonl" or (first and {"file_name", "image"} & first.keys()):
            found = "imagefolder"
    elif name.endswith((".csv", ".txt")):
        names = {column.strip(b'" \r\n') for column in first_line(path).split(b",")}
        found = "csv" if names & {b"image", b"file_name"} else ""
    if not found:
        raise ValueError(f"{path} holds no captions in a known format; {_known()}")
    return found


def _is_list(path: str) -> bool:
    try:
        return _lone_format(path) in ("list", "imagefolder")
    except ValueError:
        return False


def _cut(path: str, form: str, options: ReadOptions) -> list[Unit]:
    if form == "joined":
        return [Unit(form, (path,))]
    if options.require == "synthetic":
        raise ValueError(f"{path}: {form} has no synthetic captions; do not require them")
    if form == "table":
        caption_columns(path, options)
        return [Unit(form, (path,))]
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


def _sample_units(source: str) -> list[Unit]:
    """Units of the samples that lie as files beside each other: a picture, and its .txt or .json.

    Files of no picture are none of a sample's.
    """
    samples: dict[tuple[str, str], list[str]] = {}
    for file in shown_files(source):
        folder, stem, suffix = _parts(file)
        if suffix in (*PICTURES, "txt", "json", "syn.json"):
            samples.setdefault((folder, stem), []).append(file)
    shown = [files for _, files in sorted(samples.items()) if any(map(is_picture, files))]
    if all(is_picture(file) for files in shown for file in files):
        return []
    parts = (shown[x : x + NUM_UNIT_RECORDS] for x in range(0, len(shown), NUM_UNIT_RECORDS))
    return [Unit("files", tuple(file for files in part for file in files)) for part in parts]


def _parts(file: str) -> tuple[str, str, str]:
    """The folder of a sample's file, the sample's name, and what of it the file is."""
    name = base_name(file)
    end = ".syn.json" if name.lower().endswith(".syn.json") else os.path.splitext(name)[1]
    return folder_of(file), name.removesuffix(name[-len(end) :] if end else ""), end[1:].lower()


def _read_files(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    for (folder, stem), group in groupby(unit.files, key=lambda file: _parts(file)[:2]):
        files = list(group)
        pictures = tuple(base_name(file) for file in files if is_picture(file))
        large = [file for file in files if size_of(file) > LARGEST_BYTES]
        problem, detail = (TOO_LARGE, large[0]) if large else ("", "")
        members: dict[str, Member] = {}
        for file in () if large else files:
            data = read_range(file, 0, LARGEST_BYTES)
            members[_parts(file)[2]] = Member(base_name(file), 0, len(data), data, file=file)
        yield from _of_sample(Sample(folder, stem, members, problem, detail, pictures), options)


def _read_tar(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    for sample in samples_of(unit.files[0]):
        yield from _of_sample(sample, options)


def _read_joined(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """A row is a sample, whose picture is a range of an archive."""
    table = unit.files[0]
    root = options.images or columns_of(table).metadata[JOINED_ROOT].decode()
    for row in table_rows(table, JOINED_COLUMNS):
        file, key, name, offset, size, hashed, text, made = (value.as_py() for value in row)
        path = inside([root], file, f"{table}, sample {key}")
        if not exists(path):
            raise ValueError(
                f"{path} is gone, which {table} names; put it back, or say with --images where "
                "its pictures are now"
            )
        data = read_range(path, offset, size)
        if content_hash(data) != hashed:
            raise ValueError(
                f"{path}, sample {key}: its picture is another than when {table} was joined; put "
                "the archive back, or run `midstream join captions` again"
            )
        _, suffix = os.path.splitext(name.lower())
        members = {suffix[1:]: Member(name, offset, size, data, file=path)}
        others = {"txt": None if text is None else text.encode(), "syn.json": made}
        for end, told in others.items():
            if told is not None:
                members[end] = Member(f"{key}.{end}", 0, len(told), told, file=table)
        yield from _of_sample(Sample(path, key, members, pictures=(name,)), options)


def _of_sample(sample: Sample, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """The sample's record, or why it has none, and a reject for each further picture in it."""
    found = _sample_record(sample, options)
    yield found
    exact = [m.name for suffix, m in sample.members.items() if suffix in PICTURES]
    # The record, or the reject, stands for one of them.
    others = list(sample.pictures)
    others.remove(exact[0]) if exact else others.pop(0) if others else None
    for name in others:
        reason = found.reason if isinstance(found, Reject) and name in exact else DOTTED
        if sample.problem and isinstance(found, Reject):
            reason = found.reason
        yield Reject(f"{sample.path}, member {name}", reason, f"it belongs to {sample.key}")


def _sample_record(sample: Sample, options: ReadOptions) -> CaptionRecord | Reject:
    where, members = sample.where, sample.members
    if sample.problem:
        reason = "picture too large" if sample.problem == TOO_LARGE else sample.problem
        return Reject(where, reason, sample.detail)
    pictures = [members[suffix] for suffix in PICTURES if suffix in members]
    if not pictures:
        detail = f"it has {name_some(sorted(members), 8)}"
        if sample.pictures:
            return Reject(where, DOTTED, detail)
        if "syn.json" in members:
            detail += "; DataCompDR's own tars hold no pictures, join them by uid with DataComp's"
        return Reject(where, "no picture", detail)
    if len(pictures) > 1:
        return Reject(where, "more than one picture", ", ".join(p.name for p in pictures))
    if not pictures[0].data:
        return Reject(where, "zero-byte picture", pictures[0].name)
    picture = Picture(pictures[0].file, pictures[0].offset, pictures[0].data)
    own, synthetic = original_caption(sample, options), _synthetic_captions(sample)
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


def original_caption(sample: Sample, options: ReadOptions) -> str | Reject:
    """The sample's own caption, or why it has none.

    `text_key` in .json comes before .txt only where a user names it.
    """
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
    return Reject(sample.where, reason, f"it has {name_some(sorted(sample.members), 8)}")


_READERS: dict[str, Callable[[Unit, ReadOptions], Iterator[CaptionRecord | Reject]]] = {
    "webdataset": _read_tar,
    "datacompdr": _read_tar,
    "coco": read_coco,
    "csv": read_csv,
    "imagefolder": read_objects,
    "list": read_objects,
    "table": read_table,
    "joined": _read_joined,
    "files": _read_files,
}
