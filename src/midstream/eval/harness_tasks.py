"""A task of lm-evaluation-harness by its name: from published files, from its data set's own files
on this machine, or from where the harness fetches it."""

import difflib
import functools
import os
from pathlib import Path
from typing import Any

from midstream.benchmark_files import TEXT_FILES, hub_folder, published_files
from midstream.eval.aggregate import TEXT_CHANCE
from midstream.eval.local_tasks import HARNESS_TASKS
from midstream.eval.text import SHARES, TextTask
from midstream.source_files import is_note, walk

# By the end of a name, what `datasets` calls it.
_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
# What people call a split, by the hub's name for it.
_SPLITS = {"validation": ("validation", "valid", "val", "dev")}
# A hub that does not answer for so long is not there.
_HUB_SECONDS = 5.0
# A task that the harness does not have: the continuation's words, if greedy decoding gives them.
_CONTINUATION: dict[str, Any] = {
    "doc_to_text": "context",
    "doc_to_target": "continuation",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def harness_task(name: str, folder: Path) -> TextTask:
    """A task of the harness from what lies under `folder`: its published files, wherever they are,
    or a folder of the task's name with its data set's files as a hub has them; else from the hub.

    Raises ValueError for a name that the harness does not have, with the nearest, and for a group;
    FileNotFoundError where nothing is there and the hub is not asked or does not answer.
    """
    paths = published_files(folder, name)
    if paths:
        return _published(name, paths)
    yaml, settings = _description(name)
    _check_metrics(name, settings)
    chance = TEXT_CHANCE[name][0] if name in TEXT_CHANCE else None
    entry = {"include": str(yaml), "num_fewshot": 0}
    own = hub_folder(folder, name)
    if own is not None:
        split = str(settings.get("test_split") or settings.get("validation_split")).split("[")[0]
        kind, files = _split_files(own, split, settings.get("dataset_name"), name)
        more = {"dataset_path": kind, "fewshot_split": None}
        return TextTask(name, chance, {**entry, **more}, None, split, files=files)
    _require_hub(name, folder)
    return TextTask(name, chance, entry, None)


def in_harness(name: str) -> bool:
    """Whether the harness has a task or a group of this name."""
    return name in HARNESS_TASKS or name in _index()


def _published(name: str, paths: tuple[Path, ...]) -> TextTask:
    known = HARNESS_TASKS[name]
    local = known.read(*paths)
    settings = _CONTINUATION if not known.yaml else {"include": str(_tasks() / known.yaml)}
    departs = local.departs
    if departs is None and len(local.docs) < known.num_docs:
        departs = f"{len(local.docs):,} of {known.num_docs:,} records"
    chance = local.chance if local.chance is not None else TEXT_CHANCE[name][0]
    settings = {**settings, **local.settings, "num_fewshot": 0}
    return TextTask(name, chance, settings, local.docs, known.split, known.num_docs, departs)


def _tasks() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@functools.cache
def _index() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _description(name: str) -> tuple[Path, dict[str, Any]]:
    """Where the harness's description of a task lies, and what stands in it."""
    entry = _index().get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*HARNESS_TASKS, *_index()], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no text task is called {name!r}{hint}")
    if entry.kind.name != "TASK" or entry.yaml_path is None:
        raise ValueError(
            f"{name} is no single task of lm-evaluation-harness that a description alone makes (it "
            f"is a {entry.kind.name.lower()}); name its tasks one by one"
        )
    return Path(entry.yaml_path), dict(entry.cfg or {})


def _check_metrics(name: str, settings: dict[str, Any]) -> None:
    """Raise ValueError, before anything is asked, for a task that has no share of right answers."""
    listed = [str(one.get("metric")) for one in settings.get("metric_list") or []]
    if listed and not set(listed) & set(SHARES):
        raise ValueError(
            f"text task {name} has the metrics {', '.join(listed)}, none of which is a share of "
            f"right answers ({', '.join(SHARES)}); leave it out"
        )


def _split_files(
    folder: Path, split: str, configuration: str | None, name: str
) -> tuple[str, tuple[Path, ...]]:
    """The files of a split and what kind they are: by their names, or by their folder's."""
    root = folder / configuration if configuration else folder
    found = [Path(path) for path in walk(root if root.is_dir() else folder)]
    data = [path for path in found if path.suffix in _KINDS and not is_note(path.name)]
    called = _SPLITS.get(split, (split,))
    named = [path for path in data if _first_word(path.name) in called]
    named = named or [path for path in data if path.parent.name in called]
    if not named and len(data) == 1:
        named = data
    if not named:
        there = ", ".join(str(path.relative_to(folder)) for path in data[:10]) or "no data file"
        raise FileNotFoundError(
            f"text task {name}: {folder} holds no file of the split {split!r}, only {there}; put "
            f"the data set's files there as its hub has them, such as {split}.parquet, .jsonl or "
            ".csv"
        )
    kinds = {_KINDS[path.suffix] for path in named}
    if len(kinds) > 1:
        names = ", ".join(path.name for path in named[:5])
        raise ValueError(f"text task {name}: {folder} holds {split!r} in two forms ({names})")
    return kinds.pop(), tuple(named)


def _first_word(name: str) -> str:
    """ "test-00000-of-00001.parquet" -> "test"."""
    return name.split(".")[0].split("-")[0].split("_")[0].lower()


def _require_hub(name: str, folder: Path) -> None:
    """Raise FileNotFoundError, at once, where the hub is not to be asked or does not answer."""
    known = HARNESS_TASKS.get(name)
    what = f"a folder {name}/ with its data set's files"
    if known is not None:
        files = " or ".join(" and ".join(names) for names in TEXT_FILES[name])
        what = f"{files}, published by {known.published}, or {what}"
    lacks = f"text task {name}: {folder} lacks {what}"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise FileNotFoundError(
            f"{lacks}; put the files there, or set HF_HUB_OFFLINE=0 to let lm-evaluation-harness "
            "fetch them"
        )
    problem = _hub_problem()
    if problem is not None:
        raise FileNotFoundError(
            f"{lacks}, and the hub does not answer ({problem}); put the files there, or try again "
            "with a network"
        )


@functools.cache
def _hub_problem() -> str | None:
    """Why the hub cannot be asked, None where it answers at all; asked once in a process."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # whatever the HTTP client in use raises
        return f"{type(error).__name__}: {error}".split("\n")[0][:120]
    return None
