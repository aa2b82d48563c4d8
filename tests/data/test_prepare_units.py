"""A source made by tasks that share its units: equal bytes, whatever becomes of a task."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from made_inputs import (
    changed_shards,
    contents,
    run,
    times,
    tokenizer_file,
    write_pictures,
    write_texts,
)

from inputs import png
from midstream.core.storage import verify
from midstream.data import prepare_source
from midstream.data import shards as unit_shards
from midstream.data.formats.records import ReadOptions, Section
from midstream.data.prepare_source import make_share, plan_source
from midstream.data.remote import ChangedError, RemoteError
from midstream.data.shard_state import TaskShare

NUM_UNITS, NUM_LINES = 7, 20


def task(
    source: Path,
    out: Path,
    index: int,
    count: int,
    *,
    section: Section = "text",
    limit: float = 0.0,
    progress: Any = None,
) -> dict[str, int]:
    """What the task `index` of an array of `count` does."""
    plan = plan_source(
        section,
        [str(source)],
        out,
        tokenizer_file=tokenizer_file(),
        options=ReadOptions(),
        root=str(source.parent),
        validation_fraction=0.0,
        share=TaskShare(index, count),
    )
    tell = progress or (lambda done, note: None)
    return make_share(plan, workers=1, max_reject_fraction=limit, progress=tell)


def whole(out: Path) -> tuple[dict[str, bytes], bytes]:
    """The bytes of a source that is finished, its index last."""
    assert [path.name for path in out.rglob(".*")] == []
    assert not (out / "units").exists()
    return contents(out), (out / "source.json").read_bytes()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are only read."""
    return write_texts(tmp_path_factory.mktemp("texts") / "in", NUM_UNITS, NUM_LINES)


@pytest.fixture(scope="module")
def alone(texts: Path) -> tuple[dict[str, bytes], bytes]:
    """What one process makes."""
    run("text", texts, texts.parent / "alone")
    return whole(texts.parent / "alone")


@pytest.mark.parametrize("count", [1, 3, 9])
def test_any_number_of_tasks_gives_the_bytes_of_one_process(
    tmp_path: Path, texts: Path, alone: Any, count: int
) -> None:
    out = tmp_path / "out"
    made = [task(texts, out, index, count) for index in reversed(range(count))]
    assert sum(one["new"] for one in made) == NUM_UNITS
    assert not (out / "source.json").exists()
    assert run("text", texts, out)["shards"] == {"kept": NUM_UNITS, "new": 0}
    assert whole(out) == alone


class Killed(BaseException):
    """Stands for a signal that nobody catches."""


