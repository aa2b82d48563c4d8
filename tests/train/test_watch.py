"""Who is lost is named, and who is slow together with all others is left alone."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from midstream.train import guards as module
from midstream.train.guards import Watch
from midstream.train.parallel import ALONE, Place

TIMEOUT = 1.0
MEETING = threading.Barrier(2)


class Rank(Place):
    """One of two ranks in this process, which meet at a barrier of threads."""

    def barrier(self) -> None:
        MEETING.wait()


def rank_of(number: int) -> Rank:
    place = Rank(torch.device("cpu"), rank=number, world_size=2)
    object.__setattr__(place, "scalars", "a group")
    return place


class Pair:
    """Two watches in one process; a rank that would leave is noted instead."""

    def __init__(self, store: dist.TCPStore) -> None:
        self.store = store
        self.told: dict[int, str] = {}
        made: dict[int, Watch] = {}

        def make(rank: int) -> None:
            made[rank] = Watch(rank_of(rank), TIMEOUT, lambda text: self.told.update({rank: text}))

        threads = [threading.Thread(target=make, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.first, self.second = made[0], made[1]

    def wait(self, seconds: float, ranks: int = 2) -> dict[int, str]:
        """What so many ranks are told, or fewer in the time that is given."""
        end = time.monotonic() + seconds
        while len(self.told) < ranks and time.monotonic() < end:
            time.sleep(0.02)
        return self.told


@pytest.fixture
def make_pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Pair]]:
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(module, "_STILL", 1.0)
    monkeypatch.setattr(module, "_STILL_AT_FIRST", 5.0)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    made: list[Pair] = []

    def make() -> Pair:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        made.append(Pair(store))
        return made[-1]

    yield make
    for two in made:
        two.first.close()
        two.second.close()


@pytest.fixture
def pair(make_pair: Callable[[], Pair]) -> Pair:
    return make_pair()


def steps(number: int, *watches: Watch) -> None:
    """Go through whole steps, and on to the next one's rows."""
    for step in range(1, number + 1):
        for watch in watches:
            watch.at(f"computing step {step}", "step")
            watch.at(f"waiting for rows after step {step}", "data")


def test_one_process_without_a_timeout_watches_nothing() -> None:
    watch = Watch(ALONE)
    watch.at("step 1", "step")
    assert watch.failed(ValueError("mine")) == ""
    assert watch._thread is None
    watch.close()


@pytest.mark.parametrize(
    ("kind", "longest", "limit"),
    [
        ("step", 0.0, 7200),  # the first
        ("step", 0.1, 450),
        ("data", 46.0, 920),
        ("step", 1200.0, 7200),  # it waited for a checkpoint
        ("step", 9000.0, 18000),
        ("keep", 0.1, 7200),
        ("keep", 9000.0, 18000),
        (None, 0.0, 450),
    ],
)
def test_the_limit_of_a_point_follows_from_the_longest_so_far(
    kind: module.Kind | None, longest: float, limit: float
) -> None:
    watch = Watch(ALONE, 45.0)
    watch._point = watch._seen = module._Point(1, "here", kind)
    if kind is not None:
        watch._longest = {kind: longest}
    watch._seconds = float(limit)
    assert not watch._said(0).is_overdue
    watch._seconds = float(limit + 1)
    assert watch._said(0).is_overdue


def test_one_process_that_hangs_in_a_step_is_named_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(module, "_STILL", 1.0)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    watch = Watch(ALONE, TIMEOUT, told.append)
    steps(3, watch)
    watch.at("computing step 4", "step")
    assert ended.wait(10 * TIMEOUT)
    assert told[0].startswith("this process is stuck: 1 s computing step 4, at most 0.")
    # Outside of steps it is left alone.
    watch.rest()
    assert watch._thread is None


def test_ranks_that_rest_that_were_as_slow_before_or_have_ended_well_are_left_alone(
    make_pair: Callable[[], Pair],
) -> None:
    resting, slow, ended = (make_pair() for _ in range(3))
    for one in (resting.first, resting.second):
        steps(3, one)
        one.rest("keeping the stage's weights")
    steps(3, slow.first, slow.second)
    # So long at rows, once: twenty times that is no reason yet, and no more are the others' steps.
    slow.second._longest["data"] = 2 * TIMEOUT
    slow.first.at("computing step 4", "step")
    ended.second.close()
    assert resting.wait(3 * TIMEOUT) == slow.told == ended.told == {}


def test_all_ranks_that_hang_in_a_step_are_named(pair: Pair) -> None:
    steps(3, pair.first, pair.second)
    for one in (pair.first, pair.second):
        one.at("computing step 4", "step")
    told = pair.wait(6 * TIMEOUT)
    assert set(told) == {0, 1}
    assert "are stuck: " in told[0] or told[0].startswith("rank ")
    assert "s computing step 4, at most 0." in told[0]
    assert "others have gone on" not in told[0]


def test_a_rank_that_waits_for_rows_is_named_and_not_those_that_wait_for_it(pair: Pair) -> None:
    steps(3, pair.first, pair.second)
    pair.first.at("computing step 4", "step")
    told = pair.wait(6 * TIMEOUT)
    assert set(told) == {0, 1}
    assert told[0] == told[1]
    assert told[0].startswith("rank 1 is stuck")
    assert "waiting for rows after step 3, at most 0." in told[0]
    assert "others have gone on and wait for it" in told[0]


def test_the_first_step_may_take_longer_and_counts_for_no_other(pair: Pair) -> None:
    both = (pair.first, pair.second)
    for one in both:
        one.at("computing step 1", "step")
    assert pair.wait(2 * TIMEOUT) == {}
    for one in both:
        one.at("waiting for rows after step 1", "data")
        assert one._longest["step"] == 0.0
        steps(2, one)
        assert 0.0 < one._longest["step"] < 2 * TIMEOUT


def test_a_halted_process_has_not_been_slow(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    steps(3, pair.first, pair.second)
    later = time.monotonic() + 3600
    for one in (pair.first, pair.second):
        one.at("computing step 4", "step")
    # The clock has gone on while nothing ran.
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: later)
        for one in (pair.first, pair.second):
            one.at("waiting for rows after step 4", "data")
            assert one._longest["step"] < TIMEOUT
            one.rest()


def test_a_silent_rank_is_dead(pair: Pair) -> None:
    pair.second._over.set()  # its thread ends without a word, as a killed process does
    told = pair.wait(5 * TIMEOUT, ranks=1)
    assert told.keys() == {0}
    assert told[0].startswith("rank 1 is dead: silent for")


def test_an_error_of_one_rank_is_told_on_all(pair: Pair) -> None:
    pair.second.at("computing step 9")
    assert pair.second.failed(ValueError("a bad row")) == ""
    told = pair.wait(5 * TIMEOUT)
    assert told[0] == "rank 1 failed (computing step 9): ValueError: a bad row"


def test_a_lost_connection_waits_for_who_was_lost(pair: Pair) -> None:
    pair.second._over.set()
    reason = pair.first.failed(RuntimeError("Connection closed by peer [127.0.0.1]"))
    assert reason.startswith("rank 1 is dead")
