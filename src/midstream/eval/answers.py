"""Two caches of an evaluation: single answers within a task, results of whole tasks.

Their keys stand for all that they depend on, wherever files lie.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from midstream.config import Evaluation
from midstream.core.digests import file_sha256
from midstream.core.storage import read_json, room_for, write_bytes
from midstream.eval.few_shot import Shots
from midstream.eval.find_task import VisualTask
from midstream.eval.tasks import Answerer, Ask, GoOn, Reply
from midstream.eval.text import TextTask

# Raise it when the meaning of an answer changes: kept ones of an earlier version are asked again.
ANSWERS_VERSION = 4
# Batches handed to the model at a time: it may sort within them, and stops and reports between.
BATCHES_AT_ONCE = 8
Progress = Callable[[float, str], None]


# One process.
_ALONE = SimpleNamespace(rank=0, world_size=1, gather=lambda value: [value])


class EvaluationStopped(Exception):  # noqa: N818 - it ends an evaluation without being an error
    """Asked to stop, with more to be asked; what was answered is kept."""


class NotNumbers(ValueError):  # noqa: N818 - what is wrong with a model's log-probabilities
    """A model's log-probabilities are NaN."""

    def __init__(self) -> None:
        super().__init__(
            "its log-probabilities are no numbers (NaN): the weights are broken, or overflow in "
            "the type that they are read in"
        )


