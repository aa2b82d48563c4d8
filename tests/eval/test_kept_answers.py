"""Answers that were kept are not asked again, whoever kept them and however many ranks ask now."""

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from midstream.eval.answers import EvaluationStopped, KeptAnswers

PROMPTS = [f"Question {index}?" for index in range(30)]
# The pictures are names alone.
kept = partial(KeptAnswers, file_digest=str)
IMAGES: list[Path | None] = [Path(f"{index % 7}.jpg") for index in range(30)]


class Counting:
    """Answers with the question itself and counts what it is asked."""

    def __init__(self, weights: str = "w") -> None:
        self.weights_digest = weights
        self.asked: list[Any] = []
        self.parts: list[int] = []

    def generate(self, prompts: Sequence[str], images: Sequence[Path | None]) -> list[str]:
        self.asked += zip(prompts, images, strict=True)
        self.parts.append(len(prompts))
        return [f"{prompt} {image}" for prompt, image in zip(prompts, images, strict=True)]

    def choose(
        self,
        prompts: Sequence[str],
        images: Sequence[Path | None],
        choices: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        self.asked += prompts
        return [[float(len(text)) for text in own] for own in choices]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self.asked += pairs
        self.parts.append(len(pairs))
        return [(-len(a) - len(b) / 7, len(a) > 3) for a, b in pairs]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        self.asked += texts
        return [-len(text) / 3 for text in texts]

    def generate_until(
        self, contexts: Sequence[str], stops: Sequence[Sequence[str]], max_new_tokens: Sequence[int]
    ) -> list[str]:
        self.asked += contexts
        return [f"{text}{limit}" for text, limit in zip(contexts, max_new_tokens, strict=True)]


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


def after(calls: int) -> Callable[[], bool]:
    """Asks to stop from that call on."""
    left = [calls]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    return stop


def everything(answers: KeptAnswers) -> list[Any]:
    """All kinds of request, some of them twice."""
    contexts = ["a", "a longer one", "a"]
    return [
        answers.generate(PROMPTS, IMAGES),
        answers.choose(PROMPTS[:5], IMAGES[:5], [("Yes", "No")] * 5),
        answers.loglikelihood([(c, e) for c in contexts for e in ("x", "yy")]),
        answers.loglikelihood_rolling(["one", "two words"]),
        answers.generate_until(["go", "on"], [["."], []], [3, 5]),
    ]


def test_answers_come_in_the_order_of_the_requests_whatever_is_asked_together() -> None:
    expected = [f"{prompt} {image}" for prompt, image in zip(PROMPTS, IMAGES, strict=True)]
    for at_once in (1, 4, 100):
        fake = Counting()
        assert kept(fake, None, at_once=at_once).generate(PROMPTS, IMAGES) == expected
    pairs = [("c", "b"), ("cc", "b"), ("c", "a")]
    assert kept(fake, None, at_once=1).loglikelihood(pairs) == fake.loglikelihood(pairs)


def test_equal_requests_are_asked_once_and_one_context_stays_together() -> None:
    fake = Counting()
    answers = kept(fake, None, at_once=2)
    pairs = [("context", str(index)) for index in range(5)] + [("other one", "x")] * 3
    assert len(answers.loglikelihood(pairs)) == 8
    assert fake.parts == [5, 1]


def test_a_stopped_evaluation_goes_on_behind_its_last_answer(tmp_path: Path) -> None:
    whole = everything(kept(Counting(), None, at_once=4))
    first = Counting()
    with pytest.raises(EvaluationStopped):
        everything(kept(first, tmp_path, at_once=4, should_stop=after(3)))
    second = Counting()
    answers = kept(second, tmp_path, at_once=4)
    assert answers.num_found == len(first.asked)
    assert 0 < len(first.asked) < len(PROMPTS)
    assert everything(answers) == whole
    assert not set(map(str, first.asked)) & set(map(str, second.asked))
    third = Counting()
    assert everything(kept(third, tmp_path, at_once=4)) == whole
    assert third.asked == []


def test_half_a_line_is_left_out_and_written_over(tmp_path: Path) -> None:
    whole = kept(Counting(), tmp_path, at_once=50).generate(PROMPTS, IMAGES)
    file = tmp_path / "0.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    for _ in range(2):
        fake = Counting()
        assert kept(fake, tmp_path, at_once=4).generate(PROMPTS, IMAGES) == whole
        assert len(fake.asked) == (1 if _ == 0 else 0)
    file.write_text(file.read_text().replace('["', "[", 1))
    with pytest.raises(ValueError, match=r"0\.jsonl line 1 is broken; delete the file"):
        kept(Counting(), tmp_path, at_once=4)


def test_answers_of_other_weights_or_settings_are_not_taken(tmp_path: Path) -> None:
    kept(Counting(), tmp_path, at_once=4, settings="8").generate(PROMPTS, IMAGES)
    for weights, settings in (("v", "8"), ("w", "9")):
        fake = Counting(weights)
        kept(fake, tmp_path, at_once=4, settings=settings).generate(PROMPTS, IMAGES)
        assert len(fake.asked) == len(PROMPTS)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_work_and_all_have_every_answer(tmp_path: Path, size: int) -> None:
    whole = everything(kept(Counting(), None, at_once=4))
    meeting, found, fakes = Meeting(size), {}, [Counting() for _ in range(size)]

    def work(number: int) -> None:
        answers = kept(fakes[number], tmp_path, at_once=4, ranks=meeting.rank(number))
        found[number] = everything(answers)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(size)] == [whole] * size
    asked = [set(map(str, fake.asked)) for fake in fakes]
    assert all(asked)
    assert not set.intersection(*asked)
    # What ranks kept, one process takes.
    alone = Counting()
    assert everything(kept(alone, tmp_path, at_once=4)) == whole
    assert alone.asked == []


