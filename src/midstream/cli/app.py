"""The commands. Whatever is slow to import is imported by the command that needs it."""

import io
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand, TyperGroup

from midstream import __version__
from midstream.cli import (
    DEFAULT_STORE,
    Device,
    ScaleName,
    Settings,
    StageName,
    Store,
    StudyName,
    Threads,
    model_commands,
    run_commands,
    store_commands,
    work,
)
from midstream.cli.plan_command import plan

Arguments = ParamSpec("Arguments")
USER_ERROR_EXIT_CODE = 2
DEMO_STUDY = "pocket.when_images_arrive"

# Where the shell leaves ~/ as it is: behind = or a comma, and in quotes.
_HOME = re.compile(r"""(?:(?<=[=,\["'])|\A)~(?=/|\Z)""")


# Options that say something of another one alone.
GO_WITH = {"port": "web", "wrong": "show", "max_seeds": "decide", "rows": "stats", "every": "watch"}


class Command(TyperCommand):
    """A command; an option without the one that it goes with ends it."""

    def invoke(self, ctx: Any) -> Any:
        """Look at what was given, then run."""
        for option, other in GO_WITH.items():
            source = ctx.get_parameter_source(option)
            given = source is not None and source.name == "COMMANDLINE"
            if given and other in ctx.params and not ctx.params[other]:
                ctx.fail(f"--{option.replace('_', '-')} goes with --{other}")
        return super().invoke(ctx)


class Commands(TyperGroup):
    """The commands; ~/ is the home folder wherever it begins a name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments as the commands see them."""
        home = os.path.expanduser("~")
        return super().parse_args(ctx, [_HOME.sub(lambda _: home, text) for text in args])


app = typer.Typer(
    cls=Commands,
    help="When, and how, should a language model first see images?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"midstream {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """When, and how, should a language model first see images?"""
    # In another locale than one of UTF-8 a mark that it lacks ends no command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def user_errors(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn what a user can put right into one red message and exit code 2."""

    @wraps(command)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        """The command; its errors for users end the program with their text."""
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # `| head` has read enough, as click knows
            raise
        except (ValueError, OSError) as reason:
            from midstream.config.base import error_words
            from midstream.launch.terminal import error

            error(f"error: {error_words(reason)}")
            raise typer.Exit(USER_ERROR_EXIT_CODE) from None

    return checked


# What `midstream prepare` makes a source of; what goes out of a document with a picture that is
# lost; a kind of caption that every picture must have.
Section = StrEnum("Section", ["TEXT", "CAPTIONS", "CONVERSATIONS", "DOCUMENTS"])
Lost = StrEnum("Lost", ["PICTURE", "TEXT", "DOCUMENT"])
Required = StrEnum("Required", ["ORIGINAL", "SYNTHETIC"])


@app.command()
@user_errors
def prepare(
    section: Annotated[Section, typer.Argument(metavar="KIND", help="What the records are.")],
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC...", help="Files, folders, patterns or URLs.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the prepared source.")],
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME_OR_FILE", help="A hub name, or a tokenizer file or folder.")
    ],
    begin_of_text: Annotated[
        str,
        typer.Option(
            metavar="TOKEN",
            help="What begins each example: a token, none, or the tokenizer's rule.",
        ),
    ] = "rule",
    text_key: Annotated[str, typer.Option(help="The field or column of a text.")] = "text",
    require: Annotated[
        Required | None,
        typer.Option(help="Leave pictures without this kind of caption out, as rejects."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Where picture names start, if not beside their list.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="What is read of a list of several splits, such as train+restval."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave longer records, but texts, out as rejects."),
    ] = None,
    lost: Annotated[
        Lost, typer.Option(help="What goes out of a document with a lost picture.")
    ] = Lost.PICTURE,
    similarity: Annotated[
        float | None, typer.Option(help="Leave pictures of MMC4 out that are less like their text.")
    ] = None,
    rating: Annotated[
        int | None, typer.Option(help="Leave pairs of FineVision with a lower rating out.")
    ] = None,
    max_rejects: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The share of bad records that is let pass.")
    ] = 0.001,
    validation: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="The share of records that is held out.")
    ] = 0.0,
    copy: Annotated[
        bool, typer.Option("--copy", help="Keep the pictures too, not only where they lie.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core without it.")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Have it done by jobs of a Slurm cluster.")
    ] = False,
    slurm_file: run_commands.SlurmFile = None,
    slurm_sets: run_commands.SlurmSets = None,
) -> None:
    """Turn public formats into a prepared source; the same command goes on where it was."""
    given = locals()
    from midstream.core.storage import num_cores
    from midstream.launch.slurm_job import require_no_jobs
    from midstream.launch.workers import hub_environment

    cluster = run_commands.slurm_settings(slurm, slurm_file, slurm_sets or [])
    if cluster is not None and workers is not None:
        raise ValueError("--workers is for this machine; with --slurm, --slurm-set cpus=N")
    if cluster is None:
        require_no_jobs(out)
    started = time.monotonic()
    asked = "section sources out tokenizer begin_of_text max_rejects validation"
    options = "text_key require images split max_tokens lost similarity rating"
    request = {name: given[name] for name in asked.split()} | {"copy_pictures": copy}
    request |= {"options": {name: given[name] for name in options.split()}}
    request |= {"workers": workers or num_cores()}
    request |= {"slurm": None if cluster is None else cluster.model_dump(mode="json")}
    summary = work("prepare", request, hub_environment(threads=1))
    store_commands.print_summary(summary, time.monotonic() - started)


