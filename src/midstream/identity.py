"""Canonical text and hash of a frozen model; refuses what has no stable form."""

import hashlib
import json
import math
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

# Part of every identity: raise it when the meaning of a stored stage changes.
FORMAT_VERSION = 5


class Placement:
    """Marks a field that says where or how work runs and never what comes out.

    Use as `Annotated[Path, Placement]`; such fields are left out of the identity.
    """


def canonical(value: Any) -> Any:
    """The JSON-able form of `value` that its identity is made of.

    Models become objects of their fields, with the class name under "is" and without the fields
    marked `Placement`; an object with an attribute `identity` is replaced by that string.
    Raises TypeError for what has no stable form (sets, paths, functions) and ValueError for NaN.
    """
    identity = getattr(value, "identity", None)
    if isinstance(identity, str):
        return {"is": type(value).__name__, "identity": identity}
    if isinstance(value, BaseModel):
        return {"is": type(value).__name__} | fields_of(value)
    if isinstance(value, bool | int | str) or value is None:
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("NaN has no identity")
        return repr(value)
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"only text keys have a stable form, got {list(value)!r}")
        return {key: canonical(value[key]) for key in sorted(value)}
    raise TypeError(f"{type(value).__name__} {value!r} has no stable form for an identity")


def fields_of(model: BaseModel) -> dict[str, Any]:
    """The canonical form of a model's own fields, without `Placement` and without defaults.

    A field that has its default says nothing, so that a new option renames no stage that does not
    use it. A default is therefore a part of what stored identities mean: it never changes without a
    new FORMAT_VERSION (`tests/golden/defaults.json` holds them).
    """
    fields = type(model).model_fields
    return {
        name: canonical(value)
        for name in sorted(fields)
        if Placement not in fields[name].metadata
        and (value := getattr(model, name)) != fields[name].get_default(call_default_factory=True)
    }


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for `value` and the format version."""
    text = json.dumps([FORMAT_VERSION, canonical(value)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_fingerprint(root: Path, patterns: tuple[str, ...] = ("**/*",)) -> str:
    """Sixteen digits for the names and bytes of the files under `root` that match `patterns`.

    Raises FileNotFoundError if the folder is missing or nothing matches.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist; give the folder that holds it")
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    if not found:
        raise FileNotFoundError(f"no file under {root} matches {', '.join(patterns)}")
    listing = [[path.relative_to(root).as_posix(), file_sha256(path)] for path in sorted(found)]
    return digest(listing)


def world_fingerprint(root: Path) -> str:
    """As `folder_fingerprint`, but a prepared source in `root/*/*` counts by the fingerprint that
    its `source.json` names, and its bytes are not read.

    Raises FileNotFoundError if the folder is missing or empty.
    """
    indices = sorted(root.glob("*/*/source.json"))
    if not indices:
        return folder_fingerprint(root)
    prepared = {index.parent for index in indices}
    listing = [
        [path.relative_to(root).as_posix(), file_sha256(path)]
        for path in sorted(root.glob("**/*"))
        if path.is_file() and prepared.isdisjoint(path.parents)
    ]
    for index in indices:
        content = json.loads(index.read_text(encoding="utf-8"))["fingerprint"]
        listing.append([index.parent.relative_to(root).as_posix(), content])
    return digest(listing)
