"""Benchmarks of a user's own data, read whole before a study starts.

The readers import more than a plan may: a process of its own reads (`midstream.read_tasks`). What
was read whole is noted in the store by the digest of all its files, and not read again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from midstream.config import Machine, PublicFolder
from midstream.storage import read_json, write_json
from midstream.study.label import label
from midstream.study.ledger import Ledger
from midstream.study.problem import Problem
from midstream.study.stage import Evaluate, Stage
from midstream.study.workers import worker_environment

# What was read whole, by what it was.
NOTE = "benchmarks.json"
REMEDY = "mend the benchmark, or leave the task out"


def task_problems(stages: Iterable[Stage], ledger: Ledger) -> Iterator[Problem]:
    """Tasks that the world does not have, and files and pictures that are missing or broken."""
    asked: dict[str, tuple[dict[str, Any], list[str]]] = {}
    digests: dict[str, str | None] = {}
    for stage in stages:
        if isinstance(stage, Evaluate):
            for request in _requests(stage):
                key = json.dumps(request)
                asked.setdefault(key, (request, []))[1].append(label(stage))
                digests[key] = stage.of.data.world.benchmark_part(request["task"])
    note = ledger.store / NOTE
    known: dict[str, str] = read_json(note) if note.is_file() else {}
    unread = [key for key in asked if digests[key] is None or known.get(key) != digests[key]]
    if not unread:
        return
    told = _read([asked[key][0] for key in unread])
    passed: dict[str, str] = {}
    for key, error in zip(unread, told, strict=True):
        if error is None:
            if (mark := digests[key]) is not None:
                passed[key] = mark
            continue
        what, _, remedy = error.partition("; ")
        yield Problem(what, remedy or REMEDY, tuple(asked[key][1]))
    if passed and ledger.store.is_dir() and os.access(ledger.store, os.W_OK):
        write_json(note, known | passed)


def _requests(stage: Evaluate) -> Iterator[dict[str, Any]]:
    """What `midstream.read_tasks` is asked for the tasks of an evaluation."""
    world, asked = stage.of.data.world, stage.evaluation
    if not isinstance(world, PublicFolder) or world.fingerprint is None:
        return
    if not world.root.is_dir():
        return
    own = {"world": str(world.root), "limit": asked.limit}
    for name in asked.visual_tasks:
        yield own | {"task": name, "kind": "visual", "slim": asked.slim, "blind": asked.blind}
    for name in asked.text_tasks:
        yield own | {"task": name, "kind": "text"}


def _read(requests: Sequence[dict[str, Any]]) -> list[str | None]:
    """By request what is wrong, None where nothing is."""
    ended = subprocess.run(
        [sys.executable, "-m", "midstream.read_tasks"],
        input=json.dumps(list(requests)),
        env=worker_environment(Machine()),
        capture_output=True,
        text=True,
        check=False,
    )
    told: list[str | None] = [json.loads(line)["error"] for line in ended.stdout.splitlines()]
    if len(told) < len(requests):
        # Of the task that it was reading when it ended.
        last = (ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"])[-1]
        at = requests[len(told)]
        told.append(f"task {at['task']} of {at['world']} could not be read: {last}")
        told += _read(requests[len(told) :]) if len(told) < len(requests) else []
    return told
