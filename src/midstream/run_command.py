"""`midstream run`: its options, what is told while stages run, and what at the end."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from midstream.options import DEFAULT_STORE, ScaleName, Settings, Store, StudyName, Verify
from midstream.quantities import counted

if TYPE_CHECKING:
    from midstream.config import Machine, SlurmSettings
    from midstream.study.ledger import Ledger
    from midstream.study.studies import AnyStudy


def run(
    study: StudyName,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Also run stages that failed before.")
    ] = False,
    scale: ScaleName = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that run stages side by side (2).")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each process (1).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    data_workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that load rows ahead of each training process."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Frozen encoders' outputs: stored, live, or auto where storing pays."),
    ] = None,
    max_feature_gib: Annotated[
        float | None, typer.Option(min=0.0, help="auto stores no more than this (64).")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that train one stage together on this machine."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines that train one stage together.")
    ] = None,
    node: Annotated[
        int | None, typer.Option(min=0, help="Which of them this is; 0 launches.")
    ] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where node 0 is reached by the others.")
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--machine",
            metavar="NAME=VALUE",
            help="Any other choice of the machine (docs/training.md); may be repeated.",
        ),
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Run every stage as a job of a Slurm cluster.")
    ] = False,
    slurm_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="What jobs are given (docs/cluster.md)."),
    ] = None,
    slurm_sets: Annotated[
        list[str] | None,
        typer.Option(
            "--slurm-set",
            metavar="[KIND.]NAME=VALUE",
            help="One of these values, for all stages or one kind of them; may be repeated.",
        ),
    ] = None,
    skip_checks: Annotated[
        bool,
        typer.Option("--skip-checks", help="Start at once, whatever is wrong with study or data."),
    ] = False,
    verify: Verify = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="With --slurm: leave once all jobs are submitted.")
    ] = False,
) -> None:
    """Run the stages of a study that are not done; continue those that were stopped."""
    from midstream.catalogue import find_study, read_settings, with_scale
    from midstream.study.ledger import Ledger
    from midstream.study.placement import machine_for

    cluster = _slurm_settings(slurm, slurm_file, slurm_sets or [], detach)
    if cluster is not None and (nodes or node or master):
        raise ValueError(
            "--nodes, --node and --master are for machines without Slurm; with it, "
            "--slurm-set nodes=N"
        )
    chosen: dict[str, Any] = {"workers": workers, "threads": threads, "device": device}
    chosen |= {"data_workers": data_workers, "features": features, "ranks": ranks}
    chosen |= {"max_feature_gib": max_feature_gib, "nodes": nodes, "node": node, "master": master}
    if cluster is not None:
        chosen["workers"] = 1
    ledger = Ledger(store)
    found = find_study(study, with_scale(settings, scale), ledger, verify=verify)
    machine = machine_for(found, chosen | read_settings("--machine", others or []))
    if machine.node:
        from midstream.study.nodes import join

        raise typer.Exit(join(ledger.store, machine, typer.echo))
    run_and_tell(
        found,
        ledger,
        machine,
        asked=study,
        retry=retry,
        slurm=cluster,
        detach=detach,
        skip_checks=skip_checks,
    )


def run_and_tell(
    study: "AnyStudy",
    ledger: "Ledger",
    machine: "Machine",
    *,
    asked: str | None = None,
    retry: bool = False,
    slurm: "SlurmSettings | None" = None,
    detach: bool = False,
    skip_checks: bool = False,
) -> int:
    """Run and tell; returns the peak memory in bytes. Leaves with the outcome's code if not 0.

    `asked`: the name under which `status` and `report` find the study again.
    """
    from midstream import terminal
    from midstream.catalogue import keep_asked
    from midstream.study import launch
    from midstream.study.cluster.slurm import run_on_slurm
    from midstream.study.graph import order
    from midstream.study.graph import plan as plan_study
    from midstream.study.label import labels

    terminal.tell_older(ledger)
    memory = terminal.PeakMemory()
    console = terminal.out()
    names = labels(order(study))
    with terminal.progress(console, names) as show:

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "plan" and asked is not None:
                keep_asked(ledger, asked, study)
            memory.note(event)
            show(event)

        if slurm is None:
            outcome = launch.run(
                study, ledger, machine, on_event, retry=retry, skip_checks=skip_checks
            )
        else:
            outcome = run_on_slurm(
                study,
                ledger,
                machine,
                slurm,
                on_event,
                retry=retry,
                detach=detach,
                skip_checks=skip_checks,
            )
    if outcome.refused:
        started = "the data is prepared, nothing else" if outcome.num_done else "nothing"
        terminal.error(
            f"error: {started} was started; put right what is listed, or add --skip-checks"
        )
        terminal.print_problems(outcome.refused, terminal.errors())
        raise typer.Exit(outcome.exit_code)
    counts = (outcome.num_done, outcome.num_failed, outcome.num_stopped, outcome.num_skipped)
    if not any(counts) and not outcome.num_queued:
        console.print(
            f"nothing to do: all {outcome.num_before} stages of {study.name} are done "
            f"({ledger.store})",
            soft_wrap=True,
        )
        return 0
    done, failed, stopped, skipped = counts
    queued = f", {outcome.num_queued} in Slurm's queue" if outcome.num_queued else ""
    console.print(
        f"{study.name}: {counted(done, 'stage')} done now, {outcome.num_before} before, "
        f"{failed} failed, {stopped} stopped, {skipped} not started{queued}",
        soft_wrap=True,
    )
    for message in outcome.messages:
        terminal.error(message)
    if outcome.exit_code:
        if outcome.interrupted:
            terminal.error("stopped; the same command continues where it was")
        raise typer.Exit(outcome.exit_code)
    return memory.total_bytes(plan_study(study, ledger), ledger)


def _slurm_settings(
    asked: bool, file: Path | None, settings: list[str], detach: bool
) -> "SlurmSettings | None":
    """What jobs are given: the file's values, those of the command line over them."""
    from midstream.catalogue import read_settings
    from midstream.config import SlurmSettings, StageKind

    if not asked:
        if file is not None or settings or detach:
            raise ValueError("--slurm-file, --slurm-set and --detach go with --slurm")
        return None
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{file} is not TOML: {error}") from None
    stages = {kind: dict(own) for kind, own in values.pop("stages", {}).items()}
    for name, value in read_settings("--slurm-set", settings).items():
        kind, dot, own = name.partition(".")
        if dot and kind in get_args(StageKind):
            stages.setdefault(kind, {})[own] = value
        elif name == "stages":
            stages |= value
        else:
            values[name] = value
    return SlurmSettings.model_validate({**values, "stages": stages})
