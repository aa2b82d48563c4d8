"""The work of `midstream chat`: in a terminal, on a page, or for scripts that write questions."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console

from midstream.chat.session import ChatSession, ChatSettings, caution, describe
from midstream.chat.web_page import Page, require_gradio, serve
from midstream.config import Machine
from midstream.train.parallel import set_up
from midstream.work.open_model import open_model
from midstream.work.protocol import Channel, harmless, print_line

QUIT = "/quit"
HELP = """\
/image FILE ...  start anew with pictures; /image alone: with none
/reset           start anew with the same pictures
/help            these lines
/quit            end the chat; so does Ctrl-D, while Ctrl-C stops an answer
The first question says with <image> where a picture stands; else they stand before it.
A question may begin with a slash if there is a space before it."""


class ChatRequest(ChatSettings):
    """The arguments of `midstream chat`."""

    checkpoint: Path
    image: tuple[Path, ...] = ()
    web: bool = False
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def chat(request: ChatRequest, channel: Channel) -> None:
    """Open the model and chat; ValueError or OSError for what is refused."""
    if request.web:
        require_gradio()
    place = set_up(Machine(threads=os.cpu_count() or 1, device=request.device))
    opened = open_model(request.checkpoint, place.device)
    about = describe(opened)
    if (warning := caution(opened)) is not None:
        about.append(warning)
    session = ChatSession(opened, request)
    # Refuses a picture that cannot be shown before anything is said or served.
    session.show(*request.image)
    console, notes = Console(), Console(stderr=True)
    for line in about:
        print_line(console if request.web or sys.stdin.isatty() else notes, line, "dim")
    if request.web:
        page = Page(opened, request, about, request.image)
        serve(
            page, request.port, lambda address: print_line(console, f"{address}  (Ctrl-C ends it)")
        )
    elif not sys.stdin.isatty():
        answer_lines(session, sys.stdin, console, notes)
    else:
        # With it, `input` edits lines and remembers them.
        with suppress(ImportError):
            import readline  # noqa: F401
        print_line(console, "/help lists the commands", "dim")
        converse(session, console, input)


def converse(session: ChatSession, console: Console, read: Callable[[str], str]) -> None:
    """Answer what `read` gives until it raises EOFError or gives /quit.

    `read` is `input` or the like. What is refused is said, and the conversation goes on.
    """
    while True:
        try:
            line = read("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            print_line(console, "\nCtrl-D or /quit ends the chat", "dim")
            continue
        if line.strip() == QUIT:
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                print_line(console, obey(session, line), "dim")
            else:
                _print_answer(session, line, console)
        except (ValueError, OSError) as reason:
            print_line(console, str(reason), "red")


def answer_lines(
    session: ChatSession, lines: Iterable[str], console: Console, notes: Console
) -> None:
    """Answer each line with one line on `console`, commands obeyed; stops behind /quit.

    Line breaks in an answer become `\\n`; what else there is to say goes to `notes`.
    Raises ValueError with the line's number for what is refused, an empty line among it.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip() == QUIT:
            return
        try:
            if line.startswith("/"):
                print_line(notes, obey(session, line))
                continue
            answer = "".join(session.ask(line))
        except (ValueError, OSError) as reason:
            raise ValueError(f"line {number}: {reason}") from None
        console.out(harmless(answer).replace("\n", "\\n"), highlight=False)
        if session.cut is not None:
            print_line(notes, f"line {number}: {session.cut}")


def obey(session: ChatSession, line: str) -> str:
    """Carry out a command (a line that starts with a slash); returns what to say of it.

    Raises ValueError for an unknown one, and what `ChatSession.show` does.
    """
    command, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if command == "/image":
        names = _file_names(argument)
        session.show(*(Path(os.path.expanduser(name)) for name in names))
        told = " and ".join(names)
        return f"a new conversation about {told}" if names else "a new conversation, no picture"
    if command == "/reset" and not argument:
        session.reset()
        told = " and ".join(map(str, session.pictures))
        about = f" about {told}" if told else ""
        return f"a new conversation{about}"
    if command == "/help" and not argument:
        return HELP
    raise ValueError(f"there is no command {line.strip()!r}; /help lists what there is")


def _file_names(argument: str) -> list[str]:
    """The files that are named; a name with spaces stands in quotes, or alone."""
    alone = argument.strip("'\"")
    try:
        # Terminals put quotes around a file that is dropped on them.
        # Unlike Path's, os.path's leaves a user who is not there in the name.
        return [alone] if os.path.isfile(os.path.expanduser(alone)) else shlex.split(argument)
    except ValueError:  # a quote that is not closed is part of a name
        return [alone]


def _print_answer(session: ChatSession, question: str, console: Console) -> None:
    with _interrupt_stops(session):
        for piece in session.ask(question):
            console.out(harmless(piece), highlight=False, end="")
        console.print()
    if session.cut is not None:
        print_line(console, f"({session.cut})", "dim")


@contextmanager
def _interrupt_stops(session: ChatSession) -> Iterator[None]:
    """Ctrl-C ends the answer behind its next token, never in the middle of one; twice: the chat."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        session.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
