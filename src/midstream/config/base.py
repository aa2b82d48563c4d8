"""What every option is made of: frozen models that check themselves; their errors in words."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from midstream.core.tokens import nearest

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


def listed(value: Any) -> Any:
    """The names in a text ("wandb", "[wandb, tensorboard]": shells take quotes away); anything else
    as it is."""
    if not isinstance(value, str):
        return value
    return [name.strip(" '\"") for name in value.strip(" []").split(",") if name.strip()]


class Config(BaseModel):
    """A frozen model; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _suggest(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                hint = nearest(key, cls.model_fields, 0.5)
                known = ", ".join(cls.model_fields)
                raise ValueError(f"{cls.__name__} has no field {key!r}; {hint}fields: {known}")
        return values


def error_words(error: Exception) -> str:
    """What a person is told of an error: of wrong values a line each, with the field's path."""
    if not isinstance(error, ValidationError):
        return str(error)
    lines = []
    for item in error.errors(include_url=False):
        path = [*([] if error.title.endswith("Request") else [error.title]), *item["loc"]]
        told = ".".join(str(part) for part in path) or "request"
        lines.append(f"{told}: {item['msg'].removeprefix('Value error, ')}{_range_words(item)}")
    return "\n".join(lines)


def _range_words(item: Mapping[str, Any]) -> str:
    """The number that lies beyond a limit, and for a percentage in place of a share how it is
    written; nothing for other errors."""
    value = item["input"]
    if not item["type"].startswith(("less_than", "greater_than")):
        return ""
    number = isinstance(value, int | float)
    if number and item.get("ctx") == {"le": 1.0} and 1 < value <= 100:
        return f", not {value}; shares are from 0 to 1, {value:g} % is {value / 100:g}"
    return f", not {value}"
