"""From a stage back to what its weights came from."""

from midstream.study.stage import (
    Continue,
    ContinueFrom,
    Finetune,
    InitFrom,
    LoadDecoder,
    LoadModel,
    Pretrain,
    Stage,
    StartText,
)


def came_from(
    stage: Stage,
) -> tuple[Pretrain | LoadDecoder | LoadModel | Continue, float] | None:
    """The stage whose weights a training stage starts from, and the share of its tokens there.

    None where it starts from the initialiser, and for what trains nothing.
    """
    if isinstance(stage, Finetune):
        before = stage.start
        if isinstance(before, StartText):
            return before.stage, before.completion
        return before, 1.0
    if isinstance(stage, Continue) and isinstance(stage.start, InitFrom):
        return stage.start.stage, 1.0
    if isinstance(stage, Continue) and isinstance(stage.start, ContinueFrom):
        return stage.start.stage, stage.start.completion
    return None


def warms_up_moments(stage: Stage) -> bool:
    """Whether the rate is held back while moments that start at zero fill."""
    start = stage.start if isinstance(stage, Continue | Finetune) else None
    return isinstance(start, ContinueFrom | InitFrom | StartText) and start.optimizer == "warm"
