"""Run a stage in several processes, which find one another as under torchrun.

The ranks are forked from the server of `lives`; torchrun itself is started in `faults`.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from lives import server
from midstream.config import Machine
from midstream.study.stages import Stage, stage_from_json
from midstream.study.store import Ledger

STOPPED = 75
DEADLINE_SECONDS = 240.0


@dataclass(frozen=True)
class Ended:
    """The first exit code of a rank that is not 0, and what all of them wrote to stderr."""

    returncode: int
    stderr: str


def run_ranks(
    ledger: Ledger,
    stage: Stage,
    ranks: int,
    *,
    stop_after: int | None = None,
    stopped_rank: int | None = None,
    **machine: Any,
) -> Ended:
    """Run a stage, whose parents are done, on so many ranks; `stop_after` steps of this start.

    All ranks are asked to stop, or `stopped_rank` alone.
    """
    place = Machine(**{"workers": 1, "device": "cpu", "ranks": ranks} | machine)
    given = {
        "store": str(ledger.store),
        "machine": place.model_dump(mode="json"),
        "stage": stage.model_dump(mode="json"),
        "stop_after": stop_after,
        "stopped_rank": stopped_rank,
    }
    # The agent's store, as torchrun's.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    errors = ledger.store / "ranked.log"
    errors.write_bytes(b"")
    context = server()
    processes = []
    for rank in range(ranks):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(json.dumps(given), own, str(errors)))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(DEADLINE_SECONDS)
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    return Ended(next((code for code in codes if code), 0), errors.read_text())


def _rank(given: str, environment: dict[str, str], errors: str) -> None:
    os.environ.update(environment)
    os.fsync = lambda descriptor: None
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    from midstream.study.store import Stopped
    from midstream.work.run_stage import StageRunner

    values = json.loads(given)
    asked = values["stopped_rank"] in (None, int(environment["RANK"]))
    left = values["stop_after"] if asked else None

    def should_stop() -> bool:
        nonlocal left
        if left is not None:
            left -= 1
        elif values["stopped_rank"] is not None:
            # So that the others are not done before that one has begun.
            time.sleep(0.2)
        return left == 0

    machine = Machine.model_validate(values["machine"])
    runner = StageRunner(Ledger(Path(values["store"])), machine, lambda event: None, should_stop)
    try:
        runner.run(stage_from_json(json.dumps(values["stage"])))
    except Stopped:
        runner.close()
        sys.exit(STOPPED)
    # A thread that still speaks with the store when the interpreter ends aborts the process.
    runner.close()
