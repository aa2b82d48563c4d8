"""The conversation on a page that only this machine sees (optional extra `web`).

What its buttons do is in `Page`, which knows nothing of Gradio.
"""

import html
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from midstream.chat.session import ChatSession, ChatSettings
from midstream.work.open_model import OpenedModel
from midstream.work.protocol import harmless

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
        raise ValueError(
            'the page needs gradio, which is not installed: pip install "midstream[web]"'
        )


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
