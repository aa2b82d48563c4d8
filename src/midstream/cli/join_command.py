"""`midstream join captions`."""

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from midstream.cli import work


class By(StrEnum):
    """What samples that belong together have in common."""

    UID = "uid"


def captions(
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
    from midstream.launch import terminal
    from midstream.launch.child import hub_environment

    started = time.monotonic()
    request = {"pictures": pictures, "captions": synthetic, "out": out}
    request |= {"workers": workers or os.cpu_count() or 1}
    counts = work("join", request, hub_environment(threads=1))
    table = Table(f"by {by}", "samples")
    for what, number in counts.items():
        table.add_row(what, f"{number:,}")
    terminal.out().print(table)
    seconds = time.monotonic() - started
    typer.echo(f"{counts['joined']:,} pictures with synthetic captions in {out}; {seconds:,.1f} s")
