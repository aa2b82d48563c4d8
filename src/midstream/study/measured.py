"""How long stages take on this machine, from those that are done in the store.

A stage takes its planned FLOPs at the speed of the done ones of its kind; a kind of training that
nothing is known of has the speed of the other kinds of training. Nothing measured, no number.
"""

import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from midstream.storage import read_json
from midstream.study.cost import cost
from midstream.study.graph import Plan
from midstream.study.ledger import SUCCESS, Ledger
from midstream.study.stage import stage_from_json
from midstream.study.timing import Schedule, Task, schedule

TRAINING = ("pretrain", "continue", "finetune")
# Of a kind so many stages are read, those that ended last.
MAX_SAMPLES = 32

# By kind: FLOPs (0 where none are planned) and seconds of each stage.
Samples = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Measured:
    """The time of what is left of a plan, side by side on `workers` processes of this machine.

    `timing` is in hours and None where no stage can be timed; `num_samples` stages were measured,
    `num_untimed` of those to run have no time. `device` is what trained, where a stage says so.
    """

    workers: int
    timing: Schedule | None
    hours: Mapping[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_untimed: int = 0
    device: str | None = None

    def values(self) -> dict[str, Any]:
        """As plain values; the hours are None where no stage can be timed."""
        return {
            "device": self.device,
            "workers": self.workers,
            "hours": None if self.timing is None else self.timing.hours,
            "stage_hours": dict(self.hours),
            "num_samples": self.num_samples,
            "num_untimed": self.num_untimed,
        }


def measured(plan: Plan, ledger: Ledger, workers: int) -> Measured:
    """What is left of a plan at the speed of this machine's done stages."""
    samples, device = samples_here(ledger)
    hours = {}
    for row in plan.to_run:
        seconds = seconds_of(row.stage.kind, row.cost.flops, samples)
        if seconds is not None:
            hours[row.stage.name] = seconds / 3600
    tasks = [
        Task(
            name=row.stage.name,
            hours=hours.get(row.stage.name, 0.0),
            gpus=1,
            parents=tuple(parent.name for parent in row.stage.parents),
        )
        for row in plan.to_run
    ]
    return Measured(
        workers=workers,
        timing=schedule(tasks, workers) if hours else None,
        hours=hours,
        num_samples=sum(map(len, samples.values())),
        num_untimed=len(tasks) - len(hours),
        device=device,
    )


def seconds_of(kind: str, flops: float | None, samples: Samples) -> float | None:
    """The seconds of a stage by its kind and planned FLOPs; without FLOPs the mean of its kind.

    None where the samples do not tell.
    """
    own = samples.get(kind)
    known = own or [one for other in TRAINING for one in samples.get(other, ())]
    if not own and (kind not in TRAINING or flops is None):
        return None
    if not known:
        return None
    whole, seconds = sum(one for one, _ in known), sum(one for _, one in known)
    return flops * seconds / whole if whole and flops is not None else seconds / len(known)


def samples_here(ledger: Ledger) -> tuple[Samples, str | None]:
    """FLOPs and seconds of the stages that were done on this host, by kind; where they trained.

    Of training stages, those of the device of the last one. What another version wrote is left out.
    """
    here = socket.gethostname()
    device: str | None = None
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for folder in _done(ledger.store):
        if read_json(folder / "status.json").get("host") != here:
            continue
        try:
            stage = stage_from_json((folder / "stage.json").read_bytes())
        except ValidationError:
            continue
        if len(found[stage.kind]) == MAX_SAMPLES:
            continue
        own = _device(folder)
        device = device or own
        if own in (None, device):
            seconds = float(read_json(folder / "results.json")["seconds"])
            found[stage.kind].append((float(cost(stage, ledger).flops or 0.0), seconds))
    return found, device


def _done(store: Path) -> Iterable[Path]:
    """Folders of stages that are done, the last ones first."""
    marks = {path: path.stat().st_mtime_ns for path in store.glob(f"*/{SUCCESS}")}
    return [mark.parent for mark in sorted(marks, key=lambda path: marks[path], reverse=True)]


def _device(folder: Path) -> str | None:
    """What a training stage last ran on; None for others."""
    path = folder / "starts.jsonl"
    if not path.is_file():
        return None
    lines = path.read_text().splitlines()
    return str(json.loads(lines[-1])["device"]) if lines else None
