import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

import tiny
from midstream.chat.session import ChatSession, ChatSettings
from midstream.chat.talk import HELP, answer_lines, converse
from midstream.study.store import Ledger
from midstream.work.open_model import OpenedModel
from midstream.work.protocol import main

SHORT = ChatSettings(max_new_tokens=6)
QUESTIONS = ["What colour is it?", "Is it red?"]


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """A keyboard: lines, keys that interrupt, then Ctrl-D."""
    left = iter(lines)

    def read(_prompt: str) -> str:
        line = next(left, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    return read


def consoles() -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, width=60)


def shown_by(session: ChatSession, *lines: str | type[BaseException]) -> str:
    file, console = consoles()
    converse(session, console, typed(*lines))
    return file.getvalue()


def answers_to(opened: OpenedModel, *questions: str) -> list[str]:
    session = ChatSession(opened, SHORT)
    return ["".join(session.ask(question)) for question in questions]


class Saying(ChatSession):
    """A model that says what it is told to, piece by piece."""

    pieces: tuple[str, ...] = ()

    def ask(self, question: str) -> Iterator[str]:
        return iter(self.pieces)


class Interrupted(ChatSession):
    """The user presses Ctrl-C behind the second piece of the first answer."""

    def ask(self, question: str) -> Iterator[str]:
        first = not self.turns
        for number, piece in enumerate(super().ask(question)):
            yield piece
            if first and number == 1:
                os.kill(os.getpid(), signal.SIGINT)


def test_the_terminal_shows_each_answer_of_one_conversation(opened: OpenedModel) -> None:
    answers = answers_to(opened, *QUESTIONS)
    cut = "\n(the answer was cut at 6 tokens (max_new_tokens))\n"
    expected = "".join(answer + cut for answer in answers)
    assert shown_by(ChatSession(opened, SHORT), *QUESTIONS) == expected + "\n"


def test_blank_lines_ask_nothing_and_quit_ends_the_chat(opened: OpenedModel) -> None:
    session = ChatSession(opened, SHORT)
    shown_by(session, "", "   ", QUESTIONS[0], " /quit ", QUESTIONS[1])
    assert [question for question, _ in session.turns] == QUESTIONS[:1]


def test_a_picture_is_talked_about_after_its_command(
    opened: OpenedModel, pictures: list[Path]
) -> None:
    session = ChatSession(opened, SHORT)
    shown = shown_by(session, QUESTIONS[0], f"/image '{pictures[0]}'", QUESTIONS[0])
    assert f"a new conversation about {pictures[0]}" in shown
    assert session.pictures == (pictures[0],)
    assert len(session.turns) == 1
    shown_by(session, "/reset")
    assert (session.pictures, session.turns) == ((pictures[0],), [])
    shown_by(session, "/image")
    assert session.pictures == ()
    shown = shown_by(session, f"/image {pictures[0]} '{pictures[1]}'")
    assert f"about {pictures[0]} and {pictures[1]}" in shown
    assert session.pictures == tuple(pictures[:2])


def test_what_is_refused_is_said_and_the_chat_goes_on(opened: OpenedModel, tmp_path: Path) -> None:
    session = ChatSession(opened, SHORT)
    missing = tmp_path / "missing.png"
    shown = shown_by(
        session, "/rest", "/reset now", f"/image {missing}", "x " * 200, "/help", QUESTIONS[0]
    )
    # A user who is not there is no end of the chat.
    assert "'~nosuchuser/x.png'" in shown_by(session, "/image ~nosuchuser/x.png")
    assert "there is no command '/rest'; /help lists" in shown
    assert "there is no command '/reset now'" in shown
    assert f"No such file or directory: '{missing}'" in shown
    assert "192 at most: ask a shorter question" in shown
    assert HELP in shown
    assert [question for question, _ in session.turns] == QUESTIONS[:1]


def test_a_question_may_begin_with_a_slash_behind_a_space(opened: OpenedModel) -> None:
    session = ChatSession(opened, SHORT)
    shown_by(session, " /reset")
    assert [question for question, _ in session.turns] == ["/reset"]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(opened: OpenedModel) -> None:
    session = Interrupted(opened, ChatSettings(max_new_tokens=40))
    before = signal.getsignal(signal.SIGINT)
    shown = shown_by(session, *QUESTIONS)
    assert signal.getsignal(signal.SIGINT) is before
    assert shown.count("(the answer was stopped)") == 1
    assert len(session.turns[0][1]) < len(session.turns[1][1])
    assert [question for question, _ in session.turns] == QUESTIONS


def test_ctrl_c_at_the_prompt_ends_nothing(opened: OpenedModel) -> None:
    session = ChatSession(opened, SHORT)
    assert "Ctrl-D or /quit ends" in shown_by(session, KeyboardInterrupt, QUESTIONS[0])
    assert len(session.turns) == 1


def test_a_second_ctrl_c_ends_the_chat(opened: OpenedModel) -> None:
    class Impatient(ChatSession):
        def ask(self, question: str) -> Iterator[str]:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                yield "a"

    with pytest.raises(KeyboardInterrupt):
        shown_by(Impatient(opened, SHORT), QUESTIONS[0])


def test_an_answer_cannot_command_the_terminal(opened: OpenedModel) -> None:
    session = Saying(opened, SHORT)
    session.pieces = ("\x1b[2J", "[bold]x[/bold] :smile:", " \x07\r", "two\nlines " + "w" * 90)
    shown = shown_by(session, QUESTIONS[0])
    assert shown == r"\x1b[2J[bold]x[/bold] :smile: \x07\rtwo" + f"\nlines {'w' * 90}\n\n"


