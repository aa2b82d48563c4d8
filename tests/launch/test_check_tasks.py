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
from midstream.cost.cost import StageCost
from midstream.cost.graph import Plan, plan
from midstream.cost.questions import ANSWER_TOKENS
from midstream.launch import checks
from midstream.launch.checks import problems, read_tasks
from midstream.study.store import Ledger
from own_studies import mixed, seen, study_of


def read_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are read from now on, by their names."""
    from midstream.work.read_data import TaskRequest, read

    names: list[str] = []

    def reading(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        for request in requests:
            names.append(request["task"])
            try:
                told.append({"error": None, "size": read(TaskRequest(**request))})
            except (ValueError, OSError) as reason:
                told.append({"error": str(reason), "size": None})
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
    mine: Path,
    empty: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    said: str,
) -> None:
    read_requests(monkeypatch)
    asked = Evaluation(visual_tasks=("pope",), text_tasks=("quiz",))
    harm(mine)
    model = seen(own_world.data_of(mine), mixed(200, web=1.0))
    (problem,) = problems(plan(study_of(model, asked=asked), empty), empty)
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


def test_an_evaluation_is_priced_by_what_its_files_ask(
    tmp_path: Path, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_requests(monkeypatch)
    root = own_world.write_world(tmp_path / "world")
    asked = Evaluation(visual_tasks=("pope",), text_tasks=("quiz",))
    study = study_of(seen(own_world.data_of(root), mixed(200, web=1.0)), asked=asked)

    def cost_of(work: Plan) -> StageCost:
        return next(row.cost for row in work.rows if row.stage.kind == "evaluate")

    before = cost_of(plan(study, empty))
    told = read_tasks(study.results, empty)
    now = cost_of(plan(study, empty, told.sizes))
    assert (before.basis, now.basis) == ("expected", "counted")
    sizes = {json.loads(key)["task"]: size for key, size in told.sizes.items()}
    pope, quiz, model = sizes["pope"], sizes["quiz"], study.lines[0].result.of.model
    # Asked as it is and blind, each question with its picture; its two answers are weighed.
    assert pope["questions"] == pope["pictures"] == pope["answers"] / 2
    text = 2 * round(pope["characters"] / 4) + quiz["characters"] / 4
    weighed = 2 * pope["answers"] * ANSWER_TOKENS
    pictures = 2 * pope["pictures"] * model.image_tokens
    assert now.tokens == round(text + weighed + pictures)
    # The store remembers it.
    empty.store.mkdir()
    read_tasks(study.results, empty)
    assert cost_of(plan(study, empty)) == now


def test_the_process_that_reads_names_what_is_wrong_and_goes_on(tmp_path: Path) -> None:
    root = own_world.write_world(tmp_path / "world")
    break_a_picture(root)
    own = {"world": str(root), "limit": None}
    pope = own | {"task": "pope", "kind": "visual", "slim": False, "blind": True}
    first, second = checks._read([pope, own | {"task": "quiz", "kind": "text"}])
    assert "4.jpg cannot be decoded" in first["error"]
    assert second["error"] is None
    assert second["size"]["items"] > 0
