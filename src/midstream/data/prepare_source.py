"""One source prepared: public formats in, an indexed source out.

Shards are made in parallel processes, and those that an earlier run finished are used again.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from midstream.core.digests import walk
from midstream.core.storage import read_json, remove_leftovers, write_bytes, write_json
from midstream.data.columns import SHARD_INDEX
from midstream.data.examples import TextCodec
from midstream.data.formats.beside import FILES, samples_beside
from midstream.data.formats.copies import refuse_twin_samples, refuse_twins
from midstream.data.formats.files import is_url, name_some
from midstream.data.formats.records import ReadOptions, Section, Unit
from midstream.data.shard_state import (
    NUM_LISTED,
    Job,
    Todo,
    notes_on,
    refuse_rejects,
    settle,
    unread_files,
    wanted_shards,
)
from midstream.data.shards import Ended, make_shard, units_of
from midstream.data.source_writer import finish_source
from midstream.data.sources import INDEX

Progress = Callable[[float, str], None]
# So many rejects, and more than the limit allows of what was read, end a preparation early.
EARLY_REJECTS = 1000
LOOK_SECONDS = 0.2
# Units handed to each process ahead of time.
AHEAD = 2
RECORDS, TOKENS, REJECTS, STOP = range(4)


class Watch:
    """How far a preparation is: what was read so far, and whether too much of it is rejected."""

    def __init__(
        self,
        wanted: Sequence[Todo],
        todo: Sequence[Todo],
        *,
        kept_records: int,
        kept_rejects: int,
        max_reject_fraction: float,
        progress: Progress,
    ) -> None:
        self.max_reject_fraction, self.progress = max_reject_fraction, progress
        self.ended: list[Ended] = []
        self._kept_records, self._kept_rejects = kept_records, kept_rejects
        self._new = [0, 0, 0]
        users = Counter(file for item in wanted for file in item.unit.files)
        self._weights = {
            item.number: 1 + item.num_bytes / max(users[file] for file in item.unit.files)
            for item in wanted
        }
        self._total = sum(self._weights.values())
        self._done = self._total - sum(self._weights[item.number] for item in todo)
        self._num_done, self._num_wanted = len(wanted) - len(todo), len(wanted)
        self._started = self._told = time.monotonic()

    @property
    def too_many(self) -> bool:
        """Whether the rejects so far can hardly stay under the limit."""
        rejects = self._kept_rejects + self._new[REJECTS]
        return rejects > max(EARLY_REJECTS, self.max_reject_fraction * self.records)

    @property
    def records(self) -> int:
        """Records read so far, those of the kept shards included."""
        return self._kept_records + self._new[RECORDS]

    def note(self, new: Sequence[int]) -> None:
        """Take the records, tokens and rejects of this run so far; tell them now and then."""
        self._new = list(new)
        if time.monotonic() - self._told >= LOOK_SECONDS:
            self.tell()

    def end(self, item: Todo, ended: Ended) -> None:
        """A unit has ended."""
        self.ended.append(ended)
        self._done += self._weights[item.number]
        self._num_done += 1
        self.tell()

    def tell(self) -> None:
        """Hand the progress on."""
        self._told = time.monotonic()
        seconds = max(self._told - self._started, 1e-9)
        records, tokens, rejects = self._new
        note = (
            f"{self._num_done:,} of {self._num_wanted:,} shards, {records:,} records "
            f"({records / seconds:,.0f}/s), {tokens / seconds:,.0f} tokens/s, {rejects:,} rejects"
        )
        self.progress(min(self._done / self._total, 1.0), note)


def make_shards(job: Job, todo: Sequence[Todo], workers: int, watch: Watch) -> None:
    """Make shards, in this process if `workers` is 1; ends early if `watch` has seen too much.

    Raises OSError for what cannot be written and for a process that dies.
    """
    if workers == 1 or len(todo) == 1:
        _make_here(job, todo, watch)
    elif todo:
        _make_in_processes(job, todo, min(workers, len(todo)), watch)


def _make_here(job: Job, todo: Sequence[Todo], watch: Watch) -> None:
    codec = TextCodec.from_file(job.tokenizer_file)
    sums = [0, 0, 0]

    def beat(*new: int) -> bool:
        for place, more in enumerate(new):
            sums[place] += more
        watch.note(sums)
        return not watch.too_many

    for item in todo:
        watch.end(item, make_shard(job, codec, item, beat))
        if watch.too_many:
            return


def _make_in_processes(job: Job, todo: Sequence[Todo], workers: int, watch: Watch) -> None:
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the process that all workers are forked from.
    context.set_forkserver_preload([__name__])
    shared = context.Array("q", 4)
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job, shared))
    waiting: dict[Future[Ended], Todo] = {}
    rest = iter(todo)
    try:
        while True:
            while len(waiting) < AHEAD * workers and (item := next(rest, None)) is not None:
                waiting[pool.submit(_work, item)] = item
            if not waiting:
                break
            done, _ = wait(waiting, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
            watch.note(shared[:STOP])
            for future in done:
                watch.end(waiting.pop(future), future.result())
            if watch.too_many:
                shared[STOP], rest = 1, iter(())
    except BrokenProcessPool:
        raise ChildProcessError(
            "a preparing process was killed, most likely for its memory: use fewer workers"
        ) from None
    finally:
        shared[STOP] = 1
        pool.shutdown(cancel_futures=True)


# What a worker process works with; set once, when it starts.
_own: dict[str, Any] = {}


def _start(job: Job, shared: Any) -> None:
    # Ctrl-C reaches every process of a terminal: the first one decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core is what `workers` asks for.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=leave_with_parent, daemon=True).start()
    _own.update(job=job, shared=shared, codec=TextCodec.from_file(job.tokenizer_file))


def leave_with_parent() -> None:
    """End this process of a pool when the one that started it has ended."""
    # The pool's queues stay open in its workers: they would wait for ever for a killed parent.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(item: Todo) -> Ended:
    shared = _own["shared"]

    def beat(*new: int) -> bool:
        with shared.get_lock():
            for place, more in enumerate(new):
                shared[place] += more
            return not shared[STOP]

    if shared[STOP]:
        return Ended()
    return make_shard(_own["job"], _own["codec"], item, beat)


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
    copy_pictures: bool = False,
) -> dict[str, Any]:
    """Prepare files, folders, patterns or URLs as one source in `out`; returns its counts.

    Each unit of input becomes a shard. Those that a run finished stay, whatever ends it, until
    their input, the options or the tokenizer change; "shards" in the counts says how many were
    kept and how many are new. Names of files under the folder `root` are kept relative to it.
    `max_reject_fraction` of the records may be rejects; `validation_fraction` of the others, chosen
    by content, are held out. `progress` gets the done fraction and a line of text; `notice` gets
    what a person should know of the folder (files that are not read), else `progress` does; it is
    `midstream prepare` that gives one, whose options messages then advise. `copy_pictures` keeps
    all pictures in the source; otherwise those that are a range of a file stay there.

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
        hashlib.sha256(tokenizer).hexdigest(),
        validation_fraction,
        codec.begin_of_text,
        by_command=notice is not None,
        copies=copy_pictures,
    )
    wanted = wanted_shards(job, units)
    _refuse_twins(wanted)
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
    folders = [Path(source) for source in sources if not is_url(source)]
    files = [Path(file) for unit in units for file in unit.files if not is_url(file)]
    if any(folder.is_dir() and out.is_relative_to(folder.resolve()) for folder in folders) or any(
        file.is_relative_to(out) for file in files
    ):
        raise ValueError(f"{out} lies inside its own input; prepare into a folder beside it")


