"""What a user can get wrong, through the command line: one message, an exit code, nothing lost."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import Result

import own_world
import tiny
from inputs import midstream
from midstream.cli.catalogue import find_study
from midstream.core.identity import file_sha256
from midstream.cost.graph import order, order_of
from midstream.study.stages import Continue, PrepareSource, Stage
from midstream.study.store import Ledger, launch_lock
from midstream.study.studies import Study
from own_studies import ROWS

STUDY_FILE = """
from pathlib import Path

from own_studies import *
from own_world import VOCAB_SIZE, data_of

from midstream.config import PublicFolder, TrainedTokenizer
from midstream.core.identity import SourceFingerprint, WorldFingerprint


def sees(data: Prepare) -> Continue:
    return seen(data, mixed(200, pictures=0.4, web=0.4, talks=0.2))


def good(root: Path) -> Study:
    return study_of(text_run(data_of(root)))


def worlds(root: Path) -> Study:
    kinds = {"web": "text", "pictures": "caption", "talks": "instruct"}
    digests = {name: SourceFingerprint(kind=kind, digest="0") for name, kind in kinds.items()}
    gone = PublicFolder(root=root / "gone", fingerprint=WorldFingerprint(sources=digests))
    return study_of(
        text_run(data_of(root / "good")),
        *(sees(data_of(root / name)) for name in ("torn", "long", "missing")),
        sees(Prepare(world=gone, tokenizer=TrainedTokenizer(vocab_size=VOCAB_SIZE))),
    )
"""
# The worlds of its lines.
WORLDS = ("good", "torn", "long", "missing", "gone")
LONG_CAPTION = "a red circle and a blue star " * 30


def listing(store: Path) -> dict[str, str]:
    """By path: the sha256 of each file; locks, which hold nothing, and what is only remembered are
    left out."""
    return {
        path.relative_to(store).as_posix(): file_sha256(path)
        for path in sorted(store.rglob("*"))
        if path.is_file() and not path.name.endswith("lock") and path != Ledger(store).digests
    }


def change_shard(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write a tar shard again with other contents."""
    with tarfile.open(path) as shard:
        members = [(item.name, shard.extractfile(item)) for item in shard if item.isfile()]
        contents = [(name, change(name, stream.read())) for name, stream in members if stream]
    with tarfile.open(path, "w") as shard:
        for name, data in contents:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))


def shard_of(world: Path) -> tuple[Path, str]:
    """The first caption shard of a world and the key of its fourth sample."""
    path = sorted((world / "captions" / "pictures").glob("*.tar"))[0]
    with tarfile.open(path) as shard:
        keys = list(dict.fromkeys(name.partition(".")[0] for name in shard.getnames()))
    return path, keys[3]


@dataclass(frozen=True)
class Ran:
    """A run over good and broken worlds: the store's files before and after, what was said."""

    ledger: Ledger
    worlds: Path
    study: Study
    before: dict[str, str]
    after: dict[str, str]
    result: Result

    def failed(self, line: str) -> Stage:
        """The first stage of a line that is not done, parents first."""
        result = self.study.lines[WORLDS.index(line)].result
        return next(stage for stage in order_of(result) if not self.ledger.is_done(stage))

    def message(self, stage: Stage) -> str:
        """The one line on standard error that says why a stage failed."""
        mark = f"{stage.identity[:7]} failed: "
        (line,) = [line for line in self.result.stderr.splitlines() if mark in line]
        return line.partition(mark)[2]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "my_study.py"
    path.write_text(STUDY_FILE)
    return path


