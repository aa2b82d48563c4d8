"""Processes that read or load data for another: how they end, and what their errors say."""

import multiprocessing
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path

# Where batches lie that one process has made for another.
SHARED = Path("/dev/shm")
# An error of such a process as torch words it: its kind, a traceback, and its text.
_CAUGHT = re.compile(
    r"Caught (\w+) in DataLoader worker process \d+\.\n.*\n(?:[\w.]+\.)?\1: (.*)", re.DOTALL
)


def leave_with_parent() -> None:
    """End this process, in whatever it does, when the one that asked for it has ended.

    The queues between them stay open in their like: they would wait for ever for a killed parent.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def watch_over(_worker: int) -> None:
    """Have this loader of rows end where nobody would wait for them, or would wait for ever: with
    the training process, and where a batch cannot be sent, which is dropped by default, as where
    shared memory is full."""

    def lost(error: Exception, _batch: object) -> None:
        print(f"rows could not be sent to the training process: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    setattr(Queue, "_on_queue_feeder_error", staticmethod(lost))  # noqa: B010
    leave_with_parent()


@contextmanager
def plain_errors(workers: int) -> Iterator[None]:
    """Errors of so many processes that load rows, as they would be without these processes.

    Raises RuntimeError with the remedies where one of them has ended.
    """
    try:
        yield
    except Exception as error:
        if wrapped := _CAUGHT.match(str(error)):
            raise type(error)(wrapped[2].rstrip()) from error
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
        raise RuntimeError(
            f"a process that loads rows has ended ({str(error).splitlines()[0]}), as where shared "
            f"memory ({SHARED}, {free / 2**20:,.0f} MiB are free) or the machine's is full, or too "
            "few files may be open; give a container more of it (docker run --shm-size=8g), or "
            f"fewer such processes than {workers}: --data-workers 0 for none"
        ) from error
