"""Works of `midstream.work` done in the test's own process, which has imported torch already."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from midstream.launch import child
from midstream.work import protocol


def events_of(name: str, request: Mapping[str, Any]) -> list[child.Event]:
    """All that a work says; the last event has the exit code."""
    stream = io.StringIO()
    line = json.dumps(request, default=str)
    code = protocol.serve(name, line, protocol.Channel(stream))
    *events, last = map(json.loads, stream.getvalue().splitlines())
    return [*events, last | {"code": code}]


def ask_here(
    name: str, request: Mapping[str, Any], *, show: Callable[[child.Event], None], **_: object
) -> child.Event:
    """`launch.child.ask` without a process."""
    *events, last = events_of(name, request)
    for event in events:
        show(event)
    return last


def stay_here(patch: pytest.MonkeyPatch) -> None:
    """From now on commands do their work in this process."""
    patch.setattr(child, "ask", ask_here)
    patch.setattr("os.cpu_count", lambda: 1)
