"""`midstream store`, `report`, `profile` and `join captions`, and what `prepare` prints."""

import shlex
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from midstream.cli import (
    DEFAULT_STORE,
    Device,
    ScaleName,
    Settings,
    StageName,
    Store,
    StudyName,
    Threads,
    work,
)
from midstream.core.tokens import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from midstream.cost.graph import StoredStage
    from midstream.report.gather import Facts
    from midstream.study.store import Ledger
    from midstream.study.studies import AnyStudy


def ls(store: Store = DEFAULT_STORE) -> None:
    """List the stages: state, size, and the kept studies that need them."""
    from midstream.cost.graph import stored_stages
    from midstream.launch import terminal
    from midstream.study.store import Ledger

    table = Table(box=None, pad_edge=False)
    for title in ("stage", "state", "size", "needed by"):
        table.add_column(title, overflow="fold", justify="right" if title == "size" else "left")
    for stage in stored_stages(Ledger(store)):
        needed = ", ".join(stage.studies) or "-"
        table.add_row(escape(stage.label), stage.state, _size(stage.num_bytes), escape(needed))
    terminal.out().print(table)


def du(store: Store = DEFAULT_STORE) -> None:
    """Say what each kind of stage takes, what is kept beside them, and what could go."""
    from midstream.cost.graph import other_bytes, stored_stages
    from midstream.launch import terminal
    from midstream.study.store import Ledger

    ledger = Ledger(store)
    stages, beside = stored_stages(ledger), other_bytes(ledger)
    table = Table(box=None, pad_edge=False)
    for title in ("what", "stages", "size", "of these unneeded"):
        table.add_column(title, justify="left" if title == "what" else "right")

    def row(name: str, own: "Sequence[StoredStage]", other: int = 0) -> None:
        free = sum(stage.num_bytes for stage in own if not stage.studies)
        total = sum(stage.num_bytes for stage in own) + other
        table.add_row(name, str(len(own)), _size(total), _size(free))

    for kind in dict.fromkeys(stage.kind for stage in stages):
        row(kind, [stage for stage in stages if stage.kind == kind])
    for name, size in beside.items():
        table.add_row(name, "-", _size(size), "-")
    row("all", stages, sum(beside.values()))
    terminal.out().print(table)


def rm(
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE...",
            help="As ls prints them: the digits at the end, or the folder's name.",
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
    unneeded: Annotated[
        bool, typer.Option("--unneeded", help="All that no kept study needs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only say what.")] = False,
) -> None:
    """Delete stages that no kept study needs; without --yes it only says which."""
    from midstream.cli.catalogue import stored_name
    from midstream.cost.graph import removable, remove_stages
    from midstream.cost.graph import unneeded as unneeded_stages
    from midstream.study.store import Ledger

    ledger = Ledger(store)
    names = list(dict.fromkeys(stored_name(ledger, stage) for stage in stages or ()))
    if unneeded:
        names += [one.name for one in unneeded_stages(ledger) if one.name not in names]
    if not names and not unneeded:
        raise ValueError("name stages, or give --unneeded")
    if yes:
        freed = remove_stages(ledger, names)
        typer.echo(f"deleted {counted(len(names), 'stage')}, {_size(freed)}")
        return
    for one in removable(ledger, names):
        typer.echo(f"{one.label} {_size(one.num_bytes)}")
    typer.echo(f"{counted(len(names), 'stage')} would go; say --yes to delete them")