def test_a_killed_task_costs_what_it_had_not_finished_and_no_unit_is_read_twice(
    tmp_path: Path, texts: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, reads = tmp_path / "out", list[str]()
    read = unit_shards.READERS["text"]

    def counted(unit: Any, options: Any) -> Any:
        reads.append(unit.files[0])
        yield from read(unit, options)

    monkeypatch.setitem(unit_shards.READERS, "text", counted)
    # A killed process cleans nothing up.
    monkeypatch.setattr(unit_shards, "rmtree", lambda path, ignore_errors: None)

    def kill(done: float, note: str) -> None:
        raise Killed

    task(texts, out, 0, 3)
    with pytest.raises(Killed):
        task(texts, out, 1, 3, progress=kill)
    (out / "units/.half.tmp").mkdir()
    (out / "units/.half.tmp/tokens.bin").write_bytes(b"half")
    task(texts, out, 2, 3)
    assert len(reads) == len(set(reads)) == NUM_UNITS - 1
    assert task(texts, out, 1, 3) == {"kept": 1, "new": 1, "late": 0, "left": 0}
    assert run("text", texts, out)["shards"] == {"kept": NUM_UNITS, "new": 0}
    assert sorted(reads) == sorted(map(str, texts.iterdir()))
    assert whole(out) == alone


def test_what_no_task_has_made_is_made_by_the_one_that_finishes(
    tmp_path: Path, texts: Path, alone: Any
) -> None:
    out = tmp_path / "out"
    task(texts, out, 0, 3)
    assert run("text", texts, out)["shards"] == {"kept": 3, "new": NUM_UNITS - 3}
    assert whole(out) == alone


def test_of_two_tasks_with_one_share_the_later_publication_loses_and_says_so(
    tmp_path: Path, texts: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, publish = tmp_path / "out", unit_shards.publish_folder

    def overtaken(temporary: Path, path: Path, entries: Any) -> bool:
        # Another task of the same share comes first.
        monkeypatch.setattr(unit_shards, "publish_folder", publish)
        assert task(texts, out, 0, NUM_UNITS)["new"] == 1
        before = times(path)
        found = publish(temporary, path, entries)
        assert times(path) == before
        return found

    monkeypatch.setattr(unit_shards, "publish_folder", overtaken)
    assert task(texts, out, 0, NUM_UNITS) == {"kept": 0, "new": 0, "late": 1, "left": 0}
    run("text", texts, out)
    assert whole(out) == alone


def test_a_task_that_was_taken_for_lost_leaves_the_finished_source_as_it_is(
    tmp_path: Path, texts: Path, alone: Any
) -> None:
    out = tmp_path / "out"

    def finish(done: float, note: str) -> None:
        if not (out / "source.json").exists():
            with ThreadPoolExecutor(1) as thread:
                thread.submit(run, "text", texts, out).result()

    with pytest.raises(ValueError, match="out was finished without this task"):
        task(texts, out, 0, 2, progress=finish)
    assert whole(out) == alone
    assert task(texts, out, 0, 2) == {"kept": 4, "new": 0, "late": 0, "left": 0}
    assert whole(out) == alone


def test_what_a_late_task_publishes_after_the_end_is_removed_by_the_next_run(
    tmp_path: Path, texts: Path, alone: Any
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run("text", texts, out)
    task(texts, other, 0, 2)
    shutil.copytree(other / "units", out / "units")
    before = times(out / "shards")
    assert run("text", texts, out)["shards"] == {"kept": NUM_UNITS, "new": 0}
    assert times(out / "shards") == before
    assert whole(out) == alone


def test_a_unit_of_other_input_is_not_taken(tmp_path: Path) -> None:
    texts, out = write_texts(tmp_path / "in", NUM_UNITS, NUM_LINES), tmp_path / "out"
    for index in range(3):
        task(texts, out, index, 3)
    path = texts / "part-2.jsonl"
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))
    found = run("text", texts, out)
    assert found["shards"] == {"kept": NUM_UNITS - 1, "new": 1}
    assert found["records"] == NUM_UNITS * NUM_LINES + 1
    run("text", texts, tmp_path / "fresh")
    assert whole(out) == whole(tmp_path / "fresh")


def test_units_whose_pictures_are_replaced_are_made_anew_by_their_task(tmp_path: Path) -> None:
    pictures, out = write_pictures(tmp_path / "in", 4), tmp_path / "out"
    assert task(pictures, out, 0, 1, section="captions")["new"] == 1
    (pictures / "2.png").write_bytes(png(9))
    assert task(pictures, out, 0, 1, section="captions") == {
        "kept": 0, "new": 1, "late": 0, "left": 0
    }  # fmt: skip
    assert task(pictures, out, 0, 1, section="captions")["kept"] == 1
    assert run("captions", pictures, out)["shards"] == {"kept": 1, "new": 0}
    run("captions", pictures, tmp_path / "fresh")
    assert whole(out) == whole(tmp_path / "fresh")


def test_what_another_task_has_made_anew_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, out = write_pictures(tmp_path / "in", 4), tmp_path / "out"
    task(pictures, out, 0, 1, section="captions")
    (pictures / "2.png").write_bytes(png(9))
    aside, made = prepare_source.set_aside, list[dict[str, int]]()

    def overtaken(job: Any, item: Any) -> None:
        # Another task has seen the old unit, too, and is faster.
        monkeypatch.setattr(prepare_source, "set_aside", aside)
        task(pictures, out, 0, 1, section="captions")
        made.append(times(out / "units"))
        aside(job, item)
        made.append(times(out / "units"))

    monkeypatch.setattr(prepare_source, "set_aside", overtaken)
    assert task(pictures, out, 0, 1, section="captions")["late"] == 1
    assert made[0] == made[1] == times(out / "units")


def test_a_full_disk_ends_a_task_with_the_remedy_and_whole_units_stay(
    tmp_path: Path, texts: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sync, messages = tmp_path / "out", os.fsync, list[str]()
    for number in (1, 5, 12, 20):
        calls = [0]

        def full(descriptor: int, number: int = number, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == number:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no room to write") as caught:
            task(texts, out, 0, 1)
        monkeypatch.setattr(os, "fsync", sync)
        messages.append(str(caught.value))
        units = sorted(out.glob("units/*"))
        for unit in units:
            verify(unit)
    assert all(f"what is finished in {out} stays" in text for text in messages)
    assert units
    assert task(texts, out, 0, 1) == {
        "kept": len(units), "new": NUM_UNITS - len(units), "late": 0, "left": 0
    }  # fmt: skip
    run("text", texts, out)
    assert whole(out) == alone


def test_rejects_and_files_that_cannot_be_read_are_told_by_the_one_that_finishes(
    tmp_path: Path,
) -> None:
    texts, out = write_texts(tmp_path / "in", 3, 20, bad=[4, 25]), tmp_path / "out"
    (texts / "part-3.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 cut")
    assert [task(texts, out, index, 2) for index in range(2)] == [
        {"kept": 0, "new": 2, "late": 0, "left": 0},
        {"kept": 0, "new": 1, "late": 0, "left": 1},
    ]
    with pytest.raises(ValueError, match="2 of 60 records"):
        run("text", texts, out)
    with pytest.raises(ValueError, match=r"(?s)1 of 4 inputs of .* cannot be read.*part-3"):
        run("text", texts, out, max_reject_fraction=0.1)
    (texts / "part-3.jsonl.gz").unlink()
    before = times(out)
    found = run("text", texts, out, max_reject_fraction=0.1)
    assert found["shards"] == {"kept": 3, "new": 0}
    assert changed_shards(before, times(out)) == set()
    assert found["rejects"] == {"no text": 2}


@pytest.mark.parametrize("count", [1, 2])
def test_a_task_fails_for_a_server_that_refuses_once_its_other_units_are_made(
    tmp_path: Path, texts: Path, alone: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    out, read = tmp_path / "out", unit_shards.READERS["text"]

    def refusing(unit: Any, options: Any) -> Any:
        if unit.files[0].endswith("part-2.jsonl"):
            raise RemoteError("asked 8 times, the last answer was: 503 Slow Down")
        if unit.files[0].endswith("part-3.jsonl"):
            raise ChangedError("part-3.jsonl changed since it was opened")
        yield from read(unit, options)

    monkeypatch.setitem(unit_shards.READERS, "text", refusing)
    with pytest.raises(ValueError, match=r"(?s)do not give 1 of .* inputs.*later.*  .*Slow Down"):
        task(texts, out, 0, count)
    if count == 2:
        # Another file is no matter of asking again.
        assert task(texts, out, 1, count)["left"] == 1
    assert len(list(out.glob("units/*"))) == NUM_UNITS - 2
    monkeypatch.setitem(unit_shards.READERS, "text", read)
    assert task(texts, out, 0, 1)["new"] == 2
    run("text", texts, out)
    assert whole(out) == alone


def test_a_task_whose_records_are_nearly_all_rejects_leaves_them_early(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "in", 4, 1200, bad=range(4800))
    assert task(texts, tmp_path / "out", 0, 1) == {"kept": 0, "new": 0, "late": 0, "left": 4}
