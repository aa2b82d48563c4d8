"""Evaluations as stages and by `midstream eval`: stopped, shared out, of other people's models."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import tiny
from in_process import stay_here
from midstream.cli import app
from midstream.core.storage import read_json
from midstream.eval.answers import EvaluationStopped
from midstream.eval.tasks import Reply
from midstream.exchange.export import export
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger, Stopped
from midstream.work import evaluate_model
from midstream.work.open_model import open_model
from midstream.work.protocol import Channel
from midstream.work.show_scores import short_names
from ranked import run_ranks

pytestmark = pytest.mark.slow

MEASURED = ("seconds", "peak_memory_bytes")
ASKED = Evaluate(
    of=tiny.CHAT,
    evaluation=tiny.EVALUATION.model_copy(update={"limit": 40, "fixed_answers": "both"}),
)


@pytest.fixture(scope="module")
def whole(tiny_line: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A store in which the evaluation ran without an interruption."""
    ledger = tiny.begun(tiny_line, tmp_path_factory.mktemp("whole"), tiny.SEEN, tiny.CHAT)
    tiny.run_missing(ledger, ASKED)
    return ledger


@pytest.fixture
def own(whole: Ledger, tmp_path: Path) -> Ledger:
    """The same without the evaluation."""
    return tiny.store_with(whole, tmp_path / "store", *ASKED.parents, tiny.SEEN, tiny.TEXT)


