"""Works of `midstream.work` done in the test's own process, which has imported torch already."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from midstream.launch import workers
from midstream.work import protocol


def events_of(name: str, request: Mapping[str, Any]) -> list[workers.Event]:
    """All that a work says; the last event has the exit code."""
    stream = io.StringIO()
    line = json.dumps(request, default=str)
    code = protocol.serve(name, line, protocol.Channel(stream))
    *events, last = map(json.loads, stream.getvalue().splitlines())
    return [*events, last | {"code": code}]


def ask_here(
    name: str, request: Mapping[str, Any], *, show: Callable[[workers.Event], None], **_: object
) -> workers.Event:
    """`launch.workers.ask` without a process."""
    *events, last = events_of(name, request)
    for event in events:
        show(event)
    return last


def stay_here(patch: pytest.MonkeyPatch) -> None:
    """From now on commands do their work in this process."""
    patch.setattr(workers, "ask", ask_here)
    patch.setattr("os.cpu_count", lambda: 1)
