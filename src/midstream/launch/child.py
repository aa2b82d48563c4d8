"""Processes that commands start, one for each piece of work: `python -m midstream.work NAME`.

A request goes to standard input as one line of JSON, and JSON lines come back on standard output.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from midstream.config import Machine
from midstream.launch.workers import STOPPED_EXIT_CODE, worker_environment
from midstream.launch.workers import Event as Event

# What a work's last event is called, by the code that its process ends with; else "failed".
ENDS = {0: "done", STOPPED_EXIT_CODE: "stopped"}


@dataclass(frozen=True)
class Work:
    """A function of a request and a channel (`midstream.work.protocol`), as module:function.

    A work that `has_terminal` is the user's partner: its request is an argument, it prints its
    errors, and its exit code is its answer. One that stops `when_asked` does so at its next step,
    others at once. One that `resumes` goes on where it was when it is asked again.
    """

    target: str
    has_terminal: bool = False
    when_asked: bool = False
    resumes: bool = False


WORKS: Mapping[str, Work] = {
    "prepare": Work("midstream.work.read_data:prepare", resumes=True),
    "prepare-units": Work("midstream.work.read_data:prepare_units", resumes=True),
    "prepare-share": Work("midstream.work.read_data:prepare_share", resumes=True),
    "join": Work("midstream.work.read_data:join", resumes=True),
    "read-tasks": Work("midstream.work.read_data:read_tasks"),
    "show-data": Work("midstream.work.show_data:show_data"),
    "profile": Work("midstream.work.profile_stage:profile"),
    "evaluate": Work("midstream.work.evaluate_model:evaluate_all", when_asked=True, resumes=True),
    "list-tasks": Work("midstream.work.show_scores:list_tasks"),
    "show-examples": Work("midstream.work.show_scores:show_examples"),
    "show-differences": Work("midstream.work.show_scores:show_differences"),
    "score": Work("midstream.work.show_scores:score_file"),
    "import": Work("midstream.exchange.import_model:serve"),
    "export": Work("midstream.exchange.export:serve"),
    "chat": Work("midstream.chat.talk:chat", has_terminal=True),
}


def ask(
    name: str,
    request: Mapping[str, Any],
    *,
    show: Callable[[Event], None],
    environment: Mapping[str, str] | None = None,
    stderr: int | None = None,
) -> Event:
    """Have a work done in a process of its own; `show` gets its events but for the last one.

    Returns that: {"event": "done", "result"}, {"event": "failed", "error"} or {"event": "stopped"},
    with the exit "code". Ctrl-C is left to the process; the end of this one stops it as well.
    """
    work, line = WORKS[name], json.dumps(request, default=str)
    command = [sys.executable, "-m", "midstream.work", name, *([line] if work.has_terminal else [])]
    pipe = None if work.has_terminal else subprocess.PIPE
    last: Event | None = None
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=stderr,
        text=True,
        env=dict(hub_environment() if environment is None else environment),
    ) as process:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            if process.stdin is not None and process.stdout is not None:
                with suppress(BrokenPipeError):
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                for event in map(json.loads, process.stdout):
                    if event["event"] in ("done", "failed", "stopped"):
                        last = event
                    else:
                        show(event)
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    if work.has_terminal and code >= 0:
        last = {"event": ENDS.get(code, "failed"), "error": None}
    if last is None:
        how = f"signal {-code}" if code < 0 else f"exit code {code} and no result"
        last = {"event": "failed", "error": f"{name} ended with {how}; run the same again"}
    return last | {"code": code if code >= 0 else 1}


def hub_environment(threads: int | None = None) -> dict[str, str]:
    """Of a process with so many threads, or all cores; whether it asks hubs is the user's choice
    (HF_HUB_OFFLINE)."""
    found = worker_environment(Machine(threads=threads or os.cpu_count() or 1))
    if "HF_HUB_OFFLINE" not in os.environ:
        del found["HF_HUB_OFFLINE"]
    return found


def error_words(error: Exception) -> str:
    """What a person is told of an error: of wrong values a line each, with the field's path."""
    if not isinstance(error, ValidationError):
        return str(error)
    lines = []
    for item in error.errors(include_url=False):
        path = [*([] if error.title.endswith("Request") else [error.title]), *item["loc"]]
        told = ".".join(str(part) for part in path) or "request"
        lines.append(f"{told}: {item['msg'].removeprefix('Value error, ')}{_range_words(item)}")
    return "\n".join(lines)


def _range_words(item: Mapping[str, Any]) -> str:
    """The number that lies beyond a limit, and for a percentage in place of a share how it is
    written; nothing for other errors."""
    value = item["input"]
    if not item["type"].startswith(("less_than", "greater_than")):
        return ""
    number = isinstance(value, int | float)
    if number and item.get("ctx") == {"le": 1.0} and 1 < value <= 100:
        return f", not {value}; shares are from 0 to 1, {value:g} % is {value / 100:g}"
    return f", not {value}"
