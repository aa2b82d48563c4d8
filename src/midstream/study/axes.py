"""Axes over any field of any stage: one model varied into the lines of a study.

A field is the stage's kind and its path: `continue.training.schedule.end_rate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import BaseModel

from midstream.core.tokens import nearest
from midstream.study.stages import DataStage, Evaluate, Prepare, Stage, StageBase
from midstream.study.studies import Axis as Value
from midstream.study.studies import Line, line_name


@dataclass(frozen=True)
class Axis:
    """A field and the values that it takes.

    `values` are the field's own, or maps what the figure calls them to them: {"short": Rows(...)}.
    """

    field: str
    values: Sequence[Any] | Mapping[Value, Any]

    @property
    def points(self) -> tuple[tuple[Value, Any], ...]:
        """What the figure calls each value, and the value."""
        if isinstance(self.values, Mapping):
            return tuple(self.values.items())
        for value in self.values:
            if not isinstance(value, int | float | str):
                raise ValueError(
                    f"axis over {self.field}: {type(value).__name__} has no place on an axis; give "
                    "a dict from a number or a name to it"
                )
        return tuple((value, value) for value in self.values)


def grid(base: Evaluate, **axes: Axis) -> tuple[Line, ...]:
    """A line for every combination of the axes' values, each axis under its own name.

    Raises ValueError for a field that the chain of `base` does not have, and what the changed
    stages refuse.
    """
    lines = []
    for points in product(*(axis.points for axis in axes.values())):
        result = base
        for axis, (_, value) in zip(axes.values(), points, strict=True):
            result = with_field(result, axis.field, value)
        at = dict(zip(axes, (place for place, _ in points), strict=True))
        lines.append(Line(name=line_name(at), axes=at, result=result))
    return tuple(lines)


def with_field(result: Evaluate, field: str, value: Any) -> Evaluate:
    """The same model but for one field of one kind of stage in its chain.

    Raises ValueError that names the nearest field, or the kinds of stage there are.
    """
    kind, _, path = field.partition(".")
    kinds = _kinds(result)
    if kind not in kinds or not path:
        hint = "" if kind in kinds else nearest(kind, kinds)
        raise ValueError(
            f"axis over {field!r}: a field begins with a kind of stage and a dot; {hint}this model "
            f"has {', '.join(kinds)}"
        )
    done: dict[int, BaseModel] = {}

    def rebuilt(model: BaseModel) -> BaseModel:
        """The model with the field changed in every stage of that kind that it is or holds."""
        if id(model) in done:
            return done[id(model)]
        values = {name: getattr(model, name) for name in type(model).model_fields}
        parts = {name: part for name, part in values.items() if isinstance(part, BaseModel)}
        changed = {n: new for n, part in parts.items() if (new := rebuilt(part)) is not part}
        # At once: a stage that starts from another one of its kind is checked against it.
        if isinstance(model, StageBase | Prepare) and getattr(model, "kind", None) == kind:
            found = _with_path(model, values | changed, path.split("."), field, value)
        else:
            found = type(model)(**values | changed) if changed else model
        done[id(model)] = found
        return found

    changed = rebuilt(result)
    assert isinstance(changed, Evaluate)
    return changed


def _kinds(result: Evaluate) -> tuple[str, ...]:
    # Data stages follow from what the others call their data.
    found: dict[str, None] = {"prepare": None}

    def look(stage: Stage) -> None:
        found.setdefault(stage.kind)
        for parent in stage.parents:
            if not isinstance(parent, DataStage):
                look(parent)

    look(result)
    return tuple(found)


def _with_path(
    model: BaseModel, values: Mapping[str, Any], path: Sequence[str], field: str, value: Any
) -> BaseModel:
    """A model like `model` with these values but one, checked as if it had been written so."""
    name, rest = path[0], path[1:]
    known = type(model).model_fields
    if name not in values:
        raise ValueError(
            f"axis over {field!r}: {type(model).__name__} has no field {name!r}; "
            f"{nearest(name, known, 0.5)}its fields are {', '.join(known)}"
        )
    part = values[name]
    if rest:
        if not isinstance(part, BaseModel):
            raise ValueError(
                f"axis over {field!r}: {name} is a {type(part).__name__} and has no fields; give "
                "the whole of it as the value"
            )
        inner = {each: getattr(part, each) for each in type(part).model_fields}
        value = _with_path(part, inner, rest, field, value)
    return type(model)(**{**values, name: value})
