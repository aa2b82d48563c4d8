"""`midstream plan`: its options, and what it prints."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from midstream.cli import DEFAULT_STORE, ScaleName, Settings, Store, StudyName, Verify
from midstream.core.tokens import UNKNOWN, counted, quantity, rounded
from midstream.cost import LEAST_HOURS

if TYPE_CHECKING:
    from midstream.cost.graph import Plan
    from midstream.cost.price import Fit, Fleet, Price, StagePrice
    from midstream.cost.taken import Measured
    from midstream.report.power import Power
    from midstream.study.store import Ledger
    from midstream.study.studies import AnyStudy

# A plan of more stages than this is printed by kind.
MAX_PLAN_ROWS = 48
DAY = 24.0
# What a plan ends with that has something wrong in it; what this machine lacks is none of that.
WRONG_EXIT_CODE = 2
# Fewer GiB are not told apart.
LEAST_GIB = 0.0001
GIB = 2**30


def plan(
    study: StudyName,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    scale: ScaleName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every stage as JSON.")] = False,
    features: Annotated[
        str, typer.Option(help="Frozen encoders' outputs: stored, live, or auto.")
    ] = "auto",
    max_feature_gib: Annotated[
        float, typer.Option(min=0.0, help="auto stores no more than this.")
    ] = 64.0,
    curves: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the learning rates (.png, .svg or .pdf)."),
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="A100-80, H100, ..., or TFLOPS:GIB of your own.")
    ] = "A100-80",
    gpus: Annotated[int, typer.Option(min=1, help="How many of them there are.")] = 1,
    gpus_per_stage: Annotated[
        int | None,
        typer.Option(min=1, help="How many train one stage; as few as have room without it."),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(help="Share of the peak that training reaches; as done stages did without."),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Memory with activations made again.")
    ] = False,
    spread: Annotated[
        float | None,
        typer.Option(min=0.0, help="Points that a score varies by over seeds, if none ran here."),
    ] = None,
    verify: Verify = False,
) -> None:
    """Show what a study would run and what it costs; starts nothing."""
    from midstream.cli.catalogue import find_study, with_scale
    from midstream.config import Machine
    from midstream.cost import find_gpu
    from midstream.cost.graph import plan as plan_study
    from midstream.cost.pictures import feature_plan
    from midstream.cost.price import Fleet, price, price_json, sizes_price
    from midstream.cost.taken import measured, reached
    from midstream.launch import terminal
    from midstream.launch.checks import problems, read_tasks
    from midstream.study.store import Ledger

    ledger, device = Ledger(store), find_gpu(gpu)
    share, done = (utilisation, 0) if utilisation is not None else reached(ledger, device)
    fleet = Fleet(device, gpus, gpus_per_stage, share, checkpointing, done)
    found = find_study(study, with_scale(settings, scale), ledger, verify=verify)
    terminal.tell_older(ledger)
    read = read_tasks([one for one in found.results if not ledger.is_done(one)], ledger)
    work = plan_study(found, ledger, read.sizes)
    machine = Machine.model_validate({"features": features, "max_feature_gib": max_feature_gib})
    costs = {row.stage.name: row.cost for row in work.rows}
    kept = feature_plan([row.stage for row in work.rows], ledger, machine, costs)
    priced = price(work, ledger, fleet, kept)
    found_wrong = problems(work, ledger, priced.needed_bytes, read)
    here = measured(work, ledger, Machine.model_validate(found.machine).workers)
    ladders = [p for one in found.studies if (p := sizes_price(one, work, here.hours))]
    if as_json:
        values = {"features": [one.values() for one in kept], "price": price_json(priced, work)}
        values |= {"this_machine": here.values(), "ladders": [asdict(one) for one in ladders]}
        powers = _powers(found, ledger, spread)
        values["decides"] = [asdict(one) | {"claim": one.claim.model_dump()} for one in powers]
        values["problems"] = [asdict(problem) for problem in found_wrong]
        typer.echo(json.dumps(plan_json(work) | values, indent=2))
    else:
        console = terminal.out()
        print_plan(work, priced, console, ledger)
        told = [*_here(here), *(one.sentence() for one in kept)]
        _tell([*told, *(one.sentence(fleet.gpu_hours) for one in ladders)])
        _tell(_decides(work, fleet, here.hours, _powers(found, ledger, spread)))
        terminal.print_problems(found_wrong, console)
    if curves is not None:
        _draw(found, ledger, curves, quiet=as_json)
    if any(problem.level == "wrong" for problem in found_wrong):
        raise typer.Exit(WRONG_EXIT_CODE)


def _tell(lines: Sequence[str]) -> None:
    typer.echo("\n".join(lines), nl=bool(lines))


def _draw(study: "AnyStudy", ledger: "Ledger", path: Path, *, quiet: bool) -> None:
    from midstream.report.curves import curves, write_curves

    drawn, missing = curves(study, ledger)
    write_curves(drawn, path)
    for sentence in missing:
        typer.echo(f"not drawn: {sentence}", err=True)
    typer.echo(f"learning rates: {path}", err=quiet)


def plan_json(plan: "Plan") -> dict[str, Any]:
    """The plan as plain values."""
    once, alone = plan.text_given
    return {
        "study": plan.study.name,
        "num_lines": len(plan.study.lines),
        "num_baselines": len(plan.study.baselines),
        "num_stages": len(plan.rows),
        "num_stages_alone": plan.num_alone,
        "num_shared": plan.num_shared,
        "num_done": plan.num_done,
        "num_to_run": len(plan.to_run),
        "num_unknown": plan.num_unknown,
        "num_expected": plan.num_expected,
        "flops": plan.shared_flops,
        "flops_alone": plan.naive_flops,
        "flops_text_given": once,
        "flops_alone_text_given": alone,
        "flops_to_run": plan.remaining_flops,
        "stages": [
            {
                "name": row.stage.name,
                "label": plan.labels[row.stage.name],
                "kind": row.stage.kind,
                "state": row.state,
                "tokens": row.cost.tokens,
                "flops": row.cost.flops,
                "parameters": row.cost.parameters,
                "parents": [parent.name for parent in row.stage.parents],
                "lines": list(row.lines),
            }
            for row in plan.rows
        ],
    }


def print_plan(plan: "Plan", priced: "Price", console: Console, ledger: "Ledger") -> None:
    """The plan as a table, by stage or (long ones) by kind, and its totals."""
    console.print(f"{plan.study.name}: {plan.study.question}", style="bold", markup=False)
    from midstream.cost.pictures import passes_seen, pictures_seen

    stages = [row.stage for row in plan.rows]
    by_kind = len(plan.rows) > MAX_PLAN_ROWS
    console.print(_kinds_table(priced) if by_kind else _stages_table(priced, plan.labels))
    for line in [
        *_totals(plan),
        *pictures_seen(stages, ledger),
        *passes_seen(stages, ledger),
        *_proportions(plan, ledger),
        *_prices(plan, priced),
    ]:
        typer.echo(line)


def _table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for column in ("state", "lines", "tokens", "FLOPs", "GPU-h", "GiB"):
        table.add_column(column, no_wrap=True)
    return table


def _stages_table(priced: "Price", labels: Mapping[str, str]) -> Table:
    table = _table("stage")
    for stage in priced.stages:
        row = stage.row
        table.add_row(
            escape(labels[row.stage.name]),
            row.state,
            str(len(row.lines)),
            quantity(row.cost.tokens),
            quantity(row.cost.flops),
            UNKNOWN if stage.gpu_hours is None else _hours(stage.gpu_hours),
            _memory([stage]),
        )
    return table


def _kinds_table(priced: "Price") -> Table:
    from midstream.launch.terminal import STATES
    from midstream.study.label import kind_words

    table = _table("kind")
    for kind in dict.fromkeys(stage.row.stage.kind for stage in priced.stages):
        mine = [stage for stage in priced.stages if stage.row.stage.kind == kind]
        rows = [stage.row for stage in mine]
        states = Counter(row.state for row in rows)
        tokens = [row.cost.tokens for row in rows if row.cost.tokens is not None]
        flops = [row.cost.flops for row in rows if row.cost.flops is not None]
        table.add_row(
            f"{len(rows)} {kind_words(kind)}",
            ", ".join(f"{states[state]} {state}" for state in STATES if states[state]),
            f"{sum(len(row.lines) for row in rows)}",
            quantity(sum(tokens) if tokens else None),
            quantity(sum(flops) if flops else None),
            _hours(sum(stage.gpu_hours or 0.0 for stage in mine)) if flops else UNKNOWN,
            _memory(mine),
        )
    return table


def _memory(stages: "Sequence[StagePrice]") -> str:
    """GPUs and the memory of each: of the stage that takes most."""
    fits = [stage.fit for stage in stages if stage.fit is not None]
    if not fits:
        return ""
    most = max(fits, key=lambda fit: (not fit.fits, fit.gpus, fit.memory.total))
    several = f"{most.gpus} x " if most.gpus > 1 else ""
    return f"{several}{_gib(most.memory.total)}" + ("" if most.fits else " !")


def _gib(size: float | int) -> str:
    return rounded(size / GIB, LEAST_GIB)


def _hours(hours: float | int) -> str:
    return rounded(hours, LEAST_HOURS)


def _flops(value: float | int) -> str:
    # 5.07 TFLOPs, but 0 FLOPs.
    return quantity(value) + ("FLOPs" if value >= 1e3 else " FLOPs")


def _shared(once: float | int, alone: float | int) -> str:
    times = alone / once if once else 1.0
    return (
        f"{_flops(once)} shared, {_flops(alone)} if each line ran alone ({times:.2f} times as many)"
    )


def _totals(plan: "Plan") -> list[str]:
    study = plan.study
    once, alone = plan.text_given
    lines = [
        f"lines: {len(study.lines)}, baselines: {len(study.baselines)}, stages: {len(plan.rows)} "
        f"({plan.num_alone} if each ran alone), {plan.num_shared} of them shared; "
        f"{plan.num_done} done, {len(plan.to_run)} to run",
        f"{_shared(plan.shared_flops, plan.naive_flops)}; {_flops(plan.remaining_flops)} to run",
    ]
    if once != plan.shared_flops:
        lines.append(f"with the text runs given: {_shared(once, alone)}")
    if plan.num_unknown:
        lines.append(
            f"{counted(plan.num_unknown, 'stage is', 'stages are')} not in these sums: unknown "
            "until their data is prepared"
        )
    if plan.num_expected:
        lines.append(
            f"{counted(plan.num_expected, 'stage is', 'stages are')} counted from what the recipe "
            "expects of its data, or estimated"
        )
    return lines


def _proportions(plan: "Plan", ledger: "Ledger") -> list[str]:
    """What a study's image-text stages see for one of fine-tuning.

    The paper's: 28.8 billion tokens for 2.6 billion positions, 3.8 million captions for 2.5 million
    conversations (10 % captions, four epochs).
    """
    from midstream.cost.cost import images_seen
    from midstream.study.stages import Continue, Finetune

    if len(plan.study.studies) > 1:
        return []
    tokens, pictures = [], []
    held = {row.stage.name: row.cost.tokens for row in plan.rows}
    shown = {
        row.stage.name: images_seen(row.stage, ledger)
        for row in plan.rows
        if isinstance(row.stage, Continue | Finetune)
    }
    for row in plan.rows:
        if isinstance(row.stage, Finetune) and isinstance(row.stage.start, Continue):
            before, name = row.stage.start.name, row.stage.name
            if held[before] and held[name] and shown[name] and shown[before] is not None:
                tokens.append((held[before] or 0) / (held[name] or 1))
                pictures.append((shown[before] or 0) / (shown[name] or 1))
    if not tokens:
        return []
    (least, most), (few, many) = ((min(each), max(each)) for each in (tokens, pictures))
    return [
        f"image-text to fine-tuning: {_ratio(least, most)} in tokens (the paper's 11 to 1), "
        f"{_ratio(few, many)} in pictures (1.5 to 1)"
    ]


def _ratio(least: float, most: float) -> str:
    few, many = rounded(least), rounded(most)
    return f"{few} to 1" if few == many else f"between {few} and {many} to 1"


def _prices(plan: "Plan", priced: "Price") -> list[str]:
    fleet, timing, parts = priced.fleet, priced.timing, priced.parts
    once, alone = (fleet.gpu_hours(flops) for flops in plan.model_flops)
    told = f", as {counted(fleet.num_measured, 'done stage')} reached" if fleet.num_measured else ""
    path = " -> ".join(plan.labels[name] for name in timing.critical_path) or "nothing is left"
    lines = [
        f"by part: decoder {_flops(parts.decoder)}, head {_flops(parts.head)}, encoder "
        f"{_flops(parts.encoder)} (live), projector {_flops(parts.projector)}",
        f"{fleet.gpu.name} at {fleet.utilisation:.1%} of {fleet.gpu.tflops:g} TFLOP/s{told}: "
        f"{_hours(priced.gpu_hours)} GPU-hours to run; {_hours(once)} for all stages once, "
        f"{_hours(alone)} if each line ran alone",
        f"on {counted(fleet.number, 'GPU')}: {_duration(timing.hours)}, at least "
        f"{_duration(timing.lower_bound)}; critical path {_duration(timing.critical_hours)}: "
        f"{path}",
        f"disk: {_gib(priced.kept_bytes)} GiB stay, {_gib(priced.peak_bytes)} GiB at most at once",
    ]
    fits = [(one.fit, plan.labels[one.row.stage.name]) for one in priced.stages if one.fit]
    if held := [one for one in fits if one[0].fits]:
        fit, name = max(held, key=lambda one: one[0].memory.total)
        lines.append(_memory_line(name, fit, fleet.gpu.room))
    if large := [one for one in fits if not one[0].fits]:
        fit, name = max(large, key=lambda one: one[0].memory.total)
        lines.append(
            f"{counted(len(large), 'stage does', 'stages do')} not fit: {name} takes "
            f"{_gib(fit.memory.total)} GiB on each of {counted(fit.gpus, 'GPU')} with one row at a "
            f"time, {_gib(fleet.gpu.room)} GiB are free; raise --gpus or --gpus-per-stage, give "
            "--checkpointing, or choose a larger --gpu"
        )
    return lines


def _powers(study: "AnyStudy", ledger: "Ledger", spread: float | None) -> list["Power"]:
    from midstream.report.power import powers

    known = None if spread is None else spread / 100
    return [one for each in study.studies for one in powers(each, ledger, known)]


def _decides(
    plan: "Plan", fleet: "Fleet", hours: Mapping[str, float], found: Sequence["Power"]
) -> list[str]:
    """What the claims can tell with the planned seeds, and what more of them cost."""
    from midstream.report.findings import place_words, points, score_name
    from midstream.report.power import hours_each

    if not any(study.claims for study in plan.study.studies):
        return []
    if not found:
        return [
            "what the claims can decide is not known before two seeds have run here; --spread "
            "POINTS says it from a spread of yours"
        ]
    lines = ["what the claims can decide, by the spread that is " + found[0].basis + ":"]
    for one in found:
        claim = f"{place_words(one.claim.higher)} against {place_words(one.claim.lower)}"
        least = "nothing" if one.detectable is None else f"{points(one.detectable)} points"
        need = "more than 1,000" if one.needed is None else f"{one.needed:,}"
        lines.append(
            f"  {score_name(one.claim.score)}, {claim}: {counted(one.repetitions, 'seed')} find "
            f"{least}; {need} make the interval as narrow as is of interest"
        )
    for study in plan.study.studies:
        users = {row.stage.name: row.lines for row in plan.rows}
        flops = {row.stage.name: fleet.gpu_hours(row.cost.model_flops or 0.0) for row in plan.rows}
        each, here = hours_each(flops, users, study), hours_each(hours, users, study)
        if each is not None and plan.study is study:
            wall = f", {_duration(here)} of one process here" if here else ""
            lines.append(f"  one more seed at every place: {_hours(each)} GPU-hours{wall}")
    return lines


def _here(found: "Measured") -> list[str]:
    """The time on this machine, where stages were done on it."""
    if found.timing is None:
        return []
    where = "this machine" if found.device is None else f"this machine ({found.device})"
    line = (
        f"{where}: about {_duration(found.timing.hours)} with "
        f"{counted(found.workers, 'worker')}, {_duration(sum(found.hours.values()))} one after "
        f"another; by the time that {counted(found.num_samples, 'done stage')} took"
    )
    if found.num_untimed:
        line += f"; {counted(found.num_untimed, 'stage')} of kinds not measured left out"
    return [line]


def _memory_line(name: str, fit: "Fit", room: float | int) -> str:
    found = fit.memory
    parts = "weights moments gradients gathered masks activations head encoder"
    told = ", ".join(f"{part} {_gib(getattr(found, part))}" for part in parts.split())
    return (
        f"memory: at most {_gib(found.total)} GiB of {_gib(room)} on each GPU ({name}, GPUs: "
        f"{fit.gpus}, micro-batches of up to {fit.micro_rows} rows): {told}"
    )


def _duration(hours: float | int) -> str:
    if hours >= 2 * DAY:
        return f"{hours / DAY:,.1f} days"
    if hours >= 1:
        return f"{hours:,.1f} hours"
    minutes = 60 * hours
    return f"{minutes:,.1f} minutes" if minutes >= 1 else f"{60 * minutes:,.2g} seconds"