def forget(
    study: Annotated[str, typer.Argument(help="A study of the store.")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Stop keeping a study: its stages stay until `rm --unneeded --yes`."""
    from midstream.cost.graph import forget_study
    from midstream.study.store import Ledger

    forget_study(Ledger(store), study)
    typer.echo(f"{study} is forgotten; what it alone needed may now be removed")


def verify(store: Store = DEFAULT_STORE) -> None:
    """Read every stored file against its checksum; ends with 1 where one differs."""
    from midstream.cost.graph import check
    from midstream.launch import terminal
    from midstream.study.store import Ledger

    found = check(Ledger(store))
    typer.echo(
        f"{counted(found.num_stages, 'done stage')}, {counted(found.num_folders, 'folder')} with "
        f"checksums, {_size(found.num_bytes)}: {counted(len(found.problems), 'problem')}"
    )
    for stage, problem in found.problems:
        terminal.error(f"{stage}: {problem}")
    if found.problems:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., None]] = {
    "ls": ls,
    "du": du,
    "rm": rm,
    "forget": forget,
    "verify": verify,
}


def _size(num_bytes: int) -> str:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.1f} {unit}"
    return f"{num_bytes} B"


DEFAULT_CURVES = 12


def report(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY...",
            help="Recipes (pocket.when_images_arrive), my_file.py:function, or suites of them.",
        ),
    ],
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    scale: ScaleName = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a summary of all of them."),
    ] = None,
    curves: Annotated[
        int, typer.Option(min=0, metavar="N", help="How many stages have their loss drawn.")
    ] = DEFAULT_CURVES,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the reports go; in the store without it."),
    ] = None,
) -> None:
    """Write a study's page, tables and figures from what is done; a suite's, and its index."""
    from midstream.cli.catalogue import last_study, with_scale
    from midstream.core.storage import require_folder, write_bytes
    from midstream.report.page import summary_text
    from midstream.study.store import Ledger

    ledger, settings = Ledger(store), with_scale(settings, scale)
    if not store.is_dir():
        raise FileNotFoundError(f"store {store} does not exist; run the study, or give its --store")
    if out is None:
        _require_room(store)
    else:
        require_folder(out, "give another --out")
    chosen = [last_study(name, ledger, settings) for name in studies]
    for _, note in chosen:
        if note is not None:
            typer.echo(note, err=True)
    found = [study for study, _ in chosen]
    facts = [one for study in found for one in write(study, ledger, curves, out)]
    if markdown is not None:
        parts = ["midstream", "report", *studies]
        parts += [part for setting in settings for part in ("--set", setting)]
        command = shlex.join([*parts, "--markdown", markdown.name])
        distinct = list({one.study.name: one for one in facts}.values())
        title = f"Results of {', '.join(study.name for study in found)}"
        write_bytes(markdown, summary_text(distinct, title, command).encode())
        typer.echo(f"summary: {markdown}")


def _require_room(store: Path) -> None:
    """Raises PermissionError with the way out where no report can be written in the store."""
    from midstream.core.storage import require_writable

    reports = store / "reports"
    try:
        require_writable(reports if reports.is_dir() else store)
    except PermissionError as error:
        raise PermissionError(f"{error}; or have the report written elsewhere: --out DIR") from None


def write(
    study: "AnyStudy", ledger: "Ledger", curves: int = DEFAULT_CURVES, out: Path | None = None
) -> "Sequence[Facts]":
    """Write a study's or suite's pages into `<store>/reports` or `out`, and print their scores."""
    from midstream.launch import terminal
    from midstream.report.gather import gather
    from midstream.report.line_rows import Snapshot
    from midstream.report.page import write_facts, write_index
    from midstream.study.studies import Suite

    snapshot = Snapshot(ledger)
    suite = study if isinstance(study, Suite) else None
    facts = []
    for one in study.studies:
        facts.append(gather(one, snapshot))
        path = write_facts(
            facts[-1], suite=None if suite is None else suite.name, max_curves=curves, out=out
        )
        terminal.print_results([row.flat() for row in facts[-1].rows], terminal.out())
        typer.echo(f"report: {path}")
    if suite is not None:
        path = write_index(suite, facts, snapshot, out)
        typer.echo(f"suite: {path}")
    return facts


def profile(
    study: StudyName,
    stage: StageName = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured.")] = 10,
    out: Annotated[Path, typer.Option(help="Where trace and page go.")] = Path("profile"),
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    scale: ScaleName = None,
    threads: Threads = 1,
    device: Device = "auto",
    others: Annotated[
        list[str] | None,
        typer.Option("--machine", metavar="NAME=VALUE", help="Any other choice of the machine."),
    ] = None,
) -> None:
    """Take some steps of a stage: a trace, and a page of speed, memory and shares of time."""
    from midstream.cli.catalogue import find_study, read_settings, training_stage, with_scale
    from midstream.config import Machine
    from midstream.launch.workers import worker_environment
    from midstream.study.store import Ledger

    chosen: dict[str, Any] = {"threads": threads, "device": device, "features": "live"}
    machine = Machine.model_validate(chosen | read_settings("--machine", others or []))
    found = training_stage(find_study(study, with_scale(settings, scale), Ledger(store)), stage)
    request = {"store": store.absolute(), "stage": found.model_dump(mode="json")}
    request |= {"machine": machine.alone().model_dump(mode="json")}
    request |= {"steps": steps, "out": out.absolute()}
    meters = work("profile", request, worker_environment(machine))
    typer.echo("\n".join(_lines(meters)))
    typer.echo(f"page: {out / 'summary.html'}\ntrace: {out / 'trace.json'}")


def _lines(found: dict[str, Any]) -> list[str]:
    """The meters as a person reads them."""
    shares = ", ".join(f"{part} {share:.0%}" for part, share in found["time_shares"].items())
    peak = f"the peak of {found['device']} is not known"
    if found["gpu"]:
        peak = f"{found['model_flops_utilisation']:.1%} of the peak of {found['gpu']}"
    owner = "GPU" if found["memory_of"] == "device" else "process"
    return [
        f"{found['tokens_per_second']:,.0f} tokens/s, {found['useful_tokens_per_second']:,.0f} "
        f"of them useful, {found['images_per_second']:,.2f} images/s",
        f"{found['model_flops_per_second'] / 1e9:,.1f} model GFLOP/s: {peak}; "
        f"{found['product_share'] or 0.0:.0%} of what a matrix product reaches here",
        f"peak memory of the {owner} {found['peak_memory_bytes'] / 2**20:,.0f} MiB",
        f"time: {shares}",
    ]


def print_summary(summary: dict[str, Any], seconds: float) -> None:
    """A finished source's counts as a table."""
    from midstream.launch import terminal

    table = Table("", "records", "examples", "tokens", "images")
    for split in ("train", "validation"):
        counts = summary[split]
        numbers = (f"{counts[key]:,}" for key in ("examples", "tokens", "images"))
        table.add_row(split, f"{summary['records']:,}" if split == "train" else "", *numbers)
    dropped = "parts left out" if summary["kind"] == "interleaved" else "turns dropped"
    for key, what in (("rejects", "rejected"), ("dropped_turns", dropped)):
        for reason, times in sorted(summary[key].items()):
            table.add_row(escape(f"{what}: {reason}"), f"{times:,}", "", "", "")
    terminal.out().print(table)
    captions, shards = summary["captions"], summary["shards"]
    if captions["synthetic"]:
        typer.echo(
            f"of the training pictures {captions['original']:,} have a caption of their own, "
            f"{captions['synthetic']:,} synthetic ones; {captions['left_out']:,} captions cannot "
            "be used and are left out"
        )
    typer.echo(
        f"{shards['kept']:,} shards kept, {shards['new']:,} new; {seconds:,.1f} s; "
        f"fingerprint {summary['fingerprint']}"
    )


# What samples that belong together have in common.
By = StrEnum("By", ["UID"])


def join_captions(
    pictures: Annotated[
        str, typer.Argument(metavar="PICTURES", help="Tars of pictures: folder, pattern or URL.")
    ],
    synthetic: Annotated[
        str, typer.Argument(metavar="SYNTHETIC", help="Tars of captions without pictures.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the joined set.")],
    by: Annotated[By, typer.Option(help="What belongs together.")] = By.UID,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core without it.")
    ] = None,
) -> None:
    """Join pictures with synthetic captions; the same command goes on where it was."""
    from midstream.core.storage import num_cores
    from midstream.launch import terminal
    from midstream.launch.workers import hub_environment

    started = time.monotonic()
    request = {"pictures": pictures, "captions": synthetic, "out": out}
    request |= {"workers": workers or num_cores()}
    counts = work("join", request, hub_environment(threads=1))
    table = Table(f"by {by}", "samples")
    for what, number in counts.items():
        table.add_row(what, f"{number:,}")
    terminal.out().print(table)
    seconds = time.monotonic() - started
    typer.echo(f"{counts['joined']:,} pictures with synthetic captions in {out}; {seconds:,.1f} s")
