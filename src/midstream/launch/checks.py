"""What is wrong with a study before anything of it runs: one list, each with its remedy.

`plan` prints the list and `run` refuses what is on it, at its start and once more when its data is
prepared: from then on every number of the data is known.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from midstream.config import (
    Config,
    ContinuedCosine,
    EncoderConfig,
    FusedEncoder,
    Machine,
    VLMConfig,
)
from midstream.config.training import check_start, rate_at
from midstream.core.storage import write_json
from midstream.core.tokens import name_some, rounded
from midstream.cost import GPUS
from midstream.cost.graph import Plan, PlanRow, missing_inputs
from midstream.cost.known import Number
from midstream.cost.pictures import feature_plan
from midstream.cost.price import Fleet, price
from midstream.cost.questions import NOTE, Sizes, noted, requests_of
from midstream.launch.check_data import Problem, data_problems, merged
from midstream.launch.workers import Event, ask, worker_environment
from midstream.study.imported import ImportRecord, read_planned, what_can_run
from midstream.study.label import label
from midstream.study.stages import (
    PLANNED,
    Continue,
    Evaluate,
    Imported,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    Pretrain,
    Stage,
    Trained,
    came_from,
)
from midstream.study.store import Ledger
from midstream.study.studies import AnyStudy, Study

REMEDY = "mend the benchmark, or leave the task out"


@dataclass(frozen=True)
class ReadTasks:
    """What reading benchmarks told: what is wrong, and the sizes of those that are whole."""

    problems: tuple[Problem, ...]
    sizes: Sizes


def read_tasks(stages: Iterable[Stage], ledger: Ledger) -> ReadTasks:
    """Tasks that the world does not have, and files and pictures that are missing or broken.

    The readers import more than a plan may: a process of its own reads. What was read whole is
    noted in the store by the digest of all its files, with its size, and not read again.
    """
    asked: dict[str, tuple[dict[str, Any], str | None, list[str]]] = {}
    for stage in stages:
        if isinstance(stage, Evaluate):
            for request in requests_of(stage):
                if not Path(request["world"]).is_dir():
                    break
                part = stage.of.data.world.benchmark_part(request["task"])
                asked.setdefault(json.dumps(request), (request, part, []))[2].append(label(stage))
    known = noted(ledger)
    unread = [
        key
        for key, (_, part, _) in asked.items()
        if part is None or known.get(key, {}).get("digest") != part
    ]
    if not unread:
        return ReadTasks((), {})
    problems, sizes = list[Problem](), dict[str, dict[str, Any]]()
    passed: dict[str, dict[str, Any]] = {}
    for key, told in zip(unread, _read([asked[key][0] for key in unread]), strict=True):
        _, part, stages_of = asked[key]
        if told["error"] is not None:
            problems.append(Problem.of(told["error"], REMEDY, *stages_of))
            continue
        sizes[key] = told["size"]
        if part is not None:
            passed[key] = {"digest": part, "size": told["size"]}
    if passed and ledger.store.is_dir() and os.access(ledger.store, os.W_OK):
        write_json(ledger.store / NOTE, {**known, **passed})
    return ReadTasks(tuple(problems), sizes)


def _read(requests: Sequence[dict[str, Any]]) -> list[Event]:
    """By request `error`, what is wrong (None where nothing is), and `size`."""
    events: list[Event] = []
    last = ask(
        "read-tasks",
        {"tasks": requests},
        show=events.append,
        environment=worker_environment(Machine()),
        stderr=subprocess.DEVNULL,
    )
    if last["event"] == "stopped":
        raise KeyboardInterrupt
    told = [one for one in events if one["event"] == "finished"]
    if len(told) < len(requests):
        # Of the task that it was reading when it ended.
        at = requests[len(told)]
        reason = f"task {at['task']} of {at['world']} could not be read: {last.get('error')}"
        told.append({"error": reason, "size": None})
        told += _read(requests[len(told) :]) if len(told) < len(requests) else []
    return told


# What a tower's weights are shaped and read by; how pictures are shown to it is the recipe's.
TOWER_FIELDS = (
    *("family", "patch_size", "hidden_size", "num_heads", "intermediate_size"),
    *("num_registers", "ffn", "position_patches"),
)
# Of fields that differ, so many are told.
MAX_FIELDS = 4


def problems(
    plan: Plan, ledger: Ledger, needed_bytes: Number | None = None, read: ReadTasks | None = None
) -> tuple[Problem, ...]:
    """All that is wrong with what is left of a plan, the gravest level first; `read` is what its
    benchmarks told, where they were read already.

    `needed_bytes` is what it will write at most (`Price.needed_bytes`). Benchmarks of a user's own
    data are read by a process of its own, unless they were read before as they are now.
    """
    stages = [row.stage for row in plan.to_run]
    tokens_of = {row.stage.name: row.cost.tokens for row in plan.rows}
    found = [
        *(one for study in plan.study.studies for one in exhibits(study)),
        *lacking(plan.study),
        *(problem for row in plan.to_run for problem in _chain(row, tokens_of)),
        *data_problems(stages, ledger),
        *(read or read_tasks(stages, ledger)).problems,
        *([] if needed_bytes is None else _disk(ledger, needed_bytes)),
    ]
    return merged(found)


def problems_of_run(plan: Plan, ledger: Ledger, machine: Machine) -> tuple[Problem, ...]:
    """All that is wrong with a run on this machine; where it writes is counted by its workers."""
    stages = [row.stage for row in plan.rows]
    # Which GPU it is changes no byte.
    fleet = Fleet(next(iter(GPUS.values())), number=machine.workers)
    priced = price(plan, ledger, fleet, feature_plan(stages, ledger, machine))
    return problems(plan, ledger, priced.needed_bytes)


def lacking(study: AnyStudy) -> Iterator[Problem]:
    """What a study was planned without."""
    if missing := missing_inputs(study):
        can = what_can_run(study)
        yield Problem(
            f"{study.name} was planned without {', '.join(missing)}",
            "name their folders in the recipe's arguments (--set)" + (f"; {can}" if can else ""),
            level="lacking",
        )


def exhibits(study: Study) -> Iterator[Problem]:
    """Lines and axes that the study's figure, table and claims lack, and places that are none;
    without them its report, when all has run, shows nothing there."""
    if not study.lines:
        yield Problem(
            f"study {study.name!r} has no lines", "give it lines, such as by --set seeds=7"
        )
    for line in study.lines:
        figure = {study.figure.x, study.figure.by} - {None, *line.axes}
        for axis in sorted(map(str, figure)):
            yield Problem(
                f"the figure of {study.name!r} is drawn over {axis!r}, and line {line.name!r} has "
                f"only {', '.join(line.axes) or 'no axes'}",
                "give every line this axis, or the figure one of theirs",
                key=f"figure {study.name} {axis}",
            )
        for axis, place in line.axes.items():
            if isinstance(place, float) and not isfinite(place):
                yield Problem(
                    f"line {line.name!r} of {study.name!r} lies at {axis} {place}, which is no "
                    "place on an axis",
                    "give a number, or a name in quotes",
                )
    axes = {axis for line in study.lines for axis in line.axes}
    asked = [
        (f"claim {one.text!r}", axis) for one in study.claims for axis in (*one.higher, *one.lower)
    ]
    if study.table is not None:
        table = study.table
        asked += [("table", one) for one in (table.rows, table.columns) if one and one != "scores"]
    for what, axis in asked:
        if study.lines and axis not in axes:
            yield Problem(
                f"the {what} of {study.name!r} is about {axis!r}, which is no axis of its lines",
                f"choose from {', '.join(sorted(axes)) or 'no axes'}",
            )


def _disk(ledger: Ledger, needed: Number) -> Iterator[Problem]:
    place = ledger.store.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        grow, room = (rounded(size / 2**30, 0.01) for size in (needed, free))
        yield Problem(
            f"{ledger.store} may grow by {grow} GiB, {room} GiB are free on its disk",
            "make room, or give a --store on another disk",
            level="lacking",
        )


def _text_before(stage: Stage) -> tuple[Pretrain, float] | None:
    """The text run whose weights a stage takes, and the share of its tokens there."""
    before = came_from(stage)
    return (before[0], before[1]) if before and isinstance(before[0], Pretrain) else None


def _chain(row: PlanRow, tokens_of: Mapping[str, int | None]) -> Iterator[Problem]:
    """What a stage takes over that is not there, or that it cannot go on from."""
    stage = row.stage
    for problem in (*_imports(stage), *_milestone(stage), *_start(stage, tokens_of)):
        yield replace(problem, stages=(label(stage),))


def _milestone(stage: Stage) -> Iterator[Problem]:
    if (before := _text_before(stage)) is None:
        return
    text, share = before
    # As folders of milestones are named.
    kept = [f"{milestone * 100:g}" for milestone in text.milestones if milestone]
    if not share:
        yield Problem(
            f"{label(text)} keeps no weights from before its first step",
            "begin with start=FromScratch() in place of ContinueFrom(completion=0)"
            if isinstance(stage, Continue)
            else "evaluate a milestone above 0",
        )
    elif f"{share * 100:g}" not in kept:
        yield Problem(
            f"{label(text)} keeps its weights at {', '.join(kept)} %, not at {share * 100:g} %",
            f"add {share:g} to its milestones, or choose one of those",
        )


def _start(stage: Stage, tokens_of: Mapping[str, int | None]) -> Iterator[Problem]:
    """A schedule that cannot start where it would have to."""
    if not isinstance(stage, Trained):
        return
    before, rate = came_from(stage), None
    if (milestone := _text_before(stage)) is not None:
        text, share = milestone
        if not (tokens := tokens_of[text.name]):
            return
        # Beyond a warm-up rates only fall; within one the milestone's is at most so high.
        ahead = 2 * text.training.rows.row_length * text.training.rows.batch_rows
        rate = rate_at(text.training.schedule, int(share * tokens), tokens, step_tokens=ahead)
    elif before is not None and isinstance(before[0], LoadDecoder | LoadModel):
        if not isinstance(record := _record(before[0].checkpoint), ImportRecord):
            return
        rate = None if record.position is None else record.position.rate
    elif before is not None:
        return  # Both stages' own values say it, when they are made.
    try:
        goes_on = isinstance(stage.training.schedule, ContinuedCosine)
        where = label(before[0] if before is not None and goes_on else stage)
        check_start(stage.training.schedule, rate, where)
    except ValueError as reason:
        yield Problem.of(reason)


def _imports(stage: Stage) -> Iterator[Problem]:
    """Imported folders that are not there, were imported anew, or hold another model."""
    parts: list[tuple[Imported, str, Config]] = []
    match stage:
        case LoadDecoder():
            parts = [(stage.checkpoint, "decoder", stage.decoder)]
        case LoadModel():
            parts = [(stage.checkpoint, "model", stage.model)]
        case LoadEncoder():
            encoder = stage.encoder
            towers = encoder.towers if isinstance(encoder, FusedEncoder) else (encoder,)
            pairs = zip(stage.towers, towers, strict=True)
            parts = [(imported, "encoder", tower) for imported, tower in pairs]
    for imported, part, wanted in parts:
        record = _record(imported)
        if isinstance(record, str):
            yield Problem.of(record, "import the checkpoint again")
        elif record is not None and (other := _differences(wanted, record)):
            yield Problem(
                f"{imported.folder} holds another {part} than the recipe takes: {other}",
                f"give the folder of that {part}, or a scale that is made of this one",
            )


def _record(imported: Imported) -> ImportRecord | str | None:
    """What an imported folder says of itself; None where it was not there to plan with, what is
    wrong where it cannot be read or is another."""
    if imported.content.startswith(PLANNED):
        return None
    try:
        return read_planned(imported)
    except (FileNotFoundError, ValueError) as reason:
        return str(reason)


def _differences(wanted: Config, record: ImportRecord) -> str:
    """The fields in which an imported folder holds something else: "hidden_size 2048 (it has
    1024)"; empty where it is what is wanted."""
    there: Config | None = record.model if isinstance(wanted, VLMConfig) else record.config
    if there is None:
        return "it is no whole vision-language model"
    fields, held = dict(wanted), dict(there)
    if isinstance(wanted, EncoderConfig):
        if not isinstance(there, EncoderConfig):
            return "it is a language model"
        fields, held = ({n: getattr(one, n) for n in TOWER_FIELDS} for one in (wanted, there))
        # Blocks above the one that features are taken from may be missing.
        blocks = wanted.num_layers + 1 + wanted.feature_layer
        if blocks > there.num_layers:
            fields, held = fields | {"num_layers": blocks}, held | {"num_layers": there.num_layers}
    differ = [name for name in fields if fields[name] != held.get(name)]
    told = (f"{name} {fields[name]} (it has {held.get(name)})" for name in differ)
    return name_some(told, MAX_FIELDS)
