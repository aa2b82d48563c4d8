"""One stage of a study, chosen as a person names it."""

from midstream.study.graph import order
from midstream.study.stage import Pretrain, Trained
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
