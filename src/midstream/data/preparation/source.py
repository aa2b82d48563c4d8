"""Public formats in -> one indexed source: in parallel, shard by shard, continued where it was."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from midstream.data.columns import SHARD_INDEX
from midstream.data.examples import TextCodec
from midstream.data.formats.files import is_url
from midstream.data.formats.records import ReadOptions, Section, Unit
from midstream.data.formats.twins import refuse_twins
from midstream.data.preparation.folder_notes import notes_on, unread_files
from midstream.data.preparation.records import units_of
from midstream.data.preparation.rejects import NUM_LISTED, refuse_rejects
from midstream.data.preparation.state import Job, Todo, settle, wanted_shards
from midstream.data.preparation.workers import Progress, Watch, make_shards
from midstream.data.source_writer import finish_source
from midstream.data.sources import INDEX
from midstream.storage import read_json, remove_leftovers, write_bytes, write_json

LOCK = "prepare.lock"


def prepare_source(
    section: Section,
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer_file: Path,
    options: ReadOptions,
    root: str,
    workers: int,
    max_reject_fraction: float,
    validation_fraction: float,
    progress: Progress,
    notice: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Prepare files, folders, patterns or URLs as one source in `out`; returns its counts.

    Each unit of input becomes a shard. Those that a run finished stay, whatever ends it, until
    their input, the options or the tokenizer change; "shards" in the counts says how many were
    kept and how many are new. Names of files under the folder `root` are kept relative to it.
    `max_reject_fraction` of the records may be rejects; `validation_fraction` of the others, chosen
    by content, are held out. `progress` gets the done fraction and a line of text; `notice` gets
    what a person should know of the folder (files that are not read), else `progress` does.

    Raises FileNotFoundError or ValueError that names the file for input that is missing or cannot
    be read (after all others are done), ValueError for two files that are one and for rejects that
    are too many, with their list, and OSError for what cannot be written or a process that dies.
    """
    _check_settings(sources, workers, max_reject_fraction, validation_fraction)
    out, root = out.absolute(), os.path.abspath(root) if root else ""
    if options.images is not None:
        options = replace(options, images=_absolute(options.images))
    absolute = [_absolute(source) for source in sources]
    units = units_of(section, absolute, options)
    _check_units(units, sources, out)
    codec = TextCodec.from_file(tokenizer_file)
    tokenizer = canonical_tokenizer(codec)
    job = Job(
        section,
        out,
        options,
        root,
        digest_of(tokenizer),
        validation_fraction,
        codec.begin_of_text,
    )
    wanted = wanted_shards(job, units)
    refuse_twins(_sizes(wanted))
    unread = _unread(job, absolute, units, notice or partial(progress, 0.0))
    job.shards.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        remove_leftovers(out)
        remove_leftovers(job.shards)
        todo = settle(job, wanted)
        if not (job.tokenizer_file.is_file() and job.tokenizer_file.read_bytes() == tokenizer):
            write_bytes(job.tokenizer_file, tokenizer)
        _make(job, wanted, todo, workers, max_reject_fraction, progress)
        if not (out / INDEX).is_file():
            finish_source(
                out,
                tokenizer_digest=job.tokenizer,
                vocab_size=codec.size,
                root=root,
                begin_of_text=job.begin_of_text,
            )
        index: dict[str, Any] = read_json(out / INDEX)
        # It may have changed where no shard has.
        if index.get("unread") != unread:
            index["unread"] = unread
            write_json(out / INDEX, index)
    kept = len(wanted) - len(todo)
    progress(1.0, f"{kept:,} shards kept, {len(todo):,} new")
    return index | {"shards": {"kept": kept, "new": len(todo)}}


def canonical_tokenizer(codec: TextCodec) -> bytes:
    """The tokenizer as a file of `tokenizers`, the same for every file that says the same."""
    return str(codec.tokenizer.to_str(pretty=True)).encode()


