"""What every recipe of the package resolves to, pinned as text that a person reads.

A difference is either meant, and then `python tests/recipes/test_resolved.py` writes the files anew
and the commit says why, or it is not. A line "identities" that changes alone names stages anew.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from midstream.cli.catalogue import catalogue, find_study
from midstream.core.identity import Placement, WorldFingerprint, canonical, digest
from midstream.cost.graph import order
from midstream.study.stages import Prepare, StageBase
from midstream.study.studies import AnyStudy

GOLDEN = Path(__file__).parents[1] / "golden" / "recipes"
ROOMS = ("interleaved.", "paper.", "pocket.", "pools.", "published.", "onset.", "noise.")
PINNED = sorted(name for name in catalogue() if name.startswith(ROOMS))

# More different values than these are told by their number, ends and digest.
MOST_VALUES = 8


def resolved(name: str, study: AnyStudy) -> str:
    """The lines, the axes, and by kind of stage each field with the values that it takes."""
    axes: dict[str, dict[Any, None]] = defaultdict(dict)
    for line in study.lines:
        for axis, value in line.axes.items():
            axes[axis][value] = None
    text = [f"{name}: {len(study.lines)} lines, {len(study.baselines)} baselines"]
    text += [f"  axis {axis} = {_values(list(values))}" for axis, values in axes.items()]
    stages = order(study)
    for kind in dict.fromkeys(stage.kind for stage in stages):
        alike = [stage for stage in stages if stage.kind == kind]
        text.append(f"  {kind}: {len(alike)}, identities {digest([s.identity for s in alike])}")
        fields: dict[str, dict[str, Any]] = defaultdict(dict)
        for stage in alike:
            for path, value in _leaves(stage):
                fields[path][repr(value)] = value
        text += [f"    {path} = {_values(list(held.values()))}" for path, held in fields.items()]
    return "\n".join(text) + "\n"


def _values(values: list[Any]) -> str:
    if len(values) <= MOST_VALUES:
        return " | ".join(str(value) for value in values)
    return f"{len(values)} values, {values[0]} ... {values[-1]}, {digest(canonical(values))}"


def _leaves(model: BaseModel, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in type(model).model_fields.items():
        if Placement in field.metadata or name == "kind":
            continue
        yield from _leaf(getattr(model, name), f"{path}.{name}".lstrip("."))


def _leaf(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    match value:
        case StageBase():
            yield path, f"<{value.kind}>"
        case Prepare():
            yield path, "<data>"
        case WorldFingerprint():
            yield path, "<fingerprint>"
        case BaseModel():
            yield path, type(value).__name__
            yield from _leaves(value, path)
        case tuple() | list() if any(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(value):
                yield from _leaf(item, f"{path}[{number}]")
        case _:
            yield path, value


@pytest.mark.parametrize("name", PINNED)
def test_a_recipe_resolves_to_what_is_pinned(name: str) -> None:
    assert resolved(name, find_study(name, [])) == (GOLDEN / f"{name}.txt").read_text()


def test_nothing_is_pinned_that_no_recipe_makes() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == PINNED


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name in PINNED:
        (GOLDEN / f"{name}.txt").write_text(resolved(name, find_study(name, [])))
