"""One source prepared: public formats in, an indexed source out.

Shards are made in parallel processes, and those that an earlier run finished are used again.
"""

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from midstream.core.digests import walk
from midstream.core.identity import PREPARING
from midstream.core.storage import (
    read_json,
    remove_leftovers,
    require_folder,
    write_bytes,
    write_json,
)
from midstream.core.tokens import name_some
from midstream.data.columns import MADE_FROM, SHARD_INDEX
from midstream.data.examples import TextCodec, not_known
from midstream.data.formats.copies import refuse_twin_samples, refuse_twins
from midstream.data.formats.files import folder_of, is_url
from midstream.data.formats.records import FILES, ReadOptions, Section, Unit, samples_beside
from midstream.data.shard_state import (
    NUM_LISTED,
    Job,
    TaskShare,
    Todo,
    drop_units,
    is_made,
    notes_on,
    num_counted,
    refuse_rejects,
    set_aside,
    settle,
    unread_files,
    wanted_shards,
)
from midstream.data.shard_workers import Progress, Watch, make_shards
from midstream.data.shards import units_of
from midstream.data.source_writer import finish_source
from midstream.data.sources import INDEX

_OF_A_SET = re.compile(r"(.*?)(\d{1,9})-of-(\d{1,9})(.*)", re.DOTALL)


@dataclass(frozen=True)
class SourcePlan:
    """A source that is to be prepared, or a share of it, as its files are now.

    `wanted` are the shards of its `units`, `tokenizer` the canonical file, of `vocab_size` ids;
    `not_known` says what it has no token for.
    """

    job: Job
    sources: tuple[str, ...]
    units: tuple[Unit, ...]
    wanted: tuple[Todo, ...]
    tokenizer: bytes
    vocab_size: int
    not_known: str = ""


def plan_source(
    section: Section,
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer_file: Path,
    options: ReadOptions,
    root: str,
    validation_fraction: float,
    by_command: bool = False,
    copy_pictures: bool = False,
    share: TaskShare | None = None,
) -> SourcePlan:
    """What `prepare_source` or `make_share` is to make of these inputs in `out`; writes nothing.

    Names of files under the folder `root` are kept relative to it. `validation_fraction` of the
    records, chosen by content, are held out. `by_command`: it is for `midstream prepare`, whose
    options messages then advise. `copy_pictures` keeps all pictures in the source; otherwise those
    that are a range of a file stay there.

    Raises FileNotFoundError or ValueError that names the file for input that is missing, that
    cannot be divided into units or that lies about `out`, and ValueError for two files that are
    one.
    """
    require_folder(out, "give another --out")
    out, root = out.absolute(), os.path.abspath(root) if root else ""
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"the validation share is 0 or more, below 1, not {validation_fraction}")
    if not all((*sources, options.images is None or options.images)):
        raise ValueError("the name of a source, or of --images, is empty; is a variable not set?")
    if options.images is not None:
        options = replace(options, images=_absolute(options.images))
    absolute = tuple(_absolute(source) for source in sources)
    units = units_of(section, absolute, options)
    _check_units(units, sources, out)
    codec = TextCodec.from_file(tokenizer_file)
    tokenizer = canonical_tokenizer(codec)
    job = Job(
        section,
        out,
        options,
        root,
        tokenizer_file.absolute(),
        hashlib.sha256(tokenizer).hexdigest(),
        validation_fraction,
        codec.begin_of_text,
        by_command,
        copy_pictures,
        share,
    )
    wanted = wanted_shards(job, units)
    _refuse_twins(wanted)
    if by_command and share is None:
        _refuse_to_replace(job, wanted)
    return SourcePlan(
        job,
        absolute,
        tuple(units),
        tuple(wanted),
        tokenizer,
        codec.size,
        not_known(codec.tokenizer),
    )


