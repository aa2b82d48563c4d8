"""Pictures with captions of another set joined by uid, as DataCompDR-1B's with DataComp's.

The joined set is tables, one for each archive of pictures, that name where each picture lies and
hold its captions; pictures are not copied. It appears whole or not at all, and what a run that
was stopped had finished is used again (`uids.py` has the join itself).
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import parquet

from midstream.core.storage import (
    read_json,
    remove_folder,
    start_folder,
    write_bytes,
    write_json,
)
from midstream.core.tokens import name_some
from midstream.data.formats.captions import first_usable, json_object, original_captions
from midstream.data.formats.files import find_files, folder_of, is_url
from midstream.data.formats.record_files import JOINED_ROOT
from midstream.data.formats.records import PICTURES as SUFFIXES
from midstream.data.formats.records import ReadOptions, Sample, samples_of
from midstream.data.processes import leave_with_parent
from midstream.data.shard_state import stamp_of
from midstream.data.sources import content_hash
from midstream.data.uids import (
    CAPTIONS,
    PICTURES,
    UID,
    count_up,
    in_groups,
    match_partition,
    matched_rows,
    notes_of,
    partition_of,
    write_run,
)

Side = Literal["pictures", "captions"]
SIDES: tuple[Side, ...] = ("pictures", "captions")
Progress = Callable[[float, str], None]
REPORT = ".join.json"
# Raised when what lies in the folder of the work is to be made anew.
VERSION = 2
_REMEDY = {
    "pictures": "pictures come first and synthetic captions second, and img2dataset keeps the uid "
    "with --save_additional_columns '[\"uid\"]'",
    "captions": "pictures come first and synthetic captions second; a sample of these is a json "
    "with its uid and a syn.json",
}
# Archives of a run, and those whose samples make up a partition.
RUN_TARS, PARTITION_TARS, MOST_PARTITIONS = 16, 16, 4096
NUM_LISTED = 5
PLACES = pa.schema(
    [
        ("file", pa.string()),
        ("key", pa.string()),
        ("picture", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("hash", UID),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class Join:
    """What is joined: archives of pictures, archives of captions, the new set, and where the work
    for it lies."""

    pictures: tuple[str, ...]
    captions: tuple[str, ...]
    root: str
    out: Path

    @property
    def work(self) -> Path:
        """Beside the new set, so that it becomes it by a rename."""
        return self.out.with_name(f".{self.out.name}.join")

    @cached_property
    def num_partitions(self) -> int:
        """How many parts the uids fall into."""
        most = max(len(self.pictures), len(self.captions))
        return min(MOST_PARTITIONS, -(-most // PARTITION_TARS))

    def tars(self, side: Side, number: int) -> tuple[str, ...]:
        """The archives of a run."""
        files = self.pictures if side == "pictures" else self.captions
        return files[number * RUN_TARS : (number + 1) * RUN_TARS]

    @property
    def matched(self) -> list[Path]:
        """The files of the joined partitions."""
        return [self.work / "matched" / f"{n:06d}.arrow" for n in range(self.num_partitions)]

    def runs(self, side: Side) -> list[Path]:
        """The files of a side's runs, in the order of its archives."""
        files = self.pictures if side == "pictures" else self.captions
        return [self.work / side / f"{n:06d}.arrow" for n in range(-(-len(files) // RUN_TARS))]


def join_captions(
    pictures: str, captions: str, out: Path, *, workers: int, progress: Progress
) -> dict[str, int]:
    """Join the tars of two folders, patterns or URLs by uid into the new folder `out`.

    Returns what was joined and what was lost on each side, by reason. A uid is 32 hex digits, in
    capitals or with dashes too. Raises FileNotFoundError or ValueError that names the file or set
    for what is missing, cut or compressed, for sets without a common uid and for an `out` that
    holds something else; `out` is then as it was.
    """
    # The folder behind a link, which a rename would put the new one in the place of.
    join = _join_of(pictures, captions, out.resolve())
    stamp = _stamp(join)
    done = read_json(join.out / REPORT) if (join.out / REPORT).is_file() else {}
    if done.get("stamp") == stamp and all((join.out / x).is_file() for x in done["tables"]):
        found: dict[str, int] = done["counts"]
        return found
    if join.out.exists() and any(join.out.iterdir()) and not (join.out / REPORT).is_file():
        raise ValueError(f"{join.out} holds something else; give a new folder with --out")
    join.work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(join.work / "lock", timeout=0):
            return _run(join, stamp, workers, progress)
    except Timeout:
        raise ValueError(
            f"{join.out} is being joined by another process; wait until it ends or stop it"
        ) from None


def _run(join: Join, stamp: str, workers: int, progress: Progress) -> dict[str, int]:
    own = re.compile(rf"\.{re.escape(join.out.name)}\.[0-9a-f]{{32}}\.tmp")
    for left in [path for path in join.out.parent.iterdir() if own.fullmatch(path.name)]:
        shutil.rmtree(left)
    kept = join.work / "stamp.txt"
    # Partitions hold all of both sides: where one archive changed, they are made anew.
    if not kept.is_file() or kept.read_text() != stamp:
        shutil.rmtree(join.work / "matched", ignore_errors=True)
        write_bytes(kept, stamp.encode())
    todo = [(side, n) for side in SIDES for n in range(len(join.runs(side)))]
    _all(index_run, join, todo, workers, partial(_third, progress, 0, "reading archives"))
    found = {side: count_up([notes_of(path) for path in join.runs(side)]) for side in SIDES}
    for side in SIDES:
        if not found[side].get("uids"):
            named = name_some(getattr(join, side), 2)
            lost = name_some((f"{n:,} {why}" for why, n in found[side].items() if n), NUM_LISTED)
            raise ValueError(f"no sample of the {side} {named} is one ({lost}); {_REMEDY[side]}")
    num_parts = len(join.runs("pictures"))
    parts = [(number,) for number in range(join.num_partitions)]
    _all(match_uids, join, parts, workers, partial(_third, progress, 1, "joining partitions"))
    counts = count_up([notes_of(path) for path in join.matched])
    for side in SIDES:
        counts |= {f"{side}: {key}": value for key, value in found[side].items()}
    if not counts["joined"]:
        raise ValueError(
            f"{join.root} and {join.captions[0]} have no uid in common: of "
            f"{counts['pictures: uids']:,} pictures and {counts['captions: uids']:,} captions none "
            f"is joined ({counts['sha256 differs']:,} have another sha256); give the sets that "
            "belong together"
        )
    temporary = start_folder(join.out)
    try:
        tables = [(temporary, number) for number in range(num_parts)]
        told = partial(_third, progress, 2, "writing tables")
        _all(write_tables, join, tables, workers, told)
        written = sorted(path.name for path in temporary.iterdir())
        write_json(temporary / REPORT, {"stamp": stamp, "counts": counts, "tables": written})
        remove_folder(join.out)
        temporary.replace(join.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(join.work)
    return counts


def _join_of(pictures: str, captions: str, out: Path) -> Join:
    shown = pictures if is_url(pictures) else os.path.abspath(pictures)
    told = captions if is_url(captions) else os.path.abspath(captions)
    files = [tuple(find_files(source, (".tar",))) for source in (shown, told)]
    # The folder that all pictures are under; `commonpath` would change the slashes of a URL.
    folders = os.path.commonprefix([f"{folder_of(file)}/" for file in files[0]])  # noqa: RUF071
    root = folders.rpartition("/")[0] or "/"
    if "::" in root:
        raise ValueError(
            f"{shown} lies inside an archive, and pictures are read where they lie; unpack it"
        )
    return Join(files[0], files[1], root, out)


def _stamp(join: Join) -> str:
    sides = [[[file, *stamp_of(file)] for file in side] for side in (join.pictures, join.captions)]
    return content_hash(json.dumps([VERSION, join.root, *sides]).encode()).hex()


def _states(join: Join, tars: Sequence[str]) -> str:
    return json.dumps([VERSION, join.num_partitions, *([x, *stamp_of(x)] for x in tars)])


def index_run(join: Join, side: Side, number: int) -> None:
    """Read the archives of a run, unless they were read and are as they were then."""
    path, tars = join.runs(side)[number], join.tars(side, number)
    states = _states(join, tars)
    places = join.work / "places" / path.name
    if notes_of(path).get("states") == states and (side == "captions" or places.is_file()):
        return
    counts = Counter[str]()
    keys: list[tuple[Any, ...]] = []
    shown: list[tuple[Any, ...]] = []
    for file in tars:
        for sample in samples_of(file):
            counts["samples"] += 1
            found = _row_of(sample, file, side, counts)
            if isinstance(found, str):
                counts[found] += 1
                continue
            uid, sha, rest = found
            counts["uids"] += 1
            keys.append((uid, sha, *((number, len(shown)) if side == "pictures" else (rest,))))
            shown += [rest] if side == "pictures" else []
    if _states(join, tars) != states:
        raise ValueError(
            f"{name_some(tars, 2)} changed while it was read; run the same again when it is whole"
        )
    if side == "pictures":
        table = _table(shown, PLACES)
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        write_bytes(places, sink.getvalue())
    rows = _table(keys, PICTURES if side == "pictures" else CAPTIONS)
    uids = rows["uid"].combine_chunks()
    order, sizes = in_groups(partition_of(uids, join.num_partitions), join.num_partitions)
    write_run(path, rows.take(pa.array(order)), sizes, {**counts, "states": states})


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _row_of(
    sample: Sample, file: str, side: Side, counts: Counter[str]
) -> tuple[bytes, int | None, Any] | str:
    """The uid, the beginning of the sha256, and what this side has of it; or why it is left out.

    What is left out of a sample that stays is counted in `counts`.
    """
    if sample.problem:
        return sample.problem
    if any("\ud800" <= character <= "\udfff" for character in sample.key):
        return "name not UTF-8"
    members = sample.members
    values = json_object(members["json"].data)[0] if "json" in members else None
    named = (values or {}).get("uid", sample.key.rpartition("/")[2])
    uid = str(named).replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{32}", uid):
        return "no uid of 32 hex digits"
    sha = str((values or {}).get("sha256", "")).lower()
    start = int(sha[:16], 16) if re.fullmatch(r"[0-9a-f]{64}", sha) and int(sha, 16) else None
    if side == "captions":
        if "syn.json" not in members:
            return "sample without syn.json"
        return bytes.fromhex(uid), start, members["syn.json"].data
    pictures = [members[suffix] for suffix in SUFFIXES if suffix in members]
    if len(pictures) != 1:
        return "more than one picture" if pictures else "sample without a picture"
    if not pictures[0].file:
        raise ValueError(f"{file} is compressed, and pictures are read where they lie; unpack it")
    captions = original_captions(sample, ReadOptions())
    text = first_usable(captions)
    # A joined set keeps one of each picture.
    if text is not None and len(captions) > 1:
        counts["further captions left out"] += len(captions) - 1
    picture = pictures[0]
    place = (picture.name, picture.offset, picture.size, content_hash(picture.data))
    return bytes.fromhex(uid), start, (file, sample.key, *place, text)


def match_uids(join: Join, partition: int) -> None:
    """Join a partition of the uids of both sides."""
    num_parts, runs = len(join.runs("pictures")), {side: join.runs(side) for side in SIDES}
    match_partition(join.matched[partition], partition, num_parts, runs)


def write_tables(join: Join, folder: Path, part: int) -> None:
    """Write the table of each archive of a part of the pictures that has rows."""
    found = matched_rows(join.matched, part)
    places = parquet.read_table(join.work / "places" / f"{part:06d}.arrow").take(found["row"])
    rows = places.append_column("syn.json", found["syn.json"]).combine_chunks()
    files = np.array(rows["file"].to_pylist(), dtype=object)
    for number, file in enumerate(join.tars("pictures", part)):
        mine = rows.filter(pa.array(files == file, pa.bool_()))
        if not len(mine):
            continue
        name = file.removeprefix(join.root).lstrip("/")
        mine = mine.set_column(0, "file", pa.array([name] * len(mine), pa.string()))
        sink = pa.BufferOutputStream()
        parquet.write_table(mine.replace_schema_metadata({JOINED_ROOT: join.root}), sink)
        write_bytes(folder / f"{part * RUN_TARS + number:06d}.parquet", sink.getvalue())


def _third(progress: Progress, number: int, what: str, done: int, total: int) -> None:
    progress((number + done / total) / 3, f"{what}: {done:,} of {total:,}")


Made = TypeVar("Made")
# The join that a process works for; set once, when it starts.
_own: list[Join] = []


def _all(
    function: Callable[..., Made],
    join: Join,
    todo: Sequence[tuple[Any, ...]],
    workers: int,
    tell: Callable[[int, int], None],
) -> list[Made]:
    """What `function` returns for the join and each of these arguments, in any order.

    A ValueError is raised when all others are done.
    """
    if workers == 1 or len(todo) == 1:
        return _outcomes((partial(function, join, *one) for one in todo), len(todo), tell)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _start, (join,))
    try:
        futures = as_completed([pool.submit(_call, function, *one) for one in todo])
        return _outcomes((future.result for future in futures), len(todo), tell)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a joining process was killed, most likely for its memory: use fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _outcomes(
    calls: Iterable[Callable[[], Made]], total: int, tell: Callable[[int, int], None]
) -> list[Made]:
    made, problems = list[Made](), list[ValueError]()
    for number, call in enumerate(calls, 1):
        try:
            made.append(call())
        except ValueError as error:
            problems.append(error)
        tell(number, total)
    if problems:
        more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}; what was read stays: run the same again then")
    return made


def _start(join: Join) -> None:
    # Ctrl-C reaches every process of a terminal: the first one decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pa.set_cpu_count(1)
    leave_with_parent()
    _own.append(join)


def _call(function: Callable[..., Made], *arguments: Any) -> Made:
    return function(_own[0], *arguments)
