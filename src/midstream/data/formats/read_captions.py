"""The public formats of captions, found and cut into units, and tars of samples (`docs/data.md`).

Records are numbered from 0. Pictures are not decoded here.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby, islice

from midstream.core.tokens import name_some
from midstream.data.formats.caption_lists import (
    BY_ADDRESS,
    TEXT_TABLES,
    caption_columns,
    columns_of_csv,
    count_annotations,
    count_images,
    holds_sentences,
    is_address,
    is_object,
    objects_of,
    read_coco,
    read_csv,
    read_karpathy,
    read_objects,
    read_table,
    rows_of,
    splits_of,
)
from midstream.data.formats.captions import (
    ABSENT,
    check_splits,
    first_usable,
    json_object,
    original_captions,
    picture_key,
    shown_in,
    synthetic_captions,
    without,
)
from midstream.data.formats.files import (
    base_name,
    find_files,
    folder_of,
    full_name,
    is_url,
    names_folders,
    read_range,
    shown_files,
    size_of,
)
from midstream.data.formats.picture_files import not_there
from midstream.data.formats.record_files import (
    TABLES,
    columns_of,
    is_joined,
    joined_samples,
    refuse_splits,
)
from midstream.data.formats.records import (
    FILES,
    LARGEST_BYTES,
    NUM_UNIT_RECORDS,
    PICTURES,
    TOO_LARGE,
    TWICE,
    CaptionRecord,
    Member,
    Picture,
    ReadOptions,
    Sample,
    Unit,
    is_picture,
    parts_of,
    sample_units,
    samples_of,
)
from midstream.data.source_writer import Reject

# What WebDataset groups under the name before its first dot, where no reader looks for it.
DOTTED = "picture with a further dot in its name"
FORMATS = {
    "webdataset": "a .tar of samples with a picture, .txt and .json",
    "datacompdr": "such a .tar whose samples also hold .syn.json",
    "coco": "captions_SPLIT.json with the lists images and annotations",
    "karpathy": "dataset_coco.json and its like, with sentences in the list images",
    "csv": "a .csv, .tsv or .txt with the header image,caption",
    "imagefolder": "metadata.jsonl with file_name and text",
    "list": "a list or lines of {image, caption}",
    "table": "a .parquet or .arrow with the columns image and text",
    "joined": "tables of `midstream join captions`",
    FILES: "a folder of pictures with .txt or .json of the same name beside them",
}
# Which files of a folder are captions; a file given by its own name may have another one.
NAMES = {
    "tar": ("*.tar",),
    "coco": ("captions_*.json", "*.coco.json"),
    "karpathy": ("dataset_coco*.json", "dataset_flickr*.json"),
    "csv": (
        *(f"{name}*{end}" for name in ("captions", "metadata") for end in TEXT_TABLES),
        *("*.token", "*.token.txt"),
    ),
    "imagefolder": ("metadata.jsonl",),
    "table": tuple(f"*{end}" for end in TABLES),
}
# Kinds that are read where there is none of the others: img2dataset's tars have tables beside them.
_LAST = ("table",)
_SUFFIXES = (".tar", ".json", ".jsonl", *TEXT_TABLES, *TABLES, ".caption", ".text")
# Formats whose records say no split.
_UNSPLIT = ("webdataset", "datacompdr", "coco", "joined", FILES)
# So many records of two lists are compared.
_NUM_COMPARED = 100


def caption_units(sources: Sequence[str], options: ReadOptions) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, in their order.

    A tar is one unit; other files are cut every 20,000 records. The first tar of a source that
    begins with a sample tells the format of all its tars. Raises FileNotFoundError for what is not
    there, and ValueError for a file of an unknown format or without a record, a folder with
    captions of two formats, and for synthetic captions required of a format that has none.
    """
    units: list[Unit] = []
    for source in sources:
        files = _caption_files(source, options)
        if not files:
            units.extend(sample_units(source))
        tars = [path for path in files if full_name(path).endswith(".tar")]
        forms = dict.fromkeys(tars, _tar_format(tars))
        whole = {*tars}
        forms |= {path: _lone_format(path) for path in files if path not in whole}
        _check_splits(source, forms, options)
        for path in files:
            own = [Unit(forms[path], (path,))]
            units.extend(own if path in whole else _cut(path, forms[path], options))
    if options.split and (mixed := [unit for unit in units if unit.format in _UNSPLIT]):
        raise ValueError(f"{mixed[0].files[0]} says no split of its records; name no split")
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


def _check_splits(source: str, forms: Mapping[str, str], options: ReadOptions) -> None:
    """`check_splits` over all files of a source that say their records' splits."""
    said = {
        path: {*splits_of(path, form)} - {""}
        for path, form in forms.items()
        if form not in _UNSPLIT
    }
    if said:
        where = next(iter(said)) if len(said) == 1 else source
        check_splits(where, {name for own in said.values() for name in own}, options)


