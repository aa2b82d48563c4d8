"""Documents of texts and pictures in the public layouts (`docs/data.md`), each part in its place.

Rows and records are numbered from 0, lines from 1. What a layout calls a picture is a name, an
address, bytes, a member of its tar or a frame of its TIFF; none is decoded here but such frames.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pyarrow

from midstream.data.examples import IMAGE_MARK
from midstream.data.formats.document_parts import (
    PLACES,
    TIFF,
    Part,
    Pictures,
    Shown,
    document_of,
    frame_of,
    frames_of,
)
from midstream.data.formats.files import base_name, find_files, full_name, shown_files
from midstream.data.formats.picture_files import (
    MISSING,
    ZERO_BYTES,
    PicturesByUrl,
    index_urls,
    load_picture,
    picture_roots,
)
from midstream.data.formats.record_files import (
    NOT_UTF8,
    TABLES,
    columns_of,
    entries_of,
    holds_list,
    json_object,
    refuse_splits,
    table_records,
    table_rows,
    unquoted,
)
from midstream.data.formats.records import (
    PARAGRAPH,
    DocumentRecord,
    Picture,
    ReadOptions,
    Sample,
    Unit,
    samples_of,
)
from midstream.data.source_writer import Reject, RejectedError, or_reject
from midstream.data.sources import content_hash

SUFFIXES = (".jsonl", ".json", ".tar", *TABLES)
# OBELICS's mark for where another document begins.
END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
# What stands between MMC4's texts, which are sentences.
SENTENCE = " "
NO_DOCUMENT = "not a document"
EMPTY_PLACE, UNLIKE, OTHER = "place without text or picture", "similarity too low", "other modality"
_PARALLEL, _MATCHED = ("texts", "images"), ("text_list", "image_info")
_MARKED = ("text", "images")
_ROWS = ("sample_id", "position", "modality")
_ROW_COLUMNS = (*_ROWS, "text_content", "binary_content", "source_ref", "materialize_error")
_LAYOUTS = (
    f"{' and '.join(_PARALLEL)} (OBELICS, MINT-1T), {' and '.join(_MATCHED)} (MMC4, with its "
    f"similarity_matrix), {', '.join(_ROWS)} (NeMo Curator), or {' and '.join(_MARKED)} with "
    f"{IMAGE_MARK} where pictures stand"
)

Item = DocumentRecord | Reject


def document_units(sources: Sequence[str], options: ReadOptions) -> list[Unit]:
    """The work that `sources` (files, folders, patterns, `fsspec` URLs) make, one unit a file.

    MMC4's .jsonl.zip are read as they are. Where `options.images` holds tars of img2dataset, their
    addresses are indexed (see `index_urls`). Raises FileNotFoundError for what is not there, and
    ValueError for a file of an unknown format.
    """
    units = [Unit(_format(path), (path,)) for source in sources for path in _files(source)]
    if options.images is not None:
        index_urls(options.images)
    return units


def read_documents(unit: Unit, options: ReadOptions) -> Iterator[Item]:
    """The documents of a unit in the order of its file, or why not.

    OBELICS's mark of a document's end makes several of one record. Names of pictures start from
    `options.images`, else from the file's folder; addresses are looked up in the tars there. Raises
    ValueError that names the file if it is cut short or damaged.
    """
    path = unit.files[0]
    with closing(PicturesByUrl(options.images)) as by_url:
        # What is in an archive names pictures from the archive's folder.
        packed = path.rpartition("::")[2] if path.startswith("zip://") else path
        pictures = Pictures(picture_roots(packed, options), by_url)
        yield from _READERS[unit.format](path, options, pictures)


@dataclass(frozen=True)
class _Layout:
    """The documents that a record holds, and what is left out of the first that is one."""

    documents: list[list[Part]]
    joint: str = PARAGRAPH
    left_out: tuple[str, ...] = ()


def _files(source: str) -> list[str]:
    shown = shown_files(source)
    packed = [file for file in shown if base_name(file).lower().endswith(".jsonl.zip")]
    members = [x for file in packed for x in find_files(f"zip://*.jsonl::{file}", (".jsonl",))]
    others = {*shown} - {*packed}
    if packed and not any(full_name(file).endswith(SUFFIXES) for file in others):
        return members
    files = find_files(source, SUFFIXES, {*shown})
    refuse_splits(source, files)
    return files + members


def _format(path: str) -> str:
    name = full_name(path)
    if name.endswith(TABLES):
        names = set(columns_of(path).names)
        if names >= {*_ROWS}:
            return "rows"
        if any(names >= {*layout} for layout in (_PARALLEL, _MATCHED, _MARKED)):
            return "table"
        raise ValueError(f"{path} has the columns {sorted(names)}; documents need {_LAYOUTS}")
    if name.endswith(".tar"):
        return "tar"
    if name.endswith((".json", ".jsonl")):
        return "json"
    raise ValueError(
        f"{path} is of no known format of documents; known are .json, .jsonl, MMC4's "
        f".jsonl.zip, .tar and tables ({', '.join(TABLES)}) with {_LAYOUTS}"
    )


def _read_json(path: str, options: ReadOptions, pictures: Pictures) -> Iterator[Item]:
    for where, data in entries_of(path, listed=holds_list(path)):
        yield from _documents(where, or_reject(where, json_object, data), options, pictures)


def _read_table(path: str, options: ReadOptions, pictures: Pictures) -> Iterator[Item]:
    wanted = (*_PARALLEL, *_MATCHED, *_MARKED, "similarity_matrix")
    for where, row in table_records(path, wanted):
        yield from _documents(where, row, options, pictures)


def _read_tar(path: str, options: ReadOptions, pictures: Pictures) -> Iterator[Item]:
    for sample in samples_of(path, (".json", ".tiff", ".tif")):
        record = or_reject(sample.where, _record_in, sample)
        yield from _documents(sample.where, record, options, pictures, sample)


def _record_in(sample: Sample) -> dict[str, Any]:
    if sample.problem:
        raise RejectedError(sample.problem, sample.detail)
    if "json" not in sample.members:
        raise RejectedError(NO_DOCUMENT, f"it has {', '.join(sorted(sample.members))}")
    return json_object(sample.members["json"].data)


def _documents(
    where: str,
    record: Mapping[str, Any] | Reject,
    options: ReadOptions,
    pictures: Pictures,
    sample: Sample | None = None,
) -> Iterator[Item]:
    layout = record if isinstance(record, Reject) else or_reject(where, _layout_of, record, options)
    if isinstance(layout, _Layout) and sample is not None:
        held = or_reject(where, _with_members, layout.documents, sample)
        layout = held if isinstance(held, Reject) else replace(layout, documents=held)
    if isinstance(layout, Reject):
        yield layout
        return
    left_out = layout.left_out
    for number, parts in enumerate(layout.documents):
        place = f"{where}, document {number}" if len(layout.documents) > 1 else where
        loaded = [
            or_reject(place, pictures.load, place, *x.values) if isinstance(x, Shown) else x
            for x in parts
        ]
        document = document_of(place, loaded, options, left_out, layout.joint)
        yield document
        # Counted once, with the first that is none of the rejects.
        left_out = () if isinstance(document, DocumentRecord) else left_out


def _layout_of(record: Mapping[str, Any], options: ReadOptions) -> _Layout:
    for names, read in ((_MATCHED, _matched), (_PARALLEL, _parallel)):
        if all(name in record for name in names):
            texts, shown = (unquoted(record[name]) for name in names)
            if not isinstance(texts, list) or not isinstance(shown, list):
                raise RejectedError(NO_DOCUMENT, f"{' and '.join(names)} are no lists")
            # NaN is how pandas says that there is none.
            texts, shown = ([None if x != x else x for x in held] for held in (texts, shown))
            if wrong := {type(x).__name__ for x in texts if not isinstance(x, str | None)}:
                raise RejectedError(NO_DOCUMENT, f"{names[0]} hold {sorted(wrong)}, not texts")
            return read(texts, shown, record, options)
    if all(name in record for name in _MARKED):
        return _marked(*(unquoted(record[name]) for name in _MARKED))
    raise RejectedError(NO_DOCUMENT, f"its keys are {list(record)}; it needs {_LAYOUTS}"[:400])


def _marked(text: object, shown: object) -> _Layout:
    """A text in which each `<image>` stands for the next picture."""
    if not isinstance(text, str) or not isinstance(shown, list):
        found = f"{type(text).__name__} and {type(shown).__name__}"
        raise RejectedError(NO_DOCUMENT, f"{' and '.join(_MARKED)} are {found}, no text and list")
    pieces = [piece.strip() for piece in text.split(IMAGE_MARK)]
    if len(pieces) - 1 != len(shown):
        found = f"{len(pieces) - 1} {IMAGE_MARK} marks, {len(shown)} pictures"
        raise RejectedError(PLACES, found)
    parts: list[Part] = [pieces[0]]
    for picture, piece in zip(shown, pieces[1:], strict=True):
        parts += [Shown((picture,)), piece]
    return _Layout([[part for part in parts if part]])


def _parallel(
    texts: list[str | None], shown: list[object], record: Mapping[str, Any], options: ReadOptions
) -> _Layout:
    """OBELICS's and MINT-1T's: a text or a picture at each place."""
    if len(texts) != len(shown):
        raise RejectedError(PLACES, f"{len(texts)} places of texts, {len(shown)} of pictures")
    documents: list[list[Part]] = [[]]
    num_empty = 0
    for place, (text, picture) in enumerate(zip(texts, shown, strict=True)):
        words = (text or "").strip()
        # Columns of structs say {bytes: null, path: null}.
        is_shown = any(picture.values()) if isinstance(picture, dict) else picture not in ("", None)
        if words and is_shown:
            raise RejectedError(PLACES, f"a text and a picture at place {place}")
        num_empty += not words and not is_shown
        if is_shown:
            documents[-1].append(Shown((picture,)))
        for number, piece in enumerate(words.split(END_OF_DOCUMENT)):
            documents += [[]] if number else []
            documents[-1] += [piece.strip()] if piece.strip() else []
    held = [parts for parts in documents if parts]
    return _Layout(held or [[]], left_out=(EMPTY_PLACE,) * num_empty)


def _matched(
    texts: list[str | None], shown: list[object], record: Mapping[str, Any], options: ReadOptions
) -> _Layout:
    """MMC4's: each picture stands before the text that it is matched to."""
    before: list[list[Part]] = [[] for _ in texts]
    left_out: list[str] = []
    for number, info in enumerate(shown):
        place = info.get("matched_text_index") if isinstance(info, dict) else None
        place = int(place) if isinstance(place, float) and place.is_integer() else place
        if not isinstance(info, dict) or type(place) is not int or not 0 <= place < len(texts):
            found = f"picture {number} is matched to text {place!r} of {len(texts)}"
            raise RejectedError(PLACES, found)
        if options.similarity is not None:
            likeness = _likeness(info, record, number, place)
            if likeness is None or not likeness >= options.similarity:
                left_out.append(UNLIKE)
                continue
        names = ("image_base64", "image_name", "raw_url")
        before[place].append(Shown(tuple(info.get(name) for name in names)))
    parts: list[Part] = []
    for text, pictures in zip(texts, before, strict=True):
        words = (text or "").strip()
        parts += [*pictures, words] if words else pictures
    return _Layout([parts], SENTENCE, tuple(left_out))


