import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from inputs import midstream
from midstream import __version__
from midstream.cli import catalogue, plan_command, run_commands
from midstream.config import Machine
from midstream.core.tokens import counted
from midstream.cost.graph import order, unneeded
from midstream.launch import local, terminal
from midstream.launch.scheduler import Outcome
from midstream.study.store import Ledger
from midstream.study.studies import Study

STUDY_FILE = """
from pathlib import Path

from tiny import text_run

from midstream.config import DecoderConfig, Evaluation
from midstream.study.stages import Evaluate
from midstream.study.studies import Figure, Line, Study


def study(tokens: int = 1000, name: str = "mine", data: Path | None = None) -> Study:
    result = Evaluate(of=text_run(tokens), evaluation=Evaluation(text_tasks=("facts",)))
    line = Line(name="text", axes={"tokens": tokens}, result=result)
    return Study(name=name, question="[bold]Why?", lines=(line,),
                 figure=Figure(x="tokens", x_label="tokens"))


def misspelt() -> Study:
    return DecoderConfig(hidden_size=64, n_layers=1, num_heads=2)


def needy(root: Path) -> Study:
    return study(name=type(root).__name__)


def number() -> int:
    return 3
"""


# What a preparation says of a source.
FACTS = {"seconds": 1.0, "kind": "text", "num_examples": 1, "distinct_images": 0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_study.py"
    path.write_text(STUDY_FILE)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def refused(*arguments: object) -> str:
    """The message of a command that must end with exit code 2 and no traceback."""
    result = midstream(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def _finish(study: Study, store: Path, **results: Any) -> None:
    ledger = Ledger(store)
    for stage in order(study):
        if not ledger.is_done(stage):
            with ledger.open_stage(stage) as work:
                facts = {**FACTS, "num_tokens": 5, "num_images": 0}
                work.finish({**facts, "peak_memory_bytes": 1, **results})


def test_help_and_version_start_without_the_slow_imports() -> None:
    program = (
        "import sys\nfrom midstream.cli.app import app\n"
        "try:\n    app([sys.argv[1]])\nexcept SystemExit as reason:\n    assert not reason.code\n"
        "slow = 'torch pydantic transformers numpy matplotlib tokenizers pyarrow'.split()\n"
        "assert not {*slow} & {*sys.modules}, {*slow} & {*sys.modules}"
    )
    for how, expected in (
        (("-c", program, "--help"), "demo"),
        (("-c", program, "--version"), __version__),
        (("-m", "midstream", "--version"), f"midstream {__version__}\n"),
    ):
        found = subprocess.run([sys.executable, *how], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        assert expected in found.stdout


def test_plan_prints_stages_and_totals_and_long_ones_by_kind(
    file: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = midstream("plan", f"{file}:study", "--store", store, "--set", "tokens=2000")
    assert result.exit_code == 0, result.output
    study = catalogue.find_study(f"{file}:study", ["tokens=2000"])
    for stage in order(study):
        assert stage.identity[:7] in result.stdout
    assert "2 k" in result.stdout
    assert "0 done, 5 to run" in result.stdout
    assert "[bold]Why?" in result.stdout
    monkeypatch.setattr(plan_command, "MAX_PLAN_ROWS", 2)
    result = midstream("plan", f"{file}:study", "--store", store)
    assert "1 text" in result.stdout
    assert study.lines[0].result.identity[:7] not in result.stdout


def test_plan_as_json_lists_every_stage(file: Path, store: Path) -> None:
    result = midstream("plan", f"{file}:study", "--store", store, "--json")
    found = json.loads(result.stdout)
    study = catalogue.find_study(f"{file}:study", [])
    assert [stage["name"] for stage in found["stages"]] == [s.name for s in order(study)]
    assert found["num_to_run"] == found["num_stages"] == 5
    assert found["stages"][3]["tokens"] == 1000
    assert found["stages"][3]["parents"] == [s.name for s in order(study)[3].parents]
    assert found["stages"][0]["lines"] == ["text"]


def test_an_unknown_study_is_told_with_those_there_are() -> None:
    known = catalogue.catalogue()
    assert "pocket.when_images_arrive" in known
    message = refused("plan", "pocket.when_image_arrives")
    assert "did you mean 'pocket.when_images_arrive'" in message
    for name in known:
        assert name in message


@pytest.mark.parametrize(
    ("command", "study", "settings", "told"),
    [
        ("plan", "{folder}/none.py:study", (), "no file {folder}/none.py"),
        (
            "plan",
            "{file}:misspelt",
            (),
            "DecoderConfig: DecoderConfig has no field 'n_layers'; did ",
        ),
        (
            "plan",
            "{file}:study",
            ("tokens=-5",),
            "total_tokens: Input should be greater than 0, not -5",
        ),
        (
            "plan",
            "pocket.when_images_arrive",
            ("image_share=80",),
            "less than or equal to 1, not 80.0; shares are from 0 to 1, 80 % is 0.8",
        ),
        ("plan", "pocket.when_images_arrive", ("seeds=7,7",), "and each seed and place once"),
        ("plan", "{file}:number", (), "returned a int"),
        ("plan", "{file}:needy", (), "needs root; add --set root=VALUE"),
        ("plan", "{file}:study", ("tokens",), "name=value"),
        ("plan", "{file}:study", ("tokens=1", "tokens=2"), "twice"),
        ("run", "{file}:study --device gpu", (), "Machine.device: Input should be 'auto', 'cpu' "),
    ],
)
def test_what_a_user_can_put_right_is_named(
    file: Path, store: Path, command: str, study: str, settings: Sequence[str], told: str
) -> None:
    words = study.format(file=file, folder=file.parent).split()
    given = [word for setting in settings for word in ("--set", setting)]
    message = refused(command, *words, *given, "--store", store)
    assert told.format(folder=file.parent) in message
    assert "errors.pydantic.dev" not in message
    assert not store.exists()


ANNOTATED = """
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from midstream.study.studies import Study


def study(
    short: bool = False,
    seeds: Sequence[int] = (0,),
    shares: Sequence[float] = (0.1,),
    names: Sequence[str] = (),
    checkpoint: str = "",
    folder: Path | None = None,
    rate: float | int = 0.1,
    tokens: int = 1,
    resize: Literal["crop", "square"] = "crop",
    mixture: str | Mapping[str, float] = "",
    plain=None,
    whether=True,
    anything: Any = None,
) -> Study:
    raise ValueError(repr(locals()))
"""


@pytest.fixture
def annotated(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(ANNOTATED)
    return f"{path}:study"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        *[(f"short={text}", False) for text in ("False", "no", "0")],
        ("short=yes", True),
        ("seeds=7", [7]),
        ("seeds=7,365", [7, 365]),
        ("seeds=[]", []),
        *[(f"shares={text}", [0.1, 0.3]) for text in ("0.1,0.3", "[0.1,.3]")],
        ("names=2024", ["2024"]),
        ("names=[a/b,c]", ["a/b", "c"]),
        ('names=["a,b"]', ["a,b"]),
        ("checkpoint=2024", "2024"),
        ("checkpoint=a,b", "a,b"),
        ("checkpoint=a=b", "a=b"),
        ('checkpoint="pocket"', "pocket"),
        ("folder=2024", Path("2024")),
        ("folder=null", None),
        ("rate=3e-4", 3e-4),
        ("tokens=1e3", 1000),
        ("resize=square", "square"),
        ("mixture=web", "web"),
        ('mixture={"web": 1}', {"web": 1.0}),
        ("plain=False", False),
        ("names=(a,b)", ["a", "b"]),
        ("folder=None", None),
        ("checkpoint=None", "None"),
        ("whether=no", False),
        ("plain=[1]", [1]),
        ("anything=7", 7),
    ],
)
def test_a_setting_is_read_as_its_argument_is_annotated(
    annotated: str, setting: str, expected: Any
) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(ValueError, match="short") as told:
        catalogue.find_study(annotated, [setting])
    assert f"'{key}': {expected!r}" in str(told.value)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("short=maybe", "short of {} takes true or false, such as --set short=true"),
        ("seeds=x", "seeds of {} takes a list of whole numbers, such as --set seeds=7,365"),
        ("seeds=7.5", "takes a list of whole numbers"),
        ("shares={}", "shares of {} takes a list of numbers, such as --set shares=0.1,0.5"),
        ("rate=fast", "rate of {} takes a number, such as --set rate=0.5"),
        ("tokens=", "tokens of {} takes a whole number, such as --set tokens=7"),
        ("resize=round", "resize of {} takes one of crop, square, such as --set resize=crop"),
    ],
)
def test_a_setting_that_its_argument_does_not_take_is_one_line(
    annotated: str, setting: str, told: str
) -> None:
    message = refused("plan", annotated, "--set", setting)
    assert message.startswith(f"error: --set {setting}: ")
    assert told.format(annotated) in message
    assert len(message.splitlines()) == 1


def test_a_finished_study_has_nothing_to_do(
    file: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _finish(catalogue.find_study(f"{file}:study", []), store)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    result = midstream("run", f"{file}:study", "--store", store)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"nothing to do: all 5 stages of mine are done ({store})\n"
    # It needs what others have run for it.
    ledger = Ledger(store)
    assert ledger.study_names() == ["mine"]
    assert not unneeded(ledger)
    assert catalogue.last_study(f"{file}:study", ledger, [])[0].name == "mine"
    # No markup of a terminal's.
    result = midstream("run", f"{file}:study", "--set", "name=a [red] b", "--store", store)
    assert "stages of a [red] b are done" in result.stdout


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome(num_before=0, num_done=3), 0),
        (Outcome(num_before=1, num_failed=1, num_skipped=1, messages=("a failed: b",)), 1),
        (Outcome(num_before=1, num_stopped=1, num_skipped=1, interrupted=True), 75),
        (Outcome(num_before=1, num_done=1, num_skipped=1, interrupted=True), 75),
        (Outcome(num_before=1, num_done=2, interrupted=True), 0),
    ],
)
def test_the_exit_code_tells_how_a_run_ended(
    file: Path, store: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, code: int
) -> None:
    monkeypatch.setattr(local, "run", lambda *_, **__: outcome)
    result = midstream("run", f"{file}:study", "--store", store)
    assert result.exit_code == code, result.output
    assert f"{counted(outcome.num_done, 'stage')} done now" in result.stdout
    assert ("a failed: b" in result.stderr) == (code == 1)
    assert ("continues" in result.stderr) == (code == 75)


