"""What a stage watches: its ranks while it runs, its values when it starts."""

import faulthandler
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import torch
import torch.distributed as dist

import midstream
from midstream.config import Machine
from midstream.core.identity import folder_fingerprint
from midstream.core.storage import append_line
from midstream.model.vlm import VLM
from midstream.model.weights import joint_digest, tensor_digest
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress
from midstream.train.parallel import Place
from midstream.train.step import StepResult, local

# A point at which a process stands longer than this many times the longest so far is stuck, but not
# before so many times the timeout has passed: rows may come from a disk that is slow for once.
_LONGEST = 20.0
_STILL = 10.0
# The same for what was not done before (a first step compiles), and for what a disk may hold up.
_STILL_AT_FIRST = 160.0
# How long a process whose run is lost may take to end by itself, as one does that has failed.
_LEAVE_SECONDS = 3.0
_VERDICT = "watch/verdict"
# The pulse of a rank that has ended well.
_LEFT = -1

Lost = Callable[[str], None]


# What a training stage does over and over: waiting for rows, a step (and in it for other ranks),
# writing what the step gave.
Kind = Literal["data", "step", "keep"]


@dataclass(frozen=True)
class _Point:
    """Where a rank is; `moves` counts the points before it. `kind` is None outside of steps."""

    moves: int = 0
    doing: str = "opening the stage"
    kind: Kind | None = None


@dataclass(frozen=True)
class _Said:
    """What one rank said last; `seconds` is how long it has been where it is."""

    pulse: int
    moves: int
    doing: str
    in_steps: bool
    seconds: float
    longest: float
    is_overdue: bool


