"""Text benchmarks through lm-evaluation-harness: an adaptor, its tasks, and local JSON tasks."""

import difflib
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.eval.aggregate import TEXT_CHANCE
from midstream.eval.local_tasks import HARNESS_TASKS, find_local
from midstream.eval.task import Answerer

# The harness's own default where a task does not say.
_MAX_NEW_TOKENS = 256


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

    settings: lm-evaluation-harness's own, without the data. docs: None where the harness fetches
    the data itself, else the records, in `split`. departs: see `local_tasks.LocalTask`.
    """

    name: str
    chance: float
    settings: dict[str, Any]
    docs: tuple[dict[str, Any], ...] | None
    split: str = "test"
    num_docs: int | None = None
    departs: str | None = None


@dataclass(frozen=True)
class TextAnswer:
    """One record's prompt, its choices, which was chosen, which is right, and its score."""

    prompt: str
    choices: tuple[str, ...]
    chosen: int | None
    gold: int | None
    score: float


@dataclass(frozen=True)
class TextResult:
    """A task's metrics by the harness's names ("acc", "acc_norm"), and its records' answers."""

    metrics: dict[str, float]
    answers: tuple[TextAnswer, ...]


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


def harness_task(name: str, folder: Path | None) -> TextTask:
    """A task of the harness by its name, from its published files under `folder`, if they are
    there, else from where the harness has them (a hub).

    Raises ValueError for a name that neither knows, with the nearest; FileNotFoundError where the
    files are not there and hubs are not asked.
    """
    known = HARNESS_TASKS.get(name)
    chance = TEXT_CHANCE[name][0] if name in TEXT_CHANCE else None
    place = find_local(folder, name) if folder is not None and known is not None else None
    if known is not None and place is not None:
        local = known.read(place)
        settings = _CONTINUATION if not known.yaml else {"include": str(_tasks() / known.yaml)}
        departs = local.departs
        if departs is None and len(local.docs) < known.num_docs:
            departs = f"{len(local.docs):,} of {known.num_docs:,} records"
        chance = local.chance if local.chance is not None else chance
        return TextTask(
            name,
            chance if chance is not None else 0.0,
            {**settings, **local.settings, "num_fewshot": 0},
            local.docs,
            known.split,
            known.num_docs,
            departs,
        )
    if known is None and chance is None and not _in_harness(name):
        near = difflib.get_close_matches(name, HARNESS_TASKS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no text task is called {name!r}{hint}")
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        what = (
            f"{' or '.join(known.files)}, published by {known.published}" if known else "its data"
        )
        raise FileNotFoundError(
            f"text task {name}: {folder} lacks {what}; put the files there, or set "
            "HF_HUB_OFFLINE=0 to let lm-evaluation-harness fetch them"
        )
    entry = {"include": str(_yaml_of(name)), "num_fewshot": 0}
    return TextTask(name, chance if chance is not None else 0.0, entry, None)


# A task that the harness does not have: the continuation's words, if greedy decoding gives them.
_CONTINUATION: dict[str, Any] = {
    "doc_to_text": "context",
    "doc_to_target": "continuation",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _tasks() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _yaml_of(name: str) -> Path:
    known = HARNESS_TASKS.get(name)
    if known is not None and (_tasks() / known.yaml).is_file():
        return _tasks() / known.yaml
    from lm_eval.tasks import TaskManager

    return Path(TaskManager().task_index[name].yaml_path)


def _in_harness(name: str) -> bool:
    from lm_eval.tasks import TaskManager

    entry = TaskManager().task_index.get(name)
    return entry is not None and entry.yaml_path is not None


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
    """Ask the tasks zero-shot; of data that the harness fetches itself, `limit` records drawn by
    its own order's seed.

    Without such data nothing is fetched; nothing is kept outside a temporary folder.
    """
    if not tasks:
        return {}
    fetches = any(task.docs is None for task in tasks)
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
        task.name: _result(found["results"][key], found["samples"][key])
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
    if task.docs is not None:
        data = folder / f"{key}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in task.docs), encoding="utf-8")
        settings |= {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {task.split: str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            "validation_split" if task.split == "validation" else "test_split": task.split,
        }
    (folder / f"{key}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML


def _result(metrics: dict[str, Any], samples: list[dict[str, Any]]) -> TextResult:
    by_doc: dict[int, dict[str, Any]] = {sample["doc_id"]: sample for sample in samples}
    kept = {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if name.endswith(",none") and "stderr" not in name and isinstance(value, int | float)
    }
    return TextResult(kept, tuple(_answer(by_doc[number]) for number in sorted(by_doc)))


def _answer(sample: dict[str, Any]) -> TextAnswer:
    asked = sample["arguments"]
    pairs = list(asked.values()) if isinstance(asked, dict) else list(asked)
    pairs = [list(pair.values()) if isinstance(pair, dict) else list(pair) for pair in pairs]
    choices = tuple(str(pair[1]) for pair in pairs)
    score = float(sample["acc"])
    if len(pairs) == 1:  # a continuation, right if greedy decoding gives it
        return TextAnswer(str(pairs[0][0]), choices, 0 if score else None, 0, score)
    values = [pair[0] for pair in sample["filtered_resps"]]
    chosen = values.index(max(values))
    gold = sample["target"]
    gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    if isinstance(gold, str) and gold.lstrip("-").isdecimal():
        gold = int(gold)
    if not isinstance(gold, int):
        words = [choice.strip() for choice in choices]
        gold = words.index(str(gold).strip()) if str(gold).strip() in words else None
    return TextAnswer(str(pairs[0][0]), choices, chosen, gold, score)


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
