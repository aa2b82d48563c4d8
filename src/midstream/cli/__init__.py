"""What several commands share: options, and the process of its own that does their work."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

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
StageName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_KIND",
        help="pretrain, continue, finetune, or how a stage's name begins; without it the first "
        "continue.",
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each process.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer.")]


def work(
    name: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Any:
    """Have a work of `launch/workers.py` done in a process of its own, since the commands import no
    torch; show how it goes, and return its result.

    Where it fails or is stopped, that is said and the command leaves with the exit code.
    """
    from midstream.launch import terminal, workers

    console = terminal.out()
    environment = dict(workers.hub_environment() if environment is None else environment)
    if not workers.WORKS[name].has_terminal:
        # It prints as this process would.
        environment["COLUMNS"] = str(console.width)
        environment |= {"FORCE_COLOR": "1"} if console.is_terminal else {}
    stage = ""
    tell: Callable[[float, str], None] = lambda done, note: None  # noqa: E731
    with ExitStack() as line:

        def show(event: workers.Event) -> None:
            nonlocal stage, tell
            # The line that changes makes room for those that stay.
            if event["event"] == "note":
                line.close()
                stage = ""
                sys.stdout.write(event["text"])
                sys.stdout.flush()
            elif event["event"] == "progress":
                if event["stage"] != stage:
                    line.close()
                    stage = event["stage"]
                    tell = line.enter_context(terminal.reporting(console, stage))
                tell(event["done"], event["note"])

        last = workers.ask(name, request, show=show, environment=environment)
    if last["event"] == "done":
        return last.get("result")
    if last["event"] == "stopped" and not workers.WORKS[name].has_terminal:
        resumes = workers.WORKS[name].resumes
        terminal.error("stopped" + ("; the same command continues where it was" * resumes))
    elif last.get("error") is not None:
        terminal.error(f"error: {last['error']}")
    raise typer.Exit(last["code"])
