"""Samples whose files lie beside each other: a picture and what is said of it, by one name."""

import os
from collections.abc import Iterator
from itertools import groupby

from midstream.data.formats.files import base_name, folder_of, shown_files
from midstream.data.formats.records import NUM_UNIT_RECORDS, PICTURES, Unit, is_picture

# The format of such samples.
FILES = "files"
# The members or files that hold a caption alone.
TEXTS = ("txt", "caption", "text")


def sample_units(source: str) -> list[Unit]:
    """Units of the samples that lie as files beside each other: a picture, and its .txt or .json.

    Files of no picture are none of a sample's.
    """
    samples: dict[tuple[str, str], list[str]] = {}
    for file in shown_files(source):
        folder, stem, suffix = parts_of(file)
        if suffix in (*PICTURES, *TEXTS, "json", "syn.json"):
            samples.setdefault((folder, stem), []).append(file)
    shown = [files for _, files in sorted(samples.items()) if any(map(is_picture, files))]
    if all(is_picture(file) for files in shown for file in files):
        return []
    parts = (shown[x : x + NUM_UNIT_RECORDS] for x in range(0, len(shown), NUM_UNIT_RECORDS))
    return [Unit(FILES, tuple(file for files in part for file in files)) for part in parts]


def samples_beside(unit: Unit) -> Iterator[list[str]]:
    """The files of each sample of a unit of them that has more than its picture."""
    if unit.format == FILES:
        for _, files in groupby(unit.files, key=lambda file: parts_of(file)[:2]):
            if len(sample := list(files)) > 1:
                yield sample


def parts_of(file: str) -> tuple[str, str, str]:
    """The folder of a sample's file, the sample's name, and what of it the file is."""
    name = base_name(file)
    end = ".syn.json" if name.lower().endswith(".syn.json") else os.path.splitext(name)[1]
    stem = name.removesuffix(name[-len(end) :] if end else "")
    if is_picture(stem) and not is_picture(name):
        stem = os.path.splitext(stem)[0]  # 0.jpg.txt beside 0.jpg
    return folder_of(file), stem, end[1:].lower()
