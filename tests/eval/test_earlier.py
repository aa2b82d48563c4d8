"""What was asked before is not asked again, unless a byte of what is asked is another."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from midstream.config import Evaluation
from midstream.core.storage import read_json, write_json
from midstream.eval import answers as eval_answers
from midstream.eval.answers import KeptAnswers, earlier_tasks
from midstream.eval.benchmark import evaluate
from midstream.work import evaluate_model
from midstream.work.protocol import Channel

TASKS = ("hue", "odd", "letters")
ASKED: dict[str, Any] = {"visual_tasks": ("hue", "odd"), "text_tasks": ("letters",)}


class Yes:
    """Says yes to everything, prefers " a", and remembers what it was asked."""

    def __init__(self, weights: str = "w") -> None:
        self.weights_digest = weights
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[str], images: Sequence[Path | None]) -> list[str]:
        self.asked += prompts
        return ["Yes"] * len(prompts)

    def choose(
        self,
        prompts: Sequence[str],
        images: Sequence[Path | None],
        choices: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        self.asked += prompts
        return [[float(one == "yes") for one in own] for own in choices]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self.asked += [context for context, _ in pairs]
        return [(float(choice == " a"), True) for _, choice in pairs]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        raise NotImplementedError

    def generate_until(
        self, contexts: Sequence[str], stops: Sequence[Sequence[str]], max_new_tokens: Sequence[int]
    ) -> list[str]:
        raise NotImplementedError


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


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
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
    fake = Yes(weights)
    answers = KeptAnswers(fake, None, at_once=4)
    evaluation = Evaluation(**{**ASKED, **options})
    done = earlier_tasks([before])
    results = evaluate(answers, evaluation, world, out, lambda _done, _text: None, done=done)
    return results, {prompt.split()[0] for prompt in fake.asked}


def edit(path: str, change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def apply(world: Path) -> None:
        records = [json.loads(line) for line in (world / path).read_text().splitlines()]
        change(records)
        write_lines(world / path, records)

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
    ("change", "asked"),
    [
        (lambda world: None, set()),
        (add_unread, set()),
        (repaint, {"odd"}),
        (other_chance, {"odd"}),
        (edit("bench/odd/questions.jsonl", lambda r: r[1].update(answer="no")), {"odd"}),
        (edit("bench/hue/questions.jsonl", lambda r: r[1].update(question="hue x?")), {"hue"}),
        (edit("bench/hue/questions.jsonl", lambda r: r.pop()), {"hue"}),
        (edit("text_tasks/letters.jsonl", lambda r: r[0].update(gold=1)), {"letters"}),
    ],
)
def test_only_tasks_whose_content_changed_are_asked_again(
    first: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    change: Callable[[Path], None],
    asked: set[str],
) -> None:
    root, before = first
    world = tmp_path / "elsewhere"
    shutil.copytree(root / "world", world)
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
    first: tuple[Path, dict[str, Any]], tmp_path: Path, options: dict[str, Any], asked: set[str]
) -> None:
    root, _ = first
    _, heard = again(root / "world", tmp_path / "out", root / "out", **options)
    assert {word.rstrip(":") for word in heard} == asked


def test_a_row_without_its_predictions_is_not_done(
    first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, _ = first
    shutil.copytree(root / "out", tmp_path / "before")
    (tmp_path / "before/predictions/hue.parquet").unlink()
    _, heard = again(root / "world", tmp_path / "out", tmp_path / "before")
    assert heard == {"hue"}


def test_another_programs_results_are_left_alone(tmp_path: Path) -> None:
    for number, text in enumerate(("[]", '{"tasks": [1]}', '{"tasks": {"hue": 0.5}}', "{}")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.json").write_text(text)
    (tmp_path / "notes.txt").touch()
    assert earlier_tasks(sorted(tmp_path.glob("*"))) == {}


def test_the_command_finds_the_score_of_a_changed_file_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_world(tmp_path / name)
    edit("bench/odd/questions.jsonl", lambda rows: [row.update(answer="no") for row in rows])(
        tmp_path / "b"
    )
    heard: list[str] = []

    def run(data: str) -> dict[str, float]:
        fake = Yes()
        monkeypatch.setattr(evaluate_model, "_open_model", lambda *_: (fake, Path(data)))
        request = evaluate_model.EvaluateRequest(
            models=("model",), out=tmp_path / "out", evaluation={"blind": False, "batch_size": 2}
        )
        evaluate_model.evaluate_all(request, Channel(None))
        heard[:] = sorted({prompt.split()[0] for prompt in fake.asked})
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
    edit("text_tasks/letters.jsonl", lambda rows: [row.update(gold=0) for row in rows])(
        tmp_path / "b"
    )
    assert run(".") == {"hue": 0.75, "odd": 0.0, "letters": 1.0}
    assert heard == ["letters"]


def test_what_is_shown_again_says_from_when_it_is_wherever_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path / "world")
    monkeypatch.setattr(evaluate_model, "_open_model", lambda *_: (Yes(), tmp_path / "world"))

    def run(**options: Any) -> str:
        request = evaluate_model.EvaluateRequest(
            models=("model",), out=tmp_path / "out", evaluation={"blind": False, **options}
        )
        with redirect_stdout(io.StringIO()) as told:
            evaluate_model.evaluate_all(request, Channel(None))
        return next(line for line in told.getvalue().splitlines() if "/out/model-" in line)

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


def test_answers_of_another_version_are_asked_again(
    first: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_answers, "ANSWERS_VERSION", eval_answers.ANSWERS_VERSION + 1)
    _, heard = again(first[0] / "world", tmp_path / "out", first[0] / "out")
    assert heard == set(TASKS)
