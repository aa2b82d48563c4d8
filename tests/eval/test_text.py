"""The adaptor to lm-evaluation-harness, with models whose right score is known beforehand."""

import json
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from answerers import Fake, run_text_tasks
from midstream.eval.tasks import Answerer
from midstream.eval.text import adapt, own_task, read_text_task


def item(query: str, choices: Sequence[str], gold: int) -> dict[str, Any]:
    return {"query": query, "choices": list(choices), "gold": gold}


def made(count: int, *, choices: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    draws = random.Random(seed)
    words = ("red", "green", "blue", "grey")[:choices]
    return [
        item(
            f"Question {index}: which?\nAnswer:",
            [f" {word}{index}" for word in words],
            draws.randrange(choices),
        )
        for index in range(count)
    ]


def line(**changes: Any) -> str:
    return json.dumps({"query": "It is", "choices": [" red", " blue"], "gold": 1} | changes)


def test_a_task_file_is_read_with_its_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "colours.jsonl"
    path.write_text(line() + "\n\n" + line(query="a\u2028b", gold=0) + "\n", encoding="utf-8")
    assert read_text_task(path) == [
        item("It is", [" red", " blue"], 1),
        item("a\u2028b", (" red", " blue"), 0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"query": "It is"}', "line 2: it has no 'choices', only query; a line is"),
        (line(choices=[" red"]), "line 2: its 'choices' is no list of 2 or more texts"),
        (line(choices=[" red", ""]), "line 2: one of its choices is empty"),
        (line(gold=2), "line 2: its gold 2 is none of 2 options"),
        (line(gold=True), "line 2: its 'gold' is True, not a int"),
    ],
)
def test_a_malformed_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "colours.jsonl"
    path.write_text(line() + "\n" + text + "\n")
    with pytest.raises(ValueError, match=message):
        read_text_task(path)


def test_a_missing_task_file_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text(line())
    with pytest.raises(
        FileNotFoundError, match=r"colours\.jsonl does not exist; tasks there: sums"
    ):
        read_text_task(tmp_path / "colours.jsonl")


def test_no_task_needs_no_harness() -> None:
    assert isinstance(Fake(), Answerer)
    assert run_text_tasks(Fake(), []) == {}


@pytest.mark.slow
def test_one_that_prefers_gold_scores_one_and_its_opposite_zero() -> None:
    items = made(50)
    gold = {(one["query"], one["choices"][one["gold"]]) for one in items}
    knowing = Fake(like=lambda query, choice: (query, choice) in gold)
    result = run_text_tasks(knowing, [own_task(items, "colours", 0.3)])["colours"]
    assert result.metrics["acc"] == 1.0
    assert [one.chosen for one in result.answers] == [one["gold"] for one in items]
    assert [one.gold for one in result.answers] == [one["gold"] for one in items]
    contrary = Fake(like=lambda query, choice: (query, choice) not in gold)
    found = run_text_tasks(contrary, [own_task(items, "colours", 0.3)])
    assert found["colours"].metrics["acc"] == 0.0


@pytest.mark.slow
def test_one_that_always_says_green_scores_how_often_green_is_right() -> None:
    tasks = {"three ways": made(60), "four/ways": made(40, choices=4, seed=1)}
    asked = [own_task(items, name, 0.3) for name, items in tasks.items()]
    results = run_text_tasks(Fake(like=lambda _query, choice: choice.startswith(" green")), asked)
    for name, items in tasks.items():
        greens = sum(one["gold"] == 1 for one in items) / len(items)
        assert 0 < greens < 1
        assert results[name].metrics["acc"] == pytest.approx(greens)
        answers = results[name].answers
        assert [one.score for one in answers] == [float(one["gold"] == 1) for one in items]
        assert [(one.prompt, one.choices) for one in answers] == [
            (one["query"], tuple(one["choices"])) for one in items
        ]


@pytest.mark.slow
def test_query_and_choices_reach_the_model_as_they_stand() -> None:
    odd = [
        item("12", (" 1", " 2"), 0),  # a number is no template
        item("{{ 1 + 1 }} is \n", ("{{x}}", "two "), 1),
        item("", (" ä", " \u2028"), 1),
    ]
    fake = Fake(like=lambda _query, choice: len(choice))
    run_text_tasks(fake, [own_task(odd, "odd", 0.5)])
    assert sorted(fake.asked) == sorted((one["query"], c) for one in odd for c in one["choices"])


@pytest.mark.slow
def test_nothing_asks_the_network_or_writes_beside_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    tried = []

    def refuse(*args: Any, **_more: Any) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    run_text_tasks(
        Fake(like=lambda _query, choice: len(choice)), [own_task(made(5), "colours", 0.3)]
    )
    assert tried == []
    assert list(tmp_path.iterdir()) == []
    assert datasets.config.HF_HUB_OFFLINE is False  # as it was


@pytest.mark.slow
def test_the_adaptor_generates_up_to_a_stop_and_rolls_whole_texts() -> None:
    model = adapt(Fake(lambda text, _: f"{text} is said\nQ: and more"))
    requests = [SimpleNamespace(args=("This", {"until": ["\nQ:", "never"]}))]
    assert model.generate_until(requests) == ["This is said"]
    assert model.loglikelihood_rolling([SimpleNamespace(args=("four",))]) == [-4.0]