def test_every_line_of_a_script_is_answered_by_one_line(
    opened: OpenedModel, pictures: list[Path]
) -> None:
    lines = [*QUESTIONS, "/reset", QUESTIONS[0], f"/image {pictures[0]}", QUESTIONS[0]]
    (out, console), (err, notes) = consoles(), consoles()
    answer_lines(ChatSession(opened, SHORT), [f"{line}\n" for line in lines], console, notes)
    about = ChatSession(opened, SHORT)
    about.show(pictures[0])
    first = answers_to(opened, *QUESTIONS)
    said = [*first, first[0], "".join(about.ask(QUESTIONS[0]))]
    expected = [one.replace("\n", r"\n") for one in said]
    assert out.getvalue().splitlines() == expected
    assert [line for line in err.getvalue().splitlines() if line.startswith("line")] == [
        f"line {number}: the answer was cut at 6 tokens (max_new_tokens)" for number in (1, 2, 4, 6)
    ]


def test_line_breaks_in_an_answer_are_written_out_for_scripts(opened: OpenedModel) -> None:
    session = Saying(opened, SHORT)
    session.pieces = ("one\n", "two\x1b[1m " + "w" * 90)
    (out, console), (_, notes) = consoles(), consoles()
    answer_lines(session, QUESTIONS, console, notes)
    assert out.getvalue() == (r"one\ntwo\x1b[1m " + "w" * 90 + "\n") * 2


def test_a_script_ends_at_quit(opened: OpenedModel) -> None:
    session = ChatSession(opened, SHORT)
    (_, console), (_, notes) = consoles(), consoles()
    answer_lines(session, [f"\ufeff{QUESTIONS[0]}", "/quit", QUESTIONS[1]], console, notes)
    assert [question for question, _ in session.turns] == [QUESTIONS[0]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("\n", "line 2: the question is empty"),
        ("/rest", "line 2: there is no command '/rest'"),
        ("/image missing.png", "line 2: .*No such file"),
        ("/image https://a.org/b.png", "line 2: .* is an address .https.; download the picture"),
    ],
)
def test_a_script_stops_at_the_line_that_is_refused(
    opened: OpenedModel, line: str, said: str
) -> None:
    session = ChatSession(opened, SHORT)
    (_, console), (_, notes) = consoles(), consoles()
    with pytest.raises(ValueError, match=said):
        answer_lines(session, [QUESTIONS[0], line, QUESTIONS[1]], console, notes)
    assert len(session.turns) == 1


def run_main(monkeypatch: pytest.MonkeyPatch, lines: str, request: dict[str, object]) -> int:
    """The process in this one: standard input is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    # Pytest goes on with as many threads as it had.
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    return main(["chat", json.dumps(request)])


def test_the_process_answers_lines_and_tells_the_rest_on_standard_error(
    chat_ledger: Ledger,
    opened: OpenedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = {"checkpoint": str(chat_ledger.folder(tiny.CHAT)), "max_new_tokens": 6}
    request |= {"temperature": 0.0, "device": "cpu"}
    assert run_main(monkeypatch, "\n".join(QUESTIONS), request) == 0
    out, err = capsys.readouterr()
    expected = [one.replace("\n", r"\n") for one in answers_to(opened, *QUESTIONS)]
    assert out.splitlines() == expected
    assert err.startswith(f"{tiny.CHAT.name}: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": "nowhere"}, "nowhere is no stage of a store"),
        ({"image": ["missing.png"]}, "No such file or directory: 'missing.png'"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p: Input should be less"),
        ({"max_tokens": 5}, "did you mean 'max_new_tokens'?"),
        ({"port": 70000}, "port"),
    ],
)
def test_the_process_refuses_with_the_reason(
    chat_ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    said: str,
) -> None:
    request = {"checkpoint": str(chat_ledger.folder(tiny.CHAT)), "device": "cpu", **changes}
    assert run_main(monkeypatch, QUESTIONS[0], request) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err
    assert said in err.replace("\n", " ")


@pytest.mark.slow
def test_a_terminal_gets_prompt_answer_and_end(chat_ledger: Ledger, opened: OpenedModel) -> None:
    request = {"checkpoint": str(chat_ledger.folder(tiny.CHAT)), "max_new_tokens": 6}
    command = [sys.executable, "-m", "midstream.work", "chat", json.dumps(request)]
    ours, theirs = pty.openpty()
    shown = b""

    place = 0

    def read_until(mark: bytes) -> None:
        nonlocal shown, place
        deadline = time.monotonic() + 60
        while (found := shown.find(mark, place)) < 0:
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 0.2)[0]:
                shown += os.read(ours, 4096)
        place = found + len(mark)

    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        try:
            for question in QUESTIONS:
                read_until(b"\n> ")
                os.write(ours, f"{question}\n".encode())
                read_until(b"(max_new_tokens)")
            read_until(b"> ")
            os.write(ours, b"\x04")
            assert process.wait(30) == 0
        finally:
            process.kill()
    text = shown.decode().replace("\r\n", "\n")
    assert text.index(tiny.CHAT.name) < text.index("/help") < text.index(QUESTIONS[0])
    for answer in answers_to(opened, *QUESTIONS):
        assert answer in text