@app.command("show-data", cls=Command)
@user_errors
def show_data(
    study: StudyName,
    stage: StageName = None,
    row: Annotated[
        int | None, typer.Option(help="The row to print, from 0; the first one without --stats.")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print the mixture, planned against realised.")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="How many rows --stats reads.")] = 256,
    out: Annotated[Path, typer.Option(help="Where a row's pictures go.")] = Path("show-data"),
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Prepare the data first where that is not done.")
    ] = False,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    scale: ScaleName = None,
) -> None:
    """Print a row of a training stage as a person reads it, or what its rows hold."""
    from midstream.cli.catalogue import find_study, training_stage, with_scale
    from midstream.config import Machine
    from midstream.launch.workers import worker_environment
    from midstream.study.store import Ledger

    arguments = with_scale(settings, scale)
    shown = training_stage(find_study(study, arguments, Ledger(store)), stage)
    remedy = ["midstream", "run", study, "--store", str(store)]
    remedy += [part for setting in arguments for part in ("--set", setting)]
    request = {"store": store, "stage": shown.model_dump(mode="json"), "out": out}
    request |= {"row": None if stats and row is None else row or 0}
    request |= {"stats": rows if stats else None}
    request |= {"prepare": prepare, "remedy": shlex.join(remedy)}
    work("show-data", request, worker_environment(Machine()))


@app.command()
@user_errors
def demo(
    store: Store = DEFAULT_STORE / "demo",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that run stages side by side.")
    ] = 2,
    threads: Threads = 1,
    device: Device = "auto",
) -> None:
    """Run the pocket study from generated data to its report, on two CPU cores in minutes."""
    from midstream.cli.catalogue import find_study
    from midstream.config import Machine
    from midstream.study.store import Ledger

    start = time.monotonic()
    study, ledger = find_study(DEMO_STUDY, []), Ledger(store)
    machine = Machine.model_validate({"workers": workers, "threads": threads, "device": device})
    peak_bytes = run_commands.run_and_tell(study, ledger, machine, {"retry": True})
    store_commands.write(study, ledger)
    text = f"wall time {time.monotonic() - start:,.1f} s"
    if peak_bytes:
        text += f", peak memory {peak_bytes / 2**30:.2f} GiB (sum over the workers)"
    typer.echo(text)


ALL_COMMANDS: dict[str, Callable[..., None]] = {
    **model_commands.COMMANDS,
    **run_commands.COMMANDS,
    "plan": plan,
    "run": run_commands.run,
    "profile": store_commands.profile,
    "report": store_commands.report,
}
for command_name, command_of in ALL_COMMANDS.items():
    app.command(command_name, cls=Command)(user_errors(command_of))


join_app = typer.Typer(help="Join sets of data that belong together.", no_args_is_help=True)
join_app.callback()(lambda: None)  # so that one command alone keeps its name
join_app.command("captions")(user_errors(store_commands.join_captions))
app.add_typer(join_app, name="join")

store_app = typer.Typer(
    help="What a store holds, which studies need it; delete and verify.", no_args_is_help=True
)
for store_name, store_command in store_commands.COMMANDS.items():
    store_app.command(store_name)(user_errors(store_command))
app.add_typer(store_app, name="store")


if __name__ == "__main__":
    sys.exit(app())
