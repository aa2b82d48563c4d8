"""One piece of work as a process: its request, its events, its signals and its exit code.

What a work prints is a note; {"event": "progress", "stage", "done", "note"} says how far it is.
"""

import io
import json
import os
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from inspect import signature
from pkgutil import resolve_name
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

from midstream.config import Config
from midstream.config.base import error_words
from midstream.launch import terminal
from midstream.launch.workers import REFUSED_EXIT_CODE, STOPPED_EXIT_CODE, WORKS, Work
from midstream.study.store import Stopped

# Controls that turn the direction of what follows them, beyond the text.
_TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


class Request(Config):
    """What a work is asked for; with `debug` the traceback of every error is printed."""

    debug: bool = False


class Channel:
    """Where a work's events go: as JSON lines to a stream, or its errors to the user's terminal.

    `stopping` is whether it was asked to stop.
    """

    def __init__(self, stream: io.TextIOBase | None) -> None:
        self.stream = stream
        self.stopping = False

    def say(self, event: str, **values: Any) -> None:
        """Tell whoever asked; raises KeyboardInterrupt where that process is gone."""
        if self.stream is None:
            if event == "failed":
                terminal.error(f"error: {values['error']}")
            return
        try:
            self.stream.write(json.dumps({"event": event, **values}) + "\n")
            self.stream.flush()
        except BrokenPipeError:
            # Nobody reads the rest, and the end of this process must not try to write it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            raise KeyboardInterrupt from None

    def progress(self, stage: str, done: float, note: str) -> None:
        """How far a part of the work is, a fraction and words."""
        self.say("progress", stage=stage, done=done, note=note)


class _Notes(io.TextIOBase):
    """A standard output whose whole lines are notes."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.text = channel, ""

    def write(self, text: str) -> int:
        whole, end, self.text = (self.text + text).rpartition("\n")
        if end:
            self.channel.say("note", text=whole + end)
        return len(text)

    def finish(self) -> None:
        """Say what stands on the last line, which has no end."""
        if self.text:
            self.write("\n")


def harmless(text: str) -> str:
    """Text with its control characters written out (`\\x1b`), all but line breaks and tabs.

    Those that turn the reading direction are written out too; joiners of emoji and scripts stay.
    """

    def written(character: str) -> str:
        control = unicodedata.category(character) == "Cc" and character not in "\n\t"
        turns = unicodedata.bidirectional(character) in _TURNS
        return character.encode("unicode_escape").decode() if control or turns else character

    return "".join(map(written, text))


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a line of ours; nothing in it is read as markup, or steers the terminal."""
    console.print(Text(harmless(text), style=style), soft_wrap=True)


def serve(name: str, line: str, channel: Channel) -> int:
    """Do what a request (a line of JSON) asks of a work; returns the exit code.

    That is 2 for a ValueError or OSError, which the user can put right, 75 where it was stopped, 1
    for any other error.
    """
    notes = _Notes(channel)
    printing = nullcontext() if channel.stream is None else redirect_stdout(notes)
    debug = False
    try:
        with printing:
            function = resolve_name(WORKS[name].target)
            request = signature(function).parameters["request"].annotation.model_validate_json(line)
            debug = getattr(request, "debug", False)
            try:
                result = function(request, channel)
            finally:
                notes.finish()
        channel.say("done", result=result)
    except (KeyboardInterrupt, Stopped):
        with suppress(KeyboardInterrupt):
            channel.say("stopped")
        return STOPPED_EXIT_CODE
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exception(error)
        channel.say("failed", error=error_words(error))
        return REFUSED_EXIT_CODE
    except Exception as error:
        traceback.print_exception(error)
        channel.say("failed", error=f"{type(error).__name__}: {error}")
        return 1
    return 0


def is_ours(error: Exception) -> bool:
    """Whether our own code raised it, no library on our behalf."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("midstream.")


def in_a_line(error: Exception) -> str:
    """An error's kind and text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def heed_signals(work: Work, channel: Channel) -> None:
    """SIGINT and SIGTERM stop the work; a second SIGINT ends the process."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        # What the first one ends is cleaned up in peace, whoever else says that it shall end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        channel.stopping = True
        if not work.when_asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def stop_with_parent() -> None:
    """Stop at the end of standard input: the process that asked has gone."""
    # Not through sys.stdin, whose lock a thread must not hold when the process ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """The process; its arguments are NAME, and the request of a work that `has_terminal`."""
    name, *given = arguments or [""]
    if name not in WORKS or len(given) != WORKS[name].has_terminal:
        print(f"error: give one of {', '.join(WORKS)}, and a request", file=sys.stderr)
        return REFUSED_EXIT_CODE
    if given:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return serve(name, given[0], Channel(None))
    # The channel is ours alone: what is printed by other ways than Python's goes to stderr.
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        channel = Channel(stream)
        heed_signals(WORKS[name], channel)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return STOPPED_EXIT_CODE
        threading.Thread(target=stop_with_parent, daemon=True).start()
        return serve(name, line, channel)