def _known() -> str:
    return "known are " + "; ".join(f"{name}: {what}" for name, what in FORMATS.items())


def _caption_files(source: str, options: ReadOptions) -> list[str]:
    files = find_files(source, _SUFFIXES)
    names = {file: full_name(file) for file in files}
    of_one = files == [source] or _of_one_kind(source, names)
    if of_one and not names_folders(source, names):
        refuse_splits(source, files)
        return files
    found = {
        kind: [
            file for file in files if any(fnmatchcase(names[file], pattern) for pattern in patterns)
        ]
        for kind, patterns in NAMES.items()
    }
    kinds = [kind for kind, named in found.items() if named]
    if len(kinds) > 1:
        kinds = [kind for kind in kinds if kind not in _LAST]
    if kinds == ["table"] and not any(map(_shows, found["table"])) and sample_units(source):
        return []  # img2dataset's tables of what it fetched lie beside its pictures
    if not kinds:
        if sample_units(source):
            return []
        if lists := [file for file in files if _is_list(file)]:
            _refuse_lists_of_the_same(lists, options)
            return lists
        own = f"; if one of {name_some(files, 5)} has them, name it" if files else ""
        raise ValueError(f"{source} holds no captions{own}; {_known()}")
    if len(kinds) > 1:
        named = ", ".join(found[kind][0] for kind in kinds)
        raise ValueError(f"{source} holds captions in several formats ({named}); name the files")
    if kinds[0] in _LAST:
        refuse_splits(source, found[kinds[0]])
    if kinds[0] in ("csv", "coco"):
        _refuse_lists_of_the_same(found[kinds[0]], options)
    return found[kinds[0]]


def _of_one_kind(source: str, names: Mapping[str, str]) -> bool:
    """Whether a pattern of files means each of them, and not what is captions among them."""
    ends = {os.path.splitext(name)[1] for name in names.values()}
    return len(ends) == 1 and not any(map(is_picture, shown_files(source, names)))


def _refuse_lists_of_the_same(files: Sequence[str], options: ReadOptions) -> None:
    """Raises ValueError for lists beside each other that begin with captions of one picture, and
    for COCO's of two years, which have the same pictures under other names."""
    begins: dict[tuple[str, str], str] = {}
    for file in files:
        places = {(folder_of(file), name) for name in _first_pictures(file, options)}
        for place in sorted(places):
            if begins.setdefault(place, file) != file:
                raise ValueError(
                    f"{begins[place]} and {file} both have captions of {place[1]}; remove the one "
                    "that is not meant, or name the files to read"
                )
    coco = [file for file in files if _lone_format(file) == "coco"]
    years = {year: file for file in coco for year in re.findall("20(?:14|17)", base_name(file))}
    if len(years) > 1:
        raise ValueError(
            f"{' and '.join(sorted(years.values()))} have captions of the same pictures; name the "
            "files of one year"
        )


def _first_pictures(file: str, options: ReadOptions) -> Iterator[str]:
    form = _lone_format(file)
    if form == "csv":
        rows = islice(rows_of(file, options), _NUM_COMPARED)
        yield from (row[0] for row in rows if not isinstance(row, str))
    elif form in ("list", "imagefolder"):
        for data in islice(objects_of(file), _NUM_COMPARED):
            values, _ = json_object(data)
            shown = shown_in(values or {})
            yield from [shown] if isinstance(shown, str) else []


def _shows(path: str) -> bool:
    columns = columns_of(path)
    return picture_key(columns.names) is not None or is_joined(path)


def _tar_format(paths: Sequence[str]) -> str:
    for path in paths:
        # A damaged one is told with all that are, once the others are read.
        with suppress(ValueError):
            if first := next(samples_of(path), None):
                return "datacompdr" if "syn.json" in first.members else "webdataset"
    return "webdataset"


def _lone_format(path: str) -> str:
    """The format of a file that is no tar, by its name and how it begins."""
    name = full_name(path)
    found, first = "table" if name.endswith(TABLES) else "", None
    if found and is_joined(path):
        found = "joined"
    if name.endswith((".json", ".jsonl")) and is_object(path):
        found = "karpathy" if holds_sentences(path) else "coco"
    elif name.endswith((".json", ".jsonl")):
        first, _ = json_object(next(objects_of(path), b""))
        if name == "metadata.jsonl" or picture_key(first or ()) is not None:
            found = "list" if name.endswith(".json") else "imagefolder"
    elif name.endswith(TEXT_TABLES):
        header = columns_of_csv(path)
        shows = picture_key(header) is not None or any(map(is_picture, header))
        found = "csv" if shows or name.endswith((".csv", ".tsv")) else ""
    if not found:
        addressed = first is not None and any(map(is_address, first))
        remedy = BY_ADDRESS if addressed else _known()
        raise ValueError(f"{path} holds no captions in a known format; {remedy}")
    return found


