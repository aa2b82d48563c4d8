"""Where a study runs: what it says itself, what was asked for, and what must be there for that."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from midstream.config import Machine
from midstream.study.studies import AnyStudy


def machine_for(study: AnyStudy, chosen: Mapping[str, Any]) -> Machine:
    """The machine of a run: the study's own placement, and over it what was `chosen` for this run.

    A choice that is None was not made. Over several nodes stages run one by one. Raises ValueError
    for choices that do not fit together, and where a tracker is not installed.
    """
    made = {name: value for name, value in chosen.items() if value is not None}
    values: dict[str, Any] = {**study.machine, **made}
    if values.get("nodes", 1) > 1:
        values["workers"] = 1
    machine = Machine.model_validate(values)
    require_trackers(machine)
    return machine


def require_trackers(machine: Machine) -> None:
    """Raises ValueError, with the command that installs it, for a tracker that is not there."""
    missing = [name for name in machine.tracking if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"tracking asks for {', '.join(missing)}, which is not installed here; run: "
            f"pip install 'midstream[{','.join(missing)}]', or leave it out of tracking"
        )
