"""Run a stage in several processes under torchrun, as a test needs it.

As a script (`ranked.py FILE.json`) it is one rank: it runs the stage of the file and may stop, as
if asked to, after some steps.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from midstream.config import Machine
from midstream.study.ledger import Ledger
from midstream.study.stage import Stage, stage_from_json
from midstream.study.workers import worker_environment

STOPPED = 75


def run_ranks(
    ledger: Ledger,
    stage: Stage,
    ranks: int,
    *,
    stop_after: int | None = None,
    **machine: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a stage, whose parents are done, on so many ranks; `stop_after` steps of this start."""
    place = Machine(workers=1, device="cpu", ranks=ranks, **machine)
    file = ledger.store / "ranked.json"
    file.write_text(
        json.dumps(
            {
                "store": str(ledger.store),
                "machine": place.model_dump(mode="json"),
                "stage": stage.model_dump(mode="json"),
                "stop_after": stop_after,
            }
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, str(file)]
    return subprocess.run(
        command, env=worker_environment(place), capture_output=True, text=True, timeout=240
    )


def main() -> None:
    """One rank."""
    from midstream.run_stage import StageRunner
    from midstream.study.ledger import Stopped

    given = json.loads(Path(sys.argv[1]).read_text())
    left = given["stop_after"]

    def should_stop() -> bool:
        nonlocal left
        if left is not None:
            left -= 1
        return left == 0

    machine = Machine.model_validate(given["machine"])
    runner = StageRunner(Ledger(Path(given["store"])), machine, lambda event: None, should_stop)
    try:
        runner.run(stage_from_json(json.dumps(given["stage"])))
    except Stopped:
        runner.close()
        sys.exit(STOPPED)
    # A thread that still speaks with the store when the interpreter ends aborts the process.
    runner.close()


if __name__ == "__main__":
    main()
