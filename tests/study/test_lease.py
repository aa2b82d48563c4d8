"""A heartbeat keeps others out where a lock does not: another host's, or one without flock."""

import contextlib
import errno
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
from midstream.study import lease as progress
from midstream.study.lease import (
    STALE_SECONDS,
    ProgressFile,
    heartbeat_of,
    is_held,
    lease,
    metrics_tail,
    read_sign,
)

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


def test_one_from_a_clock_that_was_ahead_is_stale_unless_it_is_touched_by_the_clock_of_now(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(lock, -10 * STALE_SECONDS)
    assert is_held(lock)
    with monkeypatch.context() as patched:
        # Another process lives, and beats meanwhile.
        patched.setattr(time, "sleep", lambda _: os.utime(heartbeat_of(lock)))
        with pytest.raises(ValueError, match="node-7"), lease(lock, refusal):
            pytest.fail("the block must not run")
    forge(lock, -10 * STALE_SECONDS)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with lease(lock, refusal):
        pass


def test_a_full_disk_leaves_no_heartbeat_of_nobody(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(json, "dump", full)
        told = r"no room to write .*heartbeat .*make room"
        with pytest.raises(OSError, match=told), lease(lock, refusal):
            pytest.fail("the block must not run")
    with lease(lock, refusal):  # as soon as there is room
        pass


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


EVENT: dict[str, Any] = {
    "done": 0.25,
    "tokens_seen": 100,
    "total_tokens": 400,
    "loss": 2.5,
    "tokens_per_second": 50.0,
    "note": "encoding",
}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "NOTE_SECONDS", 0.0)


def lines(folder: Path, *values: dict[str, Any]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in values)
    (folder / "metrics.jsonl").write_text(text)


def test_a_short_stage_leaves_no_note(tmp_path: Path) -> None:
    ProgressFile(tmp_path).note(EVENT)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("at_once")
def test_a_note_says_how_far_a_stage_is_and_from_its_start_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(["2026-01-01T00:00:00+00:00"] * 2 + ["2026-01-01T00:00:30+00:00"])
    monkeypatch.setattr(progress, "now", lambda: next(moments))
    file = ProgressFile(tmp_path)
    file.note(EVENT)
    first = read_sign(tmp_path, None)
    assert (first.done, first.loss, first.note) == (0.25, 2.5, "encoding")
    assert first.seconds_left is None
    file.note({**EVENT, "done": 0.5, "note": "more"})
    later = read_sign(tmp_path, None)
    # A quarter in half a minute, two quarters are left.
    assert (later.done, later.note, later.seconds_left) == (0.5, "more", 60.0)
    assert later.seen == "2026-01-01T00:00:30+00:00"
    file.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("at_once")
def test_a_note_of_an_earlier_start_is_gone_at_the_next(tmp_path: Path) -> None:
    ProgressFile(tmp_path).note(EVENT)
    assert read_sign(tmp_path, None).done == 0.25
    ProgressFile(tmp_path)
    assert read_sign(tmp_path, None).done is None


@pytest.mark.usefixtures("at_once")
def test_a_note_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(progress, "write_json", full)
    file = ProgressFile(tmp_path)
    file.note(EVENT)
    file.note(EVENT)
    assert capsys.readouterr().err.count("disk full; the stage goes on") == 1


def test_steps_say_more_than_notes_and_give_the_speed_of_the_last_of_them(tmp_path: Path) -> None:
    steps = [
        {"step": k, "tokens_seen": 100 * k, "loss": 4.0 - k, "seconds": 99.0 if k == 1 else 2.0}
        for k in (1, 2, 3)
    ]
    lines(tmp_path, *steps)
    found = read_sign(tmp_path, 1000)
    # The first step's seconds lie before its tokens: 200 tokens in the 4 seconds behind it.
    assert (found.done, found.loss, found.tokens_per_second) == (0.3, 1.0, 50.0)
    assert found.seconds_left == 700 / 50
    (tmp_path / "progress.json").write_text(json.dumps({**EVENT, "total_tokens": 600}))
    assert read_sign(tmp_path, 1000).done == 0.5


def test_steps_without_a_total_say_how_fast_but_not_how_far(tmp_path: Path) -> None:
    lines(tmp_path, {"step": 1, "tokens_seen": 100, "loss": 1.0, "seconds": 1.0})
    assert read_sign(tmp_path, None).done is None


def test_the_tail_of_long_metrics_is_whole_lines_and_leaves_out_an_open_one(tmp_path: Path) -> None:
    lines(tmp_path, *({"step": k, "filler": "x" * 100} for k in range(2000)))
    path = tmp_path / "metrics.jsonl"
    assert path.stat().st_size > progress._TAIL_BYTES
    with path.open("a") as stream:
        stream.write('{"step": 2000, "fil')
    assert [line["step"] for line in metrics_tail(tmp_path, 3)] == [1997, 1998, 1999]
    assert len(metrics_tail(tmp_path, 10**6)) > 400


def test_a_stage_marks_where_it_begins_in_the_log_of_its_process(tmp_path: Path) -> None:
    log = tmp_path / "worker-1.log"
    log.write_text("before\n")
    program = (
        "from pathlib import Path; from midstream.study.lease import log_here; import json;"
        f"print(json.dumps(log_here(Path({str(tmp_path)!r}), 'prepare-1')))"
    )
    with log.open("ab") as stream:
        told = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, progress.LOG: str(log)},
            stdout=subprocess.PIPE,
            stderr=stream,
            check=True,
        ).stdout
    assert json.loads(told) == {"log": "worker-1.log", "log_start": len("before\n")}
    assert log.read_text().startswith("before\n--- prepare-1 starts, ")


def test_a_log_outside_the_store_keeps_its_whole_path_and_none_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere.out"
    monkeypatch.setenv(progress.LOG, str(other))
    assert progress.log_here(tmp_path / "store", "prepare-1") == {"log": str(other), "log_start": 0}
    monkeypatch.delenv(progress.LOG)
    assert progress.log_here(tmp_path, "prepare-1")["log"] is None