@pytest.fixture(scope="module")
def ran(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run with a worker process; the good world's line was done before."""
    folder = tmp_path_factory.mktemp("worlds")
    for name in WORLDS[:-1]:
        own_world.write_world(folder / name)
    shard, key = shard_of(folder / "torn")
    change_shard(shard, lambda name, data: data[:99] if name == f"{key}.jpg" else data)
    shard, key = shard_of(folder / "long")
    change_shard(shard, lambda n, data: LONG_CAPTION.encode() if n == f"{key}.txt" else data)
    talks = folder / "missing" / "instruct" / "talks"
    record = json.loads((talks / "talks.json").read_text())[2]
    (talks / record["image"]).unlink()
    ledger = Ledger(folder / "store")
    settings = [f"root={folder}"]
    study = find_study(f"{file}:worlds", settings)
    tiny.run_missing(ledger, study.lines[0].result)
    before = listing(ledger.store)
    # What is wrong beforehand is refused otherwise, and with it the lines that are not to blame.
    options = ("--skip-checks", "--workers", 1, "--device", "cpu", "--store", ledger.store)
    result = midstream("run", f"{file}:worlds", "--set", settings[0], *options)
    return Ran(ledger, folder, study, before, listing(ledger.store), result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "kind", "told"),
    [
        ("torn", PrepareSource, ["1 of 20 records", "{shard}: picture cannot be decoded"]),
        (
            "long",
            Continue,
            ["{shard}", f"do not fit into a row of {ROWS.row_length}", "raise row_length"],
        ),
        (
            "missing",
            PrepareSource,
            ["talks.json, record 2 ({id!r})", "missing picture ({picture})"],
        ),
        ("gone", PrepareSource, ["{world} does not exist"]),
    ],
)
def test_a_record_that_fails_a_stage_is_named_with_its_place_and_the_remedy(
    ran: Ran, line: str, kind: type[Stage], told: list[str]
) -> None:
    stage, world = ran.failed(line), ran.worlds / line
    message = ran.message(stage)
    words = {"world": world}
    if line in ("torn", "long"):
        shard, key = shard_of(world)
        words |= {"shard": f"{shard.relative_to(world)}, sample {key}"}
    elif line == "missing":
        record = json.loads((world / "instruct/talks/talks.json").read_text())[2]
        words |= {"id": record["id"], "picture": world / "instruct/talks" / record["image"]}
    for part in told:
        assert part.format(**words) in message
    remedy = {"long": "--max-tokens", "gone": str(world)}
    assert remedy.get(line, "mend the data, or raise the limit") in message
    if line != "gone":
        assert isinstance(stage, kind)
        # Its parents were not to blame and are done.
        assert all(ran.ledger.is_done(parent) for parent in stage.parents)


@pytest.mark.slow
def test_a_run_with_failed_stages_tells_no_traceback_and_ends_with_an_error(ran: Ran) -> None:
    assert ran.result.exit_code == 1
    assert isinstance(ran.result.exception, SystemExit)
    assert "Traceback" not in ran.result.output
    lines = ran.result.stderr.splitlines()
    assert sum(" failed: " in line for line in lines) == 4
    # Beside them only which stages could not start for that.
    assert all(" failed: " in line or " not started: " in line for line in lines)


@pytest.mark.slow
def test_failed_stages_leave_everything_that_was_there_as_it_was(ran: Ran) -> None:
    assert ran.before
    kept = {path: ran.after.get(path) for path in ran.before}
    assert kept == ran.before
    new = {path.split("/")[0] for path in ran.after.keys() - ran.before.keys()}
    stages = [ran.failed(name) for name in ("torn", "long", "missing", "gone")]
    own = {"studies", "worker-1.json", "worker-1.log", "features", "asked.json", "digests.sqlite"}
    assert new <= {stage.name for stage in order(ran.study)} | own
    for stage in stages:
        assert ran.ledger.state(stage) == "failed"
        assert not ran.ledger.is_done(stage)
        files = {path for path in ran.after if path.startswith(f"{stage.name}/")}
        left = {path.removeprefix(f"{stage.name}/") for path in files}
        # Shards that are whole stay for the next try.
        rest = {path for path in left if not path.startswith("source/")}
        assert rest <= {"stage.json", "status.json", "metrics.jsonl"}
        error = ran.ledger.status(stage)["error"]
        assert all(line.strip() in ran.message(stage) for line in error.splitlines())