def _likeness(
    info: Mapping[str, Any], record: Mapping[str, Any], number: int, place: int
) -> float | None:
    """How like its text a picture is: as it is said, else by the matrix (pictures x texts)."""
    found = info.get("matched_sim")
    try:
        if found is None:
            found = record["similarity_matrix"][number][place]
        return float(found) if isinstance(found, int | float) else None
    # OverflowError: whole numbers of hundreds of digits.
    except (KeyError, IndexError, TypeError, OverflowError):
        return None


def _with_members(documents: list[list[Part]], sample: Sample) -> list[list[Part]]:
    """Pictures that are members of the sample, or in order the frames of its TIFF, in place."""
    members = sample.members
    tiff = next((members[end] for end in ("tiff", "tif") if end in members), None)
    by_name = {base_name(member.name): member for member in members.values()} | members
    count = sum(isinstance(part, Shown) for parts in documents for part in parts)
    frames = iter(() if tiff is None else frames_of(tiff, count, sample.where))

    def placed(part: Part) -> Part:
        if not isinstance(part, Shown):
            return part
        if tiff is not None:
            return next(frames)
        named = (by_name[x] for x in part.values if isinstance(x, str) and x in by_name)
        member = next(named, None)
        if member is None:
            return part
        if not member.data:
            return Reject(sample.where, ZERO_BYTES, member.name)
        return Picture(member.file, member.offset, member.data)

    return [[placed(part) for part in parts] for parts in documents]


