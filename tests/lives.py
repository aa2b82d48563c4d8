"""A worker's lives: processes forked from a server that has imported all and computed nothing.

A life costs what its steps cost. A fault may end it, or fail it, at its k-th operation on files.
"""

import errno
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import tiny
from midstream.launch.workers import work_line
from midstream.study.stages import Stage
from midstream.study.store import Ledger

# What the server imports before it forks: all that a stage needs.
PRELOADED = ["midstream.work.worker", "transformers.models.siglip.modeling_siglip"]
DEADLINE_SECONDS = 60.0
# Audit events (docs.python.org, "Audit events table") that change files, with the path's place.
CHANGES = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0}


@dataclass(frozen=True)
class Fault:
    """At the k-th change of a file in the store: SIGKILL, or ENOSPC where a file is opened.

    `largest_bytes` is a limit on the size of files instead (RLIMIT_FSIZE).
    """

    kind: str
    at: int = 0
    largest_bytes: int = 0


def server() -> ForkServerContext:
    """The server that lives are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def born(
    processes: ForkServerContext, ledger: Ledger, stage: Stage, fault: Fault | None = None
) -> ForkServerProcess:
    """A life that runs one stage."""
    arguments = (str(ledger.store), work_line(stage), fault)
    process = processes.Process(target=live, args=arguments)
    process.start()
    return process


def live(store: str, line: str, fault: Fault | None) -> None:
    """What `python -m midstream.work.worker` does with one line of input."""
    from midstream.work.worker import serve

    # What is killed in a test is a process, not the machine.
    os.fsync = lambda descriptor: None
    if fault is not None and fault.kind == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_bytes, resource.RLIM_INFINITY))
    elif fault is not None:
        _arm(store, fault)
    sys.stdout = io.StringIO()
    serve(Path(store), tiny.MACHINE, [line])


def _arm(store: str, fault: Fault) -> None:
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            writes = "w" in str(mode or "") or bool(int(str(flags or 0)) & os.O_CREAT)
            counts = writes and fault.kind in ("kill", "full")
        else:
            counts = event in CHANGES and fault.kind == "kill"
            path = arguments[0] if counts else ""
        if not counts or not isinstance(path, str | Path) or not str(path).startswith(store):
            return
        count += 1
        if count == fault.at and fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == fault.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Until it holds, within a minute, while somebody lives."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert alive(), "the process ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.001)


def has_steps(ledger: Ledger, stage: Stage, number: int) -> Callable[[], bool]:
    """Whether step `number` has been taken since now: a resumed stage cuts its lines back."""
    path = ledger.folder(stage) / "metrics.jsonl"
    return lambda: path.is_file() and path.read_bytes().count(b"\n") >= number
