"""Processes that load rows end with who waits for them, and speak as their errors do."""

import subprocess
import sys

import pytest
from torch.utils.data._utils.worker import ExceptionWrapper

from midstream.core.storage import CorruptError
from midstream.data.row_processes import plain_errors

# What cannot be pickled cannot be sent; then the process would wait for ever.
SENDS = """
import os, time
from multiprocessing import Queue
from midstream.data.row_processes import watch_over
watch_over(os.getpid())
Queue().put(lambda: 0)
time.sleep(60)
"""
OUTLIVES = """
import sys, time
from midstream.data.row_processes import watch_over
watch_over(int(sys.argv[1]))
time.sleep(60)
"""


def ends(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_a_process_that_cannot_send_its_rows_ends() -> None:
    ended = ends(SENDS)
    assert ended.returncode == 1
    assert "rows could not be sent to the training process: Can't pickle" in ended.stderr


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_a_process_whose_training_process_is_gone_ends(is_waited_for: bool) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    if is_waited_for:
        gone.wait()
    assert ends(OUTLIVES, str(gone.pid)).returncode == 1
    gone.wait()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("record 7 of pics: no such picture\nsay so"),
        CorruptError("shard 3 differs: delete it"),
        FileNotFoundError("a.jpg is gone"),
    ],
)
def test_errors_are_those_of_a_run_without_processes(error: Exception) -> None:
    def load() -> None:
        try:
            raise error
        except Exception:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    with pytest.raises(type(error)) as told, plain_errors(2):
        load()
    assert str(told.value) == str(error)
    with pytest.raises(type(error)) as plain, plain_errors(0):
        raise error
    assert plain.value is error


def test_one_that_was_killed_is_told_with_what_helps() -> None:
    said = "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible"
    remedies = r"pid 12.* MiB are free.*--shm-size.*--data-workers 0"
    with pytest.raises(RuntimeError, match=remedies), plain_errors(2):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match=r"^something else$"), plain_errors(2):
        raise RuntimeError("something else")
