"""Finds studies and stages by the names that people give them.

A stage: the first digits of its identity, its folder's name or how that begins, or a whole label.
"""

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from midstream import recipes
from midstream.core.identity import kept_digests
from midstream.core.storage import read_json, write_json
from midstream.core.tokens import nearest
from midstream.cost.graph import order
from midstream.study.label import MARK, digits_of, labels
from midstream.study.stages import Pretrain, Stage, Trained
from midstream.study.store import Ledger, read_stage
from midstream.study.studies import AnyStudy, Study, Suite

Recipe = Callable[..., AnyStudy]
# What JSON calls null, true and false.
_CONSTANTS = {"None": None, "True": True, "False": False}
# By the names that `run` was given, those of the studies that it ran.
ASKED = "asked.json"


def find_study(
    name: str, settings: Sequence[str], ledger: Ledger | None = None, *, verify: bool = False
) -> AnyStudy:
    """The study of a recipe (`pocket.when_images_arrive`, `my_file.py:function`).

    `settings` are `name=value` pairs for its arguments, read as these are annotated. With a
    `ledger` the bytes of data files that it knows are not read again, unless to `verify` them.
    Raises ValueError or FileNotFoundError with what there is if a name is unknown, ValueError with
    an example for a value that its argument does not take, and with the line for what a user's file
    gets wrong.
    """
    own = _file_of(name) if ".py" in name else None
    with nullcontext() if own is None else _running(own):
        recipe = _from_catalogue(name) if own is None else _from_file(name, own)
        arguments = _arguments(name, recipe, settings)
        with nullcontext() if ledger is None else kept_digests(ledger.digests, again=verify):
            study = recipe(**arguments)
    if not isinstance(study, Study | Suite):
        raise ValueError(f"{name} returned a {type(study).__name__}, not a Study or a Suite")
    return study


def last_study(name: str, ledger: Ledger, settings: Sequence[str]) -> tuple[AnyStudy, str | None]:
    """The study last run in the store under this name, else the recipe's; and what is to be said of
    how it was found, if anything.

    A name is what `run` was given, that of a stored study, or of one within a stored suite; the
    scale at its end may be left out. `settings` ask for the recipe with these arguments. Raises as
    `find_study`; a name that is nothing of these is answered with the nearest.
    """
    kept = [] if settings else _last_first(ledger)
    asked = _asked(ledger).get(_asked_as(name))
    if found := [other for other in kept if other == asked or _answers(other, name)]:
        note = _choice(name, found) or _changed(name, ledger, found[0])
        return ledger.load_study(found[0]), note
    parts = [study for other in kept for study in _parts(ledger, other)]
    if within := [study for study in parts if _answers(study.name, name)]:
        return within[0], _choice(name, [study.name for study in within])
    if ".py" not in name and name not in (known := catalogue()):
        stored = ledger.study_names()
        raise ValueError(
            f"no study {name!r}; {nearest(name, [*stored, *known])}store {ledger.store} holds "
            f"{', '.join(stored) or 'none'}, and there are the recipes {', '.join(known)}"
        )
    return find_study(name, settings, ledger), None


def _parts(ledger: Ledger, name: str) -> tuple[Study, ...]:
    """The studies of a stored one; none where another version wrote it, as nobody asked for it."""
    with suppress(ValueError):
        return ledger.load_study(name).studies
    return ()


def _changed(name: str, ledger: Ledger, kept: str) -> str | None:
    """That a user's file was edited after its study was run."""
    file, stored = Path(name.rpartition(":")[0]), ledger.store / "studies" / f"{kept}.json"
    if ".py" not in name or not file.is_file() or file.stat().st_mtime <= stored.stat().st_mtime:
        return None
    return f"{kept} is shown as it was run; {file} was changed since: midstream run takes that over"


def _choice(name: str, found: Sequence[str]) -> str | None:
    """Which of several was taken, and how to have another."""
    first, *others = dict.fromkeys(found)
    text = f"{name}: {first} was run last and is shown; there is also {', '.join(others)}"
    return text if others else None


def keep_asked(ledger: Ledger, name: str, study: AnyStudy) -> None:
    """Note which study `run` was given under a name of its own, so that `last_study` finds it."""
    key, asked = _asked_as(name), _asked(ledger)
    if key != study.name and asked.get(key) != study.name:
        write_json(ledger.store / ASKED, {**asked, key: study.name})


def _asked(ledger: Ledger) -> dict[str, str]:
    path = ledger.store / ASKED
    return cast(dict[str, str], read_json(path)) if path.is_file() else {}


