"""Text benchmarks through lm-evaluation-harness, offline: an adaptor and local JSON tasks."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.eval.task import Answerer

# Pairs handed to the model at a time, so that a long run can say how far it is.
_PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class TextItem:
    """A line of a text task: the choices continue the query as they stand, space included."""

    example_id: str
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TextResult:
    """A task's accuracy (`acc` of lm-evaluation-harness); by item, the choice and its score."""

    accuracy: float
    items: tuple[TextItem, ...]
    chosen: tuple[int, ...]
    scores: tuple[float, ...]


def read_text_task(path: Path) -> list[TextItem]:
    """The items of a JSON-lines task {"query", "choices", "gold"}.

    Raises FileNotFoundError with the tasks that are there, ValueError with the line at fault.
    """
    if not path.is_file():
        there = ", ".join(sorted(item.stem for item in path.parent.glob("*.jsonl"))) or "none"
        raise FileNotFoundError(f"text task {path} does not exist; tasks there: {there}")
    items = []
    # Not splitlines: a JSON text may hold U+2028 and its like.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error.msg})") from None
        items.append(_text_item(record, f"{path} line {number}", str(number)))
    if not items:
        raise ValueError(f"{path} holds no item; give a file with one JSON object a line")
    return items


def run_text_tasks(
    answerer: Answerer,
    tasks: dict[str, list[TextItem]],
    progress: Callable[[float, str], None] = lambda _fraction, _text: None,
) -> dict[str, TextResult]:
    """Ask every item by zero-shot multiple choice: the choice with the greatest log-probability.

    Nothing is fetched and nothing is kept outside a temporary folder.
    """
    if not tasks:
        return {}
    with tempfile.TemporaryDirectory(prefix="midstream-text-") as temporary, _offline():
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        folder = Path(temporary)
        # lm_eval's own names are "task0", "task1": a file's name may hold any character.
        inner = {f"task{index}": name for index, name in enumerate(tasks)}
        for key, name in inner.items():
            _write_task(folder, key, tasks[name])
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = evaluate(
            lm=adapt(answerer, progress),
            task_dict=manager.load(list(inner)),
            bootstrap_iters=0,
            log_samples=True,
        )
    return {
        name: _result(tasks[name], found["results"][key]["acc,none"], found["samples"][key])
        for key, name in inner.items()
    }


def adapt(
    answerer: Answerer, progress: Callable[[float, str], None] = lambda _fraction, _text: None
) -> Any:
    """The `lm_eval.api.model.LM` that asks `answerer`."""
    from lm_eval.api.model import LM

    class AnswererLM(LM):  # type: ignore[misc]  # lm_eval is not typed
        """Unpacks the harness's requests and hands them over as they are."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = []
            for start in range(0, len(requests), _PAIRS_AT_ONCE):
                pairs = [request.args for request in requests[start : start + _PAIRS_AT_ONCE]]
                found += answerer.loglikelihood(pairs)
                progress(len(found) / len(requests), f"{len(found):,} choices")
            return found

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return answerer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            prompts = [request.args[0] for request in requests]
            texts = answerer.generate(prompts, [None] * len(prompts))
            stops = [request.args[1].get("until", []) for request in requests]
            return [_cut(text, stop) for text, stop in zip(texts, stops, strict=True)]

    return AnswererLM()


def _cut(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


def _text_item(record: Any, where: str, example_id: str) -> TextItem:
    remedy = 'a line is {"query": text, "choices": [text, ..], "gold": index}'
    if not isinstance(record, dict) or not {"query", "choices", "gold"} <= set(record):
        raise ValueError(f"{where} lacks a key; {remedy}")
    query, choices, gold = record["query"], record["choices"], record["gold"]
    texts = isinstance(choices, list) and all(isinstance(item, str) and item for item in choices)
    if not isinstance(query, str) or not texts or len(choices) < 2:
        raise ValueError(f"{where} needs a text and two or more choices of text; {remedy}")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ValueError(f"{where} has gold {gold!r} for {len(choices)} choices; {remedy}")
    return TextItem(example_id, query, tuple(choices), gold)


def _write_task(folder: Path, key: str, items: Sequence[TextItem]) -> None:
    data = folder / f"{key}.jsonl"
    rows = [
        {"query": item.query, "choices": list(item.choices), "gold": item.gold} for item in items
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": key,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        # Names of columns, not templates: a template would turn a query of digits into a number.
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{key}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML


def _result(items: list[TextItem], accuracy: float, samples: list[dict[str, Any]]) -> TextResult:
    by_item = {sample["doc_id"]: sample for sample in samples}
    assert sorted(by_item) == list(range(len(items))), "the harness lost an item"
    ordered = [by_item[index] for index in range(len(items))]
    likelihoods = [[pair[0] for pair in sample["filtered_resps"]] for sample in ordered]
    return TextResult(
        accuracy=float(accuracy),
        items=tuple(items),
        chosen=tuple(values.index(max(values)) for values in likelihoods),
        scores=tuple(float(sample["acc"]) for sample in ordered),
    )


@contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` from the network, where even a local file is reported as a download."""
    import datasets  # type: ignore[import-untyped]
    import huggingface_hub.constants

    # The environment is read at import, which may be long past; these are what is looked at.
    switches = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    bars = datasets.are_progress_bars_disabled()
    for module, name in switches:
        setattr(module, name, True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
        if not bars:
            datasets.enable_progress_bars()
