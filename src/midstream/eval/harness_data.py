"""Where the data of lm-evaluation-harness' own tasks come from: a folder, the cache of data sets,
the hub."""

import functools
import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from midstream.core.digests import is_note, walk
from midstream.core.identity import TEXT_FILES
from midstream.core.tokens import name_some
from midstream.eval.tasks import HARNESS_TASKS
from midstream.eval.text import manager

# By the end of a name, what `datasets` calls it.
_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
# What splits are called.
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}
# A hub that does not answer for so long is not there.
_HUB_SECONDS = 5.0


def split_files(
    folder: Path, split: str, configuration: str | None, name: str
) -> tuple[str, tuple[Path, ...]]:
    """The files of a split and what kind they are: by their names, or by their folder's."""
    root = folder / configuration if configuration else folder
    found = map(Path, walk(root if root.is_dir() else folder))
    data = [path for path in found if _kind(path) and not is_note(path.name)]
    called = ("validation", "valid", "val", "dev") if split == "validation" else (split,)
    # "test-00000-of-00001.parquet" is of the split "test".
    begins = {path: re.split(r"[._-]", path.name.lower())[0] for path in data}
    named = [path for path in data if begins[path] in called]
    named = named or [path for path in data if path.parent.name in called]
    if not named and len(data) == 1 and not {begins[data[0]], data[0].parent.name} & _SPLITS:
        named = data
    if not named:
        there = ", ".join(str(path.relative_to(folder)) for path in data[:10]) or "no data file"
        raise FileNotFoundError(
            f"text task {name}: {folder} holds no file of the split {split!r}, only {there}; put "
            f"the data set's files there as its hub has them, such as {split}.parquet"
        )
    places = sorted({str(path.parent.relative_to(folder)) for path in named})
    strange = {Path(place).name for place in places} - {"", "data", "default", *_SPLITS}
    if configuration and not root.is_dir() and (strange or len(places) > 1):
        raise ValueError(
            f"text task {name}: {folder} holds {split!r} in {', '.join(places[:5])} and no folder "
            f"{configuration}, whose files alone are the task's; make it"
        )
    kind, *others = {_kind(path) or "" for path in named}
    if others:
        names = ", ".join(path.name for path in named[:5])
        raise ValueError(f"text task {name}: {folder} holds {split!r} in two forms ({names})")
    return kind, tuple(named)


def _kind(path: Path) -> str | None:
    return _KINDS.get(Path(path.name.removesuffix(".gz")).suffix)


def _data_sets(member: Any, changed: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The path and configuration of each data set of a task or a member, with what is `changed`."""
    own = member if isinstance(member, dict) else {"task": member}
    entry = None if isinstance(own.get("task"), list) else manager().task_index.get(called(own))
    told = {**(entry.cfg or {} if entry else {}), **changed, **own}
    inner = own.get("task") if entry is None else members(entry)
    if isinstance(inner, list):
        changed = {key: told[key] for key in ("dataset_path", "dataset_name") if key in told}
        for one in inner:
            yield from _data_sets(one, changed)
    else:
        path = told.get("dataset_path") or f"the data of {called(own)}"
        yield str(path), told.get("dataset_name")


def called(member: Any) -> str:
    """The name of a member of a group."""
    return str(member.get("task", member.get("group"))) if isinstance(member, dict) else str(member)


def members(entry: Any) -> list[Any] | None:
    """The members of a tag or a group; None of a task."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task", []) if entry.kind.name == "GROUP" else None
    return [listed] if isinstance(listed, str) else listed


def _at_hand(path: str, configuration: str | None) -> bool:
    """Whether a data set is here: in files of its own, or in the cache of `datasets`."""
    import datasets  # type: ignore[import-untyped]
    from datasets.naming import camelcase_to_snakecase  # type: ignore[import-untyped]

    *owner, last = path.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(last)])
    part = glob.escape(configuration) if configuration else "*"
    root = Path(datasets.config.HF_DATASETS_CACHE) / folder
    cached = [found for name in (part, f"{part}-*") for found in root.glob(f"{name}/*/*")]
    return bool(cached) or path in _KINDS.values() or Path(path).is_dir()


def data_set_folder(entry: Any, folder: Path) -> Path | None:
    """The folder with the name of a task's data set (`mmlu` of cais/mmlu), in which each of several
    tasks has its configuration's; None where there is none, and in a world, whose tasks have
    folders of their own."""
    described = entry.cfg or {}
    own = folder / str(described.get("dataset_path")).split("/")[-1]
    configuration = described.get("dataset_name")
    there = own / configuration if configuration else own
    return own if there.is_dir() and not (folder / "world.json").is_file() else None


def require_hub(entry: Any, folder: Path) -> None:
    """Raise FileNotFoundError where data sets have to be fetched and no hub is to be asked."""
    sets = dict.fromkeys(_data_sets(entry.name, {}))
    absent = [f"{p} ({name})" if name else p for p, name in sets if not _at_hand(p, name)]
    if not absent:
        return
    known, name, remedy = HARNESS_TASKS.get(entry.name), entry.name, "put the files there, or "
    what = f"a folder {name}/ with its data set's files"
    if known is not None:
        files = " or ".join(" and ".join(names) for names in TEXT_FILES[name])
        what = f"{files}, published by {known.published}, or {what}"
    lacks = f"text task {name}: {folder} lacks {what}"
    if entry.kind.name != "TASK":
        lacks = f"text task {name}: the cache of data sets lacks {name_some(absent, 10)}"
        remedy = ""
        if members(entry) is not None:
            remedy = "ask its tasks one by one, which are read from folders, or "
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        then = "set HF_HUB_OFFLINE=0 to let lm-evaluation-harness fetch them"
    elif problem := _hub_problem():
        lacks += f", and the hub does not answer ({problem})"
        then = "try again with a network"
    else:
        return
    raise FileNotFoundError(f"{lacks}; {remedy}{then}")


@functools.cache
def _hub_problem() -> str | None:
    """Why the hub cannot be asked, None where it answers at all; asked once in a process."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # whatever the HTTP client in use raises
        return f"{type(error).__name__}: {error}".split("\n")[0][:120]
    return None