def _asked_as(name: str) -> str:
    """A recipe's name; that of a file is the same from every folder."""
    return os.path.abspath(name) if ".py" in name else name


def _last_first(ledger: Ledger) -> list[str]:
    """The stored studies, the one that was run last before the others."""
    folder = ledger.store / "studies"
    times = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in ledger.study_names()}
    return sorted(times, key=lambda name: times[name], reverse=True)


def _answers(stored: str, name: str) -> bool:
    return stored == name or stored.startswith(f"{name}.")


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
        raise ValueError(
            f"no study {name!r}; {nearest(name, list(known))}there are {', '.join(known)}, or "
            "give your own as path/to/file.py:function"
        )
    return known[name]


def _file_of(name: str) -> Path:
    path_text, _, _ = name.rpartition(":")
    path = Path(path_text or name)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a study as path/to/file.py:function")
    return path


@contextmanager
def _running(path: Path) -> Iterator[None]:
    """Run a user's file as Python does: with the modules beside it. Raises ValueError that names
    file and line for whatever it gets wrong, but for what says itself what is to be done."""
    folder, before = str(path.parent.absolute()), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = [one for one in frames if _is_theirs(Path(one.filename), path.parent)]
        # What Midstream refuses says what is to be done; a slip of the file's own does not.
        if isinstance(error, ValueError | OSError) and (not at or at[-1] is not frames[-1]):
            raise
        raise ValueError(_failed(path, error, at)) from error
    finally:
        sys.path.remove(folder)
        # Another study's modules may be called the same.
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and _is_theirs(Path(file), path.parent):
                del sys.modules[name]


def _is_theirs(file: Path, folder: Path) -> bool:
    """Whether a module lies beside a user's study and is no installed one."""
    file = file.absolute()
    installed = "site-packages" in file.parts or file.is_relative_to(Path(__file__).parents[1])
    return file.is_relative_to(folder.absolute()) and not installed


def _failed(path: Path, error: Exception, at: Sequence[traceback.FrameSummary]) -> str:
    """Where in a user's file, or in one beside it, something went wrong, and what."""
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: {error.msg}"
    if isinstance(error, ModuleNotFoundError):
        told += "; modules are looked for beside the file, and among what is installed"
    return f"{at[-1].filename}, line {at[-1].lineno}: {told}" if at else f"{path}: {told}"


