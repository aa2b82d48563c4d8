"""The process of `midstream chat`: standard input is the user's."""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console

from midstream.chat.session import ChatSession, ChatSettings, caution, describe
from midstream.chat.terminal_chat import answer_lines, converse, say
from midstream.chat.web_page import Page, require_gradio, serve
from midstream.config import Config, Machine
from midstream.train.parallel import set_up
from midstream.work.open_model import OpenedModel, open_model

REFUSED_EXIT_CODE, INTERRUPTED_EXIT_CODE = 1, 130


class Request(Config):
    """What is asked of this process; temperature None or 0 takes the most likely tokens."""

    checkpoint: Path
    image: Path | None = None
    web: bool = False
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    max_new_tokens: int = 256
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: float = 1.0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def settings(self) -> ChatSettings:
        """How answers are made."""
        return ChatSettings(self.max_new_tokens, self.temperature, self.top_p, self.seed)


def run(request: Request) -> None:
    """Open the model and chat; ValueError or OSError for what is refused."""
    settings = request.settings
    if request.web:
        require_gradio()
    place = set_up(Machine(threads=os.cpu_count() or 1, device=request.device))
    opened = open_model(request.checkpoint, place.device)
    about = describe(opened)
    if (warning := caution(opened)) is not None:
        about.append(warning)
    if request.web:
        _on_page(request, opened, about)
    else:
        session = ChatSession(opened, settings)
        session.show(request.image)
        _in_terminal(session, about)


def _on_page(request: Request, opened: OpenedModel, about: list[str]) -> None:
    # Refuses a picture that cannot be shown before anything is served.
    ChatSession(opened, request.settings).show(request.image)
    page = Page(opened, request.settings, about, request.image)
    console = Console()
    for line in about:
        say(console, line, "dim")
    serve(page, request.port, lambda address: say(console, f"{address}  (Ctrl-C ends it)"))


def _in_terminal(session: ChatSession, about: list[str]) -> None:
    console, notes = Console(), Console(stderr=True)
    interactive = sys.stdin.isatty()
    for line in about:
        say(console if interactive else notes, line, "dim")
    if not interactive:
        answer_lines(session, sys.stdin, console, notes)
        return
    # With it, `input` edits lines and remembers them.
    with suppress(ImportError):
        import readline  # noqa: F401
    say(console, "/help lists the commands", "dim")
    converse(session, console, input)


def main() -> int:
    """Returns the exit code: 1 where something is refused, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--request", required=True)
    arguments = parser.parse_args()
    try:
        run(Request.model_validate_json(arguments.request))
    except (ValueError, OSError) as reason:
        say(Console(stderr=True), f"error: {reason}", "bold red")
        return REFUSED_EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
