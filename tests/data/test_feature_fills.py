"""Filling a store of features: killed, stopped, by several processes and ranks at once."""

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from made_features import (
    CONFIG,
    NUM_PICTURES,
    Encode,
    check_all,
    features_of,
    quiet,
    stored_pictures,
)
from torch import Tensor

from midstream.config.model import FILL_BATCH, picture_bytes
from midstream.data import feature_store
from midstream.data.feature_store import LOCKS, NUM_LOTS, FeatureStore
from midstream.data.sources import Source

FORK = multiprocessing.get_context("fork")


def exits(*works: Callable[[], None]) -> list[int | None]:
    """How processes end that do these at the same time."""
    processes = [FORK.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def waiting(barrier: Any, encode: Encode) -> Callable[[Tensor], Tensor]:
    """The encoder, which begins when all ranks hold their first lots."""

    def at_once(pixels: Tensor) -> Tensor:
        if not encode.calls:
            barrier.wait(60)
        return encode(pixels)

    return at_once


def test_a_fill_that_is_killed_keeps_its_finished_parts_and_continues(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    folder, log = tmp_path / "store", tmp_path / "log"
    room = FILL_BATCH * picture_bytes(CONFIG)

    def dies() -> None:
        FeatureStore(folder, CONFIG, room).fill(talks, None, Encode(log, dies_at=2), quiet)

    assert exits(dies) == [-signal.SIGKILL]
    assert len(FeatureStore(folder, CONFIG)) == FILL_BATCH
    assert [path for path in folder.iterdir() if path.suffix == ".tmp"]
    store, encode = FeatureStore(folder, CONFIG, room), Encode()
    store.fill(talks, None, encode, quiet)
    assert encode.calls == -(-(NUM_PICTURES - FILL_BATCH) // FILL_BATCH)
    assert len(store) == NUM_PICTURES
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    check_all(store, talks, shown)


def test_a_fill_can_be_stopped_by_whom_it_tells(tmp_path: Path, talks: Source) -> None:
    def impatient(done: float, note: str) -> None:
        if f" {FILL_BATCH} computed" in note:
            raise InterruptedError

    room = FILL_BATCH * picture_bytes(CONFIG)
    with pytest.raises(InterruptedError):
        FeatureStore(tmp_path, CONFIG, room).fill(talks, None, Encode(), impatient)
    assert len(FeatureStore(tmp_path, CONFIG)) == FILL_BATCH


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_fill_that_is_asked_to_stop_keeps_its_batches_and_none_is_computed_twice(
    tmp_path: Path, talks: Source, shown: list[int | None], batches: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted, first, second = Encode(), Encode(), Encode()
    assert FeatureStore(whole, CONFIG).fill(talks, None, uninterrupted, quiet)
    # One part would hold all: what was computed is kept even though its part was not full.
    store = FeatureStore(stopped, CONFIG)
    assert not store.fill(talks, None, first, quiet, lambda: first.calls >= batches)
    assert first.calls == batches
    assert len(store) == stored_pictures(stopped) == batches * FILL_BATCH
    assert not list(stopped.glob("*.tmp"))
    assert FeatureStore(stopped, CONFIG).fill(talks, None, second, quiet)
    assert first.calls + second.calls == uninterrupted.calls
    assert features_of(stopped) == features_of(whole)
    assert (stopped / "measured.json").is_file()
    check_all(FeatureStore(stopped, CONFIG), talks, shown)


def test_a_fill_that_waits_for_another_process_stops_when_asked(
    tmp_path: Path, talks: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "WAIT_SECONDS", 0.05)
    said, encode = list[str](), Encode()

    def told(done: float, note: str) -> None:
        said.append(note)

    (tmp_path / LOCKS).mkdir()
    store = FeatureStore(tmp_path, CONFIG)
    with ExitStack() as held:
        for lot in range(NUM_LOTS):
            held.enter_context(FileLock(tmp_path / LOCKS / f"lot-{lot:02}.lock"))
        assert not store.fill(talks, None, encode, told, lambda: bool(said))
    assert ("waiting for other processes" in said[0], encode.calls) == (True, 0)
    assert store.fill(talks, None, encode, quiet)


def test_a_fill_goes_round_what_another_process_computes_and_takes_it_last(
    tmp_path: Path, talks: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "WAIT_SECONDS", 0.05)
    (tmp_path / LOCKS).mkdir()
    (first,) = talks.pictures_of(np.array([0])).hashes
    lock, said = FileLock(tmp_path / LOCKS / f"lot-{first[0] % NUM_LOTS:02}.lock"), list[int]()
    store = FeatureStore(tmp_path, CONFIG)

    def told(done: float, note: str) -> None:
        if "waiting" in note:
            said.append(len(store))
            lock.release()

    with lock:
        assert store.fill(talks, None, Encode(), told)
    # All but that lot were there when it began to wait.
    assert NUM_PICTURES - 3 <= said[0] < NUM_PICTURES
    assert (len(said), stored_pictures(tmp_path)) == (1, NUM_PICTURES)


def test_ranks_compute_a_share_each_and_store_the_bytes_of_one_process(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    alone, folder, num_ranks = tmp_path / "alone", tmp_path / "store", 3
    FeatureStore(alone, CONFIG).fill(talks, None, Encode(), quiet)
    barrier = FORK.Barrier(num_ranks)

    def fill(rank: int) -> None:
        store, encode = FeatureStore(folder, CONFIG), Encode(tmp_path / f"{rank}.log")
        store.fill(talks, None, waiting(barrier, encode), quiet, share=(rank, num_ranks))
        assert len(store) == NUM_PICTURES

    assert exits(*(partial(fill, rank) for rank in range(num_ranks))) == [0] * num_ranks
    assert all((tmp_path / f"{rank}.log").is_file() for rank in range(num_ranks))
    assert features_of(folder) == features_of(alone)
    assert stored_pictures(folder) == NUM_PICTURES
    assert not list(folder.glob(".*"))
    check_all(FeatureStore(folder, CONFIG), talks, shown)


def test_a_rank_that_is_killed_leaves_its_lots_to_the_others(tmp_path: Path, talks: Source) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "store"
    FeatureStore(alone, CONFIG).fill(talks, None, Encode(), quiet)
    barrier = FORK.Barrier(2)

    def fill(rank: int) -> None:
        encode = waiting(barrier, Encode(dies_at=1 if rank else None))
        FeatureStore(folder, CONFIG).fill(talks, None, encode, quiet, share=(rank, 2))

    assert exits(*(partial(fill, rank) for rank in range(2))) == [0, -signal.SIGKILL]
    assert features_of(folder) == features_of(alone)
    assert not list(folder.glob(".*"))


def test_processes_that_fill_at_the_same_time_compute_each_picture_once(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    folder, barrier = tmp_path / "store", FORK.Barrier(3)
    room = 2 * picture_bytes(CONFIG)

    def fill() -> None:
        barrier.wait(60)
        FeatureStore(folder, CONFIG, room).fill(talks, None, Encode(), quiet)

    assert exits(*[fill] * 3) == [0, 0, 0]
    # A part holds two pictures at most, and each is in one of them.
    assert stored_pictures(folder) == NUM_PICTURES
    check_all(FeatureStore(folder, CONFIG), talks, shown)


def test_pictures_decoded_ahead_by_threads_give_the_same_store(
    tmp_path: Path, talks: Source
) -> None:
    alone, ahead = tmp_path / "alone", tmp_path / "ahead"
    encode = Encode()
    FeatureStore(alone, CONFIG).fill(talks, None, Encode(), quiet)
    store = FeatureStore(ahead, CONFIG)
    # It stops between batches all the same, and goes on.
    assert not store.fill(talks, None, encode, quiet, lambda: encode.calls == 1, workers=3)
    assert stored_pictures(ahead) == FILL_BATCH
    assert store.fill(talks, None, encode, quiet, workers=3)
    assert features_of(ahead) == features_of(alone)
    assert encode.calls == -(-NUM_PICTURES // FILL_BATCH)


def test_what_fills_left_is_cleared_by_who_holds_its_lot(tmp_path: Path, talks: Source) -> None:
    every = talks.pictures_of(np.arange(len(talks))).hashes
    (mine, *_), (others, *_) = (
        [n for n in range(NUM_LOTS) if (n in every[:, 0] % NUM_LOTS) == filled]
        for filled in (True, False)
    )
    digest, unique = "ab" * 16, "cd" * 16
    before_lots, left, running = (
        tmp_path / f".part-{name}{digest}.{unique}.tmp"
        for name in ("", f"{mine:02}-", f"{others:02}-")
    )
    for folder in (before_lots, left, running):
        folder.mkdir()
        (folder / "features.bin").write_bytes(b"cut short")
    (tmp_path / f".measured.json.{unique}.tmp").write_bytes(b"{")
    (tmp_path / "fill.lock").touch()
    assert FeatureStore(tmp_path, CONFIG).fill(talks, None, Encode(), quiet)
    assert list(tmp_path.glob(".*")) == [running]
    assert not (tmp_path / "fill.lock").exists()


def test_a_fill_of_many_pictures_leaves_most_to_one_that_comes_later(
    tmp_path: Path, talks: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(feature_store, "MOST_TAKEN", 2)
    first, second, said = Encode(), Encode(), list[str]()

    def told(done: float, note: str) -> None:
        said.extend([note] if "waiting" in note else [])

    def at_first(pixels: Tensor) -> Tensor:
        if not first.calls:
            later = FeatureStore(tmp_path, CONFIG)
            assert not later.fill(talks, None, second, told, lambda: bool(said))
        return first(pixels)

    assert FeatureStore(tmp_path, CONFIG).fill(talks, None, at_first, quiet)
    # It held the lots of two pictures, or of three.
    assert (second.calls > NUM_PICTURES // 4, first.calls) == (True, 1)
    assert stored_pictures(tmp_path) == NUM_PICTURES
