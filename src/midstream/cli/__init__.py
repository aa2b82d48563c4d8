"""Options that several commands have: the study, its arguments, the store."""

from pathlib import Path
from typing import Annotated

import typer

StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A recipe (pocket.when_images_arrive) or my_file.py:function."
    ),
]
Store = Annotated[Path, typer.Option(help="The folder that holds every stage once.")]
DEFAULT_STORE = Path("runs")
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An argument of the recipe; may be repeated."),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read every data file again, known to the store or not.")
]
ScaleName = Annotated[
    str | None, typer.Option("--scale", metavar="NAME", help="Short for --set scale=NAME.")
]