def found(ledger: Ledger) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results, but for what is measured, and every row of predictions."""
    results = {k: v for k, v in ledger.results(ASKED).items() if k not in MEASURED}
    folder = ledger.folder(ASKED) / "predictions"
    rows = {path.stem: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}
    for row in (row for own in rows.values() for row in own):
        # Stores lie in different places.
        row["image"] = row["image"] and row["image"].split("/world/")[1]
    return results, rows


def after(points: int) -> Callable[[], bool]:
    left = [points]

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    return stop


@pytest.mark.parametrize("points", [1, 4])
def test_an_evaluation_stopped_within_a_task_ends_as_one_that_was_not(
    whole: Ledger, own: Ledger, points: int
) -> None:
    with pytest.raises(Stopped):
        tiny.runner(own, should_stop=after(points)).run(ASKED)
    kept = own.folder(ASKED) / "answers"
    assert own.state(ASKED) == "stopped"
    lines = sum(path.read_text().count("\n") for path in kept.glob("*.jsonl"))
    assert lines >= points
    tiny.runner(own).run(ASKED)
    assert found(own)[0]["tasks"].keys() == found(whole)[0]["tasks"].keys()
    assert found(own)[1] == found(whole)[1]
    assert not kept.exists()


def test_two_ranks_find_what_one_finds(whole: Ledger, own: Ledger) -> None:
    with pytest.raises(Stopped):
        tiny.runner(own, should_stop=after(2)).run(ASKED)
    ended = run_ranks(own, ASKED, 2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert found(own) == found(whole)


Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line with its work done in this process."""
    monkeypatch.setenv("COLUMNS", "600")
    stay_here(monkeypatch)

    def run(*words: str | Path, ok: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.app([str(word) for word in words])
        printed = capsys.readouterr()
        assert ended.value.code == ok, printed.err[-3000:]
        return printed.out if ok == 0 else printed.err

    return run


def test_a_model_and_its_export_stand_in_one_table(
    whole: Ledger, tmp_path: Path, command: Command
) -> None:
    stage = whole.folder(tiny.CHAT)
    exported = tmp_path / "exported"
    export(open_model(stage, torch.device("cpu")), exported, text_only=False)
    world = whole.folder(tiny.WORLD) / "world"
    out = tmp_path / "evaluations"
    words = ("--data", world, "--out", out, "--limit", "6", "--prompts", "short")
    words += ("--max-new-tokens", "3", "--task", "vqav2", "--task", "pope", "--task")
    words += ("pocket_facts", "--trust-remote-code", "--device", "cpu")
    table = command("eval", stage, exported, *words)
    assert "vqav2" in table
    assert "not whole: vqav2 (6 of" in table
    mine, theirs = (next(out.glob(f"{path.name}-*")) for path in (stage, exported))
    one, other = (read_json(folder / "results.json") for folder in (mine, theirs))
    for task, row in one["tasks"].items():
        assert other["tasks"][task]["score"] == pytest.approx(row["score"], abs=0.17), task
    first = pq.read_table(mine / "predictions/vqav2.parquet").to_pylist()
    second = pq.read_table(theirs / "predictions/vqav2.parquet").to_pylist()
    same = [a["prediction"] == b["prediction"] for a, b in zip(first, second, strict=True)]
    # Features of a frozen encoder are rounded in training, and by the export's code as well.
    assert sum(same) >= len(same) - 1

    # What is done is not done again.
    before = (mine / "results.json").stat().st_mtime_ns
    again = command("eval", stage, *words)
    assert "; as before: vqav2 (of 20" in again
    assert (mine / "results.json").stat().st_mtime_ns == before
    # Asked otherwise, it has another folder, and the first one stays.
    command("eval", stage, *words, "--fixed-answers", "text")
    assert len(list(out.glob(f"{stage.name}-*"))) == 2
    assert (mine / "results.json").stat().st_mtime_ns == before

    shown = command("eval", mine, "--show", "2", "--task", "pope")
    assert shown.count("prompt: ") == 2
    assert "picture: " in shown
    changed = pq.read_table(theirs / "predictions/pope.parquet").to_pylist()
    changed[0]["gold"] = '"maybe"'
    pq.write_table(pa.Table.from_pylist(changed), theirs / "predictions/pope.parquet")
    told = command("eval", "--diff", mine, theirs, "--task", "pope")
    assert "2 of one alone, or with other right answers, are left out" in told
    assert "points" in told
    assert "on 5 examples" in told


def test_what_cannot_be_asked_is_said_in_one_line(
    whole: Ledger, tmp_path: Path, command: Command
) -> None:
    stage = whole.folder(tiny.CHAT)
    wrong = command("eval", stage, "--task", "pope, vqav", "--out", tmp_path, ok=2)
    assert "no task 'vqav'" in wrong
    assert "did you mean vqav2?" in wrong
    assert "name a model" in command("eval", ok=2)
    for data, told in ((tmp_path / "no", "does not exist"), (Path(__file__), "is a file")):
        assert f"{data} {told}; --data is" in command("eval", "x", "--data", data, ok=2)
    full = command("eval", "x", "--data", tmp_path, "--out", __file__, ok=2)
    assert "is no folder; give another --out" in full
    assert "holds no predictions" in command("eval", tmp_path, "--show", "1", ok=2)
    assert "name folders of results" in command("eval", "--show", "1", ok=2)
    for folder in (tmp_path, tmp_path / "no"):
        strange = command("eval", folder, "--data", tmp_path, ok=2)
        assert strange.startswith(f"error: {folder} does not exist or holds no config.json")
        assert len(strange.splitlines()) == 1


def test_a_task_of_the_harness_is_none_of_the_benchmarks_that_sound_like_it(tmp_path: Path) -> None:
    request = evaluate_model.EvaluateRequest(
        models=("m",), out=tmp_path, evaluation={}, tasks=("squadv2", "vqav", "sciqq")
    )
    found = evaluate_model._asked(request, tmp_path)
    assert (found.visual_tasks, found.text_tasks) == (("vqav",), ("squadv2", "sciqq"))


def test_answers_that_cannot_be_read_are_counted_beside_the_scores(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vsr/images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "vsr/images/1.jpg")
    record = {"image": "1.jpg", "caption": "The cat is on the mat.", "label": 1}
    (tmp_path / "vsr/test.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(evaluate_model, "_open_model", lambda *_: (Says("Yes."), tmp_path))
    words = ("--data", tmp_path, "--fixed-answers", "text", "--out", tmp_path / "out")
    table = command("eval", "org/m", *words)
    assert "vsr: 1 of 1 answers cannot be read and count as wrong" in table
    assert "not whole: vsr (1 of 1,222 examples)" in table
    folder = next((tmp_path / "out").glob("m-*"))
    below = command("eval", folder.parent, "--show", "1", ok=2)
    assert f"give a folder of results, one of those in it ({folder.name})" in below


class Broken:
    """A model whose own code fails."""

    weights_digest = "w"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def reply(self, prompts: Sequence[str], *_: Any) -> list[Reply]:
        # As if it stood in the model's own file.
        exec("raise error", {"__name__": "modeling_own", "error": self.error})
        return []

    loglikelihood = loglikelihood_rolling = generate_until = num_tokens = reply


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """One free question about one picture."""
    (tmp_path / "data/qa").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "data/qa/a.png")
    record = {"question": "What is it?", "answer": "red", "image": "a.png"}
    (tmp_path / "data/qa/questions.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize("error", [RuntimeError("sizes\n  3 and 4"), ValueError("sizes 3 and 4")])
def test_an_error_of_a_models_own_code_is_one_line_with_its_name(
    asked: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(evaluate_model, "_open_model", lambda *_: (Broken(error), asked))
    words = ("eval", "org/model", "--data", asked, "--task", "qa", "--out", tmp_path / "out")
    told = " ".join(str(error).split())
    line = f"error: org/model: {type(error).__name__}: {told} (--debug shows where)\n"
    assert command(*words, ok=2) == line
    shown = command(*words, "--debug", ok=2)
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "in reply" in shown
    assert shown.endswith(line)
    stopped = Broken(EvaluationStopped("asked to"))
    monkeypatch.setattr(evaluate_model, "_open_model", lambda *_: (stopped, asked))
    assert command(*words, ok=75).startswith("stopped; ")


class Says(Broken):
    """A model that says one thing."""

    def __init__(self, text: str) -> None:
        self.weights_digest = self.text = text

    def reply(self, prompts: Sequence[str], *_: Any) -> list[Reply]:
        return [Reply(self.text, [], -1.0)] * len(prompts)


def test_two_models_of_one_name_have_two(
    asked: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"x/A/model": "red", "x/B/model/": "blue", "org/other": "red"}
    monkeypatch.setattr(evaluate_model, "_open_model", lambda name, _: (Says(said[name]), asked))
    monkeypatch.setattr(evaluate_model, "_check_named", lambda *_: None)
    out = tmp_path / "out"
    table = command("eval", *said, "--data", asked, "--task", "qa", "--out", out)
    head = next(line for line in table.splitlines() if line.startswith("task"))
    assert head.split() == ["task", "A/model", "B/model", "other"]
    scores = next(line for line in table.splitlines() if line.startswith("qa "))
    assert scores.split()[1:] == ["100.0", "0.0", "100.0"]
    rows = [read_json(path) for path in out.glob("*/results.json")]
    assert sorted(row["about"]["model"] for row in rows) == sorted(said)


def test_a_name_that_is_none_is_told_before_the_models_before_it_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(evaluate_model, "_evaluate_one", lambda name, *_: asked.append(name))
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "stage.json").write_text("{}")
    names = (str(tmp_path / "stage"), str(tmp_path / "absent"))
    request = evaluate_model.EvaluateRequest(models=names, out=tmp_path / "out", evaluation={})
    with pytest.raises(FileNotFoundError, match="absent does not exist or holds no config"):
        evaluate_model.evaluate_all(request, Channel(None))
    assert asked == []


def test_a_slip_in_a_task_of_a_world_is_told_with_the_nearest_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = {"visual_tasks": {"colours": {"format": "qa", "chance": 0}}, "text_tasks": {}}
    (tmp_path / "world.json").write_text(json.dumps(world))
    monkeypatch.setattr(evaluate_model, "_open_model", lambda *_: (Says("red"), tmp_path))
    monkeypatch.setattr(evaluate_model, "_check_named", lambda *_: None)
    request = evaluate_model.EvaluateRequest(
        models=("m",), tasks=("colour",), out=tmp_path / "out", evaluation={}
    )
    with pytest.raises(FileNotFoundError, match=r"'visual_tasks'; did you mean colours\?"):
        evaluate_model.evaluate_all(request, Channel(None))


def test_names_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    names = ["s/1/milestones/80", "s/2/milestones/80", "model", "A/model", "org/model-b/"]
    here = Path.cwd().name
    assert short_names(names) == [
        *("1/milestones/80", "2/milestones/80", f"{here}/model", "A/model", "model-b")
    ]
    assert short_names(["a/b", "a/b/"]) == ["b", "b"]


def test_the_list_says_what_is_there_and_what_is_missing(tmp_path: Path, command: Command) -> None:
    gqa = tmp_path / "gqa"
    gqa.mkdir()
    record = {"imageId": "n1", "question": "?", "answer": "yes"}
    (gqa / "testdev_balanced_questions.json").write_text(json.dumps({"1": record}))
    (tmp_path / "vizwiz").mkdir()
    (tmp_path / "boolq.jsonl").write_text('{"passage": "p", "question": "q", "answer": true}\n')
    listed = " ".join(command("eval", "--list", "--data", tmp_path).split())
    assert "1 questions in" in listed
    assert "1 pictures are missing" in listed
    assert "missing: v2_OpenEnded_mscoco_val2014_questions.json" in listed
    assert "not whole:" in listed
    assert f"yes, in {tmp_path}" in listed
