"""Text benchmarks through lm-evaluation-harness: an adaptor, and local JSON tasks."""

import functools
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from midstream.eval.benchmark_records import lines
from midstream.eval.scoring import BENCHMARKS
from midstream.eval.tasks import Answerer

# The harness's own default where a task does not say, and the seed of its command line.
_MAX_NEW_TOKENS, _FEWSHOT_SEED = 256, 1234
# Metrics of the harness that are a share of right answers, in the order in which one is chosen.
SHARES = ("acc", "exact_match", "em", "acc_norm")


@dataclass(frozen=True)
class TextTask:
    """A task for the harness: its description, and the records that it is asked on.

    settings: lm-evaluation-harness's own, without the data. docs: the records, in `split`; None
    where it reads `files` of its own columns, or (`fetched`) loads its task or group itself.
    chance: None where it is one over the number of choices. departs: see `tasks.LocalTask`.
    """

    name: str
    chance: float | None
    settings: dict[str, Any]
    docs: tuple[dict[str, Any], ...] | None
    split: str = "test"
    num_docs: int | None = None
    departs: str | None = None
    files: tuple[Path, ...] = ()

    @property
    def fetched(self) -> bool:
        """Whether the harness loads its own task of this name, data and all."""
        return self.docs is None and not self.files


@dataclass(frozen=True)
class TextAnswer:
    """One record's prompt, choices, which was chosen and which is right, score, task of a group;
    its name is its number among all of the task's records, from 1.

    Of a free answer the choices are what was said, and where it is known what is right; of a text
    that is read as a whole its log-probability. Of choices that are weighed by their likelihood
    `logprobs` are theirs, and `continuation` is the right one's request, its context and its text.
    """

    prompt: str
    choices: tuple[str, ...]
    chosen: int | None
    gold: int | None
    score: float
    split: str = ""
    logprobs: tuple[float, ...] = ()
    continuation: tuple[str, str] = ("", "")
    name: str = ""


@dataclass(frozen=True)
class TextResult:
    """A task's metrics by the harness's names, its records' answers, and which metric they score.

    `num_docs`: of how many records in all; `chance` is None for a metric that is no share of right
    answers (a perplexity). A group has its own metrics, and its tasks' as "<task>.<metric>".
    """

    metrics: dict[str, float | None]
    answers: tuple[TextAnswer, ...]
    metric: str
    higher_is_better: bool
    num_docs: int
    chance: float | None


def own_task(items: Sequence[dict[str, Any]], name: str, chance: float) -> TextTask:
    """Items of the caller's own (`read_text_task`) as a task: the choices continue the query as
    they stand, space included."""
    settings = dict(BENCHMARKS["own_text_task"])
    return TextTask(name, chance, settings, tuple(items), num_docs=len(items))


def read_text_task(path: Path) -> list[dict[str, Any]]:
    """The items of a JSON-lines task {"query", "choices", "gold"}.

    Raises FileNotFoundError with the tasks that are there, ValueError with the line at fault.
    """
    if not path.is_file():
        there = ", ".join(sorted(item.stem for item in path.parent.glob("*.jsonl"))) or "none"
        raise FileNotFoundError(f"text task {path} does not exist; tasks there: {there}")
    items = []
    for record in lines(path, 'a line is {"query": text, "choices": [text, ..], "gold": index}'):
        choices = record.texts("choices", least=2)
        if not all(choices):
            record.refuse("one of its choices is empty")
        gold = record.index("gold", len(choices))
        items.append({"query": record.text("query"), "choices": choices, "gold": gold})
    return items