def test_ranks_that_find_half_a_line_know_the_same(tmp_path: Path) -> None:
    whole = kept(Counting(), tmp_path, at_once=4).generate(PROMPTS, IMAGES)
    file = tmp_path / "0.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    meeting, found = Meeting(2), {}

    def work(number: int) -> None:
        answers = kept(Counting(), tmp_path, at_once=4, ranks=meeting.rank(number))
        found[number] = (answers.num_found, answers.generate(PROMPTS, IMAGES))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: (len(PROMPTS) - 1, whole) for number in range(2)}


def test_all_ranks_stop_at_the_same_point_though_one_alone_is_told_to(tmp_path: Path) -> None:
    meeting, stopped = Meeting(2), []

    def work(number: int) -> None:
        stop = after(2) if number else after(1000)
        answers = kept(
            Counting(), tmp_path, at_once=3, ranks=meeting.rank(number), should_stop=stop
        )
        try:
            answers.generate(PROMPTS, IMAGES)
        except EvaluationStopped:
            stopped.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stopped) == [0, 1]


def test_an_answer_belongs_to_its_pictures_bytes_wherever_they_lie(tmp_path: Path) -> None:
    paths: list[Path | None] = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path, content in ((tmp_path / "a.jpg", b"one"), (tmp_path / "b.jpg", b"two")):
        path.write_bytes(content)
    KeptAnswers(Counting(), tmp_path / "kept", at_once=4).generate(["Q?"] * 2, paths)
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    (tmp_path / "a.jpg").write_bytes(b"changed")
    fake = Counting()
    answers = KeptAnswers(fake, tmp_path / "kept", at_once=4)
    answers.generate(["Q?"] * 2, [tmp_path / "a.jpg", tmp_path / "c.jpg"])
    assert fake.asked == [("Q?", tmp_path / "a.jpg")]


def test_progress_tells_counts_and_shares_that_agree_and_ends_at_all() -> None:
    told: list[tuple[float, str]] = []
    answers = kept(Counting(), None, at_once=1)
    answers.progress = lambda fraction, text: told.append((fraction, text))
    answers.generate(PROMPTS, IMAGES)
    answers.generate(PROMPTS, IMAGES)  # all known: nobody is asked, and it is said
    for fraction, text in told:
        done = round(30 * fraction)
        assert text == f"{done} of 30 ({100 * done // 30} %)"
    assert [fraction for fraction, _ in told[-2:]] == [1.0, 1.0]
