"""Shards made in this process or in several, and how far that is."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from midstream.data.examples import TextCodec
from midstream.data.processes import leave_with_parent
from midstream.data.shard_state import Job, Todo
from midstream.data.shards import Ended, make_shard

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
    leave_with_parent()
    _own.update(job=job, shared=shared, codec=TextCodec.from_file(job.tokenizer_file))


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