@functools.cache
def manager() -> Any:
    """The `lm_eval.tasks.TaskManager` of all that the harness has."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def loaded_tasks(
    tasks: Sequence[TextTask], limit: int | None = None
) -> Iterator[Callable[[Answerer], dict[str, TextResult]]]:
    """What asks a model the tasks, with all their data at hand; of data that the harness reads or
    fetches itself, `limit` records drawn by its own order's seed, of each task of a group.

    Without such data nothing is fetched; nothing is kept outside a temporary folder.
    Raises ValueError, before anything is asked, for a task that the harness cannot load, and for
    one that asks for pictures, for running a model's code, or for answers drawn at random.
    """
    if not tasks:
        yield lambda _answerer: {}
        return
    with (
        tempfile.TemporaryDirectory(prefix="midstream-text-") as temporary,
        nullcontext() if any(task.fetched for task in tasks) else _offline(),
    ):
        # It warns of every default that its own descriptions leave to it.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # lm_eval's own names are "task0", "task1": a file's name may hold any character.
        keys = {t.name if t.fetched else f"task{i}": t for i, t in enumerate(tasks)}
        loaded = _load(Path(temporary), keys)
        drawn = {
            leaf: sorted(random.Random(0).sample(range(count), min(limit, count)))
            for key, task in keys.items()
            for leaf in _leaves(key, loaded["group_map"])
            if task.docs is None and limit is not None
            for count in [len(loaded["tasks"][leaf].eval_docs)]
        }
        yield lambda answerer: _ask(answerer, keys, loaded, drawn)


def _load(folder: Path, tasks: Mapping[str, TextTask]) -> dict[str, dict[str, Any]]:
    """The harness's tasks and groups, as its `TaskManager.load` gives them."""
    from lm_eval.tasks import TaskManager

    for key, task in tasks.items():
        if not task.fetched:
            _write_task(folder, key, task)
    written = TaskManager(include_path=str(folder), include_defaults=False)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for key, task in tasks.items():
        try:
            found = (manager() if task.fetched else written).load([key])
        except Exception as error:  # whatever a task's own code or its data set's reader raises
            told = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            raise ValueError(
                f"text task {task.name}: lm-evaluation-harness cannot load it ({told}); put its "
                f"data set's own files into a folder {task.name}/ of the data, or leave it out"
            ) from error
        for leaf in found["tasks"].values():
            _check_askable(task.name, leaf)
            if task.fetched and "num_fewshot" in task.settings:
                leaf.set_config("num_fewshot", task.settings["num_fewshot"])
            elif leaf.get_config("num_fewshot") is None:
                leaf.set_config("num_fewshot", 0)
            leaf.set_fewshot_seed(_FEWSHOT_SEED)
        for kind, values in found.items():
            loaded[kind] |= values
    return loaded


def _check_askable(name: str, leaf: Any) -> None:
    settings = leaf.get_config("generation_kwargs") or {}
    reasons = {
        "shows pictures or plays sound": getattr(leaf, "MULTIMODAL", False),
        "runs code that the model writes": getattr(leaf, "UNSAFE_CODE", False),
        "draws its answers at random": settings.get("do_sample", False),
    }
    if why := next((why for why, holds in reasons.items() if holds), None):
        raise ValueError(
            f"text task {name} {why}; ask one with choices, greedy answers or whole texts"
        )


def _ask(
    answerer: Answerer,
    tasks: Mapping[str, TextTask],
    loaded: Mapping[str, Any],
    drawn: dict[str, list[int]],
) -> dict[str, TextResult]:
    from lm_eval.evaluator import evaluate

    found = evaluate(
        lm=adapt(answerer),
        task_dict=loaded,
        bootstrap_iters=0,
        log_samples=True,
        **({"samples": drawn} if drawn else {}),
    )
    return {task.name: _result(task, key, loaded, found) for key, task in tasks.items()}