def test_status_shows_the_studies_of_a_store_and_why_stages_failed(file: Path, store: Path) -> None:
    assert "holds no study" in refused("status", "--store", store)
    study = catalogue.find_study(f"{file}:study", [])
    ledger = Ledger(store)
    ledger.save_study(study)
    ledger.mark_failed(order(study)[1], "ValueError: [too] bad")
    for arguments in ((), ("mine",), (f"{file}:study",)):
        result = midstream("status", *arguments, "--store", store)
        assert result.exit_code == 0, result.output
        assert "mine" in result.stdout
        assert "ValueError: [too] bad" in result.stdout
        assert str(ledger.folder(order(study)[1])) in result.stdout


def test_results_are_printed_in_points() -> None:
    rows: list[dict[str, Any]] = [
        {
            "name": "text 20% [a]",
            "axis.completion": 0.2,
            "stable.vision": 0.1234,
            "stable.vision_blind": -0.01,
            "stable.text": None,
            "seconds": 1234.5,
            "state": "done",
        }
    ]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.print_results(rows, console)
    text = console.export_text()
    for expected in ("text 20% [a]", "completion", "+12.3", "-1.0", "1,234", "done"):
        assert expected in text


EVENTS: list[dict[str, Any]] = [
    {"event": "plan", "num_stages": 3, "num_done": 1},
    {"event": "started", "stage": "pretrain-1", "worker": 1, "log": "w"},
    *[
        {
            "event": "progress",
            "stage": "pretrain-1",
            "done": step / 10,
            "tokens_seen": step,
            "total_tokens": 10,
            "loss": 2.5,
            "tokens_per_second": 1234.0,
            "note": "",
            "worker": 1,
            "log": "w",
        }
        for step in range(10)
    ],
    {"event": "finished", "stage": "pretrain-1", "state": "done", "error": None, "log": "w"},
    {"event": "started", "stage": "evaluate-2", "worker": 1, "log": "w"},
    {"event": "finished", "stage": "evaluate-2", "state": "failed", "error": "[x]", "log": "w"},
    {"event": "stopping", "signal": 15},
]


