"""Answers that were kept are not asked again, whoever kept them and however many ranks ask now."""

import errno
import json
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from answerers import Fake, chosen, written
from midstream.eval.answers import EvaluationStopped, KeptAnswers, NotNumbers
from midstream.work.evaluate_model import _failures_named

PROMPTS = [f"Question {index}?" for index in range(30)]
# The pictures are names alone.
kept = partial(KeptAnswers, file_digest=str)
IMAGES: list[Path | None] = [Path(f"{index % 7}.jpg") for index in range(30)]


def counting(weights: str = "w") -> Fake:
    """Answers with the question itself."""
    return Fake(
        lambda prompt, image: f"{prompt} {image}",
        lambda a, b: -len(a) - len(b) / 7,
        greedy=lambda a, _: len(a) > 3,
        weights=weights,
    )


class Meeting:
    """Ranks as threads of one process, which meet whenever they gather."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.values: list[Any] = [None] * size

    def rank(self, number: int) -> "Rank":
        return Rank(self, number)


class Rank:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.world_size = meeting, rank, meeting.size

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = json.loads(json.dumps(value))
        self.meeting.barrier.wait()
        found = list(self.meeting.values)
        self.meeting.barrier.wait()
        return found


def on_ranks(size: int, work: Callable[[int, Rank], None]) -> None:
    """Do `work` on every rank at once."""
    meeting = Meeting(size)
    threads = [
        threading.Thread(target=work, args=(number, meeting.rank(number))) for number in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def after(calls: int) -> Callable[[], bool]:
    """Asks to stop from that call on."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def everything(answers: KeptAnswers) -> list[Any]:
    """All kinds of request, some of them twice."""
    contexts = ["a", "a longer one", "a"]
    return [
        written(answers, PROMPTS, IMAGES),
        chosen(answers, PROMPTS[:5], IMAGES[:5], [("Yes", "No")] * 5),
        answers.loglikelihood([(c, e) for c in contexts for e in ("x", "yy")]),
        answers.loglikelihood_rolling(["one", "two words"]),
        answers.generate_until([("go", ["."], 3), ("on", [], 5)]),
    ]


def test_answers_come_in_the_order_of_the_requests_whatever_is_asked_together() -> None:
    expected = [f"{prompt} {image}" for prompt, image in zip(PROMPTS, IMAGES, strict=True)]
    for at_once in (1, 4, 100):
        fake = counting()
        assert written(kept(fake, None, at_once=at_once), PROMPTS, IMAGES) == expected
    pairs = [("c", "b"), ("cc", "b"), ("c", "a")]
    assert kept(fake, None, at_once=1).loglikelihood(pairs) == fake.loglikelihood(pairs)


def test_equal_requests_are_asked_once_and_one_context_stays_together() -> None:
    fake = counting()
    answers = kept(fake, None, at_once=2)
    pairs = [("context", str(index)) for index in range(5)] + [("other one", "x")] * 3
    assert len(answers.loglikelihood(pairs)) == 8
    assert fake.parts == [5, 1]


def test_nan_is_kept_by_no_rank_and_told_by_all(tmp_path: Path) -> None:
    told: list[str] = []

    def work(number: int, rank: Rank) -> None:
        fake = Fake(like=lambda _, text: math.nan if text == "x" else -1.0)
        answers = kept(fake, tmp_path, at_once=1, ranks=rank)
        with pytest.raises(NotNumbers, match=r"no numbers \(NaN\)") as raised:
            answers.loglikelihood([("a", "x"), ("b", "y")])
        told.append(str(raised.value))

    on_ranks(2, work)
    assert len(told) == 2
    assert [path.read_text().count("\n") for path in sorted(tmp_path.glob("*"))] == [1]
    with pytest.raises(ValueError, match=r"^m: its log-probabilities"), _failures_named("m"):
        raise NotNumbers


def test_a_stopped_evaluation_goes_on_behind_its_last_answer(tmp_path: Path) -> None:
    whole = everything(kept(counting(), None, at_once=4))
    first = counting()
    with pytest.raises(EvaluationStopped):
        everything(kept(first, tmp_path, at_once=4, should_stop=after(3)))
    second = counting()
    answers = kept(second, tmp_path, at_once=4)
    assert answers.num_found == len(first.asked)
    assert 0 < len(first.asked) < len(PROMPTS)
    assert everything(answers) == whole
    assert not set(map(str, first.asked)) & set(map(str, second.asked))
    third = counting()
    assert everything(kept(third, tmp_path, at_once=4)) == whole
    assert third.asked == []


