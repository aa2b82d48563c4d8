"""What the steps of a stage gave, written down one step later."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from midstream.core.batch import Batch
from midstream.train.checkpoint import Progress
from midstream.train.metrics import MetricsLog, progress_event
from midstream.train.step import Clock, NonFiniteError, StepResult, Taken

Report = Callable[[dict[str, Any]], None]


class Record:
    """Writes down what steps gave. A step is held until the next one is on its way, or until
    somebody must know, so that no GPU waits for its host.

    A step takes the seconds since the one before has ended, those of `pause` left out. `rows` are
    those of a step and of the plan.
    """

    def __init__(
        self,
        log: MetricsLog,
        clock: Clock,
        report: Report,
        progress: Progress,
        *,
        rows: tuple[int, int],
    ) -> None:
        self._log, self._clock, self._report = log, clock, report
        self._progress, self._rows = progress, rows
        self._held: tuple[Taken, float | None] | None = None
        self._seconds, self._before, self._shown = progress.seconds, time.monotonic(), 0.0
        self._paused, self.has_begun = 0.0, False

    def next_rows(self, steps: Iterator[list[Batch]]) -> list[Batch] | None:
        """The micro-batches of the next step; None behind the last one."""
        try:
            with self._clock.part("data", on_device=True):
                return next(steps, None)
        except Exception:
            self.write()
            raise

    def hold(self, progress: Progress, taken: Taken, rate: float | None) -> None:
        """A step that was taken at `rate`, and the counts of all up to it."""
        assert self._held is None, "the step before is to be written first"
        self._progress, self._held, self.has_begun = progress, (taken, rate), True

    def read(self) -> StepResult:
        """What the held step gave; raises NonFiniteError with its rows."""
        assert self._held is not None, "no step is held"
        try:
            return self._held[0].read()
        except NonFiniteError as error:
            (size, num_rows), step = self._rows, self._progress.step - 1
            high = min((step + 1) * size, num_rows) - 1
            raise NonFiniteError(
                f"step {step}, rows {step * size} to {high}: {error}; "
                "the weights are those before the step. Lower the rate or look at these rows"
            ) from None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs in the block belongs to no step."""
        before = time.monotonic()
        yield
        self._paused += time.monotonic() - before

    def write(self, held_out: Mapping[str, Any] | None = None) -> Progress:
        """The line of the held step, and the progress with it; the last one where none is held."""
        if self._held is None:
            return self._progress
        result, (taken, rate) = self.read(), self._held
        seconds, self._before = taken.ended - self._before, taken.ended + self._paused
        self._seconds, self._paused, self._held = self._seconds + seconds, 0.0, None
        reached = self._progress
        line = {
            "step": reached.step,
            "tokens_seen": reached.tokens_seen,
            "loss": result.loss,
            "rate": rate,
            "grad_norm": result.grad_norm,
            "num_targets": result.num_targets,
            "seconds": round(seconds, 6),
        }
        self._log.write(**line, **({"held_out": held_out} if held_out else {}))
        self._progress = replace(
            reached,
            loss=result.loss,
            seconds=self._seconds,
            parts=self._clock.read(),
            metrics_bytes=self._log.position,
        )
        if time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            told = reached.total_tokens, result.loss, self._seconds
            self._report(progress_event(reached.tokens_seen, *told))
        return self._progress
