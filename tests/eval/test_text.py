"""The adaptor to lm-evaluation-harness: fakes whose score is known, tiny models of others."""

import json
import math
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from answerers import Fake, ignore, kept, run_text_tasks
from midstream.config import Evaluation
from midstream.data.examples import TextCodec
from midstream.eval import benchmark
from midstream.eval import text as text_module
from midstream.eval.benchmark import evaluate
from midstream.eval.find_task import harness_task
from midstream.eval.predict import ModelAnswerer
from midstream.eval.scoring import averages
from midstream.eval.tasks import Answerer
from midstream.eval.text import (
    TextAnswer,
    TextResult,
    TextTask,
    loaded_tasks,
    own_task,
    read_text_task,
)
from midstream.eval.transformers_answerer import TransformersAnswerer
from midstream.study.results import OUTCOMES, TaskResult, checked


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
        assert [one.gold for one in answers] == [one["gold"] for one in items]
        assert {one.chosen for one in answers} == {1}
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


WORDS = ("What", "is", "a", "cat", "dog", "red", "?", "Answer", ":", "it", "the", "end", "4")
PAIRS = [
    ("What is a cat ?", " red dog"),
    ("What is a cat ?", " dog"),
    ("the dog is ", "red"),
    ("", "the cat is red"),
]
TEXTS = ["the cat is red", "What is the end ? it is a dog " * 9]
FAMILIES = ["llama", "gpt_neox", "olmo2"]


