"""`midstream report`: pages, tables and figures of studies from what their store holds."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from midstream.options import DEFAULT_STORE, ScaleName, Settings, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from midstream.report.gather import Facts
    from midstream.study.ledger import Ledger
    from midstream.study.studies import AnyStudy

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
        Path | None, typer.Option(metavar="FILE", help="Also write a summary of all of them.")
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
    from midstream.catalogue import last_study, with_scale
    from midstream.report.markdown import summary_text
    from midstream.storage import write_bytes
    from midstream.study.ledger import Ledger

    ledger, settings = Ledger(store), with_scale(settings, scale)
    if out is None:
        _require_room(store)
    chosen = [last_study(name, ledger, settings) for name in studies]
    for note in (one.note for one in chosen if one.note is not None):
        typer.echo(note, err=True)
    found = [one.study for one in chosen]
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
    from midstream.storage import require_writable

    reports = store / "reports"
    try:
        require_writable(reports if reports.is_dir() else store)
    except PermissionError as error:
        raise PermissionError(f"{error}; or have the report written elsewhere: --out DIR") from None


def write(
    study: "AnyStudy", ledger: "Ledger", curves: int = DEFAULT_CURVES, out: Path | None = None
) -> "Sequence[Facts]":
    """Write the pages of a study or suite, print their scores, and return what they say.

    They go to `<store>/reports`, or to `out`.
    """
    from midstream import terminal
    from midstream.report.gather import gather
    from midstream.report.page import write_facts
    from midstream.report.parts import Snapshot
    from midstream.report.suite import write_index
    from midstream.study.studies import Suite

    console, snapshot = terminal.out(), Snapshot(ledger)
    suite = study if isinstance(study, Suite) else None
    facts = []
    for one in study.studies:
        facts.append(gather(one, snapshot))
        path = write_facts(
            facts[-1], suite=None if suite is None else suite.name, max_curves=curves, out=out
        )
        terminal.print_results(facts[-1].rows, console)
        console.print(f"report: {path}", soft_wrap=True, markup=False)
    if suite is not None:
        path = write_index(suite, facts, snapshot, out)
        console.print(f"suite: {path}", soft_wrap=True, markup=False)
    return facts