def _leaves(key: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group and of its groups, or the task itself."""
    if key not in groups:
        return [key]
    return [leaf for child in groups[key] for leaf in _leaves(child, groups)]


def adapt(answerer: Answerer) -> Any:
    """The `lm_eval.api.model.LM` that asks `answerer`."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs

    class AnswererLM(LM):  # type: ignore[misc]  # lm_eval is not typed
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """As the harness asks it."""
            return answerer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """As the harness asks it."""
            return answerer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            """As the harness asks it."""
            settings = [normalize_gen_kwargs(r.args[1], _MAX_NEW_TOKENS) for r in requests]
            pairs = zip(requests, settings, strict=True)
            return answerer.generate_until(
                [(r.args[0], given["until"], int(given["max_gen_toks"])) for r, given in pairs]
            )

    return AnswererLM()


def _write_task(folder: Path, key: str, task: TextTask) -> None:
    """The harness's own YAML, with our files as its data set's."""
    paths, settings = task.files, {**task.settings, "task": key, "tag": [], "dataset_name": None}
    if task.docs is not None:
        paths, settings["dataset_path"] = (folder / f"{key}.jsonl",), "json"
        text = "".join(json.dumps(doc) + "\n" for doc in task.docs)
        paths[0].write_text(text, encoding="utf-8")
    files = {task.split: [str(path.resolve()) for path in paths]}
    settings["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    settings |= dict.fromkeys(["training_split", "validation_split", "test_split"])
    settings["validation_split" if task.split == "validation" else "test_split"] = task.split
    (folder / f"{key}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML


def _result(
    task: TextTask, key: str, loaded: Mapping[str, Any], found: Mapping[str, Any]
) -> TextResult:
    leaves = _leaves(key, loaded["group_map"])
    # A task may read answers in several ways; its first is its own.
    way = found["samples"][leaves[0]][0]["filter"]
    own = _numbers(found["results"][key], way)
    first = found["samples"][leaves[0]][0]["metrics"]
    of_each = [name for name in own if name in first] or first[:1]
    metric = next((name for name in SHARES if name in of_each), of_each[0])
    answers, several = [], []
    for leaf in leaves:
        by_doc = {one["doc_id"]: one for one in found["samples"][leaf] if one["filter"] == way}
        average = loaded["tasks"][leaf].aggregation()[metric]
        split = leaf if leaf != key else ""
        for n in sorted(by_doc):
            found_here = _answer(by_doc[n], metric, average, split)
            answers.append(replace(found_here, name=f"{split}-{n + 1}" if split else str(n + 1)))
        several += [len(one["arguments"]) for one in by_doc.values()]
    details = own | {
        f"{leaf}.{name}": value
        for leaf in leaves
        if leaf != key
        for name, value in _numbers(found["results"][leaf], way).items()
    }
    chance = task.chance if metric in SHARES else None
    if task.chance is None and metric in SHARES:
        chance = sum(1 / count for count in several if count > 1) / len(several)
    return TextResult(
        metrics=details,
        answers=tuple(answers),
        metric=metric,
        higher_is_better=bool(found["higher_is_better"][leaves[0]].get(metric, True)),
        num_docs=sum(found["n-samples"][leaf]["original"] for leaf in leaves),
        chance=chance,
    )


def _numbers(metrics: Mapping[str, Any], way: str) -> dict[str, float | None]:
    """A row of the harness's table, None of what is not finite; what is read in another `way` has
    its own behind it."""
    kept: dict[str, float | None] = {}
    for name, value in metrics.items():
        metric, _, read = name.partition(",")
        if read and not metric.endswith("_stderr") and isinstance(value, int | float):
            number = float(value) if math.isfinite(value) else None
            kept[metric if read == way else f"{metric}.{read}"] = number
    return kept


def _answer(
    sample: Mapping[str, Any], metric: str, average: Callable[[list[Any]], Any], split: str
) -> TextAnswer:
    pairs, said = [tuple(pair) for pair in sample["arguments"]], sample["filtered_resps"]
    value = sample[metric]
    # What is no number is made one by the harness's own aggregation, over this record alone.
    score = float(value if isinstance(value, int | float) else average([value]))
    prompt = str(pairs[0][0])
    if len(pairs[0]) == 1:  # a whole text
        return TextAnswer(prompt, (str(said[0]),), 0, None, score, split)
    if not isinstance(pairs[0][1], str):  # written freely
        told = said[0] if isinstance(said[0], str) else json.dumps(said[0], default=str)
        return TextAnswer(prompt, (told, str(sample["target"])), 0, 1, score, split)
    values = tuple(float(pair[0]) for pair in said)
    if len(pairs) == 1:  # a continuation, right if greedy decoding gives it
        chosen = 0 if metric not in SHARES or score else None
        (pair,) = pairs
        return TextAnswer(prompt, (str(pair[1]),), chosen, 0, score, split, values, pair)
    chosen = values.index(max(values))
    if len({str(pair[0]) for pair in pairs}) > 1:
        # The choices are beginnings, all with one end (WinoGrande).
        choices = tuple(str(pair[0]) for pair in pairs)
        two = len(pairs) == 2
        other, values = (1 - chosen, values) if two else (None, ())
        gold = chosen if score else other
        prompt = f"...{pairs[0][1]}"
    else:
        choices = tuple(str(pair[1]) for pair in pairs)
        gold = _gold(sample["target"], choices)
    pair = pairs[gold or 0]
    return TextAnswer(prompt, choices, chosen, gold, score, split, values, pair)


def _gold(target: Any, choices: tuple[str, ...]) -> int | None:
    """Which choice a task's target is; None where it is none of them, or several."""
    target = target[0] if isinstance(target, list) and len(target) == 1 else target
    if isinstance(target, str) and target.lstrip("-").isdecimal():
        target = int(target)
    if not isinstance(target, int):
        words = [choice.strip() for choice in choices]
        target = words.index(str(target).strip()) if str(target).strip() in words else -1
    return target if 0 <= target < len(choices) else None


@contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` from the network, where even a local file is reported as a download."""
    import datasets  # type: ignore[import-untyped]
    import huggingface_hub.constants

    with ExitStack() as undo:
        # The environment is read at import, which may be long past; these are what is looked at.
        modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
        for module in modules:
            undo.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
            module.HF_HUB_OFFLINE = True
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            undo.callback(datasets.enable_progress_bars)
        yield