def tiny(folder: Path, family: str, *, begins: bool, longest: int = 48) -> Path:
    """A random model of a family, with a tokenizer of words that puts <s> before texts, or not."""
    import transformers

    vocabulary = {word: n for n, word in enumerate(("<s>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    names = {"bos_token": "<s>"} if begins else {}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", **names
    )
    torch.manual_seed(FAMILIES.index(family))
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=longest,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder: Path) -> TransformersAnswerer:
    return TransformersAnswerer(str(folder), torch.device("cpu"), max_new_tokens=4, batch_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "begins"), [("llama", True), ("gpt_neox", False), ("olmo2", True)]
)
def test_text_requests_are_answered_as_by_the_harness_own_model(
    family: str, begins: bool, tmp_path: Path
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = tiny(tmp_path / family, family, begins=begins)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    until: dict[str, Any] = {"until": ["red"], "max_gen_toks": 6, "do_sample": False}

    def harness(kind: str, *requests: tuple[Any, ...]) -> Any:
        return getattr(theirs, kind)([Instance(kind, {}, one, 0) for one in requests])

    ours = opened(folder)
    for found, expected in zip(
        ours.loglikelihood(PAIRS), harness("loglikelihood", *PAIRS), strict=True
    ):
        assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])
    rolling = harness("loglikelihood_rolling", *[(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(TEXTS) == pytest.approx(rolling, abs=1e-3)
    contexts = [context for context, _ in PAIRS if context]
    written = harness("generate_until", *[(one, until) for one in contexts])
    assert ours.generate_until([(one, ["red"], 6) for one in contexts]) == written


@pytest.mark.slow
def test_more_new_tokens_than_the_model_holds_are_one_line(tmp_path: Path) -> None:
    answerer = opened(tiny(tmp_path / "m", "llama", begins=True))
    with pytest.raises(ValueError, match="holds 48 tokens and is asked for 256 new ones"):
        answerer.generate_until([("a", [], 256)])


@pytest.mark.slow
@pytest.mark.parametrize("begins", [True, False])
def test_an_imported_decoder_follows_its_tokenizers_rule(begins: bool, tmp_path: Path) -> None:
    from midstream.config import VLMConfig
    from midstream.exchange.import_model import import_model
    from midstream.exchange.import_source import ImportRequest
    from midstream.model.vlm import VLM
    from midstream.model.weights import load_weights

    folder = tiny(tmp_path / "m", "llama", begins=begins)
    out = tmp_path / "imported"
    record, notes = import_model(ImportRequest(source=str(folder), out=out))
    line = next(note for note in notes if note.startswith("BOS: "))
    assert line.startswith("BOS: <s> = 0 begins" if begins else "BOS: none")
    model = VLM(VLMConfig(decoder=record.config))
    load_weights(model, out / "model.safetensors")
    codec = TextCodec.from_file(out / "tokenizer.json")
    assert codec.begin_of_text == (0 if begins else None)
    ours = ModelAnswerer(model, codec, encode=None, encoder=None, max_new_tokens=4, batch_size=2)
    theirs = opened(folder)
    # New rows of the vocabulary take their share of every probability, and none of the odds.
    for context in ("What is a cat ?", "the dog is ", ""):
        asked = [(context, "red"), (context, "dog")]
        odds = [
            one[0] - other[0]
            for one, other in (ours.loglikelihood(asked), theirs.loglikelihood(asked))
        ]
        assert odds[0] == pytest.approx(odds[1], abs=1e-4)
    whole = ours.loglikelihood_rolling(["the cat is red"])[0]
    behind = ours.loglikelihood([("", "the cat is red")])[0][0]
    # As in the harness, the token that begins a text is one of those that are summed.
    assert whole < behind - 0.1 if begins else whole == pytest.approx(behind, abs=1e-4)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task descriptions with their data beside them, as all that the harness has."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [
        {"q": f"What is {'a dog ' * n}?", "c": ["red", "dog"], "g": n % 2, "t": "4"}
        for n in range(4)
    ]
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    own = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "c", "doc_to_target": "g"}
    choice |= {"metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}]}
    written = {"output_type": "generate_until", "doc_to_target": "{{t}}", "num_fewshot": 1}
    written |= {
        "fewshot_split": "test",
        "generation_kwargs": {"until": ["end"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", **mean}],
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, first]}
            for first in [{"function": "take_first"}]
            for name, pattern in (("strict", "#### (4)"), ("loose", "(4|red|dog)"))
        ],
    }
    whole = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"}
    whole |= {"metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]}
    named = {"choose_one": choice, "choose_two": choice, "write": written, "perplexity": whole}
    named["draw"] = {**written, "generation_kwargs": {"do_sample": True, "temperature": 0.5}}
    named["absent"] = {**choice, "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}
    for name, settings in named.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**own, **settings, "task": name}))
    group = {"group": "both", "task": ["choose_one", "choose_two"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]  # type: ignore[list-item]
    (folder / "both.yaml").write_text(json.dumps(group))
    (folder / "bare.yaml").write_text(json.dumps({"group": "bare", "task": ["write"]}))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for module in ("text", "find_task", "harness_data"):
        monkeypatch.setattr(f"midstream.eval.{module}.manager", lambda: manager)
    # All of it is here.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def test_a_number_that_is_none_is_not_written_down() -> None:
    table = {"acc,none": 0.5, "acc_stderr,none": "N/A", "f1,none": float("nan")}
    table |= {"word_perplexity,none": float("inf"), "acc,other": 1}
    assert text_module._numbers(table, "none") == {
        "acc": 0.5,
        "f1": None,
        "word_perplexity": None,
        "acc.other": 1.0,
    }


def test_a_task_whose_number_is_none_leaves_the_others_theirs() -> None:
    answer = TextAnswer("a", ("b",), None, None, math.inf)
    found = TextResult({"word_perplexity": None}, (answer,), "word_perplexity", False, 1, None)
    row = benchmark._report_text(
        TextTask("t", None, {}, None), found, [dict.fromkeys(OUTCOMES)], None
    )
    assert (row["score"], row["stderr"]) == (None, None)
    assert (
        row["note"] == "its word_perplexity is no finite number: the model finds a text impossible"
    )
    assert checked(TaskResult, row, Path("r")).score is None
    assert averages({"t": row})["text"] is None


@pytest.mark.slow
def test_every_kind_of_task_gives_the_numbers_of_the_harness(harness: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate

    folder = tiny(tmp_path / "m", "llama", begins=True, longest=64)
    names = ("both", "write", "perplexity")
    table = simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=list(names),
        device="cpu",
        batch_size=3,
        task_manager=text_module.manager(),
        bootstrap_iters=0,
    )["results"]
    evaluation = Evaluation(text_tasks=names, blind=False)
    (tmp_path / "data").mkdir()
    answers = kept(opened(folder), 50)
    found = evaluate(answers, evaluation, tmp_path / "data", tmp_path / "out", ignore)
    rows = found["tasks"]
    assert rows["both"]["score"] == pytest.approx(table["both"]["acc,none"])
    assert rows["both"]["num_examples"] == 8
    assert rows["both"]["chance"] == 0.5
    assert rows["both"]["splits"] == {
        name: pytest.approx(table[name]["acc,none"]) for name in ("choose_one", "choose_two")
    }
    assert "choose_one.acc_norm" in rows["both"]["details"]
    written = rows["write"]
    assert (written["metric"], written["chance"]) == ("exact_match", 0.0)
    assert written["details"] == {
        "exact_match": table["write"]["exact_match,strict"],
        "exact_match.loose": table["write"]["exact_match,loose"],
    }
    whole = rows["perplexity"]
    assert whole["metric"] == "word_perplexity"
    assert whole["score"] == pytest.approx(table["perplexity"]["word_perplexity,none"], rel=1e-5)
    assert whole["details"]["bits_per_byte"] == pytest.approx(
        table["perplexity"]["bits_per_byte,none"], rel=1e-5
    )
    assert (whole["chance"], whole["stderr"], whole["higher_is_better"]) == (None, None, False)
    without = {name: row for name, row in rows.items() if name != "perplexity"}
    assert found["stable"] == averages(without)
    assert {path.stem for path in (tmp_path / "out/predictions").iterdir()} == set(names)


@pytest.mark.slow
def test_what_cannot_be_asked_is_refused_before_the_first_request(
    harness: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"bare is a group .* name its tasks: write"):
        harness_task("bare", tmp_path)
    for name, told in (("draw", "draws its answers at random; ask"), ("absent", "cannot load it")):
        with pytest.raises(ValueError, match=told), loaded_tasks([TextTask(name, None, {}, None)]):
            pass
