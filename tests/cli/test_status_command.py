import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

import tiny
from inputs import midstream
from midstream.cli import run_commands, store_commands
from midstream.cli.catalogue import keep_asked
from midstream.cost.graph import order
from midstream.launch import terminal
from midstream.launch.overview import Board, Overview, StageView, overview_table, totals
from midstream.study import lease as progress
from midstream.study.label import label
from midstream.study.lease import Sign, is_held
from midstream.study.stages import Stage
from midstream.study.store import Ledger, launch_lock
from midstream.study.studies import Figure, Line, Study, Suite
from read_only import only_read

STUDY = Study(
    name="mine.small",
    question="When?",
    lines=(Line(name="a line", axes={"x": 1}, result=tiny.RESULT),),
    figure=Figure(x="x", x_label="x"),
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "store")
    ledger.save_study(STUDY)
    return ledger


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


MADE = {"kind": "text", "num_examples": 10, "num_tokens": 900, "num_images": 0}
RESULTS = {"seconds": 10.0, **MADE, "distinct_images": 0}


def finish(ledger: Ledger, *stages: Stage) -> None:
    for stage in stages:
        with ledger.open_stage(stage) as work:
            work.finish(RESULTS)


def run(held: ExitStack, ledger: Ledger, stage: Stage, loss: float = 2.0) -> Callable[[], None]:
    """A stage that runs until the function is called."""
    inner = held.enter_context(ExitStack())
    work = inner.enter_context(ledger.open_stage(stage))
    line = {"step": 1, "tokens_seen": 4_000, "loss": loss, "seconds": 1.0}
    (work.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    work.finish(RESULTS)
    return inner.close


def drawn(seen: Overview, width: int, height: int | None = None) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(overview_table(seen, width, height))
    return console.export_text()


def test_status_shows_what_runs_and_counts_the_rest(ledger: Ledger, held: ExitStack) -> None:
    finish(ledger, tiny.WORLD, tiny.ENCODER_STAGE)
    run(held, ledger, tiny.TEXT)
    for arguments in ((), ("mine.small",)):
        result = midstream("status", *arguments, "--store", ledger.store)
        assert result.exit_code == 0, result.output
        assert label(tiny.TEXT) in result.stdout
        assert "25%" in result.stdout
        assert f"{label(tiny.TEXT)}: {ledger.folder(tiny.TEXT)} is running" in result.stdout
        assert "2 of 10 stages done, 1 running, 0 failed, 7 to run" in " ".join(
            result.stdout.split()
        )


def test_status_as_json_has_every_stage(ledger: Ledger, held: ExitStack) -> None:
    run(held, ledger, tiny.WORLD)
    (study,) = json.loads(midstream("status", "--store", ledger.store, "--json").stdout)["studies"]
    assert study["study"] == "mine.small"
    assert study["counts"]["running"] == 1
    assert [one["name"] for one in study["stages"]] == [one.name for one in order(STUDY)]
    assert [one["label"] for one in study["stages"]] == [label(one) for one in order(STUDY)]


def test_an_unknown_study_is_answered_with_the_nearest_of_store_and_recipes(ledger: Ledger) -> None:
    result = midstream("status", "mine.smal", "--store", ledger.store)
    assert result.exit_code == 2
    assert "did you mean 'mine.small'?" in result.stderr
    result = midstream("status", "pocket.when_image_arrives", "--store", ledger.store)
    assert "did you mean 'pocket.when_images_arrive'?" in result.stderr


def test_a_study_of_another_version_hides_none_of_the_others(ledger: Ledger) -> None:
    (ledger.store / "studies" / "older.json").write_text('{"kind": "study", "name": "older"}')
    result = midstream("status", "--store", ledger.store)
    assert result.exit_code == 0, result.output
    assert "mine.small" in result.stdout
    assert "left out: " in result.stderr
    assert "older.json is of another version" in result.stderr
    assert midstream("status", "older", "--store", ledger.store).exit_code == 2
    # What is no stored study is looked for among those that can be read.
    result = midstream("status", "pocket.when_images_arrive", "--store", ledger.store)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("options", [(), ("--json",), ("--watch",), ("--watch", "--json")])
def test_a_store_that_may_only_be_read_is_watched(
    ledger: Ledger, held: ExitStack, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(ledger, tiny.WORLD, tiny.ENCODER_STAGE)
    with launch_lock(ledger.store):
        pass
    with pytest.raises(ZeroDivisionError), ledger.open_stage(tiny.TEXT):
        raise ZeroDivisionError
    run(held, ledger, tiny.RESULT)
    looks = iter((None, KeyboardInterrupt()))
    monkeypatch.setattr(run_commands.time, "sleep", lambda _: _raised(next(looks)))
    with only_read(ledger.store):
        result = midstream("status", *options, "--store", ledger.store)
    assert result.exit_code == 0, result.output
    assert "running" in result.stdout


def _raised(error: BaseException | None) -> None:
    if error is not None:
        raise error


def test_a_lock_is_seen_by_those_who_may_only_read_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    with FileLock(path), only_read(tmp_path):
        assert is_held(path)
        assert is_held(path)
    path.touch()
    with only_read(tmp_path):
        assert not is_held(path)
    # Who looks keeps nobody from it.
    with FileLock(path, timeout=0):
        pass


def renamed(name: str) -> Study:
    return STUDY.model_copy(update={"name": name})


def ran(ledger: Ledger, name: str, at: int) -> None:
    """A study that was run under this name, at so many seconds."""
    os.utime(ledger.save_study(renamed(name)), (at, at))


@pytest.fixture
def named_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report says whose it is: what stands in it is told in `report/`."""

    def write(study: Study, *_: object) -> list[object]:
        print(study.name)
        return []

    monkeypatch.setattr(store_commands, "write", write)


@pytest.mark.usefixtures("named_reports")
@pytest.mark.parametrize("command", ["status", "report"])
def test_a_study_is_found_without_the_scale_in_its_name(ledger: Ledger, command: str) -> None:
    ran(ledger, "paper.figure_4.79m", at=1)
    result = midstream(command, "paper.figure_4", "--store", ledger.store)
    assert result.exit_code == 0, result.output
    assert "paper.figure_4.79m" in result.stdout
    assert result.stderr == ""


@pytest.mark.usefixtures("named_reports")
@pytest.mark.parametrize("command", ["status", "report"])
def test_of_several_scales_the_last_run_is_shown_and_the_others_are_named(
    ledger: Ledger, command: str
) -> None:
    ran(ledger, "paper.figure_4.1b", at=1)
    ran(ledger, "paper.figure_4.pocket", at=3)
    ran(ledger, "paper.figure_4.79m", at=2)
    result = midstream(command, "paper.figure_4", "--store", ledger.store)
    assert result.exit_code == 0, result.output
    assert "paper.figure_4.pocket" in result.stdout
    assert "paper.figure_4.pocket was run last" in result.stderr
    assert "there is also paper.figure_4.79m, paper.figure_4.1b" in result.stderr
    named = midstream(command, "paper.figure_4.1b", "--store", ledger.store)
    assert "paper.figure_4.1b" in named.stdout
    assert named.stderr == ""


def test_a_study_within_a_suite_is_found_without_its_scale(ledger: Ledger) -> None:
    suite = Suite(name="paper.figures.79m", question="?", studies=(renamed("paper.figure_4.79m"),))
    ledger.save_study(suite)
    result = midstream("status", "paper.figure_4", "--store", ledger.store)
    assert "paper.figure_4.79m" in result.stdout


def test_a_study_of_a_file_is_found_by_what_run_was_given(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text("raise RuntimeError('it is not asked again')")
    # The name of a file is the same from every folder.
    (tmp_path / "deep").mkdir()
    keep_asked(ledger, f"{tmp_path}/deep/../my.py:study", STUDY)
    for age, noted in ((3600, False), (-3600, True)):
        when = (ledger.store / "studies" / "mine.small.json").stat().st_mtime - age
        os.utime(file, (when, when))
        result = midstream("status", f"{file}:study", "--store", ledger.store)
        assert result.exit_code == 0, result.output
        assert "mine.small" in result.stdout
        # What is shown is the study as it was run, whatever stands in its file by now.
        assert ("was changed since: midstream run" in result.stderr) == noted


def stage_view(number: int, state: str = "running", **values: object) -> StageView:
    name = f"continue-{number:04x}000000000000"
    called = f"image-text, text 80 %, seed {number} · {number:04x}000"
    sign = Sign(done=0.5, loss=1.25, tokens_per_second=12_345.0, seconds_left=90.0)
    place = {"sign": sign, "host": "node7", "pid": 4, "since": "2026-01-02T03:04:05+00:00"}
    return StageView(name, called, "continue", state, **{**place, **values})  # type: ignore[arg-type]


def overview(*stages: StageView) -> Overview:
    return Overview("a.study", stages, 3600.0, 0, 0, True)


@pytest.mark.parametrize("width", [24, 60, 80, 100])
def test_the_table_fits_any_width_and_says_more_where_there_is_room(width: int) -> None:
    seen = overview(stage_view(1), stage_view(2, "failed", error="bad"), stage_view(3, "new"))
    text = drawn(seen, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "50%" in text
    assert ("1.250" in text) == (width >= 56)
    assert ("node7:4" in text) == (width >= 100)
    assert "0001000" in text
    assert ("image-text, text 80 %, seed 1 · 0001000" in text) == (width >= 80)


def test_many_stages_are_shown_as_far_as_there_is_room_and_the_rest_is_counted() -> None:
    many = [stage_view(number) for number in range(40)]
    failed = [stage_view(number, "failed") for number in range(100, 103)]
    text = drawn(overview(*failed, *many), 80, height=24)
    assert len(text.splitlines()) <= 24
    assert text.index("running") < text.index("and ")
    assert "3 failed, for which there is no room here" in text
    assert "0 of 43 stages done, 40 running, 3 failed" in text


def test_what_runs_stands_before_what_failed_and_that_before_what_was_stopped() -> None:
    seen = overview(stage_view(1, "stopped"), stage_view(2, "failed"), stage_view(3))
    text = drawn(seen, 100)
    places = [text.index(f"seed {k}") for k in (3, 2, 1)]
    assert places == sorted(places)


def test_a_stage_that_says_nothing_any_more_is_called_silent() -> None:
    old = Sign(done=0.5, seen="2026-01-01T00:00:00+00:00", note="encoding")
    assert "silent for" in drawn(overview(stage_view(1, sign=old)), 140)
    assert "silent" not in drawn(overview(stage_view(1, "failed", sign=old)), 140)


def test_a_job_that_waits_in_the_queue_is_shown() -> None:
    waiting = stage_view(1, "new", sign=Sign(), host=None, job="12")
    assert "job 12" in drawn(overview(waiting), 140)


def test_totals_say_what_is_behind_a_failed_stage_and_whose_time_is_not_known() -> None:
    stages = (stage_view(1, "failed"), stage_view(2, "new"), stage_view(3, "new"))
    seen = Overview("a", stages, 120.0, num_unestimated=1, num_blocked=1, active=False)
    assert totals(seen) == (
        "0 of 3 stages done, 0 running, 1 failed, 1 to run, 1 behind a failed one; "
        "about 2 min left; the time of 1 more is not known yet"
    )


def watched(
    ledger: Ledger, sleep: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> list[str]:
    run_commands._watch([Board(STUDY, ledger)], 1.0, False, sleep)
    return capsys.readouterr().out.splitlines()


def test_watching_ends_when_what_ran_has_ended(
    ledger: Ledger, held: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    end = run(held, ledger, tiny.WORLD)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            end()
        assert len(slept) < 9

    lines = watched(ledger, sleep, capsys)
    assert slept == [1.0, 1.0]
    assert "1 running" in lines[0]
    assert "1 of 10 stages done" in lines[1]
    assert "nothing runs any more" in lines[-1]


def test_watching_what_is_settled_ends_at_once(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.mark_failed(tiny.WORLD, "bad")

    def never(seconds: float) -> None:
        raise AssertionError("nothing is left to wait for")

    (line,) = watched(ledger, never, capsys)
    assert "1 failed, 0 to run, 9 behind a failed one" in line


def test_watching_what_nobody_runs_yet_waits_for_it(
    ledger: Ledger, held: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: list[Callable[[], None]] = []
    count = 0

    def sleep(seconds: float) -> None:
        nonlocal count
        count += 1
        if count == 3:
            ends.append(run(held, ledger, tiny.WORLD))
        if count == 4:
            ends[0]()

    assert "1 of 10 stages done" in watched(ledger, sleep, capsys)[-2]
    assert count == 4


@pytest.mark.parametrize("words", [("status", "--watch"), ("logs", "prepare", "--follow")])
def test_ctrl_c_leaves_what_goes_on_with_0(
    ledger: Ledger, held: ExitStack, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    run(held, ledger, tiny.WORLD)
    monkeypatch.setattr(run_commands.time, "sleep", interrupted)
    assert midstream(*words, "--store", ledger.store).exit_code == 0


def test_a_terminal_gets_one_table_that_changes(
    ledger: Ledger, held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=70, height=30, color_system=None)
    monkeypatch.setattr(terminal, "out", lambda: console)
    end = run(held, ledger, tiny.WORLD)
    run_commands._watch([Board(STUDY, ledger)], 1.0, False, lambda seconds: end())
    assert "\x1b[?25l" in screen.getvalue()  # the cursor is hidden
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("1 of 10 stages done")


def test_watching_as_json_prints_a_line_a_look(
    ledger: Ledger, held: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    end = run(held, ledger, tiny.WORLD)
    run_commands._watch([Board(STUDY, ledger)], 1.0, True, lambda seconds: end())
    looks = [json.loads(line)["studies"][0] for line in capsys.readouterr().out.splitlines()]
    assert [look["counts"]["running"] for look in looks] == [1, 0]


@pytest.fixture
def log(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of the process that runs the stages of a test, which is this one."""
    path = ledger.store / "worker-1.log"
    monkeypatch.setenv(progress.LOG, str(path))
    return path


def say(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(text)


def mark(path: Path, stage: Stage) -> None:
    say(path, f"--- {stage.name} starts, 2026-01-01, process {os.getpid()}\n")


def test_logs_show_a_stages_state_steps_and_its_own_part_of_the_log(
    ledger: Ledger, held: ExitStack, log: Path
) -> None:
    say(log, "of nobody\n")
    end = run(held, ledger, tiny.WORLD)
    mark(log, tiny.WORLD)
    say(log, "first\ntwo\nthree\n")
    end()
    mark(log, tiny.TEXT)
    with pytest.raises(ValueError, match="bad"), ledger.open_stage(tiny.TEXT):
        raise ValueError("bad")
    say(log, "a traceback that came later\n")
    first = midstream("logs", "prepare", "--store", ledger.store, "--lines", 2)
    assert first.exit_code == 0, first.output
    assert f"{label(tiny.WORLD)}: {ledger.folder(tiny.WORLD)} is done" in first.stdout
    assert '"loss": 2.0' in first.stdout
    assert "two\nthree\n" in first.stdout
    for other in ("nobody", "first", "traceback"):
        assert other not in first.stdout
    for wanted in (tiny.TEXT.name, tiny.TEXT.name[:12], tiny.TEXT.identity[:7], label(tiny.TEXT)):
        second = midstream("logs", wanted, "--store", ledger.store)
        assert f"{label(tiny.TEXT)}: {ledger.folder(tiny.TEXT)} is failed" in second.stdout
    assert "error: ValueError: bad" in second.stdout
    assert "a traceback that came later" in second.stdout
    assert "three" not in second.stdout


def test_following_a_stage_prints_what_comes_and_ends_with_it(
    ledger: Ledger, held: ExitStack, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = run(held, ledger, tiny.WORLD)
    mark(log, tiny.WORLD)
    say(log, "before\nhalf a ")
    texts = iter(["line\nafter\n", None])

    def sleep(seconds: float) -> None:
        text = next(texts)
        if text is None:
            say(log, "last words\n")
            end()
        else:
            say(log, text)

    monkeypatch.setattr(run_commands.time, "sleep", sleep)
    result = midstream("logs", "prepare", "--store", ledger.store, "--follow")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("before\nhalf a line\nafter\nlast words\ndone\n")


def test_a_stage_without_a_log_says_so(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.LOG, raising=False)
    finish(ledger, tiny.WORLD)
    assert "had no log file" in midstream("logs", "prepare", "--store", ledger.store).stdout


def test_a_stage_that_is_unknown_or_not_alone_is_answered_with_names(ledger: Ledger) -> None:
    assert "holds no stage" in midstream("logs", "x", "--store", ledger.store).stderr
    finish(ledger, tiny.WORLD, tiny.TEXT)
    result = midstream("logs", "p", "--store", ledger.store)
    assert result.exit_code == 2
    assert tiny.WORLD.name in result.stderr
    assert tiny.TEXT.name in result.stderr
    wrong = midstream("logs", "prepair", "--store", ledger.store).stderr
    assert f"did you mean '{tiny.WORLD.name}'?" in " ".join(wrong.split())
