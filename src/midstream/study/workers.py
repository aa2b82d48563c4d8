"""A worker: a long-lived process that runs one stage after the other.

What it works for (the "store", the "machine") stands in `worker-N.json`. The launcher writes a line
of JSON to a worker's standard input: the "stage", and whether a frozen encoder's outputs are kept
on disk ("features": stored | live | auto). The worker answers on standard output with JSON lines:
{"event": "ready"}, then for each stage "started", "progress" (stage, done, tokens_seen,
total_tokens, loss, tokens_per_second, note) and "finished" (stage, state: done | failed | stopped,
error). The end of its input ends a worker. What it prints on standard error, and any line that is
no event, goes to `worker-N.log` in the store.

Where a training stage has several ranks, its worker is torchrun with as many processes, for this
one stage, which stands in `worker-N.json` too. The first rank speaks as above; every rank says
{"event": "rank", "rank", "pid"} at its start, and {"event": "fault", "error"} if one was lost.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from midstream.config import Machine
from midstream.storage import write_json
from midstream.study.graph import PlanRow
from midstream.study.progress import LOG
from midstream.study.stage import Stage

Event = dict[str, Any]
# How long an idle worker has to leave after the end of its input.
LEAVE_SECONDS = 20.0
# How long the ranks of a node that was told to end may take for their step and its checkpoint.
SHUTDOWN_SECONDS = 600
# In a worker's environment: the process that started it, without which it does not go on.
LAUNCHER = "MIDSTREAM_LAUNCHER"


class Worker:
    """A worker process; `row` is the stage it runs, or will run once it is ready.

    It works for what the file `work` says (`write_work`), and is the ranks of one stage where it
    `is_group`. Its events, and at its end {"event": "exit", "code"}, go to `put` from a thread of
    its own.
    """

    def __init__(
        self,
        number: int,
        work: Path,
        log: Path,
        machine: Machine,
        put: Callable[[tuple["Worker", Event]], None],
        is_group: bool,
        command: Sequence[str] | None = None,
    ) -> None:
        self.number, self.work, self.log, self.is_group = number, work, log, is_group
        self.pids: dict[int, int] = {}
        self.fault: str | None = None
        self.row: PlanRow | None = None
        self.ready = False
        own = group_command(machine, work) if is_group else worker_command(work)
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                list(command or own),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=worker_environment(machine) | {LOG: str(self.log.absolute())},
                # Ctrl-C goes to the launcher alone, which asks the workers to stop.
                start_new_session=True,
            )
        assert self.process.stdin is not None
        self._input = self.process.stdin
        self._put = put
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, features: str = "auto") -> None:
        """Hand over the stage of `row`; a group has it already."""
        assert self.row is not None
        if self.is_group:
            return
        # A worker that has died cannot read: its exit event follows and settles the stage.
        with suppress(BrokenPipeError):
            self._input.write(work_line(self.row.stage, features).encode())
            self._input.flush()

    def close(self) -> None:
        """Tell it that no stage follows."""
        with suppress(BrokenPipeError):
            self._input.close()

    def signal(self, number: int) -> None:
        """Send it a signal if it still lives; SIGKILL to every rank, others to the first.

        The first rank tells the others at the next step. torchrun would pass a signal on as well,
        but ends ranks that take their time.
        """
        if self.process.poll() is not None:
            return
        if number == signal.SIGKILL or not self.pids:
            self.process.send_signal(number)
        to = self.pids.values() if number == signal.SIGKILL else list(self.pids.values())[:1]
        for pid in to:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def note(self, event: Event) -> bool:
        """Keep what a rank says of itself; whether it was that."""
        if event["event"] == "rank":
            self.pids[event["rank"]] = event["pid"]
            self.pids = dict(sorted(self.pids.items()))
        elif event["event"] == "fault":
            self.fault = self.fault or event["error"]
        return event["event"] in ("rank", "fault")

    def leave(self) -> None:
        """Wait until it has left; one that does not is killed after LEAVE_SECONDS."""
        try:
            self.process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                if not self.note(event):
                    self._put((self, event))
            else:
                with self.log.open("ab") as log:
                    log.write(line)
        self._put((self, {"event": "exit", "code": self.process.wait()}))


def work_line(stage: Stage, features: str = "auto") -> str:
    """What a worker is given to do, as it reads it."""
    return json.dumps({"stage": stage.model_dump(mode="json"), "features": features}) + "\n"


def write_work(path: Path, store: Path, machine: Machine, line: str | None = None) -> Path:
    """Write what a worker works for, and with `line` the one stage of its ranks."""
    given = {} if line is None else json.loads(line)
    place = machine if line is not None else machine.alone()
    whole = {"store": str(store.absolute()), "machine": place.model_dump(mode="json"), **given}
    write_json(path, whole)
    return path


def worker_command(work: Path) -> list[str]:
    """The command of a worker. It takes a file: torchrun takes options for its own."""
    return [sys.executable, "-m", "midstream.worker", str(work)]


def group_command(machine: Machine, work: Path) -> list[str]:
    """The command of the ranks of one stage on this node."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(machine.ranks), "--max-restarts", "0"]
    # By default torchrun dies of SIGUSR1 and leaves its ranks behind, and kills them after 30 s.
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    command += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    if machine.nodes == 1:
        command += ["--standalone"]
    else:
        assert machine.master is not None, "several nodes know it"
        host, _, port = machine.master.rpartition(":")
        command += ["--nnodes", str(machine.nodes), "--node-rank", str(machine.node)]
        command += ["--master-addr", host, "--master-port", port]
    return [*command, *worker_command(work)[1:]]


def worker_environment(machine: Machine) -> dict[str, str]:
    """This process's environment with the workers' thread counts, and no downloads unless
    HF_HUB_OFFLINE=0 asks for them."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(threads, str(machine.threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONUNBUFFERED": "1",
        LAUNCHER: str(os.getpid()),
    }