def prepare_source(
    plan: SourcePlan,
    *,
    workers: int,
    max_reject_fraction: float,
    progress: Progress,
    notice: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Prepare files, folders, patterns or URLs as one source; returns its counts.

    Each unit of input becomes a shard. Those that a run or a task finished stay, whatever ends it,
    until their input, the options or the tokenizer change; "shards" in the counts says how many
    were kept and how many are new. `max_reject_fraction` of the records may be rejects. `progress`
    gets the done fraction and a line of text; `notice` gets what a person should know of the folder
    (files that are not read), else `progress` does.

    Raises FileNotFoundError or ValueError that names the file for input that cannot be read (after
    all others are done), ValueError for rejects that are too many, with their list, and OSError for
    what cannot be written or a process that dies.
    """
    _check_settings(plan.sources, workers, max_reject_fraction)
    job, out = plan.job, plan.job.out
    unread = unread_of(plan, notice or partial(progress, 0.0))
    job.shards.mkdir(parents=True, exist_ok=True)
    with only_one(out):
        remove_leftovers(out)
        remove_leftovers(job.shards)
        todo = settle(job, plan.wanted)
        own = out / "tokenizer.json"
        if not (own.is_file() and own.read_bytes() == plan.tokenizer):
            write_bytes(own, plan.tokenizer)
        _make(job, plan.wanted, todo, workers, max_reject_fraction, progress)
        if not (out / INDEX).is_file():
            finish_source(
                out,
                tokenizer_digest=job.tokenizer,
                vocab_size=plan.vocab_size,
                root=job.root,
                begin_of_text=job.begin_of_text,
            )
        index: dict[str, Any] = read_json(out / INDEX)
        # It may have changed where no shard has.
        if index.get("unread") != unread:
            index["unread"] = unread
            write_json(out / INDEX, index)
        drop_units(job)
    kept = len(plan.wanted) - len(todo)
    progress(1.0, f"{kept:,} shards kept, {len(todo):,} new")
    return index | {"shards": {"kept": kept, "new": len(todo)}}


def make_share(
    plan: SourcePlan, *, workers: int, max_reject_fraction: float, progress: Progress
) -> dict[str, int]:
    """Make the shards of the plan's share that nobody has finished; returns their numbers.

    Each is published under a name of its own, whole or not at all, for `prepare_source` to take:
    "kept" were there, "new" are made here, "late" made by another task meanwhile. "left" are files
    that cannot be read and what comes after too many rejects: `prepare_source` says so. Tasks that
    make the same share, or that were taken for lost, do each other no harm.

    Raises OSError for what cannot be written, ValueError where the source was finished meanwhile
    and, after all others are done, for files that their servers do not give: they may later.
    """
    job = plan.job
    _check_settings(plan.sources, workers, max_reject_fraction)
    todo = [item for item in plan.wanted if not is_made(job, item)]
    if not todo:
        return {"kept": len(plan.wanted), "new": 0, "late": 0, "left": 0}
    job.units.mkdir(parents=True, exist_ok=True)
    for item in todo:
        set_aside(job, item)
    watch = Watch(
        plan.wanted,
        todo,
        kept_records=0,
        kept_rejects=0,
        max_reject_fraction=max_reject_fraction,
        progress=progress,
    )
    try:
        make_shards(job, todo, workers, watch)
    except OSError as error:
        if job.units.is_dir():
            raise _with_remedy(error, job.out) from error
        raise ValueError(
            f"{job.out} was finished without this task, which was taken for lost; what it has made "
            "since is not used"
        ) from error
    if refused := [ended.problem for ended in watch.ended if ended.is_refusing]:
        raise ValueError(
            f"servers do not give {len(refused):,} of {len(plan.wanted):,} inputs; what is "
            f"finished in {job.out} stays: run the same again later\n{_listed(refused)}"
        )
    late = sum(ended.is_late for ended in watch.ended)
    good = sum(not ended.problem and not ended.rejects for ended in watch.ended)
    kept, left = len(plan.wanted) - len(todo), len(todo) - good
    return {"kept": kept, "new": good - late, "late": late, "left": left}


def _listed(problems: Sequence[str]) -> str:
    return "\n".join(f"  {problem}" for problem in problems[:NUM_LISTED])


def _with_remedy(error: OSError, out: Path) -> OSError:
    why = error.strerror or error
    return OSError(
        error.errno,
        f"{why}; what is finished in {out} stays: put this right and run the same again",
    )


def canonical_tokenizer(codec: TextCodec) -> bytes:
    """The tokenizer as a file of `tokenizers`, the same for every file that says the same."""
    return str(codec.tokenizer.to_str(pretty=True)).encode()


def _check_settings(sources: Sequence[str], workers: int, max_reject_fraction: float) -> None:
    if not 0 <= max_reject_fraction <= 1:
        raise ValueError(f"the limit of rejects is a fraction, 0 to 1, not {max_reject_fraction}")
    if workers < 1:
        raise ValueError(f"{workers} workers cannot prepare anything; give 1 or more")
    own = [source for source in sources if source.startswith("memory://")]
    if own and workers > 1:
        raise ValueError(f"{own[0]} lies in this process alone; use one worker")


def _check_units(units: Sequence[Unit], sources: Sequence[str], out: Path) -> None:
    if not units:
        raise ValueError(f"{', '.join(sources)} holds no record")
    folders = [Path(source) for source in sources if not is_url(source)]
    files = [Path(file) for unit in units for file in unit.files if not is_url(file)]
    if any(folder.is_dir() and out.is_relative_to(folder.resolve()) for folder in folders) or any(
        file.is_relative_to(out) for file in files
    ):
        raise ValueError(f"{out} lies inside its own input; prepare into a folder beside it")


def _refuse_twins(wanted: Sequence[Todo]) -> None:
    stamps = [zip(item.unit.files, item.made_from["stamps"], strict=True) for item in wanted]
    sizes = {file: int(stamp[0] or 0) for part in stamps for file, stamp in part if stamp}
    lone = {file for item in wanted if item.unit.format != FILES for file in item.unit.files}
    refuse_twins({file: size for file, size in sizes.items() if file in lone})
    beside = (sample for item in wanted for sample in samples_beside(item.unit))
    refuse_twin_samples((files for files in beside if sizes.keys() >= {*files}), sizes)


def _refuse_to_replace(job: Job, wanted: Sequence[Todo]) -> None:
    """Raises ValueError if `job.out` holds a finished source of another kind, or of none of these
    files, whose own are where they were: it would be removed."""
    if not (job.out / INDEX).is_file():
        return
    made = [read_json(path) for path in sorted(job.shards.glob(f"*/{MADE_FROM}"))]
    held = [file for one in made for file in one["unit"]["files"]]
    sections = {one["section"] for one in made} - {job.section}
    asked = {file for item in wanted for file in item.unit.files}
    is_there = any(is_url(file) or os.path.exists(file) for file in held[:1])
    if sections or (asked.isdisjoint(held) and is_there):
        what = f"{next(iter(sections), job.section)} from {name_some(map(job.short, held), 2)}"
        raise ValueError(
            f"{job.out} holds a source that is prepared, {what}, and would be replaced; give "
            "another --out (one source is made of all its files at once), or remove that folder"
        )


def unread_of(plan: SourcePlan, notice: Callable[[str], None]) -> dict[str, Any]:
    """Tell what a person should know of the tokenizer and the folder; returns which of its files
    are not read."""
    job, units = plan.job, plan.units
    if plan.not_known:
        notice(plan.not_known)
    found = (job.short(file) for file in unread_files(job.section, plan.sources, units))
    # Names may be bytes that are no UTF-8.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in found]
    # Of samples beside each other their folders are enough.
    listed = (map(folder_of, x.files) if x.format == FILES else x.files for x in units)
    read = [job.short(file) for file in dict.fromkeys(chain.from_iterable(listed))]
    for note in notes_on(job.section, names, read):
        notice(note)
    for note in _sets_with_gaps(read):
        notice(note)
    circles: list[str] = []
    for folder in (source for source in plan.sources if os.path.isdir(source)):
        deque(walk(folder, circles), maxlen=0)
    if circles:
        shown = name_some(map(job.short, circles), NUM_LISTED)
        notice(f"links that go round in a circle are not entered again: {shown}")
    return {"files": len(names), "first": names[:NUM_LISTED]}


def _sets_with_gaps(names: Sequence[str]) -> Iterator[str]:
    """A line on each set of files (train-00000-of-00005.parquet) of which some are not there."""
    held: dict[tuple[str, str, str], set[int]] = {}
    for match in filter(None, map(_OF_A_SET.fullmatch, names)):
        before, number, total, after = match.groups()
        held.setdefault((before, total, after), set()).add(int(number))
    for (before, total, after), numbers in held.items():
        first = int(int(total) in numbers)
        if lacking := sorted({*range(first, int(total) + first)} - numbers):
            name = f"{before}{lacking[0]:0{len(total)}}-of-{total}{after}"
            yield f"only {len(numbers):,} of a set of {int(total):,} files are read; {name} is not"


def _absolute(name: str) -> str:
    return name if is_url(name) else os.path.abspath(name)


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Raises ValueError if another process prepares a source in `out`, as this one in the block."""
    lock = FileLock(out / PREPARING, timeout=0)
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
        kept_rejects=sum(num_counted(index["rejects"]) for index in kept),
        max_reject_fraction=max_reject_fraction,
        progress=progress,
    )
    try:
        make_shards(job, todo, workers, watch)
    except OSError as error:
        raise _with_remedy(error, job.out) from error
    stopped = [reject for ended in watch.ended for reject in ended.rejects]
    refuse_rejects(job, stopped, records=watch.records, max_reject_fraction=max_reject_fraction)
    problems = [ended.problem for ended in watch.ended if ended.problem]
    if problems:
        raise ValueError(
            f"{len(problems):,} of {len(wanted):,} inputs of {job.out} cannot be read; the shards "
            "of the others stay: mend or leave out these files and run the same again\n"
            + _listed(problems)
        )
    if not watch.records:
        names = ", ".join(item.unit.files[0] for item in wanted[:NUM_LISTED])
        raise ValueError(f"no record in {names}; give files that hold some")
    assert all(job.folder(item.number).is_dir() for item in wanted)
