"""`midstream status` and `midstream logs`: how far studies and stages are, from the store alone."""

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from midstream.options import DEFAULT_STORE, ScaleName, Settings, Store

if TYPE_CHECKING:
    from midstream.study.overview import Board, Overview

# Lines of metrics.jsonl that `logs` shows.
METRICS_LINES = 5
FOLLOW_SECONDS = 1.0


def status(
    study: Annotated[
        str | None, typer.Argument(help="All studies of the store without it.")
    ] = None,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    scale: ScaleName = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again and again, until nothing runs any more.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every stage as JSON, a line a look.")
    ] = False,
) -> None:
    """Show how far the studies of a store are: every stage that runs, and the time that is left."""
    from midstream import terminal
    from midstream.catalogue import last_study, with_scale
    from midstream.study.ledger import Ledger
    from midstream.study.overview import Board

    ledger = Ledger(store)
    terminal.tell_older(ledger)
    names = ledger.study_names() if study is None else [study]
    if not names:
        raise FileNotFoundError(f"store {store} holds no study; run one, or give another --store")
    chosen = [last_study(name, ledger, with_scale(settings, scale)) for name in names]
    for note in (one.note for one in chosen if one.note is not None):
        typer.echo(note, err=True)
    boards = [Board(one.study, ledger) for one in chosen]
    if watch:
        try:
            _watch(boards, every, as_json, time.sleep)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
    elif as_json:
        _print_json([board.look() for board in boards])
    else:
        _print(boards)


def _print(boards: Sequence["Board"]) -> None:
    from midstream import terminal
    from midstream.show_status import overview_table, print_reasons

    console = terminal.out()
    for board in boards:
        seen = board.look()
        console.print(overview_table(seen, console.width))
        folders = {name: str(board.ledger.folder(stage)) for name, stage in board.stages.items()}
        print_reasons(seen, folders, console)


def _print_json(seen: Sequence["Overview"]) -> None:
    from midstream.study.overview import overview_json

    typer.echo(json.dumps({"studies": [overview_json(one) for one in seen]}))


def _watch(
    boards: Sequence["Board"], every: float, as_json: bool, sleep: Callable[[float], None]
) -> None:
    """Show the boards until all is settled, or until what ran when it was looked at has ended."""
    from rich.console import Group
    from rich.live import Live

    from midstream import terminal
    from midstream.show_status import overview_table, totals

    console = terminal.out()
    live = Live(console=console, auto_refresh=False)
    lively = console.is_terminal and not as_json
    if lively:
        live.start()
    said: list[str] = []
    was_active = False
    try:
        while True:
            seen = [board.look() for board in boards]
            if as_json:
                _print_json(seen)
            elif lively:
                room = max(console.height // len(seen), 1)
                tables = (overview_table(one, console.width, room) for one in seen)
                live.update(Group(*tables), refresh=True)
            elif (lines := [f"{one.study}: {totals(one)}" for one in seen]) != said:
                said = lines
                for line in lines:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            active = any(one.active for one in seen)
            if not active and (was_active or all(one.settled for one in seen)):
                break
            was_active = active
            sleep(every)
    finally:
        live.stop()
    if not as_json and not all(one.settled for one in seen):
        terminal.out().print("nothing runs any more; midstream run goes on where it was")


def logs(
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE", help="Its first digits, or how its folder's name begins."),
    ],
    store: Store = DEFAULT_STORE,
    lines: Annotated[int, typer.Option(min=1, help="How many of the log's last lines.")] = 40,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what is added, until the stage ends.")
    ] = False,
) -> None:
    """Show a stage's state and error, its last steps, and what its process printed."""
    from midstream.study.choose import stored_stage
    from midstream.study.label import label
    from midstream.study.ledger import Ledger
    from midstream.study.progress import metrics_tail
    from midstream.study.stage_log import StageLog

    ledger = Ledger(store)
    found = stored_stage(ledger, stage)
    seen = ledger.status(found)
    typer.echo(f"{label(found)}: {ledger.folder(found)} is {seen['state']}")
    for key in ("error", "started", "ended", "host", "pid"):
        if seen.get(key) is not None:
            typer.echo(f"{key}: {seen[key]}")
    for line in metrics_tail(ledger.folder(found), METRICS_LINES):
        typer.echo(json.dumps(line))
    log = StageLog(ledger, found)
    typer.echo(log.describe())
    for text in log.tail(lines):
        typer.echo(text)
    if not follow:
        return
    try:
        while ledger.state(found) == "running":
            time.sleep(FOLLOW_SECONDS)
            for text in log.more():
                typer.echo(text)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    for text in log.more():
        typer.echo(text)
    end = ledger.status(found)
    typer.echo(f"{end['state']}" + (f": {end['error']}" if end.get("error") else ""))


COMMANDS: dict[str, Callable[..., None]] = {"status": status, "logs": logs}
