"""A worker: a long-lived process that runs one stage after the other.

The launcher writes a line of JSON to a worker's standard input: the "stage", and whether a frozen
encoder's outputs are kept on disk ("features": stored | live | auto). The worker answers on
standard output with JSON lines: {"event": "ready"}, then for each stage "started",
"progress" (stage, done, tokens_seen, total_tokens, loss, tokens_per_second, note) and "finished"
(stage, state: done | failed | stopped, error). The end of its input ends a worker. What it prints
on standard error, and any line that is no event, goes to `worker-N.log` in the store.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from midstream.config import Machine
from midstream.study.graph import PlanRow
from midstream.study.stage import Stage

Event = dict[str, Any]
# How long an idle worker has to leave after the end of its input.
LEAVE_SECONDS = 20.0


class Worker:
    """A worker process; `row` is the stage it runs, or will run once it is ready.

    Its events, and at its end {"event": "exit", "code"}, go to `put` from a thread of its own.
    """

    def __init__(
        self,
        number: int,
        store: Path,
        machine: Machine,
        command: Sequence[str] | None,
        put: Callable[[tuple["Worker", Event]], None],
    ) -> None:
        self.number = number
        self.row: PlanRow | None = None
        self.ready = False
        self.log = store / f"worker-{number}.log"
        own = [sys.executable, "-m", "midstream.run_stage", "--store", str(store)]
        own += ["--machine", machine.model_dump_json()]
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                list(command or own),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=worker_environment(machine),
                # Ctrl-C goes to the launcher alone, which asks the workers to stop.
                start_new_session=True,
            )
        assert self.process.stdin is not None
        self._input = self.process.stdin
        self._put = put
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, features: str = "auto") -> None:
        """Hand over the stage of `row`."""
        assert self.row is not None
        # A worker that has died cannot read: its exit event follows and settles the stage.
        with suppress(BrokenPipeError):
            self._input.write(work_line(self.row.stage, features).encode())
            self._input.flush()

    def close(self) -> None:
        """Tell it that no stage follows."""
        with suppress(BrokenPipeError):
            self._input.close()

    def signal(self, number: int) -> None:
        """Send it a signal if it still lives."""
        if self.process.poll() is None:
            self.process.send_signal(number)

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
                self._put((self, event))
            else:
                with self.log.open("ab") as log:
                    log.write(line)
        self._put((self, {"event": "exit", "code": self.process.wait()}))


def work_line(stage: Stage, features: str = "auto") -> str:
    """What a worker is given to do, as it reads it."""
    return json.dumps({"stage": stage.model_dump(mode="json"), "features": features}) + "\n"


def worker_environment(machine: Machine) -> dict[str, str]:
    """This process's environment with the workers' thread counts and no downloads."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(threads, str(machine.threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