class KeptAnswers:
    """An `Answerer` in front of another one: what was answered is not asked again.

    folder: where the answers are kept, a file of JSON lines per rank, read by any number of ranks;
    None to keep none. at_once: requests that the model gets
    together; whatever their number, an answer does not depend on its neighbours. `settings` stand
    for whatever else an answer depends on. `file_digest` stands for a picture's bytes and is asked
    once for each. `ranks`: a `train.parallel.Place`, or what has its rank, world_size and gather;
    every rank must make the same requests in the same order; `at` hears what each of
    them comes to.
    """

    def __init__(
        self,
        answerer: Answerer,
        folder: Path | None,
        *,
        at_once: int,
        settings: str = "",
        file_digest: Callable[[Path], str] = file_sha256,
        ranks: Any = _ALONE,
        should_stop: Callable[[], bool] = lambda: False,
        at: Callable[[str], None] = lambda _point: None,
    ) -> None:
        self.answerer, self.at_once, self.should_stop = answerer, at_once, should_stop
        self.at = at
        self.ranks = ranks
        self.weights_digest = answerer.weights_digest
        self.file_digest = functools.cache(file_digest)
        self.progress: Progress = lambda _fraction, _text: None
        self._about = [ANSWERS_VERSION, self.weights_digest, settings]
        self._known: dict[str, Any] = {}
        self._stopping = False
        self._file: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.jsonl")):
                self._known |= dict(_read(path))
            self._file = folder / f"{self.ranks.rank}.jsonl"
            if self._file.is_file():
                # The next answer must not stand behind half a line.
                os.truncate(self._file, len(_whole_lines(self._file)))
            # Nobody writes before everybody has read.
            self.ranks.gather(None)
        self.num_found = len(self._known)

    def reply(self, asked: Sequence[Ask]) -> list[Reply]:
        """See `Answerer`; questions about one picture are asked together."""
        return [Reply(*one) for one in self._all("reply", asked, _picture, self.answerer.reply)]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """See `Answerer`; continuations of one context are asked together, contexts by length."""
        found = self._all("loglikelihood", pairs, _length, self.answerer.loglikelihood)
        return [(float(value), bool(greedy)) for value, greedy in found]

    def num_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """See `Answerer`; needs no model, and is not kept."""
        return self.answerer.num_tokens(pairs)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """See `Answerer`."""
        return self._all("rolling", texts, _length, self.answerer.loglikelihood_rolling)

    def generate_until(self, asked: Sequence[GoOn]) -> list[str]:
        """See `Answerer`."""
        return self._all("generate_until", asked, _length, self.answerer.generate_until)

    def _all(
        self,
        kind: str,
        requests: Sequence[Any],
        order_of: Callable[[Any], tuple[int, str]],
        ask: Callable[[Any], Sequence[Any]],
    ) -> list[Any]:
        """Every answer: known, or asked by one of the ranks; equal orders are asked together."""
        order = [order_of(request) for request in requests]
        keys = [self._key(kind, request) for request in requests]
        new = {key: index for index, key in enumerate(keys) if key not in self._known}
        waiting = sorted(new.values(), key=lambda index: (order[index], index))
        size = self.ranks.world_size
        # Few requests are still work for every rank.
        at_once = max(1, min(self.at_once, -(-len(waiting) // size)))
        parts = list(_together(waiting, order, at_once))
        for first in range(0, len(parts), size):
            if self._stopping:
                raise EvaluationStopped("asked to stop; its answers so far are kept")
            self.at(f"answering parts {first + 1} and on of {len(parts)} ({kind})")
            fresh: dict[str, Any] = {}
            for part in parts[first : first + size][self.ranks.rank :][:1]:
                answers = ask([requests[i] for i in part])
                fresh = {keys[i]: answer for i, answer in zip(part, answers, strict=True)}
            broken = any(map(_holds_nan, fresh.values()))
            if not broken:
                self._keep(fresh)
            for others, wants, wrong in self.ranks.gather([fresh, self.should_stop(), broken]):
                self._known |= others
                self._stopping = self._stopping or wants
                if wrong:
                    raise NotNumbers
            self._report(len(requests) - sum(map(len, parts[first + size :])), len(requests))
        if not parts and requests:
            self._report(len(requests), len(requests))
        return [self._known[key] for key in keys]

    def _report(self, done: int, of: int) -> None:
        # Not rounded up, as the share of the whole evaluation is not.
        self.progress(done / of, f"{done:,} of {of:,} ({100 * done // of} %)")

    def _key(self, kind: str, request: Any) -> str:
        told = request if kind in ("reply", "generate_until") else (request,)
        text = json.dumps([*self._about, kind, told], default=self.file_digest)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _keep(self, answers: dict[str, Any]) -> None:
        if self._file is None or not answers:
            return
        lines = "".join(json.dumps(pair) + "\n" for pair in answers.items())
        with room_for(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())


def _holds_nan(answer: Any) -> bool:
    if isinstance(answer, list | tuple):
        return any(map(_holds_nan, answer))
    return isinstance(answer, float) and math.isnan(answer)


def _picture(ask: Ask) -> tuple[int, str]:
    # Two questions about one picture share its reading where their lengths are alike.
    return (0 if ask.image is None else 1, f"{ask.image}\0{len(ask.prompt):06d}")


def _length(request: Any) -> tuple[int, str]:
    context = request if isinstance(request, str) else request[0]
    return len(context), context


def _together(
    waiting: list[int], order: list[tuple[int, str]], at_once: int
) -> Iterator[list[int]]:
    """Parts of about `at_once`, none of which ends between requests of equal order."""
    part: list[int] = []
    for index in waiting:
        if len(part) >= at_once and order[index] != order[part[-1]]:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def _whole_lines(path: Path) -> bytes:
    # Without a last line that was being written when its process ended.
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The kept answers; ValueError names a line that is none."""
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        try:
            key, answer = json.loads(line)
        except ValueError:
            raise ValueError(f"{path} line {number} is broken; delete the file") from None
        yield key, answer


# Raise it when a scorer, or what a row of results holds, changes: tasks are asked again.
SCORES_VERSION = 5


@dataclass(frozen=True)
class EarlierTask:
    """A task's row of a results.json, and its predictions, whose time is that of the asking."""

    row: dict[str, Any]
    predictions: Path


def earlier_tasks(folders: Iterable[Path]) -> dict[str, EarlierTask]:
    """Every task with a key and predictions in the results.json of `folders`, by its key.

    A folder without a results.json holds nothing that is done.
    """
    found: dict[str, EarlierTask] = {}
    for folder in folders:
        path = folder / "results.json"
        # Other programs' folders may lie beside ours, and have files of this name.
        value = results_of(path)
        tasks = value.get("tasks") if isinstance(value, dict) else None
        for name, row in tasks.items() if isinstance(tasks, dict) else ():
            predictions = folder / "predictions" / f"{name}.parquet"
            if isinstance(row, dict) and "key" in row and predictions.is_file():
                found[row["key"]] = EarlierTask(row, predictions)
    return found


def results_of(path: Path) -> Any:
    """What a results.json holds; None where there is none, or none that is whole."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def take_predictions(
    earlier: EarlierTask, path: Path, pictures: Sequence[tuple[Path, ...]] | None
) -> None:
    """The same predictions as a file of their own, with the pictures where they lie now."""
    if earlier.predictions.resolve() == path.resolve():
        return
    asked = earlier.predictions.stat()
    table = pq.read_table(earlier.predictions)
    if pictures is not None:
        names = [list(map(str, one)) for one in pictures]
        column = table.schema.get_field_index("image")
        table = table.set_column(column, "image", pa.array([one[0] for one in names]))
        if (column := table.schema.get_field_index("more")) >= 0:
            more = pa.array([one[1:] or None for one in names], pa.list_(pa.string()))
            table = table.set_column(column, "more", more)
    write_table(path, table)
    os.utime(path, ns=(asked.st_atime_ns, asked.st_mtime_ns))


def write_table(path: Path, table: pa.Table) -> None:
    """A table as a parquet file, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def visual_key(
    task: VisualTask,
    prompts: Sequence[str],
    evaluation: Evaluation,
    weights_digest: str,
    file_digest: Callable[[Path], str],
    shots: Shots | None = None,
) -> str:
    """The key of a visual task's result."""
    fixed, few = task.format.fixed, evaluation.few_shot
    # Wrong pictures are drawn by which examples share theirs.
    order = {shown: number for number, shown in enumerate(e.pictures for e in task.examples)}
    return _digest(
        weights_digest,
        [task.name, task.format.name, task.chance, task.num_all],
        [evaluation.wordings.get(task.name, evaluation.prompts), evaluation.blind],
        evaluation.max_new_tokens,
        evaluation.fixed_answers if fixed is not None else None,
        evaluation.letters if fixed == "letters" else None,
        [
            [
                [e.example_id, prompt, e.gold, e.split, e.kinds, e.choices, e.size],
                [order[e.pictures], *map(file_digest, e.pictures)],
            ]
            for e, prompt in zip(task.examples, prompts, strict=True)
        ],
        *([] if shots is None else [_told(shots, file_digest)]),
        *(["document"] if few is not None and few.layout == "document" else []),
    )


def _told(shots: Shots, file_digest: Callable[[Path], str]) -> str:
    return json.dumps([shots.before, shots.excluded], default=file_digest)


def text_key(
    task: TextTask,
    limit: int | None,
    weights_digest: str,
    file_digest: Callable[[Path], str],
) -> str:
    """The key of a text task's result; where lm-evaluation-harness fetches the data itself, its
    version stands for them."""
    settings = dict(task.settings)
    if "include" in settings:  # the harness's own description, wherever it is installed
        settings["include"] = "/".join(Path(settings["include"]).parts[-3:])
    return _digest(
        weights_digest,
        [task.name, task.chance, task.split, task.num_docs, task.departs],
        [settings, version("lm_eval")],
        task.docs if task.docs is not None else [limit, *map(file_digest, task.files)],
    )


def _digest(*parts: Any) -> str:
    text = json.dumps([SCORES_VERSION, ANSWERS_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
