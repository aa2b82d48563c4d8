"""Preparing a source: equal however it runs, continued where it was, done again where needed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inputs import (
    changed_shards,
    contents,
    run,
    texts_of,
    times,
    tokenizer_file,
    write_pictures,
    write_texts,
)
from made_world import CAPTIONS, samples, write_tar
from tokenizers import Tokenizer, models

from inputs import png
from midstream.core.storage import read_json, verify
from midstream.data import shards as prepare_records
from midstream.data import source_writer
from midstream.data.formats.records import CaptionRecord, Picture, ReadOptions, TextRecord
from midstream.data.source_writer import Reject
from midstream.data.sources import Source


@pytest.mark.slow
def test_several_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "in", 5, 30, bad=[7, 99])
    tars = tmp_path / "tars"
    for number in range(3):
        write_tar(tars / f"{number}.tar", samples(5 * number, CAPTIONS))
    for section, source in (("text", texts), ("captions", tars)):
        limits = {"max_reject_fraction": 0.5, "validation_fraction": 0.3}
        one = run(section, source, tmp_path / f"one-{section}", **limits)
        three = run(section, source, tmp_path / f"three-{section}", workers=3, **limits)
        assert one == three
        assert contents(tmp_path / f"one-{section}") == contents(tmp_path / f"three-{section}")


def test_equal_data_elsewhere_and_of_another_day_has_the_same_fingerprint(tmp_path: Path) -> None:
    one = write_pictures(tmp_path / "one/in", 4)
    shutil.copytree(one, tmp_path / "two/in")
    for path in (tmp_path / "two/in").iterdir():
        os.utime(path, (1, 1))
    found = [run("captions", tmp_path / n / "in", tmp_path / n / "out") for n in ("one", "two")]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    (tmp_path / "two/in/2.png").write_bytes(png(77))
    third = run("captions", tmp_path / "two/in", tmp_path / "two/out")
    assert third["fingerprint"] != found[0]["fingerprint"]


def test_a_source_of_many_shards_has_joined_columns_and_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_texts(tmp_path / "in", 3, 4), tmp_path / "out"
    apart = run("text", source, tmp_path / "apart")
    monkeypatch.setattr(source_writer, "MOST_SEPARATE", 2)
    joined = run("text", source, out)
    assert joined["fingerprint"] == apart["fingerprint"]
    assert (out / "columns/offsets.npy").is_file()
    assert joined["joined_columns"]
    assert "joined_columns" not in apart


def test_a_second_run_finds_nothing_to_do_and_a_changed_input_costs_its_own_shard_only(
    tmp_path: Path,
) -> None:
    source, out = write_texts(tmp_path / "in", 5, 5), tmp_path / "out"
    first, before = run("text", source, out), times(out)
    second = run("text", source, out)
    assert times(out) == before
    assert first.pop("shards") == {"kept": 0, "new": 5}
    assert second.pop("shards") == {"kept": 5, "new": 0}
    assert first == second
    os.utime(source / "part-2.jsonl", (5, 5))
    touched = run("text", source, out)
    assert touched["shards"] == {"kept": 4, "new": 1}
    assert touched["fingerprint"] == first["fingerprint"]
    assert changed_shards(before, times(out)) == {"000002"}
    before, other, longer = times(out), source / "part-1.jsonl", source / "part-3.jsonl"
    stamp = other.stat().st_mtime_ns
    other.write_bytes(other.read_bytes().replace(b"here", b"gone"))
    os.utime(other, ns=(stamp, stamp + 1))
    longer.write_bytes(longer.read_bytes() + b'{"text": "more"}\n')
    changed = run("text", source, out)
    assert changed["shards"] == {"kept": 3, "new": 2}
    assert changed_shards(before, times(out)) == {"000001", "000003"}
    assert changed["fingerprint"] != first["fingerprint"]
    assert changed["records"] == 26
    texts = " ".join(texts_of(Source("s", out)))
    assert (texts.count("gone"), texts.count("more")) == (5, 1)


@given(
    before=st.sets(st.integers(0, 7), min_size=1, max_size=6),
    after=st.sets(st.integers(0, 7), min_size=1, max_size=6),
)
@settings(max_examples=12, deadline=None)
def test_files_that_come_and_go_leave_the_others_shards(
    tmp_path_factory: pytest.TempPathFactory, before: set[int], after: set[int]
) -> None:
    base = tmp_path_factory.mktemp("files")
    written = write_texts(base / "all", 8, 1)
    (base / "in").mkdir()
    for name in before:
        shutil.copy2(written / f"part-{name}.jsonl", base / "in")
    run("text", base / "in", base / "out")
    for name in before - after:
        (base / f"in/part-{name}.jsonl").unlink()
    for name in after - before:
        shutil.copy2(written / f"part-{name}.jsonl", base / "in")
    found = run("text", base / "in", base / "out")
    assert found["shards"] == {"kept": len(before & after), "new": len(after - before)}
    fresh = run("text", base / "in", base / "fresh")
    assert found["fingerprint"] == fresh["fingerprint"]
    assert contents(base / "out") == contents(base / "fresh")


CHANGES: dict[str, dict[str, Any]] = {
    "tokenizer": {"tokenizer_file": tokenizer_file(4)},
    "text key": {"options": ReadOptions(text_key="id")},
    "validation": {"validation_fraction": 0.5},
    "root": {"root": ""},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_make_every_shard_anew(tmp_path: Path, change: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        line = {"text": f"an iron ore {number}", "id": f"other {number}"}
        (source / f"{number}.jsonl").write_text(json.dumps(line) + "\n")
    first = run("text", source, out)
    second = run("text", source, out, **CHANGES[change])
    assert second["shards"] == {"kept": 0, "new": 3}
    assert (second["tokenizer"] != first["tokenizer"]) == (change == "tokenizer")
    # Options that came later say nothing at their defaults, so that older shards stay.
    assert "rating" not in read_json(next(out.glob("shards/*/made_from.json")))["options"]
    assert ReadOptions(rating=1).noted()["rating"] == 1
    if change == "tokenizer":
        assert second["train"]["tokens"] < first["train"]["tokens"]
        assert (out / "tokenizer.json").read_bytes().count(b'"an"') >= 1
    run("text", source, tmp_path / "fresh", **CHANGES[change])
    assert contents(out) == contents(tmp_path / "fresh")


def test_damaged_shards_are_made_anew_and_no_other(tmp_path: Path) -> None:
    files = ("tokens.bin", "shard.json", "manifest.json", "made_from.json")
    source, out = write_texts(tmp_path / "in", 2 * len(files) + 1, 5), tmp_path / "out"
    first, before = run("text", source, out), times(out)
    for number, file in enumerate(files):
        (out / f"shards/{number:06d}" / file).unlink()
        cut = out / f"shards/{number + len(files):06d}" / file
        if file in ("tokens.bin", "shard.json"):
            os.truncate(cut, cut.stat().st_size - 1)
        else:
            cut.write_text("{}")
    second = run("text", source, out)
    assert second["shards"] == {"kept": 1, "new": 2 * len(files)}
    assert changed_shards(before, times(out)) == {f"{n:06d}" for n in range(2 * len(files))}
    assert second["fingerprint"] == first["fingerprint"]
    for shard in out.glob("shards/*"):
        verify(shard)


SCRIPT = """
import resource
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from made_inputs import run

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, ({max_file_bytes}, {max_file_bytes}))
    run("text", Path({source!r}), Path({out!r}), workers={workers},
        tokenizer_file=Path({tokenizer!r}),
        progress=lambda done, note: print(done, note, flush=True))
