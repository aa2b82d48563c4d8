"""`midstream prepare` as seen from the terminal: a process that prepares, a bar, a table."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Event = dict[str, Any]
# Where standard output is no terminal, progress is printed this often.
QUIET_SECONDS = 10.0


def prepare(request: dict[str, Any], console: Console) -> Event:
    """Prepare a source in a process of its own and show how it goes; returns its last event.

    That is "done" with the "summary" and "seconds", "failed" with the "error", or "stopped".
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "midstream.prepare_data"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    last: Event = {"event": "failed", "error": "the preparation ended without a result"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        for event in _shown(_events(process), console):
            last = event
    if last["event"] == "failed" and process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else "an error of its own"
        last["error"] = f"the preparing process ended with {how}; run the same again to go on"
    return {**last, "seconds": time.monotonic() - started}


def print_summary(summary: dict[str, Any], seconds: float, console: Console) -> None:
    """A finished source's counts as a table."""
    table = Table("", "records", "examples", "tokens", "images")
    for split in ("train", "validation"):
        counts = summary[split]
        numbers = (f"{counts[key]:,}" for key in ("examples", "tokens", "images"))
        table.add_row(split, f"{summary['records']:,}" if split == "train" else "", *numbers)
    for reason, times in sorted(summary["rejects"].items()):
        table.add_row(escape(f"rejected: {reason}"), f"{times:,}", "", "", "")
    for reason, times in sorted(summary["dropped_turns"].items()):
        table.add_row(escape(f"turns dropped: {reason}"), f"{times:,}", "", "", "")
    console.print(table)
    captions = summary["captions"]
    if captions["synthetic"]:
        console.print(
            f"of the training pictures {captions['original']:,} have a caption of their own, "
            f"{captions['synthetic']:,} synthetic ones; {captions['left_out']:,} captions cannot "
            "be used and are left out",
            soft_wrap=True,
            highlight=False,
        )
    shards = summary["shards"]
    console.print(
        f"{shards['kept']:,} shards kept, {shards['new']:,} new; {seconds:,.1f} s; "
        f"fingerprint {summary['fingerprint']}",
        soft_wrap=True,
        highlight=False,
    )


def _events(process: "subprocess.Popen[str]") -> Iterator[Event]:
    """What the process tells; Ctrl-C reaches it as well, and a second one ends it."""
    assert process.stdout is not None
    interrupted = False
    while True:
        try:
            line = process.stdout.readline()
        except KeyboardInterrupt:
            if interrupted:
                process.kill()
            interrupted = True
            continue
        if not line:
            return
        yield json.loads(line)


def _shown(events: Iterator[Event], console: Console) -> Iterator[Event]:
    """Show progress and notices; yields the other events."""
    told = 0.0
    columns = (
        TextColumn("preparing"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=1.0)
        for event in events:
            if event["event"] == "notice":
                console.print(event["note"], markup=False, highlight=False, soft_wrap=True)
                continue
            if event["event"] != "progress":
                yield event
                continue
            bars.update(task, completed=event["done"], description=escape(event["note"]))
            if not console.is_terminal and time.monotonic() - told >= QUIET_SECONDS:
                told = time.monotonic()
                text = f"{time.strftime('%H:%M:%S')} {event['done']:.0%} {event['note']}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