def digest_of(tokenizer: bytes) -> str:
    """The sha256 that a source names its tokenizer by."""
    return hashlib.sha256(tokenizer).hexdigest()


def _check_settings(
    sources: Sequence[str], workers: int, max_reject_fraction: float, validation_fraction: float
) -> None:
    if not 0 <= max_reject_fraction <= 1:
        raise ValueError(f"the limit of rejects is a fraction, 0 to 1, not {max_reject_fraction}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"the validation share is 0 or more, below 1, not {validation_fraction}")
    if workers < 1:
        raise ValueError(f"{workers} workers cannot prepare anything; give 1 or more")
    own = [source for source in sources if source.startswith("memory://")]
    if own and workers > 1:
        raise ValueError(f"{own[0]} lies in this process alone; use one worker")


def _check_units(units: Sequence[Unit], sources: Sequence[str], out: Path) -> None:
    if not units:
        raise ValueError(f"{', '.join(sources)} holds no record")
    if len(set(units)) < len(units):
        twice = next(unit for unit, times in Counter(units).items() if times > 1)
        raise ValueError(f"{twice.files[0]} is given twice; give every file once")
    folders = [Path(source) for source in sources if not is_url(source)]
    files = [Path(file) for unit in units for file in unit.files if not is_url(file)]
    if any(folder.is_dir() and out.is_relative_to(folder.resolve()) for folder in folders) or any(
        file.is_relative_to(out) for file in files
    ):
        raise ValueError(f"{out} lies inside its own input; prepare into a folder beside it")


def _unread(
    job: Job, sources: Sequence[str], units: Sequence[Unit], notice: Callable[[str], None]
) -> dict[str, Any]:
    """Tell what a person should know of the folder; returns how many files are not read, and the
    first of them."""
    found = (job.short(file) for file in unread_files(job.section, sources, units))
    # Names may be bytes that are no UTF-8.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in found]
    for note in notes_on(job.section, names, [job.short(unit.files[0]) for unit in units]):
        notice(note)
    return {"files": len(names), "first": names[:NUM_LISTED]}


def _sizes(wanted: Sequence[Todo]) -> dict[str, int]:
    """Bytes of the files that are there, each unit's first."""
    stamps = {item.unit.files[0]: item.made_from["stamps"][0] for item in wanted}
    return {file: int(stamp[0] or 0) for file, stamp in stamps.items() if stamp}


def _absolute(name: str) -> str:
    return name if is_url(name) else os.path.abspath(name)


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{out} is being prepared by another process; wait until it ends or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _make(
    job: Job,
    wanted: Sequence[Todo],
    todo: Sequence[Todo],
    workers: int,
    max_reject_fraction: float,
    progress: Progress,
) -> None:
    """Make the shards that lack; returns only if all are there and their rejects not too many."""
    kept = [read_json(path / SHARD_INDEX) for path in job.shards.iterdir()]
    watch = Watch(
        wanted,
        todo,
        kept_records=sum(index["records"] for index in kept),
        kept_rejects=sum(sum(index["rejects"].values()) for index in kept),
        max_reject_fraction=max_reject_fraction,
        progress=progress,
    )
    try:
        make_shards(job, todo, workers, watch)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}; what is finished in {job.out} stays: put this right and "
            "run the same again",
        ) from error
    stopped = [reject for ended in watch.ended for reject in ended.rejects]
    refuse_rejects(job, stopped, records=watch.records, max_reject_fraction=max_reject_fraction)
    problems = [ended.problem for ended in watch.ended if ended.problem]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:NUM_LISTED])
        raise ValueError(
            f"{len(problems):,} of {len(wanted):,} inputs of {job.out} cannot be read; the shards "
            "of the others stay: mend or leave out these files and run the same again\n" + listed
        )
    if not watch.records:
        names = ", ".join(item.unit.files[0] for item in wanted[:NUM_LISTED])
        raise ValueError(f"no record in {names}; give files that hold some")
    assert all(job.folder(item.number).is_dir() for item in wanted)
