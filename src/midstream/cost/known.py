"""Sources as a plan knows them, counted or expected; and stages on a number of GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import log
from pathlib import Path
from typing import Literal

import numpy as np

from midstream.config import Caption, PublicFolder, Tokenizer, TrainedTokenizer, num_ids
from midstream.core.identity import PREPARED, SECTIONS
from midstream.core.tokens import num_shown
from midstream.study.results import Lengths, SourceResult
from midstream.study.stages import PLANNED, Prepare, PrepareSource
from midstream.study.store import Ledger

Number = float | int
Basis = Literal["counted", "expected"]
# Where nobody says how lengths vary: texts as if they ended by chance, in so many classes of equal
# number; captions and conversations half as long and half as long again as the mean.
TEXT_CLASSES = 32
# A text's tokens where nobody says them: about those of the web's.
TEXT_TOKENS = 1000
WHOLE_SPREAD = 0.5
# Places in a class of lengths, evenly spread, and their standard deviation.
PLACES, PLACES_DEVIATION = np.array([-1.5, -0.5, 0.5, 1.5]), 1.25**0.5
# Where nobody says how much of a conversation is reply.
REPLY_SHARE = 0.5


@dataclass(frozen=True)
class Facts:
    """A source: examples, text tokens, targets among them, pictures, and the lengths of examples.

    `shown` has the lengths of examples by how many pictures each shows, those without any last.
    `basis` says whether the lengths are those of the prepared source.
    """

    kind: str
    examples: Number
    tokens: Number
    targets: Number
    images: Number
    distinct_images: Number
    shown: tuple[tuple[int, Lengths], ...]
    basis: Basis

    def size(self, patches: int) -> int:
        """Positions of all examples, `patches` for each picture."""
        return int(self.tokens + self.images * patches)

    def fitted(self, patches: int, row_length: int) -> "Facts":
        """The source with captions and conversations cut to rows, class by class, of more pictures
        than have room those that have; as it is where its lengths are only expected, and where what
        is cut off goes on in other rows."""
        if self.kind in ("text", "interleaved") or self.basis == "expected":
            return self
        room = row_length // patches if patches else row_length
        by_images = dict[int, Lengths]()
        for all_images, lengths in self.shown:
            images = min(all_images, room)
            clipped = tuple(_clipped(part, row_length - images * patches) for part in lengths)
            by_images[images] = (*by_images.get(images, ()), *clipped)
        shown = tuple(by_images.items())
        if shown == self.shown:
            return self
        tokens = sum(part[1] for _, lengths in shown for part in lengths)
        targets = self.targets * tokens / max(self.tokens, 1)
        seen = sum(images * part[0] for images, lengths in shown for part in lengths)
        held = min(self.images, seen)
        return replace(self, tokens=tokens, targets=targets, images=held, shown=shown)

    def pooled(self, pool: int | None) -> "Facts":
        """A pool of the source, of so many of its examples, as expected of a random part."""
        if pool is None or pool >= self.examples:
            return self
        part = pool / self.examples
        names = ("tokens", "targets", "images", "distinct_images")
        shown = tuple(
            (images, tuple((part * n, part * sums, part * squares) for n, sums, squares in lengths))
            for images, lengths in self.shown
        )
        smaller = {name: part * getattr(self, name) for name in names}
        return replace(self, examples=pool, shown=shown, **smaller)

    def drawn(self, number: int, patches: int) -> tuple[np.ndarray, np.ndarray]:
        """int64: lengths in a row of so many examples that stand for all, and the pictures of
        each."""
        found, at, before = list[tuple[np.ndarray, np.ndarray]](), 0, 0.0
        for images, lengths in self.shown:
            before += sum(part[0] for part in lengths)
            end = min(round(before / max(self.examples, 1) * number), number)
            if images == 0:
                end = number
            drawn = _stratified(lengths, end - at) + images * patches
            found.append((drawn, np.full_like(drawn, images)))
            at = end
        if not sum(len(drawn) for drawn, _ in found):
            return np.ones(1, np.int64), np.zeros(1, np.int64)
        sizes, shown = map(np.concatenate, zip(*found, strict=True))
        return sizes, shown


def sources_of(
    data: Prepare, captions: Mapping[str, Caption], ledger: Ledger | None
) -> Mapping[str, Facts] | None:
    """Sources by name, each counted where its stage is done, else as the recipe expects it.

    `captions` names them, each with the caption that is seen of it. None where one of them is
    neither, and where pictures lack the caption: that is refused before a run.
    """
    facts: dict[str, Facts] = {}
    for name, caption in captions.items():
        if (found := facts_of(data.source(name), ledger, caption)) is None:
            return None
        facts[name] = found
    return facts


def facts_of(
    source: PrepareSource, ledger: Ledger | None, caption: Caption = "original"
) -> Facts | None:
    """A source counted where its stage is done, else as the recipe expects it; None for neither,
    and where pictures lack the caption that is asked."""
    if ledger is None or not ledger.is_done(source):
        if (told := source.expected) is None:
            return None
        counts = (told.num_examples, told.num_tokens, told.num_images)
        return _facts(told.kind, counts, told.num_targets)
    seen = ledger.result(source, SourceResult).with_caption(caption)
    return None if seen is None else facts_of_results(seen)


def prepared_index(source: PrepareSource) -> Path | None:
    """The index of a source that lies prepared in a user's own world, None where none does."""
    world = source.world
    if not isinstance(world, PublicFolder) or world.fingerprint is None:
        return None
    paths = (world.root / section / source.source / PREPARED for section in SECTIONS)
    return next((path for path in paths if path.is_file()), None)