def _read_rows(path: str, options: ReadOptions, pictures: Pictures) -> Iterator[Item]:
    """NeMo Curator's: a row a part; those of a sample stand together."""
    names = columns_of(path).names
    columns = [name for name in _ROW_COLUMNS if name in names]
    seen: set[bytes] = set()

    def document(key: str, group: Iterable[tuple[pyarrow.Scalar, ...]], where: str) -> Item:
        try:
            rows = [dict(zip(columns, (x.as_py() for x in row), strict=True)) for row in group]
        except UnicodeDecodeError as error:
            raise RejectedError(NOT_UTF8, str(error)) from None
        digest = content_hash(key.encode("utf-8", "surrogatepass"))
        if digest in seen:
            raise RejectedError("sample in two places", "its rows do not stand together; sort them")
        seen.add(digest)
        parts, left_out = _parts_of_rows(rows, where, pictures)
        return document_of(where, parts, options, left_out)

    for key, group in groupby(table_rows(path, columns), key=lambda row: _name_of(row[0])):
        where = f"{path}, sample {key}"
        yield or_reject(where, document, key, group, where)


def _name_of(sample: Any) -> str:
    """The sample that a row is of, from its column; bytes that are no UTF-8 as escapes."""
    try:
        return str(sample.as_py())
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "backslashreplace")


