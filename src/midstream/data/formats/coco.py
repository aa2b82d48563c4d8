"""Captions of COCO: the official lists, and Karpathy's splits of them."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import ijson

from midstream.data.formats.captions import (
    Folder,
    caption_of,
    field_of,
    first_folder,
    picture_roots,
    split_in,
    wanted_splits,
)
from midstream.data.formats.files import base_name, folder_of, is_folder, unpacked
from midstream.data.formats.records import CaptionRecord, ReadOptions, Unit
from midstream.data.source_writer import Reject

_BOM = b"\xef\xbb\xbf"


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
            caption = caption_of(field_of(annotation, options), where)
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
            "captions_*.json, or write the list that is inside an object alone: [{image, caption}]"
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


def splits_in(path: str) -> Iterator[str]:
    """The split of each of the pictures."""
    yield from (split_in(image) for image in _items(path, "images"))


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