def _is_list(path: str) -> bool:
    """Whether what a file of any name holds says that it is a list of pictures."""
    try:
        form = _lone_format(path)
        shows = form == "csv" and picture_key(columns_of_csv(path)) is not None
    except ValueError:
        return False
    return shows or form in ("list", "imagefolder", "karpathy")


def _cut(path: str, form: str, options: ReadOptions) -> list[Unit]:
    if form == "joined" and options.text_key != "text":
        raise ValueError(f"{path} keeps no field {options.text_key}; leave --text-key out")
    if form == "joined":
        return [Unit(form, (path,))]
    if options.require == "synthetic":
        raise ValueError(f"{path}: {form} has no synthetic captions; do not require them")
    if form == "table":
        caption_columns(path, options)
        return [Unit(form, (path,))]
    if form == "coco":
        count = count_annotations(path, options)
    elif form == "karpathy":
        count = count_images(path)
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


def _read_files(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    for (folder, stem), group in groupby(unit.files, key=lambda file: parts_of(file)[:2]):
        files = list(group)
        pictures = tuple(base_name(file) for file in files if is_picture(file))
        gone = [file for file in files if not (is_url(file) or os.path.exists(file))]
        if gone:
            reason = "missing picture" if is_picture(gone[0]) else ABSENT
            yield Reject(f"{folder}, sample {stem}", reason, not_there(gone[0]))
            continue
        large = [file for file in files if size_of(file) > LARGEST_BYTES]
        problem, detail = (TOO_LARGE, large[0]) if large else ("", "")
        members: dict[str, Member] = {}
        for file in () if large else files:
            data, suffix = read_range(file, 0, LARGEST_BYTES), parts_of(file)[2]
            if suffix in members and not is_picture(file):
                problem, detail = TWICE, f"{members[suffix].name} and {base_name(file)}"
            members[suffix] = Member(base_name(file), 0, len(data), data, file=file)
        yield from _of_sample(Sample(folder, stem, members, problem, detail, pictures), options)


def _read_samples(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    (path,), is_table = unit.files, unit.format == "joined"
    for sample in joined_samples(path, options) if is_table else samples_of(path):
        yield from _of_sample(sample, options)


def _of_sample(sample: Sample, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """The sample's records, or why it has none, and a reject for each further picture in it."""
    found, *others = _sample_records(sample, options)
    yield found
    yield from others
    exact = [m.name for suffix, m in sample.members.items() if suffix in PICTURES]
    # The record, or the reject, stands for one of them.
    unseen = list(sample.pictures)
    unseen.remove(exact[0]) if exact else unseen.pop(0) if unseen else None
    for name in unseen:
        reason = found.reason if isinstance(found, Reject) and name in exact else DOTTED
        if sample.problem and isinstance(found, Reject):
            reason = found.reason
        yield Reject(f"{sample.path}, member {name}", reason, f"it belongs to {sample.key}")


def _sample_records(sample: Sample, options: ReadOptions) -> list[CaptionRecord | Reject]:
    """Its record, with the first of its own captions that can be used and the synthetic ones, or
    one for each of its own where none is synthetic."""
    made = _made_record(sample, options)
    if isinstance(made, Reject):
        return [made]
    captions = original_captions(sample, options)
    if not made.synthetic:
        return [
            one if isinstance(one, Reject) else replace(made, where=at, caption=one)
            for at, one in captions
        ]
    usable = first_usable(captions)
    if usable is None and options.require == "original":
        return [one for _, one in captions if isinstance(one, Reject)]
    there = sum(not isinstance(one, Reject) or one.reason != ABSENT for _, one in captions)
    left_out = made.left_out + there - (usable is not None)
    return [replace(made, caption=usable or "", left_out=left_out)]


def _made_record(sample: Sample, options: ReadOptions) -> CaptionRecord | Reject:
    """The sample's picture with its synthetic captions alone, or why it can have no record."""
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
    synthetic = synthetic_captions(sample)
    usable = tuple(caption for caption in synthetic if isinstance(caption, str))
    unusable = [caption for caption in synthetic if isinstance(caption, Reject)]
    if options.require == "synthetic" and not usable:
        return unusable[0] if unusable else without(sample, "no synthetic caption")
    return CaptionRecord(where, "", picture, usable, len(unusable))


_READERS: dict[str, Callable[[Unit, ReadOptions], Iterator[CaptionRecord | Reject]]] = {
    "webdataset": _read_samples,
    "datacompdr": _read_samples,
    "coco": read_coco,
    "karpathy": read_karpathy,
    "csv": read_csv,
    "imagefolder": read_objects,
    "list": read_objects,
    "table": read_table,
    "joined": _read_samples,
    FILES: _read_files,
}
