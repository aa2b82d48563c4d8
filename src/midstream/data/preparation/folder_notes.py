"""What a person should know of a source's folder: files that nobody reads, splits read as one."""

import re
from collections.abc import Iterator, Sequence

from midstream.data.formats import read_conversations
from midstream.data.formats.files import base_name, name_some, shown_files
from midstream.data.formats.read_tokens import MANIFEST
from midstream.data.formats.records import Section, Unit
from midstream.source_files import TEXT_SUFFIXES, is_note

READ: dict[Section, tuple[str, ...]] = {
    "text": tuple(f"*{end}" for ends in TEXT_SUFFIXES.values() for end in ends),
    "captions": (
        *("*.tar", "captions*.csv", "captions*.txt", "captions_*.json"),
        *("metadata.jsonl", "metadata*.csv"),
    ),
    "conversations": tuple(f"*{end}" for end in read_conversations.SUFFIXES),
}
# Pictures of captions and conversations are read by the records that name them.
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_DOCUMENTS = TEXT_SUFFIXES["txt"]
_SPLITS = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?![a-z])")
_NAMES = {"valid": "validation", "val": "validation"}


def unread_files(section: Section, sources: Sequence[str], units: Sequence[Unit]) -> list[str]:
    """The files in the folders and patterns `sources` that are not in `units`, notes last.

    Hidden files, pictures of records and notes are left out; notes that would be documents by
    their suffix (LICENSE.txt in a folder of texts) are not.
    """
    read = {file for unit in units for file in unit.files}
    tokenised = any(unit.format == "tokens" for unit in units)
    unread = {
        file
        for source in sources
        for file in shown_files(source)
        if file not in read and _is_asked(section, base_name(file), tokenised)
    }
    return sorted(unread, key=lambda file: (is_note(base_name(file)), file))


def _is_asked(section: Section, name: str, tokenised: bool) -> bool:
    if section != "text":
        return not is_note(name) and not name.lower().endswith(_PICTURES)
    if is_note(name):
        return name.endswith(_DOCUMENTS)
    return not (tokenised and name == MANIFEST)


def notes_on(section: Section, unread: Sequence[str], read: Sequence[str]) -> Iterator[str]:
    """A line on the files that are not read, and one on splits of a data set read together.

    Both take names as they are to be shown.
    """
    if unread:
        number = f"{len(unread):,} files are" if len(unread) > 1 else "1 file is"
        known = ", ".join(READ[section])
        yield f"{number} not read: {name_some(unread, 10)}; files of {section} are {known}"
    splits = {_NAMES.get(word, word) for name in read for word in _SPLITS.findall(name.lower())}
    if len(splits) > 1:
        yield (
            f"files of the splits {', '.join(sorted(splits))} are read as one source; to keep one "
            "for evaluation, give only the others"
        )
