"""What was asked before is not asked again, unless a byte of what is asked is another."""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image
from rich.console import Console

from answerers import Fake, ignore, kept
from inputs import write_lines
from midstream.config import Evaluation
from midstream.core.storage import read_json, write_json
from midstream.eval import answers as eval_answers
from midstream.eval.answers import earlier_tasks
from midstream.eval.benchmark import evaluate
from midstream.launch import terminal
from midstream.launch.terminal import reporting
from midstream.work import evaluate_model
from midstream.work.protocol import Channel
from midstream.work.show_scores import ListTasksRequest, list_tasks

TASKS = ("hue", "odd", "letters")
First = tuple[Path, dict[str, Any]]
ASKED: dict[str, Any] = {"visual_tasks": ("hue", "odd"), "text_tasks": ("letters",)}


def yes(weights: str = "w") -> Fake:
    """Says yes to everything, prefers " a"."""
    return Fake(
        lambda prompt, _image: "yes", lambda _query, choice: float(choice == " a"), weights=weights
    )


def write_world(root: Path) -> None:
    """Two visual tasks of four pictures each and one of text; every question names its task."""
    for task in ("hue", "odd"):
        (root / "bench" / task).mkdir(parents=True)
        lines = []
        for index in range(4):
            Image.new("RGB", (4, 4), (60 * index, 0, 9)).save(root / f"bench/{task}/{index}.png")
            answer = "yes" if index else "no"
            lines.append(
                {"question": f"{task} {index}?", "answer": answer, "image": f"{index}.png"}
            )
        write_lines(root / "bench" / task / "questions.jsonl", lines)
    (root / "text_tasks").mkdir()
    items = [{"query": f"letters {i}", "choices": [" a", " b"], "gold": i % 2} for i in range(4)]
    write_lines(root / "text_tasks/letters.jsonl", items)
    visual = {task: {"format": "qa", "chance": 0.5} for task in ("hue", "odd")}
    listed = {"visual_tasks": visual, "text_tasks": {"letters": {"chance": 0.5}}}
    (root / "world.json").write_text(json.dumps(listed))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    """A world, and beside it the results of a first evaluation."""
    root = tmp_path_factory.mktemp("first")
    write_world(root / "world")
    results, _ = again(root / "world", root / "out", root / "nothing")
    write_json(root / "out" / "results.json", results)
    return root, results


def again(
    world: Path, out: Path, before: Path, weights: str = "w", **options: Any
) -> tuple[dict[str, Any], set[str]]:
    """Evaluate with what stands in `before`: the results, and which tasks were asked."""
    fake = yes(weights)
    evaluation = Evaluation(**{**ASKED, **options})
    done = earlier_tasks([before])
    results = evaluate(kept(fake), evaluation, world, out, ignore, done=done)
    return results, {prompt.split()[0] for prompt in fake.prompts}


def edit(task: str, change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def apply(world: Path) -> None:
        (path,) = [*world.glob(f"bench/{task}/*.jsonl"), *world.glob(f"text_tasks/{task}.jsonl")]
        records = [json.loads(line) for line in path.read_text().splitlines()]
        change(records)
        write_lines(path, records)

    return apply


def repaint(world: Path) -> None:
    Image.new("RGB", (4, 4), (0, 255, 0)).save(world / "bench/odd/2.png")


def other_chance(world: Path) -> None:
    listed = json.loads((world / "world.json").read_text())
    listed["visual_tasks"]["odd"]["chance"] = 0.4
    (world / "world.json").write_text(json.dumps(listed))


def add_unread(world: Path) -> None:
    (world / "bench/odd/README.md").write_text("About.")
    (world / "bench/odd/unused.png").write_bytes(b"x")


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ([add_unread], set()),
        ([repaint, edit("letters", lambda r: r[0].update(gold=1))], {"odd", "letters"}),
        ([other_chance, edit("hue", lambda r: r[1].update(question="hue x?"))], {"odd", "hue"}),
        (
            [edit("odd", lambda r: r[1].update(answer="no")), edit("hue", lambda r: r.pop())],
            {"odd", "hue"},
        ),
    ],
)
def test_only_tasks_whose_content_changed_are_asked_again(
    first: First, tmp_path: Path, changes: list[Callable[[Path], None]], asked: set[str]
) -> None:
    root, before = first
    world = tmp_path / "elsewhere"
    shutil.copytree(root / "world", world)
    for change in changes:
        change(world)
    results, heard = again(world, tmp_path / "out", root / "out")
    assert heard == asked
    fresh, everything = again(world, tmp_path / "fresh", tmp_path / "nothing")
    assert everything == set(TASKS)
    assert results == fresh
    for task in TASKS:
        mine, theirs = (
            pq.read_table(tmp_path / out / f"predictions/{task}.parquet").to_pylist()
            for out in ("out", "fresh")
        )
        assert mine == theirs
        assert (before["tasks"][task]["key"] == results["tasks"][task]["key"]) == (
            task not in asked
        )


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"weights": "other"}, set(TASKS)),
        ({"blind": False}, {"hue", "odd"}),
        ({"prompts": "short"}, {"hue", "odd"}),
        ({"wordings": {"odd": "odd: {question}"}}, {"odd"}),
        ({"max_new_tokens": 7}, {"hue", "odd"}),
        ({"limit": 3}, set(TASKS)),
        ({"fixed_answers": "text"}, {"hue", "odd"}),
        ({"batch_size": 3}, set()),
    ],
)
def test_a_task_asked_otherwise_is_asked_again(
    first: First, tmp_path: Path, options: dict[str, Any], asked: set[str]
) -> None:
    root, _ = first
    _, heard = again(root / "world", tmp_path / "out", root / "out", **options)
    assert {word.rstrip(":") for word in heard} == asked