def _from_file(name: str, path: Path) -> Recipe:
    _, colon, function = name.rpartition(":")
    # Not under its own name, which may be that of a module (json.py).
    spec = importlib.util.spec_from_file_location(f"study_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where its classes are looked for by their module's name (dataclasses).
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    recipe = getattr(module, function, None) if colon else None
    if not callable(recipe):
        known = list(_recipes_of(module))
        has = f"it has {', '.join(known) or 'none that is annotated to return a Study'}"
        if not colon:
            raise ValueError(f"name a function of {path}: {path}:{(known or ['study'])[0]}; {has}")
        raise ValueError(f"{path} has no function {function!r}; {nearest(function, known)}{has}")
    return cast(Recipe, recipe)


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
    arguments: dict[str, Any] = {}
    for key, text in _pairs("--set", settings).items():
        if key not in known:
            takes = ", ".join(known) or "no arguments"
            near = nearest(key, list(known))
            raise ValueError(f"{name} has no argument {key!r}; {near}it takes {takes}")
        arguments[key] = _annotated(name, key, text, known[key].annotation)
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
    hints = get_type_hints(recipe)
    for name, parameter in inspect.signature(recipe).parameters.items():
        keys = get_args(hints.get(name))
        if parameter.kind is parameter.VAR_KEYWORD and keys:
            for key, hint in get_type_hints(keys[0]).items():
                found[key] = inspect.Parameter(
                    key, parameter.KEYWORD_ONLY, default=None, annotation=hint
                )
        else:
            plain = bool if isinstance(parameter.default, bool) else Any
            found[name] = parameter.replace(annotation=hints.get(name, plain))
    return found


def _annotated(name: str, key: str, text: str, hint: Any) -> Any:
    """A value as its annotation reads it: as JSON, as text, or as a list without its quotes."""
    try:
        adapter = TypeAdapter(hint)
    except PydanticSchemaGenerationError:
        return _value(text)
    bare = text.strip()
    if bare[:1] + bare[-1:] in ("[]", "()"):
        bare = bare[1:-1].rstrip(", ")
    parts = [part.strip().strip("\"'") for part in bare.split(",")] if bare else []
    for value in (_value(text), text, parts):
        try:
            return adapter.validate_python(value)
        except ValidationError:
            continue
    words, example = _described(hint)
    raise ValueError(
        f"--set {key}={text}: {key} of {name} takes {words}, such as --set {key}={example}"
    )


# What a kind of value, and a list of it, is called, and an example of either.
_PLAIN = {
    bool: ("true or false", "true"),
    int: ("a whole number", "7", "a list of whole numbers", "7,365"),
    float: ("a number", "0.5", "a list of numbers", "0.1,0.5"),
    str: ("a text", "some-name", "a list of texts", "one,other"),
    Path: ("a path", "some/folder", "a list of paths", "some/folder,other/folder"),
    NoneType: ("null", "null"),
}


def _described(hint: Any) -> tuple[str, str]:
    """What an annotation takes, in plain words, and an example of it."""
    if hint in _PLAIN:
        return _PLAIN[hint][0], _PLAIN[hint][1]
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}", str(inner[0])
    if kind in (Union, UnionType):
        found = [_described(one) for one in inner if (one, float in inner) != (int, True)]
        return " or ".join(dict.fromkeys(words for words, _ in found)), found[0][1]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a map", """'{"name": 0.5}'"""
    if isinstance(kind, type) and issubclass(kind, Sequence) and inner:
        if (words := _PLAIN.get(inner[0], ()))[2:]:
            return words[2], words[3]
        told, example = _described(inner[0])
        return f"a list, each of it {told}", example
    return str(getattr(hint, "__name__", hint)), "VALUE"


def read_settings(option: str, settings: Sequence[str]) -> dict[str, Any]:
    """The `name=value` pairs of an option, the values JSON (or Python's None, True, False) or else
    text.

    Raises ValueError for what is no pair, and for a name given twice.
    """
    return {key: _value(text) for key, text in _pairs(option, settings).items()}


def _pairs(option: str, settings: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{option} takes name=value, got {setting!r}")
        if key in values:
            raise ValueError(f"{option} gives {key!r} twice")
        values[key] = text
    return values


def _value(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def training_stage(study: AnyStudy, wanted: str | None = None) -> Trained:
    """The first training stage of a kind (pretrain, continue, finetune), or the one that `wanted`
    names.

    Without `wanted`, the first that trains on pictures, or the first where none does. Raises
    ValueError that lists the stages if none or several are meant.
    """
    every = order(study)
    stages = [stage for stage in every if isinstance(stage, Trained)]
    if not stages:
        raise ValueError(f"{study.name} trains nothing: it has no line and no baseline")
    if wanted is None:
        return next((stage for stage in stages if not isinstance(stage, Pretrain)), stages[0])
    if of_kind := [stage for stage in stages if stage.kind == wanted]:
        return of_kind[0]
    by_name = {stage.name: stage for stage in stages}
    found = meant(wanted, list(by_name))
    if len(found) != 1:
        called = labels(every)
        names = "; ".join(called[name] for name in found or by_name)
        begin = f"{len(found)} training stages begin" if found else "no training stage begins"
        raise ValueError(f"{begin} with {wanted!r} in {study.name}; choose one of {names}")
    return by_name[found[0]]


def stored_stage(ledger: Ledger, wanted: str) -> Stage:
    """The stage of a store that `wanted` names.

    As `stored_name`; raises ValueError also where this version cannot read the stage.
    """
    name = stored_name(ledger, wanted)
    path = ledger.store / name / "stage.json"
    stage = read_stage(path, "see midstream store ls")
    if stage.name != name:
        raise ValueError(
            f"{path} was written by an earlier version, which named it otherwise; see midstream "
            "store ls"
        )
    return stage


def stored_name(ledger: Ledger, wanted: str) -> str:
    """The folder's name of the stage of a store that `wanted` names.

    Raises FileNotFoundError for a store without stages, ValueError that lists or suggests names
    where none or several are meant.
    """
    names = sorted(path.parent.name for path in ledger.store.glob("*/stage.json"))
    if not names:
        raise FileNotFoundError(f"store {ledger.store} holds no stage; give another --store")
    found = meant(wanted, names)
    if len(found) > 1:
        raise ValueError(f"{len(found)} stages begin with {wanted!r}: {', '.join(found)}")
    if not found:
        raise ValueError(
            f"no stage of {ledger.store} begins with {wanted!r}; "
            f"{nearest(wanted, names, 0.3)}see midstream store ls"
        )
    return found[0]


def meant(wanted: str, names: Sequence[str]) -> list[str]:
    """The names that a person may mean: that very one, else all that begin with it."""
    wanted = wanted.rpartition(MARK)[2].strip()
    if wanted in names:
        return [wanted]
    return [
        name
        for name in names
        if wanted and (name.startswith(wanted) or digits_of(name).startswith(wanted))
    ]
