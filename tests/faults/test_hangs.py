"""Processes that live but stand still: named with their place, and the stage ends."""

import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from faults.launched import LONG, RESULT, has_steps
from midstream.config import Machine
from midstream.launch.local import run
from midstream.launch.workers import group_command
from midstream.study.store import Ledger
from own_studies import study_of

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# A worker that stands still for ever in one of its functions, at its sixth call.
HANG = """
import os, sys, time
from midstream.train import guards, loop
from midstream.work import worker

where, ranks = {where!r}, {ranks!r}
guards._STILL = 1.0
owner = loop if where == "_step" else loop.Record
real, calls = getattr(owner, where), 0

def hanging(*arguments, **options):
    global calls
    calls += 1
    if calls == 6 and int(os.environ.get("RANK", 0)) in ranks:
        time.sleep(1e6)
    return real(*arguments, **options)

setattr(owner, where, hanging)
worker.main()
"""


@pytest.mark.parametrize(
    ("num_ranks", "where", "ranks", "said"),
    [
        (1, "_step", (0,), "this process is stuck: "),
        (1, "next_rows", (0,), "this process is stuck: "),
        (2, "next_rows", (1,), "rank 1 is stuck: "),
        (2, "_step", (0, 1), "stuck: "),
    ],
    ids=["one in a step", "one at its rows", "rank 1 at its rows", "all in a step"],
)
def test_what_stands_still_is_named_with_its_place_and_ends(
    tiny_ledger: Ledger,
    tmp_path: Path,
    num_ranks: int,
    where: str,
    ranks: tuple[int, ...],
    said: str,
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path / "store", tiny.DATA)
    script = tmp_path / "hanging.py"
    script.write_text(HANG.format(where=where, ranks=ranks))
    machine = Machine(workers=1, ranks=num_ranks, device="cpu", rank_timeout_seconds=6)
    work = ledger.store / "worker-1.json"
    command = [sys.executable, str(script), str(work)]
    if num_ranks > 1:
        own = group_command(machine, work)
        command = [*own[: own.index("-m", 2)], *command[1:]]
    events: list[dict[str, Any]] = []
    outcome = run(study_of(RESULT), ledger, machine, events.append, command, skip_checks=True)
    log = (ledger.store / "worker-1.log").read_text()
    assert outcome.num_failed == 1, log
    error = ledger.status(LONG)["error"]
    place = "computing step 6" if where == "_step" else "waiting for rows after step 5"
    assert said in error
    assert f"{place} of " in error
    assert ("others have gone on and wait for it" in error) == (said == "rank 1 is stuck: ")
    # Where it stands is in the log.
    assert "in hanging" in log
    # The fifth is written once the sixth is taken.
    assert has_steps(ledger, 4)()