def ids_of(tokenizer: Tokenizer) -> int | None:
    """How many ids a tokenizer has, at the most where it is still to be trained; None of a file
    that is not there."""
    if isinstance(tokenizer, TrainedTokenizer):
        return tokenizer.vocab_size
    is_there = tokenizer.path.is_file() and not tokenizer.sha256.startswith(PLANNED)
    return num_ids(tokenizer.path) if is_there else None


def facts_of_results(source: SourceResult) -> Facts:
    """From the results of a source's stage; older ones lack lengths, and maybe targets."""
    counts = (source.num_examples, source.num_tokens, source.num_images)
    more = (source.num_targets, source.distinct_images, source.lengths)
    return _facts(source.kind, counts, *more)


def facts_of_text(tokens: int) -> Facts:
    """Texts of which only the number of tokens is known."""
    return _facts("text", (max(tokens // TEXT_TOKENS, 1), tokens, 0))


def _facts(
    kind: str,
    counts: tuple[int, Number, int],
    targets: Number | None = None,
    distinct_images: int | None = None,
    lengths: Mapping[str, Lengths] | None = None,
) -> Facts:
    """Without lengths pictures are taken to be dealt out evenly over the examples."""
    examples, tokens, images = counts
    if targets is None:
        targets = (tokens - examples) * (REPLY_SHARE if kind == "instruct" else 1.0)
    if lengths is None:
        few, more = divmod(images, max(examples, 1))
        mean = tokens / max(examples, 1)
        numbers = {few + 1: more, few: examples - more}
        by_images = {n: _typical(kind, number, mean) for n, number in numbers.items()}
    else:
        by_images = {num_shown(shown): found for shown, found in lengths.items()}
    # Those without a picture stand last.
    shown = tuple(sorted(by_images.items(), key=lambda item: (item[0] == 0, item[0])))
    return Facts(
        kind=kind,
        examples=examples,
        tokens=tokens,
        targets=max(targets, 0),
        images=images,
        distinct_images=images if distinct_images is None else distinct_images,
        shown=shown,
        basis="expected" if lengths is None else "counted",
    )


def _typical(kind: str, number: Number, mean: float) -> Lengths:
    """Lengths of so many examples that have the mean and a usual spread."""
    if not number:
        return ()
    if kind == "text":
        drawn = [-log(1 - (place + 0.5) / TEXT_CLASSES) for place in range(TEXT_CLASSES)]
    else:
        drawn = [1 - WHOLE_SPREAD, 1 + WHOLE_SPREAD]
    scale, each = mean * len(drawn) / sum(drawn), number / len(drawn)
    return tuple((each, each * one * scale, each * (one * scale) ** 2) for one in drawn)


def _clipped(part: tuple[Number, Number, Number], most: int) -> tuple[Number, Number, Number]:
    number, tokens, _ = part
    return part if tokens <= number * most else (number, number * most, number * most**2)


def _stratified(lengths: Lengths, number: int) -> np.ndarray:
    """Lengths by their classes, evenly over each; their sum is the classes' to one token."""
    if not number or not lengths:
        return np.zeros(0, np.int64)
    counts, tokens, squares = np.array(lengths, dtype=float).T
    means = tokens / counts
    apart = np.sqrt(np.maximum(squares / counts - means**2, 0)) / PLACES_DEVIATION
    values = (means[:, None] + apart[:, None] * PLACES).reshape(-1)
    ends = np.cumsum(np.repeat(counts, len(PLACES)))
    at = np.searchsorted(ends, (np.arange(number) + 0.5) / number * ends[-1])
    found = np.diff(np.rint(np.cumsum(np.maximum(values[at], 1))), prepend=0)
    whole: np.ndarray = np.maximum(found, 1).astype(np.int64)
    return whole


@dataclass(frozen=True)
class Task:
    """A stage that is to run: hours on `gpus` GPUs, behind its parents among the tasks.

    `kept` and `running`: bytes on disk that stay when it is done, and that it takes meanwhile.
    """

    name: str
    hours: Number
    gpus: int
    parents: tuple[str, ...]
    kept: Number = 0.0
    running: Number = 0.0


@dataclass(frozen=True)
class Schedule:
    """Hours until the last stage ends; `critical_path` is the chain that takes longest by itself.

    lower_bound: no schedule is shorter than the critical path, nor than all GPU-hours over the
    GPUs. `starts` are in hours; `peak_bytes` is the most on disk at once.
    """

    hours: Number
    critical_path: tuple[str, ...]
    critical_hours: Number
    lower_bound: Number
    starts: Mapping[str, Number]
    peak_bytes: Number


def schedule(tasks: Sequence[Task], gpus: int) -> Schedule:
    """Start ready tasks as soon as their GPUs are free, the longest way to the end first.

    Parents stand before their children. Raises ValueError for a task that wants more than there
    are.
    """
    for task in tasks:
        if task.gpus > gpus:
            raise ValueError(
                f"{task.name} needs {task.gpus} GPUs, there are {gpus}; raise --gpus, lower "
                "--gpus-per-stage, or choose a --gpu with more memory"
            )
    by_name = {task.name: task for task in tasks}
    way, following = _ways(tasks)
    waiting = {task.name: len(set(task.parents) & by_name.keys()) for task in tasks}
    children: dict[str, list[str]] = {name: [] for name in by_name}
    for task in tasks:
        for parent in set(task.parents) & by_name.keys():
            children[parent].append(task.name)
    ready = [(-way[name], name) for name, number in waiting.items() if not number]
    ready.sort()
    running: list[tuple[Number, str]] = []
    starts: dict[str, Number] = {}
    free, now, disk, peak = gpus, 0.0, 0.0, 0.0
    while ready or running:
        left = []
        for item in ready:
            task = by_name[item[1]]
            if task.gpus > free:
                left.append(item)
                continue
            free -= task.gpus
            disk += task.kept + task.running
            starts[task.name] = now
            heappush(running, (now + task.hours, task.name))
        ready, peak = left, max(peak, disk)
        now, name = heappop(running)
        free, disk = free + by_name[name].gpus, disk - by_name[name].running
        for child in children[name]:
            waiting[child] -= 1
            if not waiting[child]:
                ready.append((-way[child], child))
        ready.sort()
    path = [max(way, key=lambda one: way[one])] if way else []
    while path and path[-1] in following:
        path.append(following[path[-1]])
    critical = way[path[0]] if path else 0.0
    work = sum(task.hours * task.gpus for task in tasks) / gpus
    bound = max(critical, work)
    # Hours summed from the other end may be less in their last digit.
    return Schedule(max(now, bound), tuple(path), critical, bound, starts, peak)


def _ways(tasks: Sequence[Task]) -> tuple[dict[str, Number], dict[str, str]]:
    """Hours from each task's start to the end of the longest chain behind it; who is next there."""
    way: dict[str, Number] = {}
    behind: dict[str, Number] = {}
    following: dict[str, str] = {}
    for task in reversed(tasks):
        way[task.name] = task.hours + behind.get(task.name, 0.0)
        for parent in task.parents:
            # Of equal ways the one of more stages, as where some are unknown.
            if way[task.name] >= behind.get(parent, 0.0):
                behind[parent], following[parent] = way[task.name], task.name
    return way, following
