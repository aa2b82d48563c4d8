"""What a stage watches: its ranks while it runs, its values when it starts.

Names the rank that is lost: dead, silent, or stuck where the others have gone on.

Every rank gives signs of life through the store that torchrun keeps (`torch.distributed.TCPStore`),
from a thread of its own, and reads those of the others. Whoever finds one lost writes the verdict;
all leave by it, since a collective that lacks a rank never ends.

What is looked at whenever a stage starts or resumes, so that nothing is trained by mistake.

Ranks run the same code on the same data; the rate is the formula's; every trained parameter gets a
gradient; what is frozen stays as it was. Each start is a line of `starts.jsonl`.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

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

# Before its first step a rank may load, compile and measure: so many times longer.
_FIRST_STEP = 10.0
# How long a process whose run is lost may take to end by itself, as one does that has failed.
_LEAVE_SECONDS = 3.0
_VERDICT = "watch/verdict"
# The pulse of a rank that has ended well.
_LEFT = -1

Lost = Callable[[str], None]


@dataclass
class _Seen:
    """What one rank said last: its pulse, how often it has moved, where it is, and since when."""

    pulse: int
    moves: int
    doing: str
    pulse_at: float
    moved_at: float


class Watch:
    """The signs of life of this rank, and an eye on the others; nothing for one process.

    `timeout_seconds`: a rank is lost that is silent for so long, or whose last `at` is so long ago
    while another has gone on. On the verdict `lost` gets its text, and the process ends.
    """

    def __init__(
        self, place: Place, timeout_seconds: float = 45.0, lost: Lost = lambda verdict: None
    ) -> None:
        self._rank, self._size = place.rank, place.world_size
        self._timeout, self._lost = timeout_seconds, lost
        self._moves, self._doing = 0, "opening the stage"
        self._in_steps = False
        self._over, self._decided = threading.Event(), threading.Event()
        self._alarm = False
        self._thread: threading.Thread | None = None
        if place.scalars is None:
            return
        # The store has one lock a client: this thread must not wait for the collectives' set-up.
        self._store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))  # type: ignore[attr-defined]
        self._every = min(timeout_seconds / 10, 2.0)
        self._pulse(0)
        place.barrier()  # from here on every key is there
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def at(self, doing: str, *, in_steps: bool = True) -> None:
        """This rank has come to its next point, which every rank comes to."""
        self._doing, self._in_steps = doing, in_steps
        self._moves += 1

    def failed(self, error: Exception) -> str:
        """Why the run fails, given this rank's own error: another rank may be the reason.

        Losing the connection to a rank is never the reason: it waits for the verdict.
        """
        if self._thread is None:
            return ""
        mine = f"rank {self._rank} failed ({self._doing}): {type(error).__name__}: {error}"
        if _is_lost_connection(error):
            self._alarm = True
            self._decided.wait(self._timeout)
        told = self._say(mine)
        return "" if told == mine else told

    def close(self) -> None:
        """This rank has ended well: the others do not wait for it."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            with suppress(RuntimeError):  # node 0 may have left already
                self._pulse(_LEFT)

    def _run(self) -> None:
        seen: dict[int, _Seen] = {}
        pulse = 0
        while not self._over.wait(self._every):
            pulse += 1
            try:
                self._pulse(pulse)
                if self._store.check([_VERDICT]):
                    self._end(self._store.get(_VERDICT).decode())
                    return
                self._look(seen)
                found = self._judge(seen)
            except RuntimeError:
                # Without the store there is no node 0.
                self._end("the connection to node 0 is lost: its launcher has ended")
                return
            if found is not None:
                self._say(found)

    def _pulse(self, number: int) -> None:
        told = [number, self._moves, self._doing, self._in_steps]
        self._store.set(f"watch/{self._rank}", json.dumps(told))

    def _look(self, seen: dict[int, _Seen]) -> None:
        now = time.monotonic()
        keys = [f"watch/{rank}" for rank in range(self._size)]
        for rank, told in enumerate(self._store.multi_get(keys)):
            pulse, moves, doing, in_steps = json.loads(told)
            last = seen.get(rank)
            # What precedes the first step is judged by silence, and by a longer time.
            patience = 0.0 if in_steps else self._timeout * (_FIRST_STEP - 1)
            seen[rank] = _Seen(
                pulse,
                moves,
                doing,
                last.pulse_at if last and last.pulse == pulse else now,
                last.moved_at if last and last.moves == moves else now + patience,
            )

    def _judge(self, seen: dict[int, _Seen]) -> str | None:
        now = time.monotonic()
        first = max(one.moves for one in seen.values())
        # A broken connection says that somebody has died: a short silence then says who.
        patience = 5 * self._every if self._alarm else self._timeout
        for rank, one in sorted(seen.items()):
            silent, still = now - one.pulse_at, now - one.moved_at
            if one.pulse == _LEFT:
                continue
            if silent > patience:
                return f"rank {rank} is dead: silent for {silent:.0f} s, last {one.doing}"
            if one.moves < first and still > self._timeout:
                return f"rank {rank} is stuck: {still:.0f} s {one.doing}; others have gone on"
        return None

    def _say(self, verdict: str) -> str:
        """Give a verdict; the first one counts, and is returned."""
        return str(self._store.compare_set(_VERDICT, "", verdict).decode())

    def _end(self, verdict: str) -> None:
        self._decided.set()
        if self._over.wait(_LEAVE_SECONDS):
            return
        self._lost(verdict)
        os._exit(1)


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective ended because a peer did."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "connection" in text or "gloo" in text


# Reached by gradients only where a step shows a picture.
_SEEING = ("encoder.", "projector.")


class StartChecks:
    """The checks of one start of a stage; every rank makes them at the same points."""

    def __init__(self, model: VLM, place: Place, origin: Mapping[str, str]) -> None:
        self._model, self._place = model, place
        self._alike({"code": code_digest(), "torch": torch.__version__, **origin})
        named = list(model.named_parameters())
        self._pending = {name for name, value in named if value.requires_grad}
        self._frozen = ""

    def begin(
        self,
        folder: Path,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        rate: float,
        machine: Machine,
    ) -> None:
        """Before the first step: the rate is the formula's; writes the line of this start.

        Raises ValueError with both rates.
        """
        if progress.rate != rate:
            raise ValueError(
                f"{folder}: the checkpoint goes on at a rate of {progress.rate}, the schedule says "
                f"{rate} at {progress.tokens_seen:,} tokens; it is another schedule's checkpoint"
            )
        self._frozen = self._frozen_digest()
        digests = checkpoint.digests(self._model, optimizer, place=self._place)
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
                    "precision": str(self._place.precision).removeprefix("torch."),
                    "threads": machine.threads,
                    "compiled": self._place.compile_blocks,
                    "code": code_digest(),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                }
            )

    def after_step(self, result: StepResult) -> None:
        """After each step until all is seen to: trained matrices had a gradient other than zero,
        and other trained parameters one at all.

        Those that look at pictures are judged by the first step that shows one. Raises ValueError
        with the names.
        """
        if not self._pending:
            return
        judged = {n for n in self._pending if result.num_images or not n.startswith(_SEEING)}
        parameters = {n: value for n, value in self._model.named_parameters() if n in judged}
        mine = [float(_reached(value)) for value in parameters.values()]
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


def _reached(parameter: Tensor) -> bool:
    """Whether a gradient other than zero arrived; for vectors, whose gradient may vanish (a bias
    that softmax cancels), any."""
    gradient = parameter.grad
    if gradient is None:
        return False
    return gradient.ndim < 2 or bool(local(gradient).count_nonzero())