@pytest.mark.slow
def test_the_log_that_a_message_points_to_holds_the_traceback(ran: Ran) -> None:
    log = ran.ledger.store / "worker-1.log"
    assert f"(see {log})" in ran.message(ran.failed("torn"))
    assert "Traceback" in log.read_text()


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, Path]:
    """A store in which the preparation of a user's folder is done, and the folder."""
    folder = tmp_path_factory.mktemp("finished")
    world, ledger = own_world.write_world(folder / "world"), Ledger(folder / "store")
    study = find_study(f"{file}:good", [f"root={world}"])
    tiny.run_missing(ledger, *study.lines[0].result.of.parents)
    return ledger, world


def refused(ledger: Ledger, *arguments: object) -> str:
    """The one message of a command that must end with code 2 and change nothing."""
    before = listing(ledger.store)
    result = midstream(*arguments, "--store", ledger.store)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert listing(ledger.store) == before
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_data_folder_that_does_not_exist_is_named(
    finished: tuple[Ledger, Path], file: Path, command: str
) -> None:
    ledger, world = finished
    nowhere = world.with_name("nowhere")
    message = refused(ledger, command, f"{file}:good", "--set", f"root={nowhere}")
    assert f"world folder {nowhere} does not exist; give the folder that holds it" in message
    message = refused(ledger, command, f"{file}:good", "--set", "root=s3://bucket/world")
    assert "does not exist; a world is a folder here, and `midstream prepare` fills it" in message


def test_a_store_that_another_launcher_holds_is_refused_with_its_process(
    finished: tuple[Ledger, Path], file: Path
) -> None:
    ledger, world = finished
    with launch_lock(ledger.store):
        message = refused(ledger, "run", f"{file}:good", "--set", f"root={world}")
    assert f"store {ledger.store} is in use by another launcher (process " in message
    assert "wait until it ends, stop it, or give another --store" in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("run", "pocket.when_images_arrive", "--max-seeds", "9"),
            "--max-seeds goes with --decide",
        ),
        (("eval", "runs/finetune-0", "--wrong"), "--wrong goes with --show"),
        (("status", "--every=5"), "--every goes with --watch"),
    ],
)
def test_an_option_without_the_one_that_it_goes_with_is_refused(
    words: tuple[str, ...], told: str
) -> None:
    result = midstream(*words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "goes with" not in midstream("status", "--watch", "--every", "0.1").stderr


def test_a_folder_without_files_is_refused(
    finished: tuple[Ledger, Path], file: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(finished[0], "plan", f"{file}:good", "--set", f"root={tmp_path / 'empty'}")
    assert f"{tmp_path / 'empty'} holds no source under text, captions, instruct" in message


@pytest.mark.parametrize("command", ["plan", "run"])
def test_all_that_is_wrong_stands_in_one_list_and_nothing_is_started(
    file: Path, tmp_path: Path, command: str
) -> None:
    for name in WORLDS[:-1]:
        own_world.write_world(tmp_path / name)
    tasks = tmp_path / "good" / "text_tasks" / "quiz.jsonl"
    tasks.write_text(tasks.read_text() + "{\n")
    store = tmp_path / "store"
    asked = ("--set", f"root={tmp_path}", "--store", store)
    result = midstream(command, f"{file}:worlds", *asked)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    lines = (result.stderr if command == "run" else result.stdout).splitlines()
    told = [line for line in lines if line.startswith("  - ")]
    assert len(told) == 2
    assert f"{tmp_path / 'gone'} does not exist; give the folder" in told[0]
    assert "quiz.jsonl line 15 is not JSON" in told[1]
    if command == "run":
        assert "nothing was started; put right what is listed, or add --skip-checks" in lines[0]
        assert not list(store.glob("*/stage.json"))
