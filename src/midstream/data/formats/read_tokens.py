"""Text that is tokenised already: OpenLM's tar shards of token ids and their `manifest.jsonl`."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator

import numpy as np

from midstream.data.formats.files import base_name, exists, folder_of, join, read_lines
from midstream.data.formats.json_records import json_object
from midstream.data.formats.records import TokenRecord, Unit
from midstream.data.formats.tars import Member, scan_tar
from midstream.data.source_writer import Reject

MANIFEST = "manifest.jsonl"
NO_IDS, EMPTY = "not a list of token ids", "empty text"
_MEMBERS = (".txt", ".json", ".json.gz")
_MAX_UNPACKED_BYTES = 64 * 2**20


class Manifests:
    """The manifests of folders of shards, each read once."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, int] | None] = {}

    def listed(self, path: str) -> dict[str, int] | None:
        """Chunks of each shard file that `path`, a `manifest.jsonl`, lists.

        None for every other file, also one of this name that holds other records than shards.
        Raises ValueError that names the line for a shard without a name or a number of chunks,
        with a name that leads out of the folder, or listed twice.
        """
        if base_name(path) != MANIFEST:
            return None
        if path not in self._found:
            self._found[path] = _read_manifest(path)
        return self._found[path]

    def chunks(self, shard: str) -> int | None:
        """How many chunks the manifest beside a shard promises; None if there is no manifest.

        Raises ValueError for a shard that is not listed, and for a first shard without a manifest
        that holds no token ids.
        """
        manifest = join(folder_of(shard), MANIFEST, shard)
        if manifest not in self._found and not exists(manifest):
            self._found[manifest] = None
            check_tokenised(shard)
        listed = self.listed(manifest)
        if listed is None:
            return None
        if shard not in listed:
            raise ValueError(
                f"{shard} is not in {manifest}; add its line, move the file away, or give the "
                "manifest itself to read only what it lists"
            )
        return listed[shard]


def check_tokenised(path: str) -> None:
    """Raises ValueError that names the archive if its first member holds no token ids."""
    first = next(scan_tar(path), None)
    found = None if first is None else chunk_of(first, path)
    if isinstance(found, Reject):
        raise ValueError(f"{found}: no shard of token ids; pictures are prepared as captions")


def read_tokens(unit: Unit) -> Iterator[TokenRecord | Reject]:
    """The chunks of a shard, their ids taken as they are.

    Raises ValueError that names the shard if it is damaged, or holds another number of members
    than `unit.last`.
    """
    path, num_chunks = unit.files[0], 0
    for member in scan_tar(path):
        num_chunks += 1
        yield chunk_of(member, path)
    if unit.last is not None and num_chunks != unit.last:
        raise ValueError(
            f"{path} holds {num_chunks:,} chunks, {folder_of(path)}/{MANIFEST} says "
            f"{unit.last:,}; fetch both again or correct the manifest"
        )


def chunk_of(member: Member, path: str) -> TokenRecord | Reject:
    """The token ids that a member of the archive `path` holds, or why it holds none."""
    where = f"{path}, member {member.name}"
    if member.problem:
        return Reject(where, member.problem)
    if not member.name.endswith(_MEMBERS):
        return Reject(where, NO_IDS, f"its name ends in none of {', '.join(_MEMBERS)}")
    try:
        ids = json.loads(_unpacked(member))
    except (EOFError, OSError, zlib.error, ValueError, RecursionError) as error:
        return Reject(where, NO_IDS, str(error))
    if ids == []:
        return Reject(where, EMPTY, "a list without ids")
    # By type, not isinstance: true and false are no ids.
    if not isinstance(ids, list) or set(map(type, ids)) != {int}:
        return Reject(where, NO_IDS, "ids are whole numbers in one flat list")
    if min(ids) < 0 or max(ids) >= 2**63:
        return Reject(where, NO_IDS, f"it has ids from {min(ids)} to {max(ids)}")
    return TokenRecord(where, np.array(ids, dtype=np.int64))


def _unpacked(member: Member) -> bytes:
    if not member.name.endswith(".gz"):
        return member.data
    data = gzip.GzipFile(fileobj=io.BytesIO(member.data)).read(_MAX_UNPACKED_BYTES + 1)
    if len(data) > _MAX_UNPACKED_BYTES:
        raise ValueError(f"it unpacks to more than {_MAX_UNPACKED_BYTES:,} bytes")
    return data


def _read_manifest(path: str) -> dict[str, int] | None:
    found: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        entry = json_object(line, where)
        if not found and (isinstance(entry, Reject) or "shard" not in entry):
            return None
        values = {} if isinstance(entry, Reject) else entry
        name, count = values.get("shard"), values.get("num_sequences", values.get("num_chunks"))
        if not isinstance(name, str) or type(count) is not int or count < 0:
            raise ValueError(
                f"{where}: a shard needs its name under 'shard' and its number of chunks under "
                f"'num_sequences'; found {line[:100]!r}"
            )
        shard = join(folder_of(path), f"{name}.tar", where)
        if shard in found:
            raise ValueError(f"{where}: shard {name!r} is listed twice; remove one line")
        found[shard] = count
    return found or None
