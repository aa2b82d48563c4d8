"""Benchmarks are read whole before anything runs, and again only when they change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import own_world
from midstream.config import Evaluation
from midstream.core.storage import write_json
from midstream.cost.graph import plan
from midstream.launch import checks
from midstream.launch.check_data import Problem
from midstream.launch.checks import problems
from midstream.study.store import Ledger
from own_studies import (
    mixed,
    seen,
    study_of,
)


def read_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are read from now on, by their names."""
    from midstream.work.read_data import TaskRequest, read

    names: list[str] = []

    def reading(requests: list[dict[str, Any]]) -> list[str | None]:
        told: list[str | None] = []
        for request in requests:
            names.append(request["task"])
            try:
                read(TaskRequest(**request))
                told.append(None)
            except (ValueError, OSError) as reason:
                told.append(str(reason))
        return told

    monkeypatch.setattr(checks, "_read", reading)
    return names


def cut_last_line(root: Path) -> None:
    path = root / "text_tasks/quiz.jsonl"
    path.write_text(path.read_text()[:-9])


def remove_a_picture(root: Path) -> None:
    (root / "bench/pope/val2014/3.jpg").unlink()


def break_a_picture(root: Path) -> None:
    path = root / "bench/pope/val2014/4.jpg"
    path.write_bytes(path.read_bytes()[:200])


def remove_a_task(root: Path) -> None:
    shutil.rmtree(root / "bench/pope")


def forget_a_task(root: Path) -> None:
    about = json.loads((root / "world.json").read_text())
    write_json(root / "world.json", about | {"text_tasks": {"quizz": {"chance": 0.5}}})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_last_line, "quiz.jsonl line 14 is not JSON"),
        (remove_a_picture, "val2014/3.jpg, which does not exist"),
        (break_a_picture, "val2014/4.jpg cannot be decoded"),
        (remove_a_task, "bench/pope does not exist"),
        (forget_a_task, "did you mean quizz?"),
    ],
)
def test_a_benchmark_that_is_not_whole_is_told_before_anything_runs(
    tmp_path: Path,
    empty: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    said: str,
) -> None:
    read_requests(monkeypatch)
    root = own_world.write_world(tmp_path / "world")
    asked = Evaluation(visual_tasks=("pope",), text_tasks=("quiz",))

    def found() -> tuple[Problem, ...]:
        model = seen(own_world.data_of(root), mixed(200, web=1.0))
        return problems(plan(study_of(model, asked=asked), empty), empty)

    assert found() == ()
    harm(root)
    (problem,) = found()
    assert said in str(problem)
    assert problem.level == "wrong"
    assert problem.stages[0].startswith("evaluation before fine-tuning")


def test_a_benchmark_that_was_read_whole_is_read_again_only_when_it_changes(
    tmp_path: Path, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = read_requests(monkeypatch)
    root = own_world.write_world(tmp_path / "world")
    empty.store.mkdir()
    asked = Evaluation(visual_tasks=("pope",), text_tasks=("quiz",))

    def read_now() -> list[str]:
        names.clear()
        models = [seen(own_world.data_of(root), mixed(n, web=1.0)) for n in (200, 300)]
        problems(plan(study_of(*models, asked=asked), empty), empty)
        return list(names)

    assert read_now() == ["pope", "quiz"]
    assert read_now() == []
    path = root / "text_tasks/quiz.jsonl"
    path.write_text(path.read_text() + json.dumps({"query": "x", "choices": ["a", "b"], "gold": 1}))
    assert read_now() == ["quiz"]
    remove_a_picture(root)
    assert read_now() == ["pope"]
    # What is not whole is read again, until it is.
    assert read_now() == ["pope"]


def test_the_process_that_reads_names_what_is_wrong_and_goes_on(tmp_path: Path) -> None:
    root = own_world.write_world(tmp_path / "world")
    break_a_picture(root)
    own = {"world": str(root), "limit": None}
    pope = own | {"task": "pope", "kind": "visual", "slim": False, "blind": True}
    first, second = checks._read([pope, own | {"task": "quiz", "kind": "text"}])
    assert first is not None
    assert "4.jpg cannot be decoded" in first
    assert second is None