def test_a_row_without_its_predictions_is_not_done(first: First, tmp_path: Path) -> None:
    root, _ = first
    shutil.copytree(root / "out", tmp_path / "before")
    (tmp_path / "before/predictions/hue.parquet").unlink()
    _, heard = again(root / "world", tmp_path / "out", tmp_path / "before")
    assert heard == {"hue"}


def test_another_programs_results_are_left_alone(tmp_path: Path) -> None:
    for number, text in enumerate(
        ("[]", '{"tasks": [1]}', '{"tasks": {"hue": 0.5}}', "{}", '{"tasks')
    ):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.json").write_text(text)
    (tmp_path / "notes.txt").touch()
    assert earlier_tasks(sorted(tmp_path.glob("*"))) == {}


def command(
    out: Path, data: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[str, list[str]]:
    """What `midstream eval` says of a fake, and which tasks it asked."""
    fake = yes()
    monkeypatch.setattr(evaluate_model, "_open_model", lambda *_: (fake, data))
    request = evaluate_model.EvaluateRequest(
        models=("model",), out=out, evaluation={"blind": False, "batch_size": 2, **options}
    )
    with redirect_stdout(StringIO()) as told:
        evaluate_model.evaluate_all(request, Channel(None))
    return told.getvalue(), sorted({prompt.split()[0] for prompt in fake.prompts})


def test_the_command_finds_the_score_of_a_changed_file_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_world(tmp_path / name)
    edit("odd", lambda rows: [row.update(answer="no") for row in rows])(tmp_path / "b")
    heard: list[str] = []

    def run(data: str) -> dict[str, float]:
        heard[:] = command(tmp_path / "out", Path(data), monkeypatch)[1]
        folders = list((tmp_path / "out").glob("model-*"))
        latest = max(folders, key=lambda path: (path / "results.json").stat().st_mtime_ns)
        return {
            name: row["score"] for name, row in read_json(latest / "results.json")["tasks"].items()
        }

    monkeypatch.chdir(tmp_path / "a")
    assert run(".") == {"hue": 0.75, "odd": 0.75, "letters": 0.5}
    monkeypatch.chdir(tmp_path / "b")
    assert run(".") == {"hue": 0.75, "odd": 0.0, "letters": 0.5}
    assert heard == ["odd"]
    assert len(list((tmp_path / "out").glob("model-*"))) == 2
    edit("letters", lambda rows: [row.update(gold=0) for row in rows])(tmp_path / "b")
    assert run(".") == {"hue": 0.75, "odd": 0.0, "letters": 1.0}
    assert heard == ["letters"]


def test_what_is_shown_again_says_from_when_it_is_wherever_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path / "world")

    def run(**options: Any) -> str:
        told, _ = command(tmp_path / "out", tmp_path / "world", monkeypatch, **options)
        return next(line for line in told.splitlines() if "/out/model-" in line)

    assert "as before" not in run()
    (first,) = (tmp_path / "out").glob("model-*")
    for path in (first / "predictions").glob("*.parquet"):
        os.utime(path, (1e9, 1e9))
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(1e9))
    before = (first / "results.json").read_bytes()
    told = f"as before: {', '.join(f'{name} (of {when})' for name in TASKS)}"
    assert run().endswith(told)
    assert (first / "results.json").read_bytes() == before
    # Another folder takes the text task over, and says the same of it the next time.
    for _ in range(2):
        assert f"letters (of {when})" in run(max_new_tokens=7)


def test_a_folder_that_another_evaluation_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path / "world")
    listed = json.loads((tmp_path / "world/world.json").read_text())
    (tmp_path / "world/world.json").write_text(json.dumps({**listed, "text_tasks": {}}))
    asked = tmp_path / "out", tmp_path / "world", monkeypatch
    command(*asked)
    (folder,) = (tmp_path / "out").glob("model-*")
    (folder / "results.json").write_text("{")
    with FileLock(folder / ".lock"), pytest.raises(ValueError, match="by another evaluation; wait"):
        command(*asked)
    assert command(*asked)[1] == ["hue", "odd"]
    assert set(read_json(folder / "results.json")["tasks"]) == {"hue", "odd"}


def test_answers_of_another_version_are_asked_again(
    first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_answers, "ANSWERS_VERSION", eval_answers.ANSWERS_VERSION + 1)
    _, heard = again(first[0] / "world", tmp_path / "out", first[0] / "out")
    assert heard == set(TASKS)


def listed(data: Path | None) -> str:
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
    assert " missing: testdev_balanced_questions.json" in row_of(told, "gqa")
    assert " needs: testdev_balanced_questions.json" in row_of(listed(None), "gqa")


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
