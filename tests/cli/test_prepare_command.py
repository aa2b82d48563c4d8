"""`midstream prepare` from the command line: what it prints, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from inputs import byte_tokenizer, midstream
from midstream.launch.slurm_job import Entry, JobBook
from midstream.work.read_data import common_folder

# Each starts processes.
pytestmark = pytest.mark.slow


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path)


def texts(folder: Path, num_files: int, num_lines: int) -> Path:
    folder.mkdir()
    for number in range(num_files):
        found = [{"text": f"line {n} of {number}"} for n in range(num_lines)]
        lines = "".join(json.dumps(line) + "\n" for line in found)
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


def arguments(source: Path, out: Path, tokenizer: Path, *more: str) -> list[str]:
    found = ["prepare", "text", str(source), "--out", str(out), "--tokenizer", str(tokenizer)]
    return [*found, "--workers", "1", *more]


def test_pictures_are_kept_in_the_source_where_a_copy_is_asked_for(
    tmp_path: Path, tokenizer: Path
) -> None:
    source = tmp_path / "set"
    source.mkdir()
    Image.new("RGB", (4, 4)).save(source / "1.png")
    (source / "1.txt").write_text("black")
    command = arguments(source, tmp_path / "out", tokenizer)
    command[1] = "captions"
    for more, kept in (([], False), (["--copy"], True)):
        result = midstream(*command, *more)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / "out/shards/000000/pictures.bin").exists() is kept


def test_a_source_whose_jobs_may_be_in_the_queue_is_not_prepared_here(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    JobBook.of(tmp_path / "out").note({"task-0": Entry("midstream-prepare-1", "7_0")})
    monkeypatch.setenv("PATH", "")
    command = arguments(texts(tmp_path / "in", 1, 1), tmp_path / "out", tokenizer)
    result = midstream(*command)
    assert result.exit_code == 2
    assert "slurm.json names 1 jobs of an earlier run with --slurm" in result.stderr
    assert not (tmp_path / "out/shards").exists()


def test_the_command_prepares_a_source_and_prints_its_counts(
    tmp_path: Path, tokenizer: Path
) -> None:
    source = texts(tmp_path / "in", 2, 50)
    (source / "1.jsonl").write_text('{"text": "fine"}\n{"body": "bad"}\n')
    command = arguments(source, tmp_path / "out", tokenizer)
    result = midstream(*command)
    assert result.exit_code == 2
    assert "1 of 52 records" in result.stderr
    assert "1 x no text: name the field with --text-key" in result.stderr
    assert "1.jsonl, line 2: no text (its keys are ['body'])" in result.stderr
    assert "Traceback" not in result.stderr
    result = midstream(*command, "--max-rejects", "0.05")
    assert result.exit_code == 0, result.stderr
    index = json.loads((tmp_path / "out/source.json").read_text())
    assert index["train"]["examples"] == 51
    assert index["root"] == str(source)
    for text in ("52", "51", f"{index['train']['tokens']:,}", "rejected: no text"):
        assert text in result.stdout
    assert "2 shards kept, 0 new" in result.stdout


def test_what_is_not_read_and_what_is_dropped_is_printed_once(
    tmp_path: Path, tokenizer: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "part.csv").write_bytes(b"a,b")
    turns = [("human", "Why?"), ("gpt", "So."), ("human", "And?"), ("gpt", "")]
    talk = [{"from": who, "value": text} for who, text in turns]
    (source / "talks.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    command = arguments(source, tmp_path / "out", tokenizer)
    command[1] = "conversations"
    result = midstream(*command)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("1 file is not read: part.csv; ") == 1
    assert result.stdout.count("turns dropped: empty reply") == 1
    index = json.loads((tmp_path / "out/source.json").read_text())
    assert index["dropped_turns"] == {"empty reply": 1}
    assert index["unread"] == {"files": 1, "first": ["part.csv"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no source", "nowhere"),
        ("no tokenizer", "lost.json"),
        ("broken file", "1.jsonl.gz is cut short or damaged"),
    ],
)
def test_what_a_user_can_put_right_is_one_message(
    tmp_path: Path, tokenizer: Path, change: str, message: str
) -> None:
    source = texts(tmp_path / "in", 1, 3)
    if change == "no source":
        source = tmp_path / "nowhere"
    elif change == "no tokenizer":
        tokenizer = tmp_path / "lost.json"
    else:
        (source / "1.jsonl.gz").write_bytes(b"\x1f\x8bno gzip")
    result = midstream(*arguments(source, tmp_path / "out", tokenizer))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "more", [["--max-rejects", "2"], ["--require", "best"], ["--workers", "0"]]
)
def test_arguments_out_of_range_start_nothing(
    tmp_path: Path, tokenizer: Path, more: list[str]
) -> None:
    source = texts(tmp_path / "in", 1, 3)
    result = midstream(*arguments(source, tmp_path / "out", tokenizer, *more))
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(one, marks=pytest.mark.faults) for one in (signal.SIGTERM, signal.SIGKILL)),
    ],
)
def test_a_command_that_is_ended_leaves_no_process_and_goes_on_the_next_time(
    tmp_path: Path, tokenizer: Path, number: signal.Signals
) -> None:
    source, out = texts(tmp_path / "in", 30, 1000), tmp_path / "out"
    command = [sys.executable, "-m", "midstream.cli.app", *arguments(source, out, tokenizer)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list(out.glob("shards/0*/made_from.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    if number == signal.SIGINT:
        # As a terminal does: to all processes of its group.
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 75
        assert "the same command continues" in errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 30
    while True:
        result = midstream(*arguments(source, out, tokenizer))
        if "being prepared by another process" not in result.stderr:
            break
        assert time.monotonic() < deadline
    assert result.exit_code == 0
    index = json.loads((out / "source.json").read_text())
    assert index["train"]["examples"] == 30_000
    kept = int(result.stdout.split(" shards kept")[0].split()[-1])
    assert kept >= 3


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["a/b", "a/c/d.txt"], "a"),
        (["a/b"], "a/b"),
        (["a/c/d.txt"], "a/c"),
        (["s3://bucket/x"], ""),
        (["a/b", "s3://bucket/x"], "a/b"),
    ],
)
def test_names_start_from_the_folder_that_holds_all_local_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], expected: str
) -> None:
    for name in ("a/b", "a/c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/c/d.txt").write_text("d")
    monkeypatch.chdir(tmp_path)
    found = common_folder(sources)
    assert found == (str(tmp_path / expected) if expected else "")
