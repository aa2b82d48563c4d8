"""Text benchmarks through lm-evaluation-harness: an adaptor, and local JSON tasks."""

import json
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.eval.task import Answerer

# The harness's own default where a task does not say.
_MAX_NEW_TOKENS = 256
# Metrics of the harness that are a share of right answers, in the order in which one is chosen.
SHARES = ("acc", "exact_match", "em", "acc_norm")


@dataclass(frozen=True)
class TextItem:
    """A line of a text task: the choices continue the query as they stand, space included."""

    example_id: str
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TextTask:
    """A task for the harness: its description, and the records that it is asked on.

    settings: lm-evaluation-harness's own, without the data. docs: the records, in `split`; None
    where the harness reads `files` of its own columns, or fetches the data itself. chance: None
    where it is one over the number of choices. departs: see `local_tasks.LocalTask`.
    """

    name: str
    chance: float | None
    settings: dict[str, Any]
    docs: tuple[dict[str, Any], ...] | None
    split: str = "test"
    num_docs: int | None = None
    departs: str | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TextAnswer:
    """One record's prompt, its choices, which was chosen, which is right, and its score.

    Of a free answer the choices are what was said, and where it is known what is right.
    """

    prompt: str
    choices: tuple[str, ...]
    chosen: int | None
    gold: int | None
    score: float


@dataclass(frozen=True)
class TextResult:
    """A task's metrics by the harness's names ("acc", "acc_norm"), its records' answers, which
    metric their scores are, of how many records in all, and what guessing scores."""

    metrics: dict[str, float]
    answers: tuple[TextAnswer, ...]
    metric: str
    num_docs: int
    chance: float


def own_task(items: Sequence[TextItem], name: str, chance: float) -> TextTask:
    """Items of the caller's own (`read_text_task`) as a task."""
    docs = tuple(
        {"query": item.query, "choices": list(item.choices), "gold": item.gold} for item in items
    )
    settings = {
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        # Names of columns, not templates: a template would turn a query of digits into a number.
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return TextTask(name, chance, settings, docs, num_docs=len(docs))


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
    tasks: Sequence[TextTask],
    limit: int | None = None,
) -> dict[str, TextResult]:
    """Ask the tasks zero-shot; of data that the harness reads or fetches itself, `limit` records
    drawn by its own order's seed.

    Without such data nothing is fetched; nothing is kept outside a temporary folder.
    """
    if not tasks:
        return {}
    fetches = any(task.docs is None and not task.files for task in tasks)
    with (
        tempfile.TemporaryDirectory(prefix="midstream-text-") as temporary,
        nullcontext() if fetches else _offline(),
    ):
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        # It warns of every default that its own descriptions leave to it.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        folder = Path(temporary)
        # lm_eval's own names are "task0", "task1": a file's name may hold any character.
        inner = {f"task{index}": task for index, task in enumerate(tasks)}
        for key, task in inner.items():
            _write_task(folder, key, task)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        loaded = manager.load(list(inner))
        drawn = {
            key: _some(len(loaded["tasks"][key].eval_docs), limit)
            for key, task in inner.items()
            if task.docs is None and limit is not None
        }
        found = evaluate(
            lm=adapt(answerer),
            task_dict=loaded,
            bootstrap_iters=0,
            log_samples=True,
            **({"samples": drawn} if drawn else {}),
        )
    return {
        task.name: _result(
            task, found["results"][key], found["samples"][key], found["n-samples"][key]["original"]
        )
        for key, task in inner.items()
    }


def _some(count: int, limit: int) -> list[int]:
    return sorted(random.Random(0).sample(range(count), min(limit, count)))


def adapt(answerer: Answerer) -> Any:
    """The `lm_eval.api.model.LM` that asks `answerer`."""
    from lm_eval.api.model import LM

    class AnswererLM(LM):  # type: ignore[misc]  # lm_eval is not typed
        """Unpacks the harness's requests and hands them over as they are."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return answerer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return answerer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            settings = [request.args[1] for request in requests]
            return answerer.generate_until(
                [request.args[0] for request in requests],
                [_stops(given.get("until")) for given in settings],
                [int(given.get("max_gen_toks") or _MAX_NEW_TOKENS) for given in settings],
            )

    return AnswererLM()


def _stops(until: str | Sequence[str] | None) -> list[str]:
    return [until] if isinstance(until, str) else list(until or [])


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


def _write_task(folder: Path, key: str, task: TextTask) -> None:
    settings = {**task.settings, "task": key, "tag": []}
    paths = task.files
    if task.docs is not None:
        paths = (folder / f"{key}.jsonl",)
        lines = "".join(json.dumps(doc) + "\n" for doc in task.docs)
        paths[0].write_text(lines, encoding="utf-8")
        settings["dataset_path"] = "json"
    if paths:
        settings |= {
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {task.split: [str(path.resolve()) for path in paths]},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            "validation_split" if task.split == "validation" else "test_split": task.split,
        }
    (folder / f"{key}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML


def _result(
    task: TextTask, metrics: dict[str, Any], samples: list[dict[str, Any]], num_docs: int
) -> TextResult:
    # A task may read answers in several ways; its first is its own.
    way = samples[0]["filter"]
    by_doc = {sample["doc_id"]: sample for sample in samples if sample["filter"] == way}
    kept: dict[str, float] = {}
    for name, value in metrics.items():
        metric, _, read = name.partition(",")
        if read and "stderr" not in metric and isinstance(value, int | float):
            kept[metric if read == way else f"{metric}.{read}"] = float(value)
    share = next((metric for metric in SHARES if metric in kept and metric in samples[0]), None)
    if share is None:
        raise ValueError(
            f"text task {task.name} has the metrics {', '.join(kept) or 'none'}, none of which is "
            f"a share of right answers ({', '.join(SHARES)}); leave it out"
        )
    answers = tuple(_answer(by_doc[number], share) for number in sorted(by_doc))
    chance = task.chance
    if chance is None:
        several = [len(sample["arguments"]) for sample in by_doc.values()]
        chance = sum(1 / count for count in several if count > 1) / len(several)
    return TextResult(kept, answers, share, num_docs, chance)


def _answer(sample: dict[str, Any], share: str) -> TextAnswer:
    pairs = [tuple(pair) for pair in sample["arguments"]]
    prompt, score = str(pairs[0][0]), float(sample[share])
    if len(pairs) == 1 and not isinstance(pairs[0][1], str):  # written freely
        said = sample["filtered_resps"][0]
        said = said if isinstance(said, str) else json.dumps(said)
        return TextAnswer(prompt, (said, str(sample["target"])), 0, 1, score)
    if len(pairs) == 1:  # a continuation, right if greedy decoding gives it
        return TextAnswer(prompt, (str(pairs[0][1]),), 0 if score else None, 0, score)
    values = [pair[0] for pair in sample["filtered_resps"]]
    chosen = values.index(max(values))
    if len({str(pair[0]) for pair in pairs}) > 1:
        # The choices are beginnings, all with one end (WinoGrande).
        choices = tuple(str(pair[0]) for pair in pairs)
        other = 1 - chosen if len(pairs) == 2 else None
        return TextAnswer(f"...{pairs[0][1]}", choices, chosen, chosen if score else other, score)
    choices = tuple(str(pair[1]) for pair in pairs)
    gold = sample["target"]
    gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    if isinstance(gold, str) and gold.lstrip("-").isdecimal():
        gold = int(gold)
    if not isinstance(gold, int):
        words = [choice.strip() for choice in choices]
        gold = words.index(str(gold).strip()) if str(gold).strip() in words else None
    return TextAnswer(prompt, choices, chosen, gold, score)


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