LABELS = {"pretrain-1": "text, 1 k tokens · 1", "evaluate-2": "evaluation [x] · 2"}


def _shown(*, terminal_width: int, interactive: bool) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(
            width=terminal_width, record=True, file=nowhere, force_terminal=interactive
        )
        with terminal.progress(console, LABELS) as show:
            for event in EVENTS:
                show(event)
        return console.export_text()


def test_without_a_terminal_progress_is_a_line_a_stage_and_few_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = _shown(terminal_width=80, interactive=False).splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "1 of 3 stages done already",
        "text, 1 k tokens · 1 started",
        "text, 1 k tokens · 1 done (2/3)",
        "evaluation [x] · 2 started",
        "evaluation [x] · 2 failed: [x] (see w) (2/3)",
        "stopping: the running stages keep a checkpoint",
    ]
    monkeypatch.setattr(terminal, "QUIET_SECONDS", 0.0)
    lines = _shown(terminal_width=80, interactive=False).splitlines()
    assert any("text, 1 k tokens · 1 50% 1,234 tokens/s, loss 2.500" in line for line in lines)


def test_in_a_terminal_progress_is_bars_and_failures_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _shown(terminal_width=120, interactive=True)
    assert "stages" in text
    assert "2/3" in text
    assert "evaluation [x] · 2 failed: [x] (see w)" in text
    assert "text, 1 k tokens · 1" in text


def test_peak_memory_is_the_sum_of_the_largest_stage_of_each_worker(
    file: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, ledger = catalogue.find_study(f"{file}:study", []), Ledger(store)

    def run(*given: Any, **options: Any) -> Outcome:
        takes = zip(order(study), (10, 10, 10, 300, 20), (1, 1, 1, 1, 2), strict=True)
        for stage, took, worker in takes:
            with ledger.open_stage(stage) as work:
                work.finish({"seconds": 1.0, "peak_memory_bytes": took})
            told = {"event": "finished", "state": "done", "stage": stage.name, "worker": worker}
            given[3](told | {"log": "w"})
        return Outcome(num_before=0, num_done=5)

    monkeypatch.setattr(local, "run", run)
    assert run_commands.run_and_tell(study, ledger, Machine(), {}) == 320
