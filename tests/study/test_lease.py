"""A heartbeat keeps others out where a lock does not: another host's, or one without flock."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from midstream.study import lease as module
from midstream.study.lease import STALE_SECONDS, heartbeat_of, is_held, lease

# Takes the lease without a lock, and then waits.
HOLD = """
import contextlib, sys
from pathlib import Path
from midstream.study import lease
lease._locked = lambda lock, refusal: contextlib.nullcontext()
with lease.lease(Path(sys.argv[1]), str):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk on which no node sees another's locks."""
    monkeypatch.setattr(module, "_locked", lambda lock, refusal: contextlib.nullcontext())
    monkeypatch.setattr(module, "_is_locked", lambda path: False)


def forge(lock: Path, age_seconds: float, **changed: Any) -> str:
    values = {"token": "t", "host": "node-7", "pid": 12, "born": "1", "since": "2026-01-01"}
    heartbeat_of(lock).write_text(json.dumps(values | changed))
    last = time.time() - age_seconds
    os.utime(heartbeat_of(lock), (last, last))
    return heartbeat_of(lock).read_text()


def refusal(who: str) -> str:
    return f"in use by {who}"


@pytest.fixture
def other(lock: Path) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_fresh_heartbeat_of_another_host_keeps_others_out(lock: Path) -> None:
    forged = forge(lock, 5)
    assert is_held(lock)
    with (
        pytest.raises(ValueError, match=r"process 12 on node-7 since 2026-01-01, .* 5 s old"),
        lease(lock, refusal),
    ):
        pytest.fail("the block must not run")
    assert heartbeat_of(lock).read_text() == forged
    assert {path.name for path in lock.parent.iterdir()} <= {"lock", "lock.heartbeat"}


def test_a_stale_one_is_taken_over_and_that_is_said(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(lock, STALE_SECONDS + 5)
    assert not is_held(lock)
    with lease(lock, refusal):
        mine = json.loads(heartbeat_of(lock).read_text())
        assert (mine["host"], mine["pid"]) == (socket.gethostname(), os.getpid())
    said = capsys.readouterr().err
    assert "process 12 on node-7 since 2026-01-01 has given no sign of life for 125 s" in said
    assert not heartbeat_of(lock).exists()


def test_ages_are_told_by_the_disk_and_not_by_this_hosts_clock(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(lock, 5)
    ahead = time.time() + 10 * STALE_SECONDS
    monkeypatch.setattr(time, "time", lambda: ahead)
    with pytest.raises(ValueError, match="node-7"), lease(lock, refusal):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("born", ["another", None])
def test_one_of_a_process_of_this_host_that_has_ended_is_taken_over_at_once(
    lock: Path, capsys: pytest.CaptureFixture[str], born: str | None
) -> None:
    # The number is in use again: by this very process.
    forge(lock, 1, host=socket.gethostname(), pid=os.getpid(), born=born)
    assert not is_held(lock)
    with lease(lock, refusal):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_locks")
def test_a_second_process_is_kept_out_without_locks_and_not_behind_a_killed_one(
    lock: Path, other: "subprocess.Popen[bytes]"
) -> None:
    assert is_held(lock)
    with pytest.raises(ValueError, match=f"process {other.pid} on "), lease(lock, refusal):
        pytest.fail("the block must not run")
    other.kill()
    # It may not have been waited for yet: a process that has ended, all the same.
    deadline = time.monotonic() + 20
    while is_held(lock):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with lease(lock, refusal):
        assert is_held(lock)


@pytest.mark.usefixtures("no_locks")
def test_a_process_that_lost_its_lease_ends_and_leaves_the_others_heartbeat(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(module, "_leave", told.append)
    with lease(lock, refusal):
        forged = forge(lock, 0)
        while not told:
            time.sleep(0.01)
    assert "process 12 on node-7 since 2026-01-01 has taken over" in told[0]
    assert heartbeat_of(lock).read_text() == forged


def test_a_heartbeat_is_touched_again_and_again(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    with lease(lock, refusal):
        os.utime(heartbeat_of(lock), (0, 0))
        while heartbeat_of(lock).stat().st_mtime == 0:
            time.sleep(0.01)
