"""A Python that has imported torch already, for the processes that commands start.

The program that `executable` writes stands in for `sys.executable`. What it is called with for
Midstream's own work is done in a fork of `serve`, with its environment, folder, streams and
signals, and it ends as that ends. Any other call is the real Python's.
"""

import array
import atexit
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from importlib import import_module
from multiprocessing.process import _children  # type: ignore[attr-defined]
from pathlib import Path

from lives import server

# What is done here; all else, and all that these say of how Python starts, is a fresh Python's.
MODULES = ("midstream.work", "midstream.work.worker")
FRESH = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_HOME")
IMPORTED = (
    "midstream.exchange.export",
    "midstream.exchange.import_model",
    "midstream.work.evaluate_model",
    "midstream.work.read_data",
    "midstream.work.worker",
)
PATIENCE_SECONDS = 2.0

PROGRAM = """#!{python} -SE
import array, json, os, signal, socket, sys

words, real, fresh = sys.argv[1:], {python!r}, {fresh!r}
warm = (words[:1] == ["-m"] and words[1] in {modules!r}) or words[:1] == [{script!r}]
if not warm or [os.environ.get(name) for name in fresh] != {values!r}:
    os.execv(real, [real, *words])
# A signal that comes before it can be passed on waits.
stops = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
signal.pthread_sigmask(signal.SIG_BLOCK, stops)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
given = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
places = array.array("i", [0, 1, 2]).tobytes()
server.sendmsg([len(given).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, places)])
server.sendall(given)
pid = int.from_bytes(server.recv(8), "big")
for number in stops:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
for place in (0, 1, 2):
    os.close(place)
code = os.waitstatus_to_exitcode(int.from_bytes(server.recv(8), "big"))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def executable(folder: Path, script: Path) -> str:
    """The program, which has `script` run in a warm process too."""
    path, address = folder / "python", str(folder / "warm")
    values = [os.environ.get(name) for name in FRESH]
    how = {"modules": MODULES, "fresh": FRESH, "values": values, "script": str(script)}
    path.write_text(PROGRAM.format(python=sys.executable, address=address, **how))
    path.chmod(0o700)
    calls = socket.socket(socket.AF_UNIX)
    calls.bind(address)
    calls.listen(64)
    threading.Thread(target=_start, args=(calls,), daemon=True).start()
    return str(path)


def _start(calls: socket.socket) -> None:
    """Start the server once it is called."""
    select.select([calls], [], [])
    with calls:
        process = server().Process(target=serve, args=(calls, os.getpid()))
        process.start()
    # It is no child that a test counts, ends or waits for.
    _children.discard(process)


def serve(calls: socket.socket, tests: int) -> None:
    """Fork for each call, until the process of the tests is gone."""
    for module in IMPORTED:
        import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # What is killed in a test is a process, not the machine.
    os.fsync = lambda descriptor: None
    calls.settimeout(PATIENCE_SECONDS)
    with calls:
        while True:
            try:
                call, _ = calls.accept()
            except TimeoutError:
                with suppress(ProcessLookupError):
                    os.kill(tests, 0)
                    continue
                return
            if os.fork() == 0:
                calls.close()
                os._exit(_keep(call))
            call.close()


def _keep(call: socket.socket) -> int:
    """Have a call done in one more process; who called is told how it ends, or ends it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, ancillary, _, _ = call.recvmsg(8, socket.CMSG_LEN(3 * array.array("i").itemsize))
    places = array.array("i", ancillary[0][2])
    given = b""
    while len(given) < int.from_bytes(size, "big"):
        given += call.recv(2**20)
    pid = os.fork()
    if pid == 0:
        call.close()
        os._exit(_run(places, *json.loads(given)))
    for place in places:
        os.close(place)
    with suppress(BrokenPipeError):
        call.sendall(pid.to_bytes(8, "big"))
    handle = os.pidfd_open(pid)
    ready, _, _ = select.select([handle, call], [], [])
    if handle not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):
        call.sendall(status.to_bytes(8, "big"))
    return 0


def _run(places: "array.array[int]", words: list[str], environment: dict[str, str], at: str) -> int:
    for number, place in enumerate(places):
        os.dup2(place, number)
        os.close(place)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(at)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, "r", closefd=False))  # type: ignore[arg-type]
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True)  # type: ignore[arg-type]
        for n in (1, 2)
    )
    sys.argv = words[1:] if words[0] == "-m" else words
    code: object = 0
    try:
        _main(words)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(BrokenPipeError):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    return code if isinstance(code, int) else 1


def _main(words: list[str]) -> None:
    from midstream.work import protocol, worker

    match words:
        case ["-m", "midstream.work.worker", *_]:
            worker.main()
        case ["-m", "midstream.work", *given]:
            sys.exit(protocol.main(given))
        case [script, *_]:
            runpy.run_path(script, run_name="__main__")
