"""The commands. Whatever is slow to import is imported by the command that needs it."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from midstream import __version__, eval_commands, store_commands
from midstream.model_commands import COMMANDS
from midstream.plan_command import plan
from midstream.profile_command import profile

if TYPE_CHECKING:
    from midstream.config import Machine
    from midstream.study.ledger import Ledger
    from midstream.study.studies import AnyStudy

Arguments = ParamSpec("Arguments")
USER_ERROR_EXIT_CODE = 2
DEMO_STUDY = "pocket.when_images_arrive"

app = typer.Typer(
    help="When, and how, should a language model first see images?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A recipe (pocket.when_images_arrive) or my_file.py:function."
    ),
]
Store = Annotated[Path, typer.Option(help="The folder that holds every stage once.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An argument of the recipe; may be repeated."),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that run stages side by side.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each process.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Features = Annotated[
    str, typer.Option(help="Frozen encoders' outputs: stored, live, or auto where storing pays.")
]
MaxFeatureGib = Annotated[float, typer.Option(min=0.0, help="auto stores no more than this.")]
DEFAULT_STORE = Path("runs")


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


def user_errors(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn what a user can put right into one red message and exit code 2."""

    @wraps(command)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as reason:
            from pydantic import ValidationError

            from midstream.terminal import error

            text = str(reason)
            if isinstance(reason, ValidationError):
                text = "\n".join(
                    ".".join(str(part) for part in (reason.title, *item["loc"]))
                    + f": {item['msg'].removeprefix('Value error, ')}"
                    for item in reason.errors(include_url=False)
                )
            error(f"error: {text}")
            raise typer.Exit(USER_ERROR_EXIT_CODE) from None

    return checked


@app.command()
@user_errors
def run(
    study: StudyName,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    workers: Workers = 2,
    threads: Threads = 1,
    device: Device = "auto",
    data_workers: Annotated[
        int, typer.Option(min=0, help="Processes that load rows ahead of each training process.")
    ] = 0,
    features: Features = "auto",
    max_feature_gib: MaxFeatureGib = 64.0,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that train one stage together on this machine.")
    ] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that train one stage together.")] = 1,
    node: Annotated[int, typer.Option(min=0, help="Which of them this is; 0 launches.")] = 0,
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
) -> None:
    """Run the stages of a study that are not done; continue those that were stopped."""
    from midstream.catalogue import find_study, read_settings
    from midstream.config import Machine
    from midstream.study.ledger import Ledger

    chosen = {"workers": workers, "threads": threads, "device": device, "features": features}
    chosen |= {"data_workers": data_workers, "max_feature_gib": max_feature_gib}
    chosen |= {"ranks": ranks, "nodes": nodes, "node": node, "master": master}
    if nodes > 1:
        chosen["workers"] = 1
    machine = Machine.model_validate(chosen | read_settings("--machine", others or []))
    found, ledger = find_study(study, settings or []), Ledger(store)
    if machine.node:
        from midstream.study.nodes import join

        raise typer.Exit(join(ledger.store, machine, typer.echo))
    _run(found, ledger, machine)


@app.command()
@user_errors
def status(
    study: Annotated[
        str | None, typer.Argument(help="All studies of the store without it.")
    ] = None,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
) -> None:
    """Show how far the studies of a store are."""
    from midstream import terminal
    from midstream.study.graph import plan as plan_study
    from midstream.study.ledger import Ledger

    ledger = Ledger(store)
    names = ledger.study_names() if study is None else [study]
    if not names:
        raise FileNotFoundError(f"store {store} holds no study; run one, or give another --store")
    for name in names:
        work = plan_study(_stored_study(name, ledger, settings or []), ledger)
        terminal.print_states(work, ledger, terminal.out())


@app.command()
@user_errors
def report(study: StudyName, store: Store = DEFAULT_STORE, settings: Settings = None) -> None:
    """Write a study's page, table and figures from what is done."""
    from midstream.study.ledger import Ledger

    ledger = Ledger(store)
    _report(_stored_study(study, ledger, settings or []), ledger)


class Section(StrEnum):
    """What `midstream prepare` makes a source of."""

    TEXT = "text"
    CAPTIONS = "captions"
    CONVERSATIONS = "conversations"


class Caption(StrEnum):
    """Which of a picture's captions is taken."""

    ORIGINAL = "original"
    SYNTHETIC = "synthetic"
    RANDOM = "random"


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
    text_key: Annotated[str, typer.Option(help="The field or column of a text.")] = "text",
    caption: Annotated[
        Caption, typer.Option(help="Which caption; random: one of the synthetic ones.")
    ] = Caption.ORIGINAL,
    images: Annotated[
        str | None, typer.Option(help="Where picture names start, if not beside their list.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the random captions.")] = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave longer captions and conversations out, as rejects."),
    ] = None,
    max_rejects: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The share of bad records that is let pass.")
    ] = 0.001,
    validation: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="The share of records that is held out.")
    ] = 0.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core without it.")
    ] = None,
) -> None:
    """Turn public formats into a prepared source; the same command goes on where it was."""
    from midstream import prepare_command, terminal
    from midstream.study.launch import STOPPED_EXIT_CODE

    options = {"text_key": text_key, "caption": caption, "images": images, "seed": seed}
    options["max_tokens"] = max_tokens
    request = {"section": section, "sources": sources, "out": str(out), "tokenizer": tokenizer}
    limits = {"max_rejects": max_rejects, "validation": validation}
    cores = workers or os.cpu_count() or 1
    last = prepare_command.prepare(
        request | limits | {"options": options, "workers": cores}, terminal.out()
    )
    if last["event"] == "failed":
        terminal.error(f"error: {last['error']}")
        raise typer.Exit(1)
    if last["event"] == "stopped":
        terminal.error("stopped; the same command continues where it was")
        raise typer.Exit(STOPPED_EXIT_CODE)
    prepare_command.print_summary(last["summary"], last["seconds"], terminal.out())


