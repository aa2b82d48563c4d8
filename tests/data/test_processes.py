"""Processes that load rows end with who waits for them, and speak as their errors do."""

import os
import signal
import subprocess
import sys

import pytest
from torch.utils.data._utils.worker import ExceptionWrapper

from midstream.core.storage import CorruptError
from midstream.data.processes import plain_errors

# A training process, and one that loads its rows.
TRAINS = """
import multiprocessing, sys, time
from midstream.data.processes import watch_over

def load():
    watch_over(0)
    {}
    print("loads", flush=True)
    time.sleep(60)

process = multiprocessing.get_context("fork").Process(target=load)
process.start()
process.join()
sys.exit(process.exitcode)
"""


def trains(more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", TRAINS.format(more)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def test_a_process_that_cannot_send_its_rows_ends() -> None:
    # What cannot be pickled cannot be sent; then the process would wait for ever.
    training = trains("multiprocessing.Queue().put(lambda: 0)")
    _, told = training.communicate(timeout=50)
    assert training.returncode == 1
    assert "rows could not be sent to the training process: Can't pickle" in told


def test_a_process_ends_with_its_training_process_that_nobody_has_waited_for() -> None:
    training = trains("")
    assert training.stdout is not None
    assert training.stdout.readline() == "loads\n"
    os.kill(training.pid, signal.SIGKILL)
    # Whoever loads rows has these pipes too.
    assert training.communicate(timeout=50)[0] == ""


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
