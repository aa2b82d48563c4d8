"""The work of `midstream chat`: in a terminal, for scripts that write questions, or on a page that
only this machine sees (optional extra `web`): what its buttons do is in `Page`, without Gradio."""

import html
import os
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console

from midstream.chat.session import ChatSession, ChatSettings, caution, describe
from midstream.config import Machine
from midstream.core.storage import num_cores
from midstream.train.parallel import set_up
from midstream.work.open_model import OpenedModel, open_model
from midstream.work.protocol import Channel, harmless, print_line

HOST = "127.0.0.1"
# The browser itself then asks no other machine for anything.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

Messages = list[dict[str, str]]
# Files and their captions, as Gradio's gallery gives them.
Gallery = Sequence[tuple[str, str | None]] | None


@dataclass
class Visitor:
    """A browser session; its conversation begins when it is first needed."""

    session: ChatSession | None = None


@dataclass(frozen=True)
class Page:
    """What the page does for a visitor; `about` are its lines of text, `pictures` its first ones.

    Every answer is messages for the chat, and a note (empty where there is nothing to say).
    """

    opened: OpenedModel
    settings: ChatSettings
    about: list[str]
    pictures: tuple[Path, ...] = ()

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return self.opened.encoder is not None

    def show(self, visitor: Visitor, gallery: Gallery) -> tuple[Messages, str]:
        """Start anew about other pictures, or about none; the conversation stays if refused."""
        session = self._session(visitor)
        note = _turn_to(session, gallery)
        return _messages(session), note

    def reset(self, visitor: Visitor) -> tuple[Messages, str]:
        """Start anew about the same pictures."""
        session = self._session(visitor)
        session.reset()
        return _messages(session), ""

    def ask(
        self, visitor: Visitor, gallery: Gallery, question: str
    ) -> Iterator[tuple[Messages, str, str]]:
        """The growing conversation, a note, and what is left in the question's box."""
        session = self._session(visitor)
        # A question may arrive before the pictures' own event.
        if note := _turn_to(session, gallery):
            yield _messages(session), note, question
            return
        try:
            pieces = session.ask(question)
        except ValueError as reason:
            yield _messages(session), str(reason), question
            return
        for _ in pieces:
            yield _messages(session), "", ""
        yield _messages(session), session.cut or "", ""

    def stop(self, visitor: Visitor) -> None:
        """End the answer that is being made; what there is of it stays."""
        if visitor.session is not None:
            visitor.session.stop()

    def _session(self, visitor: Visitor) -> ChatSession:
        if visitor.session is None:
            visitor.session = ChatSession(self.opened, self.settings)
        return visitor.session


def _turn_to(session: ChatSession, gallery: Gallery) -> str:
    paths = tuple(Path(file) for file, _ in gallery or ())
    if paths != session.pictures:
        try:
            session.show(*paths)
        except (ValueError, OSError) as reason:
            return str(reason)
    return ""


def _messages(session: ChatSession) -> Messages:
    # The chat takes HTML even where it reads no Markdown.
    return [
        {"role": role, "content": html.escape(harmless(text), quote=False)}
        for turn in session.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def require_gradio() -> None:
    """Raises ValueError with the remedy where the page's packages are not installed."""
    if find_spec("gradio") is None:
        raise ValueError('the page needs gradio: pip install "midstream[web]"')


def make_blocks(page: Page) -> Any:
    """The page as `gradio.Blocks`; each browser session has a conversation of its own."""
    import gradio as gr

    # One answer at a time, whoever asks.
    turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    with gr.Blocks(title=page.opened.name, analytics_enabled=False, fill_height=True) as blocks:
        # Copied for each browser session.
        visitor = gr.State(Visitor())
        lines = [html.escape(harmless(line)) for line in page.about]
        gr.HTML(f"<h2>{lines[0]}</h2><p>{'<br>'.join(lines[1:])}</p>")
        with gr.Row():
            if page.sees:
                gallery = gr.Gallery(
                    [str(path) for path in page.pictures] or None,
                    # The files as they are: Midstream decodes them as in training.
                    type="filepath",
                    file_types=["image"],
                    sources=["upload", "clipboard"],
                    label="Pictures",
                    buttons=["fullscreen"],
                    height=320,
                    scale=1,
                    interactive=True,
                )
            else:
                gallery = gr.State(None)
            with gr.Column(scale=2):
                chat = gr.Chatbot(
                    label="Conversation",
                    render_markdown=False,
                    allow_tags=False,
                    buttons=[],
                    feedback_options=None,
                    height=380,
                )
                note = gr.Textbox(label="Note", interactive=False, lines=1)
                box = gr.Textbox(label="Question", placeholder="Ask something", autofocus=True)
                with gr.Row():
                    send = gr.Button("Send", variant="primary")
                    stop, new = gr.Button("Stop"), gr.Button("New conversation")
        gr.on(
            [send.click, box.submit],
            page.ask,
            [visitor, gallery, box],
            [chat, note, box],
            api_name="ask",
            **turn,
        )
        stop.click(page.stop, visitor, None, queue=False, api_name="stop")
        gr.on([new.click, chat.clear], page.stop, visitor, None, queue=False).then(
            page.reset, visitor, [chat, note], api_name="reset", **turn
        )
        if page.sees:
            changes = [gallery.upload, gallery.delete]
            gr.on(changes, page.stop, visitor, None, queue=False).then(
                page.show, [visitor, gallery], [chat, note], api_name="show", **turn
            )
    return blocks


def serve(page: Page, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page on this machine until Ctrl-C; port 0 takes a free one.

    `announce` gets the address once it can be opened. Uploaded pictures are deleted at the end.
    Raises ValueError where gradio is missing or the port is taken.
    """
    require_gradio()
    with tempfile.TemporaryDirectory(prefix="midstream-chat-") as folder, _bound(port) as listener:
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_TEMP_DIR": folder,
        }
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        app = FastAPI()
        # A site that names this machine in its own domain gets no answer.
        app.add_middleware(StayHere)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        shown = [str(path.resolve()) for path in page.pictures]
        app = gr.mount_gradio_app(
            app,
            make_blocks(page),
            path="/",
            server_name=HOST,
            server_port=listener.getsockname()[1],
            footer_links=[],
            run_history=False,
            allowed_paths=shown,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )
        announce(f"http://{HOST}:{listener.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        # Uvicorn raises Ctrl-C or SIGTERM again once it has closed everything.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


class StayHere:
    """Adds to all that an application serves that browsers must load nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request (ASGI)."""

        async def send_on(message: dict[str, Any]) -> None:
            """Pass a message on, the page's headers with the policy."""
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", _POLICY)
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self.app(scope, receive, send_on)


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"port {port} of {HOST} cannot be used ({error.strerror}); give another --port, or 0 "
            "for a free one"
        ) from None
    # Who comes before the server is up then waits for it.
    listener.listen()
    return listener


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
    place = set_up(Machine(threads=num_cores(), device=request.device))
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
    for number, read in enumerate(lines, start=1):
        # What some editors put before a file's first character is no part of a question.
        line = read.removeprefix("\ufeff") if number == 1 else read
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
