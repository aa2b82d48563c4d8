"""Lists of pictures and captions: CSV, JSON, tables; COCO's own, and Karpathy's splits of them."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import ijson
import pyarrow
from pyarrow import types

from midstream.data.formats.captions import (
    NOT_FETCHED,
    NOT_UTF8,
    PICTURE_KEYS,
    SPLIT,
    Folder,
    caption_of,
    field_of,
    first_folder,
    json_object,
    named,
    picture_key,
    shown_in,
    split_in,
    text_keys,
    wanted_splits,
)
from midstream.data.formats.files import (
    base_name,
    folder_of,
    is_folder,
    is_url,
    read_head,
    read_lines,
    unpacked,
)
from midstream.data.formats.picture_files import picture_roots
from midstream.data.formats.record_files import (
    columns_of,
    entries_of,
    holds_list,
    lone_object,
    table_records,
    table_rows,
    unicode_problem,
)
from midstream.data.formats.records import CaptionRecord, ReadOptions, Unit, is_picture
from midstream.data.source_writer import Reject, or_reject

# What columns of addresses end in, and what is to be done about them.
_ADDRESSES = ("url", "urls")
BY_ADDRESS = "its pictures are addresses: fetch them with img2dataset and give what it writes"
# What img2dataset's tables say of each address, and how that begins of what it has not fetched.
_STATUS, _FAILED = "status", "failed_"
_FETCHING = (_STATUS, "error_message")
TEXT_TABLES = (".csv", ".tsv", ".txt", ".token")
# Python's own limit is 131,072 characters.
csv.field_size_limit(2**24)
_BOM = b"\xef\xbb\xbf"
# How lists of objects begin, and the objects of COCO.
_OBJECTS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\]|$)")
_COCO = re.compile(rb'\{\s*"(info|images|annotations|licenses|categories|type|dataset)"')


def splits_of(path: str, form: str) -> Iterator[str]:
    """The split of each record of a table or list; nothing where the first one says none."""
    if form == "table":
        if SPLIT in columns_of(path).names:
            yield from (str(value.as_py() or "") for (value,) in table_rows(path, [SPLIT]))
    elif form == "csv":
        rows = _csv_rows(path)
        header = next(rows)
        if (name := named(header, [SPLIT])) is not None:
            place = header.index(name)
            yield from (row[place] for row in rows if len(row) > place)
    elif form == "karpathy":
        yield from (split_in(image) for image in _items(path, "images"))
    elif split_in(json_object(next(objects_of(path), b""))[0]):
        yield from (split_in(json_object(data)[0]) for data in objects_of(path))


def read_csv(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """A row a record; its picture lies under images/ or Images/ beside the file, or beside it.

    metadata.csv (Hugging Face imagefolder) names pictures from its own folder.
    """
    path = unit.files[0]
    beside = folder_of(path)
    folders = [] if base_name(path).startswith("metadata") else ["images", "Images"]
    root = options.images or first_folder([f"{beside}/{name}" for name in folders], beside)
    pictures = Folder(root, *picture_roots(path, options))
    for number, row in islice(enumerate(rows_of(path, options)), unit.first, unit.last):
        where = f"{path}, record {number}"
        if isinstance(row, str):
            yield Reject(where, "wrong number of columns", row)
        else:
            name = row[0]
            if not options.images and root != beside and not is_folder(f"{root}/{base_name(root)}"):
                # From where the list lies.
                name = re.sub(rf"^(\.[/\\])?{base_name(root)}[/\\]", "", name)
            yield from pictures.records(where, row[1], name, NOT_UTF8)


def rows_of(path: str, options: ReadOptions) -> Iterator[tuple[str, str] | str]:
    """(picture, caption) of each row under the header, or what is wrong with its columns.

    Bytes that are no UTF-8 stay visible as lone surrogates. Lines without anything are no rows.
    """
    rows = _csv_rows(path)
    header = next(rows)
    image = picture_key(header, ("image", *PICTURE_KEYS))
    caption = named(header, text_keys(options))
    if image is None or caption is None:
        raise _lacking(path, header, options)
    if twice := [name for name in (image, caption) if header.count(name) > 1]:
        raise ValueError(f"{path} has several columns {twice[0]}; give each a name of its own")
    wanted, split = wanted_splits(options), named(header, [SPLIT])
    for row in rows:
        if row and len(row) != len(header):
            yield f"{len(row)}, the header has {len(header)}; quote what holds a comma"
        elif row:
            values = dict(zip(header, row, strict=True))
            if split is None or not wanted or values[split] in wanted:
                yield values[image], values[caption]


def read_objects(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """An object of a list or of lines a record: {file_name or image, text or caption}."""
    path, wanted = unit.files[0], wanted_splits(options)
    pictures = Folder(*picture_roots(path, options))
    for number, data in islice(enumerate(objects_of(path)), unit.first, unit.last):
        where = f"{path}, record {number}"
        values, reason = json_object(data)
        if values is None:
            yield Reject(where, reason)
        elif not wanted or split_in(values) in wanted:
            shown = shown_in(values)
            caption = field_of(values, options)
            if caption is None and shown is not None:
                yield Reject(where, "no caption", f"its keys are {list(values)}"[:200])
                continue
            yield from pictures.records(where, caption, shown, reason)


def read_table(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """A row a record, or several where its caption is a list of them."""
    path, wanted = unit.files[0], wanted_splits(options)
    pictures = Folder(*picture_roots(path, options))
    image, text = caption_columns(path, options)
    for where, row in table_records(path, (image, text, SPLIT, *_FETCHING)):
        if isinstance(row, Reject):
            yield replace(row, reason=NOT_UTF8)
        elif wanted and row.get(SPLIT) not in wanted:
            continue
        elif row[image] is None and str(row.get(_STATUS)).startswith(_FAILED):
            yield Reject(where, NOT_FETCHED, ", ".join(str(row.get(name)) for name in _FETCHING))
        else:
            yield from pictures.records(where, field_of({text: row[text]}, options), row[image])


def caption_columns(path: str, options: ReadOptions) -> tuple[str, str]:
    """The columns of the picture and of the caption in a table; ValueError lists its columns."""
    schema = columns_of(path)
    # What is empty throughout has no type.
    kinds = {field.name: field.type for field in schema if not types.is_null(field.type)}
    # Pictures come before names of pictures.
    held = [name for name in PICTURE_KEYS if name in kinds and not _is_text(kinds[name])]
    image = picture_key(kinds, (*held, *PICTURE_KEYS)) or picture_key(schema.names)
    outer, dot, _ = options.text_key.partition(".")  # json.caption
    asked = (*text_keys(options), *([outer] if dot else []))
    caption = named(list(kinds), asked) or named(schema.names, asked)
    if image is None or caption is None:
        raise _lacking(path, schema.names, options)
    return image, caption


def _is_text(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_address(name: str) -> bool:
    """Whether a column or key of this name says where pictures are, or is itself an address."""
    return name.lower().endswith(_ADDRESSES) or is_url(name)


def _lacking(path: str, columns: Sequence[str], options: ReadOptions) -> ValueError:
    asked, shown = " or ".join(text_keys(options)), [name[:40] for name in columns]
    remedy = "--text-key names another caption"
    shows = picture_key(columns) is not None
    if not shows and any(map(is_address, columns)):
        remedy = BY_ADDRESS
    elif any(map(is_picture, columns)):
        remedy = "its first line is a record: write a header above it, parted as the line is"
    return ValueError(f"{path} has the columns {shown}; it needs image and {asked} ({remedy})")


def objects_of(path: str) -> Iterator[bytes]:
    """The entries of a JSON list, or the lines that are not blank, as the content says."""
    listed = _OBJECTS.match(read_head(path, 4096)) is not None and holds_list(path)
    return (data for _, data in entries_of(path, listed=listed))


def is_object(path: str) -> bool:
    """Whether the file's JSON is one object, as COCO's, and neither a list nor lines of records."""
    head = read_head(path, 2**16).removeprefix(_BOM).lstrip()
    line, _, rest = head.partition(b"\n")
    whole = lone_object(path)
    rest = b"" if whole else rest
    values, _ = json_object(whole or line)
    if values is not None:
        return (
            not rest.strip() and not {*PICTURE_KEYS[:2], *text_keys(ReadOptions())} & values.keys()
        )
    # A line of a record with its picture inside is as long, but begins otherwise.
    return head.startswith(b"{") and (line != head or _COCO.match(head) is not None)


def columns_of_csv(path: str) -> list[str]:
    """The columns that the header of a file names."""
    return next(_csv_rows(path))


# Flickr's own lists: no header, and a number behind each picture.
_TOKEN = re.compile(r"(?P<image>[^\t]+\.\w+)#\d+\t(?P<caption>[^\t\n]*)\n?")


def _csv_rows(path: str) -> Iterator[list[str]]:
    """The header and the rows; raises ValueError with the line of what is no CSV."""
    reader = _csv_reader(path)
    try:
        header = [name.strip() for name in next(reader, [])]
        yield header
        tabs = getattr(getattr(reader, "dialect", None), "delimiter", "") == "\t"
        for row in reader:
            # A caption that begins with a quote, in a file that does not quote.
            if tabs and any(_holds_rows(row, n, len(header)) for n in range(len(row))):
                raise csv.Error("a field goes over lines and columns")
            yield row
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num:,}: no CSV ({error}); quote fields that hold commas, "
            "quotes or line ends, and double the quotes inside"
        ) from None


def _holds_rows(row: Sequence[str], place: int, num_columns: int) -> bool:
    """Whether a field, with what stands beside it, is lines of the header's columns each."""
    if "\n" not in row[place] or "\t" not in row[place]:
        return False
    lines = "\t".join(("",) * place + (row[place],) + ("",) * (len(row) - place - 1)).split("\n")
    return all(line.count("\t") + 1 == num_columns for line in lines if line.strip("\r"))