@app.command("show-data")
@user_errors
def show_data(
    study: StudyName,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_KIND",
            help="pretrain, continue, finetune, or how a stage's name begins; without it the "
            "first continue.",
        ),
    ] = None,
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
) -> None:
    """Print a row of a training stage as a person reads it, or what its rows hold."""
    from midstream.catalogue import find_study
    from midstream.config import Machine
    from midstream.study.choose import training_stage
    from midstream.study.workers import worker_environment

    shown = training_stage(find_study(study, settings or []), stage)
    remedy = ["midstream", "run", study, "--store", str(store)]
    remedy += [part for setting in settings or [] for part in ("--set", setting)]
    command = [sys.executable, "-m", "midstream.show_data", "--store", str(store)]
    command += ["--out", str(out), "--remedy", shlex.join(remedy)]
    command += ["--prepare"] if prepare else []
    command += ["--stats", str(rows)] if stats else []
    command += [] if stats and row is None else ["--row", str(row or 0)]
    # A process of its own, as the launcher's workers are: the commands import no torch.
    ended = subprocess.run(
        command, input=shown.model_dump_json().encode(), env=worker_environment(Machine())
    )
    if ended.returncode:
        raise typer.Exit(ended.returncode)


@app.command()
@user_errors
def demo(
    store: Store = DEFAULT_STORE / "demo",
    workers: Workers = 2,
    threads: Threads = 1,
    device: Device = "auto",
) -> None:
    """Run the pocket study from generated data to its report, on two CPU cores in minutes."""
    from midstream import terminal
    from midstream.catalogue import find_study
    from midstream.config import Machine
    from midstream.study.ledger import Ledger

    start = time.monotonic()
    study, ledger = find_study(DEMO_STUDY, []), Ledger(store)
    machine = Machine.model_validate({"workers": workers, "threads": threads, "device": device})
    peak_bytes = _run(study, ledger, machine)
    _report(study, ledger)
    text = f"wall time {time.monotonic() - start:,.1f} s"
    if peak_bytes:
        text += f", peak memory {peak_bytes / 2**30:.2f} GiB (sum over the workers)"
    terminal.out().print(text)


OTHERS: dict[str, Callable[..., None]] = {"plan": plan, "profile": profile}
for command_name, command_of in {**COMMANDS, **eval_commands.COMMANDS, **OTHERS}.items():
    app.command(command_name)(user_errors(command_of))


store_app = typer.Typer(
    help="What a store holds, which studies need it; delete and verify.", no_args_is_help=True
)
for store_name, store_command in store_commands.COMMANDS.items():
    store_app.command(store_name)(user_errors(store_command))
app.add_typer(store_app, name="store")


def _stored_study(name: str, ledger: "Ledger", settings: list[str]) -> "AnyStudy":
    """The study last run in the store under this name, else the recipe's."""
    from midstream.catalogue import find_study

    if not settings and name in ledger.study_names():
        return ledger.load_study(name)
    return find_study(name, settings)


def _run(study: "AnyStudy", ledger: "Ledger", machine: "Machine") -> int:
    """Run and tell; returns the peak memory in bytes. Leaves with the outcome's code if not 0."""
    from midstream import terminal
    from midstream.study import launch
    from midstream.study.graph import plan as plan_study

    memory = terminal.PeakMemory()
    console = terminal.out()
    with terminal.progress(console) as show:

        def on_event(event: dict[str, Any]) -> None:
            memory.note(event)
            show(event)

        outcome = launch.run(study, ledger, machine, on_event)
    counts = (outcome.num_done, outcome.num_failed, outcome.num_stopped, outcome.num_skipped)
    if not any(counts):
        console.print(
            f"nothing to do: all {outcome.num_before} stages of {study.name} are done "
            f"({ledger.store})",
            soft_wrap=True,
        )
        return 0
    done, failed, stopped, skipped = counts
    console.print(
        f"{study.name}: {done} stages done now, {outcome.num_before} before, {failed} failed, "
        f"{stopped} stopped, {skipped} not started",
        soft_wrap=True,
    )
    for message in outcome.messages:
        terminal.error(message)
    if outcome.exit_code:
        if outcome.interrupted:
            terminal.error("stopped; the same command continues where it was")
        raise typer.Exit(outcome.exit_code)
    return memory.total_bytes(plan_study(study, ledger), ledger)


def _report(study: "AnyStudy", ledger: "Ledger") -> None:
    from midstream import terminal
    from midstream.report.page import write_report
    from midstream.report.table import line_rows

    console = terminal.out()
    for one in study.studies:
        path = write_report(one, ledger)
        terminal.print_results(line_rows(one, ledger), console)
        console.print(f"report: {path}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(app())
