import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import tiny
from midstream.chat.session import ChatSession, ChatSettings
from midstream.chat.talk import Page, StayHere, Visitor, require_gradio, serve
from midstream.study.store import Ledger
from midstream.work.open_model import OpenedModel

SHORT = ChatSettings(max_new_tokens=6)
QUESTIONS = ["What colour is it?", "Is it red?"]
CUT = "the answer was cut at 6 tokens (max_new_tokens)"


def page_of(opened: OpenedModel) -> Page:
    return Page(opened, SHORT, ["a model"])


def answers_about(opened: OpenedModel, picture: Path | None, *questions: str) -> list[str]:
    session = ChatSession(opened, SHORT)
    session.show(*([] if picture is None else [picture]))
    return ["".join(session.ask(question)) for question in questions]


def gallery(*pictures: Path | None) -> list[tuple[str, None]]:
    """Pictures as the page's gallery gives them."""
    return [(str(picture), None) for picture in pictures if picture is not None]


def asked(page: Page, visitor: Visitor, picture: Path | None, question: str) -> Any:
    """The last of what the page shows."""
    return list(page.ask(visitor, gallery(picture), question))[-1]


def messages(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_an_answer_grows_in_the_conversation_and_the_box_is_cleared(opened: OpenedModel) -> None:
    page, visitor = page_of(opened), Visitor()
    (answer,) = answers_about(opened, None, QUESTIONS[0])
    *growing, (last, note, box) = page.ask(visitor, None, QUESTIONS[0])
    assert (last, note, box) == (messages(QUESTIONS[0], answer), CUT, "")
    lengths = [len(shown[1]["content"]) for shown, _, _ in growing]
    assert lengths == sorted(set(lengths))
    assert len(lengths) > 2
    assert all(answer.startswith(shown[1]["content"]) for shown, _, _ in growing)


def test_each_visitor_has_a_conversation_of_its_own(opened: OpenedModel) -> None:
    page, first, second = page_of(opened), Visitor(), Visitor()
    both = answers_about(opened, None, *QUESTIONS)
    (alone,) = answers_about(opened, None, QUESTIONS[1])
    assert alone != both[1]
    asked(page, first, None, QUESTIONS[0])
    assert asked(page, second, None, QUESTIONS[1])[0] == messages(QUESTIONS[1], alone)
    shown = asked(page, first, None, QUESTIONS[1])[0]
    assert shown == messages(QUESTIONS[0], both[0], QUESTIONS[1], both[1])


def test_a_new_picture_starts_anew_with_and_without_its_event(
    opened: OpenedModel, pictures: list[Path]
) -> None:
    page, visitor = page_of(opened), Visitor()
    asked(page, visitor, None, QUESTIONS[0])
    assert page.show(visitor, gallery(pictures[0])) == ([], "")
    for picture in (pictures[0], pictures[1], None):
        both = answers_about(opened, picture, *QUESTIONS)
        for question in QUESTIONS:
            shown = asked(page, visitor, picture, question)[0]
        assert shown == messages(QUESTIONS[0], both[0], QUESTIONS[1], both[1])


def test_what_is_refused_becomes_a_note_and_the_question_stays(
    opened: OpenedModel, pictures: list[Path], tmp_path: Path
) -> None:
    page, visitor = page_of(opened), Visitor()
    before = asked(page, visitor, pictures[0], QUESTIONS[0])[0]
    shown, note, box = asked(page, visitor, pictures[0], "x " * 200)
    assert (shown, box) == (before, "x " * 200)
    assert "192 at most: ask a shorter question" in note
    text = tmp_path / "text.png"
    text.write_text("no picture")
    shown, note, box = asked(page, visitor, text, QUESTIONS[1])
    assert (shown, box) == (before, QUESTIONS[1])
    assert "cannot be decoded" in note
    shown, note = page.show(visitor, gallery(text))
    assert shown == before
    assert "cannot be decoded" in note


def test_stop_ends_the_answer_of_its_visitor(opened: OpenedModel) -> None:
    page = Page(opened, ChatSettings(max_new_tokens=60), ["a model"])
    visitor, other = Visitor(), Visitor()
    page.stop(other)
    answer = page.ask(visitor, None, QUESTIONS[0])
    next(answer)
    page.stop(visitor)
    *_, (shown, note, _) = answer
    assert note == "the answer was stopped"
    whole = asked(page, other, None, QUESTIONS[0])[0]
    assert 0 < len(shown[1]["content"]) < len(whole[1]["content"])


def test_text_is_shown_as_text(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(self: ChatSession, question: str) -> Iterator[str]:
        self.turns.append((question, "<img src=x> & \x1b[1m"))
        yield "all of it"

    monkeypatch.setattr(ChatSession, "ask", ask)
    shown = asked(page_of(opened), Visitor(), None, "<b>bold</b>?")[0]
    assert shown == messages("&lt;b&gt;bold&lt;/b&gt;?", r"&lt;img src=x&gt; &amp; \x1b[1m")


def test_everything_served_tells_browsers_to_stay_on_this_machine() -> None:
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(StayHere(app)({"type": "http"}, None, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"a"] == b"b"
    assert headers[b"content-security-policy"].startswith(b"default-src 'self' ")
    assert b"http" not in headers[b"content-security-policy"]
    assert sent[1] == {"type": "http.response.body", "body": b"page"}


def test_a_missing_gradio_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midstream.chat.talk.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('pip install "midstream[web]"')):
        require_gradio()


def test_a_taken_port_is_refused_with_its_number(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midstream.chat.talk.require_gradio", lambda: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 cannot be used"):
            serve(page_of(opened), port, lambda address: None)


GRADIO = pytest.mark.skipif(
    find_spec("gradio") is None, reason="gradio (extra `web`) is not installed"
)


@pytest.fixture
def served(chat_ledger: Ledger, pictures: list[Path], tmp_path: Path) -> Iterator[str]:
    """The address of a page in a process of its own, which leaves nothing behind."""
    request = {"checkpoint": str(chat_ledger.folder(tiny.CHAT)), "image": [str(pictures[0])]}
    request |= {"web": True, "max_new_tokens": 6, "device": "cpu"}
    command = [sys.executable, "-m", "midstream.work", "chat", json.dumps(request)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        address = next((line for line in process.stdout if line.startswith("http")), "none")
        try:
            yield address.split()[0]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    assert not list(tmp_path.glob("midstream-chat-*"))


@GRADIO
@pytest.mark.slow
def test_the_page_answers_and_loads_from_this_machine_alone(
    served: str, opened: OpenedModel, pictures: list[Path]
) -> None:
    from gradio_client import Client, handle_file

    assert served.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(served) as page:
        policy = page.headers["content-security-policy"]
        text = page.read().decode()
    assert policy.startswith("default-src 'self'")
    assert tiny.CHAT.name in text
    # Nothing that a browser loads by itself.
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//(?!127)", text)
    elsewhere = urllib.request.Request(served, headers={"Host": "midstream.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(elsewhere)
    for picture in (pictures[1], None):
        client = Client(served, verbose=False)
        sent = None if picture is None else [{"image": handle_file(str(picture)), "caption": None}]
        for question, answer in zip(
            QUESTIONS, answers_about(opened, picture, *QUESTIONS), strict=True
        ):
            shown, note, box = client.predict(sent, question, api_name="/ask")
            assert [part["text"] for part in shown[-1]["content"]] == [answer]
            assert (note, box) == (CUT, "")
        assert len(shown) == 4