def _refuse_twins(wanted: Sequence[Todo]) -> None:
    stamps = [zip(item.unit.files, item.made_from["stamps"], strict=True) for item in wanted]
    sizes = {file: int(stamp[0] or 0) for part in stamps for file, stamp in part if stamp}
    lone = {item.unit.files[0] for item in wanted if item.unit.format != FILES}
    refuse_twins({file: size for file, size in sizes.items() if file in lone})
    beside = (sample for item in wanted for sample in samples_beside(item.unit))
    refuse_twin_samples((files for files in beside if sizes.keys() >= {*files}), sizes)


def _unread(
    job: Job, sources: Sequence[str], units: Sequence[Unit], notice: Callable[[str], None]
) -> dict[str, Any]:
    """Tell what a person should know of the folder; returns which of its files are not read."""
    found = (job.short(file) for file in unread_files(job.section, sources, units))
    # Names may be bytes that are no UTF-8.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in found]
    for note in notes_on(job.section, names, [job.short(unit.files[0]) for unit in units]):
        notice(note)
    circles: list[str] = []
    for folder in (source for source in sources if os.path.isdir(source)):
        deque(walk(folder, circles), maxlen=0)
    if circles:
        shown = name_some(map(job.short, circles), NUM_LISTED)
        notice(f"links that go round in a circle are not entered again: {shown}")
    return {"files": len(names), "first": names[:NUM_LISTED]}


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
