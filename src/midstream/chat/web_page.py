"""The conversation on a page that only this machine sees (optional extra `web`).

What its buttons do is in `Page`, which knows nothing of Gradio.
"""

import html
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from midstream.chat.session import ChatSession, ChatSettings
from midstream.chat.text_pieces import harmless
from midstream.open_model import OpenedModel

HOST = "127.0.0.1"
# The browser itself then asks no other machine for anything.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_HEAD = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Page:
    """What the page does for the conversation of a browser session; `about` are its lines of text.

    Every answer is messages for the chat, and a note (empty where there is nothing to say).
    """

    opened: OpenedModel
    settings: ChatSettings
    about: list[str]
    picture: Path | None = None

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return self.opened.encoder is not None

    def begin(self) -> ChatSession:
        """The conversation of a page that was just opened."""
        session = ChatSession(self.opened, self.settings)
        session.show(self.picture)
        return session

    def show(self, session: ChatSession, picture: str | None) -> tuple[Messages, str]:
        """Start anew about another picture, or about none; the conversation stays if refused."""
        note = self._turn_to(session, picture)
        return _messages(session), note

    def reset(self, session: ChatSession) -> tuple[Messages, str]:
        """Start anew about the same picture."""
        session.reset()
        return _messages(session), ""

    def ask(
        self, session: ChatSession, picture: str | None, question: str
    ) -> Iterator[tuple[Messages, str, str]]:
        """The growing conversation, a note, and what is left in the question's box."""
        if note := self._turn_to(session, picture):
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

    def stop(self, session: ChatSession) -> None:
        """End the answer that is being made; what there is of it stays."""
        session.stop()

    def _turn_to(self, session: ChatSession, picture: str | None) -> str:
        # A question may arrive before the picture's own event.
        path = None if picture is None else Path(picture)
        if path != session.picture:
            try:
                session.show(path)
            except (ValueError, OSError) as reason:
                return str(reason)
        return ""


def _messages(session: ChatSession) -> Messages:
    return [
        {"role": role, "content": harmless(text)}
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
        session = gr.State()
        lines = [html.escape(harmless(line)) for line in page.about]
        gr.HTML(f"<h2>{lines[0]}</h2><p>{'<br>'.join(lines[1:])}</p>")
        with gr.Row():
            if page.sees:
                picture = gr.Image(
                    None if page.picture is None else str(page.picture),
                    type="filepath",
                    # The file as it is: Midstream decodes it as in training.
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Picture",
                    buttons=["fullscreen"],
                    height=360,
                    scale=1,
                )
            else:
                picture = gr.State(None)
            with gr.Column(scale=2):
                chat = gr.Chatbot(
                    label="Conversation",
                    render_markdown=False,
                    allow_tags=False,
                    buttons=["copy"],
                    feedback_options=None,
                    height=440,
                )
                note = gr.Textbox(label="Note", interactive=False, lines=1)
                box = gr.Textbox(label="Question", placeholder="Ask something", autofocus=True)
                with gr.Row():
                    send, stop, new = (
                        gr.Button(text) for text in ("Send", "Stop", "New conversation")
                    )
        blocks.load(page.begin, None, session)
        gr.on(
            [send.click, box.submit],
            page.ask,
            [session, picture, box],
            [chat, note, box],
            api_name="ask",
            **turn,
        )
        stop.click(page.stop, session, None, queue=False, api_name="stop")
        new.click(page.stop, session, None, queue=False).then(
            page.reset, session, [chat, note], api_name="reset", **turn
        )
        if page.sees:
            picture.input(page.stop, session, None, queue=False).then(
                page.show, [session, picture], [chat, note], api_name="show", **turn
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
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        shown = [] if page.picture is None else [str(page.picture.resolve())]
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
            head=_HEAD,
        )
        announce(f"http://{HOST}:{listener.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        # Uvicorn raises Ctrl-C again once it has closed everything.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


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
