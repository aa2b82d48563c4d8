"""Several machines train one stage: node 0 launches, the others join it through the store.

The store lies on a disk that all nodes see. Node 0 says there, in `nodes.json`, which stage's ranks
are to be started, and rewrites the file as a sign of life; the other nodes start their share of
them. What the ranks then say to each other goes over the network.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from midstream.config import Machine
from midstream.storage import read_json, write_bytes, write_json
from midstream.study.label import label
from midstream.study.stage import stage_from_json
from midstream.study.workers import group_command, worker_environment

# Node 0 gives a sign this often, and is taken for gone after so long without one.
SIGN_SECONDS = 5.0
GONE_SECONDS = 60.0
# How long a node waits for node 0 to come.
COME_SECONDS = 1800.0
_LOOK_SECONDS = 1.0


class Announcer:
    """What node 0 says to the others; `tell` and `end` change it, a thread keeps it fresh."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said: dict[str, Any] = {
            "launch": uuid4().hex,
            "number": 0,
            "work": None,
            "code": None,
        }
        self._lock, self._over = threading.Lock(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, work: Path) -> None:
        """Every node starts its ranks of this work."""
        self._said |= {"number": self._said["number"] + 1, "work": str(work.absolute())}
        self._write()

    def end(self, code: int) -> None:
        """Every node leaves with this exit code."""
        self._said |= {"code": code}
        self._write()

    def close(self) -> None:
        """No more signs of life."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SIGN_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            write_json(self._path, self._said)


@contextmanager
def announcer(store: Path, machine: Machine) -> Iterator[Announcer | None]:
    """Node 0's; None for one node. An error on node 0 ends the others with exit code 1."""
    if machine.nodes == 1:
        yield None
        return
    said = Announcer(store / "nodes.json")
    try:
        yield said
    except BaseException:
        said.end(1)
        raise
    finally:
        said.close()


def join(store: Path, machine: Machine, on_note: Callable[[str], None]) -> int:
    """Start this node's ranks whenever node 0 says so; returns node 0's exit code.

    SIGTERM, SIGINT and SIGUSR1 go to the ranks, which stop all others at the next step. Raises
    TimeoutError where node 0 does not come, or has gone without a word.
    """
    path, mine = store / "nodes.json", store / f".node-{machine.node}"
    ranks: subprocess.Popen[bytes] | None = None
    done: tuple[str, int] | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        if ranks is not None and ranks.poll() is None:
            ranks.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    on_note(f"node {machine.node} of {machine.nodes} waits for node 0 in {path}")
    try:
        for said in _signs(path, mine):
            task = (said["launch"], said["number"])
            if said["code"] is not None:
                return int(said["code"])
            if said["work"] is None or task == done:
                continue
            if ranks is not None:
                ranks.wait()
            done, work = task, Path(said["work"])
            stage = stage_from_json(json.dumps(read_json(work)["stage"]))
            on_note(f"node {machine.node} trains {label(stage)}")
            ranks = _start(store, machine, work)
    finally:
        if ranks is not None:
            _end(ranks)
        mine.unlink(missing_ok=True)
    raise AssertionError("signs end with an error")


def _start(store: Path, machine: Machine, work: Path) -> "subprocess.Popen[bytes]":
    with (store / f"node-{machine.node}.log").open("ab") as log:
        return subprocess.Popen(
            group_command(machine, work),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=worker_environment(machine),
            start_new_session=True,
        )


def _end(ranks: "subprocess.Popen[bytes]") -> None:
    """They end by themselves once node 0's have; else they are killed."""
    with suppress(subprocess.TimeoutExpired):
        ranks.wait(GONE_SECONDS)
    if ranks.poll() is None:
        ranks.kill()
        ranks.wait()


def _signs(path: Path, mine: Path) -> Iterator[dict[str, Any]]:
    """What node 0 says, again and again, while it gives signs of life."""
    fresh_at: float | None = None
    since = time.monotonic()
    while True:
        time.sleep(_LOOK_SECONDS)
        with suppress(FileNotFoundError, json.JSONDecodeError):
            said = read_json(path)
            # Both times are those of the disk's clock.
            write_bytes(mine, b"")
            if os.stat(mine).st_mtime - os.stat(path).st_mtime < GONE_SECONDS / 2:
                fresh_at = time.monotonic()
                yield said
                continue
        now = time.monotonic()
        if fresh_at is None and now - since > COME_SECONDS:
            raise TimeoutError(f"node 0 has not come in {COME_SECONDS:.0f} s; it writes {path}")
        if fresh_at is not None and now - fresh_at > GONE_SECONDS:
            raise TimeoutError(
                f"node 0 has gone: {path} has not changed for {now - fresh_at:.0f} s"
            )
