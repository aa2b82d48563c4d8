"""Who is lost is named, and who is slow together with all others is left alone."""

import os
import threading
import time
from collections.abc import Iterator
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

    def __init__(self) -> None:
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

    def wait(self, seconds: float) -> dict[int, str]:
        end = time.monotonic() + seconds
        while len(self.told) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        return self.told


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    two = Pair()
    yield two
    two.first.close()
    two.second.close()


def test_one_process_has_nothing_to_watch() -> None:
    watch = Watch(ALONE)
    watch.at("step 1")
    assert watch.failed(ValueError("mine")) == ""
    watch.close()


def test_ranks_that_wait_together_are_left_alone_however_long(pair: Pair) -> None:
    for one in (pair.first, pair.second):
        one.at("computing step 1")
    assert pair.wait(3 * TIMEOUT) == {}


def test_a_rank_that_stands_still_while_the_other_goes_on_is_stuck(pair: Pair) -> None:
    for one in (pair.first, pair.second):
        one.at("reading rows after step 3")
    pair.first.at("computing step 4")
    told = pair.wait(5 * TIMEOUT)
    assert set(told) == {0, 1}
    assert told[0] == told[1]
    assert told[0].startswith("rank 1 is stuck")
    assert "reading rows after step 3; others have gone on" in told[0]


def test_before_the_first_step_a_rank_may_take_longer(pair: Pair) -> None:
    pair.first.at("computing step 1", in_steps=False)
    assert pair.wait(3 * TIMEOUT) == {}


def test_a_silent_rank_is_dead(pair: Pair) -> None:
    pair.second._over.set()  # its thread ends without a word, as a killed process does
    told = pair.wait(5 * TIMEOUT)
    assert told.keys() == {0}
    assert told[0].startswith("rank 1 is dead: silent for")


def test_a_rank_that_has_ended_well_is_not_missed(pair: Pair) -> None:
    pair.second.close()
    assert pair.wait(3 * TIMEOUT) == {}


def test_an_error_of_one_rank_is_told_on_all(pair: Pair) -> None:
    pair.second.at("computing step 9")
    assert pair.second.failed(ValueError("a bad row")) == ""
    told = pair.wait(5 * TIMEOUT)
    assert told[0] == "rank 1 failed (computing step 9): ValueError: a bad row"


def test_a_lost_connection_waits_for_who_was_lost(pair: Pair) -> None:
    pair.second._over.set()
    reason = pair.first.failed(RuntimeError("Connection closed by peer [127.0.0.1]"))
    assert reason.startswith("rank 1 is dead")