def _csv_reader(path: str) -> Any:
    decoded = (line.decode("utf-8", "surrogateescape") for line in read_lines(path))
    # Some programs end lines with a carriage return alone.
    lines = (part for line in decoded for part in re.split(r"(?<=\r)(?!\n)", line) if part)
    header = next(lines, "").removeprefix("\ufeff")
    if not header.isprintable() and unicode_problem(header):
        raise ValueError(f"{path}: its header is not UTF-8; write the file in UTF-8")
    if _TOKEN.fullmatch(header):
        rows = (_TOKEN.fullmatch(line.rstrip("\r\n")) for line in chain([header], lines))
        split = (list(row.groups()) if row else [] for row in rows)
        return chain([["image", "caption"]], split)
    delimiter = max(",\t;|", key=header.count)
    # Strict: a quote that is never closed would make one caption of the rest of the file.
    return csv.reader(
        chain([header], lines),
        delimiter=delimiter,
        skipinitialspace=f"{delimiter} " in header,
        strict=True,
    )


def read_coco(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """An annotation a record; its picture is the `file_name` of its image in the split's folder."""
    path = unit.files[0]
    wanted = list(islice(_items(path, "annotations"), unit.first, unit.last))
    # The images are read again for each unit: a list of all of them need not fit in memory.
    ids = {_image_id(annotation, "image_id") for annotation in wanted} - {None}
    names: dict[str | None, object] = {}
    for image in _items(path, "images"):
        if (key := _image_id(image, "id")) in ids:
            name = image.get("file_name")
            if names.setdefault(key, name) != name:
                raise ValueError(
                    f"{path}: the images {names[key]} and {name} have one id, {key}; give each "
                    "its own"
                )
    place = _Places(path, options)
    for number, annotation in enumerate(wanted, unit.first):
        where, key = f"{path}, record {number}", _image_id(annotation, "image_id")
        if not isinstance(annotation, dict):
            yield Reject(where, "no caption", "it is no JSON object")
        elif key not in names:
            yield Reject(where, "missing picture", f"the list images has no id {key}")
        else:
            caption = or_reject(where, caption_of, field_of(annotation, options))
            yield place.record(where, caption, names[key])


class _Places:
    """Where the pictures of a list are: in the split's folder, or in one that their names say.

    Such names start from the list's folder, `options.images` or one beside them, or stand for a
    picture of the split's folder itself.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self._split = _coco_pictures(path, options)
        self._candidates = (self._split, *_bases(path, options))
        self._roots = picture_roots(path, options)
        self._starts: dict[str, tuple[Folder, str]] = {}

    def record(self, where: str, caption: str | Reject, name: object) -> CaptionRecord | Reject:
        """A caption with the picture of this `file_name`."""
        inner = ""
        if isinstance(name, str):
            name = name.replace("\\", "/").removeprefix("./")
            # Absolute names and addresses say themselves where they are.
            inner = "" if name.startswith("/") or ":" in name else name.rpartition("/")[0]
        if inner not in self._starts:
            self._starts[inner] = self._start(inner)
        folder, taken_off = self._starts[inner]
        name = name.removeprefix(taken_off) if isinstance(name, str) else name
        return folder.record(where, caption, name)

    def _start(self, inner: str) -> tuple[Folder, str]:
        """The folder that names begin from which lie in `inner`, and what is no part of them."""
        root, taken_off = self._split, ""
        if inner:
            places = [at for at in self._candidates if is_folder(f"{at}/{inner}")]
            itself = [at for at in self._candidates if f"/{at}".endswith(f"/{inner}")]
            root = [*places, *itself, root][0]
            taken_off = f"{inner}/" if itself and not places else ""
        return Folder(root, *self._roots), taken_off


def count_annotations(path: str, options: ReadOptions) -> int:
    """How many there are; ValueError if the file is no whole one of COCO's captions."""
    count = 0
    for annotation in _items(path, "annotations"):
        if not count and (
            not isinstance(annotation, dict) or field_of(annotation, options) is None
        ):
            raise ValueError(f"{path}: its first annotation has no caption; give captions_*.json")
        count += 1
    if not count or next(_items(path, "images"), None) is None:
        raise ValueError(
            f"{path} lacks entries in the lists images and annotations; give COCO's "
            "captions_*.json, or write what is inside an object as a list: [{image, caption}, ...]"
        )
    return count


def _items(path: str, name: str) -> Iterator[Any]:
    """The entries of the list `name` in a JSON object."""
    count = 0
    try:
        with unpacked(path) as stream:
            if stream.peek(len(_BOM)).startswith(_BOM):
                stream.read(len(_BOM))
            for item in ijson.items(stream, f"{name}.item", use_float=True):
                yield item
                count += 1
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        # NaN is no JSON, but pandas writes it; Python's reader takes the file whole.
        found = _whole(path) if re.search("NaN|Infinity", reason) else None
        if not isinstance(found, dict):
            message = f"{path} is not whole JSON in UTF-8 ({reason}); fetch it again"
            raise ValueError(message) from None
        listed = found.get(name)
        yield from listed[count:] if isinstance(listed, list) else ()


def _whole(path: str) -> Any:
    with unpacked(path) as stream:
        try:
            return json.load(stream)
        except ValueError:
            return None


def _image_id(value: object, name: str) -> str | None:
    """The id as text: 1, 1.0 and "1" are one."""
    found = value.get(name) if isinstance(value, dict) else None
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    return str(found) if isinstance(found, int | str) else None


def _coco_pictures(path: str, options: ReadOptions) -> str:
    """The folder of the split's pictures: train2014/ for captions_train2014.json."""
    named = re.match(r"captions_([^.]+)", base_name(path))
    split = named[1] if named else ""
    bases = _bases(path, options)
    splits = [f"{base}/{split}" for base in bases] if split else []
    return first_folder(splits, options.images or first_folder(bases[1:2], bases[0]))


def _bases(path: str, options: ReadOptions) -> list[str]:
    """The folders that a list's pictures, or the folders of its splits, may lie in."""
    if options.images is not None:
        return [options.images, f"{options.images}/images"]
    beside = folder_of(path)
    above = f"{beside}/.." if base_name(beside) in (".", "..") else folder_of(beside)
    return [beside, f"{beside}/images", above, f"{above}/images"]


def holds_sentences(path: str) -> bool:
    """Whether a JSON object is one of Karpathy's splits: its pictures have their sentences."""
    first = next(_items(path, "images"), None)
    return isinstance(first, dict) and "sentences" in first


def count_images(path: str) -> int:
    """How many pictures one of Karpathy's splits has; ValueError if the file is not whole."""
    return sum(1 for _ in _items(path, "images"))


def read_karpathy(unit: Unit, options: ReadOptions) -> Iterator[CaptionRecord | Reject]:
    """A record for each sentence of a picture of the splits that are wanted."""
    path, wanted = unit.files[0], wanted_splits(options)
    bases = _bases(path, options)
    folders: dict[str, Folder] = {}
    for number, image in islice(enumerate(_items(path, "images")), unit.first, unit.last):
        where = f"{path}, record {number}"
        if wanted and split_in(image) not in wanted:
            continue
        if not isinstance(image, dict):
            yield Reject(where, "no caption", "it is no JSON object")
            continue
        folder = str(image.get("filepath") or "")
        if folder not in folders:
            places = [f"{base}/{folder}" for base in bases] if folder else bases[1:2]
            root = first_folder(places, bases[0])
            folders[folder] = Folder(root, *picture_roots(path, options))
        listed = image.get("sentences") or [None]
        sentences = listed if isinstance(listed, list) else [None]
        yield from folders[folder].records(where, sentences, image.get("filename"))
