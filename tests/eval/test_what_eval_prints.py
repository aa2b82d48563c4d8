"""The list of tasks, and progress, as `midstream eval` prints them."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from midstream.launch import terminal
from midstream.launch.terminal import reporting
from midstream.work.protocol import Channel
from midstream.work.show_scores import ListTasksRequest, list_tasks


def listed(data: Path) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as told:
        patch.setenv("COLUMNS", "400")
        list_tasks(ListTasksRequest(data=data), Channel(None))
    return told.getvalue()


def row_of(text: str, task: str) -> str:
    return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(task + " "))


def test_the_list_has_a_worlds_own_tasks_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    for task in ("mine", "odd"):
        (tmp_path / "bench" / task).mkdir(parents=True)
    record = {"question": "Is it?", "answer": "yes", "image": "a.png"}
    (tmp_path / "bench/mine/questions.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "text_tasks/winogrande").mkdir(parents=True)
    item = {"query": "It is", "choices": [" a", " b"], "gold": 0}
    (tmp_path / "text_tasks/letters.jsonl").write_text((json.dumps(item) + "\n") * 3)
    (tmp_path / "text_tasks/broken.jsonl").write_text("{}\n")
    visual = {"mine": {"format": "qa", "chance": 0.25}, "odd": {"format": "qa", "chance": 0.5}}
    visual["strange"] = {"format": "vqa", "chance": 0}
    text = {"letters": {"chance": 0.5}, "broken": {}}
    world = {"visual_tasks": visual, "text_tasks": text}
    (tmp_path / "world.json").write_text(json.dumps(world))
    told = listed(tmp_path)
    assert row_of(told, "mine").startswith("mine 25.00 1 questions in ")
    assert "1 pictures are missing (format qa)" in row_of(told, "mine")
    assert "not whole: " in row_of(told, "odd")
    assert "its format is 'vqa'; use vqav2" in row_of(told, "strange")
    assert row_of(told, "letters").startswith("letters 50.00 3 items in ")
    assert row_of(told, "broken").startswith("broken none given not whole: ")
    assert "a data set's own files in " in row_of(told, "winogrande")


def test_without_a_terminal_progress_is_a_line_at_the_start_the_end_and_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    console = Console(file=StringIO(), width=200, force_terminal=False)
    with reporting(console, "model") as show:
        for done in range(1, 101):
            now[0] += 1.0
            show(done / 100, f"gqa: {done} of 100 ({done} %)")
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0].endswith("model: gqa: 1 of 100 (1 %), 1 % of all")
    assert lines[-1].endswith("model: gqa: 100 of 100 (100 %), 100 % of all")
    assert len(lines) == 2 + 99 // int(terminal.QUIET_SECONDS)
