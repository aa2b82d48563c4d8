"""One stage of a study or of a store, chosen as a person names it."""

from difflib import get_close_matches

from pydantic import ValidationError

from midstream.study.graph import order
from midstream.study.ledger import Ledger
from midstream.study.stage import Pretrain, Stage, Trained, stage_from_json
from midstream.study.studies import AnyStudy


def training_stage(study: AnyStudy, wanted: str | None = None) -> Trained:
    """The first training stage of a kind (pretrain, continue, finetune), or the one whose name
    begins with `wanted`.

    Without `wanted`, the first that trains on pictures, or the first where none does. Raises
    ValueError that lists the stages if none or several are meant.
    """
    stages = [stage for stage in order(study) if isinstance(stage, Trained)]
    if not stages:
        raise ValueError(f"{study.name} trains nothing: it has no line and no baseline")
    if wanted is None:
        return next((stage for stage in stages if not isinstance(stage, Pretrain)), stages[0])
    of_kind = [stage for stage in stages if stage.kind == wanted][:1]
    found = of_kind or [stage for stage in stages if stage.name.startswith(wanted)]
    if len(found) != 1:
        names = ", ".join(stage.name for stage in found or stages)
        begin = f"{len(found)} training stages begin" if found else "no training stage begins"
        raise ValueError(f"{begin} with {wanted!r} in {study.name}; choose one of {names}")
    return found[0]


def stored_stage(ledger: Ledger, wanted: str) -> Stage:
    """The stage of a store whose name begins with `wanted`.

    Raises FileNotFoundError for a store without stages, ValueError that lists or suggests names
    where none or several are meant, or where this version cannot read the stage.
    """
    names = sorted(path.parent.name for path in ledger.store.glob("*/stage.json"))
    if not names:
        raise FileNotFoundError(f"store {ledger.store} holds no stage; give another --store")
    found = [name for name in names if name == wanted] or [
        name for name in names if name.startswith(wanted)
    ]
    if len(found) > 1:
        raise ValueError(f"{len(found)} stages begin with {wanted!r}: {', '.join(found)}")
    if not found:
        near = get_close_matches(wanted, names, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no stage of {ledger.store} begins with {wanted!r}; {hint}see midstream store ls"
        )
    path = ledger.store / found[0] / "stage.json"
    try:
        stage = stage_from_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is no stage of this version: {error}") from None
    if stage.name != found[0]:
        raise ValueError(
            f"{path} was written by an earlier version, which named it otherwise; see midstream "
            "store ls"
        )
    return stage
