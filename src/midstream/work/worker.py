"""The process that runs stages: a worker of the launcher, or one rank of a stage.

`python -m midstream.work.worker WORK.json` (see `launch/workers.py`) takes one stage as a line of
JSON after the other and tells the launcher how they go; the imports are paid once. Under torchrun
it is one rank of the stage that stands in the file.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from midstream.config import Machine
from midstream.core.storage import read_json
from midstream.launch.workers import LAUNCHER
from midstream.study.stages import stage_from_json
from midstream.study.store import Ledger, Stopped
from midstream.work.run_stage import StageRunner

# How long a process whose launcher has gone may take to keep a checkpoint.
_ORPHAN_SECONDS = 10.0


def serve(store: Path, machine: Machine, lines: Iterable[str]) -> bool:
    """Run the stages that arrive as lines until they end; answer with events on stdout.

    SIGTERM, SIGINT and SIGUSR1 stop a training stage at its next step, and all its ranks with it.
    Returns whether no stage failed.
    """
    # The channel is ours alone: whatever a library prints goes to stderr, the worker's log.
    channel = sys.stdout
    sys.stdout = sys.stderr
    rank, ranked = int(os.environ.get("RANK", 0)), machine.world_size > 1
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    def say(event: str, **values: Any) -> None:
        nonlocal stopping
        try:
            channel.write(json.dumps({"event": event, **values}) + "\n")
            channel.flush()
        except BrokenPipeError:  # nobody listens: the launcher has gone
            stopping = True

    def tell(event: str, **values: Any) -> None:
        if rank == 0:
            say(event, **values)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, stop)
    if ranked:
        say("rank", rank=rank, pid=os.getpid())
    ledger = Ledger(store)
    current = ""
    try:
        runner = StageRunner(
            ledger,
            machine,
            report=lambda values: tell("progress", stage=current, **values),
            should_stop=lambda: stopping,
            lost=lambda reason: say("fault", error=reason),
        )
    except Exception as reason:
        say("fault", error=str(reason))
        raise
    tell("ready")
    good = True
    for line in lines:
        given = json.loads(line)
        stage, runner.features = stage_from_json(json.dumps(given["stage"])), given["features"]
        current = stage.name
        tell("started", stage=current)
        state, error = "done", None
        try:
            runner.run(stage)
        except Stopped as reason:
            state, error = "stopped", str(reason)
        except Exception as problem:
            traceback.print_exc()
            state, error, good = "failed", f"{type(problem).__name__}: {problem}", False
            if rank:  # the first rank may be the one that is lost
                say("fault", error=str(problem))
        tell("finished", stage=current, state=state, error=error)
    if good:
        runner.close()
    return good


def leave_with_the_launcher() -> None:
    """Stop, with a checkpoint where there is time, once the process that asked for work is gone."""
    parent, launcher = os.getppid(), int(os.environ.get(LAUNCHER, os.getppid()))

    def is_gone() -> bool:
        try:
            os.kill(launcher, 0)
        except ProcessLookupError:
            return True
        return os.getppid() != parent

    def look() -> None:
        while not is_gone():
            time.sleep(1.0)
        print("the launcher has gone; this process leaves", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main() -> None:
    """The worker process of `midstream.launch.workers`, or one rank."""
    work = read_json(Path(sys.argv[1]))
    leave_with_the_launcher()
    lines = [json.dumps(work)] if "stage" in work else sys.stdin
    good = serve(Path(work["store"]), Machine.model_validate(work["machine"]), lines)
    if not good and "stage" in work:
        # Waiting for ranks that are lost would take for ever.
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
