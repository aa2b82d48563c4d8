"""What the shards of a source were made from, and which of them stay when it is prepared again."""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec

from midstream.data.columns import SHARD_INDEX
from midstream.data.formats.files import is_url
from midstream.data.formats.records import ReadOptions, Section, Unit
from midstream.data.sources import FORMAT, INDEX
from midstream.storage import MANIFEST, read_json

# Raise it when equal input would give another shard: every shard is then made anew.
PREPARATION = 2
MADE_FROM, PICTURES = "made_from.json", "pictures"
# What file systems call the things that change with a file's bytes.
VERSIONS = (
    *("ETag", "etag", "md5", "md5Hash", "checksum", "CRC", "generation"),
    *("mtime", "created", "modified", "LastModified", "last_modified"),
)
# Requests about URLs that are under way at once.
NUM_REQUESTS = 16

Stamp = list[int | str | None]


@dataclass(frozen=True)
class Job:
    """What all shards of a source have in common; `tokenizer` is the digest of its file in `out`,
    `begin_of_text` the token that its examples begin with.

    Names of files under the folder `root` are kept relative to it.
    """

    section: Section
    out: Path
    options: ReadOptions
    root: str
    tokenizer: str
    validation_fraction: float
    begin_of_text: int | None = None

    @property
    def shards(self) -> Path:
        """Where the shards lie."""
        return self.out / "shards"

    @property
    def tokenizer_file(self) -> Path:
        """The source's own copy of its tokenizer."""
        return self.out / "tokenizer.json"

    def short(self, name: str) -> str:
        """A local file's name, or a place in it, without the folder that all names start from."""
        return name.removeprefix(self.root.rstrip("/") + "/") if self.root else name

    def folder(self, number: int) -> Path:
        """Where a shard lies."""
        return self.shards / f"{number:06d}"


@dataclass(frozen=True)
class Todo:
    """A shard that is wanted: its number, its unit, and what its bytes follow from."""

    number: int
    unit: Unit
    made_from: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of the unit's files."""
        return sum(int(stamp[0] or 0) for stamp in self.made_from["stamps"] if stamp)


def wanted_shards(job: Job, units: Sequence[Unit]) -> list[Todo]:
    """All shards of a source, from its files as they are now."""
    files = sorted({file for unit in units for file in unit.files})
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        asked = [file for file in files if is_url(file)]
        stamps = dict(zip(asked, pool.map(_url_stamp, asked), strict=True))
    for file in files:
        if not is_url(file):
            stamps[file] = local_stamp(file)
    common: dict[str, Any] = {
        "preparation": PREPARATION,
        "format": FORMAT,
        "section": job.section,
        "options": asdict(job.options),
        "root": job.root,
        "tokenizer": job.tokenizer,
        "validation_fraction": job.validation_fraction,
    }
    if job.begin_of_text is not None:
        common["begin_of_text"] = job.begin_of_text
    found = []
    for number, unit in enumerate(units):
        own = {"unit": asdict(unit), "stamps": [stamps[file] for file in unit.files]}
        # As it reads back from a file.
        found.append(Todo(number, unit, json.loads(json.dumps(common | own))))
    return found


def local_stamp(path: str) -> Stamp:
    """Size and time of the last change (ns) of a local file; empty where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def settle(job: Job, wanted: Sequence[Todo]) -> list[Todo]:
    """Put the shards that stay in their places, remove the others; returns those to be made.

    A shard stays that was made from what is wanted, picture files included, wherever it stood.
    Raises ValueError if something that is no shard lies among them. As soon as a shard is moved
    or removed, `source.json` is gone.
    """
    have = _finished(job)
    kept = {item.number: have.pop(key) for item in wanted if (key := _key(item.made_from)) in have}
    stray = [path for path in _folders(job) if path not in kept.values()]
    moved = {number: path for number, path in kept.items() if path != job.folder(number)}
    todo = [item for item in wanted if item.number not in kept]
    if stray or moved or todo:
        (job.out / INDEX).unlink(missing_ok=True)
    for path in stray:
        # Renamed first: a folder that is half removed is never taken for a shard.
        old = path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex}.old"))
        shutil.rmtree(old)
    between = {
        number: path.with_name(f"moved-{uuid.uuid4().hex}") for number, path in moved.items()
    }
    for number, path in moved.items():
        path.rename(between[number])
    for number, path in between.items():
        path.rename(job.folder(number))
    return todo


def _finished(job: Job) -> dict[str, Path]:
    """The whole shards that lie there, by what they were made from."""
    found = {}
    for path in _folders(job):
        record = path / MADE_FROM
        if not record.is_file():
            continue
        made = read_json(record)
        pictures = made.pop(PICTURES, None)
        if pictures is None or not _is_whole(path):
            continue
        if all(local_stamp(file) == old for file, old in pictures.items()):
            found[_key(made)] = path
    return found


def _folders(job: Job) -> list[Path]:
    folders = sorted(path for path in job.shards.glob("*") if not path.name.startswith("."))
    for path in folders:
        if not any((path / name).is_file() for name in (SHARD_INDEX, MANIFEST, MADE_FROM)):
            raise ValueError(
                f"{path} is no shard of a prepared source; give another folder to prepare into, "
                "or move it away"
            )
    return folders


def _is_whole(path: Path) -> bool:
    if not (path / MANIFEST).is_file():
        return False
    sizes = {path / name: entry["bytes"] for name, entry in read_json(path / MANIFEST).items()}
    return path / SHARD_INDEX in sizes and all(
        local_stamp(str(file))[:1] == [size] for file, size in sizes.items()
    )


def _key(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _url_stamp(url: str) -> Stamp:
    system, path = fsspec.core.url_to_fs(url)
    info = system.info(path)
    return [info.get("size"), *(str(info[key]) for key in VERSIONS if info.get(key) is not None)]
