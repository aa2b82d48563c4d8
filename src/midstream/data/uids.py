"""Joining two sets by uid out of memory: rows fall into partitions by uid, which are joined alone.

A *run* is a file of record batches, one for each partition (or for each part of the pictures), so
that a batch is read without the others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from midstream.core.storage import write_bytes

UID = pa.binary(16)
# Of both sides: the uid, and eight bytes of the sha256 of the picture (null where none is said).
KEYS = [pa.field("uid", UID), pa.field("sha256", pa.uint64())]
# Pictures: which part of the pictures, and the row there.
PICTURES = pa.schema([*KEYS, ("part", pa.int32()), ("row", pa.int32())])
# Large: a group may hold more than 2 GiB of them.
CAPTIONS = pa.schema([*KEYS, ("syn.json", pa.large_binary())])
MATCHED = pa.schema([("row", pa.int32()), ("syn.json", pa.large_binary())])
_MIX = np.uint64(0x9E3779B97F4A7C15)


def partition_of(uids: pa.Array, number: int) -> np.ndarray:
    """int64: which of so many partitions each uid is in; even for uids that are counted up."""
    size = UID.byte_width
    start = uids.offset * size
    halves = np.frombuffer(uids.buffers()[1], np.uint64)[start // 8 : start // 8 + 2 * len(uids)]
    mixed = (halves[::2] ^ halves[1::2]) * _MIX
    return ((mixed >> np.uint64(32)) * np.uint64(number) >> np.uint64(32)).astype(np.int64)


def in_groups(groups: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts rows by their group, of `number`, and how many each has."""
    return np.argsort(groups, kind="stable"), np.bincount(groups, minlength=number)


def write_run(path: Path, rows: pa.Table, sizes: np.ndarray, notes: Mapping[str, Any]) -> None:
    """Write rows that are in the order of their groups; `notes` are kept as text."""
    schema = rows.schema.with_metadata({key: str(value) for key, value in notes.items()})
    rows, empty = rows.combine_chunks(), pa.RecordBatch.from_pylist([], rows.schema)
    sink, first = pa.BufferOutputStream(), 0
    with ipc.new_file(sink, schema) as writer:
        for size in sizes.tolist():
            batches = rows.slice(first, size).to_batches()
            writer.write_batch(batches[0] if batches else empty)
            first += size
    write_bytes(path, sink.getvalue())


def notes_of(path: Path) -> dict[str, str]:
    """What was noted beside a run; nothing where there is none."""
    if not path.is_file():
        return {}
    with pa.memory_map(str(path)) as file:
        found = ipc.open_file(file).schema.metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}


def read_group(paths: Sequence[Path], group: int, schema: pa.Schema) -> pa.Table:
    """The rows of one group in all runs, in their order."""
    batches = []
    for path in paths:
        with pa.memory_map(str(path)) as file:
            batches.append(ipc.open_file(file).get_batch(group).replace_schema_metadata())
    return pa.Table.from_batches(batches, schema).combine_chunks()


def join_partition(
    pictures: pa.Table, captions: pa.Table
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Rows of pictures, the rows of their captions, and what was lost.

    The first of equal uids on either side stands for all of them.
    """
    shown, told = pictures["uid"].combine_chunks(), captions["uid"].combine_chunks()
    firsts = [_firsts(uids) for uids in (shown, told)]
    match = pc.index_in(shown, value_set=told)
    both = firsts[0] & ~match.is_null().to_numpy(zero_copy_only=False)
    at = match.fill_null(0).to_numpy()[both]
    shas = pictures["sha256"].combine_chunks().filter(pa.array(both))
    others = captions["sha256"].combine_chunks().take(pa.array(at))
    differs = pc.fill_null(pc.not_equal(shas, others), False).to_numpy(zero_copy_only=False)
    unknown = shas.is_null().to_numpy(False) | others.is_null().to_numpy(False)
    rows = np.flatnonzero(both)[~differs]
    lost = {
        "pictures: uid twice": int((~firsts[0]).sum()),
        "captions: uid twice": int((~firsts[1]).sum()),
        "pictures: no caption": int(firsts[0].sum() - len(at)),
        "captions: no picture": int(firsts[1].sum() - len(at)),
        "sha256 differs": int(differs.sum()),
        "joined": len(rows),
        "joined without a sha256 to compare": int(unknown[~differs].sum()),
    }
    return rows, at[~differs], lost


def _firsts(uids: pa.Array) -> np.ndarray:
    if not len(uids):
        return np.zeros(0, bool)
    mine: np.ndarray = pc.index_in(uids, value_set=uids).to_numpy() == np.arange(len(uids))
    return mine


def match_partition(
    path: Path, partition: int, num_parts: int, runs: Mapping[Any, Sequence[Path]]
) -> None:
    """Join one partition of the runs of both sides, unless `path` is there; its notes are what was
    lost."""
    if path.is_file():
        return
    pictures = read_group(runs["pictures"], partition, PICTURES)
    captions = read_group(runs["captions"], partition, CAPTIONS)
    rows, at, lost = join_partition(pictures, captions)
    order, sizes = in_groups(pictures["part"].to_numpy()[rows], num_parts)
    found = [
        pictures["row"].take(pa.array(rows[order])),
        captions["syn.json"].take(pa.array(at[order])),
    ]
    write_run(path, pa.table(found, schema=MATCHED), sizes, lost)


def matched_rows(runs: Sequence[Path], part: int) -> pa.Table:
    """The rows of a part of the pictures that have captions, in their order (`MATCHED`)."""
    found = read_group(runs, part, MATCHED)
    return found.take(pa.array(np.argsort(found["row"].to_numpy())))


def count_up(notes: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """The sums of the numbers that runs noted."""
    found: dict[str, int] = {}
    for one in notes:
        for key, value in one.items():
            if value.isdigit():
                found[key] = found.get(key, 0) + int(value)
    return found
