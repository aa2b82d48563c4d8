"""Tables of `midstream join captions`: a row is a sample whose picture is a range of an archive."""

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack

from midstream.data.formats.files import inside, open_binary
from midstream.data.formats.records import Member, ReadOptions, Sample
from midstream.data.formats.tables import columns_of, table_rows
from midstream.data.sources import content_hash

# What a table notes: the folder of its pictures.
JOINED_ROOT = b"midstream.pictures"
_COLUMNS = ("file", "key", "picture", "offset", "size", "hash", "text", "syn.json")


def is_joined(path: str) -> bool:
    """Whether a table is one of `midstream join captions`."""
    return JOINED_ROOT in (columns_of(path).metadata or {})


def joined_samples(table: str, options: ReadOptions) -> Iterator[Sample]:
    """The samples of a table, each with its picture, its own caption and the made ones.

    Raises ValueError for an archive that is gone, or that holds another picture than when the
    table was written.
    """
    root = options.images or columns_of(table).metadata[JOINED_ROOT].decode()
    with ExitStack() as opened:
        yield from _samples(table, root, opened)


def _samples(table: str, root: str, opened: ExitStack) -> Iterator[Sample]:
    archive = ""
    for row in table_rows(table, _COLUMNS):
        file, key, name, offset, size, hashed, text, made = (value.as_py() for value in row)
        path = inside([root], file, f"{table}, sample {key}")
        # A table's rows stand in the order of their pictures in one archive after the other.
        if path != archive:
            opened.close()
            archive, stream = path, opened.enter_context(_opened(path, table))
        stream.seek(offset)
        data = stream.read(size)
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
        yield Sample(path, key, members, pictures=(name,))


def _opened(path: str, table: str) -> io.BufferedReader:
    try:
        return open_binary(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is gone, which {table} names; put it back, or say with --images where "
            "its pictures are now"
        ) from None
