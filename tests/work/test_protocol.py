"""Works as processes: what they say, how they end, and what ends them."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console

from in_process import events_of
from midstream.cli import work
from midstream.launch import terminal, workers
from midstream.launch.workers import Event, Work, ask
from midstream.study.store import Stopped
from midstream.work.protocol import Channel, Request, main


class Asked(Request):
    """Which error is raised."""

    error: str = ""


ERRORS = {
    "value": ValueError("mend it"),
    "file": FileNotFoundError("no such file"),
    "own": RuntimeError("a fault"),
    "stop": Stopped("asked to"),
    "key": KeyboardInterrupt(),
}


def fail(request: Asked, channel: Channel) -> dict[str, int]:
    """A work that prints, tells its progress and ends as it was asked to."""
    print("a line\nand", "another")
    channel.progress("part", 0.5, "half")
    print("no end", end="")
    if request.error:
        raise ERRORS[request.error]
    return {"answer": 42}


@pytest.fixture(autouse=True)
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workers.WORKS, "fail", Work(f"{__name__}:fail"))  # type: ignore[arg-type]


def test_what_a_work_prints_and_returns_are_events() -> None:
    *events, last = events_of("fail", {})
    assert "".join(one["text"] for one in events if one["event"] == "note") == (
        "a line\nand another\nno end\n"
    )
    assert {"event": "progress", "stage": "part", "done": 0.5, "note": "half"} in events
    assert last == {"event": "done", "result": {"answer": 42}, "code": 0}


@pytest.mark.parametrize(
    ("error", "event", "code", "told"),
    [
        ("value", "failed", 2, "mend it"),
        ("file", "failed", 2, "no such file"),
        ("own", "failed", 1, "RuntimeError: a fault"),
        ("stop", "stopped", 75, None),
        ("key", "stopped", 75, None),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_told_with_the_exit_code_of_its_kind(
    error: str,
    event: str,
    code: int,
    told: str | None,
    debug: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    *_, note, last = events_of("fail", {"error": error, "debug": debug})
    assert note == {"event": "note", "text": "no end\n"}
    assert (last["event"], last["code"], last.get("error")) == (event, code, told)
    shown = code == 1 or (debug and code == 2)
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_a_request_with_an_unknown_field_is_refused_with_the_nearest() -> None:
    (last,) = events_of("fail", {"eror": "x"})
    assert last["code"] == 2
    assert "did you mean 'error'?" in last["error"]


def test_an_unknown_work_is_refused_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ([], ["prepaer"], ["chat"], ["prepare", "{}"]):
        assert main(arguments) == 2
        assert "prepare" in capsys.readouterr().err


PROGRAM = """
import os, sys, time
from midstream.launch.workers import WORKS, Work
from midstream.work.protocol import Channel, Request, main

def wait(request: Request, channel: Channel) -> None:
    os.write(1, b"not on the channel")
    try:
        print("waiting")
        while not channel.stopping:
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("cleaning up")
        if sys.argv[2] == "stuck":
            time.sleep(60)
        raise

WORKS["wait"] = Work("__main__:wait", when_asked=sys.argv[1] == "asked")
sys.exit(main(["wait"]))
"""


@pytest.mark.parametrize(
    ("how", "ends", "code"),
    [
        ("at-once", ["end of input"], 75),
        ("at-once", [signal.SIGINT, signal.SIGTERM, "end of input"], 75),
        ("at-once", [signal.SIGTERM], 75),
        ("stuck", [signal.SIGINT, signal.SIGINT], -signal.SIGINT),
        ("asked", [signal.SIGINT], 0),
        ("asked", ["end of input"], 0),
    ],
)
def test_signals_and_the_end_of_input_stop_a_work(how: str, ends: list[object], code: int) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAM, how, how]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("{}\n")
        process.stdin.flush()
        events = [json.loads(process.stdout.readline())]
        for number, end in enumerate(ends):
            if isinstance(end, signal.Signals):
                process.send_signal(end)
            else:
                process.stdin.close()
            if number == 0 and how != "asked":
                events.append(json.loads(process.stdout.readline()))
        events += map(json.loads, process.stdout)
        assert process.wait() == code
        assert process.stderr is not None
        assert "not on the channel" in process.stderr.read()
    said = [one["event"] for one in events if one["event"] != "note"]
    assert said == {75: ["stopped"], 0: ["done"]}.get(code, [])
    assert (events[-1]["event"] == "note") == (code < 0)


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [("kill -9 $$", 1, "signal 9"), ("exit 3", 3, "exit code 3 and no result")],
)
def test_a_process_that_ends_without_a_word_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, code: int, told: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nread line\necho \'{{"event": "note"}}\'\n{ending}\n')
    program.chmod(0o755)
    monkeypatch.setattr(workers.sys, "executable", str(program))
    events: list[Event] = []
    last = ask("prepare", {}, show=events.append)
    assert events == [{"event": "note"}]
    assert (last["event"], last["code"]) == ("failed", code)
    assert told in last["error"]


@pytest.mark.parametrize(("name", "said"), [("prepare", "continues"), ("export", "stopped")])
def test_a_command_shows_what_its_work_says_and_leaves_as_that_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    monkeypatch.setattr(terminal, "out", lambda: Console(force_terminal=True, width=77))
    given: dict[str, str] = {}

    def asked(*_: object, show: Callable[[Event], None], environment: dict[str, str]) -> Event:
        given.update(environment)
        show({"event": "progress", "stage": "part", "done": 0.5, "note": "half"})
        show({"event": "note", "text": "told\n"})
        return {"event": "stopped", "code": 75}

    monkeypatch.setattr(workers, "ask", asked)
    with pytest.raises(typer.Exit) as left:
        work(name, {})
    assert left.value.exit_code == 75
    # The work prints as the command would.
    assert (given["COLUMNS"], given["FORCE_COLOR"]) == ("77", "1")
    shown = capsys.readouterr()
    assert "told\n" in shown.out
    assert said in shown.err
    assert ("continues where it was" in shown.err) == (name == "prepare")
