"""Finds the recipe that a command names and calls it with the arguments it was given."""

import importlib
import importlib.util
import inspect
import json
import pkgutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from midstream import recipes
from midstream.identity import kept_digests
from midstream.storage import read_json, write_json
from midstream.study.ledger import Ledger
from midstream.study.studies import AnyStudy, Study, Suite

Recipe = Callable[..., AnyStudy]
# By the names that `run` was given, those of the studies that it ran.
ASKED = "asked.json"


def find_study(
    name: str, settings: Sequence[str], ledger: Ledger | None = None, *, verify: bool = False
) -> AnyStudy:
    """The study of a recipe (`pocket.when_images_arrive`, `my_file.py:function`).

    `settings` are `name=value` pairs for its arguments, the values JSON or else text. With a
    `ledger` the bytes of data files that it knows are not read again, unless to `verify` them.
    Raises ValueError or FileNotFoundError with what there is if a name is unknown.
    """
    recipe = _from_file(name) if ".py" in name else _from_catalogue(name)
    arguments = _arguments(name, recipe, settings)
    with nullcontext() if ledger is None else kept_digests(ledger.digests, again=verify):
        study = recipe(**arguments)
    if not isinstance(study, Study | Suite):
        raise ValueError(f"{name} returned a {type(study).__name__}, not a Study or a Suite")
    return study


@dataclass(frozen=True)
class LastStudy:
    """A study, and what is to be said of how it was found: `note` is None where all was clear."""

    study: AnyStudy
    note: str | None = None


def last_study(name: str, ledger: Ledger, settings: Sequence[str]) -> LastStudy:
    """The study last run in the store under this name, else the recipe's.

    A name is what `run` was given, that of a stored study, or of one within a stored suite; the
    scale at its end may be left out. `settings` ask for the recipe with these arguments. Raises as
    `find_study`; a name that is nothing of these is answered with the nearest.
    """
    kept = [] if settings else _last_first(ledger)
    asked = _asked(ledger).get(_asked_as(name))
    if found := [other for other in kept if other == asked or _answers(other, name)]:
        return LastStudy(ledger.load_study(found[0]), _choice(name, found))
    within: dict[str, Study] = {}
    for other in kept:
        for study in ledger.load_study(other).studies:
            if _answers(study.name, name):
                within.setdefault(study.name, study)
    if within:
        return LastStudy(next(iter(within.values())), _choice(name, list(within)))
    if ".py" not in name and name not in (known := catalogue()):
        stored = ledger.study_names()
        near = get_close_matches(name, [*stored, *known], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no study {name!r}; {hint}store {ledger.store} holds {', '.join(stored) or 'none'}, "
            f"and there are the recipes {', '.join(known) or 'none'}"
        )
    return LastStudy(find_study(name, settings, ledger))


def keep_asked(ledger: Ledger, name: str, study: AnyStudy) -> None:
    """Note which study `run` was given under a name of its own, so that `last_study` finds it."""
    key, asked = _asked_as(name), _asked(ledger)
    if key != study.name and asked.get(key) != study.name:
        write_json(ledger.store / ASKED, {**asked, key: study.name})


def _asked(ledger: Ledger) -> dict[str, str]:
    path = ledger.store / ASKED
    names: dict[str, str] = read_json(path) if path.is_file() else {}
    return names


def _asked_as(name: str) -> str:
    """A recipe's name; that of a file is the same from every folder."""
    return str(Path(name).absolute()) if ".py" in name else name


def _last_first(ledger: Ledger) -> list[str]:
    """The stored studies, the one that was run last before the others."""
    folder = ledger.store / "studies"
    times = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in ledger.study_names()}
    return sorted(times, key=lambda name: times[name], reverse=True)


def _answers(stored: str, name: str) -> bool:
    return stored == name or stored.startswith(f"{name}.")


def _choice(name: str, found: Sequence[str]) -> str | None:
    """Which of several was taken, and how to have another."""
    if len(found) == 1:
        return None
    return f"{name}: {found[0]} was run last and is shown; there is also {', '.join(found[1:])}"


def with_scale(settings: Sequence[str] | None, scale: str | None) -> list[str]:
    """The settings, and the scale that an option of its own may give."""
    return [*(settings or []), *([] if scale is None else [f"scale={json.dumps(scale)}"])]


def catalogue() -> dict[str, Recipe]:
    """Every recipe of the package that returns a study, by `module.function`."""
    found = {}
    for info in pkgutil.iter_modules(recipes.__path__):
        module = importlib.import_module(f"{recipes.__name__}.{info.name}")
        for name, function in _recipes_of(module).items():
            found[f"{info.name}.{name}"] = function
    return found


def _from_catalogue(name: str) -> Recipe:
    known = catalogue()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no study {name!r}; {hint}there are {', '.join(known) or 'none'}, "
            f"or give your own as path/to/file.py:function"
        )
    return known[name]


def _from_file(name: str) -> Recipe:
    path_text, _, function = name.rpartition(":")
    path = Path(path_text or name)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a study as path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = getattr(module, function, None) if path_text else None
    if not callable(recipe):
        known = ", ".join(_recipes_of(module)) or "none that is annotated to return a Study"
        raise ValueError(
            f"{path} has no function {function if path_text else ''!r}; it has {known}"
        )
    chosen: Recipe = recipe
    return chosen


def _recipes_of(module: ModuleType) -> dict[str, Recipe]:
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_")
        and f"{function.__module__}.".startswith(f"{module.__name__}.")
        and get_type_hints(function).get("return") in (Study, Suite)
    }


def _arguments(name: str, recipe: Recipe, settings: Sequence[str]) -> dict[str, Any]:
    known = _parameters(recipe)
    hints = get_type_hints(recipe)
    arguments: dict[str, Any] = {}
    for key, value in read_settings("--set", settings).items():
        if key not in known:
            takes = ", ".join(known) or "no arguments"
            raise ValueError(f"{name} has no argument {key!r}; it takes {takes}")
        arguments[key] = Path(str(value)) if hints.get(key) is Path else value
    needed = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in arguments
    ]
    if needed:
        raise ValueError(f"{name} needs {', '.join(needed)}; add --set {needed[0]}=VALUE")
    return arguments


def _parameters(recipe: Recipe) -> dict[str, inspect.Parameter]:
    """A recipe's parameters by name, those of a `**given: Unpack[TypedDict]` one by one."""
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(recipe).parameters.items():
        keys = get_args(get_type_hints(recipe).get(name))
        if parameter.kind is parameter.VAR_KEYWORD and keys:
            for key in get_type_hints(keys[0]):
                found[key] = inspect.Parameter(key, parameter.KEYWORD_ONLY, default=None)
        else:
            found[name] = parameter
    return found


def read_settings(option: str, settings: Sequence[str]) -> dict[str, Any]:
    """The `name=value` pairs of an option, the values JSON or else text.

    Raises ValueError for what is no pair, and for a name given twice.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{option} takes name=value, got {setting!r}")
        if key in values:
            raise ValueError(f"{option} gives {key!r} twice")
        values[key] = _value(text)
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