"""


def start(
    tmp_path: Path, source: Path, workers: int, max_file_bytes: int = -1
) -> "subprocess.Popen[str]":
    """Prepare in a process of its own, which may write files of that size."""
    script = tmp_path / "prepare_it.py"
    tests = [str(folder) for folder in Path(__file__).parents[:2]]
    values = {"tests": tests, "source": str(source), "workers": workers}
    values["max_file_bytes"] = max_file_bytes
    values |= {"out": str(tmp_path / "out"), "tokenizer": str(tokenizer_file())}
    script.write_text(SCRIPT.format(**values))
    command = [sys.executable, str(script)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.faults
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_time_it_goes_on_with_what_was_finished(tmp_path: Path, workers: int) -> None:
    source, out = write_texts(tmp_path / "in", 9, 1500), tmp_path / "out"
    kept = 0
    for num_shards in (2, 5):
        process = start(tmp_path, source, workers)
        while len(list(out.glob("shards/0*/made_from.json"))) < num_shards:
            assert process.poll() is None
            time.sleep(0.005)
        others = descendants(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in others):
            assert time.monotonic() < deadline, "its workers go on without it"
            time.sleep(0.05)
        assert not (out / "source.json").exists()
        finished = [path.parent for path in out.glob("shards/0*/made_from.json")]
        for path in out.glob("shards/0*"):
            verify(path)
        assert len(finished) >= num_shards > kept
        kept = len(finished)
    before = {name: when for path in finished for name, when in times(path).items()}
    found = run("text", source, out)
    assert found["shards"] == {"kept": kept, "new": 9 - kept}
    assert before == {name: when for path in finished for name, when in times(path).items()}
    assert [path.name for path in out.rglob(".*")] == []
    fresh = run("text", source, tmp_path / "fresh")
    assert found["fingerprint"] == fresh["fingerprint"]
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_full_disk_at_any_write_leaves_whole_shards_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_texts(tmp_path / "in", 2, 3, bad=[1])
    allowed = {"max_reject_fraction": 0.5}
    fresh = run("text", source, tmp_path / "fresh", **allowed)
    sync, messages = os.fsync, list[str]()
    for number in range(1, 1000):
        out, calls = tmp_path / f"out-{number}", [0]

        def full(descriptor: int, number: int = number, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == number:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        try:
            found = run("text", source, out, **allowed)
        except OSError as error:
            messages.append(str(error))
            for shard in out.glob("shards/0*"):
                verify(shard)
            if (out / "source.json").exists():
                assert len(Source("s", out)) == 5
        else:
            break
        finally:
            monkeypatch.setattr(os, "fsync", sync)
        found = run("text", source, out, **allowed)
        assert found["fingerprint"] == fresh["fingerprint"]
        assert contents(out) == contents(tmp_path / "fresh")
        assert [path.name for path in out.rglob(".*")] == []
        shutil.rmtree(out)
    assert len(messages) > 20
    assert all("No space left on device" in message for message in messages)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_shard_that_the_disk_refuses_is_one_error_and_the_others_stay(
    tmp_path: Path, workers: int
) -> None:
    source, out = write_texts(tmp_path / "in", 3, 20), tmp_path / "out"
    big = "".join(json.dumps({"text": f"a long line {n}"}) + "\n" for n in range(7_000))
    (source / "part-3.jsonl").write_text(big)
    process = start(tmp_path, source, workers, max_file_bytes=2**17)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "OSError: [Errno 27] no room to write" in errors
    assert f"; what is finished in {out} stays" in errors
    shards = sorted(path.name for path in (out / "shards").iterdir())
    small = ["000000", "000001", "000002"]
    # What another process has under way when the disk refuses is left out.
    assert shards == small if workers == 1 else set(shards) <= set(small)
    for name in shards:
        verify(out / "shards" / name)
    assert run("text", source, out)["shards"] == {"kept": len(shards), "new": 4 - len(shards)}
    run("text", source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_stops_it_and_the_next_run_goes_on(tmp_path: Path, workers: int) -> None:
    source, out = write_texts(tmp_path / "in", 6, 50), tmp_path / "out"

    def interrupt(done: float, note: str) -> None:
        if done > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("text", source, out, workers=workers, progress=interrupt)
    assert [path.name for path in out.rglob(".*")] == []
    assert active_children() == []
    assert not (out / "source.json").exists()
    found = run("text", source, out)
    assert found["shards"]["kept"] >= 2
    assert found["fingerprint"] == run("text", source, tmp_path / "fresh")["fingerprint"]


def test_a_worker_that_is_killed_ends_it_with_the_remedy(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path / "in", 40, 50), tmp_path / "out"

    def kill(done: float, note: str) -> None:
        for child in active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(OSError, match=r"process was killed.*fewer workers.*run the same again"):
        run("text", source, out, workers=2, progress=kill)
    found = run("text", source, out)
    assert found["fingerprint"] == run("text", source, tmp_path / "fresh")["fingerprint"]


def test_two_preparations_of_one_folder_at_a_time_are_refused(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path / "in", 2, 3), tmp_path / "out"
    out.mkdir()
    with (
        FileLock(out / "prepare.lock"),
        ThreadPoolExecutor(1) as thread,
        pytest.raises(ValueError, match="out is being prepared by another process"),
    ):
        thread.submit(run, "text", source, out).result()
    assert run("text", source, out)["records"] == 6


RECORDS = st.one_of(
    st.builds(TextRecord, st.just("w"), st.text(max_size=50)),
    st.builds(
        CaptionRecord,
        st.just("w"),
        st.text(max_size=9),
        st.builds(Picture, st.just("f"), st.just(0), st.binary(max_size=60)),
    ),
    st.builds(Reject, st.just("w"), st.just("r")),
)


@given(items=st.lists(RECORDS, max_size=40), limits=st.tuples(*[st.integers(1, 80)] * 3))
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_record_in_order_and_stay_within_one_record_of_the_limits(
    items: list[Any], limits: tuple[int, int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        names = ("BATCH_RECORDS", "BATCH_CHARACTERS", "BATCH_PICTURE_BYTES")
        for name, limit in zip(names, limits, strict=True):
            patch.setattr(prepare_records, name, limit)
        found = list(prepare_records.batches(items))
    assert [item for batch in found for item in batch] == items
    for batch in found:
        assert 0 < len(batch) <= limits[0]
        sizes = [prepare_records.num_characters(item) for item in batch]
        pictures = [getattr(item, "picture", None) for item in batch]
        assert sum(sizes[:-1]) < limits[1]
        assert sum(len(picture.data) for picture in pictures[:-1] if picture) < limits[2]


def test_images_and_their_folder_may_lie_elsewhere(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 3)
    (tmp_path / "far").mkdir()
    for number in range(3):
        shutil.move(source / f"{number}.png", tmp_path / "far")
    options = replace(ReadOptions(), images=str(tmp_path / "far"))
    run("captions", source, tmp_path / "out", options=options, root=str(source))
    found = Source("s", tmp_path / "out")
    assert [found.image_bytes(example) for example in range(3)] == [png(0), png(1), png(2)]
    assert read_json(tmp_path / "out/shards/000000/shard.json")["files"][0].startswith("/")


def test_captions_of_too_many_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", samples(0, ["boat", "a boat on the water", "water"]))
    options, out = ReadOptions(max_tokens=9), tmp_path / "out"
    run("captions", tmp_path / "in", out, options=options, max_reject_fraction=0.5)
    source = Source("s", out)
    # With the separator and the end.
    assert [len(source.input_ids(example)) for example in range(len(source))] == [6, 7]
    assert source.index["distinct_images"] == 2
    assert source.index["rejects"] == {"too many tokens": 1}


def test_a_finished_source_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    texts, others = (write_texts(tmp_path / name, 2, 3) for name in ("in", "other"))
    (others / "part-0.jsonl").write_text('{"text": "another"}\n')
    out, said = tmp_path / "out", {"notice": lambda note: None}
    run("text", texts, out, **said)
    before = contents(out)
    write_tar(tmp_path / "tars/0.tar", samples(0, CAPTIONS))
    for section, source in (("text", others), ("captions", tmp_path / "tars")):
        with pytest.raises(ValueError, match=r"out holds a source .*text from .*part-0\.jsonl"):
            run(section, source, out, **said)
    assert contents(out) == before
    # Files that were added, moved or changed, and what is not finished, are no other source.
    (texts / "part-2.jsonl").write_text('{"text": "more"}\n')
    assert run("text", texts, out, **said)["shards"] == {"kept": 2, "new": 1}
    texts.rename(tmp_path / "moved")
    assert run("text", tmp_path / "moved", out, **said)["shards"]["new"] == 3
    (out / "source.json").unlink()
    assert run("text", others, out, **said)["train"]["examples"] == 4


def test_an_empty_name_is_not_the_folder_that_one_is_in_and_a_file_above_the_folder_is_named(
    tmp_path: Path,
) -> None:
    texts = write_texts(tmp_path / "in", 1, 1)
    for name, images in (("", None), (str(texts), "")):
        with pytest.raises(ValueError, match="is empty; is a variable not set"):
            run("text", [name], tmp_path / "out", options=ReadOptions(images=images))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"/file is a file, not a folder; give another"):
        run("text", texts, tmp_path / "file/a/b")


def test_what_a_tokenizer_has_no_token_for_is_told(tmp_path: Path) -> None:
    texts, told = write_texts(tmp_path / "in", 1, 1), list[str]()
    words = {"a": 0, "é": 1, "7": 2, "<unk>": 3}
    for number, model in enumerate(
        [
            models.BPE(words, [], unk_token="<unk>"),
            models.BPE(words, []),
            models.Unigram([(word, -1.0) for word in words], unk_id=3),
        ]
    ):
        file = tmp_path / f"{number}.json"
        Tokenizer(model).save(str(file))
        run("text", texts, tmp_path / f"out-{number}", tokenizer_file=file, notice=told.append)
    run("text", texts, tmp_path / "out", notice=told.append)
    lost = "the tokenizer has no token for { 中 😀 and the like; "
    stored = ("'<unk>'", "nothing", "'<unk>'")
    assert told == [f"{lost}{token} is stored" for token in stored]