def test_half_a_line_is_left_out_and_written_over(tmp_path: Path) -> None:
    whole = written(kept(counting(), tmp_path, at_once=50), PROMPTS, IMAGES)
    file = tmp_path / "0.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    for _ in range(2):
        fake = counting()
        assert written(kept(fake, tmp_path, at_once=4), PROMPTS, IMAGES) == whole
        assert len(fake.asked) == (1 if _ == 0 else 0)
    file.write_text(file.read_text().replace('["', "[", 1))
    with pytest.raises(ValueError, match=r"0\.jsonl line 1 is broken; delete the file"):
        kept(counting(), tmp_path, at_once=4)


def test_answers_of_other_weights_or_settings_are_not_taken(tmp_path: Path) -> None:
    written(kept(counting(), tmp_path, at_once=4, settings="8"), PROMPTS, IMAGES)
    for weights, settings in (("v", "8"), ("w", "9")):
        fake = counting(weights)
        written(kept(fake, tmp_path, at_once=4, settings=settings), PROMPTS, IMAGES)
        assert len(fake.asked) == len(PROMPTS)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_work_and_all_have_every_answer(tmp_path: Path, size: int) -> None:
    whole = everything(kept(counting(), None, at_once=4))
    found, fakes = {}, [counting() for _ in range(size)]

    def work(number: int, rank: Rank) -> None:
        found[number] = everything(kept(fakes[number], tmp_path, at_once=4, ranks=rank))

    on_ranks(size, work)
    assert [found[number] for number in range(size)] == [whole] * size
    asked = [set(map(str, fake.asked)) for fake in fakes]
    assert all(asked)
    assert not set.intersection(*asked)
    # What ranks kept, one process takes.
    alone = counting()
    assert everything(kept(alone, tmp_path, at_once=4)) == whole
    assert alone.asked == []


def test_ranks_that_find_half_a_line_know_the_same(tmp_path: Path) -> None:
    whole = written(kept(counting(), tmp_path, at_once=4), PROMPTS, IMAGES)
    file = tmp_path / "0.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    found = {}

    def work(number: int, rank: Rank) -> None:
        answers = kept(counting(), tmp_path, at_once=4, ranks=rank)
        found[number] = (answers.num_found, written(answers, PROMPTS, IMAGES))

    on_ranks(2, work)
    assert found == {number: (len(PROMPTS) - 1, whole) for number in range(2)}


def test_all_ranks_stop_at_the_same_point_though_one_alone_is_told_to(tmp_path: Path) -> None:
    stopped = []

    def work(number: int, rank: Rank) -> None:
        stop = after(2) if number else after(1000)
        answers = kept(counting(), tmp_path, at_once=3, ranks=rank, should_stop=stop)
        try:
            written(answers, PROMPTS, IMAGES)
        except EvaluationStopped:
            stopped.append(number)

    on_ranks(2, work)
    assert sorted(stopped) == [0, 1]


def test_an_answer_belongs_to_its_pictures_bytes_wherever_they_lie(tmp_path: Path) -> None:
    paths: list[Path | None] = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path, content in ((tmp_path / "a.jpg", b"one"), (tmp_path / "b.jpg", b"two")):
        path.write_bytes(content)
    written(KeptAnswers(counting(), tmp_path / "kept", at_once=4), ["Q?"] * 2, paths)
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    (tmp_path / "a.jpg").write_bytes(b"changed")
    fake = counting()
    answers = KeptAnswers(fake, tmp_path / "kept", at_once=4)
    written(answers, ["Q?"] * 2, [tmp_path / "a.jpg", tmp_path / "c.jpg"])
    assert fake.asked == [("Q?", tmp_path / "a.jpg", (), None, True)]


def test_progress_tells_counts_and_shares_that_agree_and_ends_at_all() -> None:
    told: list[tuple[float, str]] = []
    answers = kept(counting(), None, at_once=1)
    answers.progress = lambda fraction, text: told.append((fraction, text))
    written(answers, PROMPTS, IMAGES)
    written(answers, PROMPTS, IMAGES)  # all known: nobody is asked, and it is said
    for fraction, text in told:
        done = round(30 * fraction)
        assert text == f"{done} of 30 ({100 * done // 30} %)"
    assert [fraction for fraction, _ in told[-2:]] == [1.0, 1.0]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    answers = kept(counting(), tmp_path, at_once=4)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"no room to write .*0\.jsonl .*run the same command again"):
        everything(answers)
