"""One stage of a study or of a store, chosen as a person names it.

A handle (the first digits of the identity, as labels end with), a folder's name or how it begins,
or a whole label.
"""

from collections.abc import Sequence
from difflib import get_close_matches

from pydantic import ValidationError

from midstream.study.graph import order
from midstream.study.label import MARK, digits_of, labels
from midstream.study.ledger import Ledger
from midstream.study.stage import Pretrain, Stage, Trained, stage_from_json
from midstream.study.studies import AnyStudy


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
    try:
        stage = stage_from_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is no stage of this version: {error}") from None
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
        near = get_close_matches(wanted, names, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no stage of {ledger.store} begins with {wanted!r}; {hint}see midstream store ls"
        )
    return found[0]


def meant(wanted: str, names: Sequence[str]) -> list[str]:
    """The folder names that a person may mean: that very one, else all of which it is the first
    digits or letters.
    """
    wanted = wanted.rpartition(MARK)[2].strip()
    if wanted in names:
        return [wanted]
    return [
        name
        for name in names
        if wanted and (name.startswith(wanted) or digits_of(name).startswith(wanted))
    ]
