"""Which files of a folder are data: one rule for what reads them and for what stands for them.

Links are followed. Hidden files and folders are nobody's data, nor are the notes that lie beside
data everywhere (README, LICENSE, requirements.txt, ...).
"""

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import translate
from pathlib import Path

# Folders and files that systems, editors and notebooks leave behind, beside those with a dot.
LEFT_BEHIND = (
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    "Thumbs.db",
    "desktop.ini",
    "*~",
    "#*#",
    "*.swp",
)
# What the names of text files end in, by their format; no other file of a text source is read.
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd")
TEXT_SUFFIXES = {
    "jsonl": (*JSON_LINES, ".json", ".json.gz", ".json.zst", ".json.zstd"),
    "parquet": (".parquet",),
    "txt": (".txt", ".tex"),
    "tokens": (".tar",),
}
# Documents about data, whatever the case of their letters. Records and pictures are none, whatever
# they are called.
NOTES = (
    "readme*",
    "license*",
    "licence*",
    "copying*",
    "notice*",
    "citation*",
    "changelog*",
    "requirements*.txt",
    "dataset_card*",
    "md5sums*",
    "sha256sums*",
    "checksums*",
)
_DOCUMENTS = ("", ".md", ".txt", ".rst", ".html", ".pdf", ".cff", ".bib", ".yaml", ".yml")
_INFOS = ("dataset_infos.json", "dataset_card.json")


def any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """What matches a name (no path) that fits one of the shell's `patterns`."""
    return re.compile("|".join(map(translate, patterns)))


_LEFT_BEHIND, _NOTES = any_of(LEFT_BEHIND), any_of(NOTES)
_TEXT_ENDS = tuple(end for ends in TEXT_SUFFIXES.values() for end in ends)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name (no path) is hidden or left behind by a program."""
    return name.startswith(".") or _LEFT_BEHIND.match(name) is not None


def is_note(name: str) -> bool:
    """Whether a file of this name (no path) is about data rather than data."""
    name = name.lower()
    if os.path.splitext(name)[1] not in _DOCUMENTS:
        return name in _INFOS
    return _NOTES.match(name) is not None


def is_text(name: str) -> bool:
    """Whether a file of this name (no path) is one that a text source may be read from."""
    return name.endswith(_TEXT_ENDS) and not is_note(name)


def walk(root: str | Path) -> Iterator[str]:
    """The files under `root` that are not hidden, in order, as paths that begin with it.

    Linked folders are entered, but for a link to a folder that it lies in; a link to nowhere, or to
    itself, is listed, so that opening it says so. Raises OSError for a folder that cannot be read.
    """
    yield from _walk(os.fspath(root), frozenset())


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        shown = sorted((e for e in entries if not is_hidden(e.name)), key=lambda entry: entry.name)
    for entry in shown:
        # `entry.is_dir` would end the walk at a link that leads to itself.
        linked = entry.is_symlink() and os.path.isdir(entry.path)
        if linked or entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, above | {real})
        else:
            yield entry.path