class Watch:
    """The signs of life of this rank, and an eye on the others; one process watches itself.

    They go through the store that torchrun keeps, from a thread of its own; whoever finds a rank
    lost writes the verdict, and all leave by it: a collective that lacks a rank never ends.

    `timeout_seconds`: a rank is dead that is silent for so long. It is stuck if it is behind the
    others or, in steps, level with them, and stands at one point for 20 times as long as the stage
    ever did at such points, and for 10 timeouts (160 at first, and where the disk is waited for).
    Beyond 160 timeouts twice as long as ever is enough.
    On the verdict `lost` gets its text, the log where each thread stands, and the process ends.
    """

    def __init__(
        self, place: Place, timeout_seconds: float = math.inf, lost: Lost = lambda verdict: None
    ) -> None:
        self._rank, self._size = place.rank, place.world_size
        self._timeout, self._lost = timeout_seconds, lost
        self._every = min(timeout_seconds / 10, 2.0)
        self._point = _Point()
        # How long this rank has stood at the point that the thread saw last.
        self._seen, self._seconds = self._point, 0.0
        self._since = time.monotonic()
        self._longest: dict[Kind, float] = {}
        self._over, self._decided = threading.Event(), threading.Event()
        self._alarm = False
        self._pulses: dict[int, tuple[int, float]] = {}
        self._thread: threading.Thread | None = None
        if place.scalars is None:
            return
        # The store has one lock a client: this thread must not wait for the collectives' set-up.
        self._store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))  # type: ignore[attr-defined]
        self._pulse(0)
        place.barrier()  # from here on every key is there
        self._start(self._run)

    def at(self, doing: str, kind: Kind | None = None) -> None:
        """This rank has come to its next point, which every rank comes to."""
        now, point = time.monotonic(), self._point
        if point.kind is not None:
            # Not by the clock alone: a process that was halted meanwhile has not been slow.
            stood = min(now - self._since, self._stood(point) + 2 * self._every)
            # The first of a kind, which starts and compiles things, says nothing of the others.
            before = self._longest.get(point.kind)
            self._longest[point.kind] = 0.0 if before is None else max(before, stood)
        self._since = now
        self._point = _Point(point.moves + 1, doing, kind)
        if kind and self._size == 1 and self._thread is None and self._timeout < math.inf:
            self._start(self._run_alone)

    def rest(self, doing: str = "between stages") -> None:
        """Outside of steps: what was usual in them is forgotten."""
        self.at(doing)
        self._longest = {}
        if self._size == 1:
            self.close()

    def any_stops(self, mine: bool) -> bool:
        """Whether this rank or another was asked to stop since all came to this point; does not
        wait for the others, which go by steps of their own."""
        if self._size == 1:
            return mine
        key = f"watch/stop/{self._point.moves}"
        if mine:
            self._store.set(key, "")
        return mine or bool(self._store.check([key]))

    def failed(self, error: Exception) -> str:
        """Why the run fails, given this rank's own error: another rank may be the reason.

        Losing the connection to a rank is never the reason: it waits for the verdict.
        """
        if self._size == 1:
            return ""
        mine = f"rank {self._rank} failed ({self._point.doing}): {type(error).__name__}: {error}"
        text = str(error).lower()
        is_lost = isinstance(error, dist.DistError) or "connection" in text or "gloo" in text
        if is_lost and isinstance(error, RuntimeError):
            self._alarm = True
            self._decided.wait(self._timeout)
        told = self._say(mine)
        return "" if told == mine else told

    def close(self) -> None:
        """This rank has ended well: the others do not wait for it."""
        if self._thread is None:
            return
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        if self._size > 1:
            with suppress(RuntimeError):  # node 0 may have left already
                self._pulse(_LEFT)

    def _start(self, run: Callable[[], None]) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pulse = 0
        while not self._over.wait(self._every):
            pulse += 1
            try:
                self._tick()
                self._pulse(pulse)
                if self._store.check([_VERDICT]):
                    self._end(self._store.get(_VERDICT).decode())
                    return
                found = self._judge(self._look())
            except RuntimeError:
                # Without the store there is no node 0.
                self._end("the connection to node 0 is lost: its launcher has ended")
                return
            if found is not None:
                self._say(found)

    def _run_alone(self) -> None:
        over = self._over
        while not over.wait(self._every):
            self._tick()
            said = self._said(0)
            if said.in_steps and said.is_overdue:
                self._end(self._stuck("this process", said))
                return

    def _tick(self) -> None:
        # An interval for each look, however long that has taken.
        point = self._point
        self._seconds = self._seconds + self._every if point is self._seen else 0.0
        self._seen = point

    def _stood(self, point: _Point) -> float:
        return self._seconds if point is self._seen else 0.0

    def _said(self, pulse: int) -> _Said:
        point = self._point
        longest = self._longest.get(point.kind, 0.0) if point.kind else 0.0
        is_usual = point.kind is None or (longest and point.kind != "keep")
        most = self._timeout * _STILL_AT_FIRST
        floor = self._timeout * _STILL if is_usual else most
        seconds = self._stood(point)
        # A step may have waited for a rank that wrote a checkpoint: twenty times that is no limit.
        overdue = seconds > max(floor, min(_LONGEST * longest, most), 2 * longest)
        in_steps = point.kind is not None
        return _Said(pulse, point.moves, point.doing, in_steps, seconds, longest, overdue)

    def _pulse(self, number: int) -> None:
        self._store.set(f"watch/{self._rank}", json.dumps(asdict(self._said(number))))

    def _look(self) -> dict[int, _Said]:
        """What each rank that has not left said last."""
        keys = [f"watch/{rank}" for rank in range(self._size)]
        said = [_Said(**json.loads(told)) for told in self._store.multi_get(keys)]
        return {rank: one for rank, one in enumerate(said) if one.pulse != _LEFT}

    def _judge(self, said: Mapping[int, _Said]) -> str | None:
        now = time.monotonic()
        # A broken connection says that somebody has died: a short silence then says who.
        patience = 5 * self._every if self._alarm else self._timeout
        for rank, one in said.items():
            pulse, since = self._pulses.get(rank, (None, now))
            self._pulses[rank] = (one.pulse, since if one.pulse == pulse else now)
            if (silent := now - self._pulses[rank][1]) > patience:
                return f"rank {rank} is dead: silent for {silent:.0f} s, last {one.doing}"
        # Those that are ahead wait for these, however long that takes.
        least = min(one.moves for one in said.values())
        last = {rank: one for rank, one in said.items() if one.moves == least}
        level = len(last) == len(said)
        stuck = {r: o for r, o in last.items() if o.is_overdue and (o.in_steps or not level)}
        if not stuck:
            return None
        named = ", ".join(str(rank) for rank in stuck)
        who = "all ranks" if len(stuck) == len(said) else f"rank {named}"
        return self._stuck(who, next(iter(stuck.values())), others=not level)

    def _stuck(self, who: str, one: _Said, *, others: bool = False) -> str:
        before = f"at most {one.longest:.1f} s before" if one.longest else "for the first time"
        waiting = "; others have gone on and wait for it" if others else ""
        verb = "are" if who == "all ranks" else "is"
        return (
            f"{who} {verb} stuck: {one.seconds:.0f} s {one.doing}, {before}{waiting}. Its log says "
            f"where; if it is only slow, raise rank_timeout_seconds above {self._timeout:g}"
        )

    def _say(self, verdict: str) -> str:
        """Give a verdict; the first one counts, and is returned."""
        return str(self._store.compare_set(_VERDICT, "", verdict).decode())

    def _end(self, verdict: str) -> None:
        self._decided.set()
        if self._over.wait(_LEAVE_SECONDS):
            return
        _dump_threads()
        self._lost(verdict)
        os._exit(1)