def _parts_of_rows(
    rows: Iterable[Mapping[str, Any]], where: str, pictures: Pictures
) -> tuple[list[str | Picture | Reject], list[str]]:
    told = [row for row in rows if row["modality"] != "metadata"]
    places = [row["position"] for row in told]
    if any(type(place) is not int or place < 0 for place in places) or len({*places}) < len(told):
        raise RejectedError(PLACES, f"its positions are {places}"[:200])
    parts: list[str | Picture | Reject] = []
    left_out: list[str] = []
    for row in sorted(told, key=lambda row: int(row["position"])):
        if row["modality"] == "text":
            text = row.get("text_content")
            if not isinstance(text, str | None):
                raise RejectedError(NO_DOCUMENT, f"text_content holds {type(text).__name__}")
            words = (text or "").strip()
            parts += [words] if words else []
            left_out += [] if words else [EMPTY_PLACE]
        elif row["modality"] == "image":
            parts.append(or_reject(where, _picture_of_row, row, where, pictures))
        else:
            left_out.append(OTHER)
    return parts, left_out


def _picture_of_row(row: Mapping[str, Any], where: str, pictures: Pictures) -> Picture:
    """The bytes of a row, or those that its `source_ref` names: a file, or a range of a tar."""
    if row.get("binary_content"):
        return pictures.load(where, row["binary_content"])
    ref = unquoted(row.get("source_ref"))
    path = ref.get("path") if isinstance(ref, dict) else None
    if not isinstance(ref, dict) or not isinstance(path, str) or not path:
        why = row.get("materialize_error") or "no error"
        raise RejectedError(MISSING, f"its row has neither bytes nor a place of them ({why})")
    first, size, frame = (ref.get(key) for key in ("byte_offset", "byte_size", "frame_index"))
    if isinstance(first, int) and isinstance(size, int) and size > 0:
        picture = pictures.range(path, first, size)
    elif ref.get("member"):
        remedy = "write its bytes into the rows (materialize_on_write)"
        raise RejectedError(MISSING, f"its row has no range of {path}, {ref['member']}; {remedy}")
    else:
        picture = load_picture(pictures.roots, path)
    if isinstance(frame, int) and picture.data[:2] in TIFF:
        return frame_of(picture.data, frame, base_name(path))
    return picture


_READERS: dict[str, Callable[[str, ReadOptions, Pictures], Iterator[Item]]] = {
    "json": _read_json,
    "table": _read_table,
    "tar": _read_tar,
    "rows": _read_rows,
}
