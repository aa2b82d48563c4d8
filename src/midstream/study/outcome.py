"""How a run ends, whoever ran it: what became of the stages, the exit code, what is said."""

import signal
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from midstream.quantities import counted
from midstream.study.graph import Plan, PlanRow, missing_inputs
from midstream.study.label import label
from midstream.study.lacking import what_can_run
from midstream.study.ledger import Ledger
from midstream.study.problem import Problem
from midstream.study.studies import AnyStudy

# What a process ends with that was asked to stop and can be continued (EX_TEMPFAIL).
STOPPED_EXIT_CODE = 75
# What a process ends with that refused to start, as for any error of who uses it.
REFUSED_EXIT_CODE = 2
# Signals that ask for it.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Of many stages that a sentence is about, so many are named.
MAX_NAMED = 12


@dataclass(frozen=True)
class Outcome:
    """What a run did: stages done before it and in it, failed, stopped; skipped never started.

    `num_failed` counts those that failed before and were not tried again; `num_queued` those whose
    jobs were left to a cluster's queue. `refused`: what kept all stages from starting, or those
    behind the preparation of the data.
    """

    num_before: int
    num_done: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_stopped: int = 0
    num_queued: int = 0
    interrupted: bool = False
    messages: tuple[str, ...] = ()
    refused: tuple[Problem, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if all stages are done or queued, 75 if the run was stopped, 2 if it was refused, 1 if
        a stage failed."""
        if self.num_stopped or (self.interrupted and (self.num_skipped or self.num_queued)):
            return STOPPED_EXIT_CODE
        if self.refused:
            return REFUSED_EXIT_CODE
        return 1 if self.num_failed or self.num_skipped else 0


def require_inputs(study: AnyStudy) -> None:
    """Raises ValueError for a study that was planned without its data or checkpoints."""
    if missing := missing_inputs(study):
        can = what_can_run(study)
        raise ValueError(
            f"{study.name} was planned without {', '.join(missing)}; name their folders in the "
            f"recipe's arguments (--set){'' if can is None else f'; {can}'}"
        )


def failed_before(work: Plan, ledger: Ledger) -> dict[str, str]:
    """By stage name, what is said of the stages that failed before and are not tried again."""
    told = {}
    for row in work.rows:
        if row.state == "failed":
            error, name = one_line(ledger.status(row.stage).get("error")), row.stage.name
            told[name] = f"{work.labels[name]} failed before: {error}; to run it again, add --retry"
    return told


def failure(who: str, error: str | None, log: object) -> str:
    """What is said of a stage that failed in this run."""
    return f"{who} failed: {one_line(error)} (see {log}); to run it again, add --retry"


def not_started(waiting: Mapping[str, PlanRow], name: str, labels: Mapping[str, str]) -> str | None:
    """What is said of the waiting stages that need `name`; None if there are none."""
    lost = [labels[other] for other, row in waiting.items() if descends(row, name, waiting)]
    if not lost:
        return None
    count, were = counted(len(lost), "stage"), "was" if len(lost) == 1 else "were"
    return f"{count} behind {labels[name]} {were} not started: {named(lost)}"


def descends(row: PlanRow, ancestor: str, waiting: Mapping[str, PlanRow]) -> bool:
    """Whether a waiting stage needs `ancestor`, itself or through other waiting stages."""
    return any(
        parent.name == ancestor
        or (parent.name in waiting and descends(waiting[parent.name], ancestor, waiting))
        for parent in row.stage.parents
    )


def named(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are; names have commas of their own."""
    more = len(names) - MAX_NAMED
    return "; ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def one_line(error: str | None) -> str:
    """A text of several lines as one."""
    return "; ".join(line.strip() for line in (error or "no reason was kept").splitlines())


@contextmanager
def stop_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` for the signals that stop, while the block runs; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        note(number)

    before = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_not_running(
    rows: Sequence[PlanRow], ledger: Ledger, known: Container[str] = ()
) -> None:
    """Raises ValueError if a stage, but a `known` one, still runs under an earlier launcher."""
    for row in rows:
        if row.state == "running" and row.stage.name not in known:
            status = ledger.status(row.stage)
            raise ValueError(
                f"{label(row.stage)} is still being run by process {status.get('pid')} on "
                f"{status.get('host')}, which an earlier launcher left "
                f"({ledger.folder(row.stage)}); wait until it ends, or stop it"
            )