def _dump_threads() -> None:
    """Log where each thread stands, in one piece: ranks share a log and may end at one moment."""
    log = sys.__stderr__ or sys.stderr
    try:
        with TemporaryFile() as whole:
            faulthandler.dump_traceback(file=whole)
            whole.seek(0)
            os.write(log.fileno(), whole.read())
    except OSError:  # no room for it
        faulthandler.dump_traceback(file=log)


# Reached by gradients only where a step shows a picture.
_SEEING = ("encoder.", "projector.", "gated.")
# They start at zero: a first step opens them for what stands behind, an adapter's other half too.
_GATES = (".gate", ".ffn_gate", ".lora_B.default.weight")
_BEHIND_GATES = ".lora_A."


class StartChecks:
    """The checks of one start of a stage; every rank makes them at the same points."""

    def __init__(self, model: VLM, place: Place, origin: Mapping[str, str]) -> None:
        self._model, self._place = model, place
        self._alike({"code": code_digest(), "torch": torch.__version__, **origin})
        named = list(model.named_parameters())
        self._pending = {name for name, value in named if value.requires_grad}
        self._frozen = ""
        self._gates = [(name, value) for name, value in named if name.endswith(_GATES)]
        # No gradient passes a gate of zero; a first step with pictures opens them.
        self._open = not self._gates

    def begin(
        self,
        folder: Path,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        rate: float,
        machine: Machine,
        saved: Mapping[str, str],
    ) -> None:
        """Before the first step: compare the rate with the schedule's, and weights and moments with
        the digests that a checkpoint was `saved` with; write this start's line.

        Raises ValueError with both rates, RuntimeError for other weights or moments.
        """
        if progress.rate != rate:
            raise ValueError(
                f"{folder}: the checkpoint goes on at a rate of {progress.rate}, the schedule says "
                f"{rate} at {progress.tokens_seen:,} tokens; it is another schedule's checkpoint"
            )
        self._frozen = self._frozen_digest()
        digests = checkpoint.digests(self._model, optimizer, place=self._place)
        if differing := [stem for stem, value in saved.items() if digests[stem] != value]:
            raise RuntimeError(
                f"{folder}: the checkpoint was read, but in memory {', '.join(differing)} differ "
                "from what was saved; this is an error of Midstream or of the machine's memory"
            )
        if self._place.rank == 0:
            append_line(folder / "starts.jsonl")(
                {
                    "step": progress.step,
                    "tokens_seen": progress.tokens_seen,
                    "rate": rate,
                    "weights_digest": digests["model"],
                    "moments_digest": digests["optimizer"],
                    "parameters": parameter_table(self._model),
                    "ranks": self._place.world_size,
                    "device": str(self._place.device.type),
                    "precision": self._place.precision_name,
                    "threads": machine.threads,
                    "compiled": self._place.compile_blocks,
                    "code": code_digest(),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                }
            )

    def are_due(self, num_images: int) -> bool:
        """Whether there is something to check after a step with so many pictures."""
        return any(num_images or not name.startswith(_SEEING) for name in self._pending)

    def after_step(self, result: StepResult) -> None:
        """After each step until every trained parameter was checked: a matrix must have had a
        gradient other than zero, any other parameter a gradient.

        Encoder and projector are checked by the first step with a picture, and what stands behind
        gates by the first after one in which all of these have opened. Raises ValueError with
        the names.
        """
        if not self.are_due(result.num_images):
            return
        judged = {n for n in self._pending if result.num_images or not n.startswith(_SEEING)}
        if not self._open:
            behind = {n for n in judged if n.startswith(_SEEING) or _BEHIND_GATES in n}
            judged -= {n for n in behind if not n.endswith(_GATES)}
            counts = [float(local(gate).count_nonzero()) for _, gate in self._gates]
            self._open = all(self._place.sum(counts))
        parameters = {n: value for n, value in self._model.named_parameters() if n in judged}
        # The gradient of a vector may vanish (a bias that softmax cancels): any will do.
        mine = [
            float(g is not None and (g.ndim < 2 or bool(local(g).count_nonzero())))
            for g in (value.grad for value in parameters.values())
        ]
        anywhere = self._place.sum(mine)
        unreached = {name for name, found in zip(parameters, anywhere, strict=True) if not found}
        unreached |= judged & set(result.untouched)
        if unreached:
            raise ValueError(
                f"{len(unreached)} trained parameters got no gradient in a step that uses them: "
                f"{', '.join(sorted(unreached)[:5])}; freeze them, or mend the model"
            )
        self._pending -= judged

    def end(self) -> None:
        """Raises RuntimeError if a frozen parameter has changed since `begin`."""
        if self._frozen_digest() != self._frozen:
            raise RuntimeError(
                "parameters that this stage keeps frozen have changed while it ran; its weights "
                "are not kept. This is an error of Midstream or of the machine's memory"
            )

    def _alike(self, mine: Mapping[str, str]) -> None:
        ranks = self._place.gather(dict(mine))
        for rank, theirs in enumerate(ranks):
            for key, value in theirs.items():
                if value != ranks[0].get(key):
                    raise ValueError(
                        f"rank {rank} runs with {key} {value!r}, rank 0 with "
                        f"{ranks[0].get(key)!r}; start all ranks from one installation and store"
                    )

    def _frozen_digest(self) -> str:
        # Of this rank's parts, which it alone could change.
        return joint_digest(
            {
                name: tensor_digest(local(value))
                for name, value in self._model.named_parameters()
                if not value.requires_grad
            }
        )


def parameter_table(model: VLM) -> dict[str, dict[str, int]]:
    """By part of the model (decoder, projector, encoder): trained and frozen parameters."""
    table: dict[str, dict[str, int]] = {}
    for name, value in model.named_parameters():
        part = table.setdefault(name.split(".")[0], {"trained": 0, "frozen": 0})
        part["trained" if value.requires_grad else "frozen"] += value.numel()
    return table


@cache
def code_digest() -> str:
    """Sixteen digits that stand for the source files of this package."""
    return folder_fingerprint(Path(midstream.__file__).parent, ("**/*.py",))
